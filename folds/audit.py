"""How much a split leaks, measured: relatives across folds, and the score of copying the nearest one.

Letters: N sequences sorted by length, Q those that are compared with all others (exhaustively: all N), S splits,
L nucleotides of one sequence, C targets, K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from folds.assign import VERSION as FOLDS_VERSION
from folds.edit_distance import (
    UNKNOWN,
    Packed,
    aligned_positions,
    distance_rows,
    most_edits,
    pack,
    pair_distances,
    share_identical,
)
from folds.similarity import find_designs
from pipeline.competitions.base import Competition
from pipeline.compiled import njit
from pipeline.errors import ConfigError
from pipeline.paths import Paths
from pipeline.runlog import Bar, score_text, warn
from pipeline.schema import ALPHABET, encode
from pipeline.stage import Report, run_stage, write_json
from pipeline.tables import flat_lists, numbers_that_count, open_parquet, read_folds

#: Raised when the same folds give other numbers than before.
VERSION = 1

#: Copied labels that are right this much more often on one split than on another, as a share, are told of; and copied
#: numbers whose error is by this share of the mean's smaller.
LEAK = 0.05

#: Cross-fold pairs are counted from these identities on, %.
PERCENTS = (80, 70, 60)

#: Most sequences of which all pairs are compared; 14,035 take 9 s on two threads.
EXHAUSTIVE = 20_000

_MEDIAN_ROWS = 20_000  # sequences that the medians are taken of
_AT_ONCE = 1 << 21  # pairs: about 150 MiB of indices and distances


def run(
    paths: Paths,
    *,
    splits: Sequence[str],
    competition: Competition,
    seed: int = 2026,
    exhaustive: int = EXHAUSTIVE,
) -> Report:
    """Compare sequences across the folds of each split, and score copies of the nearest one; writes ``audit.json``.

    Args:
        paths: where the artefacts of the competition live.
        splits: names of splits whose fold tables exist.
        competition: gives the metric; without one (structures) only identities are measured.
        seed: of the sample.
        exhaustive: most sequences of which all pairs are compared; of more, a sample of the scored ones is compared
            with all: at most as many pairs.

    Raises:
        ConfigError: no splits.
        DataError: a table is missing, or a fold table is from other data.
    """
    if not splits:
        raise ConfigError("audit: no splits; expected at least one. Next: SPLITS=sim80_k5, for example.")
    inputs = {"train": paths.clean("train")} | {split: paths.fold_table(split) for split in splits}
    output = paths.home / "folds" / "audit.json"
    params = {"version": [VERSION, FOLDS_VERSION], "seed": seed, "exhaustive": exhaustive, "splits": list(splits)}

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        facts = measure(inputs["train"], inputs, splits=splits, competition=competition, seed=seed, most=exhaustive)
        write_json(parts["audit"], facts)
        return facts

    return run_stage("audit", inputs=inputs, outputs={"audit": output}, params=params, build=build)


def measure(
    train: Path,
    fold_tables: Mapping[str, Path],
    *,
    splits: Sequence[str],
    competition: Competition,
    seed: int,
    most: int,
) -> dict[str, Any]:
    """The facts of `run`."""
    known = {"classes": ["labels"], "numbers": ["numbers"]}.get(competition.task, [])
    columns = ["sequence_id", "sequence", "dataset_name", "scored", *known]
    has_profiles = competition.task == "values" and competition.error_sums is not None
    open_parquet(train, (*columns, *(competition.targets if has_profiles else ()))).close()
    table = pl.read_parquet(train, columns=columns)
    designs, _ = find_designs(table["sequence"].to_list(), table["dataset_name"].to_list())
    table = table.with_columns(pl.Series("design", designs))
    folds = [read_folds(fold_tables[split], table["sequence_id"].to_list()) for split in splits]
    for split, held_out in zip(splits, folds, strict=True):
        held_out = held_out.select("sequence_id", pl.col("fold").alias(split))
        table = table.join(held_out, on="sequence_id", how="left", validate="1:1", maintain_order="left")
    table = table.sort(pl.col("design").str.len_bytes(), "design", "sequence_id")
    folds_SN = np.stack([table[split].to_numpy().astype(np.int64) for split in splits])
    queries = _choose_queries(table["scored"].to_numpy(), seed=seed, most=most)
    survey = compare(pack(table["design"].to_list()), folds_SN, table["scored"].to_numpy(), queries=queries)
    facts: dict[str, Any] = {
        "sequences": table.height,
        "exhaustive": queries is None,
        "compared": table.height if queries is None else len(queries),
        "pairs": int(survey.pairs[0]),
        "metric": competition.metric if competition.error_sums else None,
        "splits": {},
    }
    is_measured = has_profiles and table["scored"].any()
    truth = _read_truth(train, table, survey, queries, competition) if is_measured else None
    for place, split in enumerate(splits):
        facts["splits"][split] = _describe_split(survey, place, table["sequence_id"])
        if truth is not None:
            near_N = survey.nearest_SN[place]
            facts["splits"][split] |= _score_copies(table, folds_SN[place], near_N, truth, queries, competition)
        if competition.task == "classes":
            facts["splits"][split] |= _score_labels(table, folds_SN[place], survey.nearest_SN[place], queries)
        if competition.task == "numbers":
            near_N = survey.nearest_SN[place]
            facts["splits"][split] |= _score_numbers(table, folds_SN[place], near_N, queries, competition)
    _tell_leaks(facts["splits"])
    return facts


def _choose_queries(scored_N: np.ndarray, *, seed: int, most: int) -> np.ndarray | None:
    """Sequences that stand for all of a large data set; None = compare all."""
    if len(scored_N) <= most:
        return None
    pool = np.flatnonzero(scored_N) if scored_N.any() else np.arange(len(scored_N))
    size = min(len(pool), max(1, most**2 // 2 // len(scored_N)))
    return np.sort(np.random.default_rng(seed).choice(pool, size, replace=False))


class Survey(NamedTuple):
    """Relatives across folds, split by split."""

    pairs: np.ndarray  #: [1] int64, pairs that were compared
    counts_SP: np.ndarray  #: int64, cross-fold pairs of at least each of `PERCENTS`
    highest_S: np.ndarray  #: float64, highest cross-fold identity
    worst_S2: np.ndarray  #: int64, a pair that reaches it
    best_SN: np.ndarray  #: float64, identity of `nearest_SN`; -1 = there is none
    nearest_SN: np.ndarray  #: int64, most identical scored sequence of another fold, of scored sequences; or -1


def compare(packed: Packed, folds_SN: np.ndarray, scored_N: np.ndarray, *, queries: np.ndarray | None = None) -> Survey:
    """Compare all pairs of designs, or some designs with all, and survey what lies across folds.

    Args:
        packed: N designs, sorted by length.
        folds_SN: [S, N] int64.
        scored_N: [N] bool; only scored sequences have, and are, nearest neighbours.
        queries: places of the sequences to compare with all others; None = all.
    """
    splits, total = folds_SN.shape
    survey = Survey(
        pairs=np.zeros(1, np.int64),
        counts_SP=np.zeros((splits, len(PERCENTS)), np.int64),
        highest_S=np.full(splits, -1.0),
        worst_S2=np.full((splits, 2), -1),
        best_SN=np.full((splits, total), -1.0),
        nearest_SN=np.full((splits, total), -1),
    )
    with Bar("compare across folds", total=total if queries is None else len(queries), unit="sequences") as bar:
        for rows_R, distances_RN in _rows(packed, queries):
            _enter(rows_R, distances_RN, packed.lengths_N, folds_SN, scored_N, survey)
            bar.advance(len(rows_R))
    return survey


def _rows(packed: Packed, queries: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of distances with their places; every pair once, `UNKNOWN` elsewhere."""
    total = packed.lengths_N.size
    if queries is None:
        for first, distances_RN in distance_rows(packed, np.arange(total)):
            yield np.arange(first, first + len(distances_RN)), distances_RN
        return
    step = max(1, _AT_ONCE // total)
    for low in range(0, len(queries), step):
        some = queries[low : low + step]
        distances = pair_distances(packed, np.repeat(some, total), np.tile(np.arange(total), len(some)))
        distances_RN = distances.reshape(len(some), total).astype(np.uint16)
        for row, query in enumerate(some):
            distances_RN[row, queries[queries <= query]] = UNKNOWN
        yield some, distances_RN


@njit(cache=True)
def _enter(
    rows_R: np.ndarray,
    distances_RN: np.ndarray,
    lengths_N: np.ndarray,
    folds_SN: np.ndarray,
    scored_N: np.ndarray,
    survey: Survey,
) -> None:
    """Enter rows of distances into a survey. Of equally near neighbours the one with the smaller place counts."""
    for row in range(rows_R.size):
        here = rows_R[row]
        for other in range(lengths_N.size):
            edits = distances_RN[row, other]
            if edits == UNKNOWN:
                continue
            survey.pairs[0] += 1
            short, long = lengths_N[here], lengths_N[other]
            if short > long:
                short, long = long, short
            alike = share_identical(edits, short, long)
            both = scored_N[here] and scored_N[other]
            for split in range(folds_SN.shape[0]):
                if folds_SN[split, here] == folds_SN[split, other]:
                    continue
                for place, percent in enumerate(PERCENTS):
                    survey.counts_SP[split, place] += edits <= most_edits(short, long, percent)
                if alike > survey.highest_S[split]:
                    survey.highest_S[split] = alike
                    survey.worst_S2[split, 0], survey.worst_S2[split, 1] = here, other
                if both:
                    _keep_nearest(survey, split, here, other, alike)
                    _keep_nearest(survey, split, other, here, alike)


@njit(cache=True)
def _keep_nearest(survey: Survey, split: int, one: int, two: int, alike: float) -> None:
    best = survey.best_SN[split, one]
    if alike > best or (alike == best and two < survey.nearest_SN[split, one]):
        survey.best_SN[split, one], survey.nearest_SN[split, one] = alike, two


def _describe_split(survey: Survey, split: int, ids: pl.Series) -> dict[str, Any]:
    counts = {str(percent): int(count) for percent, count in zip(PERCENTS, survey.counts_SP[split], strict=True)}
    worst = [ids[int(place)] for place in survey.worst_S2[split] if place >= 0]
    highest = float(survey.highest_S[split]) if worst else None
    return {"highest_identity": highest, "pair": worst, "cross_pairs": counts}


def _read_truth(
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


def _score_copies(
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
                prediction_LC = _copy(prediction_LC, design, other, truth[ids[near]])
            sums["copy"].append(competition.error_sums(prediction_LC, truth[ids[place]]))
    return {"scored": len(held)} | {
        f"{name}_score": competition.score(*(np.sum(part, axis=0) for part in zip(*parts, strict=True)))
        for name, parts in sums.items()
        if parts
    }


def _score_labels(
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


def _score_numbers(
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


def _tell_leaks(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn where copied labels or numbers are right far more often, or nearer, than on another split."""
    found = {split: told["copy_accuracy"] for split, told in splits.items() if "copy_accuracy" in told}
    for split, share in found.items():
        tightest = min(found, key=lambda each: found[each])
        if share > found[tightest] + LEAK:
            warn(
                f"audit: the nearest training sequence has the same labels for {share:.1%} of the sequences on "
                f"{split}, {found[tightest]:.1%} on {tightest}: scores on {split} are scores of memory"
            )
    near = {split: told["copy_score"] / told["mean_score"] for split, told in splits.items() if told.get("mean_score")}
    for split, share in near.items():
        tightest = max(near, key=lambda each: near[each])
        if share < near[tightest] - LEAK:
            warn(
                f"audit: the nearest training sequence's numbers have {share:.0%} of the mean's error on {split}, "
                f"{near[tightest]:.0%} on {tightest}: scores on {split} are scores of memory"
            )


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


def _copy(
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


def describe(facts: Mapping[str, Any]) -> Table:
    """Identities and scores of every split, as a table for the terminal."""
    how = "all pairs" if facts["exhaustive"] else f"a sample of {facts['compared']:,} sequences with all"
    title = f"{facts['sequences']:,} sequences, {how} ({facts['pairs']:,} pairs); pairs in different folds"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("split")
    for name in ("highest", *(f">= {percent} %" for percent in PERCENTS)):
        table.add_column(name, justify="right")
    of_numbers = any("mean_score" in found for found in facts["splits"].values())
    usual = {"mean_score": "mean"} if of_numbers else {"median_score": "median"}
    scores = {"copy_score": "copied"} | usual if facts["metric"] else {}
    scores = {key: f"{facts['metric']} {name}" for key, name in scores.items()}
    of_labels = any("copy_accuracy" in found for found in facts["splits"].values())
    if of_labels:
        scores = {"copy_accuracy": "right: copied", "frequent_accuracy": "most frequent"}
    for name in scores.values():
        table.add_column(name, justify="right")
    for split, found in facts["splits"].items():
        highest = "-" if found["highest_identity"] is None else f"{found['highest_identity']:.1%}"
        cells = [highest, *(f"{found['cross_pairs'][str(percent)]:,}" for percent in PERCENTS)]
        table.add_row(escape(split), *cells, *(score_text(found[key]) if key in found else "-" for key in scores))
    if of_labels:
        table.caption = (
            "copied: share of sequences with the same labels as the nearest training sequence; most frequent: as most "
            "of them.\nWhere copying is right much more often on one split, its scores are scores of memory."
        )
        table.caption_justify = "left"
    elif of_numbers:
        table.caption = (
            "copied: the nearest training sequence's numbers; mean: that of the training sequences.\n"
            "Where copying beats the mean by much, scores of the split are scores of memory."
        )
        table.caption_justify = "left"
    elif scores:
        table.caption = (
            "copied: the nearest training sequence's profile; median: the training median per nucleotide.\n"
            "Where copying beats the median by much, scores of the split are scores of memory."
        )
        table.caption_justify = "left"
    return table
