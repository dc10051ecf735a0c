"""Runs in a Kaggle notebook without internet: installs the bundle's code, then trains, or predicts the test set.

Stands alone: the standard library, and the verbs of the program that it installs. Inputs are found by what is in them,
wherever they are mounted. Settings are in the bundle's MANIFEST.json.

Environment: RNA_INPUT where the inputs are (default /kaggle/input); RNA_LIMIT seconds that this may take;
RNA_ROWS test sequences to predict, for a trial. An interactive session takes a few rows and two minutes by itself.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

BUNDLE = "@bundle@"
STARTED = time.monotonic()
_DEPTH = 8  # folders below the inputs that are looked into
_RESUMABLE = 75  # exit code of a training that its time budget stopped
_INTERACTIVE = {"RNA_LIMIT": "120", "RNA_ROWS": "32"}


def main() -> None:
    rerun = bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive" and not rerun:
        for name, value in _INTERACTIVE.items():
            os.environ.setdefault(name, value)
        say(f"interactive session: a trial of {os.environ['RNA_LIMIT']} s with {os.environ['RNA_ROWS']} test rows")
    inputs = Path(os.environ.get("RNA_INPUT", "/kaggle/input"))
    bundle, told = find_bundle(inputs)
    say(f"{told['mode']} of {told['competition']}, bundle {bundle}, code {told['commit'] or 'of no commit'}")
    install(bundle, told)
    raw = find_raw(inputs, told)
    work = Path.cwd()
    facts = train(inputs, bundle, raw, work, told) if told["mode"] == "train" else predict(bundle, raw, work, told)
    files = {name: sha256(work / name) for name in facts.pop("files")}
    facts |= {"bundle": BUNDLE, "mode": told["mode"], "seconds": round(time.monotonic() - STARTED), "files": files}
    (work / "KERNEL.json").write_text(json.dumps(facts, indent=2) + "\n")
    say(f"done in {facts['seconds']} s: {len(files)} files, named in KERNEL.json")


# --- inputs ---


def folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """Every folder with the names of its files."""
    for folder, below, names in os.walk(root, followlinks=True):
        if len(Path(folder).relative_to(root).parts) >= _DEPTH:
            below.clear()
        below.sort()
        yield Path(folder), set(names)


def find_bundle(inputs: Path) -> tuple[Path, dict[str, Any]]:
    """The bundle that belongs to this script, every file of it with its sha256."""
    for folder, names in folders(inputs):
        if "MANIFEST.json" not in names:
            continue
        told = json.loads((folder / "MANIFEST.json").read_text())
        if told.get("bundle") != BUNDLE:
            continue
        for name, entry in told["files"].items():
            if not (folder / name).is_file():
                fail(f"{folder}: {name} is missing. Next: make kernel-push uploads the data set again.")
            if sha256(folder / name) != entry["sha256"]:
                fail(f"{folder / name}: not what was packed. Next: make kernel-push uploads the data set again.")
        return folder, told
    fail(f"{inputs}: no bundle {BUNDLE!r} below it. Next: add the data set of that name to this notebook's inputs.")


def find_raw(inputs: Path, told: dict[str, Any]) -> Path:
    """The folder with the competition's files, packed or not."""
    wanted = {name.split(".")[0] for name in told["raw_files"]}
    for folder, names in folders(inputs):
        if wanted <= {name.split(".")[0] for name in names}:
            return folder
    fail(
        f"{inputs}: no folder below it holds {', '.join(told['raw_files'])}. "
        f"Next: add the competition {told['slug']} to this notebook's inputs."
    )


def find_begun(inputs: Path, told: dict[str, Any]) -> Path | None:
    """Folder of the artefacts whose run is furthest, among what earlier notebooks left; None if none began it."""
    best: tuple[int, Path] | None = None
    for folder, names in folders(inputs):
        run = folder.parents[1] if folder.parent.name == "checkpoints" and "meta.json" in names else None
        if run is None or run.name not in told["fold_names"]:
            continue
        if (run.parent.name, run.parents[2].name) != (told["run"], told["competition"]):
            continue
        step = json.loads((folder / "meta.json").read_text())["step"]
        if best is None or step > best[0]:
            best = step, run.parents[2]
    return best[1] if best else None


