"""What tests of training start from: tiny tables, the tiny network, and a place to make something go wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from models.registry import register_model
from pipeline.paths import Paths
from tests.faults.network import PartsModel
from tests.pipeline import tiny


@pytest.fixture
def known_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network can be named in a configuration."""
    tiny.register(monkeypatch)


@pytest.fixture
def parts_model(known_model: None) -> None:
    """So can one with all kinds of parts."""
    register_model(PartsModel)


@pytest.fixture
def paths(tmp_path: Path, known_model: None) -> Paths:
    """Of the tiny competition, with its clean and fold tables."""
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor] | None], None]:
    """Call a function in every training forward pass of the tiny network; None = no more."""
    return lambda fault: monkeypatch.setattr(tiny.Fault, "inject", staticmethod(fault) if fault else None)
