"""A configuration is checked against the constructor's signature."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models import registry
from models.interface import RnaModel
from models.registry import create_model, list_models, register_model
from tests.models.cases import NUM_FEATURES, SMALL, alone, batch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list_models())
def test_a_registered_network_can_be_built_by_name(name: str):
    model = create_model(name, **SMALL[name])
    assert model.name == name
    assert not model.uses_bpp


def test_the_network_that_the_readme_adds_keeps_padding_from_real_positions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "models" / "README.md").read_text(), re.DOTALL)
    exec(next(block for block in blocks if "@register_model" in block), {"__name__": "models.my_net"})
    model = create_model("my_net", width=16, depth=3, use_bpp=True, num_features=NUM_FEATURES).eval()
    assert {"dropout", "pool", "use_bpp"} < registry.model_arguments(type(model)).keys()
    inputs = batch([9, 14], pad=5)
    together = model(inputs).values_BLC
    for row, length in enumerate([9, 14]):
        torch.testing.assert_close(
            together[row, :length], model(alone(inputs, row)).values_BLC[0], rtol=1e-5, atol=1e-5
        )


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=r"'ribonanza_mambo' is not known.*Did you mean 'ribonanza_mamba'"):
        create_model("ribonanza_mambo")


def test_an_unknown_argument_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=r"'drsn' has no argument 'widht'. Did you mean 'width'"):
        create_model("drsn", widht=3)


def test_an_argument_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"no argument 'zzz'. Known: num_channels, .*depth"):
        create_model("drsn", zzz=3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 16.0}, r"width: got 16.0 \(float\); expected int"),
        ({"width": True}, r"width: got True \(bool\); expected int"),
        ({"dropout": "0.1"}, r"dropout: got '0.1' \(str\); expected float"),
        ({"use_bpp": 1}, r"use_bpp: got 1 \(int\); expected bool"),
        ({"shrink": "both"}, r"shrink: got 'both'; expected one of 'channel', 'shared', 'none'"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_model("drsn", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 0}, "depth: got 0; expected 1 or more"),
        ({"kernel": -1}, "kernel: got -1; expected 0 or more"),
        ({"filter_shift": float("nan")}, "filter_shift: got nan; expected a finite number"),
    ],
)
def test_a_number_that_no_network_can_have_is_refused_in_a_sentence(kwargs: dict, message: str):
    """A negative depth was "accepted", a negative kernel a "math domain error", NaN a network that answers NaN."""
    with pytest.raises(ValueError, match=message):
        create_model("hyena", **kwargs)


def test_an_int_is_a_float():
    create_model("drsn", width=8, depth=1, dropout=0)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'drsn' is taken by Drsn"):

        @register_model
        class Other(RnaModel):
            name = "drsn"


def _open_ended(self: object, **kwargs: int) -> None: ...
def _without_default(self: object, *, width: int) -> None: ...
def _positional(self: object, width: int = 3) -> None: ...
def _untyped(self: object, *, width: Any = 3) -> None: ...


@pytest.mark.parametrize("constructor", [_open_ended, _without_default, _positional, _untyped])
def test_a_constructor_that_is_no_schema_is_refused(constructor: Any):
    cls = type("Other", (RnaModel,), {"name": "other", "__init__": constructor})
    with pytest.raises(ValueError, match="expected a keyword with a scalar type and a default"):
        register_model(cls)
    assert "other" not in list_models()
