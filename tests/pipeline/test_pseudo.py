"""Predictions for the test set teach the fold whose networks made them, no other one; nothing but training changes."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.interface import RnaOutputs
from pipeline import predict, preprocess, train
from pipeline.batch import make_batch
from pipeline.competitions import competition_of, get_competition
from pipeline.config import RunConfig, load_config
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.paths import Paths
from pipeline.stage import sha256_file, write_json
from pipeline.training.checkpoint import CheckpointStore, read_meta
from pipeline.training.initial import has_seen
from pipeline.training.loader import BatchSource, Place
from pipeline.training.loop import TrainingData
from pipeline.training.losses import ClassLoss, training_loss
from pipeline.training.pseudo import measured_ends
from pipeline.training.settings import refuse_idle
from tests.pipeline import labelled_sets, tiny
from tests.pipeline.tiny import SPLIT, TARGETS, TINY, fit, rows_of

pytestmark = pytest.mark.usefixtures("known_model")
TEACHER, OTHER, STUDENT = (f"{name}.{SPLIT}" for name in ("teacher", "other", "student"))


def teach(paths: Paths, run: str = TEACHER, *, fold: int = 0, config: RunConfig | None = None) -> Path:
    """Train a fold of a run for an epoch and predict the test set; its checkpoint."""
    report = fit(paths, config or tiny.config(epochs=1), run=run, fold=fold)
    predict.run(competition=TINY, paths=paths, run=run, fold=fold, which=["test"])
    return report.outputs["checkpoint"]


def taught(*runs: str, data: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    return tiny.config(data={"pseudo": ",".join(runs or [TEACHER]), **(data or {})}, **settings)


def begun_with(checkpoint: Path) -> RunConfig:
    config = tiny.config(epochs=1)
    return replace(config, model=replace(config.model, init=str(checkpoint)))


def load(paths: Paths, config: RunConfig, *, fold: int = 0) -> tuple[TrainingData, dict[str, Any]]:
    model = train.build_model(config.model, TINY)
    return train.load_data(config, model, competition=TINY, paths=paths, split=SPLIT, fold=fold)


def predictions(paths: Paths, run: str, fold: int) -> dict[str, np.ndarray]:
    """sequence_id -> [L, C]."""
    rows = pl.read_parquet(paths.test(run, fold)).iter_rows(named=True)
    return {row["sequence_id"]: np.array([row[name] for name in TARGETS], np.float32).T for row in rows}


def pretend(paths: Paths, truth: dict[str, np.ndarray], *, run: str = TEACHER, fold: int = 0) -> None:
    """Put other predictions in place of a network's, as if it had made them."""
    table = {"sequence_id": sorted(truth)}
    table |= {name: [truth[key][:, c].tolist() for key in sorted(truth)] for c, name in enumerate(TARGETS)}
    kinds = {name: pl.List(pl.Float32) for name in TARGETS}
    path = paths.test(run, fold)
    pl.DataFrame(table, schema_overrides=kinds).write_parquet(path)
    manifest = path.with_name("predict-test.manifest.json")
    write_json(manifest, json.loads(manifest.read_text()) | {"outputs": {"test": sha256_file(path)}})


# --- what is learned ---


def test_each_fold_learns_from_its_own_networks_predictions(paths):
    for fold in (0, 1):
        teach(paths, fold=fold)
        data, digests = load(paths, taught(), fold=fold)
        found = {one.id: one for one in map(data.examples.example, data.train) if one.id.startswith("t")}
        expected = predictions(paths, TEACHER, fold)
        assert found.keys() == expected.keys() != set()
        for name, one in found.items():
            assert np.isnan(one.target_LC[:3]).all(), "the first three nucleotides of no sequence are measured"
            np.testing.assert_array_equal(one.target_LC[3:], expected[name][3:])
        assert digests["pseudo"]["runs"] == {TEACHER: sha256_file(paths.test(TEACHER, fold))}
    assert not np.allclose(predictions(paths, TEACHER, 0)["t5"], predictions(paths, TEACHER, 1)["t5"])


