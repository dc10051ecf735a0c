"""A saved batch breaks again where it broke, and the replay says in which precision it does not."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from models.registry import register_model
from pipeline import cli, replay, train
from pipeline.errors import ConfigError, DataError, DivergedError
from pipeline.paths import Paths
from tests.faults import nan
from tests.faults.network import PartsModel
from tests.pipeline import tiny


@pytest.fixture
def paths(tmp_path: Path, monkeypatch) -> Paths:
    tiny.register(monkeypatch)
    register_model(PartsModel)
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


def fit(paths: Paths, config: Any) -> Any:
    return train.run(config, competition=tiny.TINY, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)


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
    assert "cured by no precision that was tried" in shown(facts)
    assert facts["inputs"]["length"][0] >= 20
    assert 0 <= facts["inputs"]["padding"] < 1


def test_nothing_is_written(paths):
    with nan.poked(nan.spoil_data):
        fit(paths, nan.config())
    before = {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")}
    run(paths)
    assert {path: path.stat().st_mtime_ns for path in paths.root.rglob("*")} == before


def test_a_batch_is_chosen_by_its_step(paths, monkeypatch):
    count = itertools.count(1)

    def bad(x_BLD: Tensor) -> Tensor:
        return x_BLD * (math.nan if next(count) in (3, 4, 8, 9) else 1.0)

    monkeypatch.setattr(tiny.Fault, "inject", staticmethod(bad))
    fit(paths, tiny.config())
    monkeypatch.setattr(tiny.Fault, "inject", None)
    assert [run(paths, step=step)["step"] for step in (3, 7, None)] == [3, 7, 7]
    with pytest.raises(ConfigError, match=r"--step 5: no batch of that step .*expected one of 3, 7"):
        run(paths, step=5)
    with pytest.raises(ConfigError, match="got 'fp8'; expected fp16, bf16, fp32"):
        run(paths, precision="fp8")


def test_without_a_bad_batch_it_says_so(paths):
    fit(paths, tiny.config())
    with pytest.raises(DataError, match="no batch was saved"):
        run(paths)


def test_a_damaged_file_is_refused(paths, monkeypatch):
    monkeypatch.setattr(tiny.Fault, "inject", staticmethod(lambda x_BLD: x_BLD * math.nan))
    with pytest.raises(DivergedError, match="make replay"):
        fit(paths, tiny.config(max_skips=0, max_rollbacks=0))
    (path,) = (paths.fold_dir(tiny.RUN, 0) / "bad").iterdir()
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], torch.zeros(3).numpy().tobytes()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            run(paths)


def test_the_verb_says_what_is_missing(tmp_path, capsys):
    assert cli.run_verb(["replay", "--artifacts", str(tmp_path), "--model", "hyena"]) == DataError.exit_code
    assert "no batch was saved" in capsys.readouterr().err
