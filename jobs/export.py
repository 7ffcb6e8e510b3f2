"""``python -m jobs.export CHECKPOINT OUT``: a critic directory that plain transformers loads."""

from __future__ import annotations

from ray.train import Checkpoint

from jobs.cli import run_job
from rlhf_critic.checkpoint import export_critic
from rlhf_critic.config import ExportJobConfig, parse_command_line


def main() -> None:
    """Exports and says how to load the result."""
    config = parse_command_line(ExportJobConfig, prog="python -m jobs.export")
    with Checkpoint(config.checkpoint).as_directory() as directory:  # downloads what is not local
        card = export_critic(directory, config.out, config.auto_map)
    trust = ", trust_remote_code=True" if config.auto_map else ""
    print(f"exported {card.version} to {config.out}; load it anywhere with")
    print(f'  AutoModelForSequenceClassification.from_pretrained("{config.out}"{trust})')


if __name__ == "__main__":
    run_job(main)
