"""No argument of a network is silently without effect: it changes the parameters or the outputs, or is refused."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from models.interface import RnaModel
from models.registry import _MODELS, create_model, list_models, model_arguments
from pipeline.config import load_config
from pipeline.errors import ConfigError
from tests.models.cases import NUM_FEATURES, SMALL, Kwargs, batch, outputs

#: heads that every network has
ALL_HEADS: Kwargs = {"num_distance_bins": 5, "num_classes": 3, "coordinates": True, "pool": "attention"}
#: what an argument is changed from
BASES: dict[str, dict[str, Kwargs]] = {
    "drsn": {
        "plain": {},
        "pairs": ALL_HEADS | {"pair_depth": 2, "pair_width": 4, "use_bpp": True},
        "classes": {"num_channels": 0, "num_classes": 3},
    },
    "hyena": {
        "plain": {},
        "all heads": ALL_HEADS | {"use_bpp": True},
        "causal": {"bidirectional": False, "kernel": 0, "stem_kernel": 0},
    },
    "ribonanza_mamba": {
        "plain": {},
        "pairs, Mamba-2": ALL_HEADS
        | {"pattern": "AM", "mamba_version": 2, "head_width": 8}
        | {"pair_width": 4, "pair_every": 1},
        "no convolution": {"kernel": 0, "use_bpp": True},
        "attention alone": {"pattern": "A"},
        "Mamba alone": {"pattern": "M"},
    },
    "transformer_sepconv": {
        "plain": {},
        "pairs": ALL_HEADS | {"pair_width": 4, "pair_every": 1, "use_bpp": True},
        "no convolution": {"kernel": 0, "num_channels": 0, "num_distance_bins": 5},
    },
}
#: sizes of a mixer that a pattern leaves out: they stay as they are, so that patterns can be compared
IDLE = {"attention alone": {"state", "expand"}, "Mamba alone": {"num_heads"}}
#: values that are not those of any base
OTHER: dict[str, list[Any]] = {
    "bidirectional": [True, False],
    "coordinates": [True, False],
    "depth": [4],
    "dilations": [3],
    "dropout": [0.4],
    "expand": [1],
    "ffn_expand": [0, 3],
    "filter_features": [7],
    "filter_shift": [0.05],
    "filter_width": [12],
    "glu": [True, False],
    "gru_head": [True, False],
    "head_width": [4],
    "kernel": [7],
    "l_max": [100],
    "mamba_version": [1, 2],
    "multi_kernel": [True, False],
    "num_channels": [3],
    "num_classes": [4],
    "num_distance_bins": [7],
    "num_features": [NUM_FEATURES],
    "num_heads": [4],
    "order": [3],
    "pair_depth": [1],
    "pair_every": [3],
    "pair_width": [6],
    "pattern": ["MAA"],
    "pool": ["mean", "max", "attention", "gru"],
    "shrink": ["channel", "shared", "none"],
    "squeeze_excite": [True, False],
    "state": [6],
    "stem_kernel": [5],
    "tie_directions": [True, False],
    "triangle": [True, False],
    "use_bpp": [True, False],
    "vocabulary": [16],
    "width": [48],
}
CHANGES = [
    (name, base, argument, value)
    for name in list_models()
    for base in BASES[name]
    for argument in model_arguments(_MODELS[name])
    for value in OTHER[argument]
]
#: how a refusal says that the argument would do nothing, or cannot be joined with the base
REFUSED = "has no effect|no head for distances or coordinates|each looks at both sides|0 blocks with attention"


def arguments(name: str, base: str) -> dict[str, Any]:
    """All arguments of a base, defaults included."""
    defaults = {key: parameter.default for key, parameter in model_arguments(_MODELS[name]).items()}
    sizes = {"width": 32, "kernel": 5, "dropout": 0.2}  # which both Mambas and multi_kernel can have
    return defaults | SMALL[name] | sizes | BASES[name][base]


def built(name: str, kwargs: dict[str, Any]) -> RnaModel:
    """A network whose parameters are all different from zero and from each other."""
    torch.default_generator.manual_seed(0)
    model = create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answers(model: RnaModel) -> list[dict[str, Tensor]]:
    """Outputs in evaluation and in training, with the same random numbers for every network."""
    found = []
    for training in (False, True):
        torch.default_generator.manual_seed(7)
        with torch.no_grad():
            found.append(outputs(model.train(training), batch([30, 21])))
    return found


def differs(one: RnaModel, other: RnaModel) -> bool:
    """Whether two networks have different parameters or, given the same ones, different outputs."""
    shapes = [{key: x.shape for key, x in model.state_dict().items()} for model in (one, other)]
    if shapes[0] != shapes[1]:
        return True
    other.load_state_dict(one.state_dict())
    pairs = list(zip(answers(one), answers(other), strict=True))
    return any(a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_every_argument_of_every_network_has_values_to_try():
    assert set(OTHER) == {argument for name in list_models() for argument in model_arguments(_MODELS[name])}
    assert set(BASES) == set(list_models())


@pytest.mark.parametrize(("name", "base", "argument", "value"), CHANGES)
def test_an_argument_changes_the_network_or_is_refused(name: str, base: str, argument: str, value: object):
    """head_width in Mamba 1, triangle and pair_every without a pair track, multi_kernel without a kernel and pool
    without classes were taken and did nothing."""
    kwargs = arguments(name, base)
    if kwargs[argument] == value:
        return
    with contextlib.ExitStack() as refused:
        try:
            changed = built(name, kwargs | {argument: value})
        except ValueError:
            refused.enter_context(pytest.raises(ValueError, match=REFUSED))
            raise
        assert differs(built(name, kwargs), changed) != (argument in IDLE.get(base, ()))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ribonanza_mamba", {"head_width": 32}, r"head_width=32, which has no effect in version 1 \(mamba_version\)"),
        ("ribonanza_mamba", {"pattern": "A", "tie_directions": True}, r"tie_directions=True.* without Mamba \(pattern"),
        ("ribonanza_mamba", {"pattern": "AM", "depth": 1, "mamba_version": 2}, r"without Mamba \(pattern, depth\)"),
        ("transformer_sepconv", {"triangle": False}, r"triangle=False.* without a pair track \(pair_width\)"),
        ("transformer_sepconv", {"pair_every": 1}, r"expected its default, 2\."),
        ("transformer_sepconv", {"kernel": 0, "multi_kernel": True}, r"without convolutions \(kernel\)"),
        ("drsn", {"pair_width": 16}, r"without blocks over pairs \(pair_depth\)"),
        ("hyena", {"pool": "gru"}, r"pool='gru', which has no effect without classes \(num_classes\)"),
        ("hyena", {"num_channels": 0, "gru_head": True}, r"without values per nucleotide \(num_channels\)"),
    ],
)
def test_what_would_do_nothing_is_refused_in_a_sentence(name: str, kwargs: Kwargs, message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **kwargs)


def build_for_the_pipeline(name: str, override: str) -> RnaModel:
    from pipeline.train import build_model  # reads tables, for which a GPU machine may have no package
    from tests.pipeline.tiny import TINY

    return build_model(load_config(name, [override]).model, TINY)


def test_the_pipeline_says_it_as_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"^\[model\] model 'ribonanza_mamba': got head_width=32.*Next: [^:]+$"):
        build_for_the_pipeline("ribonanza_mamba", "model.kwargs.head_width=32")


def test_a_number_of_classes_is_never_the_configurations_to_say():
    """They were built, trained on nothing, and left out of every prediction."""
    with pytest.raises(ConfigError, match=r"num_classes follows from the competition. Next: leave it out"):
        build_for_the_pipeline("drsn", "model.kwargs.num_classes=3")
