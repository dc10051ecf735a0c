"""Embeddings as input: the same bytes in whatever order they come, and a network that reads them wherever it works."""

import csv
import math
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import embed, features, notebook, own_file, plan, predict, replay, train
from pipeline.augment import crop, flip
from pipeline.batch import make_batch
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError
from pipeline.kernel import bundle
from pipeline.network import build_model, resolved_config
from pipeline.packing import read_packed
from pipeline.paths import Paths, how_to_make
from pipeline.stage import read_manifest, write_json
from pipeline.training.bad_batch import BadBatch
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.loader import BatchSource, Loader, Place
from tests.pipeline import tiny
from tests.pipeline.kernels import order_of

WIDTH = 3
DRSN: dict[str, Any] = {"width": 16, "depth": 2, "kernel": 3, "dilations": 2, "dropout": 0.0}
Vectors = dict[str, np.ndarray]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths, count=16, tests=3)
    return paths


def lengths_of(paths: Paths) -> dict[str, int]:
    tables = [pl.read_parquet(paths.clean(table)) for table in ("train", "test")]
    return {name: len(text) for table in tables for name, text in table.select("sequence_id", "sequence").iter_rows()}


def vectors(paths: Paths, *, per_nucleotide: bool = True, width: int = WIDTH, seed: int = 3) -> Vectors:
    """Of all sequences; the first number is the place of a nucleotide, the second one that of its sequence."""
    rng, found = np.random.default_rng(seed), {}
    for k, (name, length) in enumerate(lengths_of(paths).items()):
        x_LF = rng.normal(size=(length, width)).astype(np.float16)
        x_LF[:, :2] = np.stack([np.arange(length), np.full(length, k)], axis=1)
        found[name] = x_LF if per_nucleotide else x_LF[0]
    return found


