"""Small networks and batches that the tests of this folder share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.interface import RnaInputs, RnaModel
from models.registry import create_model
from pipeline.config import list_configs, load_config

#: coordinates are tens of Å: what counts as 1 in a comparison
ANGSTROM = 10.0

#: what torch's compiler warns of: float32 means float32 here; and its own modules, of 2.11, use what is deprecated
TENSOR_CORES = "ignore:TensorFloat32 tensor cores"
TORCH_ITSELF = "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"

Kwargs = dict[str, int | float | str | bool]

NUM_FEATURES = 6  #: of every position of `batch`

#: arguments that make each registered network small
SMALL: dict[str, Kwargs] = {
    "drsn": {"width": 16, "depth": 3, "kernel": 3, "dilations": 2},
    "hyena": {"width": 16, "depth": 2, "l_max": 64, "filter_width": 8, "ffn_expand": 2},
    "ribonanza_mamba": {"width": 16, "depth": 3, "pattern": "MMA", "state": 4, "num_heads": 2},
    "transformer_sepconv": {"width": 16, "depth": 3, "num_heads": 2, "ffn_expand": 2},
}
#: what every network has to offer
COMMON: dict[str, Kwargs] = {
    "values": {},
    "bpp": {"use_bpp": True},
    "features": {"num_features": NUM_FEATURES},
    "gru": {"gru_head": True},
    "distances": {"num_channels": 0, "num_distance_bins": 5},
    "classes": {"num_channels": 0, "num_classes": 3},
    "all-heads": {
        "use_bpp": True,
        "num_features": NUM_FEATURES,
        "num_distance_bins": 5,
        "num_classes": 3,
        "pool": "attention",
        "coordinates": True,
    },
}
#: what single networks have to offer besides
SPECIAL: dict[str, dict[str, Kwargs]] = {
    "drsn": {
        "shared": {"shrink": "shared"},
        "pairs": {"pair_depth": 2, "pair_width": 8, "num_distance_bins": 5, "coordinates": True},
    },
    "hyena": {
        "order-3": {"order": 3},
        "causal": {"bidirectional": False, "kernel": 0, "stem_kernel": 0},
        "no-ffn": {"ffn_expand": 0},
    },
    "ribonanza_mamba": {
        "tied": {"tie_directions": True, "pattern": "M"},
        "attention-only": {"pattern": "A"},
        "mamba-2": {"mamba_version": 2, "head_width": 8},
        "pair": {"pair_width": 4, "pattern": "AM"},
        "options": {"pattern": "AM", "multi_kernel": True, "glu": False, "squeeze_excite": True, "pair_width": 4}
        | {"pair_every": 1, "triangle": False},
    },
    "transformer_sepconv": {
        "no-ffn": {"ffn_expand": 0},
        "convolutions": {"multi_kernel": True, "glu": False, "squeeze_excite": True},
        "pair+bpp": {"pair_width": 6, "pair_every": 1, "use_bpp": True},
        "pair+heads": {"pair_width": 4, "triangle": False, "num_distance_bins": 5, "coordinates": True},
        "classes-gru": {"num_channels": 0, "num_classes": 3, "pool": "gru"},
        "coordinates": {"num_channels": 0, "coordinates": True},
    },
}


def shrunk(kwargs: Kwargs) -> Kwargs:
    """A shipped configuration's arguments with all sizes cut to those of a test, the rest as it is."""
    small: Kwargs = {"width": 16, "depth": 3, "num_heads": 2, "head_width": 8, "pair_width": 4, "l_max": 64}
    return kwargs | {key: value for key, value in small.items() if key in kwargs}


def preset_cases() -> dict[str, tuple[str, Kwargs]]:
    """All shipped configurations, shrunk; those that differ in nothing but size are one case, named after the first."""
    found: dict[str, tuple[str, Kwargs]] = {}
    for config in sorted(list_configs(), key=len):
        model = load_config(config).model
        classes: Kwargs = {"num_channels": 0, "num_classes": 3} if "pool" in model.kwargs else {}
        case = (model.name, shrunk(model.kwargs) | classes)
        if case not in found.values():
            found[f"{config}.toml"] = case
    return found


CASES = {
    f"{name}/{variant}": (name, SMALL[name] | kwargs)
    for name in SMALL
    for variant, kwargs in (COMMON | SPECIAL.get(name, {})).items()
} | preset_cases()


