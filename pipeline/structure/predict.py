"""Candidates without a network: a run like a network's, out of fold and for the test set, with expected TM-scores.

Structures drawn from the pairing probabilities are assembled from A-form helices and from loops of known structures
(`pipeline.structure.denovo`). Out of fold, neither the loops nor what ranks the candidates come from the target's fold.

Letters: N assemblies of all targets, M of one, F features, L length (nt), 3 xyz. Lengths in Å.
"""

import json
import time
import zlib
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
from pipeline.schema import CANDIDATES
from pipeline.stage import Report, read_result, run_stage, take_until, tell_left_out
from pipeline.structure.candidate_tables import CandidateRows, correlation, read_folds, read_pairs, read_targets
from pipeline.structure.denovo import Assembly, choose_assemblies, features, fit_weights
from pipeline.structure.fold3d import assemble_drawn
from pipeline.structure.geometry import Scorer, similarity
from pipeline.structure.motifs import Motif, MotifLibrary, find_loops
from pipeline.structure.secondary import LEAST_PROBABILITY, stacking_pairs
from pipeline.tables import open_parquet
from pipeline.templates.collection import collect, inputs_of
from pipeline.templates.gate import allowed, entry_of

#: Raised when the same tables give other candidates than before.
VERSION = 4
#: Longest sequence that is folded, nt: 4,640 nt took 31 s and 120 MiB beside what the program itself takes; the table
#: of nested structures grows with the square.
LONGEST = 10_000

_LIBRARY, _WEIGHTS = "library.parquet", "weights.json"
#: Files of a run that `apply` needs on another machine.
CARRIED = (_LIBRARY, _WEIGHTS)

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

    known: list[tuple[str, int, date | None, list[Motif]]]  # entry, fold (-1 = none), day of release, loops
    _made: dict[tuple[int | None, date | None, str], MotifLibrary] = field(default_factory=dict)

    @staticmethod
    def of(table: pl.DataFrame, folds: dict[str, int]) -> "_Loops":
        rows = table.select("id", "sequence", "day", "x", "y", "z").iter_rows()
        return _Loops(
            known=[
                (entry_of(name), folds.get(name, -1), day, find_loops(sequence, np.array(axes, dtype=np.float64).T))
                for name, sequence, day, *axes in rows
            ]
        )

    def usable(self, *, held_out: int | None, cutoff: date | None, entry: str = "") -> MotifLibrary:
        """Loops outside a fold that were released by a target's cutoff, but for those of its own entry if it has a
        cutoff; nothing of unknown fold if one is held out."""
        own = entry if cutoff and any(entry == other for other, *_ in self.known) else ""
        key = (held_out, cutoff, own)
        if key not in self._made:
            self._made[key] = MotifLibrary(
                loop
                for other, fold, day, loops in self.known
                if allowed(cutoff, day)
                and (held_out is None or fold not in (-1, held_out))
                and (not own or other != own)
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
    inputs = inputs_of(paths, split)
    held_out = read_folds(paths, split)
    folds = sorted(set(held_out.values()))
    if len(folds) < 2:
        raise DataError(f"{paths.fold_table(split)}: {len(folds)} fold; expected two or more. Next: make folds.")
    _warn_without_pairs(paths)
    name = run_name(split)
    outputs = paths.predictions(name, folds, "oof", "test")
    outputs |= {"library": paths.run_dir(name) / _LIBRARY, "weights": paths.run_dir(name) / _WEIGHTS}

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table, about = collect(paths)
        table.write_parquet(parts["library"], compression="zstd", row_group_size=1024)
        loops = _Loops.of(table, held_out)
        truth = {row[0]: np.array(row[1:], dtype=np.float64).T for row in table.select("id", "x", "y", "z").iter_rows()}
        targets, teaching = _read_targets(paths, "train"), read_teaching(paths.clean("train"))
        _require_two_folds({held_out[name] for name in teaching & truth.keys()}, split)
        weights_F, facts = _write_oof(targets, loops, held_out, truth, parts, teaching=teaching, score=score)
        _write_test(_read_targets(paths, "test"), loops, weights_F, folds, parts)
        told = {"weights": weights_F.tolist(), "folds": folds}
        parts["weights"].write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        return {"library": about, "loops": sum(len(each) for *_, each in loops.known)} | facts

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
        outputs=paths.predictions(name, learned["folds"], "test"),
        params={"version": VERSION, "split": split, "test_only": True, "seconds": seconds},
        build=build,
        manifest=paths.run_dir(name) / "denovo.manifest.json",
    )


