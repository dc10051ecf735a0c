"""Small seeded data sets in the competitions' own raw formats, and a labelled one, for the demo and the tests.

Sequences are those of `pipeline.designs`, so their base pairs are known; chemical reactivity follows pairing,
nucleotide, loop and noise; C1' traces come from the same pairs. Every file has the columns, the row order and the gaps
that Kaggle's has, so the stages read it as they read the real one. Each `write_…` makes its folder if needed, replaces
files of its names, and returns name -> path; two calls with equal arguments write the same bytes.

Letters: L length (nt), 3 xyz.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.openvaccine import error_column
from pipeline.designs import Pairs, designs, join, mutate, openness, reactivity
from pipeline.schema import ALPHABET, PROBES, encode
from pipeline.structure.assembly import trace_from_pairs

#: Constant ends of a Ribonanza construct: a reference hairpin, and the tail where the primer binds.
FLANK_5, FLANK_3 = "GGGAACGACUCGAGUAGAGUCGAAAA", "AAAAGAAACAACAACAACAAC"
_FLANK_PAIRS: Pairs = [(5 + k, 21 - k) for k in range(6)]
#: Positions that the experiment cannot read at the two ends, nt.
BLANK_5, BLANK_3 = 26, 20

#: What the classes of the labelled set are made of: both motifs stand in every sequence, and their order decides.
_MOTIFS = ("GGACU", "CUUCC")

_MISSING = -1e18  # what the organisers write where a coordinate is not resolved


@dataclass(frozen=True)
class _Construct:
    """One molecule of the library: flanks included."""

    sequence: str
    pairs: Pairs
    group: str
    dataset: str
    window_start: int | None = None

    @property
    def sequence_id(self) -> str:
        """12 hex digits that depend on the sequence alone."""
        return hashlib.sha256(self.sequence.encode()).hexdigest()[:12]


def write_ribonanza(folder: Path, *, sequences: int = 240, test: int = 40, seed: int = 0) -> dict[str, Path]:
    """Write a small Ribonanza: train_data.csv, test_sequences.csv, sample_submission.csv, library_groups.parquet.

    The library holds single designs, families of mutants, and windows tiled over longer molecules: a random split of it
    leaks. Some profiles fail SN_filter and some are missing. Test sequences are single designs, some of them longer.

    Args:
        folder: where the files go.
        sequences: different sequences in train_data.csv, which has a row per sequence and probe.
        test: different sequences in test_sequences.csv, none of them in train.
        seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    library = _take(_library(rng), sequences, taken=set())
    taken = {construct.sequence for construct in library}
    held_out = _take(_single_designs(rng), test, taken=taken)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: folder / name
        for name in ("train_data.csv", "test_sequences.csv", "sample_submission.csv", "library_groups.parquet")
    }
    _profiles(library, rng).write_csv(files["train_data.csv"])
    lengths = [len(construct.sequence) for construct in held_out]
    ends = np.cumsum(lengths, dtype=np.int64)
    pl.DataFrame(
        {
            "id_min": ends - lengths,
            "id_max": ends - 1,
            "sequence_id": [construct.sequence_id for construct in held_out],
            "sequence": [construct.sequence for construct in held_out],
            "future": [int(length > 110) for length in lengths],
        }
    ).write_csv(files["test_sequences.csv"])
    pl.DataFrame({"id": np.arange(sum(lengths))}).with_columns(
        pl.lit(0.0).alias(f"reactivity_{probe}") for probe in PROBES
    ).write_csv(files["sample_submission.csv"])
    pl.DataFrame(
        [(c.sequence_id, c.group, c.window_start) for c in sorted(library, key=lambda c: c.sequence_id)],
        schema={"sequence_id": pl.String, "group": pl.String, "window_start": pl.Int32},
        orient="row",
    ).write_parquet(files["library_groups.parquet"])
    return files


def _take(source: Iterator[_Construct], count: int, *, taken: set[str]) -> list[_Construct]:
    """The first `count` constructs whose sequences are new."""
    chosen: dict[str, _Construct] = {}
    while len(chosen) < count:
        construct = next(source)
        if construct.sequence not in taken:
            chosen.setdefault(construct.sequence, construct)
    return list(chosen.values())