def test_of_several_runs_the_mean_teaches(paths):
    teach(paths)
    teach(paths, OTHER, config=tiny.config(epochs=1, seed=8))
    data, _ = load(paths, taught(TEACHER, OTHER))
    first, second = (predictions(paths, run, 0)["t5"] for run in (TEACHER, OTHER))
    (one,) = (one for one in map(data.examples.example, data.train) if one.id == "t5")
    np.testing.assert_array_equal(one.target_LC[3:], ((first + second) / 2)[3:])


def test_what_validates_and_what_was_measured_stays_as_it_is(paths):
    teach(paths)
    (plain, _), (data, _) = load(paths, tiny.config()), load(paths, taught())
    np.testing.assert_array_equal(data.valid, plain.valid)
    np.testing.assert_array_equal(data.train[: len(plain.train)], plain.train)
    assert len(data.train) == len(plain.train) + 9 == len(set(data.train.tolist()))
    assert max(data.valid) < len(plain.examples) == len(data.examples) - 9
    for position in (*plain.train, *plain.valid):
        for mine, theirs in zip(data.examples.example(position), plain.examples.example(position), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(data.examples.lengths[: len(plain.examples)], plain.examples.lengths)
    np.testing.assert_array_equal(
        data.examples.lengths, [len(data.examples.example(n).tokens_L) for n in range(len(data.examples))]
    )


def test_a_sequence_weighs_a_share_of_a_profiles_mean(paths):
    teach(paths)
    (plain, _), (data, _) = load(paths, tiny.config()), load(paths, taught(data={"pseudo_weight": 0.25}))
    weights_NC = plain.examples.weights_NC[plain.train]
    means = [weights_NC[weights_NC[:, c] > 0, c].mean() for c in range(2)]
    np.testing.assert_allclose(data.examples.example(data.train[-1]).weight_C, 0.25 * np.array(means), rtol=1e-6)


def test_training_changes_and_says_by_whom(paths, capsys):
    teach(paths)
    fit(paths)
    report = fit(paths, taught(epochs=3), run=STUDENT)
    plain, told = rows_of(paths, "start")[0], rows_of(paths, "start", STUDENT)[0]
    assert report.facts["steps"] == 3 * -(-told["train"] // 8)
    assert (told["pseudo"], told["train"], told["valid"]) == (9, plain["train"] + 9, plain["valid"])
    assert f"9 of them with what was predicted for them: {TEACHER}" in capsys.readouterr().err
    assert tiny.final_bytes(paths) != tiny.final_bytes(paths, STUDENT)
    meta = read_meta(report.outputs["checkpoint"])
    (seen,) = meta["data"]["pseudo"]["trained_on"]
    assert seen == {"competition": "tiny", "split": SPLIT, "fold": 0, "folds": sha256_file(paths.fold_table(SPLIT))}
    assert has_seen(meta) == [seen, seen]


def test_a_weight_of_0_is_a_run_without(paths):
    fit(paths)
    fit(paths, taught("nobody", data={"pseudo_weight": 0.0}), run=STUDENT)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, STUDENT)


def test_predictions_that_are_the_truth_teach_like_the_truth(paths):
    """The test set repeats what trains; a full weight, and profiles that all weigh the same."""
    measured = pl.read_parquet(paths.clean("train")).filter(pl.col(TARGETS[1]).is_not_null())[1::2]
    names = [f"t{k}" for k in reversed(range(measured.height))]  # in another order than that of the ids
    measured.select("sequence").with_columns(sequence_id=pl.Series(names)).write_parquet(paths.clean("test"))
    teach(paths)
    rows = zip(names, measured.iter_rows(named=True), strict=True)
    truth = {name: np.array([row[target] for target in TARGETS], np.float32).T for name, row in rows}
    pretend(paths, {name: np.nan_to_num(values_LC, nan=5.0) for name, values_LC in truth.items()})
    settings = {"weighting": "uniform", "pseudo_weight": 1.0}
    data, _ = load(paths, taught(data=settings))
    position = {data.examples.example(n).id: n for n in range(len(data.examples))}
    loss, model = training_loss(TINY, tiny.config().train), train.build_model(tiny.config().model, TINY).eval()
    found = []
    for ids in (measured["sequence_id"], names):
        batch = make_batch(data.examples, np.array([position[name] for name in ids]))
        found.append((loss.weight(batch), loss.total(model(batch.inputs), batch).item()))
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_nothing_teaches_nearer_to_an_end_than_anything_was_measured(paths):
    """OpenVaccine measures 68 of 107 nucleotides and scores 91 of 130: all but the last 39."""
    table = pl.read_parquet(paths.clean("train"))
    cut = table.with_columns(
        pl.Series(
            name,
            [None if row is None else [*row[:-cut], *[None] * cut] for row in table[name].to_list()],
            dtype=pl.List(pl.Float32),
        )
        for name, cut in zip(TARGETS, (6, 11), strict=True)
    )
    cut.write_parquet(paths.clean("train"))
    examples = open_examples(TINY, paths=paths, table="train")
    assert measured_ends(examples, np.arange(len(examples))).tolist() == [[3, 3], [6, 11]]
    assert measured_ends(examples, np.array([0, 5]))[:, 1].min() > 10**6, "these have no second profile"
    teach(paths)
    data, _ = load(paths, taught())
    for position in data.train[-9:]:
        one = data.examples.example(position)
        assert np.isfinite(one.target_LC).sum(axis=0).tolist() == [len(one.tokens_L) - 9, len(one.tokens_L) - 14]


def test_a_sequence_too_short_to_teach_does_not_train(paths):
    table = pl.read_parquet(paths.clean("test"))
    table.with_columns(
        pl.when(sequence_id="t5").then(pl.lit("ACG")).otherwise("sequence").alias("sequence")
    ).write_parquet(paths.clean("test"))
    teach(paths)
    data, _ = load(paths, taught())
    assert {data.examples.example(n).id for n in data.train[-8:]} == set(table["sequence_id"]) - {"t5"}


# --- the rule ---


def copied_table(paths: Paths) -> None:
    """Of fold 1, with its manifest."""
    teach(paths)
    teach(paths, fold=1)
    for name in ("test.parquet", "predict-test.manifest.json"):
        shutil.copy(paths.fold_dir(TEACHER, 1) / name, paths.fold_dir(TEACHER, 0) / name)


def copied_folder(paths: Paths) -> None:
    teach(paths, fold=1)
    shutil.copytree(paths.fold_dir(TEACHER, 1), paths.fold_dir(TEACHER, 0))


def begun_with_another_fold(paths: Paths) -> None:
    teach(paths, config=begun_with(teach(paths, OTHER, fold=1)))


def begun_with_what_began_with_another_fold(paths: Paths) -> None:
    first = teach(paths, OTHER, fold=1)
    teach(paths, config=begun_with(teach(paths, STUDENT, config=begun_with(first))))
    shutil.rmtree(paths.run_dir(STUDENT))


def other_fold_table(paths: Paths) -> None:
    teach(paths)
    table = pl.read_parquet(paths.fold_table(SPLIT))
    table.with_columns(1 - pl.col("fold")).write_parquet(paths.fold_table(SPLIT))


def edited(paths: Paths) -> None:
    teach(paths)
    table = pl.read_parquet(paths.test(TEACHER, 0))
    table.with_columns(pl.col(TARGETS[0]).list.eval(pl.element() * 0.5)).write_parquet(paths.test(TEACHER, 0))


def without_manifest(paths: Paths) -> None:
    teach(paths)
    paths.test(TEACHER, 0).with_name("predict-test.manifest.json").unlink()


def without_network(paths: Paths) -> None:
    teach(paths)
    shutil.rmtree(paths.fold_dir(TEACHER, 0) / "checkpoints")


def damaged_network(paths: Paths) -> None:
    """DamagedError: model.safetensors: no such file, with a traceback."""
    teach(paths)
    for weights in paths.fold_dir(TEACHER, 0).glob("checkpoints/*/model.safetensors"):
        weights.unlink()


def other_test_set(paths: Paths) -> None:
    teach(paths)
    pl.read_parquet(paths.clean("test"))[1:].write_parquet(paths.clean("test"))


def none(paths: Paths) -> None:
    teach(paths, OTHER)


REFUSED: dict[Callable[[Paths], None], tuple[type[Exception], str]] = {
    copied_table: (DataError, "not written by a whole checkpoint in .*fold0/checkpoints.* Next: predict with that run"),
    copied_folder: (ConfigError, "comes from all but fold 1 of 'sim80_k2'.* that fold 0 of 'sim80_k2' validates on"),
    begun_with_another_fold: (ConfigError, "comes from all but fold 1 .*initial weights"),
    begun_with_what_began_with_another_fold: (ConfigError, "comes from all but fold 1 .*initial weights"),
    other_fold_table: (ConfigError, "expected the same fold of the same fold table"),
    edited: (DataError, "not written by a whole checkpoint"),
    without_manifest: (DataError, "not written by a whole checkpoint"),
    without_network: (DataError, "not written by a whole checkpoint"),
    damaged_network: (DataError, "not written by a whole checkpoint"),
    other_test_set: (DataError, "predictions of other sequences than the 8 of the test set"),
    none: (DataError, rf"no predictions of '{TEACHER}' to learn from; runs that have some for fold0: {OTHER}\. Next: "),
}


@pytest.mark.parametrize("prepare", REFUSED, ids=lambda prepare: prepare.__name__)
def test_predictions_of_what_saw_the_held_out_fold_or_nobody_knows_what_are_refused(paths, prepare):
    """The chain of ``model.init`` is followed, too: such a network was only warned of when it began."""
    prepare(paths)
    kind, message = REFUSED[prepare]
    with pytest.raises(kind, match=message):
        fit(paths, taught(), run=STUDENT)
    assert not list(paths.run_dir(STUDENT).rglob("step-*"))
    assert not list(paths.arrays_dir.glob("pseudo-*"))


def test_what_pseudo_labels_taught_has_seen_what_their_network_saw(paths, capsys):
    """A network of another competition that learned from one of ours, and began one of ours."""
    other = {"competition": "elsewhere", "split": SPLIT, "fold": 0, "data": {"folds": "f"}}
    ours = {"competition": "tiny", "split": SPLIT, "fold": 1, "folds": "g"}
    other["data"]["pseudo"] = {"runs": {}, "trained_on": [ours]}
    assert has_seen(other) == [ours, {"competition": "elsewhere", "split": SPLIT, "fold": 0, "folds": "f"}]


@pytest.mark.parametrize("pseudo", ["four", "../ensembles/four", f"{TEACHER}, four"])
def test_an_ensemble_over_folds_teaches_nobody(paths, pseudo):
    teach(paths)
    folder = paths.ensemble_dir("four")
    folder.mkdir(parents=True)
    shutil.copy(paths.test(TEACHER, 0), folder / "test.parquet")
    with pytest.raises(DataError, match="four' to learn from"):
        load(paths, taught(pseudo))


def test_a_run_named_twice_is_refused(paths):
    teach(paths)
    with pytest.raises(ConfigError, match="a run twice; expected each once"):
        load(paths, taught(TEACHER, TEACHER))


def test_structures_have_no_pseudo_labels(tmp_path):
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths)
    with pytest.raises(ConfigError, match=r"pseudo = 'teacher\.sim80_k2' means nothing where structures are predicted"):
        fit(paths, taught(), competition=tiny.TINY3D)