def write_folder(folder: Path, found: Vectors, dtype: type | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, x in found.items():
        np.save(folder / f"{name}.npy", x.astype(dtype or x.dtype))
    return folder


def write_index(folder: Path, found: Vectors) -> Path:
    """Files of other names, in another order, below the folder of their index."""
    write_folder(folder / "files", {f"x{k}": x for k, x in enumerate(found.values())}, np.float16)
    with (folder / "index.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerows([("file", "sequence_id"), *((f"files/x{k}.npy", name) for k, name in enumerate(found))])
    return folder


def write_parquet(path: Path, found: Vectors, *, fixed: bool = True) -> Path:
    """As `pipeline.embed` writes it, or (`fixed` off) with lists of any length."""
    vector = pa.list_(pa.float32(), len(next(iter(found.values()))[-1:].T)) if fixed else pa.list_(pa.float32())
    nested = next(iter(found.values())).ndim == 2
    column = pa.array([x.astype(np.float32).tolist() for x in found.values()], pa.list_(vector) if nested else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.write_table(path, {"sequence_id": list(found), ("nucleotides" if nested else "embedding"): column})
    return path


def bring(paths: Paths, source: Path, name: str = "other") -> dict[str, bytes]:
    report = features.run(source, name=name, paths=paths)
    return {table: path.read_bytes() for table, path in report.outputs.items()}


def shuffled(found: Vectors) -> Vectors:
    return dict(sorted(found.items(), key=lambda item: item[0][::-1], reverse=True))


def settings(*, data: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="drsn", kwargs=DRSN | model),
        data=DataConfig(**{"max_length": 40, "features": "other", **(data or {})}),
        train=TrainConfig(epochs=1, batch_size=8, lr=1e-2),
    )


@pytest.fixture
def trained(paths: Paths, tmp_path: Path) -> Paths:
    """A fold of a network that reads features, and was shown both directions."""
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    tiny.fit(paths, settings(data={"flip": 0.5}))
    return paths


# --- what is brought in ---


@pytest.mark.parametrize("per_nucleotide", [True, False])
def test_every_format_in_every_order_gives_the_same_bytes(paths, tmp_path, per_nucleotide):
    found = vectors(paths, per_nucleotide=per_nucleotide)
    extra = {"elsewhere": found["s0000"]}
    sources = [
        write_folder(tmp_path / "plain", found | extra, np.float32),
        write_index(tmp_path / "indexed", shuffled(found)),
        write_index(tmp_path / "csv", found) / "index.csv",
        write_parquet(tmp_path / "fixed.parquet", shuffled(found)),
        write_parquet(tmp_path / "lists.parquet", found | extra, fixed=False),
    ]
    written = [bring(paths, source) for source in sources]
    assert written[0].keys() == {"train", "test"}
    assert all(each == written[0] for each in written)
    for table, count in (("train", 16), ("test", 3)):
        ids = pl.read_parquet(paths.clean(table))["sequence_id"].to_list()
        expected = np.concatenate([np.atleast_2d(found[name]) for name in ids])
        array = np.load(paths.features("other", table), mmap_mode="r")
        np.testing.assert_array_equal(array, expected)
        assert (array.dtype, len(ids)) == (np.float16, count)


def test_what_was_brought_in_is_told_and_not_done_again(paths, tmp_path):
    folder = write_folder(tmp_path / "given", vectors(paths) | {"elsewhere": np.zeros((4, WIDTH))})
    report = features.run(folder, name="other", paths=paths)
    assert report.status == "built"
    assert features.describe(report.facts) == (
        "3 numbers a nucleotide, 16 train and 3 test sequences; 1 other sequence left out"
    )
    assert features.run(folder, name="other", paths=paths).status == "current"
    np.save(folder / "t9.npy", np.load(folder / "t9.npy") + 1)
    assert features.run(folder, name="other", paths=paths).status == "built"
    assert how_to_make(report.outputs["train"]) == "make features COMP=tiny NAME=other FILE=<folder or parquet>"


def test_a_sequence_without_embedding_is_an_error_that_names_it(paths, tmp_path):
    found = vectors(paths)
    del found["s0003"], found["s0011"]
    for source in (write_folder(tmp_path / "folder", found), write_parquet(tmp_path / "a.parquet", found)):
        with pytest.raises(DataError, match=r"no embedding of 2 of 16 train sequences: s0003, s0011; expected all"):
            bring(paths, source)
    assert not list(paths.features("other", "train").parent.glob("*")), "nothing half-done is left"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda x: x[:-1],
            r"'s0005', of \d+ letters, has float16 \[\d+, 3\]; expected .* as those of 's0000'.*marks of be",
        ),
        (lambda x: x[:, :2], r"'s0005'.*\[\d+, 2\]; expected floating \[\d+, 3\]"),
        (lambda x: x[0], r"'s0005'.* has float16 \[3\]; expected floating \[\d+, 3\]"),
        (lambda x: x.astype(int), r"'s0005'.* has int64"),
        (lambda x: np.where(x == x.max(), np.nan, x), r"'s0005' has 1 values that are not finite in half precision"),
        (
            lambda x: np.where(x == x.max(), np.float32(1e6), x),
            r"'s0005' has 1 values that are not finite .*up to 65,504",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_sequence(paths, tmp_path, change, sentence):
    found = vectors(paths)
    found["s0005"] = change(found["s0005"])
    with pytest.raises(DataError, match=sentence):
        bring(paths, write_folder(tmp_path / "given", found))


def test_a_ragged_row_is_an_error_that_names_the_sequence(paths, tmp_path):
    found: Any = {name: x.tolist() for name, x in vectors(paths).items()}
    found["s0002"][4].append(1.0)
    column = pa.array(list(found.values()), pa.list_(pa.list_(pa.float32())))
    tiny.write_table(tmp_path / "a.parquet", {"sequence_id": list(found), "nucleotides": column})
    with pytest.raises(DataError, match=r"'s0002'.* \[\d+, 0\]; expected"):
        bring(paths, tmp_path / "a.parquet")


def test_a_single_number_is_no_embedding(paths, tmp_path):
    """Normed, nothing of it would be left."""
    with pytest.raises(DataError, match=r"\[\d+, 1\]; expected floating .* F of 2 or more"):
        bring(paths, write_folder(tmp_path / "given", {name: x[:, :1] for name, x in vectors(paths).items()}))


def test_sources_that_are_none_are_refused_in_a_sentence(paths, tmp_path):
    found = vectors(paths)
    folder = write_folder(tmp_path / "given", found)
    with pytest.raises(ConfigError, match=r"NAME=''; expected letters.*Next: NAME=rnafm"):
        bring(paths, folder, name="")
    with pytest.raises(ConfigError, match=r"nowhere: no such file or folder"):
        bring(paths, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no embeddings given"):
        bring(paths, Path())
    (tmp_path / "mine.fasta").write_text(">a\nACGU")
    with pytest.raises(DataError, match=r"mine.fasta: no parquet file"):  # it said: "Next: remove it and run its stage"
        bring(paths, tmp_path / "mine.fasta")
    with pytest.raises(DataError, match=r"no \.npy file; expected <sequence_id>\.npy"):
        bring(paths, tmp_path)
    with pytest.raises(DataError, match=r"no clean table\. Next: make data COMP=other"):
        bring(replace(paths, comp="other"), folder)
    (folder / "s0004.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"s0004\.npy: not a readable array"):
        bring(paths, folder)
    for text, sentence in (
        ("sequence_id,file\na,missing.npy\n", r"missing\.npy: cannot be read"),
        ("sequence_id,file\na,s0001.npy\na,s0002.npy\n", r"2 rows with 1 ids; expected each once"),
        ("id,file\na,s0001.npy\n", r"a row without sequence_id or file"),
    ):
        (folder / "index.csv").write_text(text)
        with pytest.raises(DataError, match=sentence):
            bring(paths, folder)
    twice = pa.concat_tables([pq.read_table(write_parquet(tmp_path / "a.parquet", found))] * 2)
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"38 rows with 19 ids; expected each once"):
        bring(paths, tmp_path / "b.parquet")
    (folder / "index.csv").write_bytes(b"sequence_id,file\n\xff,x.npy\n")
    with pytest.raises(DataError, match=r"index\.csv: no CSV in UTF-8"):
        bring(paths, folder)
    (folder / "index.csv").unlink()
    with (folder / "s0004.npy").open("wb") as handle:
        np.savez(handle, found["s0004"])
    with pytest.raises(DataError, match=r"s0004\.npy: not a readable array \(several arrays in one file\)"):
        bring(paths, folder)
    for column in ("nucleotides", "embedding"):
        tiny.write_table(tmp_path / "d.parquet", {"sequence_id": list(found), column: ["[1.0, 2.0]"] * len(found)})
        with pytest.raises(DataError, match=rf"{column} is of string; expected a list of numbers .*make embed"):
            bring(paths, tmp_path / "d.parquet")
    tiny.write_table(tmp_path / "c.parquet", {"sequence_id": list(found), "vector": list(range(len(found)))})
    with pytest.raises(DataError, match=r"columns sequence_id, vector; expected nucleotides or embedding"):
        bring(paths, tmp_path / "c.parquet")


def test_memory_does_not_grow_with_the_embeddings(paths, tmp_path):
    wide = {name: np.ones((length, 4096), np.float16) for name, length in lengths_of(paths).items()}
    size = sum(x.nbytes for x in wide.values())
    folder = write_folder(tmp_path / "given", wide, np.float16)
    del wide
    tracemalloc.start()
    bring_report = features.run(folder, name="other", paths=paths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in bring_report.outputs.values()) > size
    assert peak < size / 2


# --- from there to the network ---


@pytest.mark.parametrize("per_nucleotide", [True, False])
def test_batches_are_the_same_whatever_the_order_of_the_file(paths, tmp_path, per_nucleotide):
    found = vectors(paths, per_nucleotide=per_nucleotide)
    batches = []
    for source in (write_folder(tmp_path / "a", found), write_parquet(tmp_path / "b.parquet", shuffled(found))):
        bring(paths, source)
        examples = open_examples(tiny.TINY, paths=paths, table="train", features="other")
        batches.append(make_batch(examples, np.array([5, 1, 12])))
    one, other = batches
    assert torch.equal(one.inputs.features_BLF, other.inputs.features_BLF)
    assert one.ids == other.ids == ("s0005", "s0001", "s0012")
    assert one.inputs.features_BLF.dtype == torch.float16
    for b, name in enumerate(one.ids):
        length = int(one.inputs.mask_BL[b].sum())
        expected_LF = np.broadcast_to(found[name], (length, WIDTH))
        np.testing.assert_array_equal(one.inputs.features_BLF[b, :length], expected_LF)
        assert not one.inputs.features_BLF[b, length:].any()


def test_crops_and_flips_move_features_with_their_nucleotides(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    example = open_examples(tiny.TINY, paths=paths, table="train", features="other").example(4)
    turned = flip(crop(example, start=3, length=9))
    np.testing.assert_array_equal(turned.features_LF[:, 0], np.arange(3, 12)[::-1])
    np.testing.assert_array_equal(flip(turned).tokens_L, example.tokens_L[3:12])
    assert example.features_LF is not None
    assert not example.features_LF.flags.writeable


def test_workers_read_the_same_batches(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    config = settings(data={"flip": 0.5, "max_length": 24})
    examples = open_examples(tiny.TINY, paths=paths, table="train", features="other")
    source = BatchSource(examples, np.arange(16), config=config)
    place = Place(epoch=0, batch=1, micro_batch=0)
    with Loader(source, workers=1) as loader:
        (here,), (there,) = source(place), loader.take(place)
    assert here.ids == there.ids
    np.testing.assert_array_equal(here.features_BLF, there.features_BLF)


def test_a_set_without_features_is_as_it_was(paths):
    examples = open_examples(tiny.TINY, paths=paths, table="train")
    assert (examples.features, examples.example(0).features_LF) == (None, None)
    assert read_packed(examples, np.arange(2)).features_BLF is None
    config = settings(data={"features": ""})
    assert features.with_width(config, paths) is config
    model = build_model(config.model, tiny.TINY)
    assert not [name for name in model.state_dict() if "features" in name]
    assert "num_features" not in resolved_config(config, model)["model"]["kwargs"]


def test_features_of_another_clean_table_are_refused(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    tiny.write_values(paths, count=16, tests=3, seed=2)
    with pytest.raises(
        DataError, match=r"features 'other' are of another train table.*Next: make features COMP=tiny NAME"
    ):
        open_examples(tiny.TINY, paths=paths, table="train", features="other")


@pytest.mark.parametrize("damage", [lambda _: b"", lambda was: was[:-8], lambda was: was[:-8] + bytes(8)])
def test_a_damaged_array_is_told(paths, tmp_path, damage):
    """Zeros in place of the last numbers were trained on."""
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    path = paths.features("other", "train")
    path.write_bytes(damage(path.read_bytes()))
    told = r"train\.npy: not what its stage wrote.*Next: make features COMP=tiny NAME=other"
    with pytest.raises(DataError, match=told):
        open_examples(tiny.TINY, paths=paths, table="train", features="other")


def test_an_array_that_is_gone_is_told(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths)))
    paths.features("other", "train").unlink()
    with pytest.raises(DataError, match=r"train\.npy: missing\. Next: make features COMP=tiny NAME=other"):
        open_examples(tiny.TINY, paths=paths, table="train", features="other")


def test_features_that_are_not_there_and_widths_that_are_said_are_refused(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths)), name="rnafm")
    with pytest.raises(ConfigError, match=r"data\.features = 'other': no .* there are rnafm\. Next: make features"):
        tiny.fit(paths, settings())
    with pytest.raises(ConfigError, match=r"num_features = 7; expected 3, which follows from data\.features = 'rnafm'"):
        tiny.fit(paths, settings(data={"features": "rnafm"}, num_features=7))
    with pytest.raises(ConfigError, match=r"num_features = 7; expected 0"):
        tiny.fit(paths, settings(data={"features": ""}, num_features=7))


def test_what_only_the_features_say_is_learned(tmp_path):
    """Reactivity that follows no letter, but one of the features."""
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    texts, rng = tiny.write_values(paths, count=48), np.random.default_rng(5)
    table = pl.read_parquet(paths.clean("train"))
    level = [rng.uniform(0, 1, len(text)).astype(np.float32) for text in texts]
    table = table.with_columns(pl.Series(name, level, pl.List(pl.Float32)) for name in tiny.TARGETS)
    table.write_parquet(paths.clean("train"))
    found = vectors(paths, width=9)
    for name, values in zip(table["sequence_id"], level, strict=True):
        found[name] = np.stack([6 * values - 3, *np.tile([[1], [-1]], (4, len(values)))], axis=1).astype(np.float32)
    bring(paths, write_folder(tmp_path / "given", found))
    config = settings(depth=1)
    config = replace(config, train=replace(config.train, epochs=15, ema_decay=0.9))
    assert tiny.fit(paths, config).facts["metric"] < 0.15, "0.25 is what the letters alone could reach"


# --- training and what comes after ---


def test_the_checkpoint_says_what_it_reads_and_predicts_alone(trained):
    meta = CheckpointStore(trained.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()
    assert meta is not None
    done = read_manifest(trained.features_manifest("other"))
    assert meta["data"]["features"] == done["outputs"]["train"]
    assert (meta["config"]["data"]["features"], meta["config"]["model"]["kwargs"]["num_features"]) == ("other", WIDTH)
    report = predict.run(competition=tiny.TINY, paths=trained, run=tiny.RUN, fold=0)
    assert report.facts["oof"]["sequences"] == 8
    assert report.facts["test"]["sequences"] == 3
    assert tiny.fit(trained, settings(data={"flip": 0.5})).status == "current"


def test_changed_features_are_refused_by_resumed_runs_and_predictions(trained, tmp_path):
    bring(trained, write_folder(tmp_path / "changed", vectors(trained, seed=4)))
    with pytest.raises(ConfigError, match=r"begun with other settings or data: data\.features \w+ -> \w+"):
        tiny.fit(trained, settings(data={"flip": 0.5}))
    with pytest.raises(ConfigError, match=r"config\.data\.features other -> ; .*data\.features \w+ -> \(absent\)"):
        tiny.fit(trained, settings(data={"flip": 0.5, "features": ""}))
    for which in (("oof",), ("test",)):
        with pytest.raises(DataError, match=r"features 'other' changed since tiny\.sim80_k2 fold 0 was trained"):
            predict.run(competition=tiny.TINY, paths=trained, run=tiny.RUN, fold=0, which=which)


def test_test_features_that_change_are_predicted_again(trained, tmp_path):
    run = {"competition": tiny.TINY, "paths": trained, "run": tiny.RUN, "fold": 0, "which": ("test",)}
    before = pq.read_table(predict.run(**run).outputs["test"])
    found = vectors(trained)
    found["t9"] = found["t9"] * 3 - 1
    bring(trained, write_folder(tmp_path / "changed", found))
    after = pq.read_table(predict.run(**run).outputs["test"])
    changed = [a["sequence_id"] for a, b in zip(before.to_pylist(), after.to_pylist(), strict=True) if a != b]
    assert changed == ["t9"]


@pytest.fixture
def mine(trained: Paths, tmp_path: Path) -> Path:
    """The test set as a file of one's own."""
    table = pl.read_parquet(trained.clean("test"))
    path = tmp_path / "mine.fasta"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in table.select("sequence_id", "sequence").iter_rows()))
    return path


def expected_of(paths: Paths) -> dict[str, np.ndarray]:
    report = predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0, which=("test",))
    rows = pq.read_table(report.outputs["test"]).to_pylist()
    return {row["sequence_id"]: np.array([row[name] for name in tiny.TARGETS]).T for row in rows}


