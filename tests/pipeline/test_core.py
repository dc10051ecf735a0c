"""Laws of the core: stages, words of the data, the run log, the configuration, the list of competitions."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline import config, errors, memory, runlog, stage
from pipeline.competitions import competitions, get_competition
from pipeline.config import ModelConfig, TrainConfig, config_from_dict, find_config, load_config
from pipeline.errors import ConfigError, DataError, PipelineError, StorageError
from pipeline.paths import REPOSITORY, Paths
from pipeline.schema import ALPHABET, PROBES, decode, encode, normalise_sequence, split_id
from pipeline.stage import Report, run_stage, write_json, write_text

# --- stages ----------------------------------------------------------------------------------------------------------


class Copy:
    """A stage that joins two inputs into two outputs and counts how often it did."""

    def __init__(self, folder: Path) -> None:
        self.built = 0
        self.a, self.b = folder / "a.txt", folder / "b.txt"
        self.outputs = {"join": folder / "out" / "join.txt", "size": folder / "out" / "size.txt"}
        self.a.write_text("one")
        self.b.write_text("two")

    def run(self, *, force: bool = False, **params: object) -> Report:
        inputs = {"a": self.a, "b": self.b}
        return run_stage("copy", inputs=inputs, outputs=self.outputs, params=params, build=self.build, force=force)

    def build(self, parts: dict[str, Path]) -> dict[str, object]:
        self.built += 1
        text = self.a.read_text() + self.b.read_text()
        parts["join"].write_text(text)
        parts["size"].write_text(str(len(text)))
        return {"letters": len(text)}

    def files(self) -> set[str]:
        return {path.name for path in (self.a.parent / "out").iterdir()}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_stage_builds_once(copy: Copy):
    first, second = copy.run(version=1), copy.run(version=1)
    assert (first.status, second.status, copy.built) == ("built", "current", 1)
    assert first.facts == second.facts == {"letters": 6}
    assert copy.files() == {"join.txt", "size.txt", "copy.manifest.json"}


def test_facts_keep_their_order_in_a_manifest_and_an_older_sorted_one_is_current(tmp_path: Path):
    """A second run told a set's quantiles as "max, min, q01": manifests were sorted."""

    def build(parts: dict[str, Path]) -> dict[str, object]:
        parts["out"].write_text("one")
        return {"min": 1, "max": {"q99": 3, "q01": 2}}

    def run() -> Report:
        params = {"version": 1, "split": "x"}
        return run_stage("order", inputs={}, outputs={"out": tmp_path / "out"}, params=params, build=build)

    manifest = tmp_path / "order.manifest.json"
    first, second = run(), run()
    assert second.status == "current"
    assert json.dumps(first.facts) == json.dumps(second.facts) == '{"min": 1, "max": {"q99": 3, "q01": 2}}'
    write_json(manifest, json.loads(manifest.read_text()))
    assert manifest.read_text().index('"max"') < manifest.read_text().index('"min"')
    assert run().status == "current"


def test_stage_ignores_an_input_that_was_only_touched(copy: Copy):
    copy.run()
    os.utime(copy.a, (1, 1))
    copy.b.write_text("two")
    assert copy.run().status == "current"


@pytest.mark.parametrize(
    "change",
    [
        lambda copy: copy.a.write_text("won"),
        lambda copy: copy.outputs["join"].write_text("onetw0"),
        lambda copy: copy.outputs["size"].unlink(),
        lambda copy: (copy.a.parent / "out" / "copy.manifest.json").unlink(),
        lambda copy: (copy.a.parent / "out" / "copy.manifest.json").write_text('{"stage": "co'),
        lambda copy: (copy.a.parent / "out" / "copy.manifest.json").write_text("[1]"),
        lambda copy: (copy.a.parent / "out" / "copy.manifest.json").write_text('{"facts": {}, "outputs": null}'),
        lambda copy: (copy.a.parent / "out" / "copy.manifest.json").write_bytes(b"\xff\xfe"),
    ],
    ids=[
        "input of the same size",
        "damaged output",
        "missing output",
        "no manifest",
        "torn manifest",
        "manifest of another kind",
        "manifest without its parts",
        "manifest that is no text",  # ended in "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"
    ],
)
def test_stage_builds_again_after_a_change(change: Callable[[Copy], object], copy: Copy):
    copy.run(version=1)
    change(copy)
    assert copy.run(version=1).status == "built"
    assert copy.outputs["join"].read_text() == copy.a.read_text() + "two"
    assert copy.run(version=1).status == "current"


