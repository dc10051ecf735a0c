"""Traces for the tests of the TM-scores."""

import stat
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import rotation_onto
from submissions.align import tm_aligns

seeds = st.integers(0, 2**32 - 1)


def folded(length: int, seed: int) -> tuple[np.ndarray, str]:
    """A hairpin's trace [L, 3] Å with noise, and letters that pair along its stem."""
    rng = np.random.default_rng(seed)
    arm = max((length - 5) // 2, 0)
    trace = trace_from_pairs(length, [(i, length - 1 - i) for i in range(arm)], rng)
    five = rng.choice(list("ACGU"), arm)
    three = [dict(zip("ACGU", "UGCA", strict=True))[letter] for letter in five[::-1]]
    return trace, "".join([*five, *rng.choice(list("ACGU"), length - 2 * arm), *three])


def tm_align(model_X3: np.ndarray, native_Y3: np.ndarray, model_names: str, native_names: str) -> float:
    """`tm_aligns` of a single pair."""
    return float(tm_aligns([(model_X3, native_Y3, model_names, native_names)])[0])


def moved(trace_L3: np.ndarray, seed: int) -> np.ndarray:
    """The same trace elsewhere, turned."""
    rng = np.random.default_rng(seed)
    return trace_L3 @ rotation_onto(*rng.standard_normal((2, 8, 3))) + 50.0 * rng.standard_normal(3)


def usalign_script(folder: Path, *, matched: float, aligned: float) -> Path:
    """A program USalign that gives every pair one score by residue number and one by its default alignment."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "USalign"
    said = "TM-score= 0.1 (normalized by length of Structure_1)\\nTM-score= %s (normalized by length of Structure_2)\\n"
    path.write_text(f"#!/bin/sh\ncase \"$*\" in *-TMscore*) s={matched};; *) s={aligned};; esac\nprintf '{said}' $s\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
