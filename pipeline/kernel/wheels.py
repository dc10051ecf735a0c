"""Wheels for a notebook without internet: our own, built from this checkout, and those that Kaggle's image lacks."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pipeline.errors import ConfigError, NetworkError
from pipeline.paths import IS_CHECKOUT, REPOSITORY
from pipeline.runlog import say

PYTHON = "3.12"  # of Kaggle's image
#: What Kaggle's GPU image has of our dependencies. Source: pip-freeze.gpu.txt of googlecolab/backend-info, which the
#: image is built on (June 2026), with the versions there; torch 2.10.0+cu128 by Kaggle/kaggle-cli#1151.
IMAGE = {
    "torch": "2.10.0",
    "numpy": "2.0.2",
    "polars": "1.35.2",
    "pyarrow": "18.1.0",
    "numba": "0.60.0",
    "scipy": "1.16.3",
    "safetensors": "0.7.0",
    "typer": "0.25.1",
    "rich": "13.9.4",
    "matplotlib": "3.10.0",
}
#: What it lacks, and why a bundle brings it.
MISSING = {
    "ninja": "builds the selective scan of sessions without a GPU; without it they use the slow one",
    "ViennaRNA": "base-pair probabilities; packed only where they are used (a licence of its own: never for a fee)",
}
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "models", "folds", "submissions")
_SKIPPED = shutil.ignore_patterns("__pycache__", "csv", "*.pyc", "pretrained")  # weights are packed where used


def build_wheel(target: Path) -> str:
    """Build a wheel of this checkout into a folder, from a copy: setuptools keeps what was deleted since.

    Returns:
        Its name.

    Raises:
        ConfigError: pip or setuptools is missing, or this is no checkout.
    """
    lacking = [name for name in ("pip", "setuptools") if not any(metadata.distributions(name=name))]
    if lacking or not IS_CHECKOUT:
        why = f"{', '.join(lacking)} is not installed" if lacking else f"{REPOSITORY} is no checkout of the project"
        raise ConfigError(
            f"kernel: {why}, so our wheel cannot be built. Next: pip install pip setuptools, in a checkout."
        )
    copy, out = target / "source", target / "built"
    for name in _SOURCES:
        source = REPOSITORY / name
        copy.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=_SKIPPED)
        else:
            shutil.copyfile(source, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    done = _pip("wheel", str(copy), *options, "-w", str(out), SOURCE_DATE_EPOCH="315532800")
    found = list(out.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise ConfigError(f"kernel: our wheel was not built: {_last_line(done)}. Next: pip install -U setuptools.")
    wheel = found[0].rename(target / found[0].name)
    shutil.rmtree(copy)
    shutil.rmtree(out)
    return wheel.name


def missing_wheels(store: Path, target: Path, *, uses_bpp: bool) -> list[str]:
    """Copy the wheels that the image lacks; each is fetched once."""
    names = []
    for package in MISSING if uses_bpp else ["ninja"]:
        found = sorted(store.glob(f"{package.lower()}-*.whl")) or [_fetch_wheel(package, store)]
        shutil.copyfile(found[-1], target / found[-1].name)
        names.append(found[-1].name)
    return names


def _fetch_wheel(package: str, store: Path) -> Path:
    try:
        wanted = f"{package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError:
        wanted = package
    store.mkdir(parents=True, exist_ok=True)
    places = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    say(f"kernel: fetching the wheel of {wanted} for Python {PYTHON}: {MISSING[package]}")
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *places, "--quiet"]
    done = _pip("download", wanted, *options, "-d", str(store))
    found = sorted(store.glob(f"{package.lower()}-*.whl"))
    if done.returncode or not found:
        raise NetworkError(
            f"kernel: no wheel of {wanted} for Python {PYTHON}: {_last_line(done)}. "
            f"Next: check the network, or put the wheel into {store}."
        )
    return found[-1]


def _pip(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines
    return errors[-1].strip()[:200]
