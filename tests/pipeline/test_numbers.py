"""Measured numbers of whole sequences: their loss and metric, and a network that is trained on them and predicts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from models.interface import RnaInputs, RnaModel, RnaOutputs
from pipeline import bpp, embed, plan, predict, preprocess, replay, train
from pipeline.batch import RnaBatch
from pipeline.competitions import competition_of, get_competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError, DivergedError, StoppedError
from pipeline.labels import Numbers, read_numbers
from pipeline.notebook import Trained
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from pipeline.stage import Report
from pipeline.training.checkpoint import load_weights, read_meta
from pipeline.training.distributed import ALONE
from pipeline.training.losses import NumberLoss, label_values, training_loss
from pipeline.training.metrics import make_meter
from pipeline.training.settings import refuse_idle
from tests.pipeline import labelled_sets

NUMBERS = Numbers(("gc", "tail"), (3, 2), (55.0, 1e-3), (2.5, 0.0), "ACGU")
NAMES = list(NUMBERS.names)


def make_batch(rng: np.random.Generator, *, count: int) -> tuple[RnaBatch, RnaOutputs]:
    """Numbers with gaps and weights, and outputs for them."""
    number_BC = rng.normal(NUMBERS.means, 2.0, (count, 2))
    number_BC[rng.random((count, 2)) < 0.3] = np.nan
    weight_B1 = torch.from_numpy(rng.uniform(0.2, 2.0, (count, 1)).astype(np.float32))
    inputs = RnaInputs(torch.zeros(count, 3).long(), torch.ones(count, 3, dtype=torch.bool))
    ids = tuple(f"s{index}" for index in range(count))
    batch = RnaBatch(ids, inputs, weight_BC=weight_B1, label_BC=torch.from_numpy(number_BC))
    logits_BC = torch.from_numpy(rng.normal(0, 2, (count, 2)).astype(np.float32))
    return batch, RnaOutputs(class_logits_BC=logits_BC.requires_grad_())


def part(batch: RnaBatch, outputs: RnaOutputs, where: slice) -> tuple[RnaBatch, RnaOutputs]:
    changed = {"ids": batch.ids[where], "weight_BC": batch.weight_BC[where], "label_BC": batch.label_BC[where]}
    return batch._replace(**changed), RnaOutputs(class_logits_BC=outputs.class_logits_BC[where])


# --- loss and metric -------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_square_error_in_deviations(rng):
    """A number that is the same everywhere has no deviation: there a unit is a unit."""
    batch, outputs = make_batch(rng, count=9)
    standard_BC = (batch.label_BC.numpy() - NUMBERS.means) / (2.5, 1.0)
    square_BC = (outputs.class_logits_BC.detach().numpy() - standard_BC) ** 2
    weight_BC = np.where(np.isnan(standard_BC), 0, batch.weight_BC.numpy())
    loss = NumberLoss(NUMBERS)
    assert loss.weight(batch) == pytest.approx(weight_BC.sum())
    assert float(loss.total(outputs, batch).detach()) == pytest.approx(np.nansum(square_BC * weight_BC), rel=1e-5)


def test_what_was_not_measured_has_no_gradient_and_changes_none(rng):
    batch, outputs = make_batch(rng, count=12)
    NumberLoss(NUMBERS).total(outputs, batch).backward()
    unknown_BC = torch.isnan(batch.label_BC)
    gradient_BC = outputs.class_logits_BC.grad
    assert unknown_BC.any()
    assert (gradient_BC[unknown_BC] == 0).all()
    assert (gradient_BC[~unknown_BC] != 0).all()


def test_a_prediction_that_is_not_finite_is_seen_where_nothing_was_measured(rng):
    batch, outputs = make_batch(rng, count=4)
    batch.label_BC[1] = torch.nan
    with torch.no_grad():
        outputs.class_logits_BC[1, 0] = torch.inf
    assert not NumberLoss(NUMBERS).total(outputs, batch).isfinite()
    with torch.no_grad(), pytest.raises(DivergedError, match="a prediction for s0, s1, s2, s3 is not finite"):
        make_meter(informed(), TrainConfig(), NUMBERS).add(outputs, batch)


def test_a_number_that_weighs_nothing_has_no_gradient(rng):
    batch, outputs = make_batch(rng, count=12)
    settings = TrainConfig(target_weights={"gc": 0})
    training_loss(informed(), settings, NUMBERS).total(outputs, batch).backward()
    known_BC, gradient_BC = ~torch.isnan(batch.label_BC), outputs.class_logits_BC.grad
    assert (gradient_BC[:, 0] == 0).all()
    assert torch.equal(gradient_BC[:, 1] != 0, known_BC[:, 1])


@pytest.mark.parametrize("weights", [None, (1.0, 0.25)])
def test_micro_batches_give_loss_and_metric_of_the_whole(rng, weights):
    batch, outputs = make_batch(rng, count=11)
    loss, parts = (
        NumberLoss(NUMBERS, weights),
        [part(batch, outputs, where) for where in (slice(0, 1), slice(1, 7), slice(7, 11))],
    )
    totals, weights = zip(*((loss.total(out, each), loss.weight(each)) for each, out in parts), strict=True)
    torch.testing.assert_close(sum(totals), loss.total(outputs, batch))
    assert sum(weights) == pytest.approx(loss.weight(batch))
    one, several = (make_meter(informed(), TrainConfig(), NUMBERS) for _ in range(2))
    with torch.no_grad():
        one.add(outputs, batch)
        for each, out in parts:
            several.add(out, each)
    several.join(ALONE)
    assert one.result() == pytest.approx(several.result())


def test_the_metric_is_in_the_units_of_the_data(rng):
    batch, outputs = make_batch(rng, count=30)
    meter = make_meter(informed(), TrainConfig(), NUMBERS)
    with torch.no_grad():
        meter.add(outputs, batch)
        said_BC = outputs.class_logits_BC.double().numpy() * (2.5, 1.0) + NUMBERS.means
        np.testing.assert_allclose(label_values(outputs.class_logits_BC, NUMBERS).numpy(), said_BC)
    errors_C = np.sqrt(np.nanmean((said_BC - batch.label_BC.numpy()) ** 2, axis=0))
    told = {"metric": errors_C.mean(), "choice": (errors_C / (2.5, 1.0)).mean()}  # of the best epoch: in deviations
    assert meter.result() == pytest.approx(told | dict(zip(NAMES, errors_C, strict=True)))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (0.5, 2.0)])
def test_targets_choose_the_best_epoch_by_their_weights_in_the_loss_and_are_scored_alike(rng, weights):
    """One of weight 0, which is not learned, had as much say as the others."""
    batch, outputs = make_batch(rng, count=30)
    meter = make_meter(informed(), TrainConfig(target_weights=dict(zip(NAMES, weights, strict=True))), NUMBERS)
    with torch.no_grad():
        meter.add(outputs, batch)
    found = meter.result()
    errors_C = np.array([found[name] for name in NAMES])
    assert found["choice"] == pytest.approx(np.average(errors_C / (2.5, 1.0), weights=weights))
    assert found["metric"] == pytest.approx(errors_C.mean())


def test_units_far_from_zero_lose_no_digits():
    """In float32 a billion and a billion and one are the same number."""
    numbers = Numbers(("a",), (2,), (1e9,), (0.5,), "ACGU")
    inputs = RnaInputs(torch.zeros(2, 1).long(), torch.ones(2, 1, dtype=torch.bool))
    label_BC = torch.tensor([[1e9 - 0.5], [1e9 + 0.5]], dtype=torch.float64)
    batch = RnaBatch(("a", "b"), inputs, weight_BC=torch.ones(2, 1), label_BC=label_BC)
    right = RnaOutputs(class_logits_BC=torch.tensor([[-1.0], [1.0]]))
    assert NumberLoss(numbers).total(right, batch) == 0
    assert torch.equal(label_values(right.class_logits_BC, numbers), label_BC)


# --- the network and its data ----------------------------------------------------------------------------------------

COMP = "labelled-numbers"
CONFIG = RunConfig(
    model=ModelConfig(name="drsn", kwargs={"width": 16, "depth": 1, "kernel": 3, "dilations": 1, "dropout": 0.0}),
    data=DataConfig(max_length=64),
    train=TrainConfig(epochs=4, batch_size=16, lr=1e-2, ema_decay=0.9, precision="fp32"),
)
RUN, SPLIT = "numbers.sim80_k2", "sim80_k2"


def informed(*names: str):
    return get_competition(COMP).with_facts({"numbers": list(names or NAMES)})


def make_set(folder: Path, table: pl.DataFrame, *, names: list[str] = NAMES, test: pl.DataFrame | None = None) -> Paths:
    """Clean tables and folds of a set."""
    raw, paths = folder / "raw", Paths(comp=COMP, root=folder / "artifacts")
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "columns.toml").write_text(f"numbers = {names}\n")
    table.write_parquet(raw / "train.parquet")
    if test is not None:
        test.write_parquet(raw / "test.parquet")
    preprocess.run(get_competition(COMP), raw, paths)
    labelled_sets.write_folds(paths)
    return paths


def train_one(paths: Paths, config: RunConfig = CONFIG, **how: int) -> Report:
    return train.run(config, competition=competition_of(paths), paths=paths, run=RUN, split=SPLIT, fold=0, **how)


def predict_one(paths: Paths, **how: object) -> Report:
    return predict.run(competition=competition_of(paths), paths=paths, run=RUN, fold=0, **how)  # type: ignore[arg-type]


def begin(paths: Paths) -> None:
    """A checkpoint of a run that goes on."""
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=1)


def numbers_in(path: Path) -> np.ndarray:
    return np.array(pl.read_parquet(path)["numbers"].to_list(), dtype=np.float64)


@pytest.fixture
def table(rng: np.random.Generator) -> pl.DataFrame:
    return labelled_sets.measured(rng, count=96)


@pytest.fixture
def paths(tmp_path: Path, table: pl.DataFrame) -> Paths:
    return make_set(tmp_path, table, test=table.select(id="t" + pl.col("id"), sequence="sequence").reverse()[:9])


def test_examples_know_their_numbers(paths, table):
    examples = open_examples(competition_of(paths), paths=paths, table="train")
    np.testing.assert_array_equal(examples.labels_NC, table.select(NAMES).to_numpy())
    assert examples.labels_NC.dtype == np.float64
    assert examples.example(3).label_C.tolist() == pytest.approx([table["gc"][3], np.nan], nan_ok=True)
    assert examples.labels == read_numbers(paths)
    assert open_examples(competition_of(paths), paths=paths, table="test").labels_NC is None


def test_numbers_are_learned_and_predicted_in_their_units(paths, table):
    report = train_one(paths, replace(CONFIG, train=replace(CONFIG.train, epochs=12)))
    predict_one(paths)
    oof = pl.read_parquet(paths.oof(RUN, 0))
    assert oof.schema == {"sequence_id": pl.String, "fold": pl.UInt8, "numbers": pl.List(pl.Float32)}
    truth_NC = oof.join(table, left_on="sequence_id", right_on="id", maintain_order="left").select(NAMES).to_numpy()
    errors_C = np.sqrt(np.nanmean((numbers_in(paths.oof(RUN, 0)) - truth_NC) ** 2, axis=0))
    assert errors_C[0] < 0.7 * table["gc"].std(), "the mean is no better than one deviation"
    assert errors_C.mean() == pytest.approx(report.facts["metric"], rel=1e-4)
    epochs = [row for row in read_metrics(report.outputs["metrics"]) if row["event"] == "epoch"]
    assert set(epochs[0]["valid"]) == set(NAMES)
    test = pl.read_parquet(paths.test(RUN, 0))
    assert test.columns == ["sequence_id", "numbers"]
    assert test["sequence_id"].to_list() == sorted(pl.read_parquet(paths.clean("test"))["sequence_id"])


def test_other_units_change_predictions_as_they_change_the_numbers(tmp_path, table):
    """Loss, gradients and weights are the same: a network never sees the units."""
    said, weights = [], []
    for name, (scale, shift) in {"celsius": (1, 0), "millikelvin": (1000, 273_150)}.items():
        changed = table.with_columns(gc=pl.col("gc") * scale + shift)
        paths = make_set(tmp_path / name, changed, test=table.select("id", "sequence")[:9], names=["gc"])
        weights.append(load_weights(train_one(paths).outputs["checkpoint"]))
        predict_one(paths)
        said.append((numbers_in(paths.test(RUN, 0)) - shift) / scale)
    np.testing.assert_allclose(*said, rtol=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_held_out_numbers_say_nothing_of_the_scale(tmp_path, table):
    """Mean and deviation are those of the sequences that train, in the checkpoint too."""
    config, found = replace(CONFIG, train=replace(CONFIG.train, epochs=1)), []
    paths = make_set(tmp_path, table)
    folds = pl.read_parquet(paths.fold_table(SPLIT))
    held_out = pl.col("id").is_in(folds.filter(fold=0)["sequence_id"].to_list())
    for factor in (1, 1000):
        changed = table.with_columns(gc=pl.when(held_out).then(pl.col("gc") * factor).otherwise("gc"))
        checkpoint = train_one(make_set(tmp_path / str(factor), changed), config).outputs["checkpoint"]
        found.append((read_meta(checkpoint)["numbers"], load_weights(checkpoint)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
    learned = table.filter(~held_out)
    assert found[0][0]["means"] == pytest.approx([learned["gc"].mean(), learned["tail"].mean()])
    assert found[0][0]["deviations"] == pytest.approx([learned["gc"].std(ddof=0), learned["tail"].std(ddof=0)])


def test_sequences_without_any_number_neither_train_nor_validate(tmp_path, table):
    empty = pl.col("id") >= "s090"
    paths = make_set(tmp_path, table.with_columns(pl.when(~empty).then(name).alias(name) for name in NAMES))
    data, _ = train.load_data(
        CONFIG,
        train.build_model(CONFIG.model, competition_of(paths), read_numbers(paths)),
        competition=competition_of(paths),
        paths=paths,
        split=SPLIT,
        fold=0,
    )
    members = np.concatenate([data.train, data.valid])
    assert sorted(data.examples.ids_N[members].tolist()) == [name.encode() for name in table.filter(~empty)["id"]]
    begin(paths)
    assert len(numbers_in(predict_one(paths).outputs["oof"])) == 48, "they are predicted"


def test_a_run_that_was_stopped_ends_with_the_same_weights(paths):
    whole = train_one(paths).outputs["checkpoint"]
    kept = paths.fold_dir(RUN, 0).rename(paths.fold_dir(RUN, 0).with_name("whole")) / "checkpoints" / whole.name
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=7)
    first, second = load_weights(kept), load_weights(train_one(paths).outputs["checkpoint"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_network_of_a_checkpoint_has_a_head_alone_that_numbers_ask_for(paths):
    def build() -> RnaModel:
        return train.build_model(CONFIG.model, competition_of(paths), read_numbers(paths))

    model = build()
    assert model.heads.values is None
    assert model.heads.classes.linear.out_features == 2
    assert training_loss(competition_of(paths), CONFIG.train, NUMBERS) == NumberLoss(NUMBERS)
    needs = plan.make_plan(CONFIG, build, length=30).need.parameters
    assert needs == sum(parameter.numel() for parameter in model.parameters())
    seconds = predict.estimate(CONFIG, competition=competition_of(paths), paths=paths, split=SPLIT, fold=0)
    assert seconds > 0


# --- a checkpoint and its data ---------------------------------------------------------------------------------------


def test_a_checkpoint_predicts_where_no_clean_table_says_what_it_predicts(paths):
    """On a machine that has the run alone, the set is one of classes as far as its name tells."""
    begin(paths)
    expected = numbers_in(predict_one(paths).outputs["test"])
    for name in ("numbers", "train"):
        paths.clean(name).unlink()
    paths.test(RUN, 0).unlink()
    assert competition_of(paths).task == "classes"
    np.testing.assert_array_equal(numbers_in(predict_one(paths, which=("test",)).outputs["test"]), expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["gc"], r"numbers without 'tail'"),
        (["tail", "gc"], r"numbers in another order"),
        ([], r"numbers \('gc', 'tail'\) -> c"),
    ],
)
def test_a_checkpoint_of_other_labels_is_refused_with_the_difference(names, expected, tmp_path, paths, table):
    begin(paths)
    if names:
        make_set(tmp_path, table, names=names)
    else:
        raw = tmp_path / "raw"
        (raw / "columns.toml").unlink()
        table.with_columns(label=pl.Series(["a", "b"] * 48)).drop(NAMES).write_parquet(raw / "train.parquet")
        preprocess.run(get_competition(COMP), raw, paths)
    with pytest.raises(ConfigError, match=rf"trained on other data than those .*{expected}.*Next: train again"):
        predict_one(paths)
    with pytest.raises(ConfigError, match=r"was begun with other settings or data: .*(numbers|classes).names"):
        train_one(paths)


def test_a_fold_without_a_training_number_is_refused(tmp_path, table):
    paths = make_set(tmp_path, table)
    held_out = pl.read_parquet(paths.fold_table(SPLIT)).filter(fold=0)["sequence_id"].to_list()
    only = pl.when(pl.col("id").is_in(held_out)).then(pl.col("gc").rank()).alias("tail")
    make_set(tmp_path, table.with_columns(only))
    with pytest.raises(DataError, match=r"fold 0 leaves no training sequence of which tail was measured. Next: "):
        train_one(paths)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "focal_gamma", 2.0),
        ("train", "class_balance", 0.9),
        ("data", "flip", 0.5),
        ("train", "tm_weight", 2.0),
    ],
)
def test_a_setting_that_means_nothing_to_numbers_is_refused(section, name, value):
    config = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **{name: value})})
    with pytest.raises(ConfigError, match=rf"\[{section}\] {name} = .* means nothing where numbers are predicted"):
        refuse_idle(config, informed())


def test_base_pairs_of_proteins_are_refused(tmp_path, rng):
    proteins = labelled_sets.proteins(rng, count=24).with_columns(gc=pl.int_range(24) / 7).drop("label")
    paths = make_set(tmp_path, proteins, names=["gc"])
    with pytest.raises(ConfigError, match=r"holds proteins; expected RNA or DNA. Next: "):
        bpp.run(paths)


# --- other ways to a network -----------------------------------------------------------------------------------------


def test_a_notebook_predicts_numbers_as_make_predict_does(paths):
    begin(paths)
    expected = numbers_in(predict_one(paths).outputs["test"])
    paths.clean("numbers").unlink()
    trained = Trained(paths.fold_dir(RUN, 0))
    assert trained.targets == ("gc", "tail")
    texts = pl.read_parquet(paths.clean("test")).sort("sequence_id")["sequence"].to_list()
    np.testing.assert_allclose(np.stack(trained.predict(texts)), expected, rtol=1e-5)


def test_sequences_of_a_file_are_embedded_by_a_network_for_numbers(paths, tmp_path):
    begin(paths)
    (tmp_path / "mine.fa").write_text(">a\nACGTTACG\n>b\nGGGCCA\n")
    report = embed.run(tmp_path / "mine.fa", competition=competition_of(paths), paths=paths, run=RUN, fold=0)
    assert (report.facts["sequences"], report.facts["width"]) == (2, 16)


def test_a_batch_that_broke_is_run_again(paths, monkeypatch):
    def poison(self: NumberLoss, outputs: RnaOutputs, batch: RnaBatch) -> torch.Tensor:
        return outputs.class_logits_BC.sum() * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(NumberLoss, "total", poison)
        with pytest.raises(DivergedError, match=r"Next: "):
            train_one(paths, replace(CONFIG, train=replace(CONFIG.train, max_skips=2, max_rollbacks=0)))
    paths.clean("numbers").unlink()
    found = replay.run(competition=get_competition(COMP), paths=paths, run=RUN, fold=0, precision="fp32").facts
    assert found["passes"]["fp32"]["seen"] == "finite"
