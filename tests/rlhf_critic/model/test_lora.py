"""A critic with adapters trains only them, is saved with merged weights, and resumes exactly.

The functions below the constants are sent to real ranks (Ray actors) and run there.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_critic.batching.sampler import DataOrder
from rlhf_critic.checkpoint.critic_directory import CriticCard, EncoderCard, load_critic
from rlhf_critic.config.model import ModelConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.lora import add_adapters
from rlhf_critic.model.weights import gathered, save_weights
from rlhf_critic.scoring.local import score_sequences
from rlhf_critic.training.critic_engine import CriticEngine
from tests.helpers import slow_except
from tests.rlhf_critic.families import family_configs, kernels_of, random_model

STEPS = 4
TRAIN = {"global_batch_size": 12, "learning_rate": 3e-3, "warmup_fraction": 0.0, "token_budget": 150, "epochs": 10.0}
LORA = {"lora_rank": 3, "lora_alpha": 6.0}


class Run:
    """The engine and the steps of one rank."""

    def __init__(self, source: str, data: str, cache: str, model: dict, train: dict) -> None:
        self.encoder = Encoder(load_tokenizer(source), max_length=64)
        options = TrainConfig.model_validate({**TRAIN, **train})
        self.engine = CriticEngine.from_pretrained(
            self.encoder, ModelConfig.model_validate({"path": source, **model}), options, STEPS
        )
        self.preferences = load_preferences(data, self.encoder, cache)

    def step_to(self, until: int) -> list[float]:
        engine, rows = self.engine, self.preferences.prompts_N
        return [
            engine.train_step(self.preferences, DataOrder(rows, 0).rows_of_step(12, engine.step, 10.0)).loss
            for _ in range(engine.step, until)
        ]

    def rewards(self) -> np.ndarray:
        return self.engine.rewards(self.preferences.responses()[:9])

    def save(self, directory: str) -> None:
        encoder = EncoderCard(fingerprint=self.encoder.fingerprint, max_length=self.encoder.max_length)
        self.engine.save(directory, self.encoder, CriticCard(version="test@1", encoder=encoder))


def weights_of(engine: CriticEngine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.critic.model.named_parameters():
        with gathered(parameter):
            found[name] = parameter.detach().float().clone()
    return found


def straight_and_stopped(
    source: str, data: str, cache: str, model: dict, train: dict, directory: str
) -> tuple[list, dict, dict, np.ndarray]:
    """Trains, saves half-way and continues; returns losses, weights at start and end, and rewards when saved."""
    run = Run(source, data, cache, model, train)
    before = weights_of(run.engine)
    losses = run.step_to(STEPS // 2)
    run.save(directory)
    rewards = run.rewards()
    losses += run.step_to(STEPS)
    return losses, before, weights_of(run.engine), rewards


def resumed(
    source: str, data: str, cache: str, model: dict, train: dict, directory: str
) -> tuple[list, dict, np.ndarray]:
    run = Run(source, data, cache, model, train)
    run.engine.load(directory)
    rewards = run.rewards()
    return run.step_to(STEPS), weights_of(run.engine), rewards


def losses_of(source: str, data: str, cache: str, model: dict, train: dict) -> tuple[list, np.ndarray]:
    run = Run(source, data, cache, model, train)
    return run.step_to(STEPS), run.rewards()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("stage", slow_except([2], [0, 2, 3]))
def test_adapters_alone_are_fitted_and_merged_on_disk_and_go_on_where_they_were(
    ranks, tiny_model, preference_file, cache, tmp_path, stage
):
    arguments = (tiny_model, preference_file, cache, LORA, {"zero_stage": stage})
    saved = str(tmp_path / "saved")
    losses, before, after, scored = ranks(2).run(straight_and_stopped, *arguments, saved)[0]
    fitted = {name for name in before if not torch.equal(before[name], after[name])}
    assert fitted == {name for name in before if "lora_" in name} | {"score.weight"}
    assert losses[-1] < losses[0]
    # The saved model has no adapters, has its own names and scores like the engine.
    base, files = load_file(f"{tiny_model}/model.safetensors"), load_file(f"{saved}/model.safetensors")
    assert files.keys() - base.keys() == {"score.weight"}
    assert not any("lora" in name or "base_layer" in name for name in files)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(files[q_proj], base[q_proj])
    loaded = load_critic(saved)
    preferences = load_preferences(preference_file, loaded.encoder, cache)
    alone = score_sequences(loaded.critic, preferences.responses()[:9], 100)
    np.testing.assert_allclose(alone, scored, rtol=0, atol=1e-5)
    # The resumed run equals the uninterrupted run.
    losses_after, weights_after, rewards_then = ranks(2).run(resumed, *arguments, saved)[0]
    np.testing.assert_allclose(rewards_then, scored, rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses_after, losses[STEPS // 2 :], rtol=1e-6)
    for name, expected in after.items():
        torch.testing.assert_close(weights_after[name], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def losses_on_one_rank(ranks, tiny_model, preference_file, cache) -> tuple:
    return ranks(1).run(losses_of, tiny_model, preference_file, cache, LORA, {"zero_stage": 0})[0]


@pytest.mark.parametrize(
    ("size", "stage", "tree"),
    slow_except([(1, 0, False), (2, 1, True)], [(1, 0, False), (2, 1, True), (2, 3, True), (2, 3, False)]),
)
def test_adapters_give_the_same_losses_at_every_stage_and_in_padded_batches(
    ranks, tiny_model, preference_file, cache, losses_on_one_rank, size, stage, tree
):
    model = {**LORA, "prefix_tree": tree}
    losses = ranks(size).run(losses_of, tiny_model, preference_file, cache, model, {"zero_stage": stage})[0]
    np.testing.assert_allclose(losses[0], losses_on_one_rank[0], rtol=1e-4)
    np.testing.assert_allclose(losses[1], losses_on_one_rank[1], rtol=0, atol=2e-4)  # after four steps of rounding


def scores_of_both_batches(source: str, data: str, cache: str) -> tuple[np.ndarray, np.ndarray]:
    run = Run(source, data, cache, LORA, {"zero_stage": 0})
    run.step_to(STEPS)
    in_trees = run.rewards()
    run.engine.critic.prefix_tree = False
    return in_trees, run.rewards()


def test_adapted_critics_score_the_same_in_trees_and_in_padded_batches(ranks, tiny_model, preference_file, cache):
    in_trees, padded = ranks(1).run(scores_of_both_batches, tiny_model, preference_file, cache)[0]
    np.testing.assert_allclose(in_trees, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", slow_except([0], [0, 3]))
def test_adapters_of_frozen_layers_stay_as_they_are(ranks, tiny_model, preference_file, cache, tmp_path, stage):
    arguments = (tiny_model, preference_file, cache, {**LORA, "freeze_layers": 1}, {"zero_stage": stage})
    _, before, after, _ = ranks(2).run(straight_and_stopped, *arguments, str(tmp_path / "saved"))[0]
    fitted = {name for name in before if not torch.equal(before[name], after[name])}
    assert fitted == {n for n in before if "lora_" in n and not n.startswith("model.layers.0.")} | {"score.weight"}


def refusal(source: str, data: str, cache: str, model: dict) -> str:
    with pytest.raises(ConfigError) as refused:
        Run(source, data, cache, model, {"zero_stage": 0})
    return str(refused.value)


def test_a_target_that_the_model_lacks_is_refused_by_name(ranks, tiny_model, preference_file, cache):
    options = {"lora_rank": 2, "lora_target_modules": ("nowhere",)}
    (message,) = ranks(1).run(refusal, tiny_model, preference_file, cache, options)
    assert "model.lora_target_modules ['nowhere']" in message
    assert "Use names of linear layers of LlamaForSequenceClassification" in message


@pytest.mark.parametrize("family", sorted({config.model_type for config in family_configs().values()}))
def test_every_family_scores_alike_packed_padded_and_merged(family, tmp_path):
    """A plain transformers model that loads the saved critic gives each sequence alone the same reward."""
    attention = kernels_of(family_configs()[family])[0]
    model = random_model(family_configs()[family], attention)
    critic = Critic(model).eval()
    sequences = [[5, 6, 7, 8], [5, 6, 7, 9, 10, 11], [5, 6], [12, 13, 14]]
    before = score_sequences(critic, sequences, 100)
    add_adapters(model, ModelConfig(lora_rank=3, lora_alpha=6.0), seed=0)
    np.testing.assert_array_equal(score_sequences(critic, sequences, 100), before)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    rewards = score_sequences(critic, sequences, 100)
    assert np.abs(rewards - before).max() > 1e-2
    critic.prefix_tree = False
    np.testing.assert_allclose(score_sequences(critic, sequences, 100), rewards, rtol=0, atol=1e-5)
    save_weights(model, tmp_path, is_main=True)
    family_configs()[family].save_pretrained(tmp_path)
    plain, info = type(model).from_pretrained(
        tmp_path, num_labels=1, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    alone = [plain(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    np.testing.assert_allclose(alone, rewards, rtol=0, atol=1e-5)
