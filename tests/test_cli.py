"""The program as a user meets it: help of every verb, one sentence and an exit code for every mistake."""

import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer

from pipeline.cli import app, run_verb, show
from pipeline.cli.options import find_paths
from pipeline.competitions import competitions
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.runs import finished_runs, run_name
from pipeline.stage import Report
from pipeline.synthetic import write_ribonanza
from pipeline.training.stop import run_lock
from submissions import write
from tests.chain_tables import write_values_data

ROOT = Path(__file__).resolve().parents[1]
VERBS = sorted(typer.main.get_command(app).commands)
#: What a verb that is none is answered with; older versions of typer suggest no other.
SUGGESTS = "suggest_commands" in inspect.signature(typer.Typer).parameters
NEAR = "Did you mean 'ensemble'? Next: rna --help." if SUGGESTS else "No such command 'ensembles'. Next: rna --help."


def call(*arguments: str) -> int:
    return run_verb(arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_each_of_its_options(verb, capsys):
    assert call(verb, "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 8
    for option in typer.main.get_command(app).commands[verb].params:
        assert option.name == "help" or option.help, f"{verb} {option.name} has no help"


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
    """In zsh FILE=~/mine.fasta was "no such file", and ARTIFACTS=~/a made a folder of the name ~ in the checkout."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("status", "--artifacts", "~/a") == 0
    assert f"{tmp_path}/a: no runs yet" in "".join(capsys.readouterr().err.split("\n"))
    (tmp_path / "mine.toml").write_text('[model]\nname = "hyna"')
    assert call("plan", "--model", "~/mine.toml") == 2
    assert "'hyna' is not known" in capsys.readouterr().err


def test_the_help_lists_the_verbs_below_what_their_modules_are_about(capsys, monkeypatch):
    """80 columns cut "Predictors that train no network: structures from templates or pairing, lab"."""
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--help") == 0
    panels = capsys.readouterr().out.split("╭─ ")[2:]  # behind the program's own options
    found = {panel.partition("─")[0].strip(): re.findall(r"^│ ([a-z-]+) ", panel, re.MULTILINE) for panel in panels}
    assert sorted(verb for verbs in found.values() for verb in verbs) == VERBS
    assert found["From raw files to clean tables and folds"] == [
        "download",
        "data",
        "bpp",
        "features",
        "folds",
        "audit",
    ]
    homes = {command.callback.__module__ for command in typer.main.get_command(app).commands.values()}
    assert found.keys() == {(sys.modules[home].__doc__ or "").partition("\n")[0].rstrip(".") for home in homes}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", "--model", "ribonanza_mambo"], 2, "Did you mean 'ribonanza_mamba'"),
        (["train", "--set", "train.lr=1e-3"], 2, "TAG"),
        (["train", "--set", "train.epoch=3", "--tag", "x"], 2, "Did you mean 'epochs'"),
        (["train", "--time-budget", "eight hours"], 2, "such as 8h"),
        (["train", "--all-folds", "--split", "oddly"], 2, "sim80_k5"),
        (["data", "--raw", "", "--comp", "ribonanza"], 2, "RAW=<folder>"),
        (["data", "--raw", "nowhere", "--comp", "ribonanzo"], 2, "Did you mean 'ribonanza'"),
        (["data", "--raw", "nowhere"], 3, "nowhere"),
        (["folds"], 3, "train.parquet is missing. Next: make data COMP=ribonanza."),
        (["bpp", "--workers", "0"], 2, "--workers', got '0': "),
        (["folds", "--comp", "foo"], 2, "COMP='foo' is not known; expected one of ribonanza"),
        (["logs", "--comp", "foo"], 2, "COMP='foo' is not known"),
        (["submit", "--comp", "foo", "--to", "."], 2, "COMP='foo' is not known"),
        (["ensemble"], 3, "make train"),
        (["ensemble", "--run", "a,b,a"], 2, "is given twice"),
        (["submit"], 3, "make"),
        (["evaluate"], 3, "make"),
        (["check", "absent.csv"], 3, "make"),
        (["check", ""], 2, "make check FILE="),
        (["train", "--model", "tiny_hyena", "--fold", "7"], 2, "FOLD=7: the folds of sim80_k5 are 0 to 4"),
        (["train", "--model", "tiny_hyena", "--split", "sim80k5"], 2, "SPLIT='sim80k5'"),
        (["train", "--model", "tiny_hyena", "--tag", "a/b"], 2, "TAG='a/b'"),
        (["train", "--model", "tiny_hyena", "--tag", "x" * 101], 2, "at most 100"),  # "File name too long"
        (["train", "--model", "tiny_hyena", "--tag", "sweep-x"], 2, "left out of ensembles. Next: give another TAG"),
        (
            ["train", "--model", "tiny_hyena", "--tag", "x", "--set", "train.workers=500"],
            2,
            "at least 0 and at most 64",
        ),
        (["predict", "--model", "tiny_hyena", "--fold", "5"], 2, "FOLD=5"),
        (["train", "--max-steps", "0"], 2, "--max-steps', got '0': "),
        (["train", "--fold=1.5"], 2, "--fold', got '1.5': "),
        (["sweep"], 2, "OVER is empty. Next: make sweep OVER='train.lr=[1e-3,2e-3]'."),
        (["train", "--model", "hyena", "--track", "mlflow"], 2, "expected one of tensorboard, wandb"),
        (["logs"], 3, "nothing was started here in the background"),
        (["predict", "--kernels", "fast"], 2, "--kernels 'fast' (or RNA_KERNELS): expected auto or reference. Next:"),
        (["demo", "--seed", "-1"], 2, "--seed"),
        (["sweep", "--over", "train.lr={low=1e-2, high=1e-4}", "--trials", "1"], 2, "low below high"),
        (["templates", "--raw", ".", "--comp", "ribonanza"], 2, "templates: ribonanza is not about structures"),
        (["templates", "--raw", ".", "--comp", "rna3d3"], 2, "Did you mean 'rna3d'"),  # wrote artifacts/rna3d3
        (["kernel-check", "--python", "absent"], 2, "absent: expected a Python interpreter"),
        (["no-such-verb"], 2, "No such command 'no-such-verb'. Next: rna --help."),
        (["ensembles"], 2, NEAR),  # "'ensemble'?. Next"
        (["train", "--fold", "x"], 2, "Next: rna train --help."),
        (
            ["predict", "--model", "tiny_hyena"],
            3,
            "this fold was never trained; trained so far: no run at all. Next: make",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_in_one_sentence_and_its_exit_code(arguments, code, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "Next: " in said
    assert "Traceback" not in said
    assert said.startswith("error: ")
    assert list(tmp_path.rglob("*.part-*")) == []


def test_what_a_refused_download_leaves_is_no_raw_data(tmp_path, capsys):
    """`make data` after it said "found .incoming. Next: download the competition's files", and nothing of RAW."""
    (Paths(comp="ribonanza", root=tmp_path).raw / ".incoming" / "train_data.csv").mkdir(parents=True)
    assert call("data", "--artifacts", str(tmp_path)) == 2
    assert "holds no files. Next: RAW=<folder>" in capsys.readouterr().err


def test_many_outputs_are_told_by_their_folder(tmp_path, capsys):
    """denovo and templates-predict named twelve files each."""
    files = {str(number): tmp_path / "run" / f"fold{number}" / "oof.parquet" for number in range(12)}
    show(Report(stage="denovo", status="built", outputs=files))
    show(Report(stage="data", status="built", outputs=dict(list(files.items())[:2])))
    told = "".join(capsys.readouterr().out.split())
    assert told.count("->") == 3
    assert f"->{tmp_path}/run(12files)".replace(" ", "") in told
    assert "fold1/oof.parquet" in told


def test_brackets_in_names_of_the_data_are_told(capsys):
    """The class tRNA[Ala] was printed as tRNA, in the report of the data and in the table of the submission."""
    facts = {"rows": 1, "sequences": 1, "bytes": 1, "ranges": {"tRNA[Ala]": (0.0, 1.0)}}
    show(Report(stage="data", status="built", outputs={}), ["classes: tRNA[Ala] = 3", write.describe(facts)])
    assert capsys.readouterr().out.count("tRNA[Ala]") == 2


def test_a_run_is_named_after_config_variant_and_split():
    assert run_name("configs/mine.toml", split="sim80_k5") == "mine.sim80_k5"


def entry(lines: list[str], head: str) -> list[str]:
    """The line that begins so, of which there has to be one, and those that go on below its text."""
    (place,) = [k for k, line in enumerate(lines) if line.startswith(head)]
    indent = " " * len(head)
    return [lines[place], *itertools.takewhile(lambda line: line.startswith(indent), lines[place + 1 :])]


def test_make_help_lists_every_target_and_variable_once_in_columns_that_a_terminal_holds():
    """Lines were up to 140 characters long, and longer names pushed their texts out of the column."""
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    told = {name: text for name, text in re.findall(r"^([a-z-]+):.*## (.*)", makefile, re.MULTILINE)}
    assert told.keys() == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)), "a target without a text"
    variables = re.findall(r"^([A-Z]+) +\??= *([^#]*)# *(.*)", makefile, re.MULTILINE)
    assert len(variables) == len(re.findall(r"^[A-Z]+ +\??=", makefile, re.MULTILINE)), "a variable without a text"
    heads = [(f"{target:18} ", text) for target, text in told.items()]
    heads += [(f"{name:10} {preset.strip():17} ", text) for name, preset, text in variables]
    lines = listed.splitlines()
    assert max(map(len, lines)) <= 100
    for head, text in heads:
        assert " ".join(entry(lines, head)).split() == f"{head}{text}".split()


def test_make_refuses_settings_without_a_name():
    done = subprocess.run(["make", "train", "SET=train.lr=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TAG=some-name" in done.stderr


def test_make_hands_settings_budget_and_folds_to_plan_and_sweep():
    """`make sweep SET=… BUDGET=… ALL=1` left all three out without a word; `make plan SET=…` asked for a TAG."""
    told = ["SET=train.epochs=2", "BUDGET=8h", "ALL=1", "OVER=train.lr=[1e-3]", "PY=python3"]
    sweep = subprocess.run(["make", "-n", "sweep", *told], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--set 'train.epochs=2'" in sweep
    assert "--time-budget 8h" in sweep
    assert "--all-folds" in sweep
    plan = subprocess.run(["make", "-n", "plan", *told], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--set 'train.epochs=2'" in plan


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_make_submit_sends_the_file_that_it_wrote(fmt):
    """FORMAT=parquet KAGGLE=1 wrote a parquet file and sent the CSV that an earlier ensemble had left."""
    command = ["make", "-n", "submit", "KAGGLE=1", f"FORMAT={fmt}", "COMP=openvaccine", "NAME=best", "PY=python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    written, sent = (line for line in done.splitlines() if "-m pipeline submit" in line)
    for line in (written, sent):
        assert f'--name "best" --format {fmt}' in line


def test_make_submit_kaggle_asks_for_the_version_of_a_notebook(tmp_path):
    """It was answered with "Option '--version' requires an argument."."""
    command = ["make", "submit-kaggle", "KERNEL=me/x", f"ARTIFACTS={tmp_path}", f"PY={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Next: KERNEL=owner/slug VERSION=1" in " ".join(done.stderr.split())


def test_an_empty_variable_of_make_is_named(tmp_path):
    """COMP= was answered with "Got unexpected extra argument(s) (artifacts)"."""
    for empty, named in (("COMP", "COMP=''"), ("SPLIT", "SPLIT=''"), ("NAME", "NAME=''"), ("FOLD", "'--fold'")):
        verb = "ensemble" if empty == "NAME" else "train"
        command = ["make", verb, f"{empty}=", "RUNS=a.sim80_k5", f"ARTIFACTS={tmp_path}", f"PY={sys.executable}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert named in done.stderr
        assert "argument" not in done.stderr


def test_targets_of_one_command_run_one_after_the_other_whatever_make_is_told(tmp_path):
    """`make -j4 data folds`, or MAKEFLAGS=-j8 in the shell: folds began beside data, of which there was nothing yet."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho begin\nsleep 0.2\necho end\n")
    program.chmod(0o755)
    variables = [f"PY={program}", f"RAW={tmp_path}", f"ARTIFACTS={tmp_path}"]
    command = ["make", "--no-print-directory", "data", "folds", "evaluate", *variables]
    told = {**os.environ, "MAKEFLAGS": "-j4"}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["begin", "end"] * 3


def test_make_takes_folders_with_blanks(tmp_path):
    """ARTIFACTS="my folder" ended with "Got unexpected extra argument (folder)"."""
    write_ribonanza(tmp_path / "raw data", sequences=12, test=3)
    where = [f"PY={sys.executable}", f"RAW={tmp_path / 'raw data'}", f"ARTIFACTS={tmp_path / 'to come'}"]
    subprocess.run(["make", "data", *where], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "to come" / "ribonanza" / "clean" / "train.parquet").is_file()


@pytest.mark.parametrize("name", ['a "b"', "a  b", "a'b", "a\\b", "a`b`", "пример", "$$x y"])
def test_make_takes_a_folder_of_any_name(tmp_path, name):
    """RAW='/tmp/a "b"' was looked for in /tmp/a b, where make clean would have removed it; so was one of two blanks."""
    where = [f"RAW={tmp_path / name}", f"ARTIFACTS={tmp_path / name}", f"FILE={tmp_path / name}", "PY=echo"]
    for verb in ("data", "check"):
        done = subprocess.run(
            ["make", "--no-print-directory", verb, *where], cwd=ROOT, capture_output=True, text=True, check=True
        )
        said = done.stdout.removesuffix("\n")
        folder = str(tmp_path / name.replace("$$", "$"))
        assert said.count(folder) == 2, said
        assert said.endswith(folder)
    held, other = tmp_path / name.replace("$$", "$"), tmp_path / name.replace('"', "").replace("  ", " ")
    for folder in {held, other}:
        (folder / "ribonanza" / "clean").mkdir(parents=True, exist_ok=True)
    subprocess.run(["make", "clean", f"ARTIFACTS={tmp_path / name}"], cwd=ROOT, check=True, capture_output=True)
    assert not held.exists()
    assert other == held or other.exists()


def test_runs_of_another_split_are_named_with_it(tmp_path):
    """`make ensemble` after `make train-all SPLIT=sim80_k3` said "seen: no run at all"."""
    paths = Paths(comp="ribonanza", root=tmp_path)
    (paths.fold_dir("tiny_drsn.sim80_k3", 0) / "checkpoints").mkdir(parents=True)
    with pytest.raises(DataError, match=r"\(seen: tiny_drsn.sim80_k3\). Next: SPLIT=sim80_k3, or make train-all"):
        finished_runs(paths, "sim80_k5")


@pytest.mark.parametrize(
    ("run", "command"),
    [
        ("tiny_drsn+fast.sim80_k3", "make train-all MODEL=tiny_drsn TAG=fast COMP=rna3d"),
        ("denovo.sim80_k3", "make denovo COMP=rna3d"),
    ],
)
def test_the_run_that_was_begun_is_the_one_to_finish(tmp_path, run, command):
    """`make ensemble` after one fold of a small network advised to train another one, which takes days on a CPU."""
    paths = Paths(comp="rna3d", root=tmp_path)
    paths.fold_dir(run, 0).mkdir(parents=True)
    paths.oof(run, 0).touch()
    with pytest.raises(DataError, match=re.escape(f"Next: {command}, or PARTIAL=1")):
        finished_runs(paths, "sim80_k3")


def test_an_ensemble_of_the_folds_there_are_is_asked_for(tmp_path):
    """After `make train FOLD=0` nothing could be submitted."""
    paths = Paths(comp="labelled", root=tmp_path)
    (paths.fold_dir("tiny_drsn.sim80_k3", 1) / "checkpoints").mkdir(parents=True)
    paths.oof("tiny_drsn.sim80_k3", 1).touch()
    with pytest.raises(DataError, match="or PARTIAL=1 to do without the folds that are missing"):
        finished_runs(paths, "sim80_k3")
    assert finished_runs(paths, "sim80_k3", partial=True) == ["tiny_drsn.sim80_k3"]
    paths.oof("tiny_drsn.sim80_k3", 1).unlink()
    with pytest.raises(
        DataError, match=r"has predictions of any fold .*Next: make train-all [^,]*$"
    ):  # not PARTIAL=1 again
        finished_runs(paths, "sim80_k3", partial=True)
    command = ["make", "-n", "ensemble", "PARTIAL=1", "PY=python3"]
    assert "--partial" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_clean_spares_a_folder_that_is_more_than_artefacts(tmp_path):
    """`make clean ARTIFACTS=.` removed the checkout."""
    (tmp_path / "Makefile").touch()
    command = ["make", "clean", f"ARTIFACTS={tmp_path}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2
    assert (tmp_path / "Makefile").is_file()


@pytest.mark.parametrize("there", [".profile", "thesis.tex"])
def test_make_clean_spares_a_home(tmp_path, there):
    """`make clean ARTIFACTS=$HOME` would have removed it: only a Makefile was looked for."""
    (tmp_path / "documents").mkdir()
    (tmp_path / there).touch()
    command = ["make", "clean", f"ARTIFACTS={tmp_path}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2
    assert (tmp_path / there).is_file()


def test_make_clean_spares_what_a_run_is_at_work_in(tmp_path):
    """It was removed under the run, which went on into a new folder and found no tables for its predictions."""
    fold = tmp_path / "ribonanza" / "runs" / "a.sim80_k5" / "fold0"
    command = ["make", "clean", f"ARTIFACTS={tmp_path}"]
    with run_lock(fold):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, fold.is_dir()) == (2, True)
        which = f"make stop COMP=ribonanza MODEL=a SPLIT=sim80_k5 FOLD=0 ARTIFACTS='{tmp_path}', or wait"
        assert f"{fold}: at work now; nothing removed. Next: {which}" in done.stdout
    with run_lock(fold.parent.with_name("a+x.y.sim80_k5"), name=".job"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "Next: make stop COMP=ribonanza MODEL=a SPLIT=sim80_k5 TAG=x.y ALL=1 ARTIFACTS=" in done.stdout
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert not fold.exists()


def test_make_clean_spares_what_holds_the_checkout(tmp_path):
    """Above a checkout there may be folders only, as in artefacts."""
    checkout = tmp_path / "work" / "checkout"
    checkout.mkdir(parents=True)
    command = ["make", "-f", str(ROOT / "Makefile"), "clean", f"ARTIFACTS={tmp_path}/"]
    assert subprocess.run(command, cwd=checkout, capture_output=True, check=False).returncode == 2
    assert checkout.is_dir()


@pytest.mark.parametrize("there", ["local/bin/", "ribonanza/train_data.csv"])
def test_make_clean_spares_folders_that_no_stage_made(tmp_path, there):
    """`make clean ARTIFACTS=/usr`, which holds folders only, passed."""
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).mkdir() if there.endswith("/") else (tmp_path / there).touch()
    command = ["make", "clean", f"ARTIFACTS={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nothing removed. Next: " in done.stdout
    assert (tmp_path / there).exists()


def test_make_takes_what_the_environment_says_but_no_name():
    """Windows' Linux sets NAME to the machine's, after which every ensemble and submission would be called."""
    environment = os.environ | {"NAME": "DESKTOP-1", "COMP": "openvaccine"}
    command = ["make", "-n", "submit", "PY=python3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment).stdout
    assert '--comp "openvaccine"' in done
    assert '--name "all"' in done


def test_what_is_asked_for_by_1_is_not_asked_for_by_0():
    """`make train RESTART=0` set the run aside and began anew."""
    flags = ["ALL", "ALLOW_CHANGES", "FOLLOW", "JSON", "KAGGLE", "NUCLEOTIDES", "PARTIAL", "RELOCK", "RESTART"]
    command = [
        "make",
        "-n",
        "folds",
        "train",
        "train-bg",
        "status",
        "logs",
        "embed",
        "ensemble",
        "submit",
        "PY=python3",
    ]
    without, refused, wanted = (
        subprocess.run(
            [*command, *(f"{flag}={value}" for flag in flags if value)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for value in ("", "0", "1")
    )
    assert refused == without
    for option in ("all-folds", "allow-changes", "follow", "json", "per-nucleotide", "partial", "relock", "restart"):
        assert (f"--{option}" in wanted, f"--{option}" in without) == (True, False), option
    assert ("submit-kaggle" in wanted, "submit-kaggle" in without) == (True, False)


def test_make_refuses_variables_in_small_letters():
    """`make train fold=3` trained fold 0."""
    done = subprocess.run(["make", "-n", "train", "fold=3"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "fold: variables are in capitals. Next: FOLD=3." in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train FOLDS=3", "FOLDS: no target reads that (did you mean FOLD?). Next: make help lists the variables"),
        ("train MODLE=hyena EPOCHS=5", "EPOCHS MODLE: no target reads that (did you mean MODEL?)."),
        ("trian", "trian: no such target. Next: make help lists them."),
        ("train GPU=1", "GPU: no target reads that."),
        ("evaluate report MODEL=hyena", "MODEL=hyena: what is blended, scored, shown or sent goes by name. Next: RUN="),
        ("structures MODEL=hyena", "MODEL=hyena: what is blended, scored, shown or sent goes by name. Next: RUN="),
        ("predict FEATURES=a=b", "FEATURES says what comes with sequences of your own. Next: FILE="),
        ("train ALL=1", "ALL: make train trains one fold. Next: make train-all."),
        ("data folds train-all FOLD=2", "FOLD=2: make train-all trains every fold. Next: make train FOLD=2."),
        (
            "sweep NPROC=2",
            "NPROC=2: a sweep trains one run at a time, in one process. Next: start it once for each GPU",
        ),
    ],
)
def test_make_refuses_variables_that_would_be_left_out(words, sentence):
    """`make train FOLDS=3 MODLE=hyena` trained fold 0 of another model; `make evaluate MODEL=hyena` scored all runs.

    `make structures MODEL=denovo` without FILE wrote the files of ensemble all. `make train ALL=1` trained fold 0.
    """
    done = subprocess.run(["make", "-n", *words.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "train OMP_NUM_THREADS=2 RESTART=1 CXX=g++ ALL=0",
        "train-all predict FOLD=2",
        "train-bg ALL=1 NPROC=2",
        "sweep ALL=1 NPROC=1",
        "train evaluate MODEL=hyena",
        "train-all ensemble structures COMP=rna3d MODEL=small_structure",
        "structures MODEL=denovo SEQ=ACGU",
        "predict FEATURES=a=b FILE=c",
        "audit SPLITS=a",
        "status MAKEFLAGS=-k",
    ],
)
def test_make_takes_what_a_target_or_a_program_below_it_reads(words):
    subprocess.run(["make", "-n", *words.split()], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("words", "code"), [("V=1 MODEL=hyena prefix=/usr", 0), ("FOLDS=3 V=1 WITH=FOLDS=2", 0), ("WITH=FOLDS=2", 2)]
)
def test_make_leaves_the_variables_of_a_makefile_around_it_alone(words, code, tmp_path):
    """Its `make all V=1 MODEL=hyena` ended at the ensemble, which makes of make inherit all of."""
    (tmp_path / "Makefile").write_text(f"all:\n\t$(MAKE) -n -C {ROOT} ensemble $(WITH)\n")
    done = subprocess.run(["make", "all", *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("FOLDS: no target reads that" in done.stderr) == bool(code)


def test_a_makefile_that_includes_ours_passes_its_variables_on(tmp_path):
    (tmp_path / "mine.mk").write_text(f"DEPTH ?= 1\ninclude {ROOT}/Makefile\n")
    command = ["make", "-n", "-f", str(tmp_path / "mine.mk"), "sweep", "OVER=train.lr=[1e-3]", "DEPTH=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--over 'train.lr=[1e-3]'" in done


def test_make_clean_removes_artefacts(tmp_path):
    for comp in (*competitions(), "labelled", "labelled-mine"):
        (tmp_path / "my artefacts" / comp / "clean").mkdir(parents=True)
    (tmp_path / "my artefacts" / "wheels").mkdir()
    (tmp_path / "my artefacts" / "wheels" / "some.whl").touch()
    subprocess.run(
        ["make", "clean", f"ARTIFACTS={tmp_path / 'my artefacts'}"], cwd=ROOT, capture_output=True, check=True
    )
    assert not (tmp_path / "my artefacts").exists()


def test_make_clean_spares_submissions(tmp_path):
    """What may have been uploaded stays, wherever the artefacts are."""
    (tmp_path / "ribonanza" / "runs").mkdir(parents=True)
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "ribonanza-all.csv").touch()
    subprocess.run(["make", "clean", f"ARTIFACTS={tmp_path}"], cwd=ROOT, capture_output=True, check=True)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "submissions",
        "submissions/ribonanza-all.csv",
    ]


def test_artefacts_without_a_name_go_where_they_always_go():
    """`make data ARTIFACTS=` wrote a folder `ribonanza` into the checkout, and `make status` read all of it."""
    done = subprocess.run(["make", "-n", "status", "ARTIFACTS="], cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--artifacts "artifacts"' in done.stdout


def test_a_plan_says_that_longer_sequences_are_cropped(capsys):
    """`make plan LENGTH=10000` answered for 512 nt without a word."""
    assert call("plan", "--model", "tiny_hyena", "--length", "10000") == 0
    assert "10,000 nt: training crops to data.max_length = 512 nt" in capsys.readouterr().err


def test_a_plan_refuses_what_training_refuses(capsys):
    """`make plan SET=data.crop=22` told its memory; make train refuses it."""
    assert call("plan", "--model", "tiny_hyena", "--set", "data.crop=22") == 2
    assert "crop: got 22; expected an odd number. Next: crop = 23." in capsys.readouterr().err


def test_a_plan_before_the_data_says_that_its_length_is_assumed(tmp_path, capsys):
    """It answered for 512 nt without a word; Ribonanza's have 177, and part 2's 4,640."""
    assert call("plan", "--model", "tiny_hyena", "--artifacts", str(tmp_path)) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "train.parquet: not there yet, so the longest sequence is taken to have data.max_length = 512 nt." in told
    assert f"Next: make data ARTIFACTS={tmp_path}, or LENGTH=<nt>." in told
    assert call("plan", "--model", "tiny_hyena", "--artifacts", str(tmp_path), "--length", "100") == 0
    assert "not there yet" not in capsys.readouterr().err


def test_a_plan_is_for_the_longest_sequence_of_the_clean_table(tmp_path, capsys):
    """It answered for 512 nt also where the table was there, of 107 or 177 nt."""
    table = tmp_path / "ribonanza" / "clean" / "train.parquet"
    table.parent.mkdir(parents=True)
    pl.DataFrame({"sequence": ["ACGU", "ACGUACGUA"]}).write_parquet(table)
    pl.DataFrame({"sequence": ["ACGUACGUACGU"]}).write_parquet(table.with_name("test.parquet"))
    for pseudo, longest in (("", 9), ("teacher.sim80_k5", 12)):  # whose predictions of the test set train too
        words = ["--model", "tiny_hyena", "--set", f'data.pseudo="{pseudo}"']
        assert call("plan", *words, "--artifacts", str(tmp_path)) == 0
        assert f"sequences of {longest} nt" in capsys.readouterr().out


def test_help_starts_without_torch():
    code = "import sys; import pipeline.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_verb_prints_the_help_and_no_empty_sentence(capsys):
    """`rna` alone ended with the line "error:  (exit code 2)"."""
    assert run_verb([]) in (0, 2)  # 0 by click 8.1
    printed = capsys.readouterr()
    assert "tables and folds" in printed.out
    assert "error" not in printed.err


def test_error_of_the_system_is_a_sentence(tmp_path, capsys):
    """An artifacts folder below a file gave a traceback that ended in "NotADirectoryError: [Errno 20]"."""
    write_ribonanza(tmp_path / "raw", sequences=12, test=3)
    (tmp_path / "file").touch()
    assert run_verb(["data", "--raw", str(tmp_path / "raw"), "--artifacts", str(tmp_path / "file" / "below")]) == 5
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Not a directory" in said


@pytest.mark.parametrize(
    "err",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),  # ulimit -v 1000000
        OSError("libcudart.so.12: cannot open shared object file: No such file or directory"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_a_package_whose_own_code_cannot_be_loaded_is_a_sentence(err, tmp_path, capsys, monkeypatch):
    """A traceback of forty lines; one of ours, which names no such file, still gives one."""
    words = ["status", "--artifacts", str(tmp_path)]
    monkeypatch.setattr("pipeline.jobs.survey", lambda _: _raise(err))
    assert run_verb(words) == 2
    said = capsys.readouterr().err
    assert f"error: {err}: a package's own code cannot be loaded. Next: see whether ulimit -v" in " ".join(said.split())
    monkeypatch.setattr("pipeline.jobs.survey", lambda _: _raise(ImportError("no module named 'ours.sources'")))
    with pytest.raises(ImportError, match="sources"):
        run_verb(words)


def _raise(err: Exception) -> None:
    raise err


def test_error_of_the_system_that_polars_met_is_a_sentence(tmp_path, capsys, monkeypatch):
    """make folds in a read-only folder gave a traceback: polars' PermissionError has no errno, only a text."""
    absent = Path("/proc/absent/folds.parquet")  # of a path longer than 88 characters polars shows the end alone
    monkeypatch.setattr("folds.assign.run", lambda *_, **__: pl.DataFrame({"fold": [0]}).write_parquet(absent))
    assert run_verb(["folds", "--artifacts", str(tmp_path)]) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "No such file or directory. Next: check the path" in said
    assert said.startswith("error: /")
    assert "os error" not in said


def test_what_the_system_refuses_parquet_files_is_a_sentence(tmp_path, capsys, monkeypatch):
    """make data beyond a limit of file sizes gave a traceback: of parquet polars raises an error that is no OSError."""
    told = "parquet: File out of specification: underlying IO error: File too large (os error 27)"
    monkeypatch.setattr("folds.assign.run", lambda *_, **__: _raise(pl.exceptions.ComputeError(told)))
    assert run_verb(["folds", "--artifacts", str(tmp_path)]) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "IO error: File too large. Next: check the disk. (exit code 5)" in said


def test_program_ends_with_the_exit_code_after_a_csv_that_was_refused(tmp_path):
    """A broken last line of test_sequences.csv: "terminate called without an active exception", exit code 134."""
    write_ribonanza(tmp_path / "raw", sequences=12, test=3)
    path = tmp_path / "raw" / "test_sequences.csv"
    path.write_bytes(path.read_bytes()[:-1])
    command = [sys.executable, "-m", "pipeline", "data", "--raw", str(tmp_path / "raw")]
    for _ in range(3):
        done = subprocess.run(
            [*command, "--artifacts", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 3
        assert done.stderr.startswith("error: test_sequences.csv: the last line has no end")
        assert len(done.stderr.splitlines()) == 1


def test_run_that_never_began_is_not_counted(tmp_path, capsys):
    """A mistyped `make train` left a folder, and `make ensemble` said that its folds are not complete."""
    (tmp_path / "ribonanza" / "runs" / "mistyped.sim80_k5" / "fold0").mkdir(parents=True)
    assert run_verb(["ensemble", "--artifacts", str(tmp_path)]) == 3
    assert "no run at all" in capsys.readouterr().err


def test_interrupted_stage_says_so(tmp_path, capsys, monkeypatch):
    """Ctrl-C in `make ensemble` ended without a word."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("folds.assign.run", interrupt)
    assert run_verb(["folds", "--artifacts", str(tmp_path)]) == 130
    assert "interrupted; nothing is half-written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("usable", "given", "threads"),
    [(4, {}, ["4", "4"]), (4, {"OMP_NUM_THREADS": "2"}, ["2", "4"]), (64, {}, [None] * 2)],
)
def test_a_quota_of_time_limits_threads_unless_their_number_is_given(usable, given, threads):
    """A container with the time of 4 CPUs out of 64 trained with 64 threads."""
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
    program = (
        "import os; from pipeline.cli import process as p; p.bound_cpus = lambda: 64; "
        f"p.usable_cpus = lambda: {usable}; p.run_verb = lambda: print([os.environ.get(n) for n in {names}]) or 0; "
        "p.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(threads)


def test_our_files_are_read_as_utf8_whatever_the_locale(tmp_path):
    """make evaluate ended in a UnicodeDecodeError on LOG.md; a line added in Latin-1 would spoil it for others."""
    (tmp_path / "log").write_text("±", encoding="utf-8")
    verb = "lambda: print(ascii(open('log').read())) or 0"
    program = f"from pipeline.cli import process; process.run_verb = {verb}; process.main()"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | locale, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("'\\xb1'", 0), done.stderr


def test_a_check_without_comp_says_which_it_took(tmp_path, capsys, monkeypatch):
    """A file of another set was checked as Ribonanza's, and the sentence spoke of reactivities alone."""
    monkeypatch.chdir(tmp_path)
    write_values_data(Paths(comp="ribonanza"), np.random.default_rng(3), tests=4)
    Path("mine.csv").write_text("sequence_id,label\na,x\n")
    assert call("check", "mine.csv") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"; checked as COMP=ribonanza\. Next: .*, or give COMP\.", said)


def test_a_folder_whose_name_is_not_utf_8_is_refused():
    """Tables and logs cannot name it: training in it ended with a traceback of pyarrow's."""
    with pytest.raises(ConfigError, match=r"ARTIFACTS=b'here\\xff'.* not UTF-8.* Next: choose another folder"):
        find_paths("ribonanza", Path(os.fsdecode(b"here\xff")))
