"""Shared fixtures: small, seeded, on the CPU."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

# before torch is imported: tiny networks gain nothing from a second thread, and spinning ones stall a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]

with suppress(ImportError):  # a machine with a GPU may have less than we need for the other tests
    from hypothesis import HealthCheck, settings

    # no example may be drawn by chance, or judged by the time it takes
    everywhere = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("everywhere", **everywhere)
    settings.load_profile("everywhere")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let a machine that has pytest alone read pyproject.toml, where nothing but pytest-timeout knows this setting."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds after which a test ends; not without pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU unless tests for one are asked for (``-m gpu``): the others ask for the CPU's bits, resumed or not."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, whatever marks were asked for; on one, all is as in a run."""
    if item.get_closest_marker("gpu"):
        from pipeline.training.precision import choose_device

        if choose_device().type != "cuda":
            pytest.skip("needs a CUDA device, and -m gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the files, those with a slow test come first: none is begun when the others end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whoever draws without a generator of his own draws the same numbers in whatever order tests are run."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.manual_seed(0)
    elif torch:  # for devices that are not begun torch would note who asked, 1 ms each time
        torch.default_generator.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Hang-up and interrupt as a shell leaves them: under nohup one is ignored, in a script's background the other."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """``shared_data("stanford-ribonanza-rna-folding")`` is that folder of real data, or the test is skipped."""
    home = Path(os.environ.get("RNA_SHARED", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (home / name).is_dir():
            pytest.skip(f"real data {name} is not on this machine (RNA_SHARED)")
        return home / name

    return find