def _warn_without_pairs(paths: Paths) -> None:
    if not paths.bpp.is_file():
        warn("denovo: no pairing probabilities (make bpp): stems are chosen by stacking energy, which is much worse")


def _require_two_folds(taught: set[int], split: str) -> None:
    """Each fold's candidates are judged by what the others teach."""
    if len(taught) < 2:
        where = f"all in fold {taught.pop()}" if taught else "in no fold"
        raise DataError(
            f"denovo: the known structures that teach are {where} of {split}; expected two folds or more. Next: try "
            "a split of smaller groups (SPLIT=sim95_k5), or give more training targets."
        )


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

    weights = {fold: fit(fold) for fold in sorted(set(held_out.values()))}
    rows = CandidateRows(weights)
    expected, first, best = [], [], []
    for n, target in enumerate(targets):
        fold = held_out[target.target_id]
        chosen, expected_M = choose_assemblies(pools[n], count=CANDIDATES, weights_F=weights[fold])
        rows.add(target.target_id, fold, [(expected_M[m], pools[n][m].xyz_L3) for m in chosen])
        if n in tm:
            expected.append(float(expected_M[chosen[0]]))
            first.append(float(tm[n][chosen[0]]))
            best.append(float(tm[n][chosen].max()))
    rows.write(parts, "oof")
    facts = {
        "targets": len(targets),
        "best_of_five": round(float(np.mean(best)), 4),
        "first_candidate": round(float(np.mean(first)), 4),
        "expected_first": round(float(np.mean(expected)), 4),
        "correlation": round(correlation(np.array(expected), np.array(first)), 3),
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
    rows, folded = CandidateRows(folds), []
    with Bar("assemble test targets", total=len(targets), unit="targets") as bar:
        for target in take_until(targets, end):
            folded.append(target.target_id)
            pool = _assemblies(target, loops, held_out=None)
            chosen, expected_M = choose_assemblies(pool, count=CANDIDATES, weights_F=weights_F)
            rows.deal(target.target_id, [(expected_M[m], pool[m].xyz_L3) for m in chosen])
            bar.advance()
    rows.write(parts, "test")
    return folded


def _assemblies(target: _Target, loops: _Loops, *, held_out: int | None) -> list[Assembly]:
    length = len(target.sequence)
    if length > LONGEST:
        raise DataError(
            f"{target.target_id}: {length:,} nt; expected at most {LONGEST:,}. Next: give its domains as targets of "
            "their own."
        )
    rng = np.random.default_rng(zlib.crc32(target.target_id.encode()))
    library = loops.usable(held_out=held_out, cutoff=target.cutoff, entry=entry_of(target.target_id))
    return assemble_drawn(target.sequence, target.likely, count=CANDIDATES, library=library, rng=rng)


def _read_targets(paths: Paths, table: str) -> list[_Target]:
    rows = read_targets(paths, table)
    likely: dict[str, _Likely] = {}
    for letters, (i_K, j_K, p_K) in read_pairs(paths.bpp, (letters for _, letters, _ in rows)).items():
        kept_K = p_K >= LEAST_PROBABILITY
        likely[letters] = (i_K[kept_K], j_K[kept_K], p_K[kept_K])
    return [
        _Target(target_id=name, sequence=letters, cutoff=cutoff, likely=likely.get(letters) or stacking_pairs(letters))
        for name, letters, cutoff in rows
    ]


def describe(facts: dict[str, Any]) -> list[str]:
    """What `run` or `apply` did, as lines for a terminal."""
    if "oof" not in facts:
        return [tell_left_out(facts)]
    oof = facts["oof"]
    return [
        f"loops of known structures: {facts['loops']:,}",
        f"out of fold, {oof['targets']} targets: best of {CANDIDATES} {oof['best_of_five']:.4f}, candidate 1 alone "
        f"{oof['first_candidate']:.4f}, expected of it {oof['expected_first']:.4f} (correlation "
        f"{oof['correlation']:.2f})",
    ]
