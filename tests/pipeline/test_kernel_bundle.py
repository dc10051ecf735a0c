"""A notebook's bundle holds all that the notebook needs, and the notebook does with it what the same stages do here."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import types
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import bpp as stage_of_pairs
from pipeline import predict as stages
from pipeline import preprocess, synthetic, train_folds, viennarna
from pipeline.cli import run_verb
from pipeline.competitions import competition_of, get_competition
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.kernel import bundle, script, service, wheels
from pipeline.paths import REPOSITORY, Paths
from pipeline.training import stop
from pipeline.training.checkpoint import CheckpointStore
from tests.chain_tables import make_paths, write_run, write_structure_data, write_structure_run, write_values_data
from tests.pipeline.clock import Clock
from tests.pipeline.kernels import COMPETITION, RUN, SPLIT, lay_out, order_of, pack, play, write_raw, write_wheel
from tests.pipeline.labelled_sets import measured, proteins

CANARY = "canary-0123456789abcdef"


@dataclass
class Trained:
    """What a training notebook left, an ensemble of it, and the notebook that predicts with that."""

    folder: Path
    home: Path  # of the training bundle
    paths: Paths  # the notebook's own artefacts
    predicting: Path  # bundle


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("kernel")
    raw = write_raw(folder / "raw")
    home = pack(order_of(Paths(comp="ribonanza", root=folder / "here")))
    play(home, lay_out(folder / "input", home, raw), folder / "work")
    paths = Paths(comp="ribonanza", root=folder / "work" / "artifacts")
    assert run_verb(["ensemble", "--artifacts", str(paths.root), "--split", SPLIT]) == 0
    return Trained(folder, home, paths, pack(order_of(paths, mode="predict", ensemble="all")))


def predict(trained: Trained, folder: Path, environment: dict[str, str], *, test: int = 11) -> Path:
    """Play the predicting notebook on a hidden test set; returns its submission."""
    raw = write_raw(folder / "hidden", test=test, seed=5)
    inputs = lay_out(folder / "input", trained.predicting, raw)
    play(trained.predicting, inputs, folder / "work", environment)
    return folder / "work" / "submission.csv"


def test_every_dependency_is_in_the_image_or_in_the_bundle():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ours = declared["dependencies"] + declared["optional-dependencies"]["bpp"]
    names = {re.match(r"[\w-]+", text)[0] for text in ours}
    assert names == set(wheels.IMAGE) | set(wheels.MISSING)


def test_our_wheel_holds_what_stages_read_beside_code_and_nothing_else(tmp_path: Path, monkeypatch):
    """To look for pip exchanged a module that a program had imported: "Setuptools is replacing distutils"."""
    monkeypatch.setitem(sys.modules, "distutils", old := types.ModuleType("distutils"))
    name = wheels.build_wheel(tmp_path)
    assert sys.modules["distutils"] is old
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with zipfile.ZipFile(tmp_path / name) as opened:
        members = set(opened.namelist())
    assert {"pipeline/configs/hyena.toml", "models/layers/csrc/selective_scan.cpp", "submissions/LOG.md"} <= members
    assert {f"submissions/{name}" for name in ("viewer.js", "vendor/3Dmol-min.js", "vendor/LICENSE")} <= members
    assert {Path(member).parts[0] for member in members} == {
        "pipeline", "models", "folds", "submissions", "rna_competition_pipeline-0.1.0.dist-info",
    }  # fmt: skip
    assert not [member for member in members if member.endswith((".pyc", ".csv"))]


def test_a_bundle_is_flat_and_says_what_it_holds(trained: Trained):
    for home in (trained.home, trained.predicting):
        told = bundle.read_bundle(home)
        assert {path.name for path in (home / "dataset").iterdir()} == set(told["files"]) | {
            "MANIFEST.json",
            "dataset-metadata.json",
        }
        code = json.loads((home / "code" / "kernel-metadata.json").read_text())
        assert code["enable_internet"] is False
        assert code["machine_shape"] == "NvidiaTeslaT4"
        assert re.sub(r"[^a-z0-9]+", "-", code["title"]) == home.name == code["id"].removeprefix("tester/")
        assert code["dataset_sources"] == [f"tester/{home.name}-data"]
        assert len(home.name) + len("-99-data") <= 50
        assert compile((home / "code" / "kernel.py").read_text(), "kernel.py", "exec")
        assert f'BUNDLE = "{home.name}"' in (home / "code" / "kernel.py").read_text()


def test_a_training_notebook_declares_checkpoints_metrics_and_tables(trained: Trained):
    told = json.loads((trained.folder / "work" / "KERNEL.json").read_text())
    assert told["state"] == "finished"
    for fold in (0, 1):
        names = {Path(file).name for file in told["files"] if f"/{RUN}/fold{fold}/" in file}
        assert {"model.safetensors", "meta.json", "metrics.jsonl", "oof.parquet", "test.parquet"} <= names
        assert not [name for name in names if name.startswith(".")], "locks; what a service hides would be missed"


def test_a_training_notebook_brings_the_weights_that_its_run_begins_with(trained: Trained, tmp_path: Path):
    """The path of model.init was packed and not what lies there: the notebook ended with 2 on Kaggle."""
    begun = trained.paths.run_dir(RUN)
    overrides = ("train.epochs=1", f'model.init="{begun}"')
    named = {"tag": "tuned", "run": RUN.replace("notebook", "tuned")}
    home = pack(order_of(Paths(comp="ribonanza", root=tmp_path / "here"), overrides=overrides, **named))
    play(home, lay_out(tmp_path / "input", home, trained.folder / "raw"), tmp_path / "work")
    runs = list((tmp_path / "work" / "artifacts" / "ribonanza" / "runs").iterdir())
    assert len(runs) == 1
    for fold in (0, 1):
        meta = CheckpointStore(runs[0] / f"fold{fold}" / "checkpoints").newest_meta()
        assert meta is not None
        assert (meta["initial"]["run"], meta["initial"]["fold"], meta["initial"]["backbone"]) == (RUN, fold, 1.0)


def test_weights_that_are_not_there_cannot_be_packed(tmp_path: Path):
    order = order_of(Paths(comp="ribonanza", root=tmp_path), overrides=('model.init="nowhere"',))
    with pytest.raises(DataError, match=r"nowhere: cannot be packed: .* Next: correct the path"):
        bundle.build(order)


def test_a_run_with_pseudo_labels_is_refused(tmp_path: Path):
    order = order_of(Paths(comp="ribonanza", root=tmp_path), overrides=('data.pseudo="small_drsn.sim80_k5"',))
    with pytest.raises(ConfigError, match=r"data\.pseudo = 'small_drsn\.sim80_k5': .* Next: make train here"):
        bundle.build(order)


def test_settings_without_sense_are_told_here(tmp_path: Path):
    """A notebook was packed and sent, and told them on Kaggle."""
    order = order_of(Paths(comp="ribonanza", root=tmp_path), overrides=("data.crop=21",))
    with pytest.raises(ConfigError, match=r"crop = 21 means nothing where values are predicted"):
        bundle.build(order)


def test_weights_travel_without_the_state_of_their_training(trained: Trained):
    names = {path.name for path in (trained.predicting / "dataset").iterdir()}
    assert {"run0.fold0.model.safetensors", "run0.fold1.meta.json", "weights.json"} <= names
    assert not [name for name in names if "state" in name or "training" in name]


def test_a_rerun_with_hidden_tests_gives_what_the_stages_give_here(trained: Trained, tmp_path: Path):
    found = predict(trained, tmp_path, {"KAGGLE_IS_COMPETITION_RERUN": "1", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"})
    here = Paths(comp="ribonanza", root=tmp_path / "here")
    here.home.mkdir(parents=True)
    os.symlink(trained.paths.home / "folds", here.home / "folds")
    for fold in (0, 1):
        here.fold_dir(RUN, fold).mkdir(parents=True)
        os.symlink(trained.paths.fold_dir(RUN, fold) / "checkpoints", here.fold_dir(RUN, fold) / "checkpoints")
    at = ["--artifacts", str(here.root)]
    assert run_verb(["data", *at, "--raw", str(tmp_path / "hidden")]) == 0
    for fold in ("0", "1"):
        words = ["--model", "tiny_transformer_sepconv", "--tag", "notebook", "--split", SPLIT, "--fold", fold]
        assert run_verb(["predict", *at, *words, "--test-only"]) == 0
    weights = trained.paths.ensemble_dir("all") / "weights.json"
    assert run_verb(["ensemble", *at, "--weights", str(weights)]) == 0
    assert run_verb(["submit", *at, "--to", str(tmp_path)]) == 0
    assert found.read_bytes() == (tmp_path / "ribonanza-all.csv").read_bytes()
    ends = pl.read_csv(tmp_path / "hidden" / "test_sequences.csv")["id_max"]
    assert len(found.read_text().splitlines()) == ends.max() + 2


def test_an_interactive_session_predicts_a_few_rows(trained: Trained, tmp_path: Path):
    more = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "RNA_ROWS": "3"}
    found = predict(trained, tmp_path, more)
    first = pl.read_csv(tmp_path / "hidden" / "test_sequences.csv").sort("id_min").head(3)
    assert len(found.read_text().splitlines()) == first["id_max"].max() + 2
    assert json.loads((tmp_path / "work" / "KERNEL.json").read_text())["filled"] is False


def test_a_submission_is_there_although_the_time_is_spent(trained: Trained, tmp_path: Path):
    """Pairing and a first fold took as long as they took, beyond the limit, and Kaggle kept nothing of the notebook."""
    found = pl.read_csv(predict(trained, tmp_path, {"RNA_LIMIT": "0.001"}, test=4))
    told = json.loads((tmp_path / "work" / "KERNEL.json").read_text())
    assert (told["predicted"], told["filled"]) == ([], True)
    train = pl.read_parquet(trained.paths.clean("train")).filter("scored").select("sequence", *COMPETITION.targets)
    train = train.with_columns(pl.col("sequence").str.split("")).explode("sequence", *COMPETITION.targets)
    medians = train.group_by("sequence").agg(pl.col(COMPETITION.targets).clip(0.0, 1.0).median())
    test = pl.read_csv(tmp_path / "hidden" / "test_sequences.csv").sort("id_min")
    letters = test.select(pl.col("sequence").str.replace_all("T", "U").str.split("")).explode("sequence")
    expected = letters.join(medians, on="sequence", maintain_order="left").select(COMPETITION.targets)
    np.testing.assert_allclose(found.select(COMPETITION.targets).to_numpy(), expected.to_numpy(), atol=6e-5)


@pytest.mark.slow
def test_structures_are_trained_and_predicted_in_notebooks_too(tmp_path: Path):
    synthetic.write_rna3d(tmp_path / "raw", targets=8, test=1)
    synthetic.write_rna3d(tmp_path / "hidden", targets=8, test=2, seed=1)
    here = Paths(comp="rna3d", root=tmp_path / "here")
    competition = get_competition("rna3d")
    overrides = ("train.epochs=1",)
    home = pack(order_of(here, competition=competition, overrides=overrides))
    play(home, lay_out(tmp_path / "input", home, tmp_path / "raw"), tmp_path / "work")
    paths = Paths(comp="rna3d", root=tmp_path / "work" / "artifacts")
    assert run_verb(["ensemble", "--comp", "rna3d", "--artifacts", str(paths.root), "--split", SPLIT]) == 0
    home = pack(order_of(paths, competition=competition, mode="predict", ensemble="all"))
    inputs = lay_out(tmp_path / "input2", home, tmp_path / "hidden")
    play(home, inputs, tmp_path / "predicted", {"KAGGLE_IS_COMPETITION_RERUN": "1"})
    written = pl.read_csv(tmp_path / "predicted" / "submission.csv")
    assert written["ID"].to_list() == pl.read_csv(tmp_path / "hidden" / "sample_submission.csv")["ID"].to_list()


def write_labelled(folder: Path, *, test: int, seed: int, more: str = "") -> Path:
    """A competition of proteins whose columns and sample submission need to be explained; `more` labels are of all."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    train, hidden = proteins(rng, count=40), proteins(rng, count=test).select("sequence", pl.col("id").alias("code"))
    label = (pl.col("label") + more).alias("fold")
    train.select("sequence", pl.col("id").alias("code"), label).write_csv(folder / "train.csv")
    hidden.write_csv(folder / "test.csv")
    hidden.select(pl.col("code").reverse(), pl.lit("one").alias("fold")).write_csv(folder / "sample_submission.csv")
    return folder