def test_stage_builds_again_for_another_parameter_output_or_by_force(copy: Copy):
    copy.run(version=1)
    assert copy.run(version=2).status == "built"
    assert copy.run(version=2, force=True).status == "built"
    copy.outputs = {"size": copy.outputs["join"], "join": copy.outputs["size"]}
    assert copy.run(version=2).status == "built"


def test_missing_input_names_the_command_that_writes_it(tmp_path: Path):
    """It said "Next: run the stage that writes it (make help)", whatever was missing."""
    paths = Paths(comp="rna3d", root=tmp_path)
    with pytest.raises(DataError, match=r"train.parquet is missing\. Next: make data COMP=rna3d\."):
        run_stage(
            "x", inputs={"train": paths.clean("train")}, outputs={"y": tmp_path / "y"}, params={}, build=lambda _: {}
        )


def test_input_that_cannot_be_read_is_a_sentence(copy: Copy, monkeypatch: pytest.MonkeyPatch):
    """A raw file without read permission gave a traceback that ended in "PermissionError: [Errno 13]"."""

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(stage, "sha256_file", refuse)
    with pytest.raises(DataError, match=r"copy: .*txt: cannot be read: Permission denied\. Next: "):
        copy.run()


def test_result_of_a_stage_is_refused_once_it_was_changed(tmp_path: Path):
    """A flipped byte in scores.json ended `make report` in a traceback: KeyError: 'position'."""
    path, manifest = tmp_path / "x.json", tmp_path / "x.manifest.json"
    run_stage(
        "x",
        inputs={},
        outputs={"told": path},
        params={},
        build=lambda parts: {"size": parts["told"].write_text('{"position": 1}')},
    )
    assert stage.read_result(path, hint="make x", manifest=manifest) == {"position": 1}
    path.write_text('{"qosition": 1}')
    with pytest.raises(DataError, match=r"x.json: not what its stage wrote.* Next: make x\."):
        stage.read_result(path, hint="make x", manifest=manifest)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"x.json: missing or unreadable\. Next: make x\."):
        stage.read_result(path, hint="make x")


def test_no_stage_reads_a_clean_table_that_is_not_what_the_data_stage_wrote(tmp_path: Path):
    """Of ten turned bits of a labelled set's table three gave `make evaluate` other scores, and one a traceback."""
    train, copied = Paths(comp="labelled-mine", root=tmp_path).clean("train"), tmp_path / "copied"

    def write(text: str) -> Callable[[dict[str, Path]], dict[str, int]]:
        return lambda parts: {"letters": sum(part.write_text(text) for part in parts.values())}

    def evaluate() -> Report:
        return run_stage(
            "evaluate", inputs={"truth": train}, outputs={"y": copied}, params={}, build=write(train.read_text())
        )

    run_stage("data", inputs={}, outputs={"train": train}, params={}, build=write("yes"))
    assert evaluate().facts == {"letters": 3}
    train.write_text("yet")
    with pytest.raises(DataError, match=r"not what its stage wrote: .* Next: make data COMP=labelled-mine\."):
        evaluate()


def test_stage_reads_a_file_under_two_labels(copy: Copy):
    copy.b = copy.a
    assert copy.run().status == "built"
    assert copy.run().status == "current"


def test_stage_that_fails_leaves_nothing_new_and_keeps_the_old(copy: Copy):
    copy.run(version=1)
    before = {name: (copy.a.parent / "out" / name).read_bytes() for name in copy.files()}

    def fail(parts: dict[str, Path]) -> dict[str, object]:
        copy.build(parts)
        raise DataError("row 3 is wrong. Next: repair it.")

    with pytest.raises(DataError, match="row 3"):
        run_stage("copy", inputs={"a": copy.a}, outputs=copy.outputs, params={}, build=fail)
    assert {name: (copy.a.parent / "out" / name).read_bytes() for name in copy.files()} == before


