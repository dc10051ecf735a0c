"""Masks and dropout: the laws of small parts."""

import math
from functools import partial

import pytest
import torch

from models.interface import RnaInputs
from models.layers.blocks import FeedForward
from models.layers.checkpointing import run_blocks
from models.layers.dropout import Dropout
from models.layers.embedding import InputEmbedding
from models.layers.masked import clean_inputs, masked_mean, zero_pads
from models.registry import create_model
from tests.models.cases import SMALL


def test_pads_are_zeroed_even_if_they_are_not_finite():
    x_BLD = torch.tensor([[[1.0], [torch.nan], [torch.inf]]], requires_grad=True)
    mask_BL = torch.tensor([[True, False, False]])
    zeroed = zero_pads(x_BLD, mask_BL)
    zeroed.sum().backward()
    assert zeroed.flatten().tolist() == [1.0, 0.0, 0.0]
    assert x_BLD.grad is not None
    assert x_BLD.grad.flatten().tolist() == [1.0, 0.0, 0.0]
    assert masked_mean(x_BLD, mask_BL).item() == 1.0


def test_the_mean_of_no_position_is_zero_and_has_no_gradient():
    """0 / 0: one row of padding alone made distances NaN in drsn, and with them every gradient of the batch."""
    x_BLD = torch.ones(2, 3, 1, requires_grad=True)
    mean_BD = masked_mean(x_BLD, torch.tensor([[True, False, True], [False] * 3]))
    mean_BD.sum().backward()
    assert mean_BD.flatten().tolist() == [1.0, 0.0]
    assert x_BLD.grad is not None
    assert x_BLD.grad.flatten().tolist() == [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.ones(300, 1001, requires_grad=True)
    dropped = layer(x)
    dropped.sum().backward()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert dropped.unique().numel() == 2
    assert torch.equal(x.grad, dropped)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_follows_torchs_seed():
    layer, x = Dropout(0.5), torch.ones(1000)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("every", "runs"), [(0, 1), (1, 2), (2, 2), (5, 2)])
def test_gradient_checkpointing_runs_each_block_again(every: int, runs: int):
    """Nothing noticed when `run_blocks` kept all activations whatever it was asked: equal gradients are no proof."""
    blocks, run = [torch.nn.Linear(4, 4) for _ in range(3)], []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: run.append(block))
    run_blocks(blocks, torch.randn(2, 4), every=every).sum().backward()
    assert [run.count(block) for block in blocks] == [runs] * 3


@pytest.mark.parametrize("every", [0, 1])
def test_dropout_compiles_whole_and_drops_the_same(every: int):
    """Each dropout on the CPU broke a compiled training step: "Unsupported: Tensor.random_ op"."""
    blocks, weight = [torch.nn.Linear(8, 8), Dropout(0.3), torch.nn.Linear(8, 8), Dropout(0.3)], torch.randn(4, 8)
    x, grads = torch.randn(4, 8, requires_grad=True), []
    for wrap in (lambda run: run, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        found = wrap(lambda x: run_blocks(blocks, x, every=every))(x)
        grads.append(torch.autograd.grad(found, x, weight)[0])
    assert torch.equal(*grads)


def test_nearly_everything_can_be_dropped():
    """A share that rounds to 1 ended in "ZeroDivisionError: division by zero"."""
    assert Dropout(0.999999)(torch.ones(1000)).isfinite().all()


def test_the_embedding_knows_the_nucleotide_its_pairing_and_the_partners_surroundings():
    """Nothing noticed when each position was its own partner, or when paired and unpaired were exchanged."""
    torch.manual_seed(0)
    layer = InputEmbedding(8, use_bpp=True, stem_kernel=3)
    tokens_BL, mask_BL, bpp_BLL = torch.tensor([[0, 1, 2, 3, 3]]), torch.ones(1, 5).bool(), torch.zeros(1, 5, 5)
    bpp_BLL[0, 0, 4] = bpp_BLL[0, 4, 0] = 0.9  # A with U
    bpp_BLL[0, 1, 2] = bpp_BLL[0, 2, 1] = 0.4  # C with G
    pairing_BL5 = torch.zeros(1, 5, 5)
    pairing_BL5[0, :, 0] = torch.tensor([0.1, 0.6, 0.6, 1.0, 0.1])
    for position, partner, probability in ((0, 3, 0.9), (4, 0, 0.9), (1, 2, 0.4), (2, 1, 0.4)):
        pairing_BL5[0, position, 1 + partner] = probability
    assert layer.pairing is not None
    assert layer.stem is not None
    assert layer.partner is not None
    x_BLD = layer.tokens(tokens_BL) + layer.pairing(pairing_BL5)
    x_BLD = x_BLD + layer.stem(x_BLD, mask_BL)
    partners_BLD = torch.tensor([[0.9, 0.4, 0.4, 0.0, 0.9]]).unsqueeze(-1) * x_BLD[:, [4, 2, 1, 3, 0]]
    found = layer(RnaInputs(tokens_BL, mask_BL, bpp_BLL))
    torch.testing.assert_close(found, x_BLD + layer.partner(partners_BLD))


@pytest.mark.parametrize("name", ["hyena", "ribonanza_mamba", "transformer_sepconv"])
def test_hyena_has_hyenadnas_tanh_and_all_others_the_exact_gelu(name: str):
    """Nothing noticed when one was put for the other: they differ by 5e-4."""
    pairs = {} if name == "hyena" else {"pair_width": 4}
    model = create_model(name, **SMALL[name], **pairs)
    networks = [module for module in model.modules() if isinstance(module, FeedForward)]
    assert networks
    x = torch.linspace(-4, 4, 99, dtype=torch.float64)
    inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3) if name == "hyena" else x / 2**0.5
    expected = x * (1 + (inner.tanh() if name == "hyena" else inner.erf())) / 2
    for network in networks:
        torch.testing.assert_close(network[2](x), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((0, 5), torch.int64, r"tokens \[0, 5\], no sequence; expected at least one\."),
        ((2, 0), torch.int64, r"tokens \[2, 0\], no position; expected at least one\."),
        ((2, 5), torch.float32, r"tokens of torch\.float32; expected torch\.int64"),
        ((2, 5), torch.int32, r"tokens of torch\.int32; expected torch\.int64"),
    ],
)
def test_a_batch_that_is_none_is_refused_in_a_sentence(shape: tuple[int, int], dtype: torch.dtype, message: str):
    """ "MKL FFT error: Inconsistent configuration parameters", "Kernel size can't be greater than actual input size"
    and "Expected tensor for argument #1 'indices' to have one of the following scalar types" was what one was told."""
    inputs = RnaInputs(torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"^network input: got {message}"):
        clean_inputs(inputs, needs_bpp=False)


def test_a_letter_that_training_never_saw_adds_nothing_and_changes_no_other():
    torch.manual_seed(0)
    layer = InputEmbedding(8, use_bpp=False, stem_kernel=0)
    tokens_BL = torch.tensor([[0, 3, 2, 1]])
    mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    before = layer(RnaInputs(tokens_BL, mask_BL))
    for _ in range(2):
        layer.widen(5)
        assert torch.equal(layer(RnaInputs(tokens_BL, mask_BL)), before)
    assert not layer(RnaInputs(torch.full_like(tokens_BL, 4), mask_BL)).any()
    layer.widen(3)
    assert layer.tokens.num_embeddings == 5


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="dropout"):
        Dropout(share)
