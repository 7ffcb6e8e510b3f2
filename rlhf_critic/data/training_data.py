"""Data of a training run: the encoder, the preferences to train on and those to validate on, and the number of steps.

Knows nothing about models, ranks or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_critic.batching.sampler import steps_in
from rlhf_critic.config.train import TrainConfig, TrainJobConfig
from rlhf_critic.data.encoding import Encoder, create_encoder
from rlhf_critic.data.preference_dataset import (
    EncodedPreferences,
    concatenate,
    count_leaked,
    deduplicate,
    split_by_prompt,
    temperature_weights,
    weigh_sources,
)
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.errors import ConfigError


@dataclass(frozen=True)
class TrainingData:
    """Encoded data of a run: preferences to train on and, if any, to validate on, with their encoder."""

    encoder: Encoder
    train: EncodedPreferences
    validation: EncodedPreferences | None

    def __str__(self) -> str:
        """Describes the rows that were read, and warns about validation prompts that are also trained on."""
        described = str(self.train)
        if len(self.train.reports) > 1:
            sizes = np.bincount(self.train.sources_N, minlength=len(self.train.reports))
            shown = (f"{size} of {source}" for source, size in zip(self.train.reports, sizes, strict=True))
            described += f"\nrows of an epoch: {', '.join(shown)}"
        if self.validation is None:
            return described
        leaked = count_leaked(self.train, self.validation)
        if self.validation.reports == self.train.reports and not leaked:
            return f"{described}\nheld out for validation: {len(self.validation)}, training on {len(self.train)}"
        warning = f"\nwarning: {leaked} of {len(self.validation)} validation prompts are trained on" if leaked else ""
        return f"{described}\n{self.validation}{warning}"


def load_data(config: TrainJobConfig, ignored_end_id: int | None = None) -> TrainingData:
    """Reads the data of a run, or maps it from the cache.

    ``ignored_end_id`` is the token that the model at the start ignores at the end of texts; see `create_encoder`.

    Raises:
        CriticError: See `rlhf_critic.data.encoding.load_tokenizer` and `rlhf_critic.data.preferences.load_preferences`.
    """
    options = config.data
    encoder = create_encoder(config.model.path, config.encoding, ignored_end_id)

    def load(sources: Sequence[str], benchmarks: Sequence[str] = ()) -> EncodedPreferences:
        tables = [
            load_preferences(
                source,
                encoder,
                options.cache_dir,
                fields=options.fields,
                overlong=options.overlong,
                decontaminate=benchmarks,
                ngram=options.decontaminate_ngram,
            )
            for source in sources
        ]
        return concatenate(tables)

    train = load(options.train, options.decontaminate)
    validation = load(options.validation) if options.validation else None
    if options.deduplicate:
        train = deduplicate(train)
    if options.validation_fraction:
        train, validation = split_by_prompt(train, options.validation_fraction, options.seed)
    weights: Sequence[float] | None = options.train_weights
    if options.mixing_temperature != 1:
        sizes = np.bincount(train.sources_N, minlength=len(options.train)).tolist()
        weights = temperature_weights(sizes, options.mixing_temperature)
    if weights is not None:
        train = weigh_sources(train, weights, options.seed)
    return TrainingData(encoder, train, validation)


def total_steps(num_preferences: int, options: TrainConfig) -> int:
    """Returns the number of optimizer steps of a whole run.

    Raises:
        ConfigError: The run would have no step.
    """
    steps = steps_in(num_preferences, options.global_batch_size, options.epochs)
    if steps == 0:
        raise ConfigError(f"train.epochs is {options.epochs}: with {num_preferences} preferences that is no step")
    return min(steps, options.max_steps or steps)
