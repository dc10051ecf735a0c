"""Passes that teach nothing: structures without a pair to learn from, and what a sharded process fills in with."""

import pytest
import torch

from models.interface import RnaInputs
from models.registry import create_model
from pipeline.batch import RnaBatch
from pipeline.config import TrainConfig, load_config
from pipeline.training.losses import training_loss
from pipeline.training.precision import Precision
from pipeline.training.step import _nothing_of, _one_nucleotide, forward_backward
from tests.pipeline import tiny

CPU = torch.device("cpu")


def test_structures_without_a_resolved_pair_are_a_pass_with_gradients_of_zero():
    """Was: "element 0 of tensors does not require grad", and the end of the run."""
    model = tiny.TinyModel(num_channels=0, num_distance_bins=4, coordinates=True).train()
    inputs = RnaInputs(torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.bool))
    batch = RnaBatch(("a",), inputs, torch.full((1, 9, 3), torch.nan), torch.ones(1, 3))
    loss, precision = training_loss(tiny.TINY3D, TrainConfig()), Precision("fp32", "")
    how = {"precision": precision, "scaler": precision.scaler(CPU), "device": CPU}
    assert forward_backward(model, loss, [batch], weight=loss.weight(batch), **how) == (0.0, True)
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["drsn", "hyena", "ribonanza_mamba", "transformer_sepconv"])
def test_a_pass_that_counts_for_nothing_gives_every_parameter_a_gradient_of_zero(name: str):
    config = load_config(f"tiny_{name}").model
    model = create_model(config.name, **{**config.kwargs, "use_bpp": True}).train()
    _nothing_of(model(_one_nucleotide(model, CPU))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key
