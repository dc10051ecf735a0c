"""Sequences of one's own, as a user gives them to the program and to make: from a file to tables, in one command."""

import fcntl
import re
import subprocess
from pathlib import Path

import polars as pl
import pytest

from pipeline.cli import run_verb
from pipeline.training import stop
from submissions.subject import brief

ROOT = Path(__file__).resolve().parents[1]
HAIRPIN = "GGGAAACGCUUCGGCGAACCAGUUACUCCC"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, as of a fresh clone without data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.fasta").write_text(f">hairpin\n{HAIRPIN}\n>dna\n{'ACGTTGCA' * 3}\n")
    return tmp_path


def test_reactivities_of_a_file_need_no_data(place, capsys):
    pytest.importorskip("RNA")
    assert run_verb(["predict", "mine.fasta", "--model", "reactivity-v2"]) == 0
    home = place / "artifacts" / "ribonanza" / "predictions" / "mine"
    rows = pl.read_csv(home / "reactivity-v2.sim80_k5.csv")
    assert rows.columns == ["sequence_id", "position", "nucleotide", "reactivity_DMS_MaP", "reactivity_2A3_MaP"]
    assert "".join(rows.filter(sequence_id="hairpin")["nucleotide"]) == HAIRPIN
    assert rows.height == 54
    for target in rows.columns[3:]:
        assert rows[target].is_between(0, 1).all()
    assert (home / "reactivity-v2.sim80_k5.html").is_file()
    said = capsys.readouterr().out
    assert "2 sequences, reactivity-v2.sim80_k5, mean of folds 0, 1, 2, 3, 4" in said
    assert "reactivity-v2.sim80_k5.csv" in said


def test_a_sequence_on_the_command_line_is_predicted_by_the_fold_that_is_said(place, capsys):
    pytest.importorskip("RNA")
    assert run_verb(["predict", "--sequence", HAIRPIN, "--model", "reactivity-v2", "--fold", "2"]) == 0
    assert "1 sequence, reactivity-v2.sim80_k5, fold 2" in capsys.readouterr().out
    (table,) = place.glob("artifacts/ribonanza/predictions/sequence-*/*.csv")
    assert pl.read_csv(table).height == 30
    page = table.with_suffix(".html").read_text()
    assert f"<h1>{brief(HAIRPIN)}</h1>" in page
    assert "Reactivity is high where a nucleotide is free to move" in page


def test_shipped_weights_embed_too(place, capsys):
    pytest.importorskip("RNA")
    assert run_verb(["embed", "mine.fasta", "--model", "reactivity-v2", "--fold", "1"]) == 0
    (table,) = place.glob("artifacts/ribonanza/embeddings/mine/*.parquet")
    assert table.name == "reactivity-v2.sim80_k5.fold1.parquet"
    assert "sequences: 2, of 54 nt in all, " in capsys.readouterr().out
    assert pl.read_parquet(table)["sequence_id"].to_list() == ["hairpin", "dna"]


