"""Score of predicted C1' traces: best of the candidates by TM-score, per target, beside shapes that read no sequence.

Both metrics of the competition: residues matched by number (part 2, the score that counts here), and aligned by the
shapes alone (part 1).

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
from pipeline.tables import open_parquet
from submissions import align, tm_score

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
        the floors), ``without_reference`` (predicted targets that could not be scored), ``engine``, all of them
        residue-matched; and ``sequence_independent`` with ``score``, ``first_candidate``, ``floors``, ``best_floor``,
        ``engine`` and ``unnamed`` (targets whose sequence no clean table tells: scored without residue names).

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
    letters = _sequences(paths)
    rows = []
    for start in range(0, len(common), _BATCH):
        rows += _score_targets(common[start : start + _BATCH], predicted, known, letters)
    independent = [row.pop("sequence_independent") for row in rows]
    unnamed = [name for name in common if len(letters.get(name, "")) != known[name].shape[1]]
    for row, other in zip(rows, independent, strict=True):
        row["sequence_independent"] = {key: other[key] for key in ("score", "candidate", "floors")}
    return {
        "metric": competition.metric,
        "engine": tm_score.ENGINE,
        **_means(rows),
        "sequence_independent": {"engine": align.ENGINE, **_means(independent), "unnamed": unnamed},
        "by_length": _by_length(rows),
        "targets": rows,
        "without_reference": sorted(set(predicted) - set(known)),
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "score": _mean(row["score"] for row in rows),
        "first_candidate": _mean(row["candidate_scores"][0] for row in rows),
        "floors": {name: _mean(row["floors"][name] for row in rows) for name in rows[0]["floors"]},
        "best_floor": _mean(max(row["floors"].values()) for row in rows),
    }


def _sequences(paths: Paths) -> dict[str, str]:
    """sequence_id -> letters, of the clean tables that are there."""
    found: dict[str, str] = {}
    for path in (paths.clean("test"), paths.clean("train")):
        if path.is_file():
            open_parquet(path, ["sequence_id", "sequence"]).close()
            table = pl.read_parquet(path, columns=["sequence_id", "sequence"])
            found |= dict(table.iter_rows())
    return found


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
        if finite and not tm_score.resolved(xyz_ML3.reshape(-1, 3)).all():
            raise DataError(
                f"{path}: {target} has a coordinate that is null or not finite or a sentinel. Next: predict again."
            )
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
    targets: list[str], predicted: dict[str, np.ndarray], known: dict[str, np.ndarray], letters: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of some targets; all of their pairs go into one call, so that every thread has work."""
    shapes = [{"prediction": predicted[name]} | trivial_shapes(known[name].shape[1]) for name in targets]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    names: list[str] = []
    for name, kinds in zip(targets, shapes, strict=True):
        length = known[name].shape[1]
        own = letters.get(name, "")
        for traces in kinds.values():
            pairs += [(trace, reference) for trace in traces for reference in known[name]]
        names += [own if len(own) == length else "N" * length] * (len(pairs) - len(names))
    matched = tm_score.tm_scores(pairs)
    aligned = align.tm_aligns([(*pair, own, own) for pair, own in zip(pairs, names, strict=True)])
    start, rows = 0, []
    for name, kinds in zip(targets, shapes, strict=True):
        row = {
            "sequence_id": name,
            "length": known[name].shape[1],
            "resolved": int(tm_score.resolved(known[name].reshape(-1, 3)).reshape(len(known[name]), -1).sum(1).max()),
            "references": len(known[name]),
        }
        both = [_best(scores[start:], kinds, len(known[name])) for scores in (matched, aligned)]
        rows.append(row | both[0] | {"sequence_independent": both[1]})
        start += len(known[name]) * sum(map(len, kinds.values()))
    return rows


def _best(scores: np.ndarray, kinds: dict[str, np.ndarray], references: int) -> dict[str, Any]:
    """Scores of one target, of which `scores` begins with all pairs: the reference that suits best, for each trace."""
    best, start = {}, 0
    for kind, traces in kinds.items():
        end = start + len(traces) * references
        best[kind] = scores[start:end].reshape(len(traces), references).max(axis=1)
        start = end
    candidates_M = best.pop("prediction")
    return {
        "score": float(candidates_M.max()),
        "candidate": int(candidates_M.argmax()) + 1,
        "candidate_scores": [float(score) for score in candidates_M],
        "floors": {kind: float(found.max()) for kind, found in best.items()},
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
        *_describe_independent(scores["sequence_independent"]),
        *(
            f"  {group['length']:<16} {group['targets']:>4} targets  {group['score']:.4f}  "
            f"best floor {group['best_floor']:.4f}"
            for group in scores["by_length"]
        ),
        f"{'target':<14} {'length':>6} {'resolved':>8} {'references':>10} {'score':>7} {'candidate':>9} {'floor':>7} "
        f"{'seq.-ind.':>9} {'floor':>7}",
        *(
            f"{row['sequence_id']:<14} {row['length']:>6} {row['resolved']:>8} {row['references']:>10} "
            f"{row['score']:>7.4f} {row['candidate']:>9} {max(row['floors'].values()):>7.4f} "
            f"{row['sequence_independent']['score']:>9.4f} {max(row['sequence_independent']['floors'].values()):>7.4f}"
            for row in rows[:most]
        ),
    ]
    if len(rows) > most:
        lines.append(f"… and {len(rows) - most} more")
    return "\n".join(lines)


def _describe_independent(scores: dict[str, Any]) -> list[str]:
    lines = [
        f"sequence-independent: {scores['score']:.4f} (candidate 1 alone {scores['first_candidate']:.4f}); "
        f"{scores['engine']}",
        "floors: " + ", ".join(f"{name} {score:.4f}" for name, score in scores["floors"].items()),
    ]
    if scores["unnamed"]:
        lines.append(f"aligned without residue names, whose sequences are not known: {len(scores['unnamed'])} targets")
    return lines
