"""TensorBoard and Weights & Biases as listeners of a run: imported only when asked for, and never able to break it."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ConfigError


class Tracker(Protocol):
    """What a listener must be able to do."""

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Take in some named numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


#: Opens a tracker from the fold's folder, the run's meta data and the step that it begins at.
OpenTracker = Callable[[Path, Mapping[str, Any], int], Tracker]


def find_trackers(names: Sequence[str]) -> dict[str, OpenTracker]:
    """Openers of some trackers, by name, each known to be installed.

    Raises:
        ConfigError: an unknown name, or its package cannot be imported.
    """
    found = {}
    for name in names:
        if name not in _KNOWN:
            raise ConfigError(
                f"TRACK={name}: expected one of {', '.join(_KNOWN)}. Next: name one of these, or leave TRACK out."
            )
        module, found[name] = _KNOWN[name]
        try:
            importlib.import_module(module)
        except Exception as err:  # a package that is there and broken raises all kinds
            raise ConfigError(
                f"TRACK={name}: cannot be imported ({type(err).__name__}: {err}). Next: pip install {name}, or the "
                "extra 'track', or leave TRACK out; metrics.jsonl holds the same numbers."
            ) from err
    return found


class _TensorBoard:
    """Event files in ``<fold>/tensorboard``; a resumed run hides what a killed one logged beyond its checkpoint."""

    def __init__(self, folder: Path, _meta: Mapping[str, Any], first_step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run in ``<fold>/wandb``, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it."""

    def __init__(self, folder: Path, meta: Mapping[str, Any], _first_step: int) -> None:
        name = f"{meta['run']}.fold{meta['fold']}"
        self._run = importlib.import_module("wandb").init(
            project=meta["competition"],
            name=name,
            config=dict(meta),
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            reinit="create_new",
        )

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


#: Name -> module that must be importable, opener.
_KNOWN: dict[str, tuple[str, OpenTracker]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
}
