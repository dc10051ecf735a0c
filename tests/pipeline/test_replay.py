"""A saved batch breaks again where it broke, and the replay says in which precision it does not."""

import hashlib
import io
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pipeline import cli, replay
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.training.bad_batch import find_bad_batches, load_bad_batch
from tests.faults import nan
from tests.pipeline import tiny
from tests.pipeline.tiny import fit

pytestmark = pytest.mark.usefixtures("parts_model")


def run(paths: Paths, **options: Any) -> dict[str, Any]:
    return replay.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0, **options).facts


def shown(facts: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(replay.describe(facts))
    return console.file.getvalue()


def test_an_overflow_of_fp16_is_found_where_it_was_and_cured_by_bf16_and_fp32(paths):
    fit(paths, nan.config(precision="fp16", max_skips=0, model={"gain": 300.0}))
    facts = run(paths)
    assert (facts["seen"], facts["precision"], facts["weights_step"]) == ("nonfinite_loss", "fp16", facts["step"])
    assert list(facts["passes"]) == ["fp16", "bf16", "fp32"]
    fp16 = facts["passes"]["fp16"]
    assert (fp16["seen"], fp16["phase"], fp16["module"]) == ("nonfinite_loss", "forward", "points.attention_logits")
    assert fp16["activations"][-1].nonfinite > 0
    assert [facts["passes"][name]["seen"] for name in ("bf16", "fp32")] == ["finite", "finite"]
    text = shown(facts)
    assert "fp16 breaks in the forward of points.attention_logits; cured by bf16 and fp32" in text
    assert "points.attention_logits  float16  inf" in " ".join(text.split()).replace(" ", "  ")


def test_the_same_random_numbers_are_drawn(paths):
    """Dropout at 0.5 makes every loss another one; the replay has the one of training to the last bit."""
    config = nan.config(model={"dropout": 0.5})
    point = nan.NanPoint("loss", "", nan.spoil_gradient(math.nan))
    with nan.poked(point.poke):
        fit(paths, config)
    facts = run(paths, precision="fp32")
    assert facts["seen"] == "nonfinite_grad"
    assert facts["passes"]["fp32"]["loss"] == facts["loss"]
    assert facts["passes"]["fp32"]["seen"] == "finite", "the hook that broke it is not part of the network"
    assert "the batch alone does not break this network" in shown(facts)


def test_weights_that_an_update_broke_are_replaced_by_those_of_the_checkpoint(paths):
    with nan.poked(nan.large_learning_rate):
        fit(paths, nan.config())
    facts = run(paths)
    assert (facts["seen"], facts["step"], facts["weights_step"]) == ("nonfinite_weights", 5, 4)
    assert "with the weights of step 4: those of the step itself were lost" in shown(facts)
    assert "does not break this network; the update broke it: a lower train.lr" in shown(facts)


def test_bad_inputs_show_in_their_statistics(paths):
    with nan.poked(nan.spoil_data):
        fit(paths, nan.config())
    facts = run(paths)
    assert facts["inputs"]["weight"]["nonfinite"] > 0
    assert facts["inputs"]["target"]["nonfinite"] == 0
    largest, name = facts["largest_weight"]
    saved = load_bad_batch(Path(facts["file"])).weights
    assert largest == max(float(weight.abs().max()) for weight in saved.values()) == float(saved[name].abs().max())
    assert f"look at the inputs, and at the weights: the largest is {largest:.3g}, in {name}" in shown(facts)
    assert facts["inputs"]["length"][0] >= 20
    assert 0 <= facts["inputs"]["padding"] < 1


def test_nothing_is_written(paths):
    with nan.poked(nan.spoil_data):
        fit(paths, nan.config())
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")}
    run(paths)
    assert {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")} == before


def test_a_batch_is_chosen_by_its_step(paths, bad):
    assert list(bad) == [7, 3]
    assert [run(paths, step=step)["step"] for step in (3, 7, None)] == [3, 7, 7]
    with pytest.raises(ConfigError, match=r"--step 5: no batch of that step .*expected one of 3, 7"):
        run(paths, step=5)
    with pytest.raises(ConfigError, match="got 'fp8'; expected fp16, bf16, fp32"):
        run(paths, precision="fp8")


def test_without_a_bad_batch_it_says_so(paths):
    fit(paths, tiny.config())
    with pytest.raises(DataError, match="no batch was saved"):
        run(paths)


@pytest.fixture
def bad(paths, monkeypatch) -> dict[int, Path]:
    """Two saved batches, of steps 7 and 3."""
    count = itertools.count(1)

    def poison(x_BLD: Tensor) -> Tensor:
        return x_BLD * (math.nan if next(count) in (3, 4, 8, 9) else 1.0)

    monkeypatch.setattr(tiny.Fault, "inject", staticmethod(poison))
    fit(paths, tiny.config())
    monkeypatch.setattr(tiny.Fault, "inject", None)
    return find_bad_batches(paths.fold_dir(tiny.RUN, 0) / "bad")


def flipped(data: bytes) -> bytes:
    """One bit of a tensor's data: torch loads that without a word."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGES = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:-100],
    "flipped": flipped,
    "lengthened": lambda d: d + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_and_the_others_are_named(paths, bad, damage):
    """A flipped bit was replayed as if it had been in training; the sentence ended with "Next: --step."."""
    bad[7].write_bytes(damage(bad[7].read_bytes()))
    with pytest.raises(
        DataError, match=r"damaged: [\d,]+ bytes without their sha256\. Next: make replay STEP=<one of 3>"
    ):
        run(paths)
    assert run(paths, step=3)["step"] == 3
    bad[3].unlink()
    with pytest.raises(DataError, match="Next: make train saves the next one that it meets; remove this file"):
        run(paths)


@pytest.mark.parametrize("content", ["later", {"format": 1, "batches": []}, [1], torch.zeros(3), Path("/x")])
def test_a_file_of_another_program_or_version_is_refused(paths, bad, content):
    """A pickled object could run a program; plain values that are no batch ended in a traceback."""
    buffer = io.BytesIO()
    whole = torch.load(io.BytesIO(bad[7].read_bytes()), weights_only=True) | {"format": 2}
    torch.save(whole if isinstance(content, str) else content, buffer)
    bad[7].write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    with pytest.raises(
        DataError, match=r"no batch as this version saves it \(\w+\)\. Next: make replay STEP=<one of 3>"
    ):
        run(paths)


def test_the_last_one_saved_is_the_first_to_be_replayed_whatever_its_step(bad):
    """After a rollback a lower step comes again, or the same one."""
    for step in (5, 3, 2):
        replace(load_bad_batch(bad[7]), step=step).save(bad[7].parent)
    names = [path.name for path in find_bad_batches(bad[7].parent).values()]
    assert names == [f"{number:04d}-step-{step:08d}.pt" for number, step in ((5, 2), (4, 3), (3, 5), (2, 7))]


def test_stray_files_are_left_alone(paths, bad):
    """It was "ValueError: invalid literal for int() with base 10: 'last'", with a traceback."""
    folder = bad[7].parent
    for name in ("step-last.pt", "notes.txt", "0009-step-12.pt", "step-00000099.pt"):
        (folder / name).write_text("not ours")
    (folder / "0010-step-00000099.pt").mkdir()
    assert run(paths)["step"] == 7
    with pytest.raises(ConfigError, match="expected one of 3, 7"):
        run(paths, step=99)


def test_the_last_batch_is_that_which_was_saved_last_whatever_step_and_clock_say(paths, bad):
    """After a rollback a lower step comes later; by their times a clock set back made the newest the first to go."""
    again = load_bad_batch(bad[3])
    os.utime(bad[7], (4e9, 4e9))
    saved = [again.save(bad[3].parent) for _ in range(4)]
    assert find_bad_batches(bad[3].parent) == {3: saved[-1]}
    assert sorted(bad[3].parent.iterdir()) == saved


def test_the_verb_says_what_is_missing(tmp_path, capsys):
    assert cli.run_verb(["replay", "--artifacts", str(tmp_path), "--model", "hyena"]) == DataError.exit_code
    assert "no batch was saved" in capsys.readouterr().err