def build(case: str, *, seed: int = 0, device: str = "cpu", **kwargs: int | float | str | bool) -> RnaModel:
    """The network of a case, its parameters moved off their initial values: zero biases would hide leaks."""
    name, case_kwargs = CASES[case]
    torch.default_generator.manual_seed(seed)
    model = create_model(name, **(case_kwargs | kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device)


def batch(lengths: list[int], *, pad: int = 0, seed: int = 1, device: str = "cpu") -> RnaInputs:
    """Random sequences with base-pair probabilities and features; nonsense stands under the padding, finite and not."""
    rng = torch.Generator().manual_seed(seed)
    longest = max(lengths) + pad
    mask_BL = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    tokens_BL = torch.randint(0, 4, mask_BL.shape, generator=rng)
    bpp_BLL = torch.rand((*mask_BL.shape, longest), generator=rng) ** 8 / longest
    bpp_BLL = (bpp_BLL + bpp_BLL.transpose(1, 2)) * (1 - torch.eye(longest))
    real_BLL = mask_BL.unsqueeze(1) & mask_BL.unsqueeze(2)
    tokens_BL = torch.where(mask_BL, tokens_BL, torch.randint(-9, 99, mask_BL.shape, generator=rng))
    junk_BLL = torch.where(torch.rand(bpp_BLL.shape, generator=rng) < 0.2, torch.nan, torch.inf)
    finite_BLL = torch.rand(bpp_BLL.shape, generator=rng) < 0.6
    junk_BLL = torch.where(finite_BLL, 9 * torch.randn(bpp_BLL.shape, generator=rng), junk_BLL)
    bpp_BLL = torch.where(real_BLL, bpp_BLL, junk_BLL)
    features_BLF = 3 * torch.randn((*mask_BL.shape, NUM_FEATURES), generator=rng)
    features_BLF = torch.where(mask_BL.unsqueeze(2), features_BLF, junk_BLL[..., :1])
    return RnaInputs(*(x.to(device) for x in (tokens_BL, mask_BL, bpp_BLL, features_BLF)))


def alone(inputs: RnaInputs, row: int) -> RnaInputs:
    """One sequence of a batch without any padding."""
    length = int(inputs.mask_BL[row].sum())
    return cut(RnaInputs(*(x[row : row + 1] for x in inputs)), length)


def cut(inputs: RnaInputs, length: int) -> RnaInputs:
    """A batch without the positions beyond a length."""
    tokens_BL, mask_BL, bpp_BLL, features_BLF = inputs
    assert bpp_BLL is not None
    assert features_BLF is not None
    return RnaInputs(tokens_BL[:, :length], mask_BL[:, :length], bpp_BLL[:, :length, :length], features_BLF[:, :length])


def outputs(model: RnaModel, inputs: RnaInputs) -> dict[str, Tensor]:
    """What a network predicts, by name, absent heads left out."""
    return {name: x for name, x in model(inputs)._asdict().items() if x is not None}


def real(name: str, x: Tensor, row: int, length: int) -> Tensor:
    """What of an output belongs to one sequence of the batch and not to its padding."""
    if name == "class_logits_BC":
        return x[row]
    return x[row, :length, :length] if name == "distance_logits_BLLK" else x[row, :length]


def loss(model: RnaModel, inputs: RnaInputs) -> Tensor:
    """A number that depends on every real output, unevenly."""
    total = torch.zeros((), device=inputs.mask_BL.device)
    predicted = model(inputs)
    if predicted.values_BLC is not None:
        total = total + (predicted.values_BLC[inputs.mask_BL].float() ** 2).mean()
    if predicted.distance_logits_BLLK is not None:
        real_BLL = inputs.mask_BL.unsqueeze(1) & inputs.mask_BL.unsqueeze(2)
        total = total - torch.log_softmax(predicted.distance_logits_BLLK[real_BLL], -1)[:, 0].mean()
    if predicted.class_logits_BC is not None:
        total = total - torch.log_softmax(predicted.class_logits_BC, -1)[:, 0].mean()
    if predicted.c1_xyz_BL3 is not None:
        total = total + (predicted.c1_xyz_BL3[inputs.mask_BL] / ANGSTROM).square().mean()
    if predicted.lddt_logits_BLK is not None:
        total = total - torch.log_softmax(predicted.lddt_logits_BLK[inputs.mask_BL], -1)[:, 0].mean()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradient of every parameter by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_threads_change_no_bit(operator: Callable[..., Tensor], args: Sequence[Tensor]) -> None:
    """An operator's output and gradients are the same on one thread and on several."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y = operator(*args)
            results.append([y, *torch.autograd.grad(y.square().sum(), args)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
