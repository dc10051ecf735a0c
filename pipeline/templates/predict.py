"""Candidates from templates: a run like a network's, out of fold and for the test set, with expected TM-scores.

Letters: N matches of all targets, F features, L length (nt), 3 xyz. Lengths in Å.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.competitions.rna3d import read_teaching
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import Bar, say
from pipeline.schema import CANDIDATES
from pipeline.stage import Report, read_manifest, read_result, run_stage, take_until, tell_left_out
from pipeline.structure.candidate_tables import CandidateRows, read_folds, read_pairs, read_targets
from pipeline.structure.geometry import Scorer, rmsd
from pipeline.tables import open_parquet
from pipeline.templates.collection import collect, inputs_of, make_library
from pipeline.templates.msa import find_alignments, read_profiles
from pipeline.templates.ranker import Calibration, Ranker, reliability
from pipeline.templates.search import FEATURES, Library, Match, Target, find_matches, released_for
from pipeline.templates.transfer import complete, refine, transfer

#: Raised when the same tables give other candidates than before.
VERSION = 3

#: Expected TM-score from which a target counts as covered: the template that 19 of 20 targets of part 1 had.
COVERED = 0.45
_COVERAGE = FEATURES.index("coverage")
_LIBRARY, _RANKER = "library.parquet", "ranker.json"
#: Files of a run that `apply` needs on another machine.
CARRIED = (_LIBRARY, _RANKER)
_LEARNED = 1000  # nt of the longest target that the ranker learns from: a TM-score takes 15 ms there, 57 ms at 2,000
_RELATED = 0.8  # identity to the shorter sequence from which a chain from elsewhere is kept from a held-out target
#: Share of a target that a template covers at least. What covers less says little of the whole, whatever the ranker
#: expects, and has places in the five that other sources fill better: pooled best of five 0.376 without, 0.377 with it.
_COVERS = 0.5
_DIFFERENT = 2.0  # Å RMSD by which a candidate differs from those before it, if enough do


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What turns features into expected TM-scores; equal parts never saw the fold that they predict."""

    ranker: Ranker
    calibration: Calibration


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A chosen match, refined."""

    template: int
    expected: float
    xyz_L3: np.ndarray


def run_name(split: str) -> str:
    """Name of the run: ``templates.<split>``."""
    return f"templates.{split}"


def run(paths: Paths, *, competition: Competition, split: str, score: Scorer, msa: Path | None = None) -> Report:
    """Write ``runs/templates.<split>/fold<k>/{oof,test}.parquet``, in the format of a network's predictions.

    Out of fold, a target never sees templates of its own fold, nor relatives of at least 80 % identity from elsewhere;
    no target sees what was released after its cutoff. The confidence is the expected TM-score, by a ranker and a
    calibration that were fitted on the other folds. Test candidates are dealt to the folds in turn, best first, so
    that joining the folds gives different ones. A target without any usable template has no rows.

    Args:
        paths: clean and fold tables, ``bpp/bpp.parquet`` and ``templates/library.parquet`` if they are there.
        competition: one whose task is a structure.
        split: name of the split, whose fold table exists.
        score: gives TM-scores, from which the ranker learns.
        msa: folder of ``<target>.MSA.fasta``, or a parquet file with ``target_id, msa``; unless given, what the run was
            made with before; ``none`` = without.

    Returns:
        Facts: library, out-of-fold score, reliability of the expected scores, coverage, best template of test targets.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: a table is missing, damaged or of other data, or no training target has a usable template.
    """
    competition.require_structures("templates-predict")
    inputs = inputs_of(paths, split)
    held_out = read_folds(paths, split)
    name, folds = run_name(split), sorted(set(held_out.values()))
    manifest = paths.run_dir(name) / "templates-predict.manifest.json"
    msa = _given_or_before(msa, manifest, again=f"make templates-predict COMP={paths.comp} SPLIT={split}")
    alignments = find_alignments(msa, [*held_out, *_ids(paths.clean("test"))]) if msa else {}
    outputs = paths.predictions(name, folds, "oof", "test")
    outputs |= {"library": paths.run_dir(name) / _LIBRARY, "ranker": paths.run_dir(name) / _RANKER}

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table, about = collect(paths)
        table.write_parquet(parts["library"], compression="zstd", row_group_size=1024)
        library = make_library(table, folds=held_out)
        train = _read_targets(paths, "train", alignments)
        known = _Known.of(train, library, held_out, score, teaching=read_teaching(paths.clean("train")))
        facts = {"library": about} | known.write_oof(parts, score=score)
        test = _read_targets(paths, "test", alignments)
        facts["test"] = _write_test(test, library, known.final, folds, parts)
        learned = json.dumps(
            asdict(known.final) | {"folds": folds}, indent=1, sort_keys=True, default=np.ndarray.tolist
        )
        parts["ranker"].write_text(learned + "\n")
        return facts

    return run_stage(
        "templates-predict",
        inputs=inputs | {f"msa/{target}": path for target, path in alignments.items()},
        outputs=outputs,
        params={"version": VERSION, "split": split},
        build=build,
        manifest=manifest,
        notes={"msa": str(msa.resolve())} if msa else None,
    )


def _given_or_before(msa: Path | None, manifest: Path, *, again: str) -> Path | None:
    """Where alignments are: `run` and train-all without MSA=… must not make anew without them what had them.

    Raises:
        DataError: a run had some, and they are not known or not there any more.
    """
    if msa is not None:
        return None if str(msa) == "none" else msa
    done = read_manifest(manifest) or {}
    if not any(label.startswith("msa/") for label in done.get("inputs", {})):
        return None
    before = done.get("notes", {}).get("msa")  # which older manifests do not name
    if before is None or not Path(before).exists():
        raise DataError(
            f"{manifest.parent}: made with alignments{f' of {before}, which is not there' if before else ''}; expected "
            f"them again. Next: {again} MSA=<folder>, or MSA=none for a run without."
        )
    say(f"templates-predict: with the alignments of before, {before} (MSA=none: without)")
    return Path(before)


def apply(
    paths: Paths,
    *,
    competition: Competition,
    split: str,
    source: Path,
    msa: Path | None = None,
    seconds: float | None = None,
) -> Report:
    """Write the test tables alone, with the library and the ranker of an earlier `run`.

    For a machine without training data: a notebook that a code competition runs on sequences that nobody has seen.
    Targets that the time does not suffice for, the longest, have no rows.

    Args:
        paths: the clean test table, and its ``bpp/bpp.parquet`` if it is there.
        competition: one whose task is a structure.
        split: of the earlier run.
        source: folder of the earlier run, ``runs/templates.<split>``.
        msa: as in `run`.
        seconds: after which no target is begun; None = all are searched for.

    Returns:
        Facts: ``test`` as of `run`, ``targets``, and ``left_out``, the ids of those that were not searched for.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: a table, an alignment or the ranker is missing or damaged.
    """
    end = None if seconds is None else time.monotonic() + seconds
    competition.require_structures("templates-predict")
    name, learned = run_name(split), read_result(source / _RANKER, hint="make templates-predict")
    open_parquet(source / _LIBRARY, ("id", "sequence", "day", "x", "y", "z")).close()
    alignments = find_alignments(msa, _ids(paths.clean("test"))) if msa else {}
    model = _Model(
        ranker=Ranker(**{key: np.array(values) for key, values in learned["ranker"].items()}),
        calibration=Calibration(**{key: np.array(values) for key, values in learned["calibration"].items()}),
    )

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        library = make_library(pl.read_parquet(source / _LIBRARY), folds={})
        targets = sorted(_read_targets(paths, "test", alignments), key=len)
        told = _write_test(targets, library, model, learned["folds"], parts, end=end)
        left_out = sorted(each.target_id for each in targets if each.target_id not in told["templates"])
        return {"test": told, "targets": len(targets), "left_out": left_out}

    bpp = {"bpp": paths.bpp} if paths.bpp.is_file() else {}
    return run_stage(
        "templates-predict",
        inputs={"test": paths.clean("test"), "library": source / _LIBRARY, "ranker": source / _RANKER}
        | bpp
        | {f"msa/{target}": path for target, path in alignments.items()},
        outputs=paths.predictions(name, learned["folds"], "test"),
        params={"version": VERSION, "split": split, "test_only": True, "seconds": seconds},
        build=build,
        manifest=paths.run_dir(name) / "templates-predict.manifest.json",
    )


def _ids(path: Path) -> list[str]:
    open_parquet(path, ("sequence_id",)).close()
    return pl.read_parquet(path, columns=["sequence_id"])["sequence_id"].to_list()


def _read_targets(paths: Paths, table: str, alignments: dict[str, Path]) -> list[Target]:
    rows = read_targets(paths, table)
    profiles = read_profiles(alignments, {name: letters for name, letters, _ in rows}) if alignments else {}
    pairs = read_pairs(paths.bpp, (letters for _, letters, _ in rows))
    return [
        Target.of(name, letters, cutoff=cutoff, pairs_K=pairs.get(letters), profile_L4=profiles.get(name))
        for name, letters, cutoff in rows
    ]


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """All matches of the training targets, and what they are worth."""

    owner_N: np.ndarray  # position of the target
    features_NF: np.ndarray
    source_N: np.ndarray  # fold of the template, -1 = from elsewhere
    fold_N: np.ndarray  # of the target
    tm_N: np.ndarray  # NaN = not known

    def require_two_folds(self) -> None:
        """Learning needs targets in two folds, so that each is judged by the other."""
        if len(np.unique(self.fold_N[np.isfinite(self.tm_N)])) < 2:
            raise DataError(
                "templates-predict: fewer than two folds have a training target with a usable template. "
                "Next: make templates RAW=<folder of more mmCIF files>."
            )

    def ranker(self, *, without: int | None) -> Ranker:
        """Learned from other folds than one, which lends no template either (of two folds, it has to)."""
        seen_N = np.isfinite(self.tm_N) & (self.fold_N != without)
        strict_N = seen_N & (self.source_N != without)
        seen_N = strict_N if strict_N.any() else seen_N
        return Ranker.fit(self.features_NF[seen_N], self.tm_N[seen_N], self.owner_N[seen_N])

    def calibration(self, score_N: np.ndarray, *, without: int | None) -> Calibration:
        """Fitted on the five best of every target of other folds: what is submitted, with its optimism."""
        order = np.lexsort((-score_N, self.owner_N))
        first = np.searchsorted(self.owner_N[order], self.owner_N[order])
        best = order[np.arange(len(order)) - first < CANDIDATES]
        best = best[np.isfinite(self.tm_N[best]) & (self.fold_N[best] != without)]
        return Calibration.fit(score_N[best], self.tm_N[best])


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Matches of the training targets, what they are worth, and the models that learned from it."""

    targets: list[Target]
    structures: Library
    folds: list[int]  # of the targets
    matches: list[list[Match]]
    scores: list[np.ndarray]  # of the matches, by a ranker that never saw the target's fold
    models: dict[int, _Model]  # fold -> for its targets
    final: _Model  # for targets from elsewhere

    @staticmethod
    def of(
        targets: list[Target], library: Library, held_out: dict[str, int], score: Scorer, *, teaching: set[str]
    ) -> "_Known":
        folds = [held_out[target.target_id] for target in targets]
        truth = {name: library.xyz_T3[library.part(n)] for n, name in enumerate(library.ids) if name in teaching}
        matches, tm = [], []
        with Bar("templates of training targets", total=len(targets), unit="targets") as bar:
            for target, fold in zip(targets, folds, strict=True):
                found = find_matches(target, library, library.folds_N != fold, related=_RELATED)
                known = truth.get(target.target_id) if len(target) <= _LEARNED else None
                matches.append([match.without_trace() for match in found])
                tm.append(
                    score([(match.xyz_L3, known) for match in found])
                    if known is not None and found
                    else np.full(len(found), np.nan)
                )
                bar.advance()
        return _Known._learn(targets, library, folds, matches, tm)

    @staticmethod
    def _learn(
        targets: list[Target], library: Library, folds: list[int], matches: list[list[Match]], tm: list[np.ndarray]
    ) -> "_Known":
        table = _Judged(
            owner_N=np.repeat(np.arange(len(targets)), [len(found) for found in matches]),
            features_NF=np.array([match.features_F for found in matches for match in found]),
            source_N=np.array([library.folds_N[match.template] for found in matches for match in found], dtype=int),
            fold_N=np.repeat(folds, [len(found) for found in matches]),
            tm_N=np.concatenate([np.empty(0), *tm]),
        )
        table.require_two_folds()
        rankers = {fold: table.ranker(without=fold) for fold in sorted(set(folds))}
        score_N = np.zeros(len(table.tm_N))
        for fold, ranker in rankers.items():
            own_N = table.fold_N == fold
            if own_N.any():
                score_N[own_N] = ranker.predict(table.features_NF[own_N])
        models = {
            fold: _Model(ranker=ranker, calibration=table.calibration(score_N, without=fold))
            for fold, ranker in rankers.items()
        }
        return _Known(
            targets=targets,
            structures=library,
            folds=folds,
            matches=matches,
            scores=[score_N[table.owner_N == owner] for owner in range(len(targets))],
            models=models,
            final=_Model(ranker=table.ranker(without=None), calibration=table.calibration(score_N, without=None)),
        )

    def write_oof(self, parts: dict[str, Path], *, score: Scorer) -> dict[str, Any]:
        """Write every fold's held-out targets; returns how good the candidates and their expected scores are."""
        source = self.structures
        truth = {name: source.xyz_T3[source.part(n)] for n, name in enumerate(source.ids)}
        rows = CandidateRows(self.models)
        expected, found, best, top = [], [], [], []
        for target, fold, matches, scores in zip(self.targets, self.folds, self.matches, self.scores, strict=True):
            chosen = _choose(target, source, matches, scores, self.models[fold].calibration, count=CANDIDATES)
            rows.add(target.target_id, fold, [(each.expected, each.xyz_L3) for each in chosen])
            known = truth.get(target.target_id)
            top.append(max((each.expected for each in chosen), default=0.0))
            if known is not None and chosen:
                tm_M = score([(each.xyz_L3, known) for each in chosen])
                expected += [each.expected for each in chosen]
                found += tm_M.tolist()
                best.append(float(tm_M.max()))
        if not best:
            raise DataError(
                f"templates-predict: no training target has a template that covers {_COVERS:.0%} of it. "
                "Next: make templates RAW=<folder of more mmCIF files>."
            )
        rows.write(parts, "oof")
        return {
            "oof": {
                "targets": len(self.targets),
                "with_template": len(best),
                "best_of_five": round(float(np.mean(best)), 4),
                "covered_share": round(float(np.mean(np.array(top) >= COVERED)), 4),
            },
            "reliability": reliability(np.array(expected), np.array(found)),
        }


