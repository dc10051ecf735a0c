"""What winners hand over is generated, and its commands and paths are true."""

import json
import re
import tomllib
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import handover, preprocess
from pipeline.competitions import get_competition
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.paths import REPOSITORY, Paths
from pipeline.runs import run_name
from pipeline.stage import write_json
from pipeline.synthetic import write_ribonanza
from pipeline.templates.collection import library_path
from pipeline.training.checkpoint import CheckpointStore
from tests.chain_tables import make_paths
from tests.pipeline.kernels import COMPETITION

CONFIG = load_config("tiny_hyena", ["train.lr=1e-5", "train.micro_batch='auto'", "model.kwargs.use_bpp=true"])
RUNS = ["hyena.sim80_k5", "drsn+wide.sim80_k5"]


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    paths = make_paths(tmp_path)
    told = {"runs": RUNS, "folds": [0, 1], "folds_left_out": [], "split": "sim80_k5", "chosen": "mean", "score": 0.196}
    write_json(paths.ensemble_dir("all") / "weights.json", told)
    for run in RUNS:
        for fold in (0, 1):
            folder = paths.fold_dir(run, fold)
            meta = {"config": asdict(CONFIG), "progress": {"finished": True}, "best_step": 7}
            meta |= {"initial": {"run": "first.sim80_k5", "fold": fold, "step": 9}} if run == RUNS[1] else {}
            meta |= {"data": {"pseudo": {"runs": {"teacher.sim80_k5": "0"}}} if run == RUNS[1] else {}}
            CheckpointStore(folder / "checkpoints").save(7, weights={}, training=None, state={}, meta=meta)
            start = {"event": "start", "time": 100.0, "device": "cpu", "precision": "fp32", "parameters": 123456}
            again = [{"event": "step", "time": 130.0}, start | {"time": 9000.0}]  # a day later, say
            rows = [start, *again, {"event": "done", "time": 9060.0}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return handover.run(paths, competition=COMPETITION, name="all").outputs


def test_the_files_that_kaggle_names_are_written(written: dict[str, Path]):
    assert sorted(written) == [
        "README.md", "SETTINGS.json", "directory_structure.txt", "entry_points.md", "requirements.txt",
    ]  # fmt: skip
    assert all(path.stat().st_size > 100 for path in written.values())


def test_of_structures_the_chosen_five_and_the_reserve_are_told(written: dict[str, Path]):
    """No score stood there, and a network that gives no candidate looked like a part of the submission."""
    home = written["README.md"].parents[2]
    weights = home / "ensembles" / "all" / "weights.json"
    told = json.loads(weights.read_text())
    del told["score"]
    told["policy"] = {"novelty": 0.05, "best_of_five": {"0.0": 0.37, "0.05": 0.3789}, "spare": [RUNS[1]]}
    write_json(weights, told)
    paths = Paths(comp=home.name, root=home.parent)
    text = handover.run(paths, competition=COMPETITION, name="all").outputs["README.md"].read_text()
    assert "0.37890 out of fold" in text
    assert f"{RUNS[1]}: in reserve" in text


def test_every_command_is_a_target_and_every_run_is_trained(written: dict[str, Path]):
    commands = re.findall(r"^ *(make .*)$", written["entry_points.md"].read_text(), re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in commands} <= targets
    assert [command.split()[1] for command in commands] == [
        "data", "folds", "train-all", "train-all", "ensemble", "submit", "kernel",
    ]  # fmt: skip
    config = written["README.md"].parent / re.search(r"MODEL=<this folder>/(\S+)", commands[3])[1]
    assert f"{run_name(str(config), split='sim80_k5')}" == RUNS[1]
    assert load_config(str(config)) == CONFIG


def test_of_networks_that_read_features_the_commands_bring_these_in(written: dict[str, Path]):
    """The last one packed a notebook, which `make kernel` refuses to do with them."""
    home = written["README.md"].parents[2]
    paths = Paths(comp=home.name, root=home.parent)
    config = asdict(load_config("tiny_hyena", ["data.features='rnafm'"]))
    meta = {"config": config, "progress": {"finished": True}, "data": {}}
    CheckpointStore(paths.fold_dir(RUNS[0], 0) / "checkpoints").save(8, weights={}, training=None, state={}, meta=meta)
    text = handover.run(paths, competition=COMPETITION, name="all").outputs["entry_points.md"].read_text()
    at = f"COMP={COMPETITION.name} NAME"
    assert f"make features {at}=rnafm FILE=<folder or parquet>" in text
    assert f'make predict {at}=all FILE=<sequences> FEATURES="rnafm=<folder or parquet>"' in text
    assert "make kernel" not in text


def test_what_a_run_began_with_is_told(written: dict[str, Path]):
    """Its path alone stood in the settings, and no command made what lies there."""
    text = written["README.md"].read_text()
    assert "- drsn+wide.sim80_k5 fold 1: those of first.sim80_k5 fold 1, step 9\n" in text
    assert text.count("those of first") == 2


def test_whose_predictions_a_run_learned_from_is_told(written: dict[str, Path]):
    assert written["README.md"].read_text().count("\n- drsn+wide.sim80_k5: teacher.sim80_k5\n") == 1


def test_what_others_learn_from_or_begin_with_is_trained_before_them_and_not_blended(written: dict[str, Path]):
    """No step trained a teacher, one in the ensemble came after its pupil, and `make ensemble` blended all runs."""
    home = written["README.md"].parents[2]
    paths = Paths(comp=home.name, root=home.parent)
    first, teacher, (hyena, drsn) = "first.sim80_k5", "teacher.sim80_k5", RUNS
    needs = {first: (None, []), teacher: (first, []), hyena: (None, [teacher, drsn]), drsn: (None, ["gone.sim80_k5"])}
    for run, (began, taught) in needs.items():
        config = asdict(CONFIG)
        config["model"]["init"] = str(paths.run_dir(began)) if began else ""
        for fold in (0, 1):
            folder = paths.fold_dir(run, fold)
            meta = {
                "config": config,
                "progress": {"finished": True},
                "data": {"pseudo": {"runs": dict.fromkeys(taught)}},
            }
            meta |= {"initial": {"run": began, "fold": fold, "step": 9} if began else None}
            CheckpointStore(folder / "checkpoints").save(9, weights={}, training=None, state={}, meta=meta)
            (folder / "metrics.jsonl").write_text(
                json.dumps({"event": "start", "device": "cpu", "precision": "fp32", "parameters": 1})
            )
    handed = handover.run(paths, competition=COMPETITION, name="all").outputs
    text = handed["entry_points.md"].read_text()
    assert re.findall(r"train-all .*/configs/(\S+)\.toml", text) == ["drsn+wide", "first", "teacher", "hyena"]
    assert all((handed["README.md"].parent / "configs" / f"{name}.toml").is_file() for name in ("first", "teacher"))
    assert 'make ensemble COMP=ribonanza SPLIT=sim80_k5 NAME=all RUNS="hyena drsn+wide"\n' in text
    assert "teacher.sim80_k5: not in the ensemble" in handed["README.md"].read_text()


def test_runs_without_a_network_are_told_with_their_commands(tmp_path: Path):
    """It asked to train them: "no readable checkpoint or metrics.jsonl. Next: make train FOLD=0."."""
    paths = make_paths(tmp_path, "rna3d")
    runs = ["denovo.sim80_k5", "templates.sim80_k5"]
    told = {"runs": runs, "folds": [0, 1], "folds_left_out": [], "split": "sim80_k5", "chosen": "by policy"}
    write_json(paths.ensemble_dir("all") / "weights.json", told)
    written = handover.run(paths, competition=get_competition("rna3d"), name="all").outputs
    text = written["entry_points.md"].read_text()
    assert "make denovo COMP=rna3d SPLIT=sim80_k5\n" in text
    assert "make templates-predict COMP=rna3d SPLIT=sim80_k5\n" in text
    assert "train-all" not in text
    assert "make templates COMP" not in text
    settings = json.loads(written["SETTINGS.json"].read_text())
    assert list(settings["LEARNED_DIRS"]) == runs
    assert "denovo.sim80_k5: without a network" in written["README.md"].read_text()


def test_settings_of_runs_that_the_ensemble_has_no_more_are_handed_over_no_more(
    tmp_path: Path, written: dict[str, Path]
):
    """They stayed in configs/, among those of the networks that made the submission."""
    paths, configs = make_paths(tmp_path), written["README.md"].parent / "configs"
    about, before = paths.ensemble_dir("all") / "weights.json", sorted(path.name for path in configs.iterdir())
    write_json(about, json.loads(about.read_text()) | {"runs": RUNS[:1]})
    handover.run(paths, competition=COMPETITION, name="all")
    assert (len(before), [path.name for path in configs.iterdir()]) == (2, ["hyena.toml"])


def test_an_ensemble_of_some_folds_trains_these_alone(tmp_path: Path, written: dict[str, Path]):
    assert "PARTIAL" not in written["entry_points.md"].read_text()
    paths = make_paths(tmp_path)
    about = paths.ensemble_dir("all") / "weights.json"
    write_json(about, json.loads(about.read_text()) | {"folds": [1], "folds_left_out": [0]})
    text = handover.run(paths, competition=COMPETITION, name="all").outputs["entry_points.md"].read_text()
    assert text.count("make train FOLD=1 COMP=ribonanza SPLIT=sim80_k5 MODEL=") == len(RUNS)
    assert "train-all" not in text
    assert 'make ensemble COMP=ribonanza SPLIT=sim80_k5 NAME=all RUNS="hyena drsn+wide" PARTIAL=1\n' in text


def test_a_library_and_alignments_that_were_used_are_asked_for(tmp_path: Path):
    """Both were left out: the commands gave other candidates than the ensemble's."""
    paths = make_paths(tmp_path, "rna3d2")
    told = {
        "runs": ["templates.sim80_k5"],
        "folds": [0, 1],
        "folds_left_out": [],
        "split": "sim80_k5",
        "chosen": "by policy",
    }
    write_json(paths.ensemble_dir("all") / "weights.json", told)
    library_path(paths).parent.mkdir(parents=True)
    library_path(paths).touch()
    manifest = paths.run_dir("templates.sim80_k5") / "templates-predict.manifest.json"
    manifest.parent.mkdir(parents=True)
    write_json(manifest, {"facts": {}, "inputs": {"train": "0", "msa/R1107": "1"}})
    written = handover.run(paths, competition=get_competition("rna3d2"), name="all").outputs
    commands = re.findall(r"^ *(make .*)$", written["entry_points.md"].read_text(), re.MULTILINE)
    assert "make templates COMP=rna3d2 RAW=<folder of mmCIF files>" in commands
    assert "make templates-predict COMP=rna3d2 SPLIT=sim80_k5 MSA=<folder of alignments>" in commands


def test_settings_name_folders_that_are_there(written: dict[str, Path]):
    settings = json.loads(written["SETTINGS.json"].read_text())
    folders = [Path(folder) for of_run in settings["MODEL_CHECKPOINT_DIRS"].values() for folder in of_run]
    assert len(folders) == 4
    assert all(folder.is_dir() for folder in folders)
    assert Path(settings["ENSEMBLE_DIR"]).is_dir()


def test_the_settings_name_the_folder_that_the_data_were_made_from(written: dict[str, Path], tmp_path: Path):
    """artifacts/<comp>/raw stood there also where the data were made with RAW=<another folder>, which it never was."""
    home = written["README.md"].parents[2]
    paths = Paths(comp=home.name, root=home.parent)
    competition = get_competition("ribonanza")

    def named() -> str:
        files = handover.run(paths, competition=COMPETITION, name="all").outputs
        return json.loads(files["SETTINGS.json"].read_text())["RAW_DATA_DIR"]

    assert named() == str(paths.raw), "nothing is known of older tables"
    write_ribonanza(tmp_path / "elsewhere", sequences=12, test=3)
    preprocess.run(competition, tmp_path / "elsewhere", paths)
    assert named() == str(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert preprocess.run(competition, tmp_path / "moved", paths).status == "current"
    assert named() == str(tmp_path / "moved")


def test_settings_whose_names_are_no_bare_keys_are_read_back():
    """A target "my target" with a weight made a file of settings that is no TOML: "Expected '=' after a key"."""
    weights = {"my target": 2.0, "Größe": 1.0, 'half "life"': 0.5, "": 1.0, "bare-key_1": 3.0}
    settings = {"train": {"lr": 1e-5, "target_weights": weights}, "model": {"a table": {"x": True}}}
    assert tomllib.loads(handover._toml(settings)) == settings


def test_the_readme_tells_models_settings_and_what_they_took(written: dict[str, Path]):
    """The pause before a run went on was counted: it said "2 h 29 min" here."""
    text = written["README.md"].read_text()
    assert text.count("| 123,456 | 7 | cpu | fp32 | 1 min 30 s |") == 4
    assert '"lr": 1e-05' in text
    assert "0.19600 out of fold" in text
    assert "\n\n\n" not in text


def test_requirements_pin_what_is_installed(written: dict[str, Path]):
    lines = written["requirements.txt"].read_text().splitlines()
    assert f"torch=={metadata.version('torch')}" in lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines)


def test_the_tree_lists_every_module(written: dict[str, Path]):
    listed = set(written["directory_structure.txt"].read_text().split())
    assert "./pipeline/handover.py" in listed
    assert not [name for name in listed if "__pycache__" in name]


def test_an_ensemble_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"Next: make ensemble COMP=ribonanza NAME=all"):
        handover.run(make_paths(tmp_path), competition=COMPETITION, name="all")


def test_an_installed_package_hands_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said: …/site-packages/pyproject.toml: No such file or directory (exit code 5)."""
    monkeypatch.setattr(handover, "IS_CHECKOUT", False)
    with pytest.raises(ConfigError, match="expected a checkout of the project"):
        handover.run(make_paths(tmp_path), competition=COMPETITION, name="all")
