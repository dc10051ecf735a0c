"""A network with one of every part in which a NaN can start, each with a place where a test can put one."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from models.interface import RnaInputs, RnaModel, RnaOutputs

#: Where `Point` modules stand.
POINTS = ("embedding", "norm", "attention logits", "scan", "convolution", "outer product", "head")


class Point(nn.Module):
    """Identity; while training, what passes through it goes through `inject` too."""

    inject: ClassVar[Callable[[str, Tensor], Tensor] | None] = None

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        inject = type(self).inject
        planned = isinstance(x, FakeTensor)  # the memory plan's pass, which is no step
        return inject(self.place, x) if inject is not None and self.training and not planned else x


class PartsModel(RnaModel):
    """Embedding, norm, attention, scan, convolution, outer product, dropout, head; all in the autocast's precision.

    Args:
        gain: of the factors of attention and outer product; 300 overflows fp16 in both and nothing in bf16 or fp32.
    """

    name: ClassVar[str] = "parts"

    def __init__(
        self,
        *,
        num_channels: int = 2,
        num_distance_bins: int = 0,
        width: int = 8,
        dropout: float = 0.1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        assert not num_distance_bins
        self.gain = gain
        self.points = nn.ModuleDict({place.replace(" ", "_"): Point(place) for place in POINTS})
        self.embedding = nn.Embedding(4, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_channels)

    def forward(self, inputs: RnaInputs) -> RnaOutputs:
        mask_BL1 = inputs.mask_BL.unsqueeze(-1)
        x_BLD = self._at("embedding", self.embedding(torch.where(inputs.mask_BL, inputs.tokens_BL, 0))) * mask_BL1
        x_BLD = self._at("norm", self.norm(x_BLD))
        query_BLD, key_BLD = self.query(x_BLD) * self.gain, self.key(x_BLD) * self.gain
        logits_BLL = self._at("attention logits", query_BLD @ key_BLD.transpose(1, 2))
        logits_BLL = logits_BLL.float().masked_fill(~inputs.mask_BL.unsqueeze(1), torch.finfo(torch.float32).min)
        x_BLD = x_BLD + self.dropout(logits_BLL.softmax(dim=-1) @ x_BLD) * mask_BL1
        x_BLD = x_BLD + self._at("scan", torch.cumsum(x_BLD * mask_BL1, dim=1) / 40)
        x_BLD = x_BLD + self._at("convolution", self.convolution((x_BLD * mask_BL1).transpose(1, 2)).transpose(1, 2))
        outer_BLL = (self.left(x_BLD) * self.gain) @ (self.right(x_BLD) * self.gain).transpose(1, 2)
        pooled_BL1 = self._at("outer product", outer_BLL / self.gain**2).mean(dim=-1, keepdim=True)
        x_BLD = self.dropout(torch.relu(x_BLD + pooled_BL1))
        return RnaOutputs(self._at("head", self.head(x_BLD)).float())

    def set_gradient_checkpointing(self, every: int) -> None:
        del every

    def _at(self, place: str, x: Tensor) -> Tensor:
        return self.points[place.replace(" ", "_")](x)
