"""Name -> network. One decorator, one dict, no import by string.

A network's constructor is its configuration's schema: keyword-only, annotated, defaulted. `create_model` checks what
it is given against that signature, so that a typo in a TOML file is answered by the closest argument's name.
"""

import difflib
import inspect
import math
import typing
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from models.interface import RnaModel

_MODELS: dict[str, type[RnaModel]] = {}
_SCALARS = (bool, int, float, str)

#: smallest value of a whole number; of the others 0, which means "none" for most
_LEAST = dict.fromkeys(("width", "depth", "state", "expand", "num_heads", "head_width", "filter_width"), 1)
_LEAST |= {"vocabulary": 4}

Model = TypeVar("Model", bound=type[RnaModel])


def register_model(cls: Model) -> Model:
    """Make a class known under its ``name``.

    Raises:
        ValueError: the name is taken, or the constructor has an argument that is not keyword-only, annotated with
            bool, int, float, str or a Literal, and defaulted.
    """
    if cls.name in _MODELS:
        raise ValueError(f"model name {cls.name!r} is taken by {_MODELS[cls.name].__qualname__}")
    for param in model_arguments(cls).values():
        if param.kind is not param.KEYWORD_ONLY or param.default is param.empty or not _is_checkable(param.annotation):
            raise ValueError(
                f"{cls.__qualname__}.__init__: {param}: expected a keyword with a scalar type and a default"
            )
    _MODELS[cls.name] = cls
    return cls


def list_models() -> list[str]:
    """Names of all networks, sorted."""
    return sorted(_MODELS)


def model_arguments(cls: type[RnaModel]) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments by name, annotations resolved.

    Where a constructor hands ``**common`` on, the base class's arguments that have a default follow.
    """
    constructors = [vars(base)["__init__"] for base in inspect.getmro(cls) if "__init__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    for depth, constructor in enumerate(constructors):
        _self, *own = inspect.signature(constructor, eval_str=True).parameters.values()
        common = next((param.name for param in own if param.kind is param.VAR_KEYWORD), None)
        # what a base class takes by position, its subclasses give
        schema = [param for param in own if depth == 0 or param.kind in (param.KEYWORD_ONLY, param.VAR_KEYWORD)]
        found = {param.name: param for param in schema} | found
        if common is None or constructors[depth + 1] is nn.Module.__init__:
            break
        del found[common]
    return found


def refuse_without_effect(model: RnaModel, where: str, **given: object) -> None:
    """Refuse arguments that nothing reads, unless they are at their default.

    Args:
        model: whose constructor calls this.
        where: what makes them idle, as in "without a pair track (pair_width)".
        **given: arguments of the constructor.

    Raises:
        ValueError: one of them differs from its default.
    """
    known = model_arguments(type(model))
    for key, value in given.items():
        if value != known[key].default:
            raise ValueError(
                f"model {model.name!r}: got {key}={value!r}, which has no effect {where}; expected its default, "
                f"{known[key].default!r}."
            )


def create_model(name: str, **kwargs: int | float | str | bool) -> RnaModel:
    """Build a network by name.

    Args:
        name: one of `list_models`.
        **kwargs: arguments of that network's constructor.

    Raises:
        ValueError: unknown name or argument (with the closest known one), or a value of the wrong type or range.
    """
    if name not in _MODELS:
        raise ValueError(
            f"model {name!r} is not known; expected one of {', '.join(list_models())}.{_near(name, _MODELS)}"
        )
    known = model_arguments(_MODELS[name])
    for key, value in kwargs.items():
        if key not in known:
            hint = _near(key, known) or f" Known: {', '.join(known)}."
            raise ValueError(f"model {name!r} has no argument {key!r}.{hint}")
        _check_value(key, value, known[key].annotation, where=f"model {name!r}: {key}")
    return _MODELS[name](**kwargs)


def _near(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _is_checkable(annotation: object) -> bool:
    return annotation in _SCALARS or typing.get_origin(annotation) is typing.Literal


def _check_value(key: str, value: object, annotation: typing.Any, *, where: str) -> None:
    if typing.get_origin(annotation) is typing.Literal:
        choices = typing.get_args(annotation)
        if value not in choices:
            raise ValueError(f"{where}: got {value!r}; expected one of {', '.join(map(repr, choices))}.")
        return
    allowed = (int, float) if annotation is float else (annotation,)
    if type(value) not in allowed:
        raise ValueError(f"{where}: got {value!r} ({type(value).__name__}); expected {annotation.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: got {value!r}; expected a finite number.")
    least = _LEAST.get(key, 0)
    if annotation is int and typing.cast(int, value) < least:
        raise ValueError(f"{where}: got {value!r}; expected {least} or more.")
