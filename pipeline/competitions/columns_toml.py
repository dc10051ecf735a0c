"""``columns.toml``, beside the files of a set of one's own: what it may say is a dataclass of settings."""

import tomllib
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


def read_told(path: Path | None, settings: type, *, passes_over: bool = False) -> dict[str, Any]:
    """What ``columns.toml`` says, each of the type that a dataclass of settings has under that name.

    Args:
        path: of the file; None = there is none.
        settings: the dataclass.
        passes_over: leave out what it does not know.

    Raises:
        DataError: another name or type, or no TOML.
    """
    if path is None:
        return {}
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: not valid TOML: {err}. Next: correct that line.") from err
    known = {each.name: each.type for each in fields(settings)}
    told = {key: value for key, value in told.items() if key in known} if passes_over else told
    for key, value in told.items():
        if key not in known or not _is_of(value, known[key]):
            kinds = {name: type(value).__name__ for name, value in asdict(settings()).items()}
            expected = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise DataError(f"{path}: {key} = {value!r}; expected {expected}. Next: correct that line.")
    return told


def tell_settings(settings: Any) -> dict[str, Any]:
    """``columns``: what was said in ``columns.toml``, for the validation report; {} if nothing."""
    usual = asdict(type(settings)())
    said = {name: value for name, value in asdict(settings).items() if value != usual[name]}
    return {"columns": said} if said else {}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is a text, a number, or a list or table of such, as a type says.

    >>> _is_of("MAE", str), _is_of(["a", 1], list[str]), _is_of([0, 1.5], list[float]), _is_of({"a": 1}, dict[str, int])
    (True, False, True, True)
    """
    if (origin := typing.get_origin(kind)) in (list, dict):
        each_of = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_is_of(each, typing.get_args(kind)[-1]) for each in each_of)
    return type(value) in {float: (int, float), int: (int,)}.get(kind, (str,))