# --- runs ---


def test_a_run_stopped_after_every_step_ends_with_the_same_bits(paths):
    teach(paths)
    config = taught(epochs=1, data={"flip": 0.5, "max_length": 25})
    fit(paths, config)
    for _ in range(100):
        try:
            fit(paths, config, run=STUDENT, max_steps=1)
            break
        except StoppedError:
            continue
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, STUDENT)


def test_a_run_does_not_go_on_with_other_predictions(paths):
    teach(paths)
    with pytest.raises(StoppedError):
        fit(paths, taught(), run=STUDENT, max_steps=1)
    shutil.rmtree(paths.run_dir(TEACHER))
    teach(paths, config=tiny.config(epochs=2))
    with pytest.raises(ConfigError, match=rf"data\.pseudo\.runs\.{TEACHER} \w+ -> \w+\. Next: TAG="):
        fit(paths, taught(), run=STUDENT)
    assert len(list(paths.arrays_dir.glob("pseudo-*"))) == 1, "the arrays of the earlier predictions are gone"


def test_micro_batches_give_the_steps_of_the_whole_batch(paths):
    teach(paths)
    losses = {}
    for micro in (0, 3):
        run = f"m{micro}.{SPLIT}"
        fit(paths, taught(model={"dropout": 0.0}, micro_batch=micro), run=run)
        losses[micro] = [row["loss"] for row in rows_of(paths, "step", run)]
    np.testing.assert_allclose(losses[3], losses[0], atol=1e-5)


