"""``rlhf-critic calibrate CHECKPOINT DATA``: fits the uncertainty of a critic's rewards.

The result is stored beside the weights. The critic may be one of this project or another reward model with one label.
Its weights and scores do not change.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jobs.cli import command, run_job
from rlhf_critic.checkpoint.posterior_file import POSTERIOR_NAME, save_posterior
from rlhf_critic.checkpoint.reward_model import open_reward_model
from rlhf_critic.config.base import parse_command_line
from rlhf_critic.config.model import resolve_dtype
from rlhf_critic.config.tools import CalibrateJobConfig
from rlhf_critic.data.preference_dataset import split_by_prompt
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import ConfigError
from rlhf_critic.model.device import configure_device, select_device
from rlhf_critic.model.factory import DTYPE_OF, HEAD_NAME
from rlhf_critic.training.posterior_fit import (
    MAX_VALIDATION,
    FitReport,
    fit_head_posterior,
    last_states_of,
    sample_units,
)


def main() -> None:
    """Calibrates a critic and prints the figures."""
    config = parse_command_line(CalibrateJobConfig, prog=command("calibrate"))
    report = calibrate(config)
    Console().print(
        f"calibrated {config.checkpoint} on {report.preferences} preferences and {report.validation} comparisons for "
        f"validation\nlog-loss {report.log_loss:.4f}, with temperature {report.temperature:.3f}: "
        f"{report.log_loss_scaled:.4f}, with uncertainty: {report.log_loss_uncertain:.4f}\n"
        f"mean standard deviation of a reward: {report.mean_std:.3f}\nwrote {POSTERIOR_NAME}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def calibrate(config: CalibrateJobConfig) -> FitReport:
    """Fits the posterior of a critic's head and writes it into the critic's directory.

    Raises:
        ConfigError: The checkpoint is not a local directory.
        CriticError: The checkpoint or the data cannot be read, or there are too few preferences.
    """
    directory = Path(config.checkpoint)
    if not directory.is_dir():
        raise ConfigError(
            f"checkpoint: {config.checkpoint} is not a local directory, into which the result is written: copy or "
            "export the critic first"
        )
    device, dtype = select_device(config.use_gpu), DTYPE_OF[resolve_dtype(config.dtype, config.use_gpu)]
    configure_device(device, dtype)
    opened = open_reward_model(directory, config.checkpoint, config.encoding)
    head_1D = opened.reader.read(HEAD_NAME)
    critic = opened.build(dtype=dtype).eval().to(device)
    train = load_preferences(config.data, opened.encoder, config.cache_dir)
    if config.validation is None:
        train, validation = split_by_prompt(train, config.validation_fraction, seed=0)
    else:
        validation = load_preferences(config.validation, opened.encoder, config.cache_dir)
    units = sample_units(train, config.max_preferences)
    posterior, report = fit_head_posterior(
        units,
        sample_units(validation, MAX_VALIDATION),
        last_states_of(critic, config.token_budget),
        scale=len(train) / len(units),
    )
    save_posterior(directory, posterior, head_1D, report.to_dict())
    return report


if __name__ == "__main__":
    run_job(main)
