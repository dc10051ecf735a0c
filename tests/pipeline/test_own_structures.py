"""RNAs of one's own get candidates from whatever there is: nothing at all, tables, runs, an ensemble."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import own_file, own_structures, train, viennarna
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.competitions.rna3d import RNA3D
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.structure import denovo as assembling
from pipeline.structure import predict as denovo
from pipeline.templates import predict as templates
from submissions.tm_score import tm_scores
from tests.pipeline import tiny
from tests.pipeline.dot_bracket import pairs_of
from tests.pipeline.test_templates import SPLIT, write_tables

HAIRPIN = "GGCGCAGCAAUUCGUUGCUGCGCC"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Stems by stacking energy, the same whatever is installed; few assemblies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viennarna, "available", lambda: (False, "not for these tests"))
        patch.setattr(assembling, "_ARRANGEMENTS", 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Tables, both runs without a network and their ensemble, which no test writes to."""
    paths = Paths(comp="rna3d", root=tmp_path_factory.mktemp("structures"))
    write_tables(paths)
    what: dict[str, Any] = {"competition": RNA3D, "split": SPLIT}
    for stage in (denovo, templates):
        stage.run(paths, score=tm_scores, **what)
    runs = [stage.run_name(SPLIT) for stage in (denovo, templates)]
    train = pl.read_parquet(paths.clean("train"))
    references = train.select("sequence_id", pl.lit(1, pl.UInt8).alias("conformer"), "x", "y", "z")
    references.write_parquet(paths.clean("references"))
    ensemble.run(paths, name="all", runs=runs, score=tm_scores, **what)
    return paths


def predicted(source: Path, paths: Paths, *, name: str = "all", **changes: Any) -> own_file.Predicted:
    what: dict[str, Any] = {"competition": RNA3D, "split": SPLIT, "name": name, **changes}
    done = own_structures.predict(source, paths=paths, **what)
    options: dict[str, Any] = {"name": done.name, "weights": done.weights, "partial_runs": True}
    ensemble.apply(done.own, competition=done.competition, **options)
    return done


def candidates(done: own_file.Predicted) -> pl.DataFrame:
    return pl.read_parquet(done.own.ensemble_dir(done.name) / "test.parquet")


def fasta(folder: Path, **sequences: str) -> Path:
    path = folder / "mine.fasta"
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in sequences.items()))
    return path


def test_a_sequence_is_enough(tmp_path, capsys):
    paths = Paths(comp="rna3d", root=tmp_path / "artifacts")
    done = predicted(fasta(tmp_path, stem=HAIRPIN.lower().replace("u", "t"), one="G"), paths)
    table = candidates(done)
    assert table.filter(sequence_id="stem")["candidate"].to_list() == [1, 2, 3, 4, 5]
    assert table.filter(sequence_id="one").height > 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no temporal_cutoff given, so structures of any date may be used" in said
    assert "loops of 0 known structures: no clean tables of rna3d here" in said
    rows = pl.read_csv(own_structures.write_table(done, tmp_path / "candidates.csv").outputs["table"])
    assert rows.columns == ["sequence_id", "candidate", "confidence", "source", "pairs", "sequence"]
    first = rows.filter(sequence_id="stem").row(0, named=True)
    assert first["sequence"] == HAIRPIN
    assert first["pairs"] == "((((((((((....))))))))))"
    assert 0 < first["confidence"] < 1


def test_a_test_set_as_a_file_gets_what_the_ensemble_gave_it(finished, tmp_path):
    """Loops, templates, their dates, ranking and choice are those of the runs and of the ensemble."""
    source = tmp_path / "hidden.parquet"
    test = pl.read_parquet(finished.clean("test"))
    test.reverse().with_columns(pl.col("temporal_cutoff").cast(pl.String)).write_parquet(source)
    found = candidates(predicted(source, Paths(comp="rna3d", root=finished.root)))
    expected = pl.read_parquet(finished.ensemble_dir("all") / "test.parquet")
    assert found.equals(expected)
    assert {source.split("/")[0] for source in found["source"]} > {templates.run_name(SPLIT)}


def test_without_an_ensemble_runs_without_a_network_compete_by_their_expected_scores(finished, tmp_path):
    sequence = pl.read_parquet(finished.clean("train"))["sequence"][0]
    done = predicted(fasta(tmp_path, known=sequence), finished, name="no such ensemble")
    assert done.about.startswith(f"candidates of {denovo.run_name(SPLIT)}, {templates.run_name(SPLIT)}, the most")
    table = candidates(done)
    runs = set(table["source"].str.split("/").list.first())
    assert runs == {denovo.run_name(SPLIT), templates.run_name(SPLIT)}
    assert table["confidence"].is_sorted(descending=True)


def test_no_template_is_newer_than_a_cutoff_that_is_given(finished, tmp_path):
    sequence = pl.read_parquet(finished.clean("train"))["sequence"][0]
    source = tmp_path / "dated.csv"
    source.write_text(
        f"name,seq,temporal_cutoff\nold,{sequence},1990-01-01\nnew,{sequence},2030-01-01\nany,{sequence},\n"
    )
    table = candidates(predicted(source, finished, name="no such ensemble"))
    used = {name: set(rows["source"].str.split("/").list.first()) for (name,), rows in table.group_by("sequence_id")}
    assert used["old"] == {denovo.run_name(SPLIT)}
    assert templates.run_name(SPLIT) in used["new"] & used["any"]


