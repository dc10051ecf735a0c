"""Commands that a sentence tells to run next are those of the folder, split and run that are at work."""

import re
import subprocess
from pathlib import Path

import pytest
import typer

from pipeline import commands
from pipeline.cli import app, no_network, run_verb
from pipeline.runlog import read_status, say, warn, write_status

ROOT = Path(__file__).resolve().parents[2]
VERBS = {name: [option.name for option in verb.params] for name, verb in typer.main.get_command(app).commands.items()}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


@pytest.fixture
def told():
    """Remember what a verb was told, for the length of a test."""
    with commands.scope():
        yield lambda **given: commands.remember(given, verbs=VERBS)


@pytest.mark.parametrize(
    ("given", "sentence", "completed"),
    [
        ({}, "Next: make data.", "Next: make data."),
        ({"comp": "ribonanza", "split": "sim80_k5", "fold": 0}, "Next: make train.", "Next: make train."),
        ({"artifacts": Path("/a")}, "Next: make data COMP=x.", "Next: make data COMP=x ARTIFACTS=/a."),
        ({"artifacts": Path("/a")}, "Next: make data ARTIFACTS=b, or", "Next: make data ARTIFACTS=b, or"),
        ({"split": "a_k3", "name": "best"}, "make ensemble, then make submit", None),
        ({"tag": "t", "fold": 2, "model": "m"}, "(make stop)", "(make stop MODEL=m FOLD=2 TAG=t)"),
        ({"tag": "t", "fold": 2}, "make train FOLD=<k> for the folds", "make train FOLD=<k> TAG=t for the folds"),
        ({"fold": 2}, "make replay STEP=<one of 3, 4>.", "make replay STEP=<one of 3, 4> FOLD=2."),
        ({"all_folds": True, "fold": 0}, "the same make train goes on", "the same make train-all goes on"),
        (
            {"all_folds": True},
            "make train FOLD=1 or make logs FOLLOW=1",
            "make train FOLD=1 or make logs FOLLOW=1 ALL=1",
        ),
        (  # what a sweep of all folds advised was SET='train-all.lr=1'
            {"all_folds": True},
            "make train-all TAG=t SET='a=1 train.lr=1', or make train",
            "make train-all TAG=t SET='a=1 train.lr=1', or make train-all",
        ),
        ({"all_folds": True}, "make stop FOLD=1", "make stop FOLD=1"),
        ({"fold": 3}, "make stop ALL=1 ends it", "make stop ALL=1 ends it"),
        ({"set_": ["a.b=1", "c.d=2"], "tag": "t"}, "make train.", 'make train TAG=t SET="a.b=1 c.d=2".'),
        ({"set_": ["a.b='x'"], "tag": "t"}, "make train", "make train TAG=t SET='a.b='\"'\"'x'\"'\"''"),
        ({"artifacts": Path("my folder")}, "`make data`", '`make data ARTIFACTS="my folder"`'),
        ({"comp": "rna3d"}, "make data folds if a table", "make data folds COMP=rna3d if a table"),
        ({"comp": "rna3d"}, "make up your mind; makes data; make data-x", "make up your mind; makes data; make data-x"),
        (
            {"comp": "rna3d"},
            "make templates RAW=<folder of files>).",
            "make templates RAW=<folder of files> COMP=rna3d).",
        ),
        (
            {"comp": "x"},
            "make setup EXTRAS=dev,kaggle, or make doctor.",
            "make setup EXTRAS=dev,kaggle, or make doctor.",
        ),
    ],
)
def test_a_command_gets_the_variables_that_its_target_takes_and_the_sentence_lacks(told, given, sentence, completed):
    told(**given)
    completed = completed or "make ensemble SPLIT=a_k3 NAME=best, then make submit NAME=best"
    assert commands.complete(sentence) == completed
    assert commands.complete(completed) == completed, "said twice"