def test_stage_whose_input_is_written_anew_while_it_is_read_publishes_nothing(copy: Copy):
    """A table of the earlier rows, or of both, got its name and a manifest, and later stages took it."""

    def meanwhile(text: str, parts: dict[str, Path]) -> dict[str, object]:
        facts = copy.build(parts)
        write_text(copy.b, text)
        return facts

    def run(text: str) -> Report:
        inputs = {"a": copy.a, "b": copy.b}
        return run_stage("copy", inputs=inputs, outputs=copy.outputs, params={}, build=partial(meanwhile, text))

    with pytest.raises(DataError, match=r"copy: .*b.txt was written anew while it was read. Next: the same command"):
        run("three")
    assert copy.files() == set()
    assert run("three").status == "built", "the same bytes again change nothing"


def test_stage_that_forgets_an_output_publishes_none(copy: Copy):
    def forget(parts: dict[str, Path]) -> dict[str, object]:
        parts["join"].write_text("x")
        return {}

    with pytest.raises(AssertionError, match="promised size"):
        run_stage("copy", inputs={"a": copy.a}, outputs=copy.outputs, params={}, build=forget)
    assert copy.files() == set()


def test_stage_sweeps_folders_and_scratch_of_killed_processes_and_keeps_those_of_living_ones(copy: Copy):
    """Was: IsADirectoryError at every further call, once a submit was killed while its scratch folder was there.

    What a kill left of manifests, and of JSON within a stage, stayed for good.
    """
    copy.outputs["join"].parent.mkdir()
    names = {
        kind: [
            f".join.txt.part-{pid}",
            f"..join.txt.part-{pid}.part-{pid}",
            f".copy.manifest.json.part-{pid}",
            f".join.txt.part-{pid}.scratch",
        ]
        for kind, pid in {"dead": 2**22 + 1, "mine": os.getpid(), "living": os.getppid()}.items()
    }
    for *parts, scratch in names.values():
        for part in parts:
            (copy.outputs["join"].parent / part).write_text("half")
        (copy.outputs["join"].parent / scratch).mkdir()
        (copy.outputs["join"].parent / scratch / "0.values").write_text("half")
    copy.run(version=1)
    assert {name for name in copy.files() if ".part-" in name} == set(names["living"])


def test_stage_says_which_input_is_missing(copy: Copy):
    copy.b.unlink()
    with pytest.raises(DataError, match=r"copy: b file .*b.txt is missing. Next: "):
        copy.run()


@pytest.mark.parametrize(
    ("err", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), StorageError),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "big.bin"), StorageError),
        (ArithmeticError("parquet: underlying IO error: No space left on device (os error 28)"), StorageError),
        (OSError("480 requested and 396 written"), StorageError),
        (OSError(errno.EIO, "Input/output error", "big.bin"), OSError),
    ],
)
def test_full_disk_is_a_storage_error_and_others_are_themselves(err: Exception, kind: type[Exception], copy: Copy):
    """Polars' ComputeError and numpy's own, of a write that was cut short, ended in tracebacks."""

    def full(parts: dict[str, Path]) -> dict[str, object]:
        parts["join"].write_text("half")
        parts["join"].with_name(f"{parts['join'].name}.npy").write_text("scratch of its own")
        raise err

    with pytest.raises(kind):
        run_stage("copy", inputs={"a": copy.a}, outputs=copy.outputs, params={}, build=full)
    assert copy.files() == set()


def test_manifest_holds_hashes_parameters_and_versions(copy: Copy):
    copy.run(version=3)
    record = json.loads((copy.a.parent / "out" / "copy.manifest.json").read_text())
    assert record["inputs"]["a"] == stage.sha256_file(copy.a)
    assert record["outputs"]["join"] == stage.sha256_file(copy.outputs["join"])
    assert record["params"] == {"version": 3}
    assert record["versions"]["numpy"] == np.__version__
    assert record["facts"] == {"letters": 6}
    assert re.fullmatch(r"([0-9a-f]{7,40}(\+dirty)?)?", record["commit"])