@pytest.mark.parametrize("more", ["", ";any"])
def test_a_labelled_set_is_trained_without_its_raw_files_and_predicted_as_its_columns_were_explained(
    more: str, tmp_path: Path
):
    comp = "labelled-folds-of-proteins"
    competition, here = get_competition(comp), Paths(comp=comp, root=tmp_path / "here")
    raw = write_labelled(tmp_path / "raw", test=4, seed=0, more=more)
    # says nothing of a hidden test set, and is no table of one line there
    tidy = "min_count = 2\nmerge = {uno = 'one'}\ngroups = {all = ['*']}\n"
    (raw / "columns.toml").write_text(f'id = "code"\nlabel = "fold"\n{tidy}')
    preprocess.run(competition, raw, here)
    (tmp_path / "none").mkdir()
    home = pack(order_of(here, competition=competition, overrides=("train.epochs=1",)))
    assert json.loads((home / "code" / "kernel-metadata.json").read_text())["competition_sources"] == []
    play(home, lay_out(tmp_path / "input", home, tmp_path / "none"), tmp_path / "work")
    paths = Paths(comp=comp, root=tmp_path / "work" / "artifacts")
    at = ["--comp", comp, "--artifacts", str(paths.root)]
    assert run_verb(["words", *at, "--split", SPLIT]) == 0
    assert run_verb(["ensemble", *at, "--split", SPLIT]) == 0
    home = pack(order_of(paths, competition=competition, mode="predict", ensemble="all"))
    metadata = json.loads((home / "code" / "kernel-metadata.json").read_text())
    assert metadata["competition_sources"] == ["folds-of-proteins"]
    hidden = write_labelled(tmp_path / "hidden", test=9, seed=1)
    odd = pl.Series("sequence", ["XXMKX", "", "mk*v9-", "W" * 3000, "A"])  # none of it was visible
    table = pl.read_csv(hidden / "test.csv")
    table.with_columns(odd.append(table["sequence"].tail(4))).write_csv(hidden / "test.csv")
    sample = pl.read_csv(hidden / "sample_submission.csv")
    for name, rows in {"all": 9, "few": 3}.items():
        inputs = lay_out(tmp_path / f"input-{name}", home, hidden)
        play(home, inputs, tmp_path / name, {"RNA_ROWS": str(rows)} if rows < 9 else {})
        written = pl.read_csv(tmp_path / name / "submission.csv")
        assert written.columns == ["code", "fold"]
        assert written["code"].to_list() == sample["code"].to_list()[-rows:]
        assert set(";".join(written["fold"]).split(";")) <= {"one", "two", *([more[1:]] if more else [])}
    if not more:  # without any network
        alone = ["--split", SPLIT, "--name", "counted", "--run", f"words.{SPLIT}"]
        assert run_verb(["ensemble", *at, *alone]) == 0
        home = pack(order_of(paths, competition=competition, mode="predict", ensemble="counted"))
        play(home, lay_out(tmp_path / "input-counted", home, hidden), tmp_path / "counted")
        assert pl.read_csv(tmp_path / "counted" / "submission.csv").height == 9