def test_sequences_of_ones_own_are_predicted_with_their_features(trained, mine, tmp_path):
    how: dict[str, Any] = {"competition": tiny.TINY, "paths": trained, "run": tiny.RUN}
    with pytest.raises(ConfigError, match=r"'other' .* given: none\. Next: the same .* FEATURES=.other="):
        own_file.predict_run(mine, **how)
    with pytest.raises(ConfigError, match="given: rnafm"):
        own_file.predict_run(mine, **how, embeddings={"rnafm": tmp_path / "given"})
    done = own_file.predict_run(mine, **how, embeddings={"other": tmp_path / "given"})
    rows = pq.read_table(done.own.test(tiny.RUN, 0)).to_pylist()
    for row in rows:
        found_LC = np.array([row[name] for name in tiny.TARGETS]).T
        np.testing.assert_allclose(found_LC, expected_of(trained)[row["sequence_id"]], atol=1e-6)
    wide = write_folder(tmp_path / "wide", vectors(trained, width=5))
    with pytest.raises(DataError, match=r"features 'other': 5 numbers each; .* reads 3\. Next: give those of"):
        own_file.predict_run(mine, **how, embeddings={"other": wide})


def test_structures_of_ones_own_without_features_are_refused_with_a_way_on(paths, tmp_path):
    """It advised make predict FILE=…, which advises make structures FILE=…."""
    meta = {"run": "r", "config": {"data": {"features": "other"}}, "data": {}}
    how: dict[str, Any] = {"competition": tiny.TINY3D, "source": None, "own": paths, "paths": paths}
    with pytest.raises(
        ConfigError, match=r"reads features 'other', which make structures .* Next: MODEL=<another run>"
    ):
        own_file.apply_checkpoint(tmp_path, meta, False, **how)