def _construct(letters: str, pairs: Pairs, group: str, dataset: str, *, window_start: int | None = None) -> _Construct:
    sequence, pairs = join([(FLANK_5, _FLANK_PAIRS), (letters, pairs), (FLANK_3, [])])
    return _Construct(sequence, pairs, group, dataset, window_start)


def _single_designs(rng: np.random.Generator) -> Iterator[_Construct]:
    """Unrelated designs for the test set, without end."""
    while True:
        yield _construct(*designs(rng, length=int(rng.integers(40, 84))), "", "test")


def _library(rng: np.random.Generator) -> Iterator[_Construct]:
    """Designs, mutant families and tiled windows, without end."""
    number = 0
    while True:
        number += 1
        for single in range(3):
            letters, pairs = designs(rng, length=int(rng.integers(24, 64)))
            yield _construct(letters, pairs, f"design:{number}.{single}", "designs")
        parent = designs(rng, length=int(rng.integers(30, 64)))
        yield _construct(*parent, f"mutants:{number}", "mutants")
        for _ in range(int(rng.integers(3, 7))):
            yield _construct(*mutate(*parent, rng), f"mutants:{number}", "mutants")
        letters, pairs = designs(rng, length=110, largest=24)
        for start in range(0, 110 - 60 + 1, 10):
            inner = [(i - start, j - start) for i, j in pairs if i >= start and j < start + 60]
            window = letters[start : start + 60]
            yield _construct(window, inner, f"genome:{number}", "genomes", window_start=start)


def _profiles(library: Sequence[_Construct], rng: np.random.Generator) -> pl.DataFrame:
    """The wide table: a row per sequence and probe, sorted by id, 2A3 first as Kaggle has it."""
    width = max(len(construct.sequence) for construct in library)
    rows, values, errors = [], [], []
    for construct in sorted(library, key=lambda c: c.sequence_id):
        depth = rng.lognormal(np.log(6.0), 0.6) if rng.random() > 0.06 else rng.uniform(0.2, 1.2)
        absent = rng.integers(len(PROBES)) if rng.random() < 0.04 else -1
        for column in reversed(range(len(PROBES))):
            signal_to_noise = float(depth * rng.lognormal(0.0, 0.2))
            reads = int(500 * signal_to_noise**1.3 * rng.lognormal(0.0, 0.3))
            truth_L = reactivity(construct.sequence, construct.pairs, probe=PROBES[column], rng=rng)
            value_L, error_L = _measure(truth_L, signal_to_noise, rng)
            if column == absent:
                continue
            name = f"{construct.dataset}_{PROBES[column].removesuffix('_MaP')}"
            passes = int(signal_to_noise > 1.0 and reads > 100)
            row = (construct.sequence_id, construct.sequence, PROBES[column], name, reads, signal_to_noise, passes)
            rows.append(row)
            values.append(np.pad(value_L, (0, width - len(value_L)), constant_values=np.nan))
            errors.append(np.pad(error_L, (0, width - len(error_L)), constant_values=np.nan))
    head = ("sequence_id", "sequence", "experiment_type", "dataset_name", "reads", "signal_to_noise", "SN_filter")
    table = pl.DataFrame(rows, schema=list(head), orient="row").with_columns(pl.col("signal_to_noise").round(3))
    wide = [
        pl.DataFrame(np.array(block).round(3), schema=[f"{name}_{k:04d}" for k in range(1, width + 1)], orient="row")
        for name, block in (("reactivity", values), ("reactivity_error", errors))
    ]
    return pl.concat([table, *(block.fill_nan(None) for block in wide)], how="horizontal")