def _choose(
    target: Target, library: Library, matches: list[Match], scores: np.ndarray, calibration: Calibration, *, count: int
) -> list[_Candidate]:
    """The highest expected scores of those that cover enough: other templates, and other traces as far as possible."""
    chosen: list[_Candidate] = []
    spare: list[_Candidate] = []
    for place in np.argsort(-scores, kind="stable"):
        match, expected = matches[place], float(calibration.expected(scores[place : place + 1])[0])
        if any(match.template == other.template for other in (*chosen, *spare)):
            continue
        if match.features_F[_COVERAGE] < _COVERS:
            continue
        copied_L3 = transfer(match.partner_L, library.xyz_T3[library.part(match.template)])
        xyz_L3 = refine(complete(copied_L3, target.novo), np.isfinite(copied_L3[:, 0]), target.nested)
        candidate = _Candidate(template=match.template, expected=expected, xyz_L3=xyz_L3)
        new = all(rmsd(xyz_L3, other.xyz_L3) > _DIFFERENT for other in chosen)
        (chosen if new else spare).append(candidate)
        if len(chosen) == count:
            break
    return sorted(chosen + spare[: count - len(chosen)], key=lambda each: -each.expected)


def _write_test(
    targets: list[Target],
    library: Library,
    model: _Model,
    folds: list[int],
    parts: dict[str, Path],
    *,
    end: float | None = None,
) -> dict[str, Any]:
    """Deal the test candidates to the folds; returns what each target got that there was time for."""
    rows, told, covered = CandidateRows(folds), {}, 0
    with Bar("templates of test targets", total=len(targets), unit="targets") as bar:
        for target in take_until(targets, end):
            matches = find_matches(target, library, np.ones(len(library), dtype=bool))
            chosen: list[_Candidate] = []
            if matches:
                scores = model.ranker.predict(np.stack([match.features_F for match in matches]))
                count = CANDIDATES * len(folds)
                chosen = _choose(target, library, matches, scores, model.calibration, count=count)
            rows.deal(target.target_id, [(each.expected, each.xyz_L3) for each in chosen])
            told[target.target_id] = {
                "usable": int(released_for(target, library).sum()),
                "best": library.ids[chosen[0].template] if chosen else "none",
                "expected": round(chosen[0].expected, 4) if chosen else 0.0,
            }
            covered += bool(chosen) and chosen[0].expected >= COVERED
            bar.advance()
    rows.write(parts, "test")
    return {"targets": len(targets), "covered_share": round(covered / len(targets), 4), "templates": told}