def test_a_log_line_makes_no_checkout_dirty_and_a_look_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said "e46bbd6+dirty" of every stage after the first `make evaluate`, which writes that line itself."""
    who = ["-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "commit.gpgsign=false"]
    (tmp_path / "submissions").mkdir()
    log, code = tmp_path / "submissions" / "LOG.md", tmp_path / "code.py"
    for path in (log, code):
        path.write_text("one\n")
    for order in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *order], check=True)
    monkeypatch.setattr(stage, "REPOSITORY", tmp_path)
    clean = stage.commit()
    log.write_text("one\ntwo\n")
    assert re.fullmatch(r"[0-9a-f]{7,40}", clean)
    assert stage.commit() == clean
    index = (tmp_path / ".git" / "index").read_bytes()
    os.utime(code, (1, 1))
    assert stage.commit() == clean
    # it was written, by which a commit beside a run ended in "fatal: Unable to create '…/index.lock': File exists"
    assert (tmp_path / ".git" / "index").read_bytes() == index
    code.write_text("two\n")
    assert stage.commit() == f"{clean}+dirty"


def test_an_installed_package_writes_where_one_works_and_takes_no_commit_from_around_it(tmp_path: Path):
    """Submissions went to site-packages/submissions/csv, and stages had the commit of a repository around those."""
    site, work = tmp_path / "site", tmp_path / "work"
    shutil.copytree(REPOSITORY / "pipeline", site / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    who = ["-c", "user.name=x", "-c", "user.email=x@y.z", "-c", "commit.gpgsign=false"]
    for order in (["init", "--quiet"], [*who, "commit", "--quiet", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *order], check=True)
    code = "from pipeline.paths import Paths; from pipeline.stage import commit; p = Paths(comp='x')"
    code += "; print(p.csv_dir, p.log, repr(commit()))"
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(site)}
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=work, env=env).stdout
    assert said.split() == ["submissions/csv", "submissions/LOG.md", "''"]


def test_another_artifacts_folder_has_its_own_submissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`make submit ARTIFACTS=trial` overwrote submissions/csv/ribonanza-all.csv, which `make submit` had written."""
    monkeypatch.chdir(REPOSITORY)
    usual = REPOSITORY / "submissions" / "csv" / "ribonanza-all.csv"
    for root in (Path("artifacts"), REPOSITORY / "artifacts"):
        assert Paths(comp="ribonanza", root=root).submission("all") == usual
    for root in (Path("artifacts/demo"), tmp_path):
        assert Paths(comp="ribonanza", root=root).submission("all") == root / "submissions" / "ribonanza-all.csv"
        assert Paths(comp="ribonanza", root=root).log == root / "submissions" / "LOG.md"
    assert Paths(comp="ribonanza").log == REPOSITORY / "submissions" / "LOG.md"
    assert Paths(comp="ribonanza", submissions=tmp_path).submission("all") == tmp_path / "ribonanza-all.csv"


def test_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"b": 1, "a": [1.5]})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": [1.5], "b": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


# --- words of the data -----------------------------------------------------------------------------------------------


def test_encode_and_decode_are_inverse(rng: np.random.Generator):
    for length in (1, 2, 177):
        tokens = rng.integers(0, len(ALPHABET), length).astype(np.uint8)
        assert np.array_equal(encode(decode(tokens)), tokens)
        assert encode(decode(tokens)).dtype == np.uint8


@pytest.mark.parametrize("sequence", ["ACGT", "acgu", "AC GU", "ACGÜ", "N"])
def test_encode_takes_normalised_letters_only(sequence: str):
    with pytest.raises(DataError, match="normalise it first"):
        encode(sequence)


def test_normalising_twice_is_normalising_once():
    once = normalise_sequence(" acgTtU\n", where="x")
    assert once == "ACGUUU" == normalise_sequence(once, where="x")