def test_a_command_names_the_interpreter_that_make_was_told(told, monkeypatch):
    """`make train PY=python3` ended with "Next: make folds", which sets up a .venv of its own."""
    monkeypatch.setenv("RNA_PY", "/opt/bin/python3")
    told(comp="rna3d")
    assert commands.complete("Next: make folds.") == "Next: make folds COMP=rna3d PY=/opt/bin/python3."
    assert commands.complete("make folds PY=python3.12") == "make folds PY=python3.12 COMP=rna3d"
    run = ["make", "-n", "folds"]
    told_by = [
        subprocess.run([*run, *given], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for given in (["PY=python3"], ["PY=.venv/bin/python", "-o", ".venv/.ready"])
    ]
    assert ["RNA_PY=python3 python3 -m" in line for line in told_by] == [True, False]


@pytest.mark.parametrize(("target", "comes_first"), [("train", False), ("train-bg", False), ("train-all", True)])
def test_whatever_trains_all_folds_makes_the_runs_without_a_network_first(target, comes_first):
    """train-all made them, and train-bg ALL=1 did not: the ensemble was another one."""
    for more, wanted in (([], comes_first), *([(["ALL=1"], True)] if target != "train" else [])):
        command = ["make", "-n", target, "MSA=/tmp", "PY=python3", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ('--without-network --msa "/tmp"' in done) == wanted, done


@pytest.mark.parametrize(
    ("comp", "made"),
    [
        ("ribonanza", []),
        ("openvaccine", []),
        ("profiles-mine", []),
        ("labelled", [("words", {})]),
        ("labelled-mine", [("words", {})]),
        ("rna3d", [("denovo", {}), ("templates_predict", {"msa": Path("a")})]),
        ("rna3d2", [("denovo", {}), ("templates_predict", {"msa": Path("a")})]),
    ],
)
def test_a_competition_has_runs_of_its_own_that_need_no_network(tmp_path, monkeypatch, comp, made):
    calls = []
    for name in ("denovo", "templates_predict", "words"):
        monkeypatch.setattr(no_network, name, lambda name=name, **told: calls.append((name, told)))
    no_network.predict_all(comp, tmp_path, split="sim80_k3", msa=Path("a"))
    assert calls == [(name, {"comp": comp, "artifacts": tmp_path, "split": "sim80_k3", **more}) for name, more in made]


def test_whatever_is_said_is_completed(told, capsys, tmp_path):
    told(artifacts=tmp_path)
    say("Next: make data")
    warn("Next: make folds.")
    write_status(tmp_path, {"message": "Next: make train.", "state": "failed"})
    said = capsys.readouterr().err.splitlines()
    assert said == [f"Next: make data ARTIFACTS={tmp_path}", f"warning: Next: make folds ARTIFACTS={tmp_path}."]
    assert read_status(tmp_path)["message"] == f"Next: make train ARTIFACTS={tmp_path}."


def test_a_failure_names_the_folder_the_split_and_the_run_that_failed(tmp_path, capsys):
    """`make folds ARTIFACTS=/tmp/x` said "Next: make data COMP=ribonanza.", which works in another folder."""
    here = ["--artifacts", str(tmp_path), "--split", "sim80_k3"]
    assert run_verb(["folds", *here]) == 3
    assert f"Next: make data COMP=ribonanza ARTIFACTS={tmp_path}. (exit" in capsys.readouterr().err
    assert run_verb(["replay", *here, "--model", "tiny_hyena", "--tag", "wide", "--fold", "1"]) == 3
    wanted = f"MODEL=tiny_hyena SPLIT=sim80_k3 FOLD=1 TAG=wide ARTIFACTS={tmp_path} "
    assert f"make train {wanted}" in capsys.readouterr().err
    assert run_verb(["submit", "--artifacts", str(tmp_path), "--name", "best"]) == 3
    assert f"NAME=best ARTIFACTS={tmp_path}" in capsys.readouterr().err
    assert commands.complete("make data") == "make data", "of a verb that ended, nothing is left"


def test_the_network_that_a_competition_takes_by_itself_is_not_repeated(tmp_path, capsys):
    assert run_verb(["replay", "--comp", "rna3d", "--artifacts", str(tmp_path)]) == 3
    assert f"make train COMP=rna3d ARTIFACTS={tmp_path} " in capsys.readouterr().err


def test_every_variable_is_one_of_make_with_the_same_preset():
    presets = dict(re.findall(r"^([A-Z]+) +\??= *([^#]*)#", MAKEFILE, re.MULTILINE))
    for variable, preset in commands.VARIABLES.values():
        assert presets.get(variable, "").strip() == preset, variable


@pytest.mark.parametrize("target", sorted({*VERBS, "train-bg", "train-all"} & TARGETS))
def test_make_passes_on_what_a_command_is_completed_with(told, target):
    values = {"comp": "rna3d", "model": "m", "split": "s_k3", "fold": 1, "tag": "t", "name": "n", "slug": "g"}
    told(**values, set_=["a.b=1"], artifacts="elsewhere")
    words = commands.complete(f"make {target}").split()
    done = subprocess.run(
        [*words, "-n", "RAW=.", "PY=python3"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for variable, _, value in (word.partition("=") for word in words[2:]):
        value = value.strip('"')
        assert re.search(rf"[ \"']{value}([\"'\s/]|$)", done), f"{variable} is not in {done}"


def test_what_a_part_is_told_is_forgotten_after_it():
    """The demo's commands named the first competition, whichever it was at."""
    with commands.scope():
        commands.remember({"artifacts": "there"}, verbs={"folds": ["comp", "artifacts"]})
        with commands.scope():
            commands.remember({"comp": "rna3d"})
            assert commands.complete("Next: make folds.") == "Next: make folds COMP=rna3d ARTIFACTS=there."
        assert commands.complete("Next: make folds.") == "Next: make folds ARTIFACTS=there."
    assert commands.complete("Next: make folds.") == "Next: make folds."