def test_loops_of_the_clean_tables_are_used_before_anything_was_learned(finished, tmp_path, capsys):
    paths = Paths(comp="rna3d", root=tmp_path / "artifacts")
    for table in ("train", "later"):
        paths.clean(table).parent.mkdir(parents=True, exist_ok=True)
        paths.clean(table).write_bytes(finished.clean(table).read_bytes())
    done = predicted(fasta(tmp_path, stem=HAIRPIN), paths)
    count = pl.read_parquet(done.own.home / "unlearned" / "library.parquet").height
    assert count == pl.read_parquet(paths.clean("train")).height + pl.read_parquet(paths.clean("later")).height
    assert f"loops of {count} known structures" in " ".join(capsys.readouterr().err.split())


def test_networks_of_an_ensemble_predict_too(tmp_path, monkeypatch):
    tiny.register(monkeypatch)
    paths = Paths(comp="tiny3d", root=tmp_path / "artifacts")
    tiny.write_structures(paths, count=4, tests=1)
    train.run(tiny.config(epochs=1), competition=tiny.TINY3D, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)
    weights = paths.ensemble_dir("net") / "weights.json"
    weights.parent.mkdir(parents=True)
    told = {"competition": "tiny3d", "task": "structure", "split": tiny.SPLIT, "folds": [0], "runs": [tiny.RUN]}
    weights.write_text(json.dumps(told | {"targets": ["x", "y", "z"], "policy": None}))
    table = candidates(predicted(fasta(tmp_path, stem=HAIRPIN), paths, name="net", competition=tiny.TINY3D))
    assert table["source"].unique().to_list() == [f"{tiny.RUN}/fold0"]
    assert table.height == 5


def test_a_single_run_predicts_without_an_ensemble_wherever_its_folder_is(tmp_path, monkeypatch):
    """Networks predicted through an ensemble alone."""
    tiny.register(monkeypatch)
    paths = Paths(comp="tiny3d", root=tmp_path / "artifacts")
    tiny.write_structures(paths, count=4, tests=1)
    train.run(tiny.config(epochs=1), competition=tiny.TINY3D, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=1)
    source, found = fasta(tmp_path, stem=HAIRPIN), []
    for elsewhere in (False, True):
        run = paths.run_dir(tiny.RUN).rename(tmp_path / "given to somebody") if elsewhere else tiny.RUN
        done = predicted(source, paths, competition=tiny.TINY3D, run=run)
        assert done.about == f"candidates of {tiny.RUN}, the most confident ones"
        found.append(candidates(done))
    assert found[0].equals(found[1])
    assert found[0]["source"].to_list() == [f"{tiny.RUN}/fold1"] * 5
    with pytest.raises(DataError, match="never trained"):
        predicted(source, paths, competition=tiny.TINY3D, run="another.s")


def test_a_run_without_a_network_predicts_alone_too(finished, tmp_path):
    sequence = pl.read_parquet(finished.clean("train"))["sequence"][0]
    table = candidates(predicted(fasta(tmp_path, known=sequence), finished, run=templates.run_name(SPLIT)))
    assert set(table["source"].str.split("/").list.first()) == {templates.run_name(SPLIT)}


def test_ids_become_names_of_files(tmp_path):
    paths = Paths(comp="rna3d", root=tmp_path / "artifacts")
    source = tmp_path / "odd.csv"
    source.write_text(f"id,sequence\nsp|1/x y,GGGGAAACCCC\nä,GGGGAAACCCC\n{'n' * 300},GGGG\n", encoding="utf-8")
    own_structures._read(source, own_file.own_paths(source, paths))
    names = pl.read_parquet(own_file.own_paths(source, paths).clean("test"))["sequence_id"].to_list()
    assert names == ["sp_1_x_y", "_", "n" * 200]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,sequence\na,GGGGN\nb,ACGUACGUACGUACGUACGUACGUACGU\n", r"1 letter other than ACGU"),
        (f"id,sequence\nchromosome,{'ACGU' * 31_250}\n", r"chromosome has 125,000 nt; expected at most 10,000"),
        ("id,sequence,temporal_cutoff\na,ACGU,27.5.2022\n", r"a: temporal_cutoff '27\.5\.2022'; expected YYYY-MM-DD"),
        ("id,sequence\na/b,ACGU\na_b,ACGU\n", r"id 'a/b' would name the files 'a_b'"),
        ("id,sequence\n.hidden,ACGU\n", r"id '\.hidden' would name the files"),
        ("id,sequence\n", r"no sequence in it"),
    ],
)
def test_what_cannot_be_predicted_is_told_in_one_sentence(tmp_path, text, sentence):
    source = tmp_path / "bad.csv"
    source.write_text(text)
    what: dict[str, Any] = {"paths": Paths(comp="rna3d", root=tmp_path / "artifacts"), "split": SPLIT, "name": "all"}
    with pytest.raises(DataError, match=rf"bad\.csv.*{sentence}.*Next: "):
        own_structures.predict(source, competition=RNA3D, **what)
    with pytest.raises(ConfigError, match=r"structures: ribonanza is not about structures"):
        own_structures.predict(source, competition=RIBONANZA, **what)
    with pytest.raises(DataError, match=r"no such file\. Next: make structures FILE="):
        own_structures.predict(tmp_path / "absent", competition=RNA3D, **what)


def test_brackets_say_which_residues_pair_knots_too(rng: np.random.Generator):
    for _ in range(50):
        places = rng.permutation(60)[: 2 * rng.integers(0, 9)].reshape(-1, 2)
        pairs = sorted((int(min(pair)), int(max(pair))) for pair in places)
        text = own_structures.dot_bracket(60, pairs)
        kinds: list[list[tuple[int, int]]] = []
        for opening, closing in own_structures._BRACKETS:
            signs = {sign: "." for sign in set(text)} | {opening: "(", closing: ")"}
            kinds.append(pairs_of(text.translate(str.maketrans(signs))))
        assert sorted(pair for found in kinds for pair in found) == pairs