def test_structures_of_a_file_need_no_data(place, capsys):
    assert run_verb(["structures", "mine.fasta"]) == 0
    home = place / "artifacts" / "rna3d" / "predictions" / "mine" / "structures"
    assert {path.name for path in home.iterdir() if path.suffix in (".pdb", ".cif")} == {
        f"{name}.{ending}" for name in ("hairpin", "dna") for ending in ("pdb", "cif")
    }
    assert (home / "hairpin.pdb").read_text().count("MODEL ") == 5
    rows = pl.read_csv(home / "candidates.csv")
    assert rows["sequence_id"].to_list() == ["hairpin"] * 5 + ["dna"] * 5, "in the order of the file"
    assert set(rows["pairs"].str.len_chars()) == {24, 30}
    page = (home / "viewer.html").read_text()
    assert re.search("<h1>mine.fasta</h1>", page)
    assert re.findall(r'"name": ?"(\w+)"', page) == ["hairpin", "dna"]
    assert "2 RNAs, candidates of denovo.sim80_k5" in capsys.readouterr().out
    (place / "mine.fasta").write_text(f">other\n{HAIRPIN}\n")
    assert run_verb(["structures", "mine.fasta"]) == 0
    assert {path.stem for path in home.glob("*.pdb")} == {"other"}, "what the file held before is gone"


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["predict", "mine.fasta", "--model", "reactivity-v2", "--fold", "0"], "ribonanza/predictions/mine"),
        (["embed", "mine.fasta", "--model", "reactivity-v2", "--fold", "0"], "ribonanza/embeddings/mine"),
        (["structures", "mine.fasta"], "rna3d/predictions/mine"),
    ],
)
def test_another_file_of_the_same_name_is_waited_for(words, folder, place, monkeypatch):
    """Two at once ended in a traceback, or with exit code 0 in a table that some folds had predicted of the other."""
    pytest.importorskip("RNA")
    home = place / "artifacts" / folder
    home.mkdir(parents=True)
    with (home / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        seen: list[list[str]] = []

        def let_go(_: str) -> None:
            seen.append([path.name for path in home.rglob("*")])
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(stop, "say", let_go)
        assert run_verb(words) == 0
    assert seen == [[".lock"]]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["predict", "absent.fasta"], 3, "absent.fasta: no such file. Next: make predict FILE="),
        (["predict", "mine.fasta", "--sequence", "ACGU"], 2, "expected one of them. Next: "),
        (["predict", "mine.fasta"], 3, "never trained"),
        (["predict", "mine.fasta"], 3, "MODEL=reactivity-v2 are weights that come with the program"),
        (["predict", "--model", "reactivity-v2"], 2, "got none, neither FILE nor SEQ. Next: make predict MODEL=reac"),
        (["predict", "--model", "reactivity-v3"], 2, "Did you mean 'reactivity-v2'? Next: name one"),
        (["predict", "mine.fasta", "--model", "reactivity-v3"], 2, "Did you mean 'reactivity-v2'? Next: name one"),
        (["embed", "mine.fasta", "--model", "tiny_hyna"], 2, "Did you mean 'tiny_hyena'? Next: name one"),
        (["predict", "mine.fasta", "--comp", "openvaccine", "--model", "reactivity-v2"], 2, "expected openvaccine"),
        (["predict", "mine.fasta", "--comp", "rna3d"], 2, "Next: make structures FILE="),
        (["predict", "mine.fasta", "--name", "best"], 3, "Next: make ensemble COMP=ribonanza NAME=best"),
        (["predict", "--sequence", "ACGX", "--model", "reactivity-v2"], 3, "Next: "),
        (["structures", "mine.fasta", "--comp", "ribonanza"], 2, "ribonanza is not about structures"),
        (["structures", "--model", "denovo"], 2, "--model is for RNAs of your own"),
        (["structures", "--sequence", "ACGU" * 2_501], 3, "has 10,004 nt; expected at most 10,000"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_its_exit_code(arguments, code, sentence, capsys):
    assert run_verb(arguments) == code
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert "Next: " in said
    assert "Traceback" not in said


def test_make_hands_over_files_sequences_folds_and_ensembles_only_where_they_are_given():
    def words(*given: str) -> str:
        command = ["make", "-n", *given, "PY=python3"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("pipeline ")[
            1
        ]

    assert '"my file.fa"' in words("predict", "FILE=my file.fa")
    assert "--fold" not in words("predict", "FILE=x.fa")
    assert "--name" not in words("predict", "FILE=x.fa")
    assert '--fold "0"' in words("predict", "FILE=x.fa", "FOLD=0")
    assert '--name "best"' in words("predict", "SEQ=ACGU", "NAME=best")
    assert '--sequence "ACGU"' in words("structures", "SEQ=ACGU", "COMP=rna3d")
    assert "--model" not in words("structures", "COMP=rna3d")
    one = words("structures", "SEQ=ACGU", "MODEL=small_structure", "TAG=x", "COMP=rna3d")
    assert '--model "small_structure" --tag x' in one
    assert '--fold "0"' in words("predict")
    assert "--name" not in words("predict", "NAME=best")
