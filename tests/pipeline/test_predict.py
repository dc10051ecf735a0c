"""Predictions: one finite row per sequence, the same whatever the batches, the padding and the memory were."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline import inference, predict, train
from pipeline.batch import make_batch
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError, DivergedError, LostDeviceError, StorageError
from pipeline.paths import Paths
from pipeline.runs import require_same_test
from pipeline.stage import write_json
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.failures import is_out_of_memory
from submissions.tm_score import tm_score
from tests.chain_tables import edit
from tests.pipeline import tiny

pytestmark = pytest.mark.usefixtures("known_model")


def fit(paths: Paths, *, competition=tiny.TINY, **options) -> None:
    config = options.pop(
        "config", tiny.config(epochs=1, data=options.pop("data", None), model=options.pop("model", None))
    )
    train.run(config, competition=competition, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0, **options)


def predict_all(paths: Paths, *, competition=tiny.TINY, **options):
    return predict.run(competition=competition, paths=paths, run=tiny.RUN, fold=0, **options)


def values_of(path: Path) -> dict[str, np.ndarray]:
    rows = pq.read_table(path).to_pylist()
    return {row["sequence_id"]: np.array([row[name] for name in tiny.TARGETS]).T for row in rows}


def test_every_held_out_and_every_test_sequence_has_one_row(paths):
    texts = tiny.write_values(paths)
    fit(paths)
    report = predict_all(paths)
    oof, test = (pq.read_table(report.outputs[name]) for name in ("oof", "test"))
    assert oof.column_names == ["sequence_id", "fold", *tiny.TARGETS]
    assert test.column_names == ["sequence_id", *tiny.TARGETS]
    assert oof["sequence_id"].to_pylist() == [f"s{k:04d}" for k in range(0, 64, 2)]
    assert set(oof["fold"].to_pylist()) == {0}
    assert test["sequence_id"].to_pylist() == [f"t{k}" for k in range(1, 10)]
    for k, values_LC in zip(range(0, 64, 2), values_of(report.outputs["oof"]).values(), strict=True):
        assert values_LC.shape == (len(texts[k]), 2)
        assert np.isfinite(values_LC).all()
    assert report.facts["oof"] == {"sequences": 32, "nucleotides": sum(map(len, texts[::2]))}


def test_the_averaged_weights_of_the_best_checkpoint_predict(paths):
    fit(paths)
    report = predict_all(paths)
    checkpoint = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest()
    model = train.build_model(tiny.config().model, tiny.TINY).eval()
    model.load_state_dict(checkpoint.weights)
    examples = open_examples(tiny.TINY, paths=paths, table="test")
    with torch.no_grad():
        expected = model(make_batch(examples, np.array([3])).inputs).values_BLC[0].numpy()
    ours = values_of(report.outputs["test"])[examples.example(3).id]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("use_bpp", [False, True])
def test_batch_size_and_padding_do_not_move_a_prediction(paths, use_bpp, monkeypatch):
    texts = tiny.write_values(paths)
    tiny.write_bpp(paths, texts + tiny.sequences(9, seed=99))
    fit(paths, model={"use_bpp": use_bpp})
    tables = []
    for tokens in (1, 100, 100_000):
        monkeypatch.setattr(inference, "BATCH_TOKENS", tokens)
        report = predict_all(paths)
        assert report.status == "built"
        tables.append({name: values_of(path) for name, path in report.outputs.items()})
        for path in report.outputs.values():
            path.unlink()
    for other in tables[1:]:
        for name, rows in tables[0].items():
            for key, values_LC in rows.items():
                np.testing.assert_allclose(other[name][key], values_LC, atol=1e-6)


@pytest.mark.parametrize("use_bpp", [False, True])
def test_test_sequences_without_pairs_are_left_out_where_that_is_asked_for(paths, use_bpp):
    """In a notebook one long target without pairs left every network without predictions: "expected all"."""
    texts, tests = tiny.write_values(paths), tiny.sequences(9, seed=99)
    tiny.write_bpp(paths, texts + tests)
    fit(paths, model={"use_bpp": use_bpp})
    whole = values_of(predict_all(paths, which=("test",)).outputs["test"])
    tiny.write_bpp(paths, texts + tests[2:])
    if use_bpp:
        with pytest.raises(DataError, match="no base-pair probabilities for 2 of 9 sequences"):
            predict_all(paths, which=("test",))
    some = values_of(predict_all(paths, which=("test",), partial_pairs=True).outputs["test"])
    assert len(some) == 7, "of every network: a mean needs the same of each"
    for name, values_LC in some.items():
        np.testing.assert_allclose(values_LC, whole[name], atol=1e-6)


def test_a_second_prediction_is_current_and_a_rebuilt_one_identical(paths):
    fit(paths)
    first = predict_all(paths)
    data = {name: path.read_bytes() for name, path in first.outputs.items()}
    assert predict_all(paths).status == "current"
    for path in first.outputs.values():
        path.unlink()
    again = predict_all(paths)
    assert again.status == "built"
    assert {name: path.read_bytes() for name, path in again.outputs.items()} == data


def test_test_predictions_say_which_table_they_are_of(paths):
    """Of an earlier test table they were joined and submitted, as only ids and lengths were compared."""
    fit(paths)
    predict_all(paths)
    require_same_test(paths, [(tiny.RUN, 0)])
    manifest = paths.fold_dir(tiny.RUN, 0) / "predict-test.manifest.json"
    edit(paths.clean("test"), pl.col("sequence").str.reverse())
    told = json.loads(manifest.read_text())
    for notes in (told.pop("notes"), None):  # as an earlier version left it, which the arrays tell
        write_json(manifest, told | {"notes": notes})
        with pytest.raises(DataError, match=r"fold0/test.parquet: .*test.parquet changed since; expected .*make train"):
            require_same_test(paths, [(tiny.RUN, 0)])
    (meta,) = paths.arrays_dir.glob("test-*/meta.json")
    for damaged in (b"", b"{}", b"[1]", b'{"facts": {}, "files": null}'):  # ensembles ended in tracebacks
        meta.write_bytes(damaged)
        require_same_test(paths, [(tiny.RUN, 0)])
    assert predict_all(paths).outputs["test"].is_file()


def test_a_copied_run_predicts_into_its_own_folder_and_a_copied_fold_not_at_all(paths):
    """Predictions of a copy, trained on or not, replaced those of the run that it was copied from."""
    fit(paths)
    shutil.copytree(paths.run_dir(tiny.RUN), paths.run_dir(f"copy.{tiny.SPLIT}"))
    where = {"competition": tiny.TINY, "paths": paths, "run": f"copy.{tiny.SPLIT}"}
    report = predict.run(**where, fold=0)
    assert report.outputs == {"oof": paths.oof(where["run"], 0), "test": paths.test(where["run"], 0)}
    assert not paths.oof(tiny.RUN, 0).exists()
    paths.fold_dir(where["run"], 0).rename(paths.fold_dir(where["run"], 1))
    with pytest.raises(DataError, match=r"trained with fold 0 held out; its folder says 1"):
        predict.run(**where, fold=1)


def test_a_checkpoint_that_a_training_at_work_replaces_is_no_failure(paths, monkeypatch, capsys):
    """It said "checkpoint file …/meta.json is missing. Next: make train COMP=ribonanza." and left with exit code 3."""
    fit(paths)
    store = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints")
    best, folders = store.best_folder(), iter([store.folder / "step-99999999"])
    monkeypatch.setattr(CheckpointStore, "best_folder", lambda _: next(folders, best))
    assert predict_all(paths).status == "built"
    assert "replaced meanwhile by the training" in capsys.readouterr().err


def test_one_table_can_be_asked_for_alone(paths):
    fit(paths)
    assert set(predict_all(paths, which=("test",)).outputs) == {"test"}
    assert not paths.oof(tiny.RUN, 0).exists()


def test_a_run_that_saw_reversed_sequences_predicts_both_directions_alike(paths):
    fit(paths, data={"flip": 0.5})
    before = values_of(predict_all(paths).outputs["test"])
    table = pq.read_table(paths.clean("test"))
    turned = [text[::-1] for text in table["sequence"].to_pylist()]
    tiny.write_table(paths.clean("test"), {"sequence_id": table["sequence_id"], "sequence": turned})
    after = values_of(predict_all(paths).outputs["test"])
    for key, values_LC in before.items():
        np.testing.assert_allclose(after[key][::-1], values_LC, atol=1e-6)


class Exhausted(torch.nn.Module):
    """Says that memory ran out for more than so many sequences."""

    limit = 0

    def forward(self, x_BLD: Tensor) -> Tensor:
        if x_BLD.shape[0] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return x_BLD


@pytest.fixture
def memory_for(monkeypatch):
    def sequences(limit: int) -> None:
        monkeypatch.setattr(Exhausted, "limit", limit)
        monkeypatch.setattr(tiny, "Fault", Exhausted)

    return sequences


#: Where three sequences fit, and all of a table are tried at once: halves, and halves of them.
OUT_OF_MEMORY = [("oof", 32), ("oof", 16), ("oof", 8), ("oof", 4), ("test", 9), ("test", 5)]


def test_too_little_memory_halves_the_batches_and_keeps_the_predictions(paths, memory_for, capsys):
    fit(paths)
    expected = {name: path.read_bytes() for name, path in predict_all(paths).outputs.items()}
    for path in (paths.oof(tiny.RUN, 0), paths.test(tiny.RUN, 0)):
        path.unlink()
    memory_for(3)
    capsys.readouterr()
    report = predict_all(paths)
    said = capsys.readouterr().err
    halved = [f"fold0 {name}: out of memory with {count}" for name, count in OUT_OF_MEMORY]
    assert [line for line in halved if line not in said] == []
    assert said.count("out of memory") == len(halved)
    for name, path in report.outputs.items():
        ours = values_of(path)
        path.write_bytes(expected[name])
        for key, values_LC in values_of(path).items():
            np.testing.assert_allclose(ours[key], values_LC, atol=1e-6)


def test_no_memory_for_one_sequence_is_said_and_nothing_is_left(paths, memory_for):
    fit(paths)
    memory_for(0)
    with pytest.raises(StorageError, match="out of memory on a single sequence of 40 nt"):
        predict_all(paths)
    assert not [path for path in paths.fold_dir(tiny.RUN, 0).iterdir() if "oof" in path.name or "part" in path.name]


DEAD = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("place", "error", "kind", "said"),
    [
        ("forward", DEAD, LostDeviceError, "predictions of .* fold0 oof: the device failed .CUDA error: an il"),
        ("to", DEAD, LostDeviceError, "predictions of .* fold0 oof: the device failed"),
        ("to", FULL, StorageError, r"predictions of .* fold0 oof: out of memory .CUDA out of memory\. Tried"),
    ],
)
def test_a_device_that_fails_or_is_full_ends_predictions_in_one_sentence(paths, monkeypatch, place, error, kind, said):
    """Another process's memory, or a GPU that fell off the bus: a traceback of torch's, and exit code 1."""
    fit(paths)

    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr(tiny.TinyModel, place, fails)
    with pytest.raises(kind, match=said) as caught:
        predict_all(paths)
    assert "\n" not in str(caught.value)
    assert "Next: " in str(caught.value)
    assert caught.value.exit_code == (75 if kind is LostDeviceError else 5)
    assert not [path for path in paths.fold_dir(tiny.RUN, 0).iterdir() if "oof" in path.name or "part" in path.name]


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_prediction_that_is_not_finite_is_named_and_not_written(paths, monkeypatch):
    fit(paths)
    monkeypatch.setattr(tiny.Fault, "forward", lambda _self, x_BLD: x_BLD * float("inf"))
    with pytest.raises(DivergedError, match=r"prediction for 's\d+' is not finite"):
        predict_all(paths)
    assert not paths.oof(tiny.RUN, 0).exists()


def test_held_out_predictions_are_refused_for_other_data_or_folds(paths):
    fit(paths)
    tiny.write_folds(paths, [f"s{k:04d}" for k in range(64)])
    table = pq.read_table(paths.fold_table(tiny.SPLIT))
    changed = {"sequence_id": table["sequence_id"], "fold": np.array([k % 4 for k in range(64)], dtype=np.uint8)}
    tiny.write_table(paths.fold_table(tiny.SPLIT), changed)
    with pytest.raises(DataError, match="clean or fold table changed"):
        predict_all(paths)


def test_a_fold_that_was_never_trained_is_told_from_one_that_is_damaged(paths):
    """It said "no readable checkpoint. Next: make train." and left with exit code 5, as if the disk had lost it."""
    with pytest.raises(
        DataError, match=r"never trained; trained so far: no run at all\. Next: make train COMP=tiny FOLD=0"
    ):
        predict_all(paths)
    fit(paths)
    with pytest.raises(
        DataError, match=rf"fold1/checkpoints: .* trained so far: {re.escape(tiny.RUN)} \(fold0\)\. Next"
    ):
        predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=1)
    for meta in (paths.fold_dir(tiny.RUN, 0) / "checkpoints").glob("step-*/meta.json"):
        meta.unlink()
    with pytest.raises(StorageError, match="no readable checkpoint"):
        predict_all(paths)


def test_a_run_of_another_competition_is_refused(paths):
    fit(paths)
    with pytest.raises(ConfigError, match="trained on tiny; expected tiny3d"):
        predict_all(paths, competition=tiny.TINY3D)


def test_a_damaged_best_checkpoint_is_not_used(paths):
    fit(paths)
    path = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").best_folder() / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"model\.safetensors does not have its sha256"):
        predict_all(paths)


def test_weights_that_the_disk_cannot_read_are_told_as_damaged_ones(paths, monkeypatch):
    """It was "Input/output error. Next: check the path", without a path: read() names no file."""
    fit(paths)
    read = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(StorageError, match=r"step-\d+: damaged: model.safetensors cannot be read .*Input/output error"):
        predict_all(paths)


@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize("coordinates", [False, True])
def test_structures_have_five_candidates_with_coordinates_for_every_residue(tmp_path, flip, coordinates):
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths, count=6)
    options = {"data": {"max_length": 24, "flip": flip}, "model": {"coordinates": coordinates}}
    fit(paths, competition=tiny.TINY3D, **options)
    report = predict_all(paths, competition=tiny.TINY3D)
    for name, count in (("oof", 3), ("test", 2)):
        rows = pq.read_table(report.outputs[name]).to_pylist()
        assert [row["candidate"] for row in rows] == [1, 2, 3, 4, 5] * count
        assert [row["sequence_id"] for row in rows] == sorted(row["sequence_id"] for row in rows)
        assert ("fold" in rows[0]) == (name == "oof")
        for row in rows:
            assert len(row["x"]) == len(row["y"]) == len(row["z"])
            assert np.isfinite([row["confidence"], *row["x"], *row["y"], *row["z"]]).all()


def test_the_networks_own_coordinates_are_among_the_candidates_and_drawn_alike_every_time(tmp_path):
    """They are right here, helices to start with, so that its distances, which have learned helices, trust them."""
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths, count=8)
    config = tiny.config(epochs=20, batch_size=4, model={"coordinates": True, "dropout": 0.3})
    fit(paths, competition=tiny.TINY3D, config=config)
    tables = []
    for _ in range(2):
        torch.rand(3)  # what was drawn before must not matter
        report = predict_all(paths, competition=tiny.TINY3D)
        tables.append(report.outputs["oof"].read_bytes())
        rows = pq.read_table(report.outputs["oof"]).to_pylist()
        report.outputs["oof"].unlink()
    assert tables[0] == tables[1]
    confidences = [row["confidence"] for row in rows]
    assert all(0 < confidence <= 1 for confidence in confidences)
    assert all(confidences[k : k + 5] == sorted(confidences[k : k + 5], reverse=True) for k in range(0, 20, 5))
    best = [np.array([row["x"], row["y"], row["z"]]).T for row in rows if row["candidate"] == 1]
    assert min(tm_score(xyz_L3, tiny.helix(len(xyz_L3))) for xyz_L3 in best) > 0.5
