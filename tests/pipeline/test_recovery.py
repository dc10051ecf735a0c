"""What the guard orders is done: spikes, anomaly mode, smaller micro-batches, saved batches, a device that is gone."""

import itertools
import math
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import network, runlog
from pipeline.config import RunConfig
from pipeline.errors import DivergedError, LostDeviceError, StoppedError, StorageError
from pipeline.network import build_model
from pipeline.paths import Paths
from pipeline.training.bad_batch import BadBatch, find_bad_batches, load_bad_batch
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.failures import is_anomaly, is_device_lost, is_out_of_memory
from pipeline.training.guard import classify, is_spike, lower_scale, remember
from pipeline.training.loop import Trainer
from pipeline.training.precision import Precision
from pipeline.training.recovery import input_statistics
from pipeline.training.state import TrainingState
from tests.faults import nan
from tests.pipeline import tiny
from tests.pipeline.tiny import at_calls, fit, rows_of

pytestmark = pytest.mark.usefixtures("parts_model")

WHOLE = f"whole.{tiny.SPLIT}"


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(runlog, "warn", lines.append)
    return lines


def weights_of(paths: Paths, run: str = tiny.RUN) -> dict[str, Tensor]:
    last = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest()
    assert last is not None
    return {**last.weights, **{f"training.{name}": tensor for name, tensor in last.training.items()}}


# --- fp16 that overflows, with and without torch's anomaly mode ---


@pytest.fixture(params=[False, True], ids=["", "anomaly mode"])
def anomaly_mode(request):
    with torch.autograd.set_detect_anomaly(request.param):
        yield request.param


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_network_that_overflows_under_fp16_is_trained_to_its_end(paths, anomaly_mode):
    """NaN from fp16 in attention and in an outer product, dropout on: anomaly mode only said so and stopped."""
    config = nan.config(precision="fp16", max_skips=2, model={"gain": 300.0, "dropout": 0.2})
    report = fit(paths, config)
    assert report.facts["guard"]["rollbacks"] == 1
    assert [row["answer"] for row in rows_of(paths, "guard")] == ["skip", "skip", "roll_back"]
    assert {row["module"] for row in rows_of(paths, "guard")} == {"points.attention_logits"}
    assert {row["phase"] for row in rows_of(paths, "guard")} == {"forward"}
    assert rows_of(paths, "rollback")[0]["precision"] == "fp32"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_of(paths).values())
    assert len(rows_of(paths, "done")) == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_validation_that_overflows_in_half_precision_alone_is_made_one_rung_down(paths, monkeypatch, said, precision):
    """The run ended with exit code 4 and "train again with train.precision = 'fp32'", which a run cannot change."""

    def overflow(fault: tiny.Fault, x_BLD: Tensor) -> Tensor:
        return x_BLD if fault.training or not torch.is_autocast_enabled("cpu") else x_BLD * math.inf

    monkeypatch.setattr(tiny.Fault, "forward", overflow)
    report = fit(paths, tiny.config(precision=precision, epochs=2))
    assert report.facts["guard"]["rollbacks"] == 1
    (row,) = rows_of(paths, "rollback")
    assert (row["before"], row["precision"], row["to_step"]) == (precision, "fp32", 3)
    assert f"step 4: in {precision}, validation: a prediction for " in said[0]
    assert " is not finite; back to step 3, fp32" in said[0]
    assert len(rows_of(paths, "epoch")) == 2


def test_a_validation_that_is_not_finite_in_single_precision_ends_the_run(paths, monkeypatch):
    """It left no ``diverged.md``, also where every batch of an epoch of fewer than ``max_skips`` had been left out."""
    monkeypatch.setattr(tiny.Fault, "forward", lambda fault, x_BLD: x_BLD if fault.training else x_BLD * math.inf)
    with pytest.raises(DivergedError, match=r"is not finite. Next: train again with a lower train.lr"):
        fit(paths, tiny.config())
    assert not rows_of(paths, "rollback")
    assert "is not finite. Next: train again" in (paths.fold_dir(tiny.RUN, 0) / "diverged.md").read_text()