def test_what_reads_features_can_itself_be_embedded(trained, mine, tmp_path):
    how: dict[str, Any] = {"competition": tiny.TINY, "paths": trained, "run": tiny.RUN, "fold": 0}
    with pytest.raises(ConfigError, match="reads features 'other'"):
        embed.run(mine, **how)
    report = embed.run(mine, **how, per_nucleotide=True, embeddings={"other": tmp_path / "given"})
    table = pl.read_parquet(report.outputs["embeddings"])
    assert table["nucleotides"].list.len().to_list() == [
        len(text) for text in pl.read_parquet(trained.clean("test"))["sequence"]
    ]
    again = replace(trained, comp="second")  # and its embeddings may be another network's features
    shutil.copytree(trained.clean("test").parent, again.clean("test").parent)
    again.clean("train").unlink()
    assert features.run(report.outputs["embeddings"], name="first", paths=again).facts["width"] == DRSN["width"]


def test_a_notebook_takes_features_beside_the_sequences(trained, mine, monkeypatch):
    monkeypatch.setattr(notebook, "get_competition", lambda _: tiny.TINY)
    network, expected = notebook.Trained(trained.fold_dir(tiny.RUN, 0)), expected_of(trained)
    texts = dict(pl.read_parquet(trained.clean("test")).select("sequence_id", "sequence").iter_rows())
    found = vectors(trained)
    for name, values_LC in zip(
        texts, network.predict(list(texts.values()), [found[name] for name in texts]), strict=True
    ):
        np.testing.assert_allclose(values_LC, expected[name], atol=1e-6)
    assert network.predict(["GGAAC"], [np.ones(WIDTH)])[0].shape == (5, 2)
    with pytest.raises(DataError, match=r"got 0 arrays of features; expected one for each of 1, \[L, 3\] or \[3\]"):
        network.predict(["GGAAC"])
    with pytest.raises(
        DataError, match=r"'sequence 0', of 5 letters, has float64 \[4, 3\]; expected floating \[5, 3\]"
    ):
        network.predict(["GGAAC"], [np.ones((4, WIDTH))])


