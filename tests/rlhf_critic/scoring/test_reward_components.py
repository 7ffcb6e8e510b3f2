"""A reward is the weighted sum of its components, and items that a component cannot score are rejected."""

import math
import re
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_critic.config.serve import (
    CallLimits,
    CriticComponent,
    LengthPenalty,
    PythonComponent,
    RegexComponent,
    load_components,
)
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.errors import ComponentError, ConfigError, ScorerRejected, ScorerUnavailable
from rlhf_critic.scoring import reward_components
from rlhf_critic.scoring.items import Conversation, Text, finish_items
from rlhf_critic.scoring.reward_components import RewardComponents

HERE = "tests.rlhf_critic.scoring.test_reward_components"
ITEMS = [Conversation("please", "why? of course"), Conversation("no", ""), Text("a b c", "b c")]


def shouts(prompts, responses):
    """Returns how much longer each response is than its prompt, as a user's function."""
    return [len(response) - len(prompt) for prompt, response in zip(prompts, responses, strict=True)]


def too_few(prompts, responses):
    return [1.0]


def fails(prompts, responses):
    raise KeyError("gone")


def nan(prompts, responses):
    return [math.nan] * len(responses)


def words(prompts, responses):
    return ["good"] * len(responses)


def digits(prompts, responses):
    return ["1.5"] * len(responses)


def nones(prompts, responses):
    return [None] * len(responses)


def nothing(prompts, responses):
    return None


def columns(prompts, responses):
    return np.zeros((len(responses), 1))


def beyond_fp32(prompts, responses):
    return [0.0, 1e39, 0.0]


def leaves(prompts, responses):
    sys.exit("done")


def echo(prompts, responses):
    TOLD.append((prompts, responses))
    return np.arange(len(responses))


def turns_and_steals(prompts, responses):
    prompts.clear()
    return [True] * len(responses)


def hangs(prompts, responses):
    if "hang" in responses:
        assert LET_GO.wait(60)
    return [float(len(response)) for response in responses]


def times_out(prompts, responses):
    raise TimeoutError("the judge's own")


LET_GO = threading.Event()
NO_FUNCTION = 3
TOLD = []
fp32 = st.floats(-1e6, 1e6, width=32)


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


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8), fp32), min_size=1, max_size=6),
    st.lists(st.floats(-100, 100), min_size=4, max_size=4),
    st.integers(0, 4),
)
def test_any_sum_is_that_of_a_slow_loop(rows, weights, free_tokens):
    components = (
        RegexComponent(name="asks", pattern="[?a]$", weight=weights[0]),
        CriticComponent(weight=weights[1]),
        LengthPenalty(weight=weights[2], free_tokens=free_tokens),
        PythonComponent(name="longer", function=f"{HERE}:shouts", weight=weights[3]),
    )
    critic_S = np.array([critic for *_, critic in rows], dtype=np.float32)
    items = [Conversation(prompt, response) for prompt, response, _ in rows]
    total_S, parts = RewardComponents(components, len).combine(items, critic_S)
    assert total_S.dtype == np.float32
    assert list(parts) == ["asks", "critic", "length_penalty", "longer"]
    for index, (prompt, response, critic) in enumerate(rows):
        wanted = [
            1.0 if re.search("[?a]$", response) else 0.0,
            critic,
            -max(0, len(response) - free_tokens),
            len(response) - len(prompt),
        ]
        assert [value_S[index] for value_S in parts.values()] == wanted
        added = [weight * value for weight, value in zip(weights, wanted, strict=True)]
        assert total_S[index] == pytest.approx(sum(added), abs=1e-6 * sum(map(abs, added)) + 1e-6)


@pytest.mark.parametrize(
    "components",
    [
        (CriticComponent(weight=1e300),),
        (CriticComponent(weight=3e38), LengthPenalty(weight=3e38)),
        (CriticComponent(), LengthPenalty(weight=3.4e38)),
    ],
)
def test_a_sum_that_is_not_finite_is_no_reward(components):
    critic_S = np.array([0.0, 2.0], dtype=np.float32)
    items = [Conversation("a", ""), Conversation("a", "bb")]
    with pytest.raises(ComponentError, match=r"item [01]: the weighted sum of critic.* is -?(inf|nan): lower"):
        RewardComponents(components, len).combine(items, critic_S)


