"""Score of predicted C1' traces: best of the candidates by TM-score, per target, beside shapes that read no sequence.

Both metrics of the competition: residues matched by number (part 2, the score that counts here; of a target with
several copies of a chain, the copies in the order that scores best), and aligned by the shapes alone (part 1). The
floors are always computed by this project's own code: a straight line of 1,900 residues fits into no PDB file.

Letters: N pairs of traces, M candidates, R references, L residues, 3 xyz; lengths in Å.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.competitions.base import Competition
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import STEP, helix_strand
from submissions import tm_score
from submissions.chains import permuted
from submissions.engines import Case, Engine, batches, built_in
from submissions.structure_targets import Target, read_targets

#: Lengths (nt) at which the table by length is cut.
LENGTH_CUTS = (30, 80, 150)

_RANDOM_WALKS = 5
_LOOP = 4  # nt at the end of the constant hairpin
_SHOWN = 20  # targets in the text
_LONG = 2000  # nt: of the 14 pairs of a longer target, each takes 5 s or more to be aligned


def evaluate_structure(
    paths: Paths, *, competition: Competition, predictions: Path, engine: Engine | None = None
) -> dict[str, Any]:
    """Score the predicted targets whose structure is known, and the trivial shapes on the same targets.

    Args:
        paths: where the clean table ``references`` lies.
        competition: gives the metric's name.
        predictions: parquet with ``sequence_id, candidate, x, y, z``, one row per candidate; ``source``, if it is
            there, names the run that a candidate is of.
        engine: that computes the scores of the predictions; None = this project's own code.

    Returns:
        JSON-able: ``score`` (mean over targets of the best candidate against the reference that suits it best),
        ``first_candidate`` (mean if only candidate 1 counted), ``floors`` (name -> mean), ``by_length``, ``targets``
        (one row each: length, resolved residues, references, ``copies``, the number of chains whose order was chosen,
        ``templates``, the candidates that are from templates, null = not told, score, the candidate that won, all
        candidates' scores, the floors), ``copies_note`` (a sentence where scores are an upper bound, else empty),
        ``without_reference`` (predicted targets that could not be scored),
        ``engine``, ``floor_engine``, all of them residue-matched; and ``sequence_independent`` with ``score``,
        ``first_candidate``, ``floors``, ``best_floor``, ``engine``, ``floor_engine``, ``by_length`` and ``unnamed``
        (targets whose sequence no clean table tells: scored without residue names).

    Raises:
        DataError: a table is missing or damaged, the tables contradict each other, or no predicted target is known.
    """
    targets, without = read_targets(paths, predictions)
    engine, floors = engine or built_in(), built_in()
    if long := [target.name for target in targets if target.length > _LONG]:
        warn(f"evaluate: {len(long)} targets of more than {_LONG:,} nt take minutes each to be aligned: {long[0]}")
    rows = []
    with Bar("score", total=len(targets), unit="targets") as bar:
        for part in batches(targets, _work):
            rows += _score_targets(part, engine, floors)
            bar.advance(len(part))
    independent = [row.pop("sequence_independent") for row in rows]
    for row, other in zip(rows, independent, strict=True):
        row["sequence_independent"] = {key: other[key] for key in ("score", "candidate", "floors")}
    return {
        "metric": competition.metric,
        "engine": engine.matched_by,
        "floor_engine": floors.matched_by,
        **_means(rows),
        "sequence_independent": {
            "engine": engine.aligned_by,
            "floor_engine": floors.aligned_by,
            **_means(independent),
            "by_length": _by_length([row | row["sequence_independent"] for row in rows]),
            "unnamed": [target.name for target in targets if not target.is_named],
        },
        "by_length": _by_length(rows),
        "targets": rows,
        "copies_note": _copies_note(rows),
        "without_reference": without,
    }


def _work(target: Target) -> float:
    """Squared length times the pairs of predictions and trivial shapes with each known structure."""
    return (len(target.predicted_ML3) + 3 + _RANDOM_WALKS) * len(target.known_RL3) * target.length**2


def _copies_note(rows: Sequence[dict[str, Any]]) -> str:
    """What the score of targets with several copies of a chain is, for whoever compares it; see `permuted`."""
    copied = sum(row["copies"] > 0 for row in rows)
    if not copied:
        return ""
    return (
        f"{copied} of {len(rows)} targets have copies of a chain, in the order that scores best residue-matched: an "
        "upper bound, as part 2's metric pairs them by shape (US-align -mm 1)"
    )


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "score": _mean(row["score"] for row in rows),
        "first_candidate": _mean(row["candidate_scores"][0] for row in rows),
        "floors": {name: _mean(row["floors"][name] for row in rows) for name in rows[0]["floors"]},
        "best_floor": _mean(max(row["floors"].values()) for row in rows),
    }


def _score_targets(targets: Sequence[Target], engine: Engine, floors: Engine) -> list[dict[str, Any]]:
    """Rows of some targets; all of their pairs go into one call, so that every thread has work."""
    shapes = [{"prediction": target.predicted_ML3} | trivial_shapes(target.length) for target in targets]
    matched: list[Case] = []
    aligned: list[Case] = []
    own = []
    for target, kinds in zip(targets, shapes, strict=True):
        for kind, traces in kinds.items():
            for trace, known in itertools.product(traces, target.known_RL3):
                ordered = permuted(trace, known, target.chains) if target.chains else trace
                matched.append((ordered, known, target.letters))
                aligned.append((trace, known, target.letters))
                own.append(kind == "prediction")
    own_N = np.array(own)
    scores = (
        _by_kind(matched, own_N, engine.matched, floors.matched),
        _by_kind(aligned, own_N, engine.aligned, floors.aligned),
    )
    start, rows = 0, []
    for target, kinds in zip(targets, shapes, strict=True):
        references = len(target.known_RL3)
        resolved = tm_score.resolved(target.known_RL3.reshape(-1, 3)).reshape(references, -1).sum(axis=1)
        row = {
            "sequence_id": target.name,
            "length": target.length,
            "resolved": int(resolved.max()),
            "references": references,
            "copies": len(target.chains),
            "templates": target.templates,
        }
        both = [_best(found[start:], kinds, references) for found in scores]
        rows.append(row | both[0] | {"sequence_independent": both[1]})
        start += references * sum(map(len, kinds.values()))
    return rows


def _by_kind(
    cases: Sequence[Case],
    own_N: np.ndarray,
    own: Callable[[Sequence[Case]], np.ndarray],
    floor: Callable[[Sequence[Case]], np.ndarray],
) -> np.ndarray:
    """[N] scores of the predictions by one function, of the floors by another."""
    found_N = np.empty(len(cases))
    for score, part_N in ((own, own_N), (floor, ~own_N)):
        found_N[part_N] = score([cases[n] for n in np.flatnonzero(part_N).tolist()])
    return found_N


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


def describe(scores: Mapping[str, Any], *, with_floors: bool = True) -> str:
    """What `evaluate_structure` found, as lines of text; of the targets the best ones.

    Args:
        scores: JSON-able.
        with_floors: False where the floors' scores stand elsewhere: then only who computed them, if it was another.
    """
    rows = sorted(scores["targets"], key=lambda row: (-row["score"], row["sequence_id"]))
    independent = scores["sequence_independent"]
    heads = ("target", "length", "resolved", "references", "templates", "score", "candidate", "floor")
    lines = [
        f"{scores['metric']}, best candidate of each of {len(rows)} targets: {_describe_mode(scores)}",
        *([scores["copies_note"]] if scores["copies_note"] else []),
        *_describe_floors(scores, with_floors=with_floors),
        f"sequence-independent: {_describe_mode(independent)}",
        *_describe_floors(independent, with_floors=with_floors),
        *(
            [f"aligned without residue names, which no table tells: {len(independent['unnamed'])} targets"]
            if independent["unnamed"]
            else []
        ),
        *(
            f"  {group['length']:<16} {group['targets']:>4} targets  {group['score']:.4f}  "
            f"best floor {group['best_floor']:.4f}; sequence-independent {other['score']:.4f}, "
            f"{other['best_floor']:.4f}"
            for group, other in zip(scores["by_length"], independent["by_length"], strict=True)
        ),
        "{:<14} {:>6} {:>8} {:>10} {:>9} {:>7} {:>9} {:>7} {:>9} {:>7}".format(*heads, "seq.-ind.", "floor"),
        *map(_describe_target, rows[:_SHOWN]),
    ]
    if len(rows) > _SHOWN:
        lines.append(f"… and {len(rows) - _SHOWN} more")
    return "\n".join(lines)


def _describe_mode(scores: Mapping[str, Any]) -> str:
    return f"{scores['score']:.4f} (candidate 1 alone {scores['first_candidate']:.4f}); {scores['engine']}"


def _describe_floors(scores: Mapping[str, Any], *, with_floors: bool) -> list[str]:
    told = [", ".join(f"{name} {score:.4f}" for name, score in scores["floors"].items())] if with_floors else []
    told += [scores["floor_engine"]] if scores["engine"] != scores["floor_engine"] else []
    return [f"floors: {'; '.join(told)}"] if told else []


def _describe_target(row: dict[str, Any]) -> str:
    independent, templates = row["sequence_independent"], row["templates"]
    return (
        f"{row['sequence_id']:<14} {row['length']:>6} {row['resolved']:>8} {row['references']:>10} "
        f"{'-' if templates is None else templates:>9} {row['score']:>7.4f} {row['candidate']:>9} "
        f"{max(row['floors'].values()):>7.4f} {independent['score']:>9.4f} {max(independent['floors'].values()):>7.4f}"
    )