def test_a_labelled_set_of_ones_own_is_trained_in_a_notebook_and_not_predicted(tmp_path: Path):
    """It was refused altogether: "kernel: labelled is a set of your own; expected a competition of Kaggle's"."""
    competition, paths = get_competition("labelled"), Paths(comp="labelled", root=tmp_path / "here")
    with pytest.raises(DataError, match=r"no classes; expected those of the clean table\. Next: make data"):
        pack(order_of(paths, competition=competition))
    write_labelled(tmp_path / "raw", test=4, seed=0)
    (tmp_path / "raw" / "columns.toml").write_text('id = "code"\nlabel = "fold"\n')
    preprocess.run(competition, tmp_path / "raw" / "train.csv", paths)
    names = {path.name for path in (pack(order_of(paths, competition=competition)) / "dataset").iterdir()}
    assert {"clean.train.parquet", "clean.classes.parquet"} <= names
    with pytest.raises(ConfigError, match=r"a set of your own.*COMP=labelled-<its name in Kaggle's addresses>"):
        pack(order_of(paths, competition=competition, mode="predict", ensemble="all"))


def test_a_set_of_numbers_is_trained_without_its_raw_files_and_predicted_in_its_units(tmp_path: Path):
    comp = "labelled-melting"
    here, raw = Paths(comp=comp, root=tmp_path / "here"), tmp_path / "raw"
    raw.mkdir()
    table = measured(np.random.default_rng(0), count=40).with_columns(pl.col("gc") + 1000)
    table.write_csv(raw / "train.csv")
    table.select("id", "sequence")[:3].write_csv(raw / "test.csv")
    (raw / "columns.toml").write_text("numbers = ['tail', 'gc']")
    preprocess.run(get_competition(comp), raw, here)
    (tmp_path / "none").mkdir()
    home = pack(order_of(here, competition=competition_of(here), overrides=("train.epochs=1",)))
    play(home, lay_out(tmp_path / "input", home, tmp_path / "none"), tmp_path / "work")
    paths = Paths(comp=comp, root=tmp_path / "work" / "artifacts")
    at = ["--comp", comp, "--artifacts", str(paths.root), "--split", SPLIT]
    assert run_verb(["words", *at]) == 0
    assert run_verb(["ensemble", *at]) == 0
    home = pack(order_of(paths, competition=competition_of(paths), mode="predict", ensemble="all"))
    hidden = table.select("id", pl.col("sequence").str.replace("^.", "N"))[20:27]
    hidden.write_csv(raw / "test.csv")
    play(home, lay_out(tmp_path / "input-hidden", home, raw), tmp_path / "hidden-work")
    written = pl.read_csv(tmp_path / "hidden-work" / "submission.csv")
    assert written.columns == ["id", "tail", "gc"]
    assert written["id"].to_list() == hidden["id"].to_list()
    assert written["gc"].is_between(900, 1200).all()