def test_a_function_is_told_the_prompt_of_a_finished_text(encoder):
    """Covers conversations, rendered texts with and without the ending in the response, and a policy's raw output."""
    plain = Encoder(load_tokenizer(encoder.tokenizer.name_or_path, "plain"), 64)
    assert plain.ending == "</s>"
    pad = plain.tokenizer.pad_token
    items = [
        Conversation("please ", "of course"),
        Text("please of course</s>", "of course"),
        Text("please of course", "of course"),
        Text("please of course" + pad * 2, "of course" + pad * 2, finish=True),
        Text("please of course</s>", "of course</s>", finish=True),
        Text("please </s>", "", finish=True),
        Text("please of course</s>", "of course</s>"),
    ]
    TOLD.clear()
    component = PythonComponent(name="mine", function=f"{HERE}:echo")
    components = RewardComponents((CriticComponent(), component), plain.count_tokens, lambda: plain.ending)
    critic_S = np.zeros(len(items), dtype=np.float32)
    _, parts = components.combine(finish_items(items, plain, CallLimits()), critic_S)
    assert parts["mine"].tolist() == list(range(7))
    ((prompts, responses),) = TOLD
    assert prompts == ["please "] * 7
    assert responses == ["of course"] * 5 + ["", "of course</s>"]
    with pytest.raises(ScorerRejected, match="item 1: the text does not end with the response") as refused:
        components.combine([items[0], Text("please of course</s>", "thank you")], critic_S[:2])
    assert (refused.value.kind, refused.value.item) == ("not_the_end", 1)


def test_what_a_function_does_to_its_lists_is_its_own_affair(encoder):
    first = PythonComponent(name="first", function=f"{HERE}:turns_and_steals")
    second = PythonComponent(name="second", function=f"{HERE}:shouts")
    components = RewardComponents((CriticComponent(), first, second), encoder.count_tokens)
    _, parts = components.combine(ITEMS, np.zeros(3, dtype=np.float32))
    assert parts["first"].tolist() == [1.0] * 3
    assert parts["second"].tolist() == [8.0, -2.0, 1.0]


def test_the_critic_alone_needs_no_response_and_reports_nothing_more(encoder):
    critic_S = np.array([1.5], dtype=np.float32)
    total_S, parts = RewardComponents((CriticComponent(),), encoder.count_tokens).combine([[1, 2]], critic_S)
    assert (total_S.tolist(), parts) == ([1.5], {})


