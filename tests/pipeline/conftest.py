"""What tests start from: tiny tables, the tiny network, a place to make something go wrong; folders of raw files."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from models.registry import register_model
from pipeline import preprocess
from pipeline.competitions import get_competition
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
def raw(tmp_path: Path) -> Path:
    """A folder for raw files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def run(raw: Path, paths: Paths) -> Callable[..., dict[str, Any]]:
    """The data stage on the raw folder, for the `paths` of the test's own file; its facts."""
    return lambda at=raw, **how: preprocess.run(get_competition(paths.comp), at, paths, **how).facts


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor] | None], None]:
    """Call a function in every training forward pass of the tiny network; None = no more."""
    return lambda fault: monkeypatch.setattr(tiny.Fault, "inject", staticmethod(fault) if fault else None)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder one that nothing can be written to, as on a disk that is mounted so: root may write elsewhere."""

    def forbid(folder: Path) -> None:
        def below(path: Any) -> bool:
            return not isinstance(path, int) and Path(path).is_relative_to(folder)

        def guarded(call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
            def checked(path: Any, *args: Any, **options: Any) -> Any:
                if below(path) and writes(path, *args, **options):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
                return call(path, *args, **options)

            return checked

        may = os.access
        monkeypatch.setattr(io, "open", guarded(io.open, lambda _, mode="r", *__, **___: mode not in ("r", "rb")))
        for name in ("unlink", "rename", "replace", "rmdir", "utime"):
            monkeypatch.setattr(os, name, guarded(getattr(os, name), lambda *_, **__: True))
        # of a folder that is there the system says that first
        monkeypatch.setattr(os, "mkdir", guarded(os.mkdir, lambda path, *_, **__: not Path(path).is_dir()))
        monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and not (mode & os.W_OK and below(path)))

    return forbid
