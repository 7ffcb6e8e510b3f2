"""``rlhf-critic export CHECKPOINT OUT``: writes a critic directory that plain transformers loads.

The source is a critic in a run, or a reward model that another system saved (``--from``).
"""

from __future__ import annotations

from pathlib import Path

from actors.runtime.storage import local_directory
from jobs.cli import command, run_job
from rlhf_critic.checkpoint.convert import AUTO_FORMAT, convert_checkpoint
from rlhf_critic.checkpoint.critic_directory import CARD_NAME, RESUME_FOLDER, CriticCard
from rlhf_critic.checkpoint.export import export_critic
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.tools import ExportJobConfig
from rlhf_critic.errors import ConfigError

# Options for another system's checkpoint only; a critic's card has these settings already.
CONVERSION_OPTIONS = ("base", "max_length", "chat_template", "template_date", "head_bias")


def main() -> None:
    """Exports a critic, or converts another system's reward model, and prints how to load the result."""
    config = parse_command_line(ExportJobConfig, prog=command("export"))
    with local_directory(config.checkpoint) as directory:
        card = make_critic_directory(directory, config)
    trust = ", trust_remote_code=True" if config.auto_map else ""
    print(f"exported {card.version} to {config.out}; load it anywhere with")
    print(f'  AutoModelForSequenceClassification.from_pretrained("{config.out}"{trust})')
    if "head_bias" in card.training:
        print(f"the head's bias is not in the rewards: the source's score is reward + {card.training['head_bias']:g}")


def make_critic_directory(source: Path, config: ExportJobConfig) -> CriticCard:
    """Copies a critic, or converts another system's reward model.

    Raises:
        ConfigError: The source is a critic, and an option is for another system's checkpoint.
        CheckpointError: See `rlhf_critic.checkpoint.export` and `rlhf_critic.checkpoint.convert`.
    """
    # An incomplete checkpoint of a run has no card, but it has a resume folder.
    of_this_project = (source / CARD_NAME).exists() or (source / RESUME_FOLDER).exists()
    if not of_this_project or config.source_format != AUTO_FORMAT:
        options = {name: getattr(config, name) for name in CONVERSION_OPTIONS}
        name = Path(config.checkpoint).name
        return convert_checkpoint(
            source, config.out, config.source_format, name=name, auto_map=config.auto_map, **options
        )
    for name in CONVERSION_OPTIONS:
        if getattr(config, name) != ExportJobConfig.model_fields[name].default:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for another system's checkpoint, and {source} is a critic of this "
                "project; leave the option out"
            )
    return export_critic(source, config.out, config.auto_map)


if __name__ == "__main__":
    run_job(main)