@pytest.mark.parametrize(
    ("sequence", "sentence"),
    [("ACXGU", "file: letter 'X' at position 3"), ("", "file: empty"), ("  ", "file: empty"), ("AC-GU", "letter '-'")],
)
def test_other_letters_are_named_with_their_position(sequence: str, sentence: str):
    with pytest.raises(DataError, match=sentence):
        normalise_sequence(sequence, where="file")


@pytest.mark.parametrize("target", ["R1107", "1SCL_A", "R1117v2", "a_b_c", "_"])
@pytest.mark.parametrize("resid", [1, 10, 4640])
def test_split_id_takes_the_last_underscore(target: str, resid: int):
    assert split_id(f"{target}_{resid}") == (target, resid)


@pytest.mark.parametrize("row_id", ["", "R1107", "R1107_", "_5", "R1107_x", "R1107_-1", "R1107_1.0"])
def test_split_id_refuses_what_is_no_id(row_id: str):
    with pytest.raises(DataError, match="expected <target_id>_<residue number>"):
        split_id(row_id)


def test_probes_stand_in_the_order_of_the_submission():
    assert PROBES == ("DMS_MaP", "2A3_MaP")
    assert get_competition("ribonanza").targets == tuple(f"reactivity_{probe}" for probe in PROBES)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_failure_has_its_own_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    for resumable in ("BusyError", "LostDeviceError"):
        assert codes.pop(resumable) == errors.StoppedError.exit_code
    assert codes.pop("PipelineError") == 1
    assert codes == {
        "ConfigError": 2,
        "DataError": 3,
        "DivergedError": 4,
        "StorageError": 5,
        "NetworkError": 6,
        "CrashedError": 7,
        "StoppedError": 75,
    }


# --- run log ---------------------------------------------------------------------------------------------------------


def test_metrics_are_read_as_written_and_not_finite_numbers_are_flagged(tmp_path: Path):
    log = runlog.MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write("step", loss=0.5, step=3)
    log.write("step", loss=math.nan, grad=math.inf)
    log.close()
    first, second = runlog.read_metrics(log.path)
    assert (first["event"], first["loss"], first["step"]) == ("step", 0.5, 3)
    assert (second["loss"], second["loss_nonfinite"], second["grad_nonfinite"]) == (None, "nan", "inf")
    assert "NaN" not in log.path.read_text()


def test_log_goes_on_where_it_ended(tmp_path: Path):
    for step in range(3):
        log = runlog.MetricsLog(tmp_path / "metrics.jsonl")
        log.write("step", step=step)
        log.close()
    assert [row["step"] for row in runlog.read_metrics(log.path)] == [0, 1, 2]


def test_torn_tail_of_the_log_is_dropped_wherever_it_was_cut(tmp_path: Path):
    whole = '{"event": "a", "x": 1}\n{"event": "b", "x": 22}\n'
    path = tmp_path / "metrics.jsonl"
    for end in range(len(whole) + 1):
        path.write_text(whole[:end])
        assert [row["event"] for row in runlog.read_metrics(path)] == ["a", "b"][: whole[:end].count("}")]


def test_log_goes_on_behind_a_torn_tail(tmp_path: Path):
    """Was: ValueError: metrics.jsonl: line 2 is not JSON: '{"event": "b{"event": "c"…'."""
    path = tmp_path / "metrics.jsonl"
    for tail, kept in (('{"event": "b', ["a", "c"]), ('{"event": "b"}', ["a", "b", "c"])):
        path.write_text('{"event": "a"}\n' + tail)
        log = runlog.MetricsLog(path)
        log.write("c")
        log.close()
        assert [row["event"] for row in runlog.read_metrics(path)] == kept


