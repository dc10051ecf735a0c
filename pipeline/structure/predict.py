"""Candidates without a network: a run like a network's, out of fold and for the test set, with expected TM-scores.

Structures drawn from the pairing probabilities are assembled from A-form helices and from loops of known structures
(`pipeline.structure.denovo`). Out of fold, neither the loops nor what ranks the candidates come from the target's fold.

Letters: N assemblies of all targets, M of one, F features, L length (nt), 3 xyz. Lengths in Å.
"""

import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.competitions.rna3d import read_teaching
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import Bar, track, warn
from pipeline.stage import Report, read_result, run_stage, take_until, tell_left_out
from pipeline.structure.denovo import Assembly, choose_assemblies, features, fit_weights
from pipeline.structure.fold3d import assemble_drawn
from pipeline.structure.geometry import similarity
from pipeline.structure.motifs import Motif, MotifLibrary, find_loops
from pipeline.structure.secondary import stacking_pairs
from pipeline.tables import open_parquet
from pipeline.templates.collection import collect, library_path
from pipeline.templates.gate import allowed

#: Raised when the same tables give other candidates than before.
VERSION = 3
#: Longest sequence that is folded, nt: 4,640 nt took 31 s and 120 MiB beside what the program itself takes; the table
#: of nested structures grows with the square.
LONGEST = 10_000

#: (predicted, known) traces -> TM-score of each pair; the roof hands in `submissions.tm_score.tm_scores`.
Scorer = Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], np.ndarray]

_CANDIDATES = 5
_LIBRARY, _WEIGHTS = "library.parquet", "weights.json"
#: Files of a run that `apply` needs on another machine.
CARRIED = (_LIBRARY, _WEIGHTS)
_MIN_PROBABILITY = 0.02  # of a pair that counts
_SCHEMA: dict[str, Any] = {
    "sequence_id": pl.String,
    "fold": pl.UInt8,
    "candidate": pl.UInt8,
    "confidence": pl.Float32,
    **dict.fromkeys("xyz", pl.List(pl.Float32)),
}

_Likely = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Target:
    target_id: str
    sequence: str
    cutoff: date | None
    likely: _Likely  # candidate pairs and their probabilities


@dataclass(frozen=True, kw_only=True)
class _Loops:
    """Loops of everything known, and which of them a target may use."""

    known: list[tuple[int, date | None, list[Motif]]]  # fold (-1 = none), day of release, loops
    _made: dict[tuple[int | None, date | None], MotifLibrary] = field(default_factory=dict)

    @staticmethod
    def of(table: pl.DataFrame, folds: dict[str, int]) -> "_Loops":
        rows = table.select("id", "sequence", "day", "x", "y", "z").iter_rows()
        return _Loops(
            known=[
                (folds.get(name, -1), day, find_loops(sequence, np.array(axes, dtype=np.float64).T))
                for name, sequence, day, *axes in rows
            ]
        )

    def usable(self, *, held_out: int | None, cutoff: date | None) -> MotifLibrary:
        """Loops outside a fold that were released by a target's cutoff; nothing of unknown fold if one is held out."""
        key = (held_out, cutoff)
        if key not in self._made:
            self._made[key] = MotifLibrary(
                loop
                for fold, day, loops in self.known
                if allowed(cutoff, day) and (held_out is None or fold not in (-1, held_out))
                for loop in loops
            )
        return self._made[key]


def run_name(split: str) -> str:
    """Of the run that this stage writes, as ensembles are given it."""
    return f"denovo.{split}"