def write_profiles(folder: Path, *, test: int, seed: int) -> Path:
    """Values per nucleotide in a column that needs to be explained, and a test set whose first letter is odd."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    texts = ["".join(rng.choice(list("ACGU"), int(rng.integers(20, 31)))) for _ in range(30 + test)]
    rows = [
        {"code": f"p{place}", "rna": text, "shape": " ".join("1" if letter == "A" else "0.2" for letter in text)}
        for place, text in enumerate(texts)
    ]
    pl.DataFrame(rows[:30]).write_csv(folder / "train.csv")
    hidden = pl.DataFrame(rows[30:]).drop("shape")
    hidden.with_columns(pl.col("rna").str.replace("^.", "N" if seed else "A")).write_csv(folder / "test.csv")
    return folder


def test_a_set_of_profiles_is_trained_without_its_raw_files_and_predicted_as_its_columns_were_explained(tmp_path: Path):
    comp = "profiles-folded"
    competition, here = get_competition(comp), Paths(comp=comp, root=tmp_path / "here")
    raw = write_profiles(tmp_path / "raw", test=3, seed=0)
    (raw / "columns.toml").write_text('id = "code"\ntargets = ["shape"]\nrange = [0, 1]\n')
    preprocess.run(competition, raw, here)
    (tmp_path / "none").mkdir()
    home = pack(order_of(here, competition=competition_of(here), overrides=("train.epochs=1",)))
    play(home, lay_out(tmp_path / "input", home, tmp_path / "none"), tmp_path / "work")
    paths = Paths(comp=comp, root=tmp_path / "work" / "artifacts")
    assert run_verb(["ensemble", "--comp", comp, "--artifacts", str(paths.root), "--split", SPLIT]) == 0
    home = pack(order_of(paths, competition=competition_of(paths), mode="predict", ensemble="all"))
    hidden = write_profiles(tmp_path / "hidden", test=5, seed=1)
    play(home, lay_out(tmp_path / "input-hidden", home, hidden), tmp_path / "hidden-work")
    written = pl.read_csv(tmp_path / "hidden-work" / "submission.csv")
    assert written.columns == ["id_seqpos", "shape"]
    assert written.height == pl.read_csv(hidden / "test.csv")["rna"].str.len_bytes().sum()
    assert written["shape"].is_between(0, 1).all()


@pytest.mark.slow
def test_a_training_stopped_by_its_clock_goes_on_in_the_next_notebook(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tenth of a limit is kept for its end, and a tenth of the rest for predictions; a step takes 1/4 s here."""
    Clock(monkeypatch, script, train_folds, stop, stages).move_by_steps(monkeypatch, 0.25)
    here = Paths(comp="ribonanza", root=tmp_path / "here")
    order = order_of(here, folds=(0,), overrides=("train.epochs=2000", "train.save_every=10"), tag="long")
    order = replace(order, run=RUN.replace("notebook", "long"))
    first = pack(order)
    raw = trained.folder / "raw"
    play(first, lay_out(tmp_path / "input", first, raw), tmp_path / "first", {"RNA_LIMIT": "10"})
    second = pack(replace(order, resume=f"tester/{first.name}"))
    assert second.name == f"{first.name}-2"
    assert json.loads((second / "code" / "kernel-metadata.json").read_text())["kernel_sources"] == [
        f"tester/{first.name}"
    ]
    inputs = lay_out(tmp_path / "input2", second, raw)
    (inputs / first.name).symlink_to(tmp_path / "first")
    play(second, inputs, tmp_path / "second", {"RNA_LIMIT": "8"})
    steps = []
    for work in ("first", "second"):
        assert json.loads((tmp_path / work / "KERNEL.json").read_text())["state"] == "resumable"
        folder = tmp_path / work / "artifacts" / "ribonanza" / "runs" / order.run / "fold0"
        steps.append(CheckpointStore(folder / "checkpoints").newest_meta()["step"])
    assert steps == [33, 59]
    starts = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert [row["resumed_step"] for row in starts] == [0, steps[0]]
    store = CheckpointStore(here.fold_dir(order.run, 0) / "checkpoints")
    for work, step, is_placed in [("first", 33, 1), ("first", 33, 0), ("second", 59, 1), ("first", 59, 0)]:
        placed = service.place_folds(tmp_path / work, here)
        assert placed == [str(store.folder.parent)] * is_placed, "of the second it said: is there already and stays"
        assert [meta["step"] for meta in [store.newest_meta()] if meta] == [step]


def test_pairing_that_takes_all_the_time_goes_on_in_the_next_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of Ribonanza's takes four cores hours: Kaggle ended the notebook at its limit, and kept nothing of them."""
    seen: list[tuple[list[str], bool]] = []

    def run(paths: Paths, *, time_budget: float | None, **_: Any) -> None:
        part = paths.bpp.parent / "parts" / f"{len(seen)}.parquet"
        part.parent.mkdir(parents=True, exist_ok=True)
        seen.append((sorted(path.name for path in part.parent.iterdir()), bool(time_budget)))
        part.touch()
        raise StoppedError("bpp: stopped (its time is up).")

    monkeypatch.setattr(stage_of_pairs, "run", run)
    monkeypatch.setattr(script, "find_spec", lambda _: True)
    raw, before = write_raw(tmp_path / "raw"), ""
    for notebook in ("first", "second"):
        overrides = ("train.epochs=2", "model.kwargs.use_bpp=true")
        here = Paths(comp="ribonanza", root=tmp_path / "here")
        home = pack(order_of(here, overrides=overrides, resume=before and f"tester/{before}"))
        inputs = lay_out(tmp_path / f"{notebook}-input", home, raw)
        if before:
            (inputs / "notebooks" / "tester").mkdir(parents=True)
            (inputs / "notebooks" / "tester" / before).symlink_to(tmp_path / "first")
        play(home, inputs, tmp_path / notebook)
        told = json.loads((tmp_path / notebook / "KERNEL.json").read_text())
        assert (told["state"], told["files"]) == ("resumable", {})
        before = home.name
    assert seen == [([], True), (["0.parquet"], True)]


