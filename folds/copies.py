"""Scores of copying the most similar training sequence, beside what needs no relative: how far memory alone gets.

Letters: N sequences, Q those that are compared with all others (exhaustively: all N), L nucleotides of one sequence,
C targets.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from folds.edit_distance import aligned_positions
from folds.survey import Survey
from pipeline.competitions.base import Competition
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, encode
from pipeline.tables import flat_lists, numbers_that_count

#: Copied labels that are right this much more often on one split than on another, as a share, are told of; and copied
#: numbers and profiles whose error is by this share of the mean's, or the median's, smaller.
LEAK = 0.05

_MEDIAN_ROWS = 20_000  # sequences that the medians are taken of


def read_truth(
    train: Path, table: pl.DataFrame, survey: Survey, queries: np.ndarray | None, competition: Competition
) -> dict[str, np.ndarray]:
    """Clipped profiles [L, C] float32, NaN = not measured, of the scored sequences that are needed, by id."""
    scored_N = table["scored"].to_numpy()
    needed = np.zeros(table.height, bool)
    held = np.flatnonzero(scored_N) if queries is None else queries
    needed[held] = True
    near = survey.nearest_SN[:, held]
    needed[near[near >= 0]] = True
    rest = np.flatnonzero(scored_N)
    needed[rest[np.linspace(0, len(rest) - 1, min(len(rest), _MEDIAN_ROWS)).astype(int)]] = True
    ids = table.filter(pl.Series(needed & scored_N)).select("sequence_id")
    columns = ["sequence_id", "sequence", *competition.targets]
    rows = pl.scan_parquet(train).select(columns).join(ids.lazy(), on="sequence_id", how="semi").collect()
    rows = rows.sort("sequence_id")
    lengths_N = rows["sequence"].str.len_bytes().to_numpy().astype(np.int64)
    flats = [
        flat_lists(rows[name], lengths_N, ids=rows["sequence_id"], where=train.name) for name in competition.targets
    ]
    values_TC = np.stack(flats, axis=1)
    if competition.target_range:
        values_TC = np.clip(values_TC, *competition.target_range)
    profiles = np.split(values_TC, np.cumsum(lengths_N)[:-1])
    return dict(zip(rows["sequence_id"], profiles, strict=True))


def score_copies(
    table: pl.DataFrame,
    folds_N: np.ndarray,
    nearest_N: np.ndarray,
    truth: Mapping[str, np.ndarray],
    queries: np.ndarray | None,
    competition: Competition,
) -> dict[str, Any]:
    """Scores of the training median per nucleotide, and of copying the nearest training sequence on top of it."""
    assert competition.error_sums is not None
    assert competition.score is not None
    ids, sequences, designs = (table[name].to_list() for name in ("sequence_id", "sequence", "design"))
    candidates = range(len(ids)) if queries is None else queries.tolist()
    held = [place for place in candidates if ids[place] in truth]
    sums: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"median": [], "copy": []}
    for fold in np.unique(folds_N[held]):
        medians_4C = _medians(table, folds_N != fold, truth)
        for place in held:
            if folds_N[place] != fold:
                continue
            prediction_LC = medians_4C[encode(sequences[place])]
            sums["median"].append(competition.error_sums(prediction_LC, truth[ids[place]]))
            near = int(nearest_N[place])
            if near >= 0:
                design = (sequences[place], designs[place])
                other = (sequences[near], designs[near])
                prediction_LC = copy_aligned(prediction_LC, design, other, truth[ids[near]])
            sums["copy"].append(competition.error_sums(prediction_LC, truth[ids[place]]))
    return {"scored": len(held)} | {
        f"{name}_score": competition.score(*(np.sum(part, axis=0) for part in zip(*parts, strict=True)))
        for name, parts in sums.items()
        if parts
    }


def _medians(table: pl.DataFrame, train_N: np.ndarray, truth: Mapping[str, np.ndarray]) -> np.ndarray:
    """Median of the training profiles per nucleotide, [4, C]; 0 where nothing was measured."""
    rows = table.filter(pl.Series(train_N)).select("sequence_id", "sequence").iter_rows()
    chosen = [(encode(sequence), truth[sequence_id]) for sequence_id, sequence in rows if sequence_id in truth]
    channels = next(iter(truth.values())).shape[1]
    medians_4C = np.zeros((len(ALPHABET), channels), np.float32)
    if not chosen:
        return medians_4C
    tokens_T, values_TC = np.concatenate([pair[0] for pair in chosen]), np.concatenate([pair[1] for pair in chosen])
    for token in range(len(ALPHABET)):
        for channel in range(channels):
            values = values_TC[tokens_T == token, channel]
            values = values[~np.isnan(values)]
            medians_4C[token, channel] = np.median(values) if values.size else 0.0
    return medians_4C


def copy_aligned(
    prediction_LC: np.ndarray, here: tuple[str, str], there: tuple[str, str], profile_LC: np.ndarray
) -> np.ndarray:
    """`prediction_LC` with the values of another sequence where the designs align and it was measured.

    Args:
        prediction_LC: what stands where nothing is copied.
        here: sequence and its design.
        there: sequence that is copied, and its design.
        profile_LC: values of `there`, NaN = not measured.
    """
    start, other_start = here[0].index(here[1]), there[0].index(there[1])
    if len(here[1]) <= len(there[1]):
        places = aligned_positions(here[1], there[1])
        mine, theirs = np.flatnonzero(places >= 0), places[places >= 0]
    else:
        places = aligned_positions(there[1], here[1])
        mine, theirs = places[places >= 0], np.flatnonzero(places >= 0)
    copied = profile_LC[other_start + theirs]
    result_LC = prediction_LC.copy()
    result_LC[start + mine] = np.where(np.isnan(copied), result_LC[start + mine], copied)
    return result_LC


def score_labels(
    table: pl.DataFrame, folds_N: np.ndarray, nearest_N: np.ndarray, queries: np.ndarray | None
) -> dict[str, Any]:
    """Share of the scored sequences with the labels of the nearest training sequence, or the most frequent ones."""
    known_N = (table["scored"] & table["labels"].is_not_null()).to_numpy()
    held = np.flatnonzero(known_N) if queries is None else queries[known_N[queries]]
    if not held.size:
        return {"scored": 0}
    said_N = table["labels"].list.sort().cast(pl.List(pl.String)).list.join(";").rank("dense").fill_null(0).to_numpy()
    frequent_N = np.zeros(len(folds_N))
    for fold in np.unique(folds_N):
        counts = np.bincount(said_N[known_N & (folds_N != fold)].astype(np.int64), minlength=1)
        frequent_N[folds_N == fold] = np.argmax(counts)
    copied_N = np.where(nearest_N >= 0, said_N[nearest_N], frequent_N)
    return {
        "scored": len(held),
        "copy_accuracy": float((copied_N == said_N)[held].mean()),
        "frequent_accuracy": float((frequent_N == said_N)[held].mean()),
    }


def score_numbers(
    table: pl.DataFrame,
    folds_N: np.ndarray,
    nearest_N: np.ndarray,
    queries: np.ndarray | None,
    competition: Competition,
) -> dict[str, Any]:
    """Scores of the mean of the training sequences, and of the nearest one's numbers, the mean where it has none."""
    assert competition.error_sums is not None
    assert competition.score is not None
    truth_NC = numbers_that_count(table, width=len(competition.targets))
    known_N = np.isfinite(truth_NC).any(axis=1)
    held = np.flatnonzero(known_N) if queries is None else queries[known_N[queries]]
    if not held.size:
        return {"scored": 0}
    mean_NC = np.empty(truth_NC.shape)
    for fold in np.unique(folds_N):
        others_nC = truth_NC[folds_N != fold]
        there_nC = np.isfinite(others_nC)
        sums_C = np.where(there_nC, others_nC, 0.0).sum(axis=0)
        mean_NC[folds_N == fold] = sums_C / np.maximum(there_nC.sum(axis=0), 1)
    copied_NC = np.where((nearest_N >= 0)[:, None] & np.isfinite(truth_NC[nearest_N]), truth_NC[nearest_N], mean_NC)
    return {"scored": len(held)} | {
        f"{name}_score": competition.score(*competition.error_sums(said_NC[held], truth_NC[held]))
        for name, said_NC in (("mean", mean_NC), ("copy", copied_NC))
    }


def tell_leaks(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn where copied labels are right far more often, or numbers and profiles nearer, than on another split."""
    found = {split: told["copy_accuracy"] for split, told in splits.items() if "copy_accuracy" in told}
    for split, share in found.items():
        tightest = min(found, key=lambda each: found[each])
        if share > found[tightest] + LEAK:
            warn(
                f"audit: the nearest training sequence has the same labels for {share:.1%} of the sequences on "
                f"{split}, {found[tightest]:.1%} on {tightest}: scores on {split} are scores of memory"
            )
    for copied, usual in (("numbers have", "mean"), ("profile has", "median")):
        score = f"{usual}_score"
        near = {split: told["copy_score"] / told[score] for split, told in splits.items() if told.get(score)}
        for split, share in near.items():
            tightest = max(near, key=lambda each: near[each])
            if share < near[tightest] - LEAK:
                warn(
                    f"audit: the nearest training sequence's {copied} {share:.0%} of the {usual}'s error on {split}, "
                    f"{near[tightest]:.0%} on {tightest}: scores on {split} are scores of memory"
                )
