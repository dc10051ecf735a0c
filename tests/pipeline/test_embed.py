"""Embeddings: the layer that the heads read, one row per sequence of any file, in its order, whatever the batches."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.registry import create_model, list_models
from pipeline import embed, inference, predict, train
from pipeline.competitions import get_competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, DataError, DivergedError, StoppedError
from pipeline.paths import Paths
from pipeline.stage import Report
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.stop import StopRequest
from tests.models.cases import SMALL, batch
from tests.pipeline import labelled_sets, tiny

DRSN = {"width": 16, "depth": 2, "kernel": 3, "dilations": 2, "dropout": 0.0}
TEXTS = ["GGGGAAACCC", "ACGUACGUACGUACGUACG", "A", "CCCCCUUUUUGGGGG"]
FASTA = "".join(
    f">{name} of some kind\n{text[:7].replace('U', 't')}\n{text[7:]}\n"
    for name, text in zip("zbya", TEXTS, strict=True)
)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.v2.fasta"
    path.write_text(FASTA)
    return path


def settings(*, data: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="drsn", kwargs=DRSN | model),
        data=DataConfig(max_length=40, **(data or {})),
        train=TrainConfig(epochs=1, batch_size=16, lr=1e-2),
    )


def fit(paths: Paths, config: RunConfig | None = None, *, competition=tiny.TINY) -> None:
    train.run(config or settings(), competition=competition, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)


def embed_file(file: Path, paths: Paths, *, competition=tiny.TINY, **options: Any) -> Report:
    return embed.run(file, competition=competition, paths=paths, run=tiny.RUN, fold=0, **options)


def table(report: Report) -> pl.DataFrame:
    return pl.read_parquet(report.outputs["embeddings"])


def weights(paths: Paths) -> dict[str, torch.Tensor]:
    found = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest()
    assert found is not None
    return found.weights


@pytest.mark.parametrize("name", list_models())
def test_every_network_has_the_layer_whatever_the_padding(name):
    model = create_model(name, **SMALL[name]).eval()
    inputs = batch([23, 9, 31], pad=17)
    with torch.no_grad():
        together = model.embed(inputs)
        for row, length in enumerate([23, 9, 31]):
            alone = inputs._replace(
                **{key: value[row : row + 1, :length] for key, value in inputs._asdict().items() if key != "bpp_BLL"},
                bpp_BLL=None,
            )
            torch.testing.assert_close(together[row, :length], model.embed(alone)[0], rtol=1e-5, atol=1e-5)
            assert not together[row, length:].any()
    assert together.dtype == torch.float32
    assert together.shape[2] == SMALL[name]["width"]


def test_rows_are_those_of_the_file_in_its_order(paths, file):
    fit(paths)
    report = embed_file(file, paths, per_nucleotide=True)
    rows = table(report)
    assert rows["sequence_id"].to_list() == ["z", "b", "y", "a"]
    assert rows.schema["embedding"] == pl.Array(pl.Float32, 16)
    assert rows["nucleotides"].list.len().to_list() == [10, 19, 1, 15]
    assert report.facts["nucleotides"] == 45
    assert report.outputs["embeddings"] == paths.embeddings_dir("mine.v2") / f"{tiny.RUN}.fold0.parquet"
    for mean_D, x_LD in rows.select("embedding", "nucleotides").iter_rows():
        np.testing.assert_allclose(mean_D, np.mean(x_LD, axis=0), atol=1e-6)


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_the_head_makes_the_predictions_of_the_embeddings(paths, flip):
    """So the layer, the checkpoint, the letters and both directions are those of the predictions."""
    fit(paths, settings(data={"flip": flip}))
    predicted = pl.read_parquet(
        predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0, which=("test",)).outputs["test"]
    )
    rows = table(embed_file(paths.clean("test"), paths, per_nucleotide=True)).sort("sequence_id")
    assert rows["sequence_id"].to_list() == predicted["sequence_id"].to_list()
    head = {
        name.rpartition(".")[2]: tensor.numpy() for name, tensor in weights(paths).items() if "heads.values" in name
    }
    for x_LD, values in zip(rows["nucleotides"], predicted.select(tiny.TARGETS).iter_rows(), strict=True):
        values_LC = np.array(x_LD.to_list()) @ head["weight"].T + head["bias"]
        np.testing.assert_allclose(values_LC, np.array(values).T, atol=1e-5)


def test_batch_size_and_padding_do_not_move_an_embedding(paths, file, monkeypatch):
    fit(paths)
    found = []
    for tokens in (1, 40, 100_000):
        monkeypatch.setattr(inference, "BATCH_TOKENS", tokens)
        report = embed_file(file, paths)
        found.append(table(report)["embedding"].to_numpy())
        report.outputs["embeddings"].unlink()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_tables_and_fasta_give_the_same(paths, file, tmp_path, ending):
    fit(paths)
    expected = table(embed_file(file, paths))
    rows = pl.DataFrame({"id": list("zbya"), "seq": TEXTS})
    other = tmp_path / f"other.{ending}"
    writers = {
        "csv": rows.write_csv,
        "tsv": lambda path: rows.write_csv(path, separator="\t"),
        "parquet": rows.write_parquet,
    }
    writers[ending](other)
    assert table(embed_file(other, paths)).equals(expected)


def test_batches_for_a_network_of_pairs_are_small(tmp_path, monkeypatch):
    """400 sequences of 200 nt went through a pair track of 8 channels in two batches, and took 4.1 GiB."""
    paths = Paths(comp="tiny3d", root=tmp_path / "artifacts")
    tiny.write_structures(paths)
    train.run(settings(), competition=tiny.TINY3D, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)
    sizes = []
    both_ways = embed.both_ways

    def told(job, network, device, positions, **how):
        sizes.append(len(positions))
        return both_ways(job, network, device, positions, **how)

    monkeypatch.setattr(embed, "both_ways", told)
    monkeypatch.setattr(inference, "STRUCTURE_PAIRS", 2 * 100**2)
    file = tmp_path / "long.fasta"
    file.write_text("".join(f">{k}\n{'ACGU' * 25}\n" for k in range(5)))
    embed_file(file, paths, competition=tiny.TINY3D)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("bom.fasta", "\ufeff>z\r\nGGGGAAACCC\r\n"), ("bom.csv", "\ufefftarget_id,sequence\r\nz,GGGGAAACCC\r\n")],
)
def test_files_of_windows_and_of_kaggle_keep_their_ids(paths, tmp_path, name, text):
    """'\\ufeff>a' was no header, and target_id, as the 3D competitions have it, no id: rows were numbered."""
    fit(paths)
    (tmp_path / name).write_bytes(text.encode())
    assert table(embed_file(tmp_path / name, paths))["sequence_id"].to_list() == ["z"]


def test_a_second_time_is_current_and_a_changed_file_is_not(paths, file):
    fit(paths)
    first = embed_file(file, paths)
    data = first.outputs["embeddings"].read_bytes()
    again = embed_file(file, paths)
    assert (again.status, again.facts) == ("current", first.facts)
    first.outputs["embeddings"].unlink()
    assert embed_file(file, paths).outputs["embeddings"].read_bytes() == data
    file.write_text(FASTA.replace(">z", ">new"))
    changed = embed_file(file, paths)
    assert changed.status == "built"
    assert table(changed)["sequence_id"][0] == "new"


def test_stopped_in_the_middle_it_leaves_nothing(paths, file, monkeypatch):
    fit(paths)
    polls = iter([None, "SIGTERM"])
    monkeypatch.setattr(inference, "BATCH_TOKENS", 1)
    monkeypatch.setattr(StopRequest, "signalled", property(lambda _: next(polls)))
    with pytest.raises(StoppedError, match="nothing is half-written"):
        embed_file(file, paths)
    assert not list(paths.embeddings_dir("mine.v2").glob("*.parquet"))
    assert not list(paths.embeddings_dir("mine.v2").glob(".*part*"))


def test_pairing_probabilities_are_computed_for_the_file(paths, tmp_path):
    pytest.importorskip("RNA")
    tiny.write_bpp(paths, tiny.sequences(64, seed=1) + tiny.sequences(9, seed=99))
    fit(paths, settings(use_bpp=True))
    file = tmp_path / "stem.fasta"
    file.write_text(">hairpin\nGGGGGGAAAACCCCCC\n>none\nAAAAAAAAAAAAAAAA\n")
    report = embed_file(file, paths)
    own = Paths(comp="tiny", root=paths.embeddings_dir("stem"))
    pairs = open_examples(tiny.TINY, paths=own, table="test", bpp=True)
    assert len(pairs.example(0).bpp_p_K) > 5
    assert len(pairs.example(1).bpp_p_K) == 0
    assert table(report).height == 2


def test_a_labelled_set_brings_its_letters_and_its_crop(tmp_path):
    """Odd letters become N where the network has one; windows are seen as in training."""
    competition = get_competition("labelled-mine")
    paths = Paths(comp="labelled-mine", root=tmp_path / "artifacts")
    frame = labelled_sets.write_planted(paths)
    fit(paths, settings(data={"crop": 11}), competition=competition)
    file, middle = tmp_path / "some.csv", frame["sequence"][0][5:16]
    file.write_text(f"id,sequence\nwhole,{frame['sequence'][0]}\nmiddle,{middle}\nodd,{middle[:5]}R{middle[6:]}\n")
    report = embed_file(file, paths, competition=competition)
    whole_D, middle_D, odd_D = table(report)["embedding"].to_numpy()
    np.testing.assert_allclose(whole_D, middle_D, atol=1e-6)
    assert np.abs(odd_D - middle_D).max() > 1e-3
    assert report.facts["odd_letters"] == 1


def test_what_cannot_be_embedded_is_told(paths, file, tmp_path):
    fit(paths)
    bad = tmp_path / "bad.fasta"
    bad.write_text(f">a\n{'ACGU' * 10}\n>b\n{'ACGU' * 10}N\n")
    with pytest.raises(DataError, match=r"bad\.fasta: row 2 \(id b\): 1 letter other than ACGU.* Next: "):
        embed_file(bad, paths)
    with pytest.raises(DataError, match=r"absent\.fasta: no such file\. Next: make embed FILE="):
        embed_file(tmp_path / "absent.fasta", paths)
    with pytest.raises(ConfigError, match=r"no file given.* Next: make embed FILE="):
        embed_file(Path(), paths)
    (tmp_path / "bad.doc").write_text("ACGU")
    with pytest.raises(DataError, match=r"expected \.csv.* Next: "):
        embed_file(tmp_path / "bad.doc", paths)
    with pytest.raises(ConfigError, match="trained on tiny; expected tiny3d"):
        embed_file(file, paths, competition=tiny.TINY3D)


def test_an_embedding_that_is_not_finite_is_stopped(paths, file, monkeypatch):
    fit(paths)
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights(paths).items()}
    monkeypatch.setattr(inference, "load_weights", lambda _: spoilt)
    with pytest.raises(DivergedError, match="is not finite"):
        embed_file(file, paths)
