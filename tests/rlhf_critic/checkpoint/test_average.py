"""An average of critics has the mean of their weights, and is refused for critics that do not fit together."""

import pytest
import torch

from rlhf_critic.checkpoint.average import average_critics
from rlhf_critic.checkpoint.critic_directory import load_critic, open_critic
from rlhf_critic.errors import CheckpointError
from tests.actors.scorers import save_tiny_critic


def test_weights_are_the_means_and_the_card_claims_nothing_else(tiny_model, tmp_path):
    sources = [save_tiny_critic(tiny_model, tmp_path / str(seed), seed, f"tiny@{seed}") for seed in (1, 2, 3)]
    card = average_critics(sources, tmp_path / "mean")
    loaded = load_critic(tmp_path / "mean")  # verifies the manifest and the fingerprint
    parts = [load_critic(source).critic.state_dict() for source in sources]
    for name, tensor in loaded.critic.state_dict().items():
        expected = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert card == loaded.card
    assert card.version == "average(tiny@1, tiny@2, tiny@3)"
    assert card.reward_mean is None
    assert loaded.posterior is None
    with pytest.raises(CheckpointError, match="exists already"):
        average_critics(sources, tmp_path / "mean")


def test_critics_that_do_not_fit_are_refused(tiny_model, tied_model, tmp_path):
    first = save_tiny_critic(tiny_model, tmp_path / "first")
    with pytest.raises(CheckpointError, match="1 critics cannot be averaged"):
        average_critics([first], tmp_path / "out")
    other = save_tiny_critic(tied_model, tmp_path / "other")
    same_tokens = open_critic(first).encoder.fingerprint == open_critic(other).encoder.fingerprint
    with pytest.raises(CheckpointError, match="another kind of model" if same_tokens else "encodes texts in another"):
        average_critics([first, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