def test_a_loader_worker_reads_the_same_batches_from_the_same_files(paths):
    teach(paths)
    data, _ = load(paths, taught())
    source = BatchSource(data.examples, data.train, config=taught())
    sent = pickle.dumps(source)
    assert data.examples.more.targets_TC.tobytes()[:400] not in sent
    there = pickle.loads(sent)
    for batch in range(source.batches):
        place = Place(0, batch, 8)
        for (mine,), (theirs,) in [(source(place), there(place))]:
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one, other)


def test_pairs_come_along(paths):
    texts = [*pl.read_parquet(paths.clean("train"))["sequence"], *pl.read_parquet(paths.clean("test"))["sequence"]]
    dense = tiny.write_bpp(paths, texts)
    teach(paths)
    config = taught(model={"use_bpp": True})
    data, _ = load(paths, config)
    batch = make_batch(data.examples, data.train[-9:]).to(torch.device("cpu"))
    by_id = dict(pl.read_parquet(paths.clean("test")).select("sequence_id", "sequence").iter_rows())
    for name, bpp_LL in zip(batch.ids, batch.inputs.bpp_BLL, strict=True):
        size = len(by_id[name])
        np.testing.assert_array_equal(bpp_LL[:size, :size], dense[by_id[name]])


def test_what_learns_at_the_same_time_keeps_its_arrays(paths):
    """Other folds, other teachers, other training sequences; a loader's worker opens them again by name."""
    for fold in (0, 1):
        teach(paths, fold=fold)
    teach(paths, OTHER)
    for _ in range(2):
        for fold, runs in ((0, [TEACHER]), (1, [TEACHER]), (0, [TEACHER, OTHER])):
            load(paths, taught(*runs), fold=fold)
        load(paths, taught(data={"min_signal_to_noise": 8.0}))
    assert len(list(paths.arrays_dir.glob("pseudo-*"))) == 4