def run(paths: Paths, *, competition: Competition, split: str, score: Scorer) -> Report:
    """Write ``runs/denovo.<split>/fold<k>/{oof,test}.parquet``, which ensembles take like those of a network.

    The confidence is the expected TM-score, of a regression that never saw the fold. Test targets are folded once, and
    their candidates dealt to the folds in turn, best first.

    Args:
        paths: clean and fold tables; ``bpp/bpp.parquet`` and ``templates/library.parquet`` if they are there.
        competition: one whose task is a structure.
        split: name of the split, whose fold table exists.
        score: gives TM-scores, from which the regression learns.

    Returns:
        Facts: loops known, best of five and candidate 1 out of fold, how well they are foreseen.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: a table is missing, damaged or of other data, or a sequence is too long.
    """
    competition.require_structures("denovo")
    inputs = {name: paths.clean(name) for name in ("train", "later", "test")} | {"folds": paths.fold_table(split)}
    inputs |= {name: path for name, path in (("bpp", paths.bpp), ("library", library_path(paths))) if path.is_file()}
    held_out = _read_folds(paths, split)
    folds = sorted(set(held_out.values()))
    if len(folds) < 2:
        raise DataError(f"{paths.fold_table(split)}: {len(folds)} fold; expected two or more. Next: make folds.")
    _warn_without_pairs(paths)
    name = run_name(split)
    outputs = {f"fold{fold}/oof": paths.oof(name, fold) for fold in folds}
    outputs |= {f"fold{fold}/test": paths.test(name, fold) for fold in folds}
    outputs |= {"library": paths.run_dir(name) / _LIBRARY, "weights": paths.run_dir(name) / _WEIGHTS}

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table, about = collect(paths)
        table.write_parquet(parts["library"], compression="zstd", row_group_size=1024)
        loops = _Loops.of(table, held_out)
        truth = {row[0]: np.array(row[1:], dtype=np.float64).T for row in table.select("id", "x", "y", "z").iter_rows()}
        targets, teaching = _read_targets(paths, "train"), read_teaching(paths.clean("train"))
        weights_F, facts = _write_oof(targets, loops, held_out, truth, parts, teaching=teaching, score=score)
        _write_test(_read_targets(paths, "test"), loops, weights_F, folds, parts)
        told = {"weights": weights_F.tolist(), "folds": folds}
        parts["weights"].write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        return {"library": about, "loops": sum(len(each) for _, _, each in loops.known)} | facts

    return run_stage(
        "denovo",
        inputs=inputs,
        outputs=outputs,
        params={"version": VERSION, "split": split},
        build=build,
        manifest=paths.run_dir(name) / "denovo.manifest.json",
    )


def apply(paths: Paths, *, competition: Competition, split: str, source: Path, seconds: float | None = None) -> Report:
    """Write the test tables alone, with the structures and the weights of an earlier `run`.

    For a machine without training data: a notebook that a code competition runs on sequences that nobody has seen.
    Targets that the time does not suffice for, the longest, have no rows, and neither have those that are too long.

    Args:
        paths: the clean test table, and its ``bpp/bpp.parquet`` if it is there.
        competition: one whose task is a structure.
        split: of the earlier run.
        source: folder of the earlier run, ``runs/denovo.<split>``.
        seconds: after which no target is begun; None = all are folded.

    Returns:
        Facts: ``targets``, and ``left_out``, the ids of those without candidates.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: a table or the weights are missing or damaged.
    """
    end = None if seconds is None else time.monotonic() + seconds
    competition.require_structures("denovo")
    _warn_without_pairs(paths)
    name, learned = run_name(split), read_result(source / _WEIGHTS, hint="make denovo")
    open_parquet(source / _LIBRARY, ("id", "sequence", "day", "x", "y", "z")).close()

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        loops, targets = _Loops.of(pl.read_parquet(source / _LIBRARY), {}), _read_targets(paths, "test")
        short = sorted((each for each in targets if len(each.sequence) <= LONGEST), key=lambda each: len(each.sequence))
        folded = _write_test(short, loops, np.array(learned["weights"]), learned["folds"], parts, end=end)
        return {
            "targets": len(targets),
            "left_out": [each.target_id for each in targets if each.target_id not in folded],
        }

    bpp = {"bpp": paths.bpp} if paths.bpp.is_file() else {}
    return run_stage(
        "denovo",
        inputs={"test": paths.clean("test"), "library": source / _LIBRARY, "weights": source / _WEIGHTS} | bpp,
        outputs={f"fold{fold}/test": paths.test(name, fold) for fold in learned["folds"]},
        params={"version": VERSION, "split": split, "test_only": True, "seconds": seconds},
        build=build,
        manifest=paths.run_dir(name) / "denovo.manifest.json",
    )


