"""A reward is the weighted sum of its components, each reported; what a component cannot judge is refused."""

import math
import re

import numpy as np
import pytest

from rlhf_critic.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import ComponentError, ConfigError, ScorerRejected
from rlhf_critic.reward_components import RewardComponents
from rlhf_critic.scorer_config import (
    CriticComponent,
    LengthPenalty,
    PythonComponent,
    RegexComponent,
    load_components,
)
from rlhf_critic.scoring import Conversation, Text

HERE = "tests.rlhf_critic.test_reward_components"
ITEMS = [Conversation("please", "why? of course"), Conversation("no", ""), Text("a b c", "b c")]


def shouts(prompts, responses):
    """A user's function: how much longer the response is than the prompt."""
    return [len(response) - len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


def too_few(prompts, responses):
    return [1.0]


def fails(prompts, responses):
    raise KeyError("gone")


def nan(prompts, responses):
    return [math.nan] * len(responses)


def words(prompts, responses):
    return ["good"] * len(responses)


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return Encoder(load_tokenizer(tiny_model), 64)


def test_the_sum_is_that_of_a_slow_loop(encoder):
    components = (
        CriticComponent(weight=2.0),
        LengthPenalty(weight=0.5, free_tokens=2),
        RegexComponent(name="asks", pattern=r"\?", weight=-3.0),
        PythonComponent(name="longer", function=f"{HERE}:shouts", weight=0.01),
    )
    critic_S = np.array([0.5, -1.25, 3.0], dtype=np.float32)
    total_S, parts = RewardComponents(components, encoder.count_tokens).combine(ITEMS, critic_S)
    pairs = [("please", "why? of course"), ("no", ""), ("a ", "b c")]
    for index, (prompt, response) in enumerate(pairs):
        tokens = len(encoder.tokenizer(response, add_special_tokens=False)["input_ids"])
        wanted = {
            "critic": float(critic_S[index]),
            "length_penalty": -max(0, tokens - 2),
            "asks": 1.0 if re.search(r"\?", response) else 0.0,
            "longer": len(response) - len(prompt),
        }
        assert {name: value_S[index] for name, value_S in parts.items()} == pytest.approx(wanted)
        weighted = sum(component.weight * wanted[component.name] for component in components)
        assert total_S[index] == pytest.approx(weighted, abs=1e-6)


def test_the_critic_alone_needs_no_response_and_reports_nothing_more(encoder):
    critic_S = np.array([1.5], dtype=np.float32)
    total_S, parts = RewardComponents((CriticComponent(),), encoder.count_tokens).combine([[1, 2]], critic_S)
    assert (total_S.tolist(), parts) == ([1.5], {})


@pytest.mark.parametrize("item", [[1, 2], Text("a b c")])
def test_an_item_without_a_response_is_refused(encoder, item):
    components = RewardComponents((CriticComponent(), LengthPenalty()), encoder.count_tokens)
    with pytest.raises(ScorerRejected, match="item 0 does not say which part of it is the response") as refused:
        components.combine([item], np.zeros(1, dtype=np.float32))
    assert refused.value.kind == "no_response"


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("too_few", "must return a finite number for each of 3 responses, and returned shape"),
        ("fails", "failed: KeyError: 'gone'"),
        ("nan", "must return a finite number"),
        ("words", "failed: ValueError"),
    ],
)
def test_a_function_that_fails_is_named(encoder, function, what):
    component = PythonComponent(name="mine", function=f"{HERE}:{function}")
    components = RewardComponents((CriticComponent(), component), encoder.count_tokens)
    with pytest.raises(ComponentError, match=rf"component 'mine': {HERE}:{function} {what}"):
        components.combine(ITEMS, np.zeros(3, dtype=np.float32))


@pytest.mark.parametrize("function", ["nowhere.at_all:f", f"{HERE}:absent"])
def test_a_function_that_is_not_there_is_named(encoder, function):
    with pytest.raises(ConfigError, match=r"component .mine.: function .* cannot be imported"):
        RewardComponents((CriticComponent(), PythonComponent(name="mine", function=function)), encoder.count_tokens)


@pytest.mark.parametrize(
    ("text", "at_fault"),
    [
        ("components:\n- {kind: critic}\n- {kind: regex, name: a, pattern: '('}\n", "pattern"),
        ("components:\n- {kind: magic}\n", "magic"),
        ("components:\n- {kind: critic, weight: .nan}\n", "weight"),
        ("components:\n- {kind: critic}\n- {kind: critic, name: other}\n", "exactly once"),
        ("components:\n- {kind: critic}\n- {kind: length_penalty, name: critic}\n", "the same name"),
        ("components: []\n", "at least 1"),
        ("component:\n- {kind: critic}\n", "component"),
        ("components:\n- {kind: python, name: a, function: 'os.system'}\n", "function"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, at_fault):
    path = tmp_path / "rewards.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=at_fault) as refused:
        load_components(str(path))
    assert "rewards.yaml:1" in str(refused.value)


def test_no_file_means_the_critic():
    assert load_components(None) == (CriticComponent(),)