# --- classes and numbers ---

LABELS = {
    "classes": pl.col("label"),
    "several": pl.col("label").replace_strict({"one": "a;b", "two": "b"}),
    "numbers": pl.col("sequence").str.count_matches("G") + pl.int_range(pl.len()) / 99,
}


def labelled(tmp_path: Path, labels: pl.Expr) -> Paths:
    """A set with a test set, one sequence of which has a letter that no training sequence has; a teacher of fold 0."""
    table = labelled_sets.planted(np.random.default_rng(7), count=36).with_columns(labels.alias("label"))
    raw, paths = tmp_path / "raw", Paths(comp="labelled-set", root=tmp_path / "artifacts")
    raw.mkdir()
    table[:30].write_csv(raw / "train.csv")
    test = table[30:].drop("label")
    test[0, "sequence"] = "N" + test[0, "sequence"][1:]
    test.write_csv(raw / "test.csv")
    preprocess.run(get_competition(paths.comp), raw, paths)
    labelled_sets.write_folds(paths)
    start(paths, TEACHER, [])
    predict.run(competition=competition_of(paths), paths=paths, run=TEACHER, fold=0, which=["test"])
    return paths


def start(paths: Paths, run: str, changes: list[str]) -> Any:
    config = load_config("tiny_hyena", ["train.epochs=1", "train.batch_size=6", *changes])
    return train.run(config, competition=competition_of(paths), paths=paths, run=run, split=SPLIT, fold=0)


