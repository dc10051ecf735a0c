"""Sequences of one's own: predicted as a test set would be, by every fold or an ensemble, and told in tables."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import own_file, predict, train, words
from pipeline.competitions import get_competition
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Classes, Numbers, read_labels
from pipeline.paths import Paths
from pipeline.runs import find_run, warn_of_other_data
from pipeline.stage import Report
from submissions import own_tables
from tests import number_tables
from tests.chain_tables import FOLDS, SPLIT
from tests.pipeline import labelled_sets, tiny

FASTA = ">z of some kind\nGGGGAAAtCCC\n>b\nACGUACGUACGUACGUACG\n>a\nA\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts with both folds of a run, which no test writes to."""
    paths = Paths(comp="tiny", root=tmp_path_factory.mktemp("trained"))
    tiny.write_values(paths)
    fit(paths)
    return paths.root


@pytest.fixture
def paths(tmp_path: Path, trained: Path) -> Paths:
    shutil.copytree(trained, tmp_path / "artifacts")
    return Paths(comp="tiny", root=tmp_path / "artifacts")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.v2.fasta"
    path.write_text(FASTA)
    return path


def settings(**data: Any) -> RunConfig:
    kwargs = {"width": 8, "depth": 1, "kernel": 3, "dilations": 1, "dropout": 0.0}
    return RunConfig(
        model=ModelConfig(name="drsn", kwargs=kwargs),
        data=DataConfig(max_length=40, **data),
        train=TrainConfig(epochs=1, batch_size=16, lr=1e-2),
    )


def fit(paths: Paths, *, folds: tuple[int, ...] = (0, 1), competition: Competition = tiny.TINY, **data: Any) -> None:
    where: dict[str, Any] = {"competition": competition, "paths": paths, "run": tiny.RUN}
    for fold in folds:
        train.run(settings(**data), split=tiny.SPLIT, fold=fold, **where)
        predict.run(fold=fold, **where)


def tables_of(done: own_file.Predicted, folder: Path) -> Report:
    ensemble.apply(done.own, competition=done.competition, name=done.name, weights=done.weights)
    which: dict[str, Any] = {"name": done.name, "folder": folder, "title": "mine", "longest": done.longest}
    return own_tables.run(done.own, competition=done.competition, **which)


def predicted(file: Path, paths: Paths, *, competition: Competition = tiny.TINY, **which: Any) -> Report:
    which = {"run": tiny.RUN, **which} if "name" not in which else which
    stage = own_file.predict_ensemble if "name" in which else own_file.predict_run
    return tables_of(stage(file, competition=competition, paths=paths, **which), own_file.folder_of(file, paths))


def test_a_file_is_predicted_as_the_test_set_and_joined_as_by_an_ensemble(paths, tmp_path):
    """The file is the test set itself; letters, checkpoints, folds and both directions are those of `make predict`."""
    shutil.rmtree(paths.run_dir(tiny.RUN))
    fit(paths, flip=0.5)
    ensemble.run(paths, competition=tiny.TINY, name="all", runs=[tiny.RUN], split=tiny.SPLIT)
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet")
    for which in ({}, {"name": "all"}):
        found = pl.read_parquet(predicted(paths.clean("test"), paths, **which).outputs["values"])
        assert found["sequence_id"].to_list() != sorted(found["sequence_id"])  # in the order of the file
        found = found.sort("sequence_id")
        for target in tiny.TARGETS:
            flat = [table[target].explode().to_numpy() for table in (found, expected)]
            np.testing.assert_allclose(flat[0], flat[1].clip(0, 1), atol=1e-6)


def test_one_fold_is_used_where_one_is_said_and_all_that_are_trained_otherwise(paths, file):
    shutil.rmtree(paths.fold_dir(tiny.RUN, 0))
    one = predicted(file, paths, fold=1)
    every = predicted(file, paths)
    assert one.outputs["table"].name == f"{tiny.RUN}.fold1.csv"
    assert every.outputs["table"].read_text() == one.outputs["table"].read_text()


