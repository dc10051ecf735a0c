"""Score of predicted C1' traces: best of the candidates by TM-score, per target, beside shapes that read no sequence.

Letters: M candidates, R references, L residues, 3 xyz; lengths in Å.
"""

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.structure.geometry import STEP, helix_strand, trace_from_pairs
from submissions.tm_score import ENGINE, tm_scores

#: Lengths (nt) at which the table by length is cut.
LENGTH_CUTS = (30, 80, 150)

_AXES = ["x", "y", "z"]
_RANDOM_WALKS = 5
_LOOP = 4  # nt at the end of the constant hairpin
_BATCH = 64  # targets scored in one call


def evaluate_structure(paths: Paths, *, competition: Competition, predictions: Path) -> dict[str, Any]:
    """Score the predicted targets whose structure is known, and the trivial shapes on the same targets.

    Args:
        paths: where the clean table ``references`` lies.
        competition: gives the metric's name.
        predictions: parquet with ``sequence_id, candidate, x, y, z``, one row per candidate.

    Returns:
        JSON-able: ``score`` (mean over targets of the best candidate against the reference that suits it best),
        ``first_candidate`` (mean if only candidate 1 counted), ``floors`` (name -> mean), ``by_length``, ``targets``
        (one row each: length, resolved residues, references, score, the candidate that won, all candidates' scores,
        the best floor), ``without_reference`` (predicted targets that could not be scored), ``engine``.

    Raises:
        DataError: a table is missing or damaged, the tables contradict each other, or no predicted target is known.
    """
    known = _traces(paths.clean("references"), member="conformer", finite=False)
    predicted = _traces(predictions, member="candidate", finite=True)
    common = sorted(set(known) & set(predicted))
    if not common:
        raise DataError(
            f"{predictions}: none of its {len(predicted)} targets has a known structure in "
            f"{paths.clean('references')}. Next: add validation_labels.csv to the raw files, or evaluate the folds."
        )
    _check_lengths(predicted, known, common, predictions)
    rows = []
    for start in range(0, len(common), _BATCH):
        rows += _score_targets(common[start : start + _BATCH], predicted, known)
    return {
        "metric": competition.metric,
        "engine": ENGINE,
        "score": _mean(row["score"] for row in rows),
        "first_candidate": _mean(row["candidate_scores"][0] for row in rows),
        "floors": {name: _mean(row["floors"][name] for row in rows) for name in rows[0]["floors"]},
        "best_floor": _mean(max(row["floors"].values()) for row in rows),
        "by_length": _by_length(rows),
        "targets": rows,
        "without_reference": sorted(set(predicted) - set(known)),
    }


def _traces(path: Path, *, member: str, finite: bool) -> dict[str, np.ndarray]:
    """sequence_id -> [M, L, 3] Å in the order of `member`, NaN where null."""
    if not path.is_file():
        raise DataError(f"{path}: missing. Next: run the stage that writes it (make help).")
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as err:
        raise DataError(f"{path}: not a readable parquet file. Next: remove it and run its stage again.") from err
    missing = [name for name in ("sequence_id", member, *_AXES) if name not in table.columns]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; got {', '.join(table.columns)}. Next: run its stage again.")
    traces = {}
    for (target,), rows in table.sort("sequence_id", member).group_by(["sequence_id"], maintain_order=True):
        if rows[member].is_duplicated().any():
            raise DataError(f"{path}: {target} has a {member} twice. Next: run the stage that writes it again.")
        lists = [[values or [] for values in rows[axis].to_list()] for axis in _AXES]
        if len({len(values) for axis in lists for values in axis}) != 1:
            raise DataError(f"{path}: {target} has lists of different lengths. Next: run its stage again.")
        xyz_ML3 = np.stack([np.array(axis, dtype=np.float64) for axis in lists], axis=-1)
        if finite and not np.isfinite(xyz_ML3).all():
            raise DataError(f"{path}: {target} has a coordinate that is null or not finite. Next: predict again.")
        traces[str(target)] = xyz_ML3
    return traces


def _check_lengths(
    predicted: dict[str, np.ndarray], known: dict[str, np.ndarray], targets: list[str], path: Path
) -> None:
    for target in targets:
        got, expected = predicted[target].shape[1], known[target].shape[1]
        if got != expected:
            raise DataError(
                f"{path}: {target} has {got} residues, its reference {expected}. "
                "Next: predict again from the present clean tables."
            )


