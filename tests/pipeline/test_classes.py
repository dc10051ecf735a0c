"""Classes of whole sequences: their file, their loss and metric, and a network that is trained on them and predicts."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from models.interface import RnaInputs, RnaOutputs
from pipeline import bpp, plan, predict, preprocess, replay, train
from pipeline.batch import RnaBatch
from pipeline.competitions import get_competition
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig, load_config
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.labels import Classes, log_losses, read_classes, write_labels
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from pipeline.schema import decode
from pipeline.stage import Report
from pipeline.training.checkpoint import load_weights
from pipeline.training.distributed import ALONE
from pipeline.training.losses import ClassLoss, class_probabilities, class_weights, label_weights, training_loss
from pipeline.training.metrics import ClassMeter
from pipeline.training.settings import refuse_idle
from tests.pipeline import labelled_sets

LABELLED = get_competition("labelled")
BOTH = pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "several"])


def make_batch(rng: np.random.Generator, *, count: int, classes: int, exclusive: bool) -> tuple[RnaBatch, torch.Tensor]:
    """Labels with weights, and logits for them."""
    if exclusive:
        label_BC = np.eye(classes, dtype=bool)[rng.integers(0, classes, count)]
    else:
        label_BC = rng.random((count, classes)) < 0.4
    weight = rng.uniform(0.2, 2.0, (count, 1 if exclusive else classes)).astype(np.float32)
    inputs = RnaInputs(torch.zeros(count, 3).long(), torch.ones(count, 3, dtype=torch.bool))
    ids = tuple(f"s{index}" for index in range(count))
    batch = RnaBatch(ids, inputs, weight_BC=torch.from_numpy(weight), label_BC=torch.from_numpy(label_BC))
    return batch, torch.from_numpy(rng.normal(0, 2, (count, classes)).astype(np.float32))


def part(batch: RnaBatch, where: slice) -> RnaBatch:
    assert batch.weight_BC is not None
    assert batch.label_BC is not None
    return batch._replace(ids=batch.ids[where], weight_BC=batch.weight_BC[where], label_BC=batch.label_BC[where])


# --- the classes' file -----------------------------------------------------------------------------------------------


def test_classes_come_back_as_they_were_written(tmp_path):
    paths = Paths(comp="labelled", root=tmp_path)
    classes = Classes(("a", "b|c", "ü"), (3, 0, 1), False, "ACGUN")
    paths.clean("classes").parent.mkdir(parents=True)
    write_labels(paths.clean("classes"), classes)
    assert read_classes(paths) == classes
    assert Classes.of(classes.facts()).difference(classes) == ""


def test_classes_before_the_data_stage_are_missed_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no classes; .*Next: make data COMP=labelled-x\.$"):
        read_classes(Paths(comp="labelled-x", root=tmp_path))


def test_a_changed_order_of_classes_is_a_difference():
    one = Classes(("a", "b"), (1, 1), True, "ACGU")
    assert one.difference(replace(one, names=("b", "a"))) == "classes in another order"
    assert one.difference(replace(one, exclusive=False)) == "one label a sequence -> several"


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_exclusive_classes_is_the_weighted_cross_entropy(rng):
    batch, logits_BC = make_batch(rng, count=7, classes=4, exclusive=True)
    each_B = F.cross_entropy(logits_BC, batch.label_BC.int().argmax(1), reduction="none")
    total = ClassLoss(exclusive=True).total(RnaOutputs(class_logits_BC=logits_BC), batch)
    torch.testing.assert_close(total, (each_B * batch.weight_BC[:, 0]).sum())
    assert ClassLoss(exclusive=True).weight(batch) == pytest.approx(float(batch.weight_BC.sum()))


def test_the_loss_of_several_labels_is_the_weighted_binary_cross_entropy_averaged_over_classes(rng):
    batch, logits_BC = make_batch(rng, count=7, classes=4, exclusive=False)
    each_BC = F.binary_cross_entropy_with_logits(logits_BC, batch.label_BC.float(), reduction="none")
    total = ClassLoss(exclusive=False).total(RnaOutputs(class_logits_BC=logits_BC), batch)
    torch.testing.assert_close(total, (each_BC * batch.weight_BC).sum() / 4)
    assert ClassLoss(exclusive=False).weight(batch) == pytest.approx(float(batch.weight_BC.sum()) / 4)


@BOTH
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_its_formula(rng, exclusive, gamma):
    batch, logits_BC = make_batch(rng, count=6, classes=3, exclusive=exclusive)
    batch = batch._replace(weight_BC=torch.ones(6, 1))
    p_BC = class_probabilities(logits_BC, exclusive=exclusive)
    p_true = p_BC[batch.label_BC] if exclusive else torch.where(batch.label_BC, p_BC, 1 - p_BC)
    expected = (-((1 - p_true) ** gamma) * p_true.log()).sum() / (1 if exclusive else 3)
    total = ClassLoss(exclusive, gamma).total(RnaOutputs(class_logits_BC=logits_BC), batch)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("exclusive", "classes"), [(True, 2), (False, 4)], ids=["two", "several"])
def test_alpha_one_half_is_half_of_the_loss_without_it_exactly(rng, exclusive, classes):
    batch, logits_BC = make_batch(rng, count=7, classes=classes, exclusive=exclusive)
    for gamma in (0.0, 2.0):
        plain, half = (ClassLoss(exclusive, gamma, alpha) for alpha in (0.0, 0.5))
        outputs = RnaOutputs(class_logits_BC=logits_BC)
        assert half.total(outputs, batch) == 0.5 * plain.total(outputs, batch)
        assert half.weight(batch) == plain.weight(batch)


@pytest.mark.parametrize("exclusive", [True, False], ids=["two", "several"])
def test_alpha_is_what_having_a_label_weighs_and_the_rest_what_not_having_it_does(rng, exclusive):
    batch, logits_BC = make_batch(rng, count=9, classes=2, exclusive=exclusive)
    batch = batch._replace(weight_BC=torch.ones(9, 1))
    outputs, label_BC = RnaOutputs(class_logits_BC=logits_BC), batch.label_BC
    if exclusive:
        each = -logits_BC.log_softmax(1)[label_BC] * torch.where(label_BC[:, 1], 0.8, 0.2)
    else:
        each = F.binary_cross_entropy_with_logits(logits_BC, label_BC.float(), reduction="none")
        each = (each * torch.where(label_BC, 0.8, 0.2)).mean(1)
    torch.testing.assert_close(ClassLoss(exclusive, 0.0, 0.8).total(outputs, batch), each.sum())


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_with_alpha_recall_rises_and_precision_falls(rng, gamma):
    """One in eight sequences has the label, and a single number says so, with noise."""
    has_N = torch.from_numpy(np.arange(400) % 8 == 0)
    x_N2 = torch.stack([has_N + 0.8 * torch.from_numpy(rng.normal(size=400)), torch.ones(400)], dim=1).float()
    inputs = RnaInputs(torch.zeros(400, 1), torch.ones(400, 1))
    batch = RnaBatch((), inputs, weight_BC=torch.ones(400, 1), label_BC=has_N[:, None])
    recall, precision, alphas = list[float](), list[float](), (0.5, 0.6, 0.7, 0.8, 0.9)
    for alpha in alphas:
        weight_21 = torch.zeros(2, 1, requires_grad=True)
        for _ in range(300):
            outputs = RnaOutputs(class_logits_BC=x_N2 @ weight_21)
            loss = ClassLoss(False, gamma, alpha).total(outputs, batch) / 400
            (gradient_21,) = torch.autograd.grad(loss, weight_21)
            weight_21.data -= 10 * gradient_21
        said_N = (x_N2 @ weight_21.detach())[:, 0] > 0
        recall.append(float(said_N[has_N].float().mean()))
        precision.append(float(has_N[said_N].float().mean()))
    assert stats.spearmanr(alphas, recall).statistic > 0.8
    assert stats.spearmanr(alphas, precision).statistic < -0.8


@BOTH
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradient_are_finite_where_a_probability_rounds_to_one(exclusive, gamma, dtype):
    """The formula as it stands has a NaN for a gradient at gamma 0.5."""
    logits_BC = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    label_BC = torch.tensor([[True, False], [True, False], [False, True]])
    batch = RnaBatch((), RnaInputs(torch.zeros(3, 1), torch.ones(3, 1)), weight_BC=torch.ones(3, 1), label_BC=label_BC)
    total = ClassLoss(exclusive, gamma, 0.75).total(RnaOutputs(class_logits_BC=logits_BC), batch)
    total.backward()
    assert total.isfinite()
    assert logits_BC.grad.isfinite().all()
    assert logits_BC.grad.abs().sum() > 0


@BOTH
def test_parts_of_a_batch_add_up_to_it(rng, exclusive):
    batch, logits_BC = make_batch(rng, count=10, classes=3, exclusive=exclusive)
    loss, halves = ClassLoss(exclusive, 2.0), [slice(0, 3), slice(3, 10)]
    totals = [loss.total(RnaOutputs(class_logits_BC=logits_BC[half]), part(batch, half)) for half in halves]
    torch.testing.assert_close(sum(totals), loss.total(RnaOutputs(class_logits_BC=logits_BC), batch))
    assert sum(loss.weight(part(batch, half)) for half in halves) == pytest.approx(loss.weight(batch))


@BOTH
def test_a_nan_is_seen_where_the_sequence_counts_for_nothing(rng, exclusive):
    batch, logits_BC = make_batch(rng, count=2, classes=3, exclusive=exclusive)
    batch, logits_BC[1, 2] = batch._replace(weight_BC=torch.tensor([[1.0], [0.0]])), torch.nan
    assert ClassLoss(exclusive, 1.0).total(RnaOutputs(class_logits_BC=logits_BC), batch).isnan()


def test_weights_of_classes_have_mean_one_and_leave_out_those_without_a_sequence():
    assert class_weights(np.array([5, 0, 5]), beta=0.9).tolist() == pytest.approx([1, 0, 1])
    weights = class_weights(np.array([1000, 10, 0, 100]), beta=0.999)
    assert weights.sum() == pytest.approx(3)
    assert weights[1] > weights[3] > weights[0] > weights[2] == 0
    assert class_weights(np.array([7, 3]), beta=0.0).tolist() == [1, 1]


def test_rare_classes_weigh_more_by_the_sequences_that_train_alone():
    label_NC = np.eye(2, dtype=bool)[[0, 0, 0, 1, 1, 1, 1, 1]]
    weights_N1 = label_weights(label_NC, np.arange(4), exclusive=True, beta=0.9)
    assert weights_N1.shape == (8, 1)
    assert weights_N1[3, 0] == weights_N1[7, 0] > 1 > weights_N1[0, 0]


def test_of_several_labels_each_weighs_those_that_have_it_against_the_others():
    label_NC = np.array([[True, True], [False, True], [False, False], [False, False]])
    weights_NC = label_weights(label_NC, np.arange(4), exclusive=False, beta=0.99)
    assert weights_NC[:, 1].tolist() == pytest.approx([1, 1, 1, 1])
    assert weights_NC[0, 0] > 1 > weights_NC[1, 0] == weights_NC[2, 0]
    alone_NC = label_weights(label_NC[:3], np.arange(3), exclusive=False, beta=0.99)
    assert (label_weights(label_NC, np.arange(3), exclusive=False, beta=0.99)[:3] == alone_NC).all(), "of who trains"


# --- metric ----------------------------------------------------------------------------------------------------------


def test_log_loss_of_a_certain_mistake_is_that_of_the_smallest_probability():
    assert log_losses(np.array([[1.0, 0.0]]), np.array([[0, 1]]), exclusive=True)[0] == pytest.approx(-np.log(1e-7))
    both = log_losses(np.array([[0.9, 0.2]]), np.array([[1, 0]]), exclusive=False)
    assert both[0] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)


@BOTH
def test_the_metric_does_not_depend_on_the_batches(rng, exclusive):
    batch, logits_BC = make_batch(rng, count=11, classes=4, exclusive=exclusive)
    classes = Classes(tuple("abcd"), (1,) * 4, exclusive, "ACGU")
    found = []
    for cuts in ([0, 11], [0, 1, 4, 11]):
        meter = ClassMeter(classes)
        for start, stop in pairwise(cuts):
            here = slice(start, stop)
            meter.add(RnaOutputs(class_logits_BC=logits_BC[here]), part(batch, here))
        meter.join(ALONE)
        found.append(meter.result())
    assert found[0] == pytest.approx(found[1])
    p_BC = class_probabilities(logits_BC, exclusive=exclusive).numpy()
    assert found[0]["metric"] == pytest.approx(log_losses(p_BC, batch.label_BC.numpy(), exclusive=exclusive).mean())


def test_accuracy_counts_sequences_or_labels():
    label_BC = torch.tensor([[True, False], [True, False]])
    logits_BC = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    batch = RnaBatch((), RnaInputs(torch.zeros(2, 1), torch.ones(2, 1)), label_BC=label_BC)
    for exclusive, expected in ((True, 0.5), (False, 0.5)):
        meter = ClassMeter(Classes(("a", "b"), (2, 0), exclusive, "ACGU"))
        meter.add(RnaOutputs(class_logits_BC=logits_BC), batch)
        assert meter.result()["accuracy"] == expected


# --- the network and its data ----------------------------------------------------------------------------------------


def make_set(tmp_path: Path, table: pl.DataFrame, *, comp: str = "labelled", test: pl.DataFrame | None = None) -> Paths:
    """Clean tables and folds of a set."""
    raw, paths = tmp_path / f"raw-{comp}", Paths(comp=comp, root=tmp_path / "artifacts")
    raw.mkdir(exist_ok=True)
    table.write_parquet(raw / "train.parquet")
    if test is not None:
        test.write_parquet(raw / "test.parquet")
    preprocess.run(get_competition(comp), raw, paths)
    labelled_sets.write_folds(paths)
    return paths


CONFIG = RunConfig(
    model=ModelConfig(name="drsn", kwargs={"width": 16, "depth": 2, "kernel": 7, "dilations": 1, "dropout": 0.0}),
    data=DataConfig(max_length=64),
    train=TrainConfig(epochs=6, batch_size=16, lr=1e-2, ema_decay=0.9, precision="fp32"),
)
RUN = "classes.sim80_k2"


def train_one(paths: Paths, config: RunConfig = CONFIG, **how: int) -> Report:
    return train.run(
        config, competition=get_competition(paths.comp), paths=paths, run=RUN, split="sim80_k2", fold=0, **how
    )


def predict_one(paths: Paths) -> Report:
    return predict.run(competition=get_competition(paths.comp), paths=paths, run=RUN, fold=0)


@pytest.fixture
def paths(tmp_path: Path, rng: np.random.Generator) -> Paths:
    table = labelled_sets.planted(rng, count=160)
    return make_set(tmp_path, table, test=table.select(id="t" + pl.col("id"), sequence="sequence").reverse()[:9])


def test_examples_know_their_classes(paths):
    examples = open_examples(LABELLED, paths=paths, table="train")
    table = pl.read_parquet(paths.clean("train"))
    assert examples.labels_NC.argmax(axis=1).tolist() == [labels[0] for labels in table["labels"].to_list()]
    assert examples.example(3).label_C.tolist() == [place in table["labels"][3] for place in range(2)]
    assert examples.weights_NC.shape == (len(table), 1)
    assert open_examples(LABELLED, paths=paths, table="test").labels_NC is None


def test_a_motif_is_learned_and_predicted_in_the_order_of_the_classes(paths):
    report = train_one(paths, replace(CONFIG, train=replace(CONFIG.train, epochs=15)))
    assert report.facts["metric"] < 0.3 < np.log(2)
    predict_one(paths)
    names = read_classes(paths).names
    truth = pl.read_parquet(paths.clean("train"))
    oof = pl.read_parquet(paths.oof(RUN, 0)).join(truth, on="sequence_id", how="left", maintain_order="left")
    p_NC = np.array(oof["probabilities"].to_list())
    assert oof["fold"].unique().to_list() == [0]
    np.testing.assert_allclose(p_NC.sum(axis=1), 1, atol=1e-6)
    label_NC = np.eye(len(names), dtype=bool)[[labels[0] for labels in oof["labels"].to_list()]]
    assert log_losses(p_NC, label_NC, exclusive=True).mean() == pytest.approx(report.facts["metric"], abs=1e-4)
    epochs = [row for row in read_metrics(report.outputs["metrics"]) if row["event"] == "epoch"]
    best = min(epochs, key=lambda row: row["metric"])
    assert best["valid"]["accuracy"] == pytest.approx((p_NC.argmax(1) == label_NC.argmax(1)).mean())


def test_the_test_set_is_predicted_without_its_labels(paths):
    train_one(paths)
    predict_one(paths)
    table = pl.read_parquet(paths.test(RUN, 0))
    assert table.columns == ["sequence_id", "probabilities"]
    assert table["sequence_id"].to_list() == sorted(pl.read_parquet(paths.clean("test"))["sequence_id"])


def test_without_a_test_set_there_are_predictions_out_of_fold_alone(tmp_path, rng):
    paths = make_set(tmp_path, labelled_sets.planted(rng, count=40))
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=2)
    assert list(predict_one(paths).outputs) == ["oof"]
    assert not paths.test(RUN, 0).exists()
    with pytest.raises(DataError, match=r"this set has no test set. Next: "):
        predict.run(competition=LABELLED, paths=paths, run=RUN, fold=0, which=("test",))
    seconds = predict.estimate(CONFIG, competition=LABELLED, paths=paths, split="sim80_k2", fold=0)
    assert seconds > 0


def test_a_run_that_was_stopped_ends_with_the_same_weights(paths):
    whole, folder = train_one(paths).outputs["checkpoint"].name, paths.fold_dir(RUN, 0)
    kept = folder.rename(folder.with_name("whole"))
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=11)
    first = load_weights(kept / "checkpoints" / whole)
    second = load_weights(train_one(paths).outputs["checkpoint"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_labels_are_learned_each_by_itself(tmp_path, rng):
    table = labelled_sets.planted(rng, count=200)
    both = table["sequence"].str.slice(0, 15) + pl.Series(["GGACGG", "UUUUUU"] * 100) + table["sequence"].str.slice(21)
    labels = [sorted({label, "one"} if index % 2 == 0 else {label}) for index, label in enumerate(table["label"])]
    labels[0] = []
    paths = make_set(tmp_path, table.with_columns(sequence=both, label=pl.Series(labels)))
    report = train_one(paths, replace(CONFIG, train=replace(CONFIG.train, class_balance=0.9, focal_gamma=1.0)))
    frequent = np.array(read_classes(paths).counts) / 200
    guess = -(frequent * np.log(frequent) + (1 - frequent) * np.log(1 - frequent)).mean()
    assert report.facts["metric"] < guess
    predict_one(paths)
    p_NC = np.array(pl.read_parquet(paths.oof(RUN, 0))["probabilities"].to_list())
    assert p_NC.shape[1] == 2
    assert ((p_NC >= 0) & (p_NC <= 1)).all()


def test_proteins_have_rows_of_their_own_in_the_token_table(tmp_path, rng):
    paths = make_set(tmp_path, labelled_sets.proteins(rng, count=80), comp="labelled-proteins")
    report = train_one(paths)
    assert report.facts["metric"] < np.log(2)
    assert load_weights(report.outputs["checkpoint"])["embedding.tokens.weight"].shape == (20, 16)


def test_a_network_has_no_more_rows_than_before_where_nobody_asks():
    model = train.build_model(ModelConfig(name="drsn", kwargs={"width": 8, "depth": 1}), RIBONANZA)
    assert model.embedding.tokens.weight.shape == (4, 8)


def test_a_checkpoint_from_before_there_were_classes_still_builds_its_network():
    train.build_model(ModelConfig(name="drsn", kwargs={"width": 8, "depth": 1, "num_classes": 0}), RIBONANZA)


@pytest.mark.parametrize(("given", "expected"), [({}, 5), ({"vocabulary": 4}, 5), ({"vocabulary": 16}, 16)])
def test_the_token_table_has_a_row_for_every_letter_at_least(given, expected):
    """A checkpoint's settings name the default, and HyenaDNA's table is larger."""
    classes = Classes(("a", "b"), (1, 1), True, "ACGUN")
    config = ModelConfig(name="drsn", kwargs={"width": 8, "depth": 1} | given)
    assert train.build_model(config, LABELLED, classes).embedding.tokens.weight.shape == (expected, 8)


def test_predicting_with_a_checkpoint_of_other_classes_is_refused_with_the_difference(paths, tmp_path, rng):
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=1)
    table = labelled_sets.planted(rng, count=160).with_columns(pl.col("label").replace("two", "three"))
    make_set(tmp_path, table)
    with pytest.raises(ConfigError, match=r"trained on other data.*classes without 'two', with 'three'\. Next: "):
        predict_one(paths)


def test_going_on_with_other_classes_is_refused_with_the_difference(paths, tmp_path, rng):
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=1)
    make_set(tmp_path, labelled_sets.planted(rng, count=160).with_columns(pl.col("label").replace("two", "three")))
    with pytest.raises(ConfigError, match=r"classes.names \['one', 'two'\] -> \['one', 'three'\]"):
        train_one(paths)


def test_predictions_by_the_checkpoint_alone_need_no_classes_file(paths):
    with pytest.raises(StoppedError):
        train_one(paths, max_steps=1)
    paths.clean("classes").unlink()
    paths.clean("train").unlink()
    report = predict.run(competition=LABELLED, paths=paths, run=RUN, fold=0, which=("test",))
    assert report.facts["test"]["sequences"] == 9


def test_a_batch_that_broke_is_run_again(paths, monkeypatch):
    def poison(self: ClassLoss, outputs: RnaOutputs, batch: RnaBatch) -> torch.Tensor:
        return outputs.class_logits_BC.sum() * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(ClassLoss, "total", poison)
        with pytest.raises(Exception, match=r"Next: "):
            train_one(paths)
    found = replay.run(competition=LABELLED, paths=paths, run=RUN, fold=0, precision="fp32").facts
    assert found["passes"]["fp32"]["seen"] == "finite"
    assert found["inputs"]["weight"]["range"] == (1.0, 1.0)


def test_a_plan_counts_the_head_and_the_letters(paths):
    classes = replace(read_classes(paths), alphabet="ACDEFGHIKLMNPQRSTVWY")
    build: Callable[..., object] = train.build_model
    needs = [
        plan.make_plan(CONFIG, lambda found=found: build(CONFIG.model, LABELLED, found), length=30).need.parameters
        for found in (read_classes(paths), classes)
    ]
    assert needs[1] - needs[0] == 16 * 16


# --- windows ---------------------------------------------------------------------------------------------------------


def test_a_crop_leaves_the_middle_where_it_is_and_its_pairs(tmp_path, rng):
    table = labelled_sets.planted(rng, count=8, length=31)
    middles = ["UUUUG", "CAUAC"] * 4
    texts = [text[:13] + middle + text[18:] for text, middle in zip(table["sequence"], middles, strict=True)]
    paths = make_set(tmp_path, table.with_columns(sequence=pl.Series(texts)))
    paths.bpp.parent.mkdir(parents=True)
    pairs = {"i": [[12, 13]] * 8, "j": [[16, 17]] * 8, "p": [[0.5, 0.25]] * 8}
    kinds = {"i": pl.List(pl.UInt16), "j": pl.List(pl.UInt16), "p": pl.List(pl.Float32)}
    pl.DataFrame({"sequence": texts} | pairs, schema_overrides=kinds).write_parquet(paths.bpp)
    examples = open_examples(LABELLED, paths=paths, table="train", bpp=True, crop=5)
    assert examples.lengths.tolist() == [5] * 8
    assert [decode(examples.example(index).tokens_L) for index in range(8)] == middles
    assert examples.example(0).bpp_ij_K2.tolist() == [[0, 4]]
    assert examples.example(0).bpp_p_K.tolist() == [0.25]


def test_a_crop_that_is_longer_than_the_window_changes_nothing(paths):
    whole = open_examples(LABELLED, paths=paths, table="train")
    examples = open_examples(LABELLED, paths=paths, table="train", crop=31)
    assert np.array_equal(examples.lengths, whole.lengths)
    assert np.array_equal(examples.example(0).tokens_L, whole.example(0).tokens_L)


def test_predictions_see_the_same_middle_as_training(tmp_path, rng):
    """What stands outside of the crop may change and no prediction does."""
    table = labelled_sets.planted(rng, count=60, length=31)
    paths = make_set(tmp_path, table, test=table)
    config = replace(CONFIG, data=replace(CONFIG.data, crop=11))
    train_one(paths, config)
    predict_one(paths)
    before = pl.read_parquet(paths.test(RUN, 0))
    other = "A" * 10 + table["sequence"].str.slice(10, 11) + "A" * 10
    make_set(tmp_path, table, test=table.with_columns(sequence=other))
    predict_one(paths)
    assert pl.read_parquet(paths.test(RUN, 0)).equals(before)


def test_a_hidden_sequence_that_memory_does_not_hold_is_predicted_from_its_middle(tmp_path, rng, monkeypatch, capsys):
    """One sequence of a hidden test set ended the whole notebook with exit code 5."""
    table = labelled_sets.planted(rng, count=60)
    test = table.head(2).with_columns(id="t" + pl.col("id"))
    long = pl.concat_str(pl.lit("A" * 45), pl.col("sequence"), pl.lit("C" * 45))
    paths = make_set(tmp_path, table, test=test.with_columns(sequence=long))
    train_one(paths)
    network = type(predict.build_model(CONFIG.model, LABELLED, read_classes(paths)))
    forward = network.forward

    def limited(self, inputs):
        if inputs.tokens_BL.shape[1] > 40:
            raise MemoryError
        return forward(self, inputs)

    monkeypatch.setattr(network, "forward", limited)
    predict_one(paths)
    cut = pl.read_parquet(paths.test(RUN, 0))
    assert "out of memory on 'ts000' alone; predicting from the 30 letters in its middle" in capsys.readouterr().err
    make_set(tmp_path, table, test=test)
    predict_one(paths)
    assert np.allclose(cut["probabilities"].to_list(), pl.read_parquet(paths.test(RUN, 0))["probabilities"].to_list())


@pytest.mark.parametrize("letters", ["ACGU", "ACGUN"])
def test_letters_that_training_did_not_see_are_predicted_with(letters, tmp_path, rng):
    """One N in a hidden test set ended its notebook: "holds a letter outside ACGU"."""
    table = labelled_sets.planted(rng, count=60, length=60)
    table = table.with_columns(sequence=pl.col("sequence") + letters)
    test = table.head(8).with_columns(id="t" + pl.col("id"))
    paths = make_set(tmp_path, table, test=test.with_columns(sequence=pl.col("sequence") + "N"))
    assert read_classes(paths).alphabet == letters
    train_one(paths)
    predict_one(paths)
    said = np.array(pl.read_parquet(paths.test(RUN, 0))["probabilities"].to_list())
    assert np.isfinite(said).all()
    assert predict.estimate(CONFIG, competition=LABELLED, paths=paths, split="sim80_k2", fold=0) > 0
    make_set(tmp_path, table, test=test)
    predict_one(paths)
    plain = np.array(pl.read_parquet(paths.test(RUN, 0))["probabilities"].to_list())
    assert (said.argmax(1) == plain.argmax(1)).mean() > 0.7, "a tail that says nothing turns few of them"


def test_windows_of_a_hidden_test_set_need_no_middle(tmp_path, rng):
    table = labelled_sets.planted(rng, count=20, length=31)
    paths = make_set(tmp_path, table, test=table.with_columns(sequence=pl.col("sequence").str.slice(1)))
    examples = open_examples(LABELLED, paths=paths, table="test", crop=11)
    assert set(examples.lengths.tolist()) == {11}
    assert len(examples.example(0).tokens_L) == 11


def test_a_small_set_gets_epochs_for_as_many_steps_as_learning_takes(paths, monkeypatch, capsys):
    """320 sequences made 160 steps in the default's 10 epochs: log loss 0.377 on five families, and 0.070 with 608.

    160 profiles made 50: MAE 0.292 of 150 others, and 0.248 with 600.
    """
    defaults = [get_competition(each).default_model for each in ("labelled", "profiles")]
    assert [load_config(each).train.epochs for each in defaults] == ["auto", "auto"]
    monkeypatch.setattr("pipeline.config.AUTO_EPOCHS", 2)
    monkeypatch.setattr("pipeline.config.AUTO_STEPS", 9)
    config = replace(CONFIG, train=replace(CONFIG.train, epochs="auto"))
    batches = -(-len(read_folds_of(paths)) // config.train.batch_size)
    epochs = max(2, -(-9 // batches))
    report = train_one(paths, config)
    assert (report.facts["epochs"], report.facts["updates"]) == (epochs, epochs * batches)
    assert report.facts["updates"] >= 9
    assert f"{epochs * batches} steps, {epochs} epochs" in capsys.readouterr().err
    assert train_one(paths, config).status == "current"


@pytest.mark.parametrize(("sequences", "epochs"), [(1, 600), (250, 38), (256, 38), (944, 11), (960, 10), (9000, 10)])
def test_automatic_epochs_are_ten_or_six_hundred_steps(sequences, epochs):
    settings = TrainConfig(epochs="auto", batch_size=16)
    assert settings.settled(sequences).epochs == epochs
    assert TrainConfig(epochs=3, batch_size=16).settled(sequences).epochs == 3


def read_folds_of(paths: Paths) -> pl.DataFrame:
    """Training sequences of fold 0."""
    return pl.read_parquet(paths.fold_table("sim80_k2")).filter(pl.col("fold") != 0)


def test_windows_without_a_middle_are_refused(paths):
    with pytest.raises(DataError, match=r"'s000' has 30 letters, none of them in the middle; .*Next: "):
        open_examples(LABELLED, paths=paths, table="train", crop=11)


def test_a_crop_without_a_middle_is_refused():
    config = replace(CONFIG, data=replace(CONFIG.data, crop=12))
    with pytest.raises(ConfigError, match=r"\[data\] crop: got 12; expected an odd number"):
        refuse_idle(config, LABELLED)


# --- what means nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comp", "changes"),
    [
        ("labelled", {"data": {"flip": 0.5}}),
        ("labelled", {"data": {"min_signal_to_noise": 1.0}}),
        ("labelled", {"train": {"tm_weight": 2.0}}),
        ("ribonanza", {"train": {"focal_gamma": 2.0}}),
        ("openvaccine", {"train": {"focal_alpha": 0.75}}),
        ("ribonanza", {"data": {"crop": 41}}),
        ("rna3d", {"train": {"class_balance": 0.9}}),
    ],
)
def test_a_setting_that_means_nothing_to_the_task_is_refused(comp, changes):
    config = RunConfig(
        model=CONFIG.model, **{key: replace(getattr(CONFIG, key), **each) for key, each in changes.items()}
    )
    ((section, told),) = changes.items()
    with pytest.raises(
        ConfigError, match=rf"\[{section}\] {next(iter(told))} = .* means nothing where .*Next: leave it out"
    ):
        refuse_idle(config, get_competition(comp))


def test_alpha_of_more_than_two_classes_that_exclude_each_other_is_refused(tmp_path, rng):
    table = labelled_sets.planted(rng, count=40).with_columns(label=pl.int_range(40) % 3)
    config = replace(CONFIG, train=replace(CONFIG.train, focal_alpha=0.75))
    with pytest.raises(ConfigError, match=r"focal_alpha = 0.75 .* each sequence has one of 3 classes; .* Next: "):
        train_one(make_set(tmp_path, table), config)


def test_base_pairs_of_proteins_are_refused_before_anything_is_computed(tmp_path, rng):
    paths = make_set(tmp_path, labelled_sets.proteins(rng, count=40), comp="labelled-proteins")
    config = replace(CONFIG, model=replace(CONFIG.model, kwargs=CONFIG.model.kwargs | {"use_bpp": True}))
    with pytest.raises(ConfigError, match=r"base-pair probabilities of proteins; expected RNA or DNA. Next: "):
        train_one(paths, config)
    with pytest.raises(ConfigError, match=r"bpp: labelled-proteins holds proteins; expected RNA or DNA. Next: "):
        bpp.run(paths)


def test_the_loss_of_a_run_follows_its_settings_and_classes():
    classes = Classes(("a", "b"), (1, 1), False, "ACGU")
    assert training_loss(LABELLED, TrainConfig(focal_gamma=2.0), classes) == ClassLoss(False, 2.0)
    assert training_loss(LABELLED, TrainConfig(focal_alpha=0.75), classes) == ClassLoss(False, 0.0, 0.75)
