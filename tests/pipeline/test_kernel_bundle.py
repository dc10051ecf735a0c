"""A notebook's bundle holds all that the notebook needs, and the notebook does with it what the same stages do here."""

import json
import os
import re
import tomllib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import preprocess, synthetic
from pipeline.cli import run_verb
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.kernel import bundle, script
from pipeline.kernel.bundle import IMAGE, MISSING
from pipeline.paths import REPOSITORY, Paths
from pipeline.training.checkpoint import CheckpointStore
from tests.chain_tables import make_paths, write_run, write_structure_data, write_structure_run, write_values_data
from tests.pipeline.kernels import COMPETITION, RUN, SPLIT, lay_out, order_of, pack, play, write_raw, write_wheel

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
    assert names == set(IMAGE) | set(MISSING)


def test_our_wheel_holds_what_stages_read_beside_code_and_nothing_else(tmp_path: Path):
    name = bundle.build_wheel(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with zipfile.ZipFile(tmp_path / name) as opened:
        members = set(opened.namelist())
    assert {"pipeline/configs/hyena.toml", "models/layers/csrc/selective_scan.cpp", "submissions/LOG.md"} <= members
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


def test_a_submission_is_there_although_the_time_is_spent(trained: Trained, tmp_path: Path):
    found = predict(trained, tmp_path, {"RNA_LIMIT": "0.001"}, test=4)
    assert found.stat().st_size > 1000
    assert json.loads((tmp_path / "work" / "KERNEL.json").read_text())["folds"] == [0]


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


@pytest.mark.slow
def test_a_training_stopped_by_its_clock_goes_on_in_the_next_notebook(trained: Trained, tmp_path: Path):
    here = Paths(comp="ribonanza", root=tmp_path / "here")
    order = order_of(here, folds=(0,), overrides=("train.epochs=2000", "train.save_every=20"), tag="long")
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
    assert steps[1] > steps[0] > 0
    starts = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
    assert [row["resumed_step"] for row in starts] == [0, steps[0]]


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


@pytest.mark.parametrize("comp", ["ribonanza", "rna3d"])
def test_test_tables_alone_are_those_of_the_whole_data_stage(comp: str, tmp_path: Path):
    competition = get_competition(comp)
    write = {"ribonanza": synthetic.write_ribonanza, "rna3d": synthetic.write_rna3d}[comp]
    write(tmp_path / "raw")
    whole, alone = (Paths(comp=comp, root=tmp_path / name) for name in ("whole", "alone"))
    preprocess.run(competition, tmp_path / "raw", whole)
    preprocess.run(competition, tmp_path / "raw", alone, test_only=True)
    assert not alone.clean("train").exists()
    for table in competition.test_tables:
        assert alone.clean(table).read_bytes() == whole.clean(table).read_bytes()
    preprocess.run(competition, tmp_path / "raw", alone, test_only=True, rows=2)
    test = pl.read_parquet(alone.clean("test"))
    assert test.equals(pl.read_parquet(whole.clean("test")).head(2))
    if comp == "rna3d":
        kept = pl.read_parquet(alone.clean("sample"))
        assert kept.height == test["sequence"].str.len_chars().sum()