def test_the_csv_has_a_row_for_each_nucleotide_in_the_order_of_the_file(paths, file):
    report = predicted(file, paths)
    assert report.outputs["table"] == paths.predictions_dir("mine.v2") / f"{tiny.RUN}.csv"
    rows = pl.read_csv(report.outputs["table"])
    assert rows.columns == ["sequence_id", "position", "nucleotide", *tiny.TARGETS]
    assert list(dict.fromkeys(rows["sequence_id"])) == ["z", "b", "a"]
    assert "".join(rows.filter(sequence_id="z")["nucleotide"]) == "GGGGAAAUCCC"
    assert rows.filter(sequence_id="b")["position"].to_list() == list(range(1, 20))
    lists = pl.read_parquet(report.outputs["values"])
    assert lists.columns == ["sequence_id", "sequence", *tiny.TARGETS]
    np.testing.assert_allclose(rows[tiny.TARGETS[0]], lists[tiny.TARGETS[0]].explode(), atol=5.1e-5)


def test_a_csv_of_several_chunks_has_one_header(paths, file, monkeypatch):
    whole = predicted(file, paths).outputs["table"]
    text = whole.read_text()
    monkeypatch.setattr(own_tables, "_ROWS", 1)
    whole.unlink()
    assert predicted(file, paths).outputs["table"].read_text() == text


def test_the_page_shows_every_letter_and_needs_nothing_from_elsewhere(paths, file):
    text = predicted(file, paths).outputs["page"].read_text()
    for letters in ("GGGGAAAUCCC", "ACGUACGUACGUACGUACG"):
        assert f">{letters}</text>" in text
    assert text.count("<svg") == 3
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_bars_are_as_high_as_the_values_and_stand_over_their_letters():
    drawing = own_tables.profile_drawing("A" * 101 + "C", np.full((1, 102), 0.5), ["a"], bases=[0.0])
    bars = drawing.split(' fill="var(--s0)"')[0].rpartition('d="')[2]
    assert bars.count("v-27.0") == 100
    assert bars.startswith("M1 ")
    assert ">AC</text>" in drawing  # on the second line
    assert ">100</text>" in drawing


def test_bars_begin_at_zero_where_values_may_be_negative():
    """A value of 0 had a bar from the lower edge."""
    drawing = own_tables.profile_drawing("ACG", np.array([[0.0, 0.25, 1.0]]), ["a"], bases=[0.25])
    bars = drawing.split(' fill="var(--s0)"')[0].rpartition('d="')[2]
    assert [bars.count(f" 48v{height}h") for height in ("13.5", "0.0", "-40.5")] == [1, 1, 1]


def test_a_fold_is_no_run_and_the_command_that_is_meant_is_told(paths):
    folder = paths.run_dir(tiny.RUN) / "fold1"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match=rf"one fold of a run; .* Next: MODEL={folder.parent} FOLD=1\."):
        find_run(str(folder), split=SPLIT)


def test_sequences_longer_than_those_of_training_are_told(paths, tmp_path, capsys):
    file = tmp_path / "long.fasta"
    file.write_text(f">short\nACGU\n>long\n{'ACGU' * 20}\n")
    page = predicted(file, paths).outputs["page"].read_text()
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 sequences are longer than the 40 nt of training, up to 80 nt (long)" in said
    assert "long · 80 nt, longer than the 40 nt of training" in page
    assert "short · 4 nt<" in page


def test_the_same_file_again_changes_nothing_and_another_one_does(paths, file):
    first = predicted(file, paths)
    text = first.outputs["table"].read_text()
    assert predicted(file, paths).status == "current"
    file.write_text(FASTA.replace(">z", ">new"))
    again = predicted(file, paths)
    assert again.status == "built"
    assert again.outputs["table"].read_text() == text.replace("\nz,", "\nnew,")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"the file is empty"),
        (">a\n\n", r"empty sequence"),
        (">a\nACGU\n>a\nACG\n", r"an id twice; expected each once"),
        (f">a\n{'ACGU' * 9}N\n", r"1 letter other than ACGU"),
        (">a\nMKWVTFISLLFLFSSAYS\n", r"16 letters other than ACGU \(T is read as U\), and the network was trained on"),
    ],
)
def test_what_cannot_be_predicted_is_told_in_one_sentence(paths, tmp_path, text, sentence):
    file = tmp_path / "bad.fasta"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"bad\.fasta.*{sentence}.* Next: "):
        own_file.predict_run(file, competition=tiny.TINY, paths=paths, run=tiny.RUN)


