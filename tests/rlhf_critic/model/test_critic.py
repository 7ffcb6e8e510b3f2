"""The reward of a text is the same to 1e-5 alone and in any batch, padded on either side."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from rlhf_critic.batching.padded import PaddedBatch
from rlhf_critic.data.encoding import load_tokenizer
from rlhf_critic.model.critic import Critic
from rlhf_critic.model.factory import create_critic_model
from rlhf_critic.scoring.local import score_sequences
from tests.helpers import tiny_config

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def critic(tiny_model) -> Critic:
    torch.manual_seed(1)
    return create_critic_model(tiny_model, load_tokenizer(tiny_model), None, disable_dropout=True).eval()


@pytest.fixture(scope="module")
def sequences(critic) -> list[list[int]]:
    """Returns sequences of 1 to 60 tokens; one holds the pad id in its middle, one ends with the EOS id."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (1, 60, 7, 33, 2, 18)]
    made[3][10] = critic.pad_token_id
    made[5][-1] = 1
    return made


def values_by_definition(critic: Critic, sequence: list[int]) -> torch.Tensor:
    """Computes the reference: the backbone on the bare sequence, then the head as a dot product in fp64."""
    hidden_LD = critic.model.model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    return (hidden_LD.double() @ critic.model.score.weight[0].double()).float()


def left_padded(sequences: list[list[int]], pad_token_id: int) -> PaddedBatch:
    longest = max(map(len, sequences))
    ids = [[pad_token_id] * (longest - len(s)) + s for s in sequences]
    mask = [[0] * (longest - len(s)) + [1] * len(s) for s in sequences]
    return PaddedBatch(torch.tensor(ids), torch.tensor(mask))


@torch.no_grad()
@pytest.mark.parametrize("pad_token_id", [None, 0, 1], ids=["own pad", "pad=bos", "pad=eos"])
def test_values_and_rewards_are_those_of_the_bare_sequence(critic, sequences, pad_token_id):
    pad = critic.pad_token_id if pad_token_id is None else pad_token_id
    right, left = PaddedBatch.from_sequences(sequences, pad), left_padded(sequences, pad)
    values_right, values_left = critic.values(right), critic.values(left)
    rewards_right, rewards_left = critic.rewards(right), critic.rewards(left)
    for row, sequence in enumerate(sequences):
        expected = values_by_definition(critic, sequence)
        torch.testing.assert_close(values_right[row, : len(sequence)], expected, **TOLERANCE)
        torch.testing.assert_close(values_left[row, -len(sequence) :], expected, **TOLERANCE)
        torch.testing.assert_close(rewards_right[row], expected[-1], **TOLERANCE)
        torch.testing.assert_close(rewards_left[row], expected[-1], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("prefix_tree", [True, False], ids=["prefix tree", "padded"])
@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_scores_depend_neither_on_budget_nor_order_nor_company(
    critic, sequences, token_budget, prefix_tree, monkeypatch
):
    monkeypatch.setattr(critic, "prefix_tree", prefix_tree)
    sequences = [*sequences, sequences[1][:40], sequences[1][:40] + sequences[3], sequences[1]]
    expected = torch.stack([values_by_definition(critic, sequence)[-1] for sequence in sequences])
    scores = torch.from_numpy(score_sequences(critic, sequences, token_budget))
    torch.testing.assert_close(scores, expected, **TOLERANCE)
    backwards = torch.from_numpy(score_sequences(critic, sequences[::-1], token_budget))
    torch.testing.assert_close(backwards.flip(0), expected, **TOLERANCE)
    half = torch.from_numpy(score_sequences(critic, sequences[::2], token_budget))
    torch.testing.assert_close(half, expected[::2], **TOLERANCE)


@torch.no_grad()
def test_plain_sequence_classification_gives_the_same_rewards(critic, sequences, tmp_path):
    critic.model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(plain) is LlamaForSequenceClassification
    batch = PaddedBatch.from_sequences(sequences, critic.pad_token_id)
    logits = plain(input_ids=batch.input_ids_SL, attention_mask=batch.attention_mask_SL).logits
    torch.testing.assert_close(logits.squeeze(-1), critic.rewards(batch), **TOLERANCE)


def test_what_cannot_be_a_critic_is_refused(critic):
    two_outputs = LlamaForSequenceClassification(tiny_config(64, num_labels=2))
    with pytest.raises(ValueError, match="no bias-free 'score' head with one output"):
        Critic(two_outputs)
    with pytest.raises(ValueError, match="at least one token"):
        PaddedBatch.from_sequences([[1], []], critic.pad_token_id)
