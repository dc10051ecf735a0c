"""Parts that autocast must not reach: the same numbers with it and without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.heads import ClassHead, ValuesHead
from models.hyena import HyenaFilter
from models.layers.attention import PairBias, RelativePosition
from models.layers.coordinates import CoordinateHead
from models.layers.distogram import DistanceHead
from models.layers.mamba import MambaDirection
from models.layers.pair import PairStart
from models.layers.shrinkage import Shrinkage

MASK_BL = torch.ones(2, 9, dtype=torch.bool)


def _filter(x_BLD: Tensor) -> Tensor:
    module = HyenaFilter(4, directions=1, l_max=64, width=8, features=5, shift=0.0)
    return x_BLD.sum() * module(x_BLD.shape[1])[0]


ISLANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Hyena filter": _filter,
    "position bias": lambda x: x.sum() * RelativePosition(3)(x.shape[1]),
    "start of the pair track": lambda x: PairStart(3, use_bpp=True)(MASK_BL, (x[..., :1] * x[..., :1].mT).square()),
    "values": lambda x: ValuesHead(8, num_channels=2)(x, MASK_BL),
    "values after a GRU": lambda x: ValuesHead(8, num_channels=2, gru=True)(x, MASK_BL),
    "distances": lambda x: DistanceHead(8, num_bins=5, use_bpp=False)(x, None),
    "classes": lambda x: ClassHead(8, num_classes=3, pool="attention")(x, MASK_BL),
    "coordinates": lambda x: CoordinateHead(8, num_bins=4, use_bpp=False)(x, MASK_BL, None).xyz_BL3,
    "shrinkage": lambda x: Shrinkage(8, shrink="channel")(x, MASK_BL),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("island", ISLANDS)
def test_autocast_changes_no_number(island: str, dtype: torch.dtype):
    x_BLD = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            results.append(ISLANDS[island](x_BLD))
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_attention_bias_is_rounded_once_at_its_end(dtype: torch.dtype):
    torch.manual_seed(0)
    bias, bpp_BLL = PairBias(4, use_bpp=True), torch.rand(2, 9, 9)
    expected = bias(MASK_BL, bpp_BLL)
    with torch.autocast("cpu", dtype=dtype):
        found = bias(MASK_BL, bpp_BLL)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mambas_step_sizes_and_states_are_float32(dtype: torch.dtype):
    layer = MambaDirection(32, inner=8, state=4)
    seen: list[torch.dtype] = []
    layer.step.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", dtype=dtype):
        found = layer(torch.randn(2, 9, 8), MASK_BL, reverse=True)
    assert [*seen, found.dtype] == [torch.float32, torch.float32]