@pytest.mark.parametrize("sequence", ["ACGUNACGU", "GG12"])
def test_of_a_single_sequence_no_file_is_named_that_nobody_made(paths, sequence):
    """It said "sequence-6b0f3c1a.fasta: …; repair the sequences, or raise max_odd in columns.toml"."""
    file = own_file.write_single(sequence, paths)
    with pytest.raises(DataError, match=r"^SEQ: [^/]*Next: repair the sequence"):
        own_file.predict_run(file, competition=tiny.TINY, paths=paths, run=tiny.RUN)


def test_what_is_missing_is_told(paths, file, tmp_path):
    what: dict[str, Any] = {"competition": tiny.TINY, "paths": paths}
    with pytest.raises(DataError, match="never trained"):
        own_file.predict_run(file, run="other.sim80_k2", **what)
    with pytest.raises(DataError, match=r"absent: no such file\. Next: make predict FILE="):
        own_file.predict_run(tmp_path / "absent", run=tiny.RUN, **what)
    with pytest.raises(ConfigError, match=r"no file given.* Next: make predict FILE="):
        own_file.predict_run(Path(), run=tiny.RUN, **what)
    with pytest.raises(DataError, match=r"weights\.json: missing .*Next: make ensemble COMP=tiny NAME=best"):
        own_file.predict_ensemble(file, name="best", **what)
    with pytest.raises(ConfigError, match=r"about structures.* Next: make structures FILE="):
        own_file.predict_run(file, run=tiny.RUN, competition=tiny.TINY3D, paths=paths)


