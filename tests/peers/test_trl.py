"""TRL's trainers read an export as this project does, and this project reads what they save."""

import itertools
import json

import numpy as np
import torch

from rlhf_critic.checkpoint.convert import convert_checkpoint
from rlhf_critic.data.encoding import Encoder, load_tokenizer
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.scoring.items import Conversation
from tests.actors.scorers import rewards_by_engine
from tests.peers.contract import turns_of
from tests.rlhf_critic.data.agent_rows import ROWS, TEMPLATE, TOOLS


def rows_of(pairs):
    chosen, rejected = (turns_of(side) for side in zip(*pairs, strict=True))
    return [{"chosen": one, "rejected": other} for one, other in zip(chosen, rejected, strict=True)]


def ours_of(critic, pairs):
    return [rewards_by_engine(critic, list(side)) for side in zip(*pairs, strict=True)]


def test_the_reward_trainer_evaluates_our_export_with_our_numbers(peer, export, pairs):
    contract = peer("trl")
    answer = contract.run("ask_trl", {"model": export, "rows": rows_of(pairs)})
    chosen, rejected = ours_of(export, pairs)
    contract.compare(
        "our export: RewardTrainer's rewards", [*answer["chosen"], *answer["rejected"]], [*chosen, *rejected]
    )
    loss = torch.nn.functional.softplus(torch.from_numpy(rejected - chosen)).mean().item()
    metrics = [answer["metrics"][f"eval_{name}"] for name in ("loss", "margin", "accuracy")]
    contract.compare(
        "our export: RewardTrainer.evaluate (loss, margin, accuracy)",
        metrics,
        [loss, (chosen - rejected).mean(), (chosen > rejected).mean()],
    )


def test_the_reward_trainer_reads_turns_of_agents_with_our_token_ids(peer, export, tmp_path):
    """Results and calls of tools, a system turn and reasoning, with the schemas of tools in a column."""
    contract = peer("trl")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    rows = [{"prompt": [], **row, "tools": json.dumps(TOOLS)} for row in ROWS.values()]
    answer = contract.run("ask_trl", {"model": export, "rows": rows, "chat_template": str(template)})
    encoder = Encoder(load_tokenizer(export, str(template)), 2048)
    for row, theirs in zip(rows, answer["ids"], strict=True):
        (prompt, response), _ = parse_row("row:1", row, {}).conversations()
        contract.compare("turns of agents: RewardTrainer's token ids", theirs, encoder.encode(prompt, response).ids)


def test_a_model_that_the_reward_trainer_made_has_its_scores_here(peer, base, pairs, tmp_path):
    """TRL sets the pad token to EOS where a tokenizer has none, so its score is read before a final EOS."""
    contract = peer("trl")
    request = {"model": base, "rows": rows_of(pairs), "steps": 3, "save_to": str(tmp_path / "theirs")}
    answer = contract.run("ask_trl", request)
    assert answer["pad_is_eos"]
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", max_length=512)
    ours = itertools.chain(*ours_of(str(tmp_path / "ours"), pairs))
    contract.compare("their checkpoint (pad = EOS): rlhf-critic export", answer["chosen"] + answer["rejected"], [*ours])


def test_grpo_with_our_export_as_reward_function_has_our_rewards(peer, export, base, conversations):
    contract = peer("trl")
    # Short ones: what a random policy generates has many tokens, and TRL does not truncate at the critic's maximum.
    shortest = sorted((str(one.prompt) for one in conversations), key=len)[:4]
    prompts = [[{"role": "user", "content": prompt}] for prompt in shortest]
    answer = contract.run("ask_trl", {"model": export, "policy": base, "prompts": prompts})
    logged = answer["logged"]
    (name,) = logged[0].keys() - {"prompt", "completion"}
    asked = [Conversation(row["prompt"], row["completion"][-1]["content"]) for row in logged]
    ours = rewards_by_engine(export, asked)
    theirs = np.array([row[name] for row in logged])
    contract.compare("our export: GRPOTrainer(reward_funcs=EXPORT), prompts of turns", theirs, ours)
