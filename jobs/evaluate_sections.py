"""Further sections of ``rlhf-critic evaluate``: uncertainty, health, another critic and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from actors.runtime.storage import local_directory
from rlhf_critic.algorithms.head_posterior import HeadPosterior
from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.checkpoint.critic_directory import LoadedCritic
from rlhf_critic.checkpoint.reward_model import open_reward_model
from rlhf_critic.config.model import resolve_dtype
from rlhf_critic.config.tools import EvaluateJobConfig
from rlhf_critic.data.conversation import Prompt
from rlhf_critic.data.preference_dataset import EncodedPreferences
from rlhf_critic.data.preference_schema import parse_row
from rlhf_critic.data.preferences import load_preferences
from rlhf_critic.data.sources import read_rows
from rlhf_critic.errors import ConfigError, EncodingError
from rlhf_critic.evaluation.bootstrap import FloatArray
from rlhf_critic.evaluation.comparison import compare_margins, most_different
from rlhf_critic.evaluation.health import MAX_ANSWERS, VARIANTS, Health, measure_shifts, rewritten
from rlhf_critic.evaluation.report import Section
from rlhf_critic.evaluation.rewardbench import BenchmarkResult
from rlhf_critic.evaluation.uncertainty import OtherDomain, auroc, evaluate_uncertainty
from rlhf_critic.model.device import select_device
from rlhf_critic.model.factory import DTYPE_OF
from rlhf_critic.scoring.local import rewards_and_states, score_sequences

CHUNK = 1000  # preferences whose hidden states are in memory together
SHOWN = 10  # preferences on which two critics differ
MAX_SHOWN_TEXT = 160


def load_reward_model(checkpoint: str, config: EvaluateJobConfig) -> LoadedCritic:
    """Loads a reward model on the device of the job.

    Raises:
        CriticError: It cannot be read.
    """
    dtype = DTYPE_OF[resolve_dtype(config.dtype, config.use_gpu)]
    with local_directory(checkpoint) as directory:
        encoding = config.encoding if checkpoint == config.checkpoint else None
        loaded = open_reward_model(directory, checkpoint, encoding).load(dtype)
    device = select_device(config.use_gpu)
    loaded.critic.to(device)
    return loaded if loaded.posterior is None else replace(loaded, posterior=loaded.posterior.to(device))


def score_with_stds(
    loaded: LoadedCritic, posterior: HeadPosterior, preferences: EncodedPreferences, token_budget: int
) -> tuple[NDArray[np.float32], FloatArray, FloatArray]:
    """Scores preferences in one pass.

    Returns:
        Rewards of all responses, fp32 ``[R]``, their standard deviations, ``[R]``, and those of the margins of all
        comparisons, ``[P]``.
    """
    rewards, stds, margin_stds = [], [], []
    for start in range(0, len(preferences), CHUNK):
        part = preferences.select(np.arange(start, min(start + CHUNK, len(preferences))))
        rewards_R, states_RD = rewards_and_states(loaded.critic, part.responses(), token_budget)
        projected_RD = posterior.project(states_RD)
        pairs = part.comparisons()
        rewards.append(rewards_R)
        stds.append(projected_RD.norm(dim=1).cpu().numpy())
        margin_stds.append((projected_RD[pairs.better_P] - projected_RD[pairs.worse_P]).norm(dim=1).cpu().numpy())
    joined = [np.concatenate(parts).astype(np.float64) for parts in (stds, margin_stds)]
    return np.concatenate(rewards), joined[0], joined[1]


def uncertainty_section(
    loaded: LoadedCritic, config: EvaluateJobConfig, margin_P: FloatArray, margin_std_P: FloatArray, std_R: FloatArray
) -> Section:
    """Measures the uncertainty of a calibrated critic."""
    assert loaded.posterior is not None
    found = evaluate_uncertainty(margin_P, margin_std_P, std_R, loaded.posterior.temperature)
    if config.other_domain is not None:
        other = load_preferences(config.other_domain, loaded.encoder, config.cache_dir)
        _, other_R, _ = score_with_stds(loaded, loaded.posterior, other, config.token_budget)
        stands_out = auroc(np.concatenate([other_R, std_R]), np.arange(len(other_R) + len(std_R)) < len(other_R))
        assert stands_out is not None
        of_other = OtherDomain(config.other_domain, len(other_R), float(other_R.mean()), stands_out)
        found = replace(found, other_domain=of_other)
    rows = [
        ("log-loss", f"{found.log_loss:.4f}", "of sigmoid(margin), in nats"),
        ("log-loss, scaled", f"{found.log_loss_scaled:.4f}", f"with the temperature {found.temperature:.3f}"),
        ("log-loss, uncertain", f"{found.log_loss_uncertain:.4f}", "with temperature and uncertainty"),
        ("calibration error", f"{found.error:.3f}", "of sigmoid(margin)"),
        ("calibration error, scaled", f"{found.error_scaled:.3f}", "with the temperature"),
        ("calibration error, uncertain", f"{found.error_uncertain:.3f}", "with temperature and uncertainty"),
        ("mean deviation", f"{found.mean_std:.3f}", "standard deviation of a reward"),
    ]
    for name, value, meaning in (
        ("AUROC, deviation", found.auroc_std, "a wrong judgement has the larger deviation of its margin"),
        ("AUROC, margin", found.auroc_margin, "a wrong judgement has the smaller margin: the baseline"),
        ("AUROC, probability", found.auroc_probability, "a wrong judgement is less probable, with uncertainty"),
    ):
        rows.append((name, "not defined" if value is None else f"{value:.3f}", meaning))
    rows += [
        (
            f"error rate, {part} of {len(found.error_by_quantile)}",
            str(one.error),
            f"deviation {one.low:.3f} to {one.high:.3f}",
        )
        for part, one in enumerate(found.error_by_quantile, 1)
    ]
    if found.other_domain:
        one = found.other_domain
        rows += [
            ("mean deviation, other domain", f"{one.mean_std:.3f}", f"{one.responses} responses of {one.source}"),
            ("AUROC, other domain", f"{one.auroc:.3f}", "a response of the other domain has the larger deviation"),
        ]
    note = "What the standard deviations of rewards tell about these preferences. Chance gives an AUROC of 0.5."
    return Section("uncertainty", "Uncertainty", note, ("measure", "value", "meaning"), rows, found.to_dict())


def health_section(loaded: LoadedCritic, config: EvaluateJobConfig) -> Section:
    """Measures how rewards change with the form of an answer, on the first rows of the data."""
    encoder, critic, budget = loaded.encoder, loaded.critic, config.token_budget
    answers: list[tuple[Prompt, str, str]] = []
    for number, row in islice(read_rows(config.data), MAX_ANSWERS):
        (prompt, chosen), *_, (_, rejected) = parse_row(f"{config.data}:{number}", row, {}).conversations()
        if isinstance(chosen, str) and isinstance(rejected, str):
            answers.append((prompt, chosen, rejected))
    chosen_ids = [encoder.encode(prompt, chosen).ids for prompt, chosen, _ in answers]
    rejected_ids = [encoder.encode(prompt, rejected).ids for prompt, _, rejected in answers]
    sides = [chosen_ids, rejected_ids]
    reward_A, rejected_A = _scores(loaded, sides[0] + sides[1], budget).reshape(2, -1)
    changed = {}
    for variant in VARIANTS:
        sequences: dict[int, TokenIds] = {}
        for index, (prompt, chosen, _) in enumerate(answers):
            text = rewritten(variant, prompt, chosen, encoder.ending.strip())
            if text is not None and text != chosen:
                try:
                    sequences[index] = encoder.encode(prompt, text).ids
                except EncodingError:  # such as an empty answer in a template without markup
                    continue
        changed_A = np.full(len(answers), np.nan)
        if sequences:
            changed_A[list(sequences)] = _scores(loaded, list(sequences.values()), budget)
        changed[variant.name] = changed_A
    deviation, shifts = measure_shifts(reward_A, changed)
    swapped = score_sequences(critic, sides[1] + sides[0], budget).astype(np.float64).reshape(2, -1)
    swap_error = float(np.abs((reward_A - rejected_A) + (swapped[0] - swapped[1])).max()) / (deviation or 1.0)
    health = Health(len(answers), deviation, shifts, swap_error)
    rows = [(one.name, str(one.shift), f"{one.raised:.0%}", one.meaning) for one in health.shifts]
    rows.append(("swapped sides", f"{swap_error:.1e}", "", "largest deviation from the mirrored margin"))
    note = (
        f"Mean change of the reward of {len(answers)} chosen answers when their form changes and not their content, in "
        "standard deviations of the reward. A policy learns what raises it."
    )
    columns = ("change", "shift [95% interval]", "raised", "meaning")
    return Section("health", "Sensitivity to form", note, columns, rows, health.to_dict())


def _scores(loaded: LoadedCritic, sequences: Sequence[TokenIds], token_budget: int) -> FloatArray:
    return score_sequences(loaded.critic, sequences, token_budget).astype(np.float64)


def against_section(
    config: EvaluateJobConfig, loaded: LoadedCritic, preferences: EncodedPreferences, margin_P: FloatArray
) -> Section:
    """Compares the critic with another one on the preferences that both can read.

    Raises:
        ConfigError: There is no such preference.
    """
    assert config.against is not None
    other = load_reward_model(config.against, config)
    others = load_preferences(config.data, other.encoder, config.cache_dir)
    rewards_R = _scores(other, others.responses(), config.token_budget)
    pairs = others.comparisons()
    first = _by_place(preferences, margin_P)
    second = _by_place(others, rewards_R[pairs.better_P] - rewards_R[pairs.worse_P])
    places = [place for place in first if place in second]  # an encoder may skip a row that the other one keeps
    if not places:
        raise ConfigError(f"against: {config.against} and {config.checkpoint} read no preference of {config.data} both")
    first_P, second_P = (np.array([margins[place] for place in places]) for margins in (first, second))
    found = compare_margins(first_P, second_P)
    names = (loaded.card.version, other.card.version)
    rows = [
        ("accuracy", f"{found.accuracy[0]:.3f} and {found.accuracy[1]:.3f}", " and ".join(names)),
        ("difference of accuracies", str(found.accuracy_difference), "the first minus the second; paired bootstrap"),
        ("difference of log-losses", str(found.log_loss_difference), "the first minus the second; lower is better"),
        ("agreement", f"{found.agreement:.3f}", "share of the preferences with the same preferred side"),
        ("correlation", "none" if found.correlation is None else f"{found.correlation:.3f}", "of their margins"),
    ]
    row_of = {preferences.origin(row): row for row in range(len(preferences))}
    for index in most_different(first_P, second_P, SHOWN):
        place, _ = places[index]
        texts = preferences[row_of[place]].responses
        shown = str(loaded.encoder.tokenizer.decode(list(texts[0]), skip_special_tokens=True))
        margins = f"{first_P[index]:+.3f} and {second_P[index]:+.3f}"
        rows.append((place, margins, shown[-MAX_SHOWN_TEXT:]))
    note = f"{names[0]} against {names[1]} on {len(places)} comparisons, and the margins that differ most."
    data = {"critic": names[1], **found.to_dict()}
    return Section("against", "Another critic", note, ("measure", "value", "meaning"), rows, data)


def _by_place(preferences: EncodedPreferences, margin_P: FloatArray) -> dict[tuple[str, int], float]:
    """Returns margins by the origin of the preference and the number of the comparison in it."""
    return {
        (preferences.origin(int(row)), number): float(margin)
        for (row, number), margin in zip(_numbered(preferences.comparisons().rows_P), margin_P, strict=True)
    }


def _numbered(rows_P: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    last, number = -1, 0
    for row in rows_P.tolist():
        number = number + 1 if row == last else 0
        last = row
        yield row, number


def benchmark_section(result: BenchmarkResult) -> Section:
    """Tabulates the totals of a benchmark."""
    rows = [(name, f"{score:.4f}", "subset") for name, score in sorted(result.subsets.items())]
    rows += [(name, f"{score:.4f}", "section, weighted as in the benchmark") for name, score in result.sections.items()]
    of = "sections" if result.sections else "subsets"
    rows.append(("total", f"{result.total:.4f}", f"mean over {of}"))
    note = f"{result.benchmark} on {result.rows} rows."
    if result.missing:
        note += f" {len(result.missing)} subsets are missing, so the total is not that of the leaderboard."
    return Section("benchmark", result.benchmark, note, ("name", "score", "kind"), rows, result.to_dict())