def test_a_finished_run_with_more_epochs_that_is_rolled_back_trains_them(paths, monkeypatch):
    """Back at the checkpoint that said it was finished, it ended there as if it had trained the second epoch, too."""
    fit(paths, tiny.config(precision="bf16", epochs=1, save_every=0))

    def overflow(fault: tiny.Fault, x_BLD: Tensor) -> Tensor:
        return x_BLD if fault.training or not torch.is_autocast_enabled("cpu") else x_BLD * math.inf

    monkeypatch.setattr(tiny.Fault, "forward", overflow)
    report = fit(paths, tiny.config(precision="bf16", epochs=2, save_every=0), allow_changes=True)
    assert [row["to_step"] for row in rows_of(paths, "rollback")] == [4]
    assert (report.facts["steps"], report.facts["epochs"]) == (8, 2)


@pytest.mark.filterwarnings("ignore:Error detected in")
@pytest.mark.parametrize(("precision", "seen"), [("fp16", "scaler_overflow"), ("bf16", "nonfinite_grad")])
def test_a_backward_pass_that_breaks_is_met_the_same_with_anomaly_mode(paths, inject, anomaly_mode, precision, seen):
    """Was: RuntimeError: Function 'BrokenBackward' returned nan values in its 0th output."""
    count = itertools.count(1)

    def broken(x_BLD: Tensor) -> Tensor:
        return Broken.apply(x_BLD) if next(count) == 3 else x_BLD

    inject(broken)
    report = fit(paths, tiny.config(precision=precision))
    assert [row["seen"] for row in rows_of(paths, "guard")] == [seen]
    assert report.facts["updates"] == 11


