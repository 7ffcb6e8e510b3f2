"""Training is the same on any number of ranks and at any ZeRO stage, and resumes exactly.

The functions below the fixtures are sent to real ranks (Ray actors) and run there.
"""

import numpy as np
import pytest
import torch

from rlhf_critic.algorithms.preference_losses import bradley_terry_loss
from rlhf_critic.checkpoint.critic_directory import RESUME_FOLDER, load_critic
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import CheckpointError, NonFiniteLossError
from rlhf_critic.model.weights import gathered
from rlhf_critic.scoring.local import score_sequences
from rlhf_critic.training.critic_engine import CriticEngine
from tests.helpers import STAGES_ON_RANKS, save_tiny_model, slow_except
from tests.plain_loop import PlainOptimizer
from tests.rlhf_critic.training.critic_runs import FEW, OPTIONS, STEPS, card_of, make, rows_of, train, whole_weights


def optimizer_state(engine: CriticEngine) -> list[torch.Tensor]:
    """Returns this rank's shard of the moments, in a fixed order."""
    optimizer = engine._engine.optimizer  # at stage 0 ours, else DeepSpeed's around ours
    state = getattr(optimizer, "optimizer", optimizer).state
    return [entry[name].detach().clone() for entry in state.values() for name in ("exp_avg", "exp_avg_sq")]