def test_log_damaged_in_the_middle_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "a"}\n{"eve\n{"event": "c"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        runlog.read_metrics(tmp_path / "metrics.jsonl")


def test_log_that_is_not_there_is_empty(tmp_path: Path):
    assert runlog.read_metrics(tmp_path / "none.jsonl") == []


def test_bar_speaks_in_plain_lines_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (tmp_path / "out.txt").open("w") as file:
        monkeypatch.setattr(runlog, "console", Console(file=file, highlight=False))
        monkeypatch.setattr(runlog, "_PLAIN_INTERVAL_S", 0.0)
        assert list(runlog.track([5, 6], "clean", unit="rows")) == [5, 6]
        with runlog.Bar("read [x]", total=10, unit="MiB") as bar:
            bar.advance(4, note="2 rows")
        runlog.warn("[bold] stays as it is")
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert lines == [
        "clean: 1/2 rows",
        "clean: 2/2 rows",
        "read [x]: 4/10 MiB 2 rows",
        "warning: [bold] stays as it is",
    ]


def test_peak_memory_counts_what_was_freed():
    block = np.ones(64 << 20, dtype=np.uint8)
    peak = memory.peak_memory_mib()
    assert peak > 64
    del block
    assert memory.peak_memory_mib() > peak - 1  # the kernel counts in pages that it books late


def test_peak_memory_is_not_inherited():
    """Was: a small process reported the 500 MiB of the one that had started it."""
    block = np.ones(300 << 20, dtype=np.uint8)
    code = "from pipeline.memory import peak_memory_mib; print(peak_memory_mib())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert float(said.stdout) < block.nbytes / 2**20 / 2


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[model]\nname = "m"\nkwargs = { width = 8 }\n[train]\nlr = 1\nseed = 7\n')
    return path


def test_config_is_typed_and_whole_numbers_serve_as_floats(toml: Path):
    run = load_config(str(toml))
    assert run.model == ModelConfig(name="m", kwargs={"width": 8})
    assert (run.train.lr, type(run.train.lr), run.train.seed) == (1.0, float, 7)
    assert run.train.epochs == TrainConfig().epochs


def test_overrides_are_toml_values(toml: Path):
    items = [
        "train.lr=1e-3",
        "train.deterministic=true",
        'train.precision="fp32"',
        "model.kwargs.depth=2",
        "data.flip=0.5",
    ]
    run = load_config(str(toml), items)
    assert (run.train.lr, run.train.deterministic, run.train.precision) == (1e-3, True, "fp32")
    assert run.model.kwargs == {"width": 8, "depth": 2}
    assert run.data.flip == 0.5


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (["train.epoch=3"], "small.toml: train: unknown key 'epoch'. Did you mean 'epochs'"),
        (["trian.epochs=3"], "unknown key 'trian'. Did you mean 'train'"),
        (["train.zzz=3"], r"unknown key 'zzz'\. Next: write one of backbone_lr_share, "),
        (["train.epochs=3.5"], r"train: epochs: got 3.5 \(float\); expected"),
        (["train.epochs=true"], r"epochs: got True \(bool\)"),
        (['train.lr="0.1"'], r"lr: got '0.1' \(str\)"),
        (['train.micro_batch="all"'], "got 'all' .* expected int or 'auto'"),
        (["train.micro_batch=2.5"], r"got 2.5 \(float\); expected int or 'auto'"),
        (['train.precision="fp8"'], "got 'fp8' .* expected 'auto' or 'bf16' or 'fp16' or 'fp32'"),
        (["train=3"], "train: got 3; expected a section"),
        (["train.lr"], "expected section.key=value"),
        (["train.precision=fp32"], "is no TOML value; quote strings. Next: SET='train.precision=\"fp32\"'."),
        (["train.lr.x=1"], "'lr' is a value, not a section"),
        (["train.epochs=1\ntrain.lr=3"], "expected int or 'auto'"),
        (["train.lr=fast"], "'fast'; expected float. Next: correct the value."),
        (["train.epochs=three"], "'three'; expected int or 'auto'. Next: correct the value."),  # it said: quote strings
        (["train.precision=cosin"], "'cosin'; expected 'auto' or 'bf16' or 'fp16' or 'fp32'"),
        (["train.epochs=auto"], "is no TOML value; quote strings. Next: SET='train.epochs=\"auto\"'."),
        (["train.epochs=3.5"], "expected int"),
    ],
)
def test_config_mistakes_are_named(items: list[str], sentence: str, toml: Path):
    with pytest.raises(ConfigError, match=sentence):
        load_config(str(toml), items)


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("train.epochs=0", "train: epochs: got 0; expected a finite number of at least 1"),
        ("train.batch_size=0", "of at least 1"),
        ("train.micro_batch=-1", "of at least 0"),
        ("train.spike_threshold=-1", "of at least 0"),
        ("train.lr=-1", "of at least 0"),
        ("train.lr=nan", "lr: got nan; expected a finite number"),
        ("train.lr=inf", "lr: got inf; expected a finite number"),
        ("train.warmup=2.0", "of at least 0 and at most 1"),
        ("train.ema_decay=1.0", "at most 0.999999"),
        ("train.seed=-1", "of at least 0"),
        ("data.max_length=0", "data: max_length: got 0"),
        ("data.flip=2.0", "at most 1"),
        ("data.min_signal_to_noise=inf", "expected a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_starts(item: str, sentence: str, toml: Path):
    """SET="train.batch_size=0" said "ZeroDivisionError: integer division or modulo by zero", with a traceback."""
    with pytest.raises(ConfigError, match=sentence):
        load_config(str(toml), [item])


def test_a_setting_may_be_a_number_or_a_word(toml: Path):
    assert load_config(str(toml), ["train.micro_batch=4"]).train.micro_batch == 4
    assert load_config(str(toml), ['train.micro_batch="auto"']).train.micro_batch == "auto"


def test_shipped_configs_are_within_the_limits():
    for name in config.list_configs():
        load_config(name)


def test_section_of_an_override_may_stand_among_blanks(toml: Path):
    assert load_config(str(toml), [" train.epochs = 2"]).train.epochs == 2


def test_config_without_a_model_is_refused():
    """An empty file said "RunConfig.__init__() missing 1 required keyword-only argument"."""
    with pytest.raises(ConfigError, match=r"^x: 'model' is missing\. Next: "):
        config_from_dict({}, where="x")
    with pytest.raises(ConfigError, match=r"^x: model: 'name' is missing\. Next: "):
        config_from_dict({"model": {}}, where="x")


@pytest.mark.parametrize("content", [b"[model\n", b"\x80abc"])
def test_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes):
    """One that is no UTF-8 ended with UnicodeDecodeError and exit code 1."""
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x.toml: not valid TOML"):
        load_config(str(tmp_path / "x.toml"))