def _measure(truth_L: np.ndarray, signal_to_noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Reactivity and its error as the experiment reports them; NaN at the ends.

    signal_to_noise is the mean reactivity over the mean error, as the organisers define it.
    """
    read = slice(BLANK_5, len(truth_L) - BLANK_3)
    shape_L = np.sqrt(0.1 + truth_L)  # counts: the error grows with the root of the signal
    error_L = shape_L * truth_L[read].mean() / shape_L[read].mean() / signal_to_noise
    value_L = np.full(len(truth_L), np.nan)
    value_L[read] = (truth_L + error_L * rng.standard_normal(len(truth_L)))[read]
    return value_L, np.where(np.isfinite(value_L), error_L, np.nan)


#: Ends of an OpenVaccine construct, and how much of it is read: the first 68 of 107 nt, 91 of 130.
_VACCINE_5, _VACCINE_3 = "GGAAA", "AAAAGAAACAACAACAACAAC"
_SCORED = {107: 68, 130: 91}
#: How fast a target's condition acts on a fully open A, C, G, U, relative to 1M7 reactivity.
_VACCINE_OPEN = {
    "reactivity": (0.9, 0.45, 0.75, 0.65),
    "deg_Mg_pH10": (0.9, 0.6, 1.0, 0.8),
    "deg_pH10": (1.0, 0.6, 0.9, 0.9),
    "deg_Mg_50C": (0.8, 0.6, 0.9, 0.8),
    "deg_50C": (0.8, 0.7, 0.9, 0.8),
}


def write_openvaccine(folder: Path, *, sequences: int = 160, test: int = 24, seed: int = 0) -> dict[str, Path]:
    """Write a small OpenVaccine: train.json and test.json (JSON lines), sample_submission.csv.

    Designs come in families of mutants; some molecules fail SN_filter; five in six test sequences are longer.

    Args:
        folder: where the files go.
        sequences: different sequences in train.json.
        test: different sequences in test.json, none of them in train.
        seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    library = _take(_vaccines(rng, lengths=[107]), sequences, taken=set())
    held_out = _take(_vaccines(rng, lengths=[107, *[130] * 5]), test, taken={one.sequence for one in library})
    folder.mkdir(parents=True, exist_ok=True)
    names = ("train.json", "test.json", "sample_submission.csv")
    files = {name: folder / name for name in names}
    train = [_facts(construct, place) | _degradation(construct, rng) for place, construct in enumerate(library)]
    asked = [_facts(construct, place) for place, construct in enumerate(held_out)]
    for name, rows in zip(names, (train, asked), strict=False):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = [f"{row['id']}_{position}" for row in asked for position in range(row["seq_length"])]
    sample = pl.DataFrame({"id_seqpos": keys}).with_columns(pl.lit(0.0).alias(target) for target in _VACCINE_OPEN)
    sample.write_csv(files["sample_submission.csv"])
    return files


def _vaccines(rng: np.random.Generator, *, lengths: Sequence[int]) -> Iterator[_Construct]:
    """Designs, each with up to three mutants, without end."""
    while True:
        inner = int(rng.choice(lengths)) - len(_VACCINE_5) - len(_VACCINE_3)
        parent = designs(rng, length=inner)
        for one in (parent, *(mutate(*parent, rng) for _ in range(int(rng.integers(0, 4))))):
            yield _Construct(*join([(_VACCINE_5, []), one, (_VACCINE_3, [])]), group="", dataset="")


def _facts(construct: _Construct, place: int) -> dict[str, Any]:
    length = len(construct.sequence)
    letters = ["."] * length
    for i, j in construct.pairs:
        letters[i], letters[j] = "(", ")"
    row = {"index": place, "id": f"id_{construct.sequence_id[:9]}", "sequence": construct.sequence}
    return row | {"structure": "".join(letters), "seq_length": length, "seq_scored": _SCORED[length]}


def _degradation(construct: _Construct, rng: np.random.Generator) -> dict[str, Any]:
    """Measured values of all targets; the molecule's signal_to_noise is that of its reactivity."""
    scored = _SCORED[len(construct.sequence)]
    token_L = encode(construct.sequence)
    open_L = openness(construct.sequence, construct.pairs)
    signal_to_noise = float(rng.lognormal(np.log(5.0), 0.7))
    row: dict[str, Any] = {"signal_to_noise": round(signal_to_noise, 3), "SN_filter": int(signal_to_noise > 1.5)}
    for target, rates in _VACCINE_OPEN.items():
        truth_L = 0.03 + np.take(rates, token_L) * open_L * np.exp(0.2 * rng.standard_normal(len(token_L)))
        error_L = np.sqrt(0.1 + truth_L) * truth_L.mean() / signal_to_noise
        value_L = truth_L + error_L * rng.standard_normal(len(token_L))
        row |= {target: value_L[:scored].round(4).tolist(), error_column(target): error_L[:scored].round(4).tolist()}
    return row


def write_rna3d(folder: Path, *, targets: int = 40, test: int = 6, seed: int = 0) -> dict[str, Path]:
    """Write a small RNA 3D Folding, part 1: sequences and C1' labels of train and validation, test, sample submission.

    A quarter of the train targets are homologues of others, some targets have two conformations, and some residues are
    not resolved. The validation labels are those of the test targets, in another order, so that they can be scored.

    Args:
        folder: where the files go.
        targets: train targets, with ids that hold an underscore.
        test: test targets, deposited after the temporal cut-off of all train targets.
        seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    train = _molecules(rng, [f"0{_letters(k)}_A" for k in range(targets)], homologues=0.25, year=2015)
    held_out = _molecules(rng, [f"S{1101 + k}{'v2' if k % 4 == 3 else ''}" for k in range(test)], year=2022)
    files = {}
    tables = {
        "train_sequences.csv": _sequence_table(train),
        "train_labels.csv": _label_table(train, rng),
        "validation_sequences.csv": _sequence_table(held_out),
        "validation_labels.csv": _label_table(held_out[::-1], rng),
        "test_sequences.csv": _sequence_table(held_out),
        "sample_submission.csv": _sample(held_out),
    }
    for name, table in tables.items():
        files[name] = folder / name
        table.write_csv(files[name])
    return files


@dataclass(frozen=True)
class _Molecule:
    """One target: its sequence, and one or two C1' traces."""

    target_id: str
    sequence: str
    pairs: Pairs
    temporal_cutoff: str
    conformers: tuple[np.ndarray, ...]  # [L, 3] Å


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + number // 26**k % 26) for k in (2, 1, 0))


def _molecules(
    rng: np.random.Generator, target_ids: Sequence[str], *, year: int, homologues: float = 0.0
) -> list[_Molecule]:
    molecules: list[_Molecule] = []
    for order, target_id in enumerate(target_ids):
        if molecules and rng.random() < homologues:
            parent = molecules[int(rng.integers(len(molecules)))]
            sequence, pairs = mutate(parent.sequence, parent.pairs, rng)
            trace_L3 = parent.conformers[0] + 0.3 * rng.standard_normal((len(sequence), 3))
        else:
            sequence, pairs = designs(rng, length=int(rng.integers(24, 61)))
            trace_L3 = _warp(trace_from_pairs(len(sequence), pairs, rng), rng)
        other = (_bend(trace_L3, pairs, rng),) if order % 5 == 2 else ()
        cutoff = f"{year + order % 4}-{1 + order % 12:02d}-{1 + order % 28:02d}"
        molecules.append(_Molecule(target_id, sequence, pairs, cutoff, (trace_L3, *other)))
    return molecules


def _warp(trace_L3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bend space softly and shake each residue, so that ideal helices alone are not the whole answer."""
    warped_L3 = trace_L3 + 0.2 * rng.standard_normal(trace_L3.shape)
    for _ in range(3):
        wave = rng.standard_normal(3)
        wave *= 2 * np.pi / rng.uniform(40.0, 80.0) / np.linalg.norm(wave)  # wavelength in Å
        phase_L = trace_L3 @ wave + rng.uniform(0, 2 * np.pi)
        warped_L3 += 0.5 * np.sin(phase_L)[:, None] * rng.standard_normal(3)
    return warped_L3


def _bend(trace_L3: np.ndarray, pairs: Pairs, rng: np.random.Generator) -> np.ndarray:
    """Another conformation: the 3' part turned by 25° about a residue that no pair encloses."""
    outside = [k for k in range(len(trace_L3)) if not any(i <= k <= j for i, j in pairs)]
    hinge = outside[len(outside) // 2]
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(25.0)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    bent_L3 = trace_L3.copy()
    bent_L3[hinge:] = (trace_L3[hinge:] - trace_L3[hinge]) @ turn.T + trace_L3[hinge]
    return bent_L3


def _sequence_table(molecules: Sequence[_Molecule]) -> pl.DataFrame:
    columns = ("target_id", "sequence", "temporal_cutoff", "description", "all_sequences")
    rows = [
        (
            molecule.target_id,
            molecule.sequence,
            molecule.temporal_cutoff,
            f"Designed RNA, {len(molecule.pairs)} base pairs\nSynthetic",
            f">{molecule.target_id}|Chain A|designed RNA\n{molecule.sequence}",
        )
        for molecule in molecules
    ]
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def _label_table(molecules: Sequence[_Molecule], rng: np.random.Generator) -> pl.DataFrame:
    """A row per residue; what is not resolved, and the conformers a target does not have, are -1e18."""
    most = max(len(molecule.conformers) for molecule in molecules)
    blocks, coordinates = [], []
    for molecule in molecules:
        length = len(molecule.sequence)
        xyz = np.full((length, most, 3), _MISSING)
        for number, trace_L3 in enumerate(molecule.conformers):
            xyz[:, number] = trace_L3.round(3)
            gap = int(rng.integers(length)) if rng.random() < 0.4 else length
            xyz[gap : gap + int(rng.integers(1, 4)), number] = _MISSING
        blocks.append(_residues(molecule))
        coordinates.append(xyz.reshape(length, most * 3))
    names = [f"{axis}_{number}" for number in range(1, most + 1) for axis in "xyz"]
    return pl.concat([pl.concat(blocks), pl.DataFrame(np.concatenate(coordinates), schema=names)], how="horizontal")


def _residues(molecule: _Molecule) -> pl.DataFrame:
    resid = range(1, len(molecule.sequence) + 1)
    ids = [f"{molecule.target_id}_{number}" for number in resid]
    return pl.DataFrame({"ID": ids, "resname": list(molecule.sequence), "resid": list(resid)})


def _sample(molecules: Sequence[_Molecule]) -> pl.DataFrame:
    names = [f"{axis}_{candidate}" for candidate in range(1, 6) for axis in "xyz"]
    return pl.concat([_residues(molecule) for molecule in molecules]).with_columns(
        pl.lit(0.0).alias(name) for name in names
    )


def write_labelled(
    folder: Path, *, sequences: int = 480, test: int = 60, seed: int = 0, numbers: bool = False
) -> dict[str, Path]:
    """A labelled set, ``train.csv`` and ``test.csv``: of two motifs, which is nearer to the 5' end?

    Every sequence, 40 to 60 nt, holds both, up to 20 nt apart: neither letters nor words tell the classes apart.

    Args:
        folder: where the files go.
        sequences: of the training set.
        test: sequences of the test set, which has no labels.
        seed: of all choices.
        numbers: ask instead where the first of them begins, as a share of the length.
    """
    rng = np.random.default_rng([seed, 4])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_ordered_motifs(rng, place, numbers=numbers) for place in range(sequences + test)]
    files = {"train": folder / "train.csv", "test": folder / "test.csv"}
    pl.DataFrame(rows[:sequences]).write_csv(files["train"])
    pl.DataFrame(rows[sequences:]).drop("label").write_csv(files["test"])
    return files


def _ordered_motifs(rng: np.random.Generator, place: int, *, numbers: bool) -> dict[str, str]:
    length, order = int(rng.integers(40, 61)), _MOTIFS if place % 2 else _MOTIFS[::-1]
    letters, first = rng.choice(list(ALPHABET), length), int(rng.integers(0, length - 20))
    second = int(rng.integers(first + 8, min(length - 5, first + 20) + 1))
    for start, motif in zip((first, second), order, strict=True):
        letters[start : start + len(motif)] = list(motif)
    label = f"{first / length:.4f}" if numbers else f"{order[0]} first"
    return {"id": f"motifs{place:04d}", "sequence": "".join(letters), "label": label}