def train_and_score(
    source: str,
    data: str,
    cache: str,
    stage: int,
    dtype: str = "float32",
    changes: dict | None = None,
    steps: int = STEPS,
) -> tuple[list[dict], np.ndarray, list]:
    engine, preferences, _ = make(source, data, cache, stage, dtype, **(changes or {}))
    metrics = train(engine, preferences, steps)
    sequences = [preferences[row].responses[0] for row in range(7)]
    return metrics, engine.rewards(sequences), engine.values(sequences)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reference(tiny_model, preference_file, cache) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a plain loop: no engine, no DeepSpeed, no batches, one preference at a time."""
    from rlhf_critic.model.factory import create_critic_model

    encoder = Encoder(load_tokenizer(tiny_model), max_length=64)
    preferences = load_preferences(preference_file, encoder, cache)
    torch.manual_seed(OPTIONS.seed)
    critic = create_critic_model(tiny_model, encoder.tokenizer, None, disable_dropout=True)
    optimizer = PlainOptimizer(critic, "cosine", 4, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        rows = rows_of(preferences, step)
        total = 0.0
        for row in rows:
            ends = [
                critic.model(input_ids=torch.tensor(ids.tolist())[None]).logits[0]
                for ids in (preferences[row].responses[0], preferences[row].responses[-1])
            ]
            loss = bradley_terry_loss(*ends).sum() / len(rows)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(optimizer.step())
    return losses, norms


@pytest.mark.parametrize(("stage", "world_size"), STAGES_ON_RANKS)
def test_losses_are_those_of_a_plain_loop(ranks, tiny_model, preference_file, cache, reference, world_size, stage):
    of_ranks = ranks(world_size).run(train_and_score, tiny_model, preference_file, cache, stage)
    metrics, rewards, values = of_ranks[0]
    losses, norms = reference
    np.testing.assert_allclose([step["loss"] for step in metrics], losses, rtol=1e-4)
    np.testing.assert_allclose([step["grad_norm"] for step in metrics], norms, rtol=1e-3)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert [step["step"] for step in metrics] == list(range(1, STEPS + 1))
    assert max(step["micro_batches"] for step in metrics) > 1
    np.testing.assert_allclose([v[-1] for v in values], rewards, rtol=0, atol=1e-5)
    for other_metrics, other_rewards, _ in of_ranks[1:]:
        assert other_metrics == metrics
        np.testing.assert_array_equal(other_rewards, rewards)


@pytest.mark.parametrize("world_size", slow_except([2], [1, 2]))
def test_padded_batches_give_the_same_losses_for_more_tokens(
    ranks, tiny_model, preference_file, cache, reference, world_size
):
    arguments = (train_and_score, tiny_model, preference_file, cache, 2, "float32")
    packed, padded = (ranks(world_size).run(*arguments, {"prefix_tree": on}, FEW)[0] for on in (True, False))
    np.testing.assert_allclose([step["loss"] for step in padded[0]], [step["loss"] for step in packed[0]], rtol=1e-4)
    np.testing.assert_allclose([step["loss"] for step in padded[0]], reference[0][:FEW], rtol=1e-4)
    np.testing.assert_allclose(padded[1], packed[1], rtol=0, atol=1e-3)  # after steps of rounding
    for few, many in zip(packed[0], padded[0], strict=True):
        assert few["tokens"] == many["tokens"] <= many["computed_tokens"]
        assert few["computed_tokens"] <= few["tokens"]
    assert sum(step["computed_tokens"] for step in packed[0]) < sum(step["tokens"] for step in packed[0])


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
@pytest.mark.parametrize(
    "changes", [{"token_budget": "auto"}, {"gradient_checkpointing": True}], ids=["auto budget", "checkpointing"]
)
def test_budget_and_checkpointing_change_no_loss(ranks, tiny_model, preference_file, cache, reference, stage, changes):
    of_ranks = ranks(2).run(train_and_score, tiny_model, preference_file, cache, stage, "float32", changes, FEW)
    for metrics, _, _ in of_ranks:
        np.testing.assert_allclose([step["loss"] for step in metrics], reference[0][:FEW], rtol=1e-4)
        assert [step["micro_batches"] for step in metrics] == [step["micro_batches"] for step in of_ranks[0][0]]


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_bf16_trains_with_the_head_in_fp32(ranks, tiny_model, preference_file, cache, reference, stage):
    (metrics, rewards, _), _ = ranks(2).run(train_and_score, tiny_model, preference_file, cache, stage, "bfloat16")
    np.testing.assert_allclose([step["loss"] for step in metrics[:5]], reference[0][:5], rtol=0.1)
    norms = [step["grad_norm"] for step in metrics[:5]]
    np.testing.assert_allclose(norms, reference[1][:5], rtol=0.2)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert np.isfinite(rewards).all()


def rewards_twice(source: str) -> list[np.ndarray]:
    """Scores twice. The first call probes the token budget, which runs training passes."""
    encoder = Encoder(load_tokenizer(source), max_length=64)
    options = OPTIONS.model_copy(update={"zero_stage": 0, "token_budget": "auto"})
    engine = CriticEngine.from_pretrained(encoder, ModelConfig(path=source, disable_dropout=False), options, STEPS)
    with torch.no_grad():
        return [engine.rewards([[5, 6, 7, 8], [5, 6, 9]]) for _ in range(2)]


def test_rewards_are_computed_without_dropout_from_the_first_call(ranks, tmp_path):
    source = save_tiny_model(tmp_path / "dropout", tie_word_embeddings=False, attention_dropout=0.5)
    ((first, second),) = ranks(1).run(rewards_twice, source)
    np.testing.assert_array_equal(first, second)


def straight(source: str, data: str, cache: str, stage: int) -> tuple[list[dict], dict, list]:
    engine, preferences, _ = make(source, data, cache, stage)
    return train(engine, preferences, FEW), whole_weights(engine), optimizer_state(engine)


def stop_and_save(source: str, data: str, cache: str, stage: int, directory: str) -> list[dict]:
    engine, preferences, encoder = make(source, data, cache, stage)
    metrics = train(engine, preferences, FEW // 2)
    engine.save(directory, encoder, card_of(encoder))
    return metrics


def resume(source: str, data: str, cache: str, stage: int, directory: str) -> tuple[list[dict], dict, list]:
    engine, preferences, _ = make(source, data, cache, stage)
    engine.load(directory)
    return train(engine, preferences, FEW), whole_weights(engine), optimizer_state(engine)


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_stopping_and_resuming_changes_nothing(ranks, tiny_model, preference_file, cache, tmp_path, stage):
    arguments = (tiny_model, preference_file, cache, stage)
    undisturbed = ranks(2).run(straight, *arguments)
    first_half = ranks(2).run(stop_and_save, *arguments, str(tmp_path / "saved [3]"))
    resumed = ranks(2).run(resume, *arguments, str(tmp_path / "saved [3]"))
    for rank in range(2):
        metrics, weights, moments = resumed[rank]
        expected_metrics, expected_weights, expected_moments = undisturbed[rank]
        assert [m["learning_rate"] for m in first_half[rank] + metrics] == [
            m["learning_rate"] for m in expected_metrics
        ]
        np.testing.assert_allclose(
            [m["loss"] for m in first_half[rank] + metrics], [m["loss"] for m in expected_metrics], rtol=1e-6
        )
        for name, expected in expected_weights.items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-6)
        assert len(moments) == len(expected_moments) > 0
        for moment, expected in zip(moments, expected_moments, strict=True):
            torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-7)


def refuse(source: str, data: str, cache: str, stage: int, directory: str) -> str:
    engine, _, _ = make(source, data, cache, stage)
    with pytest.raises(CheckpointError) as refused:
        engine.load(directory)
    return str(refused.value)


def test_a_state_of_another_stage_is_refused(ranks, tiny_model, preference_file, cache, tmp_path):
    saved = str(tmp_path / "saved")
    ranks(2).run(stop_and_save, tiny_model, preference_file, cache, 2, saved)
    assert "saved with zero_stage=2, now 3" in ranks(2).run(refuse, tiny_model, preference_file, cache, 3, saved)[0]
    assert "no state to resume from" in ranks(1).run(refuse, tiny_model, preference_file, cache, 2, str(tmp_path))[0]


def save_and_score(source: str, data: str, cache: str, stage: int, directory: str) -> np.ndarray:
    engine, preferences, encoder = make(source, data, cache, stage)
    train(engine, preferences, 2)
    engine.save(directory, encoder, card_of(encoder))
    return engine.rewards([preferences[row].responses[0] for row in range(9)])


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("fixture", ["tiny_model", "tied_model"])
def test_a_saved_critic_scores_what_the_engine_scored(ranks, request, preference_file, cache, tmp_path, stage, fixture):
    source = request.getfixturevalue(fixture)
    scored = ranks(2).run(save_and_score, source, preference_file, cache, stage, str(tmp_path / "saved"))[0]
    loaded = load_critic(tmp_path / "saved")
    preferences = load_preferences(preference_file, loaded.encoder, cache)
    rewards = score_sequences(loaded.critic, [preferences[row].responses[0] for row in range(9)], 100)
    np.testing.assert_allclose(rewards, scored, rtol=0, atol=1e-5)
    assert (tmp_path / "saved" / RESUME_FOLDER).is_dir()


def poison_and_step(source: str, data: str, cache: str, stage: int) -> tuple[int, list[str], int, bool]:
    engine, preferences, _ = make(source, data, cache, stage)
    train(engine, preferences, 1)
    before = whole_weights(engine)
    rows = rows_of(preferences, 1)
    # The embedding of a token that only one preference of the batch holds becomes NaN.
    ids = [{*preferences[row].responses[0], *preferences[row].responses[-1]} for row in rows]
    own = [
        (row, mine - set().union(*(other for other in ids if other is not mine)))
        for row, mine in zip(rows, ids, strict=True)
    ]
    row, tokens = next((row, tokens) for row, tokens in own if tokens)
    embedding = engine.critic.model.get_input_embeddings().weight
    with gathered(embedding, modify=True), torch.no_grad():
        embedding[next(iter(tokens))] = float("nan")
    with pytest.raises(NonFiniteLossError) as failed:
        engine.train_step(preferences, rows)
    after = whole_weights(engine)
    others = [name for name in before if "embed" not in name]
    unchanged = all(torch.equal(before[name], after[name]) for name in others)
    return failed.value.step, failed.value.rows, preferences.origin(int(row)), unchanged


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_a_loss_that_is_not_a_number_stops_all_ranks_before_the_step(ranks, tiny_model, preference_file, cache, stage):
    for step, rows, culprit, unchanged in ranks(2).run(poison_and_step, tiny_model, preference_file, cache, stage):
        assert step == 1
        assert rows == [culprit]
        assert unchanged