def describe(facts: dict[str, Any]) -> list[str]:
    """What `run` or `apply` did, as lines for a terminal."""
    test = facts["test"]
    lines = _describe_oof(facts) if "oof" in facts else [tell_left_out(facts)]
    lines.append(f"test: {test['covered_share']:.0%} of {test['targets']} targets expect {COVERED} or more")
    for name, told in test["templates"].items():
        lines.append(
            f"  {name:<12} {told['usable']:>5} usable, best {told['best']:<10} expected {told['expected']:.3f}"
        )
    return lines


def _describe_oof(facts: dict[str, Any]) -> list[str]:
    about, oof, honest = facts["library"], facts["oof"], facts["reliability"]
    return [
        f"library: {about['train']} training targets, {about['later']} later ones, {about['library']} other chains; "
        "dates: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in about["dates"].items()),
        f"out of fold: best of {CANDIDATES} {oof['best_of_five']:.4f} over {oof['with_template']} of {oof['targets']} "
        f"targets that have a template; {oof['covered_share']:.0%} expect a TM-score of {COVERED} or more",
        f"expected TM-scores: correlation {honest['correlation']:.2f}, calibration error "
        f"{honest['calibration_error']:.3f}; expected / found by fifths: "
        + ", ".join(f"{expected:.2f} / {found:.2f}" for _, expected, found in honest["bins"]),
    ]
