"""Profiles in any units: a network learns deviations, and all that is told of it is in the units of the file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.interface import RnaInputs, RnaOutputs
from pipeline import own_file
from pipeline.batch import RnaBatch
from pipeline.cli import run_verb
from pipeline.competitions import competition_of, get_competition
from pipeline.config import TrainConfig
from pipeline.inference import as_trained
from pipeline.labels import Numbers
from pipeline.notebook import Trained
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore, _sealed
from pipeline.training.losses import MaskedError, position_values, training_loss

Rows = Sequence[dict[str, Any]]
RUN = "tiny_drsn+units.sim80_k2"
MODEL = ("--model", "tiny_drsn", "--split", "sim80_k2", "--tag", "units", "--fold", "0")
UNITS = Numbers(("a", "b"), (0, 0), (1.0, 1e3), (0.5, 250.0), "ACGU")


def make_rows(count: int = 40, *, seed: int = 0) -> Rows:
    """Sequences with two targets: A has much of the first, G of the second; a tenth was not measured."""
    rng, rows = np.random.default_rng(seed), list[dict[str, Any]]()
    for place in range(count):
        letters = rng.choice(list("ACGU"), int(rng.integers(12, 21)))
        row: dict[str, Any] = {"id": f"s{place:03d}", "sequence": "".join(letters)}
        for name, letter in (("shape", "A"), ("dms", "G")):
            values = np.where(letters == letter, 0.9, 0.2) + rng.normal(0, 0.05, len(letters))
            row[name] = [None if rng.random() < 0.1 else float(np.float32(value)) for value in values]
        rows.append(row)
    return rows


def changed(rows: Rows, change: Callable[[float], float], *names: str) -> Rows:
    """The rows with every value of some targets changed."""
    return [
        row | {name: [None if value is None else change(value) for value in row[name]] for name in names}
        for row in rows
    ]


def verb(paths: Paths, name: str, *words: str) -> int:
    return run_verb([name, "--comp", paths.comp, "--artifacts", str(paths.root), *words])


def prepared(root: Path, rows: Rows, *columns: str, test: Rows = ()) -> Paths:
    """Clean and fold tables of some rows."""
    raw, paths = root / "raw", Paths(comp="profiles-mine", root=root / "artifacts")
    raw.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(raw / "train.parquet")
    if test:
        pl.DataFrame(test).select("id", "sequence").write_csv(raw / "test.csv")
    (raw / "columns.toml").write_text("\n".join(columns))
    assert verb(paths, "data", "--raw", str(raw)) == 0
    assert verb(paths, "folds", "--split", "sim80_k2") == 0
    return paths


def trained(paths: Paths, *, epochs: int = 2, steps: int | None = None) -> dict[str, Any]:
    """Fold 0, as far as it is to be trained; its newest meta data."""
    limit = ("--max-steps", str(steps)) if steps else ()
    code = verb(paths, "train", *MODEL, "--set", f"train.epochs={epochs}", *limit)
    assert code == (75 if steps else 0)
    meta = CheckpointStore(paths.fold_dir(RUN, 0) / "checkpoints").newest_meta()
    assert meta is not None
    return meta


def predicted(paths: Paths) -> dict[str, np.ndarray]:
    """All out-of-fold values of each target, by sequence."""
    assert verb(paths, "predict", *MODEL) == 0
    table = pl.read_parquet(paths.oof(RUN, 0)).sort("sequence_id")
    return {name: table[name].explode().to_numpy() for name in ("shape", "dms")}


@pytest.mark.parametrize(
    ("unit", "shift", "tolerance"),
    [(2.0**-17, 0.0, 0.0), (2.0**10, 0.0, 0.0), (1e3, 300.0, 1e-3), (1e-5, -2e-6, 1e-3)],
)
def test_another_unit_changes_the_predictions_by_that_unit_and_nothing_else(
    unit: float, shift: float, tolerance: float, tmp_path: Path
) -> None:
    """Powers of two to the bit."""
    here = prepared(tmp_path / "a", make_rows())
    there = prepared(tmp_path / "b", changed(make_rows(), lambda value: value * unit + shift, "shape", "dms"))
    plain, other = trained(here), trained(there)
    assert other["progress"]["best_metric"] == pytest.approx(plain["progress"]["best_metric"] * unit, rel=1e-3)
    before, after = predicted(here), predicted(there)
    for name in before:
        np.testing.assert_allclose((after[name] - shift) / unit, before[name], rtol=0, atol=tolerance)


def test_targets_a_thousand_times_apart_are_both_learned(tmp_path: Path) -> None:
    """As they are, the larger one had 1.76 times the error of a constant."""
    rows = changed(make_rows(80), lambda value: 1e3 * value, "dms")
    paths = prepared(tmp_path, rows)
    trained(paths, epochs=15)
    found = predicted(paths)
    names = pl.read_parquet(paths.oof(RUN, 0))["sequence_id"].sort().to_list()
    truth = {row["id"]: row for row in rows}
    for name, values_T in found.items():
        true_T = np.array([value for each in names for value in truth[each][name]], dtype=np.float64)
        floor = np.nanmean(np.abs(true_T - np.nanmedian(true_T)))
        assert np.nanmean(np.abs(values_T - true_T)) < 0.5 * floor, name


def test_a_fold_that_is_held_out_and_a_wild_value_do_not_say_what_the_unit_is(tmp_path: Path) -> None:
    rows = make_rows(160)
    paths = prepared(tmp_path / "a", rows)
    units = trained(paths, steps=1)["units"]
    folds = pl.read_parquet(paths.fold_table("sim80_k2"))
    held_out = set(folds.filter(pl.col("fold") == 0)["sequence_id"])
    for kept, same in ((held_out, True), ({row["id"] for row in rows} - held_out, False)):
        louder = [row if row["id"] not in kept else changed([row], lambda v: 50 * v, "shape")[0] for row in rows]
        found = trained(prepared(tmp_path / str(same), louder), steps=1)["units"]
        assert (found == units) is same
    wild = next(k for k, row in enumerate(rows) if row["id"] not in held_out and row["shape"][0] is not None)
    rows[wild]["shape"][0] = 1e6
    found = trained(prepared(tmp_path / "wild", rows), steps=1)["units"]
    assert found["deviations"] == pytest.approx(units["deviations"], rel=0.01)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for name, stops in (("whole", ()), ("resumed", (1, 2))):
        paths = prepared(tmp_path / name, changed(make_rows(), lambda value: 1e3 * value, "dms"))
        for step in stops:
            trained(paths, epochs=3, steps=step)
        meta = trained(paths, epochs=3)
        ends.append((meta["units"], meta["files"]["model.safetensors"], meta["progress"]["best_metric"]))
    assert ends[0] == ends[1]


def test_a_checkpoint_from_before_units_predicts_and_goes_on_as_it_did(tmp_path: Path) -> None:
    paths = prepared(tmp_path, make_rows())
    units = trained(paths, steps=2)["units"]
    now = predicted(paths)
    for path in paths.fold_dir(RUN, 0).glob("checkpoints/step-*/meta.json"):
        meta = json.loads(path.read_text())
        del meta["units"], meta["sha256"]
        path.write_text(json.dumps(_sealed(meta)))
    before = predicted(paths)
    for name, mean, deviation in zip(units["names"], units["means"], units["deviations"], strict=True):
        np.testing.assert_allclose(before[name] * deviation + mean, now[name], atol=1e-6)
    assert "units" not in trained(paths)


def test_a_notebook_and_a_file_of_ones_own_are_predicted_in_the_units_of_the_data(tmp_path: Path) -> None:
    rows = changed(make_rows(), lambda value: 1e3 * value, "dms")
    paths = prepared(tmp_path, rows, "range = [0, 500]")
    assert trained(paths)["units"]["means"][1] < 500  # of clipped values
    expected = predicted(paths)["dms"]
    names = pl.read_parquet(paths.oof(RUN, 0))["sequence_id"].sort().to_list()
    texts = {row["id"]: row["sequence"] for row in rows}
    values = Trained(paths.fold_dir(RUN, 0)).predict([texts[name] for name in names])
    np.testing.assert_allclose(np.concatenate(values)[:, 1], expected, rtol=1e-5)
    source = tmp_path / "mine.csv"
    pl.DataFrame({"id": names, "sequence": [texts[name] for name in names]}).write_csv(source)
    own = own_file.predict_run(source, competition=competition_of(paths), paths=paths, run=RUN, fold=0).own
    found = pl.read_parquet(own.test(RUN, 0)).sort("sequence_id")["dms"].explode().to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pseudo_labels_teach_in_the_units_of_the_data_and_change_no_unit(tmp_path: Path) -> None:
    loud = changed(make_rows(60), lambda value: 1e3 * value + 5e3, "shape", "dms")
    paths = prepared(tmp_path, loud[:40], test=loud[40:])
    teacher = trained(paths, epochs=8)
    predicted(paths)
    pupil = ("train", *MODEL[:4], "--tag", "pupil", "--fold", "0", "--set", "train.epochs=8")
    assert verb(paths, *pupil, "--set", f'data.pseudo="{RUN}"') == 0
    found = CheckpointStore(paths.fold_dir(RUN.replace("units", "pupil"), 0) / "checkpoints").newest_meta()
    assert found is not None
    assert found["units"] == teacher["units"]
    assert found["progress"]["best_metric"] < 1.1 * teacher["progress"]["best_metric"]


def batch(target_BLC: torch.Tensor, weight_BC: torch.Tensor) -> RnaBatch:
    count, length = target_BLC.shape[:2]
    mask_BL = torch.ones(count, length, dtype=torch.bool)
    inputs = RnaInputs(torch.zeros(count, length, dtype=torch.long), mask_BL)
    return RnaBatch(ids=("x",) * count, inputs=inputs, target_BLC=target_BLC, weight_BC=weight_BC)


def test_the_loss_is_the_error_in_deviations_of_what_is_clipped_in_the_files_units() -> None:
    target_BLC = torch.tensor([[[0.0, 500.0], [float("nan"), 2000.0]]])
    predicted_BLC = torch.tensor([[[0.5, 1.0], [9.0, 1.0]]])
    given = batch(target_BLC, torch.tensor([[2.0, 1.0]]))
    loss = MaskedError((0.5, 1500.0), units=UNITS)
    # (0.5 - 1) / 0.5 = -1; (500 - 1000) / 250 = -2; (1500 - 1000) / 250 = 2
    assert loss.total(RnaOutputs(predicted_BLC), given).item() == pytest.approx(2 * 1.5 + 3.0 + 1.0)
    assert loss.weight(given) == 4.0


def test_competitions_of_kaggle_have_no_units_and_keep_every_bit() -> None:
    values_BLC = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    for name in ("ribonanza", "openvaccine"):
        competition = as_trained(get_competition(name), {})
        assert competition.units is None
        loss = MaskedError(competition.target_range, competition.error_power)
        assert training_loss(competition, TrainConfig()) == loss
    assert position_values(values_BLC, None) is values_BLC