def test_a_run_may_lie_anywhere_and_is_not_written_to(paths, file, tmp_path):
    expected = predicted(file, paths).outputs["table"].read_text()
    elsewhere = tmp_path / "given" / "by a friend"
    elsewhere.parent.mkdir()
    paths.run_dir(tiny.RUN).rename(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    run = find_run(str(elsewhere), split=tiny.SPLIT)
    other = Paths(comp="tiny", root=tmp_path / "new")
    assert predicted(file, other, run=run).outputs["table"].read_text() == expected
    assert sorted(elsewhere.rglob("*")) == before


def test_classes_have_a_column_each_and_the_most_probable_one(tmp_path):
    competition = get_competition("labelled-mine")
    paths = Paths(comp="labelled-mine", root=tmp_path / "artifacts")
    labelled_sets.write_planted(paths)
    for fold in (0, 1):
        train.run(settings(), competition=competition, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=fold)
    file = tmp_path / "some.csv"
    file.write_text("id,sequence,label\nx,ACGTACGTNACGT,what it may be\ny,GGACGGACG,\n")
    report = predicted(file, paths, competition=competition)
    rows = pl.read_csv(report.outputs["table"])
    assert rows.columns == ["sequence_id", "p(one)", "p(two)", "most_probable"]
    assert rows["sequence_id"].to_list() == ["x", "y"]
    np.testing.assert_allclose(rows["p(one)"] + rows["p(two)"], 1, atol=2e-4)
    likely = ["one" if one > two else "two" for one, two in zip(rows["p(one)"], rows["p(two)"], strict=True)]
    assert rows["most_probable"].to_list() == likely
    assert list(report.outputs) == ["table"]
    of_numbers = get_competition(competition.name).with_facts({"numbers": ["half_life"]})  # what the data are of by now
    assert predicted(file, paths, competition=of_numbers).outputs["table"].read_text().startswith("sequence_id,p(one)")


def test_numbers_have_a_column_each_by_networks_and_words_as_the_ensemble_joins_them(tmp_path):
    paths = Paths(comp="labelled-melting", root=tmp_path / "artifacts")
    competition = number_tables.write_number_data(paths, np.random.default_rng(3), sequences=48)
    what: dict[str, Any] = {"competition": competition, "paths": paths}
    run = f"drsn.{SPLIT}"
    for fold in range(FOLDS):
        train.run(settings(), run=run, split=SPLIT, fold=fold, **what)
        predict.run(run=run, fold=fold, **what)
    words.run(paths, competition=competition, split=SPLIT)
    runs = [run, words.run_name(SPLIT)]
    ensemble.run(paths, competition=competition, name="all", runs=runs, split=SPLIT)
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet")
    file = paths.clean("test")
    rows = pl.read_csv(predicted(file, paths, name="all", competition=competition).outputs["table"])
    assert rows.columns == ["sequence_id", *number_tables.NAMES]
    assert rows["sequence_id"].to_list() == pl.read_parquet(file)["sequence_id"].to_list()
    told_NC = np.stack(expected.sort("sequence_id")["numbers"].to_list())
    np.testing.assert_allclose(rows.sort("sequence_id").select(number_tables.NAMES).to_numpy(), told_NC, rtol=1e-4)
    alone = predicted(file, paths, run=run, competition=get_competition("labelled-melting"))
    assert pl.read_csv(alone.outputs["table"]).columns == rows.columns, "the checkpoint knows their names"
    ensemble.run(paths, competition=competition, name="networks", runs=[run], split=SPLIT)
    told = json.loads((paths.ensemble_dir("all") / "weights.json").read_text())
    told["weights"] = {name: {run: 1.0, runs[1]: 0.0} for name in told["weights"]}
    (paths.ensemble_dir("all") / "weights.json").write_text(json.dumps(told))
    shutil.rmtree(paths.run_dir(runs[1]))
    rows = pl.read_csv(predicted(file, paths, name="all", competition=competition).outputs["table"])
    assert rows.equals(pl.read_csv(alone.outputs["table"])), "a run without weight is not asked"
    file = Path(shutil.copy(file, tmp_path / "mine.parquet"))
    shutil.rmtree(paths.clean("train").parent)
    joined = predicted(file, paths, name="networks", competition=get_competition("labelled-melting"))
    assert pl.read_csv(joined.outputs["table"]).columns == rows.columns, "it was a KeyError: 'classes'"


def test_runs_that_predicted_other_labels_are_told(tmp_path, capsys):
    """Numbers in another unit, in the same folds, were scored by predictions of the earlier ones without a word."""
    paths = Paths(comp="labelled-melting", root=tmp_path / "artifacts")
    competition = number_tables.write_number_data(paths, np.random.default_rng(3), sequences=48)
    what: dict[str, Any] = {"competition": competition, "paths": paths}
    runs = [f"drsn.{SPLIT}", words.run_name(SPLIT)]

    def told() -> list[str]:
        capsys.readouterr()
        warn_of_other_data(paths, runs)
        said = " ".join(capsys.readouterr().err.split())
        return [run for run in runs if f"{run}: predicted before the clean tables were written anew" in said]

    def make(fold: int) -> None:
        train.run(settings(), run=runs[0], split=SPLIT, fold=fold, restart=True, **what)
        predict.run(run=runs[0], fold=fold, **what)

    for fold in range(2):
        make(fold)
    words.run(paths, competition=competition, split=SPLIT)
    assert told() == []
    clean = pl.read_parquet(paths.clean("train"))
    clean.with_columns(pl.col("numbers").list.eval(pl.element() * 1e-9)).write_parquet(paths.clean("train"))
    assert told() == runs
    words.run(paths, competition=competition, split=SPLIT)
    assert told() == runs[:1]
    make(0)  # which removes the arrays that the other fold was made of
    assert told() == runs[:1]
    make(1)
    said = "".join(capsys.readouterr())
    assert "best MCRMSE" in said
    assert "MCRMSE 0.0000" not in said  # in units as small as these
    assert told() == []


def test_a_file_that_numbers_were_predicted_for_may_be_predicted_by_classes(paths):
    """…: trained on other data than those in …/predictions/mine/…: classes ('c', 'd') -> numbers ('Tm')."""
    for labels in (Numbers(("Tm",), (0,), (1.0,), (1.0,), "ACGU"), Classes(("c", "d"), (0, 0), True, "ACGU")) * 2:
        own_file.keep_labels(labels, paths)
        assert read_labels(paths).names == labels.names


def test_a_single_sequence_is_a_file_of_its_own(paths):
    one, other = (own_file.write_single(text, paths) for text in ("GGGAAACCC", "GGGAAACC"))
    assert one != other
    assert one.read_text() == ">sequence\nGGGAAACCC\n"
    assert own_file.folder_of(one, paths) == one.parent
