"""``make ppo-demo``: trains a policy with PPO to continue texts in a positive tone, scored by the quickstart's critic.

Finished parts are kept, so the command can be interrupted; running it again resumes.
"""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

from rich.console import Console

from jobs import quickstart
from jobs.cli import run_job
from jobs.ppo import run, show
from rlhf_critic.config.base import load_config_file
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.train import TrainJobConfig
from rlhf_critic.files import write_text_atomically

logger = logging.getLogger(__name__)

CONFIG = Path(__file__).with_name("ppo_demo.yaml")
WORDS = range(3, 7)  # number of first words of a text that make a prompt
HELD_OUT_PROMPTS = 64
SEED = 0


def main() -> None:
    """Makes the reward model and the prompts, trains the policy and prints the result."""
    config = load_config_file(PPOJobConfig, str(CONFIG))
    if not Path(str(config.reward.checkpoint)).exists():
        logger.info("no reward model found, running the quickstart first path=%s", config.reward.checkpoint)
        quickstart.main()
    make_prompts(Path(config.prompts.train[0]), Path(config.prompts.validation[0]))
    resume = (Path(config.run.storage_path) / config.run.name).exists()
    show(Console(), run(config.model_copy(update={"resume": resume})))


def make_prompts(train: Path, validation: Path) -> None:
    """Writes the first words of the quickstart's texts as prompts; its held-out texts make the held-out prompts."""
    of_quickstart = Path(load_config_file(TrainJobConfig, str(quickstart.CONFIG)).data.train[0])
    seen: set[str] = set()
    for path, source in ((validation, of_quickstart.with_name("validation.jsonl")), (train, of_quickstart)):
        rng = random.Random(SEED)
        prompts = []
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for text in (row["chosen"], row["rejected"]):
                words = text.split()
                prompt = " ".join(words[: rng.choice(WORDS)])
                if len(words) > max(WORDS) and prompt not in seen:
                    seen.add(prompt)
                    prompts.append(prompt)
        if path == validation:
            prompts = rng.sample(prompts, HELD_OUT_PROMPTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    run_job(main)
