"""The posterior of a critic's head equals its definition on the critic's own hidden states, and survives its file."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.checkpoint.critic_directory import open_critic, weights_hash
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.checkpoint.posterior_file import read_posterior, save_posterior
from rlhf_critic.errors import CheckpointError, DataError
from rlhf_critic.evaluation.calibration import fit_temperature
from rlhf_critic.model.factory import HEAD_NAME
from rlhf_critic.training.posterior_fit import fit_head_posterior, last_states_of
from tests.actors.scorers import save_tiny_critic
from tests.helpers import make_preferences


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    """Returns a small critic, and preferences to fit and to validate: some rank three responses."""
    directory = save_tiny_critic(tiny_model, tmp_path_factory.mktemp("critic") / "one", seed=1, version="tiny@1")
    critic = open_critic(directory).load()
    rows = make_preferences(64)
    units = [[critic.encoder.encode(row["prompt"], row[side]).ids for side in ("chosen", "rejected")] for row in rows]
    units[3].append(critic.encoder.encode(rows[3]["prompt"], "no").ids)
    return critic, units[:40], units[40:]


def slow_states(critic, units):
    """Hidden states of each sequence alone, without a tree."""
    found = []
    for unit in units:
        batches = [PaddedBatch.from_sequences([ids], 0) for ids in unit]
        hidden = [critic.hidden(batch)[len(ids) - 1] for batch, ids in zip(batches, unit, strict=True)]
        found.append(torch.stack(hidden).detach().double().numpy())
    return found


def test_it_is_the_posterior_by_its_definition(loaded):
    one, train, validation = loaded
    posterior, report = fit_head_posterior(train, validation, last_states_of(one.critic, 256), scale=3.0)
    head = one.critic.model.score.weight.detach().double().numpy()[0]

    def compared(units):
        states = slow_states(one.critic, units)
        return np.array([s[i] - s[j] for s in states for i in range(len(s)) for j in range(i + 1, len(s))]), states

    differences, states = compared(train)
    held_out, held_out_states = compared(validation)
    margins = held_out @ head
    temperature = fit_temperature(margins) or 1.0
    assert len(differences) == 42
    p = 1 / (1 + np.exp(-(differences @ head) / temperature))
    hessian = 3.0 * sum(a * (1 - a) * np.outer(d, d) for a, d in zip(p, differences, strict=True))
    losses, temperatures = {}, {}
    for prior in np.logspace(-4, 4, 17) * np.trace(hessian) / len(head):
        inverse = np.linalg.inv(hessian + prior * np.eye(len(head)))
        variances = np.array([d @ inverse @ d for d in held_out])
        logits = margins / np.sqrt(1 + np.pi / 8 * variances)
        temperatures[prior] = fit_temperature(logits) or 1.0
        losses[prior] = np.logaddexp(0, -logits / temperatures[prior]).mean()
    best = min(losses, key=lambda prior: (losses[prior], -prior))
    assert report.prior_precision == pytest.approx(best, rel=1e-3)
    assert report.log_loss_uncertain == pytest.approx(losses[best], rel=1e-4)
    assert report.temperature == pytest.approx(temperatures[best], rel=1e-3)
    assert report.shows_uncertainty == (losses[best] < np.logaddexp(0, -margins / temperature).mean() - 1e-9)
    covariance = temperatures[best] ** 2 * np.linalg.inv(hessian + best * np.eye(len(head)))
    mean = np.concatenate(states).mean(axis=0)
    centred = np.concatenate(held_out_states) - mean
    expected = np.sqrt(np.einsum("sd,de,se->s", centred, covariance, centred))
    found = posterior.stds(torch.from_numpy(np.concatenate(held_out_states)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3)
    assert report.mean_std == pytest.approx(expected.mean(), rel=1e-3)


def test_a_token_budget_changes_nothing(loaded):
    one, train, validation = loaded
    fits = [fit_head_posterior(train, validation, last_states_of(one.critic, budget))[0] for budget in (64, 4096)]
    states = torch.randn(5, len(fits[0].mean_D))
    torch.testing.assert_close(fits[0].stds(states), fits[1].stds(states), rtol=1e-3, atol=1e-5)


def test_too_few_preferences_are_refused(loaded):
    one, train, validation = loaded
    with pytest.raises(DataError, match=r"19 validation preferences: .* give more data"):
        fit_head_posterior(train, validation[:19], last_states_of(one.critic, 256))


def test_the_file_is_verified_belongs_to_one_head_and_hides_from_other_readers(loaded, tiny_model, tmp_path):
    one, train, validation = loaded
    source = save_tiny_critic(tiny_model, tmp_path / "source", seed=1, version="tiny@1")
    export_critic(source, tmp_path / "critic", auto_map=False)
    directory, before = tmp_path / "critic", weights_hash(tmp_path / "critic")
    posterior, report = fit_head_posterior(train, validation, last_states_of(one.critic, 256))
    reader = open_critic(directory).reader
    assert open_critic(directory).posterior() is None
    path = save_posterior(directory, posterior, reader.read(HEAD_NAME), report.to_dict())
    found = open_critic(directory).load().posterior  # verifies the manifest
    assert torch.equal(found.root_DD, posterior.root_DD)
    assert (found.temperature, found.prior_precision) == (posterior.temperature, posterior.prior_precision)
    assert weights_hash(directory) != before  # it decides what a scorer answers
    # vLLM and others load every *.safetensors of the directory itself.
    assert [file.name for file in directory.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["report"])["validation"] == report.validation
    export_critic(directory, tmp_path / "copy", auto_map=False)
    assert open_critic(tmp_path / "copy").posterior() is not None
    save_posterior(directory, posterior, reader.read(HEAD_NAME) + 1, {})
    with pytest.raises(CheckpointError, match="fitted to other weights"):
        read_posterior(directory, reader)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"head_posterior.safetensors: damaged"):
        open_critic(directory)
    with pytest.raises(CheckpointError, match=r"damaged .*calibrate the critic again"):
        read_posterior(directory, reader)
