"""``rlhf-critic average A B C OUT``: averages the weights of critics that were trained from one base model."""

from __future__ import annotations

from contextlib import ExitStack

from actors.runtime.storage import local_directory
from jobs.cli import command, run_job
from rlhf_critic.checkpoint.average import average_critics
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.tools import AverageJobConfig


def main() -> None:
    """Averages critics and prints where the result is."""
    config = parse_command_line(AverageJobConfig, prog=command("average"))
    *sources, out = config.paths
    with ExitStack() as stack:
        card = average_critics([stack.enter_context(local_directory(source)) for source in sources], out)
    print(f"wrote {card.version} to {out}; measure it before you use it:")
    print(f"  {command('evaluate')} {out} DATA --against {sources[0]}")


if __name__ == "__main__":
    run_job(main)
