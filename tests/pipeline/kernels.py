"""Bundles of tiny notebooks, and notebooks played in this process: their verbs run here, nothing is installed."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import synthetic
from pipeline.cli import run_verb
from pipeline.competitions import get_competition
from pipeline.kernel import bundle, script
from pipeline.kernel.bundle import Order
from pipeline.paths import Paths

COMPETITION = get_competition("ribonanza")
SPLIT, MODEL, TAG = "sim80_k2", "tiny_transformer_sepconv", "notebook"
RUN = f"{MODEL}+{TAG}.{SPLIT}"


def write_wheel(path: Path, **members: str) -> Path:
    """A file that is a wheel by name and form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in ({"any.py": ""} | members).items():
            opened.writestr(name, content)
    return path


def fake_wheel(target: Path) -> str:
    """In place of `wheels.build_wheel`, which takes seconds and is tested by itself."""
    return write_wheel(target / "rna_competition_pipeline-0.1.0-py3-none-any.whl").name


def order_of(paths: Paths, **changes: Any) -> Order:
    for name in ("ninja-1.13.2-py3-none-any.whl", "viennarna-2.7.2-cp312-cp312-manylinux_2_28_x86_64.whl"):
        write_wheel(paths.root / "wheels" / name)
    facts: dict[str, Any] = {
        "competition": COMPETITION,
        "paths": paths,
        "owner": "tester",
        "mode": "train",
        "split": SPLIT,
        "model": MODEL,
        "tag": TAG,
        "run": RUN,
        "overrides": ("train.epochs=2",),
        "folds": (0, 1),
    }
    return Order(**(facts | changes))


def pack(order: Order) -> Path:
    """Build a bundle without the seconds that our own wheel takes; returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "build_wheel", fake_wheel)
        return bundle.build(order).outputs["code"].parent


def lay_out(inputs: Path, home: Path, raw: Path) -> Path:
    """Inputs as Kaggle mounts them."""
    inputs.mkdir()
    (inputs / "bundle").symlink_to(home / "dataset")
    (inputs / "competition").symlink_to(raw)
    return inputs


def play(
    home: Path,
    inputs: Path,
    work: Path,
    environment: Mapping[str, str] | None = None,
    *,
    failing: Sequence[str] = (),
) -> list[list[str]]:
    """Run a bundle's script in a working folder of its own; returns its verbs with their words.

    Args:
        home: of the bundle.
        inputs: as `lay_out` lays them out.
        work: working folder.
        environment: of the notebook.
        failing: verbs that end with exit code 3.
    """
    work.mkdir(parents=True, exist_ok=True)
    called = []

    def rna(*words: str, accept: tuple[int, ...] | None = (0,), **_: Any) -> int:
        called.append(list(words))
        code = 3 if words[0] in failing else run_verb(words)
        if accept is not None and code not in accept:
            script.fail(f"rna {words[0]} ended with {code}.")
        return code

    with pytest.MonkeyPatch.context() as patch:
        for name in ("KAGGLE_IS_COMPETITION_RERUN", "KAGGLE_KERNEL_RUN_TYPE", "RNA_LIMIT", "RNA_ROWS"):
            patch.setenv(name, "")  # so that what an interactive session sets is taken back
            patch.delenv(name)
        for name, value in {"RNA_INPUT": str(inputs), **(environment or {})}.items():
            patch.setenv(name, value)
        patch.chdir(work)
        patch.setattr(script, "BUNDLE", home.name)
        patch.setattr(script, "STARTED", script.time.monotonic())
        patch.setattr(script, "install", lambda *_: None)
        patch.setattr(script, "rna", rna)
        script.main()
    return called


def write_raw(folder: Path, *, test: int = 8, seed: int = 0) -> Path:
    synthetic.write_ribonanza(folder, sequences=60, test=test, seed=seed)
    return folder