# --- structures without a network ---


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An ensemble of assemblies and templates, and the notebook that predicts with it."""
    folder = tmp_path_factory.mktemp("pooled")
    synthetic.write_rna3d(folder / "raw", targets=16, test=3)
    paths = Paths(comp="rna3d", root=folder / "artifacts", submissions=folder)
    at = ["--comp", "rna3d", "--artifacts", str(paths.root)]
    assert run_verb(["data", *at, "--raw", str(folder / "raw")]) == 0
    for verb in ("folds", "denovo", "templates-predict", "ensemble"):
        assert run_verb([verb, *at, "--split", SPLIT]) == 0
    order = order_of(paths, competition=get_competition("rna3d"), mode="predict", ensemble="all")
    return Trained(folder, folder, paths, pack(order))


def predict_pooled(
    pooled: Trained,
    folder: Path,
    raw: Path,
    environment: dict[str, str] | None = None,
    *,
    folds_pairs: bool = False,
    **options: Any,
) -> tuple[pl.DataFrame, list[list[str]]]:
    """Play the notebook as a rerun, with or without ViennaRNA; returns its submission and its verbs."""
    inputs = lay_out(folder / "input", pooled.predicting, raw)
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": "1", **(environment or {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "find_spec", lambda name: name if folds_pairs else None)
        called = play(pooled.predicting, inputs, folder / "work", rerun, **options)
    written = pl.read_csv(folder / "work" / "submission.csv")
    assert written["ID"].to_list() == pl.read_csv(raw / "sample_submission.csv")["ID"].to_list()
    return written, called


def predicted(folder: Path) -> list[str]:
    return list(json.loads((folder / "work" / "KERNEL.json").read_text())["predicted"])


def test_what_both_stages_learned_from_is_packed_once(pooled: Trained):
    told = bundle.read_bundle(pooled.predicting)
    places = {name: entry["places"] for name, entry in told["files"].items() if "places" in entry}
    (library,) = [where for name, where in places.items() if name.endswith("library.parquet")]
    assert library == [f"learned/{stage}.{SPLIT}/library.parquet" for stage in ("denovo", "templates")]
    assert {name.partition(".")[2] for name in places} == {"library.parquet", "weights.json", "ranker.json", "json"}


def test_a_notebook_pools_assemblies_and_templates_as_the_stages_do_here(pooled: Trained, tmp_path: Path):
    found, called = predict_pooled(pooled, tmp_path, pooled.folder / "raw", folds_pairs=viennarna.available()[0])
    at = ["--comp", "rna3d", "--artifacts", str(pooled.paths.root)]
    assert run_verb(["submit", *at, "--to", str(tmp_path)]) == 0
    assert found.equals(pl.read_csv(tmp_path / "rna3d-all.csv"))
    verbs = [words[0] for words in called]
    assert verbs[:3] == ["data", "submit", "check"], "a file is there before anything is predicted"
    assert predicted(tmp_path) == ["denovo", "templates-predict"]


def test_short_targets_have_their_pairs_before_long_ones(pooled: Trained, tmp_path: Path):
    pytest.importorskip("RNA")
    _, called = predict_pooled(pooled, tmp_path, pooled.folder / "raw", folds_pairs=True)
    rest = [words[words.index("--test-only") + 1 : words.index("--time-budget")] for words in called if "bpp" in words]
    assert rest == [["--longest", "500"], []]
    assert predicted(tmp_path) == ["denovo", "templates-predict"]


def test_hidden_targets_of_any_length_are_predicted(pooled: Trained, tmp_path: Path):
    synthetic.write_rna3d(tmp_path / "hidden", targets=4, test=5, seed=2)
    for name, columns in (("test_sequences", ["target_id", "sequence"]), ("sample_submission", ["ID", "resname"])):
        table = pl.read_csv(tmp_path / "hidden" / f"{name}.csv")
        tiny = table.head(1).with_columns(pl.lit("T1" + "_1" * (columns[0] == "ID")).alias(columns[0]))
        tiny = tiny.with_columns(pl.lit("G").alias(columns[1]))
        tiny = tiny.with_columns(pl.lit(1).alias("resid")) if "resid" in table.columns else tiny
        pl.concat([table, tiny], how="vertical_relaxed").write_csv(tmp_path / "hidden" / f"{name}.csv")
    found, _ = predict_pooled(pooled, tmp_path, tmp_path / "hidden")
    assert "T1_1" in found["ID"]


@pytest.mark.parametrize(
    ("failing", "done"),
    [
        (["denovo"], ["templates-predict"]),
        (["templates-predict"], ["denovo"]),
        (["denovo", "templates-predict"], []),
        (["ensemble"], ["denovo", "templates-predict"]),
    ],
)
def test_after_the_first_file_no_failure_ends_the_notebook(
    pooled: Trained, tmp_path: Path, failing: list[str], done: list[str]
):
    predict_pooled(pooled, tmp_path, pooled.folder / "raw", failing=failing)
    assert predicted(tmp_path) == done


def test_before_the_first_file_a_failure_is_one(pooled: Trained, tmp_path: Path):
    with pytest.raises(SystemExit, match="rna submit ended with 3"):
        predict_pooled(pooled, tmp_path, pooled.folder / "raw", failing=["submit"])


def test_structures_are_there_although_the_time_is_spent(pooled: Trained, tmp_path: Path):
    _, called = predict_pooled(pooled, tmp_path, pooled.folder / "raw", {"RNA_LIMIT": "0.001"})
    assert [words[0] for words in called] == ["data", "submit", "check"]
    assert predicted(tmp_path) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_alignments_are_used_where_the_competition_ships_them(pooled: Trained, tmp_path: Path, damaged: bool):
    shutil.copytree(pooled.folder / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "MSA").mkdir()
    for name, sequence in pl.read_csv(tmp_path / "raw" / "test_sequences.csv").select("target_id", "sequence").rows():
        relative = sequence[1:] if damaged else sequence[::-1]
        (tmp_path / "raw" / "MSA" / f"{name}.MSA.fasta").write_text(f">{name}\n{sequence}\n>other\n{relative}\n")
    _, called = predict_pooled(pooled, tmp_path, tmp_path / "raw")
    given = ["--msa" in words for words in called if words[0] == "templates-predict"]
    assert given == ([True, False] if damaged else [True])
    assert predicted(tmp_path) == ["denovo", "templates-predict"]


# --- several GPUs ---


def test_folds_are_predicted_on_as_many_gpus_as_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = {"folds": [0, 1, 2, 3, 4], "words_of_runs": [["--model", "a"], ["--model", "b"]], "limit_s": 1e9}
    desk = script.Desk(at=[], home=tmp_path, work=tmp_path, told=told | {"margin_s": 0.0})
    called = []
    monkeypatch.setenv("RNA_PROCESSES", "2")
    monkeypatch.setattr(script, "rna", lambda *words, slot, **_: called.append((words[2], words[4], slot)) or 0)
    assert list(script.predict_networks(desk)) == [[0, 1], [2, 3], [4]]
    slots = {"0": 0, "1": 1, "2": 0, "3": 1, "4": None}
    assert sorted(called) == [(model, fold, slots[fold]) for model in "ab" for fold in "01234"]


@pytest.mark.parametrize("is_written", [True, False])
def test_pairing_for_values_takes_its_share_of_the_time_and_what_it_folded_is_used(
    is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It had no limit: of a hidden set that takes hours Kaggle ended the notebook, and there was no file."""
    told = {"folds": [0], "words_of_runs": [["--model", "a"]], "stages": [], "bpp": True, "fill": True}
    desk = script.Desk(at=[], home=tmp_path, work=tmp_path, told=told, is_written=is_written)
    called: dict[str, tuple[list[str], Any]] = {}

    def rna(*words: str, timeout: float | None = None, **_: Any) -> int:
        called[words[0]] = list(words[1:]), timeout
        return 0

    monkeypatch.setattr(script, "rna", rna)
    monkeypatch.setattr(script, "left", lambda _: 1000.0)
    monkeypatch.setattr(script, "find_spec", lambda _: True)
    monkeypatch.setattr(script.Desk, "submit", lambda *_, **__: True)
    assert script.predict_values(desk) == ["fold0"]
    limited = (["--test-only", "--time-budget", "480s", "--partial"], 600.0)
    assert called["bpp"] == (limited if is_written else (["--test-only"], None))
    assert "--partial" in called["predict"][0]


