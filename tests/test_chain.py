"""The whole chain on synthetic raw files, as `make demo` runs it: twice in one place, and most of it in another."""

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from pipeline import demo
from pipeline.cli import run_verb
from tests.pipeline import labelled_sets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    demo.run(folder)
    return folder


def scores(folder: Path, comp: str) -> dict:
    return json.loads((folder / comp / "ensembles" / "demo" / "scores.json").read_text())


@pytest.mark.parametrize("comp", ["ribonanza", "openvaccine"])
def test_values_are_predicted_better_than_by_every_floor(chain, comp):
    found = scores(chain, comp)
    assert found["score"] < min(found["floors"].values())
    assert len(found["floors"]) == 4


def test_structures_are_predicted_better_than_by_every_floor(chain):
    found = scores(chain, "rna3d")
    assert found["score"] > max(found["floors"].values()) + 0.1


def test_classes_are_predicted_better_than_by_every_floor(chain):
    """The order of two motifs decides, so that neither letters, nor words, nor relatives tell anything."""
    found = scores(chain, "labelled")
    assert found["score"] < 0.6 * min(found["floors"].values())


@pytest.mark.parametrize("comp", demo.CHAINS)
def test_submission_report_and_log_are_there(chain, comp):
    assert (chain / "submissions" / f"{comp}-demo.csv").stat().st_size > (1_000 if comp == "labelled" else 10_000)
    assert (chain / comp / "ensembles" / "demo" / "report.html").read_text().startswith("<!doctype html>")
    assert f"| {comp} |" in (chain / "submissions" / "LOG.md").read_text()


def test_a_second_run_finds_everything_up_to_date_and_changes_no_byte(chain, capsys):
    before = digests(chain)
    demo.run(chain)
    printed = capsys.readouterr().out
    assert "done in" not in printed
    assert printed.count("up to date") >= 3 * 12 + 10
    assert digests(chain) == before


def test_another_folder_gets_the_same_submissions_byte_for_byte(chain, tmp_path, monkeypatch):
    """Two that take different ways, values and structures."""
    for comp in ("ribonanza", "labelled"):
        monkeypatch.delitem(demo.CHAINS, comp)
    demo.run(tmp_path)
    for comp in demo.CHAINS:
        name = f"submissions/{comp}-demo.csv"
        assert (tmp_path / name).read_bytes() == (chain / name).read_bytes()


def test_measured_numbers_go_from_raw_files_to_a_report_by_a_command_each(tmp_path, rng):
    raw, artifacts = tmp_path / "raw", tmp_path / "artifacts"
    raw.mkdir()
    table = labelled_sets.measured(rng, count=70)
    table[:60].write_csv(raw / "train.csv")
    table[60:].write_csv(raw / "test.csv")
    (raw / "columns.toml").write_text("numbers = ['gc', 'tail']")
    at = ["--comp", "labelled-measured", "--artifacts", str(artifacts)]
    split, name = ["--split", "sim80_k2"], ["--name", "both"]
    network = ["--model", "tiny_drsn", "--set", "train.epochs=2", "--tag", "two", "--all-folds"]
    verbs = {"data": ["--raw", str(raw)], "folds": split, "words": split, "train": [*split, *network]}
    verbs |= {"ensemble": [*split, *name], "submit": name, "evaluate": [*split, *name], "report": name}
    assert {verb: run_verb([verb, *at, *words]) for verb, words in verbs.items()} == dict.fromkeys(verbs, 0)
    found = json.loads((artifacts / "labelled-measured" / "ensembles" / "both" / "scores.json").read_text())
    assert found["metric"] == "MCRMSE"
    assert found["score"] < min(found["floors"]["mean"], found["floors"]["nearest neighbour, 4-mers"])
    (csv,) = (artifacts / "submissions").glob("*.csv")
    assert pl.read_csv(csv).columns == ["id", "gc", "tail"]
    assert pl.read_csv(csv)["id"].to_list() == table["id"][60:].to_list()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every table and file that stages hand on."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".parquet", ".csv", ".json", ".html", ".md"})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