def test_pseudo_labels_come_with_the_features_of_the_test_set(trained):
    predict.run(competition=tiny.TINY, paths=trained, run=tiny.RUN, fold=0)
    config = settings(data={"pseudo": tiny.RUN})
    model = build_model(features.with_width(config, trained).model, tiny.TINY)
    data, digests = train.load_data(config, model, competition=tiny.TINY, paths=trained, split=tiny.SPLIT, fold=0)
    assert {"features", "pseudo"} <= digests.keys()
    batch = make_batch(data.examples, data.train[-3:])
    np.testing.assert_array_equal(batch.inputs.features_BLF[0, :, 1].unique(), [16.0])  # the first test sequence


def test_a_bad_batch_is_kept_and_described_with_its_features(trained, tmp_path):
    examples = open_examples(tiny.TINY, paths=trained, table="train", features="other")
    store = CheckpointStore(trained.fold_dir(tiny.RUN, 0) / "checkpoints")
    newest = store.load_newest()
    assert newest is not None
    numbers: dict[str, Any] = {
        "step": 3,
        "place": [0, 1],
        "loss": math.inf,
        "grad_norm": 1.0,
        "scale": 1.0,
        "weight": 1.0,
    }
    bad = BadBatch(
        seen="nonfinite_loss", precision="fp32", batches=[make_batch(examples, np.arange(2))], weights=newest.weights,
        weights_step=3, random={"cpu": torch.get_rng_state()}, meta=newest.meta, **numbers,
    )  # fmt: skip
    bad.save(trained.fold_dir(tiny.RUN, 0) / "bad")
    report = replay.run(competition=tiny.TINY, paths=trained, run=tiny.RUN, fold=0, precision="fp32")
    longest = float(examples.lengths[:2].max())
    assert report.facts["inputs"]["features"] == {"range": (pytest.approx(-3, abs=2), longest - 1), "nonfinite": 0}
    assert report.facts["passes"]["fp32"]["seen"] == "finite"


def test_the_plan_counts_the_features(paths, tmp_path):
    bring(paths, write_folder(tmp_path / "given", vectors(paths, width=512)))
    totals = []
    for name in ("", "other"):
        config = features.with_width(settings(data={"features": name}), paths)
        found = plan.make_plan(config, lambda config=config: build_model(config.model, tiny.TINY), length=40)
        totals.append(found.need)
    assert totals[1].parameters - totals[0].parameters == 2 * 512 + 512 * 16 + 16
    batch = 8 * 40 * 512
    assert totals[1].activations - totals[0].activations > (2 + 4) * batch  # float16 as given, float32 as normed


def test_notebooks_for_kaggle_are_refused_while_they_are_packed(trained):
    order = order_of(trained, overrides=('data.features="other"',))
    with pytest.raises(ConfigError, match=r"data\.features = 'other': embeddings do not travel.*Next: make train"):
        bundle.build(order)
    told = {"runs": [tiny.RUN], "folds": [0], "split": tiny.SPLIT}
    write_json(trained.ensemble_dir("all") / "weights.json", told)
    with pytest.raises(ConfigError, match=r"tiny\.sim80_k2 fold0 reads features: embeddings do not travel"):
        bundle.build(order_of(trained, mode="predict", ensemble="all"))