@pytest.mark.parametrize("kind", LABELS)
def test_classes_teach_as_probabilities_and_numbers_as_they_are(tmp_path, kind):
    paths = labelled(tmp_path, LABELS[kind])
    changes = [f'data.pseudo="{TEACHER}"', f"train.class_balance={0.9 if kind == 'several' else 0.0}"]
    report = start(paths, STUDENT, changes)
    assert rows_of(paths, "start", STUDENT)[0]["pseudo"] == 5
    config, competition = load_config("tiny_hyena", changes), competition_of(paths)
    labels = open_examples(competition, paths=paths, table="train").labels
    model = train.build_model(config.model, competition, labels)
    data, _ = train.load_data(config, model, competition=competition, paths=paths, split=SPLIT, fold=0)
    table = pl.read_parquet(paths.test(TEACHER, 0))
    expected = dict(zip(table["sequence_id"], table[labels.column].to_list(), strict=True))
    for position in data.train[-5:]:
        one = data.examples.example(position)
        assert one.label_C.tolist() == expected.pop(one.id)
        assert one.weight_C.shape == data.examples.example(0).weight_C.shape
    assert len(expected) == 1, "the sequence with an unknown letter"
    batch = make_batch(data.examples, np.array([data.train[0], data.train[-1]]))
    measured = data.examples.example(data.train[0]).label_C
    np.testing.assert_array_equal(batch.label_BC[0], measured)
    assert CheckpointStore(report.outputs["checkpoint"].parent).newest_meta()["progress"]["finished"]


@pytest.mark.parametrize("exclusive", [True, False])
def test_probabilities_of_0_and_1_have_the_loss_and_the_gradient_of_labels(paths, exclusive):
    data, _ = load(paths, tiny.config())
    batch = make_batch(data.examples, data.train[:6])
    label_BC = torch.nn.functional.one_hot(torch.tensor([0, 2, 1, 1, 0, 2])).bool()
    if not exclusive:
        label_BC[::2] = ~label_BC[::2]
    found = []
    for labels in (label_BC, label_BC.float()):
        logits_BC = (3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(4))).requires_grad_()
        outputs = RnaOutputs(class_logits_BC=logits_BC)
        total = ClassLoss(exclusive).total(
            outputs, batch._replace(label_BC=labels, weight_BC=torch.rand(6, 1).add(1) * 0 + 2)
        )
        total.backward()
        found.append((total.detach(), logits_BC.grad))
    torch.testing.assert_close(found[1], found[0])


def test_the_loss_of_probabilities_is_least_where_they_are_met(paths):
    data, _ = load(paths, tiny.config())
    batch = make_batch(data.examples, data.train[:1])
    for exclusive, p_C in ((True, [0.2, 0.7, 0.1]), (False, [0.9, 0.4, 0.6])):
        label_BC = torch.tensor([p_C])
        met = label_BC.log() if exclusive else label_BC.logit()
        logits_BC = met.clone().requires_grad_()
        taught_batch = batch._replace(label_BC=label_BC, weight_BC=torch.ones(1, 1))
        ClassLoss(exclusive).total(RnaOutputs(class_logits_BC=logits_BC), taught_batch).backward()
        torch.testing.assert_close(logits_BC.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("setting", ["focal_gamma", "focal_alpha"])
def test_a_focal_loss_takes_no_probabilities(setting, tmp_path):
    paths = Paths(comp="labelled-set", root=tmp_path)
    with pytest.raises(ConfigError, match=rf"pseudo with .* {setting} = 0.5: .* Next: leave one out"):
        refuse_idle(load_config("tiny_hyena", ['data.pseudo="a"', f"train.{setting}=0.5"]), competition_of(paths))