def test_unknown_config_names_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    (tmp_path / "hyena.toml").touch()
    assert find_config("hyena") == tmp_path / "hyena.toml"
    with pytest.raises(ConfigError, match="Did you mean 'hyena'"):
        find_config("hyenna")
    with pytest.raises(ConfigError, match="no such file"):
        find_config("elsewhere/hyena.toml")


# --- competitions and paths ------------------------------------------------------------------------------------------


def test_competitions_are_known_by_their_own_name():
    for name, competition in competitions().items():
        assert get_competition(name) is competition
        assert competition.name == name
        assert competition.tables[0] == "train"


def test_a_competition_shows_the_range_of_its_values_or_says_another():
    """ValueError: not enough values to unpack, of the report; by MAE there were no floors, for want of places."""
    ranged = replace(get_competition("ribonanza"), targets=("shape",), shown_ranges=(), target_range=(0.0, 2.0))
    assert ranged.shown_ranges == ((0.0, 2.0),)
    with pytest.raises(ValueError, match=r"openvaccine: shown_ranges of 0 targets; expected .* each of reactivity"):
        replace(get_competition("openvaccine"), shown_ranges=())


def test_unknown_competition_names_the_closest():
    with pytest.raises(ConfigError, match=r"COMP='ribonansa' is not known; .* Did you mean 'ribonanza'"):
        get_competition("ribonansa")


def test_every_artefact_of_a_competition_lies_below_its_folder(tmp_path: Path):
    paths = Paths(comp="ribonanza", root=tmp_path)
    files = [paths.clean("train"), paths.bpp, paths.arrays_dir, paths.fold_table("sim80_k5"), paths.oof("r", 0)]
    files += [paths.test("r", 0), paths.ensemble_dir("e")]
    assert all(path.is_relative_to(tmp_path / "ribonanza") for path in files)
    assert len(set(files)) == len(files)
