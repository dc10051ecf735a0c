"""The program as a user meets it: help of every verb, one sentence and an exit code for every mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli import app, run_name, run_verb

ROOT = Path(__file__).resolve().parents[1]
VERBS = sorted(typer.main.get_command(app).commands)


def call(*arguments: str) -> int:
    return run_verb(arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_each_of_its_options(verb, capsys):
    assert call(verb, "--help") == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 8
    for option in typer.main.get_command(app).commands[verb].params:
        assert option.name == "help" or option.help, f"{verb} {option.name} has no help"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["train", "--model", "ribonanza_mambo"], 2, "Did you mean 'ribonanza_mamba'"),
        (["train", "--set", "train.lr=1e-3"], 2, "TAG"),
        (["train", "--set", "train.epoch=3", "--tag", "x"], 2, "did you mean 'epochs'"),
        (["train", "--time-budget", "eight hours"], 2, "such as 8h"),
        (["train", "--all-folds", "--split", "oddly"], 2, "sim80_k5"),
        (["data", "--raw", "", "--comp", "ribonanza"], 2, "RAW=<folder>"),
        (["data", "--raw", "nowhere", "--comp", "ribonanzo"], 2, "Did you mean 'ribonanza'"),
        (["data", "--raw", "nowhere"], 3, "nowhere"),
        (["folds"], 3, "train.parquet"),
        (["ensemble"], 3, "make train"),
        (["submit"], 3, "make"),
        (["evaluate"], 3, "make"),
        (["check", "absent.csv"], 3, "make"),
        (["no-such-verb"], 2, "no-such-verb"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_in_one_sentence_and_its_exit_code(arguments, code, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert "Traceback" not in said
    assert said.startswith("error: ")
    assert list(tmp_path.rglob("*.part-*")) == []


def test_a_run_is_named_after_config_variant_and_split():
    assert run_name("configs/mine.toml", split="sim80_k5") == "mine.sim80_k5"


def test_make_help_lists_every_target_once():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets:
        assert len(re.findall(rf"^{target}\s", listed, re.MULTILINE)) == 1, target


def test_make_refuses_settings_without_a_name():
    done = subprocess.run(["make", "train", "SET=train.lr=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TAG=some-name" in done.stderr


def test_help_starts_without_torch():
    code = "import sys; import pipeline.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