def _score_targets(
    targets: list[str], predicted: dict[str, np.ndarray], known: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Rows of some targets; all of their pairs go into one call, so that every thread has work."""
    shapes = [{"prediction": predicted[name]} | trivial_shapes(known[name].shape[1]) for name in targets]
    pairs = [
        (trace, reference)
        for name, kinds in zip(targets, shapes, strict=True)
        for traces in kinds.values()
        for trace in traces
        for reference in known[name]
    ]
    scores, start, rows = tm_scores(pairs), 0, []
    for name, kinds in zip(targets, shapes, strict=True):
        best: dict[str, np.ndarray] = {}
        for kind, traces in kinds.items():
            end = start + len(traces) * len(known[name])
            best[kind] = scores[start:end].reshape(len(traces), -1).max(axis=1)
            start = end
        rows.append(_row(name, known[name], best))
    return rows


def _row(target: str, references_RL3: np.ndarray, best: dict[str, np.ndarray]) -> dict[str, Any]:
    candidates_M = best["prediction"]
    return {
        "sequence_id": target,
        "length": references_RL3.shape[1],
        "resolved": int(np.isfinite(references_RL3).all(axis=2).sum(axis=1).max()),
        "references": len(references_RL3),
        "score": float(candidates_M.max()),
        "candidate": int(candidates_M.argmax()) + 1,
        "candidate_scores": [float(score) for score in candidates_M],
        "floors": {kind: float(scores.max()) for kind, scores in best.items() if kind != "prediction"},
    }


def trivial_shapes(length: int) -> dict[str, np.ndarray]:
    """Traces that know nothing but the length: what every prediction has to beat.

    Args:
        length: residues, nt.

    Returns:
        name -> [M, L, 3] Å: a straight line, one strand of an A-form helix, a hairpin that pairs the whole chain, and
        five seeded random walks.
    """
    arm = max((length - _LOOP) // 2, 0)
    hairpin = trace_from_pairs(length, [(i, length - 1 - i) for i in range(arm)], np.random.default_rng(0))
    walks = []
    for seed in range(_RANDOM_WALKS):
        step_L3 = np.random.default_rng(seed).standard_normal((length, 3))
        walks.append(np.cumsum(STEP * step_L3 / np.linalg.norm(step_L3, axis=1, keepdims=True), axis=0))
    return {
        "straight line": np.arange(length)[None, :, None] * np.array([STEP, 0.0, 0.0]),
        "A-form helix": helix_strand(length)[None],
        "hairpin": hairpin[None],
        "random walks": np.stack(walks),
    }


def _by_length(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for low, high in itertools.pairwise((0, *LENGTH_CUTS, sys.maxsize)):
        part = [row for row in rows if low <= row["length"] < high]
        if part:
            groups.append(
                {
                    "length": f"{low}-{high - 1} nt" if high < sys.maxsize else f"{low} nt or more",
                    "targets": len(part),
                    "score": _mean(row["score"] for row in part),
                    "best_floor": _mean(max(row["floors"].values()) for row in part),
                }
            )
    return groups


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(np.fromiter(values, dtype=np.float64)))


def describe(scores: dict[str, Any], *, most: int = 20) -> str:
    """What `evaluate_structure` found, as lines of text.

    Args:
        scores: its result.
        most: targets shown, the best first.
    """
    rows = sorted(scores["targets"], key=lambda row: (-row["score"], row["sequence_id"]))
    lines = [
        f"{scores['metric']}, best candidate of each of {len(rows)} targets: {scores['score']:.4f} "
        f"(candidate 1 alone {scores['first_candidate']:.4f}); {scores['engine']}",
        "floors: " + ", ".join(f"{name} {score:.4f}" for name, score in scores["floors"].items()),
        *(
            f"  {group['length']:<16} {group['targets']:>4} targets  {group['score']:.4f}  "
            f"best floor {group['best_floor']:.4f}"
            for group in scores["by_length"]
        ),
        f"{'target':<14} {'length':>6} {'resolved':>8} {'references':>10} {'score':>7} {'candidate':>9} {'floor':>7}",
        *(
            f"{row['sequence_id']:<14} {row['length']:>6} {row['resolved']:>8} {row['references']:>10} "
            f"{row['score']:>7.4f} {row['candidate']:>9} {max(row['floors'].values()):>7.4f}"
            for row in rows[:most]
        ),
    ]
    if len(rows) > most:
        lines.append(f"… and {len(rows) - most} more")
    return "\n".join(lines)
