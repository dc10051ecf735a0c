"""Weights that come with the program are what their card says, predict what it tells, and travel with a wheel alone."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.config import load_config
from pipeline.kernel import bundle
from pipeline.kernel.wheels import _SKIPPED
from pipeline.network import build_model, resolved_config
from pipeline.notebook import Trained
from pipeline.paths import PRETRAINED, REPOSITORY
from pipeline.runs import find_run
from pipeline.stage import sha256_file
from pipeline.training.checkpoint import CheckpointStore, initial_checkpoint, read_meta
from pipeline.training.initial import load_initial

HOME = PRETRAINED / "reactivity-v2"
CARD = (HOME / "card.md").read_text()
CHECKPOINTS = [CheckpointStore(HOME / f"fold{fold}" / "checkpoints").best_folder() for fold in range(5)]


def test_the_card_tells_every_files_sha256_and_step():
    told = re.findall(r"^\| (\d) \| (\d+) \| `(\w{64})` \|$", CARD, re.MULTILINE)
    found = [(path, read_meta(path)) for path in CHECKPOINTS]
    real = [(str(m["fold"]), str(m["step"]), sha256_file(path / "model.safetensors")) for path, m in found]
    assert told == real


def test_nothing_but_weights_and_what_loads_them_is_shipped():
    files = {path.relative_to(HOME) for path in HOME.rglob("*") if path.is_file()}
    kept = {path.relative_to(HOME) / name for path in CHECKPOINTS for name in ("model.safetensors", "meta.json")}
    assert files == kept | {Path("card.md")}
    assert all(read_meta(path)["progress"]["finished"] for path in CHECKPOINTS)  # or predictions say that they are not
    assert sum((HOME / path).stat().st_size for path in files) < 4 * 2**20


def test_the_network_is_the_one_that_the_card_names():
    config = load_config("small_ribonanza_mamba")
    model = build_model(config.model, RIBONANZA)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in CARD
    for path in CHECKPOINTS:
        assert read_meta(path)["config"]["model"]["kwargs"] == resolved_config(config, model)["model"]["kwargs"]


def test_the_cards_example_is_predicted():
    pytest.importorskip("RNA")
    (sequence,) = re.findall(r"^`([ACGU]{30})`", CARD, re.MULTILINE)
    told = [re.findall(r"\d\.\d{4}", row) for row in re.findall(r"^\| (?:DMS|2A3)_MaP \|(.*)\|$", CARD, re.MULTILINE)]
    found = [Trained(path.parents[1]).predict([sequence])[0] for path in CHECKPOINTS]
    np.testing.assert_allclose(np.mean(found, axis=0), np.array(told, dtype=float).T, atol=1e-4)


def test_predictions_of_unusual_rnas_are_in_range():
    pytest.importorskip("RNA")
    rng = np.random.default_rng(5)
    drawn = ["".join(rng.choice(list("ACGU"), length)) for length in (1, 2, 16, 177, 300)]
    found = Trained(HOME / "fold0").predict(["G" * 40, "A" * 40, "GC" * 60, *drawn])
    assert min(values_LC.min() for values_LC in found) > -0.2
    assert max(values_LC.max() for values_LC in found) < 1.3


def test_a_run_may_begin_with_them_fold_by_fold_and_their_fold_must_be_its_own(capsys):
    assert [initial_checkpoint(Path("reactivity-v2"), fold=fold) for fold in range(5)] == CHECKPOINTS
    config = replace(load_config("small_ribonanza_mamba").model, init="reactivity-v2")
    trained_on = read_meta(CHECKPOINTS[3])["data"]["folds"]
    meta: dict[str, Any] = {"competition": "ribonanza", "split": "sim80_k5", "fold": 3}
    for folds, seen in ((trained_on, False), ("of other data", True)):
        model = build_model(config, RIBONANZA)
        facts = load_initial(model, config, meta | {"data": {"folds": folds}})
        assert facts is not None
        assert facts["backbone"] == 1.0
        assert (facts["run"], facts["fold"]) == ("reactivity-v2.sim80_k5", 3)
        assert ("scores of this run are not out of fold" in " ".join(capsys.readouterr().err.split())) is seen


def test_a_notebook_that_trains_gets_those_of_its_folds(tmp_path):
    parcel = bundle._Parcel(tmp_path / "dataset")
    bundle._pack_initial(Path("reactivity-v2"), (0, 3), parcel)
    places = parcel.entries()
    packed = [place for entry in places.values() for place in entry["places"]]
    steps = [CHECKPOINTS[fold].name for fold in (0, 3)]
    names = ("model.safetensors", "meta.json")
    kept = [
        f"initial/fold{k}/checkpoints/{step}/{name}" for k, step in zip((0, 3), steps, strict=True) for name in names
    ]
    assert sorted(packed) == sorted(kept)
    assert {path.name for path in parcel.folder.iterdir()} == set(places)


def test_they_are_found_by_name_and_a_config_of_no_such_name_is_a_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run("reactivity-v2", split="sim80_k5") == HOME
    assert find_run("hyena", split="sim80_k5", tag="x") == "hyena+x.sim80_k5"
    (tmp_path / "hyena").mkdir()
    assert find_run("hyena", split="sim80_k5") == "hyena.sim80_k5"


def test_a_wheel_carries_them_and_that_of_a_notebook_does_not():
    told = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["models"]
    packed = {path for pattern in told for path in (REPOSITORY / "models").glob(pattern)}
    assert {path for path in PRETRAINED.rglob("*") if path.is_file()} <= packed
    assert "pretrained" in _SKIPPED(str(REPOSITORY / "models"), ["heads.py", "pretrained"])


def test_every_table_of_the_card_has_as_many_cells_in_each_row():
    tables = re.findall(r"(?:^\|.*\|\n)+", CARD, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1