@pytest.mark.parametrize("item", [[1, 2], Text("a b c")])
def test_an_item_without_a_response_is_refused(encoder, item):
    components = RewardComponents((CriticComponent(), LengthPenalty()), encoder.count_tokens)
    with pytest.raises(ScorerRejected, match="item 1 does not state its response") as refused:
        components.combine([Conversation("a", "b"), item], np.zeros(2, dtype=np.float32))
    assert (refused.value.kind, refused.value.item) == ("no_response", 1)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("too_few", r"must return a finite number for each of 3 responses, and returned shape \(1,\)"),
        ("columns", r"must return a finite number for each of 3 responses, and returned shape \(3, 1\)"),
        ("nothing", r"must return .*, and returned shape \(\) of object"),
        ("fails", "failed: KeyError: 'gone'"),
        ("times_out", "failed: TimeoutError: the judge's own"),
        ("leaves", "failed: SystemExit: done"),
        ("nan", r"must return a finite number .* number 0 is not"),
        ("beyond_fp32", r"must return a finite number .* number 1 is not"),
        ("words", r"must return a finite number .* of <U4"),
        ("digits", r"must return a finite number .* of <U3"),
        ("nones", r"must return a finite number .* of object"),
    ],
)
def test_a_function_that_fails_is_named(encoder, function, what):
    component = PythonComponent(name="mine", function=f"{HERE}:{function}")
    components = RewardComponents((CriticComponent(), component), encoder.count_tokens)
    with pytest.raises(ComponentError, match=rf"component 'mine': {HERE}:{function} {what}"):
        components.combine(ITEMS, np.zeros(3, dtype=np.float32))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Creates user modules that cannot be imported."""
    (tmp_path / "module_that_is_cut.py").write_text("def f(")
    (tmp_path / "module_that_raises.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("nowhere.at_all:f", "function .* cannot be imported: ModuleNotFoundError"),
        (f"{HERE}:absent", "function .* cannot be imported: AttributeError"),
        ("module_that_is_cut:f", "function .* cannot be imported: SyntaxError"),
        ("module_that_raises:f", "function .* cannot be imported: ZeroDivisionError"),
        (f"{HERE}:NO_FUNCTION", "is not callable: 3"),
    ],
)
def test_a_function_that_is_not_there_is_named(encoder, function, what):
    with pytest.raises(ConfigError, match=rf"component 'mine': .*{what}"):
        RewardComponents((CriticComponent(), PythonComponent(name="mine", function=function)), encoder.count_tokens)


@pytest.mark.parametrize(
    ("text", "line", "at_fault"),
    [
        ("components:\n- {kind: critic}\n- {kind: regex, name: a, pattern: '('}\n", 3, "pattern"),
        ("components:\n- {kind: critic}\n\n- kind: regex\n  name: a\n  pattern: '('\n", 6, "pattern"),
        ("components:\n- {kind: critic}\n- kind: regex\n  name: a\n", 3, "pattern"),
        ("components:\n- {kind: critic}\n- {kind: regex, name: a, pattern: a, flags: 2}\n", 3, "flags"),
        ("# mine\ncomponents:\n- {kind: magic}\n", 3, "magic"),
        ("components:\n- kind: critic\n  weight: .nan\n", 3, "weight"),
        ("components:\n- {kind: critic}\n- {kind: length_penalty, free_tokens: -1}\n", 3, "free_tokens"),
        ("\ncomponents:\n- {kind: critic}\n- {kind: critic, name: other}\n", 2, "exactly once"),
        ("components:\n- {kind: critic}\n- {kind: length_penalty, name: critic}\n", 1, "the same name"),
        ("components: []\n", 1, "at least 1"),
        ("components:\n- {kind: critic}\ncomponent:\n- {kind: critic}\n", 3, "component"),
        ("components:\n- {kind: critic}\n- {kind: python, name: a, function: 'os.system'}\n", 3, "function"),
        ("components:\n- critic\n", 2, "components"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, line, at_fault):
    path = tmp_path / "rewards.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=at_fault) as refused:
        load_components(str(path))
    assert str(refused.value).startswith(f"{path}:{line}: ")


def test_a_file_that_is_not_there_or_is_no_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load_components(str(tmp_path / "absent.yaml"))
    (tmp_path / "cut.yaml").write_text("components: [")
    with pytest.raises(ConfigError, match=r"cut\.yaml: not a YAML file"):
        load_components(str(tmp_path / "cut.yaml"))


def test_no_file_means_the_critic():
    assert load_components(None) == (CriticComponent(),)


def test_a_function_that_hangs_fails_its_call_in_time_and_no_other(encoder, monkeypatch):
    monkeypatch.setattr(reward_components, "CALLS_AT_ONCE", 3)
    component = PythonComponent(name="mine", function=f"{HERE}:hangs", timeout_s=0.2)
    components = RewardComponents((CriticComponent(), component), encoder.count_tokens)
    LET_GO.clear()
    for number in range(3):
        components.check_healthy()
        started = time.monotonic()
        with pytest.raises(ComponentError, match=r"component 'mine': no answer within 0\.2 s"):
            components.combine([Conversation("p", "hang")], np.zeros(1, np.float32))
        assert time.monotonic() - started < 10
        if number < 2:
            total_S, _ = components.combine([Conversation("p", "xyz")], np.ones(1, np.float32))
            assert total_S.tolist() == [4.0]
    with pytest.raises(ScorerUnavailable, match="component 'mine': 3 calls do not return"):
        components.check_healthy()
    with pytest.raises(ComponentError, match="no answer within"):  # no thread is left
        components.combine([Conversation("p", "xyz")], np.ones(1, np.float32))
    LET_GO.set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            components.check_healthy()
            break
        except ScorerUnavailable:
            time.sleep(0.01)
    assert components.combine([Conversation("p", "xyz")], np.ones(1, np.float32))[0].tolist() == [4.0]


def test_a_pattern_that_explodes_ends_names_its_item_and_holds_nothing_up(encoder, monkeypatch):
    monkeypatch.setattr(reward_components, "REGEX_TIMEOUT_S", 0.5)
    component = RegexComponent(name="slow", pattern="(a|aa)+$")
    components = RewardComponents((CriticComponent(), component), encoder.count_tokens)
    items = [Conversation("p", "aaa"), Conversation("p", "a" * 60 + "b")]
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.wait(0.01):
            ticks.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        with pytest.raises(ComponentError, match=r"item 1: component 'slow': .* took longer than 0\.5 s"):
            components.combine(items, np.zeros(2, np.float32))
    finally:
        ended.set()
        ticking.join()
    assert len(ticks) > 5, "the interpreter is free meanwhile"


@pytest.mark.parametrize(
    "pattern",
    [
        r"\?",
        r"\\boxed\{",
        r"(?i)please",
        r"^\s*$",
        r"(\w+) \1",
        r"(?m)^b",
        r"[^a-z]",
        r"a{2,3}?b",
        r"(?<=a)b",
        r"\d+(?!\.)",
        r"\bof\b",
    ],
)
def test_patterns_mean_what_they_mean_to_pythons_re(encoder, pattern):
    texts = [
        "",
        " ",
        "why? of course",
        "\\boxed{3}",
        "PLEASE",
        "a a",
        "of of",
        "a\nb",
        "aab",
        "aaaab",
        "ab",
        "1.5",
        "42",
        "é",
    ]
    component = RegexComponent(name="found", pattern=pattern)
    components = RewardComponents((CriticComponent(), component), encoder.count_tokens)
    _, parts = components.combine([Conversation("p", text) for text in texts], np.zeros(len(texts), np.float32))
    assert parts["found"].tolist() == [float(bool(re.search(pattern, text))) for text in texts]