def _warn_without_pairs(paths: Paths) -> None:
    if not paths.bpp.is_file():
        warn("denovo: no pairing probabilities (make bpp): stems are chosen by stacking energy, which is much worse")


def _write_oof(
    targets: list[_Target],
    loops: _Loops,
    held_out: dict[str, int],
    truth: dict[str, np.ndarray],
    parts: dict[str, Path],
    *,
    teaching: set[str],
    score: Scorer,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Write every fold's held-out targets; returns the weights from all that teach, and how good the candidates are."""
    pools = []
    with Bar("assemble training targets", total=len(targets), unit="targets") as bar:
        for target in targets:
            pools.append(_assemblies(target, loops, held_out=held_out[target.target_id]))
            bar.advance()
    known = [n for n, target in enumerate(targets) if target.target_id in truth]
    tm, table = {}, {}
    for n in track(known, "score and compare the assemblies", unit="targets"):
        traces = [each.xyz_L3 for each in pools[n]]
        tm[n] = score([(xyz_L3, truth[targets[n].target_id]) for xyz_L3 in traces])
        table[n] = features(pools[n], similarity(traces))

    def fit(without: int | None) -> np.ndarray:
        used = [n for n in known if targets[n].target_id in teaching and held_out[targets[n].target_id] != without]
        owner_N = np.repeat(np.arange(len(used)), [len(tm[n]) for n in used])
        return fit_weights(np.concatenate([table[n] for n in used]), np.concatenate([tm[n] for n in used]), owner_N)

    rows: dict[int, list[dict[str, Any]]] = {fold: [] for fold in set(held_out.values())}
    weights = {fold: fit(fold) for fold in rows}
    expected, first, best = [], [], []
    for n, target in enumerate(targets):
        fold = held_out[target.target_id]
        chosen, expected_M = choose_assemblies(pools[n], count=_CANDIDATES, weights_F=weights[fold])
        for place, m in enumerate(chosen, start=1):
            rows[fold].append(_row(target, place, pools[n][m], expected_M[m], fold=fold))
        if n in tm:
            expected.append(float(expected_M[chosen[0]]))
            first.append(float(tm[n][chosen[0]]))
            best.append(float(tm[n][chosen].max()))
    for fold, found in rows.items():
        _write(found, parts[f"fold{fold}/oof"])
    facts = {
        "targets": len(targets),
        "best_of_five": round(float(np.mean(best)), 4),
        "first_candidate": round(float(np.mean(first)), 4),
        "expected_first": round(float(np.mean(expected)), 4),
        "correlation": round(float(np.corrcoef(expected, first)[0, 1]), 3),
    }
    return fit(None), {"oof": facts}


def _write_test(
    targets: list[_Target],
    loops: _Loops,
    weights_F: np.ndarray,
    folds: list[int],
    parts: dict[str, Path],
    *,
    end: float | None = None,
) -> list[str]:
    """Deal the test candidates to the folds; returns the targets that there was time for."""
    rows: dict[int, list[dict[str, Any]]] = {fold: [] for fold in folds}
    folded = []
    with Bar("assemble test targets", total=len(targets), unit="targets") as bar:
        for target in take_until(targets, end):
            folded.append(target.target_id)
            pool = _assemblies(target, loops, held_out=None)
            chosen, expected_M = choose_assemblies(pool, count=_CANDIDATES, weights_F=weights_F)
            for number, m in enumerate(chosen):
                rows[folds[number % len(folds)]].append(
                    _row(target, number // len(folds) + 1, pool[m], expected_M[m], fold=None)
                )
            bar.advance()
    for fold, found in rows.items():
        _write(found, parts[f"fold{fold}/test"], fold=False)
    return folded


def _assemblies(target: _Target, loops: _Loops, *, held_out: int | None) -> list[Assembly]:
    length = len(target.sequence)
    if length > LONGEST:
        raise DataError(
            f"{target.target_id}: {length:,} nt; expected at most {LONGEST:,}. Next: give its domains as targets of "
            "their own."
        )
    rng = np.random.default_rng(zlib.crc32(target.target_id.encode()))
    library = loops.usable(held_out=held_out, cutoff=target.cutoff)
    return assemble_drawn(target.sequence, target.likely, count=_CANDIDATES, library=library, rng=rng)


def _read_folds(paths: Paths, split: str) -> dict[str, int]:
    """Training target -> fold."""
    path = paths.fold_table(split)
    open_parquet(path, ("sequence_id", "fold")).close()
    open_parquet(paths.clean("train"), ("sequence_id",)).close()
    folds = dict(pl.read_parquet(path, columns=["sequence_id", "fold"]).sort("sequence_id").iter_rows())
    if set(folds) != set(pl.read_parquet(paths.clean("train"), columns=["sequence_id"])["sequence_id"]):
        raise DataError(f"{path}: a fold table from other data than {paths.clean('train')}. Next: make folds.")
    return folds


def _read_targets(paths: Paths, table: str) -> list[_Target]:
    columns = ["sequence_id", "sequence", "temporal_cutoff"]
    open_parquet(paths.clean(table), columns).close()
    rows = pl.read_parquet(paths.clean(table), columns=columns).sort("sequence_id").rows()
    likely = _read_pairs(paths.bpp, {letters for _, letters, _ in rows}) if paths.bpp.is_file() else {}
    return [
        _Target(target_id=name, sequence=letters, cutoff=cutoff, likely=likely.get(letters) or stacking_pairs(letters))
        for name, letters, cutoff in rows
    ]


def _read_pairs(path: Path, sequences: set[str]) -> dict[str, _Likely]:
    open_parquet(path, ("sequence", "i", "j", "p")).close()
    table = pl.read_parquet(path, columns=["sequence", "i", "j", "p"])
    found = {}
    for letters, *columns in table.filter(pl.col("sequence").is_in(sorted(sequences))).iter_rows():
        i_K, j_K, p_K = (np.array(column) for column in columns)
        kept = p_K >= _MIN_PROBABILITY
        found[letters] = (i_K[kept].astype(np.int64), j_K[kept].astype(np.int64), p_K[kept].astype(np.float64))
    return found


def _row(target: _Target, place: int, assembly: Assembly, expected: float, *, fold: int | None) -> dict[str, Any]:
    axes = dict(zip("xyz", assembly.xyz_L3.T.tolist(), strict=True))
    key = {"sequence_id": target.target_id} | ({} if fold is None else {"fold": fold})
    return key | {"candidate": place, "confidence": float(expected)} | axes


def _write(rows: list[dict[str, Any]], path: Path, *, fold: bool = True) -> None:
    schema = {name: kind for name, kind in _SCHEMA.items() if fold or name != "fold"}
    table = pl.DataFrame(rows, schema=schema).sort("sequence_id", "candidate")
    table.write_parquet(path, compression="zstd", row_group_size=320)


def describe(facts: dict[str, Any]) -> list[str]:
    """What `run` or `apply` did, as lines for a terminal."""
    if "oof" not in facts:
        return [tell_left_out(facts)]
    oof = facts["oof"]
    return [
        f"loops of known structures: {facts['loops']:,}",
        f"out of fold, {oof['targets']} targets: best of {_CANDIDATES} {oof['best_of_five']:.4f}, candidate 1 alone "
        f"{oof['first_candidate']:.4f}, expected of it {oof['expected_first']:.4f} (correlation "
        f"{oof['correlation']:.2f})",
    ]