def test_a_fold_that_fails_beside_another_leaves_the_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = {"folds": [0, 1, 2], "words_of_runs": [["--model", "a"]], "limit_s": 1e9, "margin_s": 0.0}
    desk = script.Desk(at=[], home=tmp_path, work=tmp_path, told=told, is_written=True)
    monkeypatch.setenv("RNA_PROCESSES", "2")
    monkeypatch.setattr(script, "rna", lambda *words, **_: 5 if words[4] == "0" else 0)
    assert list(script.predict_networks(desk)) == [[1]]


def test_a_notebook_that_fails_leaves_nothing_among_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each rehearsal that failed left its tables and predictions in /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError, match="files"):  # a bundle that is not whole
        script.predict(tmp_path / "input", tmp_path / "bundle", tmp_path, {"competition": "rna3d"})
    assert not list(tmp_path.iterdir())


def write_program(folder: Path, code: str) -> Path:
    """A program that takes the place of Python in the notebook's calls."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    return program


def test_a_verb_sees_the_gpu_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import os; open('seen', 'a').write(os.environ.get('CUDA_VISIBLE_DEVICES', 'all') + ' ')"
    monkeypatch.setattr(script.sys, "executable", str(write_program(tmp_path, code)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert script.rna("predict", slot=1) == script.rna("predict") == 0
    assert (tmp_path / "seen").read_text() == "1 all "


@pytest.mark.parametrize("obedient", [True, False])
def test_a_verb_whose_time_is_up_is_asked_to_end_and_then_made_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obedient: bool
):
    code = (
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        "    pathlib.Path('asked').touch()\n"
        f"    if {obedient}: raise SystemExit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('begun').touch()\n"
        "while True: time.sleep(0.01)"
    )
    monkeypatch.setattr(script.sys, "executable", str(write_program(tmp_path, code)))
    monkeypatch.setattr(script, "_GRACE_S", 600.0 if obedient else 0.5)
    monkeypatch.chdir(tmp_path)
    began = threading.Event()
    real = subprocess.Popen.wait

    def wait(process: subprocess.Popen, timeout: float | None = None) -> int:
        while not (tmp_path / "begun").exists():  # however slow this machine is, the program listens by then
            began.wait(0.01)
        return real(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(subprocess.TimeoutExpired):
        script.rna("bpp", timeout=0.1)
    assert (tmp_path / "asked").exists() or not obedient


def test_a_notebook_counts_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RNA_PROCESSES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.accelerators() == 1
    listed = "GPU 0: Tesla T4 (UUID: GPU-1)\nGPU 1: Tesla T4 (UUID: GPU-2)"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert script.accelerators() == 2
    monkeypatch.setenv("RNA_PROCESSES", "3")
    assert script.accelerators() == 3


@pytest.mark.parametrize(("together", "spent_s", "tries"), [(0, 60, 1), (75, 540, 1), (75, 60, 2), (1, 60, 2)])
def test_training_goes_on_with_one_process_where_several_fail(
    together: int, spent_s: float, tries: int, monkeypatch: pytest.MonkeyPatch
):
    """75 is a time that is spent, or a process that was lost: the notebook ended then, with most of its time left."""
    called, left = [], [600.0]

    def rna(*words: str, **_: Any) -> int:
        called.append(words)
        left.append(600.0 - spent_s)
        return together if "--nproc" in words else 0

    monkeypatch.setattr(script, "rna", rna)
    monkeypatch.setattr(script, "left", lambda _: left[-1])
    code = script.train_in_time([], ["--fold", "0"], {}, processes=2)
    assert code == (together if tries == 1 else 0)
    assert ["--nproc" in words for words in called] == [True, False][:tries]


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("kaggle.json", "{}"),
        ("id_rsa", ""),
        ("notes.txt", '{"username":"x","key":"' + "0a" * 16 + '"}'),
        ("notes.txt", "KGAT_" + "0123456789abcdef"),
        ("notes.txt", "-----BEGIN " + "RSA PRIVATE KEY-----"),
        ("notes.txt", "Authorization: Bearer " + "x" * 40),
        ("notes.txt", f"key = {CANARY}"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_looks_like_a_credential_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, packed: bool
):
    monkeypatch.setenv("KAGGLE_KEY", CANARY)
    if packed:
        write_wheel(tmp_path / "x-1-py3-none-any.whl", **{name: content})
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: looks like a credential; nothing was packed") as caught:
        bundle.refuse_secrets(tmp_path)
    assert not content or content not in str(caught.value)


def test_a_bundle_with_a_credential_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KAGGLE_KEY", CANARY)
    toml = tmp_path / "mine.toml"
    toml.write_text(f'# {CANARY}\n[model]\nname = "hyena"\n')
    paths = Paths(comp="ribonanza", root=tmp_path)
    with pytest.raises(DataError, match=r"mine.toml: looks like a credential"):
        pack(order_of(paths, model=str(toml), overrides=()))
    assert not list((paths.home / "kernels").iterdir())


def test_what_a_killed_build_left_is_no_bundle_and_goes_with_the_next(tmp_path: Path, capsys):
    """`make kernel-push` said that there are several bundles, and named one of them .…part-1234; none ever went."""
    paths = Paths(comp="ribonanza", root=tmp_path / "artifacts")
    home = pack(order_of(paths))
    shutil.copytree(home, left := home.with_name(f".{home.name}.part-{2**22 + 1}"))
    assert run_verb(["kernel-push", "--artifacts", str(paths.root), "--slug", "other"]) == 2
    assert f"Next: SLUG={home.name}. (exit" in "".join(capsys.readouterr().err.split("\n"))
    pack(order_of(paths))
    assert not left.exists()


def test_our_own_bundles_hold_no_credential(trained: Trained, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KAGGLE_KEY", CANARY)
    bundle.refuse_secrets(trained.home)
    bundle.refuse_secrets(trained.predicting)


def test_an_ensemble_or_checkpoint_that_is_absent_is_told(trained: Trained, tmp_path: Path):
    with pytest.raises(DataError, match=r"Next: make ensemble COMP=ribonanza NAME=other"):
        pack(order_of(trained.paths, mode="predict", ensemble="other"))
    here = Paths(comp="ribonanza", root=tmp_path)
    here.ensemble_dir("all").mkdir(parents=True)
    weights = (trained.paths.ensemble_dir("all") / "weights.json").read_text()
    (here.ensemble_dir("all") / "weights.json").write_text(weights)
    with pytest.raises(DataError, match=r"no checkpoint to pack. Next: make train FOLD=0"):
        pack(order_of(here, mode="predict", ensemble="all"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"owner": ""}, "OWNER=''"),
        ({"owner": "me"}, "OWNER='me': expected your user name on Kaggle: 3 or more letters"),
        ({"resume": "nobody"}, "RESUME='nobody': expected owner/slug"),
        ({"limit_s": 5.0}, "expected at least 1m"),
        ({"model": "hyeena"}, "Did you mean 'hyena'"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict, sentence: str):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        pack(order_of(Paths(comp="ribonanza", root=tmp_path), **changes))


@pytest.mark.parametrize("damage", ["changed", "absent"])
def test_a_bundle_that_changed_is_refused_here_and_there(tmp_path: Path, damage: str):
    home = pack(order_of(Paths(comp="ribonanza", root=tmp_path)))
    toml = home / "dataset" / "tiny_transformer_sepconv.toml"
    toml.write_text("# other") if damage == "changed" else toml.unlink()
    with pytest.raises(DataError, match="absent or changed since it was packed"):
        bundle.read_bundle(home)
    with pytest.raises(SystemExit, match="make kernel-push uploads the data set again"):
        play(home, lay_out(tmp_path / "input", home, tmp_path), tmp_path / "work")


def test_a_notebook_without_its_inputs_says_which(trained: Trained, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="add the data set of that name"):
        play(trained.home, tmp_path / "empty", tmp_path / "work")
    with pytest.raises(SystemExit, match="add the competition stanford-ribonanza-rna-folding"):
        play(trained.home, lay_out(tmp_path / "input", trained.home, tmp_path / "empty"), tmp_path / "work")


def test_a_predicting_notebook_reads_the_test_files_alone(trained: Trained, tmp_path: Path):
    """Without train_data, train_labels or a sample it ended with "no folder below it holds train_data.csv, …"."""
    told = bundle.read_bundle(trained.predicting)
    for name in ("a/test_sequences.csv", "b/test_sequences.csv.gz", "b/sample_submission.csv", "c/train_data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert script.find_raw(tmp_path, told) == tmp_path / "b", "with most of the competition's files"
    shutil.rmtree(tmp_path / "b")
    assert script.find_raw(tmp_path, told) == tmp_path / "a"


@pytest.mark.parametrize("mount", ["slug", "notebooks/tester/slug"])
def test_a_run_is_found_wherever_a_notebooks_output_is_mounted(tmp_path: Path, mount: str):
    """Below notebooks/<user>/<slug> no checkpoint was found, and the run was begun anew without a word."""
    home = tmp_path / mount / "artifacts" / "ribonanza"
    meta = home / "runs" / RUN / "fold0" / "checkpoints" / "step-00000005" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text('{"step": 5}')
    told = {"fold_names": ["fold0"], "run": RUN, "competition": "ribonanza"}
    assert script.find_begun(tmp_path, told) == home


def test_a_notebook_that_is_to_go_on_and_finds_no_run_does_not_begin_anew(tmp_path: Path):
    home = pack(order_of(Paths(comp="ribonanza", root=tmp_path), resume="tester/earlier"))
    raw = write_raw(tmp_path / "raw")
    with pytest.raises(SystemExit, match="expected the output of tester/earlier"):
        play(home, lay_out(tmp_path / "input", home, raw), tmp_path / "work")


def test_wheels_of_another_python_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: commands.append(command))
    names = ["a-1-py3-none-any.whl", "b-1-cp39-cp39-linux_x86_64.whl"]
    script.install(tmp_path, {"files": dict.fromkeys(names)})
    assert [Path(word).name for word in commands[0] if word.endswith(".whl")] == names[:1]


# --- the test set alone ---


def test_earlier_weights_join_test_predictions_as_the_ensemble_did(tmp_path: Path, rng: np.random.Generator):
    paths = make_paths(tmp_path)
    write_values_data(paths, rng)
    for run, noise in (("a.sim80_k3", 0.1), ("b.sim80_k3", 0.3)):
        write_run(paths, run, rng, noise={"reactivity_DMS_MaP": noise, "reactivity_2A3_MaP": 0.4 - noise})
    runs = ["a.sim80_k3", "b.sim80_k3"]
    ensemble.run(paths, competition=COMPETITION, name="all", runs=runs, split="sim80_k3")
    home = paths.ensemble_dir("all")
    applied = ensemble.apply(paths, competition=COMPETITION, name="again", weights=home / "weights.json")
    again = pl.read_parquet(applied.outputs["test"])
    whole = pl.read_parquet(home / "test.parquet")
    assert again["sequence_id"].to_list() == whole["sequence_id"].to_list()
    for target in COMPETITION.targets:  # weights.json keeps six decimals, as the weights have
        np.testing.assert_allclose(again[target].explode(), whole[target].explode(), atol=1e-7)
    with pytest.raises(ConfigError, match=r"FOLD=\[7\]"):
        ensemble.apply(paths, competition=COMPETITION, name="x", weights=home / "weights.json", folds=[7])
    with pytest.raises(ConfigError, match="expected rna3d"):
        ensemble.apply(paths, competition=get_competition("rna3d"), name="x", weights=home / "weights.json")


def test_earlier_choices_join_structures_as_the_ensemble_did(tmp_path: Path, rng: np.random.Generator):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    fold_table = pl.read_parquet(paths.fold_table("sim80_k3"))
    assert fold_table["fold"].n_unique() == 2
    write_structure_run(paths, "a.sim80_k3", rng, confidences=[0.9, 0.8, 0.7, 0.6, 0.5])
    rna3d = get_competition("rna3d")
    ensemble.run(paths, competition=rna3d, name="all", runs=["a.sim80_k3"], split="sim80_k3")
    home = paths.ensemble_dir("all")
    applied = ensemble.apply(paths, competition=rna3d, name="again", weights=home / "weights.json")
    assert applied.outputs["test"].read_bytes() == (home / "test.parquet").read_bytes()


def test_structures_are_chosen_among_the_predictions_that_there_was_time_for(tmp_path: Path, rng: np.random.Generator):
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    for run, confidence in (("a.sim80_k3", 0.9), ("b.sim80_k3", 0.5)):
        write_structure_run(paths, run, rng, confidences=[confidence - k / 50 for k in range(5)])
    rna3d = get_competition("rna3d")
    ensemble.run(paths, competition=rna3d, name="all", runs=["a.sim80_k3", "b.sim80_k3"], split="sim80_k3")
    weights = paths.ensemble_dir("all") / "weights.json"

    def apply(**options: bool) -> pl.DataFrame:
        what = {"competition": rna3d, "name": "again", "weights": weights}
        return pl.read_parquet(ensemble.apply(paths, **what, **options).outputs["test"])

    whole = apply(partial_runs=True)
    assert whole.equals(pl.read_parquet(paths.ensemble_dir("all") / "test.parquet"))
    paths.test("a.sim80_k3", 0).unlink()
    paths.test("a.sim80_k3", 1).unlink()
    with pytest.raises(DataError, match=r"a\.sim80_k3/fold0"):
        apply()
    rest = apply(partial_runs=True)
    assert rest["confidence"].max() < 0.6 < whole["confidence"].max()
    assert rest.select("sequence_id", "candidate").equals(whole.select("sequence_id", "candidate"))
    for fold in (0, 1):
        paths.test("b.sim80_k3", fold).unlink()
    with pytest.raises(DataError, match=r"no predictions of .*weights\.json"):
        apply(partial_runs=True)


@pytest.mark.parametrize("comp", ["ribonanza", "rna3d", "labelled"])
def test_test_tables_alone_are_those_of_the_whole_data_stage(comp: str, tmp_path: Path):
    competition = get_competition(comp)
    getattr(synthetic, f"write_{comp}")(tmp_path / "raw")
    if comp == "labelled":
        ids = pl.read_csv(tmp_path / "raw" / "test.csv").select("id", pl.lit(0.5).alias("p")).reverse()
        ids.write_csv(tmp_path / "raw" / "sample_submission.csv")
    whole, alone = (Paths(comp=comp, root=tmp_path / name) for name in ("whole", "alone"))
    preprocess.run(competition, tmp_path / "raw", whole)
    preprocess.run(competition, tmp_path / "raw", alone, test_only=True)
    assert sorted(path.stem for path in alone.clean("test").parent.glob("*.parquet")) == sorted(
        table for table in competition.test_tables if whole.clean(table).exists()
    )
    for table in [table for table in competition.test_tables if whole.clean(table).exists()]:
        assert alone.clean(table).read_bytes() == whole.clean(table).read_bytes()
    preprocess.run(competition, tmp_path / "raw", alone, test_only=True, rows=2)
    test = pl.read_parquet(alone.clean("test"))
    assert test.equals(pl.read_parquet(whole.clean("test")).head(2))
    if comp != "ribonanza":
        kept = pl.read_parquet(alone.clean("sample"))
        assert kept.height == (test["sequence"].str.len_chars().sum() if comp == "rna3d" else 2)