class Broken(torch.autograd.Function):
    """Identity with a gradient of NaN."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


def test_a_loss_scale_that_is_itself_out_of_range_is_set_back():
    """Was: an infinite scale was halved to the end of the run, no update made and no alarm raised."""
    assert [lower_scale(scale) for scale in (65536.0, 4.0, math.inf, math.nan, 1e38)] == [32768, 2, 65536, 65536, 65536]
    assert classify(0.3, math.nan, scale=math.nan) == classify(0.3, math.inf, scale=math.inf) == "scaler_overflow"
    assert classify(0.3, math.nan, scale=1.0) == "nonfinite_grad"


# --- loss spikes ---


def test_a_spike_is_far_above_the_median_in_units_of_the_usual_spread(rng):
    recent = list(rng.normal(1.0, 0.1, 100))
    assert not is_spike(1.4, recent, threshold=10)
    assert is_spike(2.5, recent, threshold=10)
    assert not is_spike(0.0, recent, threshold=10), "a loss may fall"
    assert not is_spike(2.5, recent, threshold=0), "0 is off"
    assert not is_spike(2.5, recent[:20], threshold=10), "too few to judge by"
    assert not is_spike(1.0005, [1.0] * 100, threshold=0.5), "the ripple of a flat curve is none"


def test_nothing_that_is_not_finite_enters_the_statistics():
    """A NaN in the window would make median and spread NaN, and no loss a spike any more."""
    recent: list[float] = []
    for loss in [1.0, math.nan, math.inf, 1.1] * 200:
        remember(loss, recent)
    assert set(recent) == {1.0, 1.1}
    assert len(recent) == 128
    assert is_spike(5.0, recent, threshold=10)


def spike_config(**changes: Any) -> RunConfig:
    """48 steps at a constant rate, so that the window of losses is full enough in time."""
    return tiny.config(**{"epochs": 12, "spike_threshold": 10.0, "max_skips": 2, "lr": 1e-3, **changes})


def test_a_spike_is_skipped_and_ordinary_losses_never_are(paths, inject):
    inject(at_calls(lambda x_BLD: x_BLD * 1e4, {40}))
    report = fit(paths, spike_config())
    assert report.facts["guard"]["skips"] == 1
    (row,) = rows_of(paths, "guard")
    assert (row["seen"], row["answer"], row["step"]) == ("loss_spike", "skip", 40)
    assert row["loss"] > 10


def test_a_run_of_spikes_rolls_back_like_a_run_of_nans(paths, inject, said):
    inject(at_calls(lambda x_BLD: x_BLD * 1e4, {40, 41, 42}))
    report = fit(paths, spike_config(precision="bf16"))
    assert report.facts["guard"] == {"overflows": 0, "skips": 2, "skips_in_a_row": 0, "rollbacks": 1}
    assert [row["answer"] for row in rows_of(paths, "guard")] == ["skip", "skip", "roll_back"]
    assert rows_of(paths, "rollback")[0]["precision"] == "fp32"
    assert "loss spike (bf16), loss" in said[0]


def test_spikes_are_judged_the_same_after_a_resume(paths, inject):
    def bad_for_some(x_BLD: Tensor) -> Tensor:
        return x_BLD * (1e4 if x_BLD.shape[1] == 37 else 1.0)

    inject(bad_for_some)
    config = spike_config(batch_size=2, epochs=3, max_skips=9, data={"length_bucket": 0})
    whole = fit(paths, config, run=WHOLE)
    assert whole.facts["guard"]["skips"] > 0
    finished = False
    while not finished:
        try:
            fit(paths, config, max_steps=11)
            finished = True
        except StoppedError:
            pass
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, WHOLE)


def test_the_detector_is_off_by_default_and_keeps_no_losses(paths, inject):
    inject(at_calls(lambda x_BLD: x_BLD * 1e4, {40}))
    assert fit(paths, spike_config(spike_threshold=0.0)).facts["guard"]["skips"] == 0
    meta = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()
    assert meta["progress"]["recent_losses"] == []


def test_what_a_rollback_took_back_stays_in_the_log_of_a_resumed_run(paths, inject):
    """Stopped at step 5 after a rollback from step 6, a run forgot the batch of step 6, which it never takes again."""
    count = itertools.count(1)

    def fault(x_BLD: Tensor) -> Tensor:
        number = next(count)
        if number == 8:  # after the NaN of step 6 and its trace: step 5 again
            os.kill(os.getpid(), signal.SIGTERM)
        return x_BLD * (math.nan if number in (6, 7) else 1.0)

    inject(fault)
    with pytest.raises(StoppedError, match="stopped at step 5"):
        fit(paths, tiny.config(max_skips=0))
    inject(None)
    report = fit(paths, tiny.config(max_skips=0))
    assert report.facts["guard"]["rollbacks"] == 1
    assert [(row["step"], row["answer"]) for row in rows_of(paths, "guard")] == [(6, "roll_back")]
    (rollback,) = rows_of(paths, "rollback")
    assert (rollback["step"], rollback["to_step"], rollback["before"], rollback["precision"]) == (6, 4, "fp32", "fp32")
    assert sorted({row["step"] for row in rows_of(paths, "step")}) == [step for step in range(1, 13) if step != 6]


@pytest.mark.parametrize("call", [3, 4], ids=["the end of an epoch", "the stop"])
def test_a_run_that_stops_right_after_a_rollback_keeps_it(paths, inject, monkeypatch, call):
    """Was "the state is saved", in bf16 and with no rollback behind it: the run that went on made both again."""
    good, calls = TrainingState.nonfinite, itertools.count(1)

    def nonfinite(state: TrainingState) -> list[str]:  # asked at steps 0, 3, 4 (the end of the epoch) and at the stop
        number = next(calls)
        if number == 3 == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return ["a moment"] if number == call else good(state)

    monkeypatch.setattr(TrainingState, "nonfinite", nonfinite)
    inject(at_calls(lambda x_BLD: os.kill(os.getpid(), signal.SIGTERM) or x_BLD, {5} if call == 4 else {}))
    with pytest.raises(StoppedError, match=rf"stopped at step {call} of 12 \(SIGTERM\); the state is saved"):
        fit(paths, tiny.config(precision="bf16"))
    progress = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()["progress"]
    assert (progress["guard"]["rollbacks"], progress["precision"]) == (1, "fp32")


@pytest.mark.parametrize(("card", "expected"), [((8, 0), "bf16"), ((7, 5), "fp32")])
def test_a_rung_of_bf16_is_not_taken_over_where_it_is_emulated(paths, monkeypatch, card, expected):
    """A run of an A100 that was rolled back from fp16 and goes on with a T4."""
    fit(paths, run=WHOLE)
    saved = CheckpointStore(paths.fold_dir(WHOLE, 0) / "checkpoints").load_newest()
    saved.state["progress"]["precision"] = "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    state = TrainingState(
        build_model(tiny.config().model, tiny.TINY),
        settings=tiny.config().train,
        device=torch.device("cpu"),
        precision=Precision("fp32", ""),
    )
    state.device = torch.device("cuda")
    monkeypatch.setattr(state, "set_random", lambda _: None)
    state.restore(saved)
    assert state.precision.name == expected


# --- memory ---


def exhausted_above(size: int, error: BaseException) -> Callable[[Tensor], Tensor]:
    """Memory for so many sequences at a time, from the third pass on."""
    count = itertools.count(1)

    def fault(x_BLD: Tensor) -> Tensor:
        if x_BLD.shape[0] > size and next(count) > 2:
            raise error
        return x_BLD

    return fault


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_micro_batches_are_halved_until_they_fit_and_the_steps_stay_the_same(paths, inject, said, error):
    config = {"model": {"dropout": 0.0}, "batch_size": 8}
    fit(paths, tiny.config(**config), run=WHOLE)
    inject(exhausted_above(2, error))
    report = fit(paths, tiny.config(**config, micro_batch="auto"))
    assert report.facts["updates"] == 12
    assert [(row["step"], row["before"], row["now"]) for row in rows_of(paths, "micro_batch")] == [(3, 8, 4), (3, 4, 2)]
    assert (
        "out of memory with 8 sequences at a time; goes on with micro-batches of 4, the optimiser's batches" in said[0]
    )
    losses = {run: [row["loss"] for row in rows_of(paths, "step", run)] for run in (tiny.RUN, WHOLE)}
    np.testing.assert_allclose(losses[tiny.RUN], losses[WHOLE], atol=1e-5)
    for name, tensor in weights_of(paths, WHOLE).items():
        torch.testing.assert_close(weights_of(paths)[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_resumed_run_remembers_how_small_its_micro_batches_have_to_be(paths, inject):
    inject(exhausted_above(4, MemoryError()))
    with pytest.raises(StoppedError):
        fit(paths, tiny.config(micro_batch="auto"), max_steps=5)
    inject(exhausted_above(4, AssertionError("too large a batch was tried again")))
    fit(paths, tiny.config(micro_batch="auto"))
    assert len(rows_of(paths, "micro_batch")) == 1


def test_what_does_not_fit_alone_is_said_and_the_state_saved(paths, inject):
    inject(exhausted_above(0, MemoryError()))
    with pytest.raises(
        StorageError, match=r"with micro-batches of 1 sequence; the state is saved\. Next: try a smaller net"
    ):
        fit(paths, tiny.config(micro_batch="auto"))
    assert [row["now"] for row in rows_of(paths, "micro_batch")] == [4, 2, 1]


def test_the_state_is_saved_without_the_tensors_that_filled_the_memory(paths, inject, monkeypatch):
    """What the error held, all activations, was there while the weights were looked at, which takes memory, too."""
    made: list[weakref.ref[Tensor]] = []

    def fault(x_BLD: Tensor) -> Tensor:
        made.append(weakref.ref(x_BLD))
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x_BLD

    inject(fault)
    kept, nonfinite = [], TrainingState.nonfinite
    monkeypatch.setattr(TrainingState, "nonfinite", lambda state: kept.extend(x() for x in made) or nonfinite(state))
    with pytest.raises(StorageError, match=r"at step 2 .* the state is saved"):
        fit(paths)
    assert kept == [None, None]


def test_validation_that_does_not_fit_is_halved_too(paths, monkeypatch):
    evaluate, sizes = Trainer._evaluate, []

    def small(trainer: Trainer, *, micro_batch: int) -> dict[str, float]:
        sizes.append(micro_batch)
        if micro_batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(trainer, micro_batch=micro_batch)

    monkeypatch.setattr(Trainer, "_evaluate", small)
    fit(paths, tiny.config(micro_batch="auto", epochs=2))
    assert sizes == [8, 4, 4]


def test_memory_that_runs_out_in_the_search_for_a_nan_does_not_end_the_run(paths, inject):
    count = itertools.count(1)

    def fault(x_BLD: Tensor) -> Tensor:
        number = next(count)
        if number == 4:  # the replay of step 3
            raise MemoryError
        return x_BLD * (math.nan if number == 3 else 1.0)

    inject(fault)
    assert fit(paths).facts["guard"]["skips"] == 1
    assert rows_of(paths, "guard")[0]["phase"] == "unknown"


# --- a device that is gone ---

LOST = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:40])
def test_a_lost_device_ends_the_run_and_nothing_is_saved_from_it(paths, inject, monkeypatch, error):
    fit(paths, run=WHOLE)
    count, saves = itertools.count(1), []
    save = CheckpointStore.save
    monkeypatch.setattr(CheckpointStore, "save", lambda *args, **given: saves.append(args[1]) or save(*args, **given))

    def fault(x_BLD: Tensor) -> Tensor:
        if next(count) == 6:
            saves.clear()
            raise error
        return x_BLD

    inject(fault)
    with pytest.raises(
        LostDeviceError, match=r"failed at step 6 \(.*\); .* the checkpoint of step 4 is intact. Next: the sa"
    ):
        fit(paths)
    assert saves == []
    fit(paths)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, WHOLE)


@pytest.mark.parametrize(
    "word", ["CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "CUFFT_INTERNAL_ERROR"]
)
def test_a_library_that_cannot_begin_lacks_memory_unless_the_device_failed_before(monkeypatch, word):
    """The first product after a device-side assertion was told as out of memory, and tried again in smaller parts."""

    def silent() -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert is_out_of_memory(RuntimeError(word))
    monkeypatch.setattr(torch.cuda, "synchronize", silent)
    assert not is_out_of_memory(RuntimeError(word))
    assert is_device_lost(RuntimeError(word))


def test_errors_are_told_apart_by_what_can_be_done():
    assert not any(is_out_of_memory(error) for error in LOST)
    assert not is_device_lost(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_device_lost(RuntimeError("CUDA error: out of memory"))
    for word in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",  # was a lost device: reruns fail again
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",  # likewise
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "Triton Error [CUDA]: out of memory",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "cuFFT error: CUFFT_INTERNAL_ERROR",  # a transform's plan; ended with a traceback, as the next two
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you keep seeing",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgesvdj_bufferSize(handle, jobz)`",
        "GET was unable to find an engine to execute this computation",  # a convolution's; ended with a traceback
        "Unable to find a valid cuDNN algorithm to run convolution",
    ):
        assert is_out_of_memory(RuntimeError(word))
        assert not is_device_lost(RuntimeError(word))
    for word in ("cuFFT error: CUFFT_EXEC_FAILED", "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling"):
        assert is_device_lost(RuntimeError(word))
    assert not is_device_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_device_lost(ValueError("CUDA error"))
    assert is_anomaly(RuntimeError("Function 'MulBackward0' returned nan values in its 0th output."))
    assert not is_anomaly(RuntimeError("element 0 of tensors does not require grad"))


# --- saved batches ---


def test_the_newest_bad_batches_are_saved_with_all_that_their_step_needs(paths, inject):
    inject(at_calls(lambda x_BLD: x_BLD * math.nan, {3, 4, 7, 8, 9, 10, 11, 12, 13, 14}))
    fit(paths, tiny.config(micro_batch=5))
    folder = paths.fold_dir(tiny.RUN, 0) / "bad"
    rows = rows_of(paths, "guard")
    assert [row["saved"] for row in rows][-1] in {path.name for path in folder.iterdir()}
    assert len(list(folder.iterdir())) <= 4
    bad = load_bad_batch(next(iter(find_bad_batches(folder).values())))
    assert (bad.seen, bad.step, bad.precision) == ("nonfinite_loss", rows[-1]["step"], "fp32")
    assert [name for batch in bad.batches for name in batch.ids] == rows[-1]["ids"]
    assert bad.meta["config"]["train"]["micro_batch"] == 5
    assert set(bad.weights) == set(tiny.TinyModel().state_dict())


def test_inputs_of_a_bad_batch_are_described_over_all_its_micro_batches():
    def batch(length: int, *target: float) -> Any:
        mask_BL = torch.arange(9) < torch.tensor([[2], [length]])
        return SimpleNamespace(inputs=SimpleNamespace(mask_BL=mask_BL), target_BLC=torch.tensor(target))

    batches = [batch(5, 1.0, -3.0, math.nan), batch(7, math.nan), batch(6, 2.0)]
    assert input_statistics(batches) == {"longest": 7, "largest_target": 3.0}


def test_a_batch_that_cannot_be_saved_does_not_end_the_run(paths, inject, said, monkeypatch):
    def full(_self: BadBatch, folder: Path) -> Path:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(BadBatch, "save", full)
    inject(at_calls(lambda x_BLD: x_BLD * math.nan, {3, 4}))
    assert fit(paths).facts["guard"]["skips"] == 1
    assert any("could not be saved for replay" in line for line in said)


def test_a_state_that_is_not_finite_before_anything_was_saved_is_refused(paths, monkeypatch):
    make = network.create_model

    def spoilt(*args: Any, **given: Any) -> Any:
        model = make(*args, **given)
        with torch.no_grad():
            model.heads["per_base"].bias[0] = math.nan
        return model

    monkeypatch.setattr(network, "create_model", spoilt)
    with pytest.raises(DivergedError, match=r"step 0: heads\.per_base\.bias is not finite and is not saved; 0 batch"):
        fit(paths)