def install(bundle: Path, told: dict[str, Any]) -> None:
    """Install the wheels that fit this Python; nothing is asked of a network."""
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = [name for name in told["files"] if name.endswith(".whl")]
    for name in [name for name in wheels if name.split("-")[-3].startswith("cp") and f"-{here}-" not in name]:
        say(f"{name} is built for another Python than {here} and is left out")
        wheels.remove(name)
    options = ["--no-index", "--no-deps", "--force-reinstall", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--root-user-action=ignore"]
    subprocess.run([*command, *(str(bundle / name) for name in wheels)], check=True)
    say(f"installed {', '.join(wheels)}")


# --- the two modes ---


def train(inputs: Path, bundle: Path, raw: Path, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """data -> folds -> (pairing) -> training and predictions, from where an earlier notebook stopped."""
    home = work / "artifacts" / told["competition"]
    begun = find_begun(inputs, told)
    if begun and not home.exists():
        say(f"goes on with the run in {begun}")
        copy_tree(begun, home)  # tables too: a later image would write them with other bytes
    at = ["--comp", told["competition"], "--artifacts", str(home.parent)]
    rna("data", *at, "--raw", str(raw))
    rna("folds", *at, "--split", told["split"])
    if told["bpp"] and find_spec("RNA"):
        rna("bpp", *at)
    words = [str(bundle / word) if word == told["config"] else word for word in told["words"]]
    budget = ["--time-budget", f"{max(1, round(left(told)))}s"]
    code = rna("train", *at, *words, *budget, accept=(0, _RESUMABLE))
    files = []
    for fold in told["fold_names"]:
        folder = home / "runs" / told["run"] / fold
        if not any(folder.glob("checkpoints/step-*/meta.json")):
            if code == _RESUMABLE and fold != told["fold_names"][0]:
                continue  # the time was spent before its turn came
            fail(f"{folder}: the training left no checkpoint. Next: read the lines above.")
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
        absent = sorted({"metrics.jsonl", "oof.parquet", "test.parquet"} - {path.name for path in found})
        if absent and code == 0:
            fail(f"{folder}: the training left no {', '.join(absent)}. Next: read the lines above.")
        if absent:
            say(f"{folder}: stopped from outside, before there was {', '.join(absent)}")
        files += [str(path.relative_to(work)) for path in found]
    state = "finished" if code == 0 else "resumable"
    if code:
        say("stopped by its own clock. Next: make kernel RESUME=<owner/this notebook>, then make kernel-push.")
    return {"state": state, "run": told["run"], "files": files}


def predict(bundle: Path, raw: Path, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Test set -> submission.csv: once as soon as one fold has predicted, again with all that the time allows."""
    home = Path(tempfile.mkdtemp(prefix="rna-"))
    for name, entry in told["files"].items():
        if "place" in entry:
            target = home / told["competition"] / entry["place"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, target)
    at = ["--comp", told["competition"], "--artifacts", str(home)]
    rows = os.environ.get("RNA_ROWS", "")
    rna("data", *at, "--raw", str(raw), "--test-only", *(["--rows", rows] if rows else []))
    if told["bpp"] and find_spec("RNA"):
        rna("bpp", *at, "--test-only")
    done: list[int] = []
    slowest = writing = 0.0
    for fold in told["folds"]:
        room = left(told) - writing
        if done and room < 1.2 * slowest:
            break
        before = time.monotonic()
        if not predict_fold(at, fold, told, seconds=room if done else None):
            break
        done, slowest = [*done, fold], max(slowest, time.monotonic() - before)
        if len(done) == 1:
            before = time.monotonic()
            submit(at, home, work, done, told)
            writing = 1.5 * (time.monotonic() - before)
    if len(done) < len(told["folds"]):
        say(f"folds {done} of {told['folds']} predicted in the time there is")
    if len(done) > 1:
        submit(at, home, work, done, told)
    shutil.rmtree(home)
    return {"state": "finished", "folds": done, "files": ["submission.csv"]}


def predict_fold(at: list[str], fold: int, told: dict[str, Any], *, seconds: float | None) -> bool:
    """Predict the test set with one fold of every run; whether it was done in the time there is."""
    end = None if seconds is None else time.monotonic() + seconds
    for words in told["words_of_runs"]:
        timeout = None if end is None else max(1.0, end - time.monotonic())
        try:
            rna("predict", *at, *words, "--fold", str(fold), "--test-only", timeout=timeout)
        except subprocess.TimeoutExpired:
            return False
    return True


def submit(at: list[str], home: Path, work: Path, folds: list[int], told: dict[str, Any]) -> None:
    """Join what is predicted, write and check the submission, and give it its name in one step."""
    weights = home / told["competition"] / told["weights"]
    chosen = [word for fold in folds for word in ("--fold", str(fold))]
    rna("ensemble", *at, "--name", "kernel", "--weights", str(weights), *chosen)
    rna("submit", *at, "--name", "kernel", "--to", str(work / ".submission"))
    rna("check", *at, str(work / ".submission" / f"{told['competition']}-kernel.csv"))
    (work / ".submission" / f"{told['competition']}-kernel.csv").replace(work / "submission.csv")
    shutil.rmtree(work / ".submission")
    say(f"submission.csv from folds {folds}, {(work / 'submission.csv').stat().st_size:,} bytes")


# --- helpers ---


def left(told: dict[str, Any]) -> float:
    """Seconds until this must be at its end: the limit, less a margin, less what is spent."""
    limit = float(os.environ.get("RNA_LIMIT", told["limit_s"]))
    return limit - min(told["margin_s"], 0.1 * limit) - (time.monotonic() - STARTED)


def rna(*words: str, accept: tuple[int, ...] = (0,), timeout: float | None = None) -> int:
    """Run a verb of the program; any other exit code than those accepted ends this script."""
    say(f"rna {' '.join(words)}")
    code = subprocess.run([sys.executable, "-m", "pipeline", *words], check=False, timeout=timeout).returncode
    if code not in accept:
        fail(f"rna {words[0]} ended with {code}. Next: its last line above says why.")
    return code


def copy_tree(source: Path, target: Path) -> None:
    """Copy files without their permissions: inputs are read-only."""
    for path in source.rglob("*"):
        if path.is_file() and path.name != ".lock":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def say(message: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.0f} s] {message}", flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


if __name__ == "__main__":
    main()
