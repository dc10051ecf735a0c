"""Runs in a Kaggle notebook without internet: installs the bundle's code, then trains, or predicts the test set.

Stands alone: the standard library, and the verbs of the program that it installs. Inputs are found by what is in them,
wherever they are mounted. Settings are in the bundle's MANIFEST.json.

Environment: RNA_INPUT where the inputs are (default /kaggle/input); RNA_LIMIT seconds that this may take;
RNA_ROWS test sequences to predict, for a trial; RNA_PROCESSES that work at once (default: one for each GPU). An
interactive session takes a few rows and two minutes by itself.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

BUNDLE = "@bundle@"
STARTED = time.monotonic()
_DEPTH = 12  # folders below the inputs that are looked into: a checkpoint of a notebook's output is in the tenth
_GRACE_S = 10.0  # for a verb to end when it is asked to
_SOON_FOLDED = "500"  # nt
_PAIRING, _SOFTLY = 0.6, 0.8  # of the time for a mean of networks; of a share of it, after which pairing ends by itself
_BEGUN = 0.7  # of a stage's time, after which no target is begun: the longest comes last and is to be finished
_RESUMABLE = 75  # exit code of a verb that its time budget stopped
_GO_ON = "Next: make kernel RESUME=<owner/this notebook>, then make kernel-push."
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
    work = Path.cwd()
    facts = (train if told["mode"] == "train" else predict)(inputs, bundle, work, told)
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
    """The folder with the competition's files that are read, packed or not; of several that with most of the others."""
    wanted, others = ({name.split(".")[0] for name in told.get(key, ())} for key in ("raw_files", "beside"))
    found = [(folder, {name.split(".")[0] for name in names}) for folder, names in folders(inputs)]
    if fitting := [(folder, stems) for folder, stems in found if wanted <= stems]:
        return max(fitting, key=lambda each: len(each[1] & others))[0]
    fail(
        f"{inputs}: no folder below it holds {', '.join(told['raw_files'])}. "
        f"Next: add the competition {told['slug']} to this notebook's inputs."
    )


def find_begun(inputs: Path, told: dict[str, Any]) -> Path | None:
    """Folder of the artefacts whose run is furthest, among what earlier notebooks left; None if none began it.

    Before its first step a run has base-pair probabilities, or some of them.
    """
    best: tuple[int, Path] | None = None
    for folder, names in folders(inputs):
        if (folder.name, folder.parent.name) == ("bpp", told["competition"]) and best is None:
            best = (-1, folder.parent) if (folder.parent / "clean" / "train.parquet").is_file() else None
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


def train(inputs: Path, bundle: Path, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """data -> folds -> (pairing) -> training and predictions, from where an earlier notebook stopped.

    Where no raw files are to be found, the bundle brings the clean tables.
    """
    raw = find_raw(inputs, told) if told["raw_files"] else None
    home = work / "artifacts" / told["competition"]
    begun = None if home.exists() else find_begun(inputs, told)
    if begun:
        say(f"goes on with the run in {begun}")
        copy_tree(begun, home)  # tables too: a later image would write them with other bytes
    elif told["resume"] and not home.exists():
        fail(
            f"{inputs}: nothing of {told['run']} below it; expected the output of {told['resume']}. "
            "Next: add that notebook to this one's inputs, or make kernel without RESUME to begin anew."
        )
    at = ["--comp", told["competition"], "--artifacts", str(home.parent)]
    place(bundle, told, home)
    if raw:
        rna("data", *at, "--raw", str(raw))
    rna("folds", *at, "--split", told["split"])
    if told["bpp"] and find_spec("RNA"):
        code = rna("bpp", *at, "--time-budget", f"{max(1, round(left(told)))}s", accept=(0, _RESUMABLE))
        if code or left(told) < margin(told):
            say(f"no time is left to train. {_GO_ON}")
            return {"state": "resumable", "run": told["run"], "files": []}
    words = [str(bundle / word) if word == told["config"] else word for word in told["words"]]
    code = train_in_time(at, words, told, processes=accelerators())
    files = []
    for fold in told["fold_names"]:
        folder = home / "runs" / told["run"] / fold
        if not any(folder.glob("checkpoints/step-*/meta.json")):
            if code == _RESUMABLE and fold != told["fold_names"][0]:
                continue  # the time was spent before its turn came
            fail(f"{folder}: the training left no checkpoint. Next: read the lines above.")
        found = [path for path in sorted(folder.rglob("*")) if is_kept(path)]
        absent = sorted({"metrics.jsonl", "oof.parquet", "test.parquet"} - {path.name for path in found})
        if absent and code == 0:
            fail(f"{folder}: the training left no {', '.join(absent)}. Next: read the lines above.")
        if absent:
            say(f"{folder}: stopped from outside, before there was {', '.join(absent)}")
        files += [str(path.relative_to(work)) for path in found]
    state = "finished" if code == 0 else "resumable"
    if code:
        say(f"stopped by its own clock. {_GO_ON}")
    return {"state": state, "run": told["run"], "files": files}


def train_in_time(at: list[str], words: list[str], told: dict[str, Any], *, processes: int) -> int:
    """Train with a process for each GPU, with one where several fail; 0, or 75 if the time was up before the end."""
    together = ["--nproc", str(processes)] if processes > 1 else []
    given = left(told)
    budget = ["--time-budget", f"{max(1, round(given))}s"]
    accept = None if together else (0, _RESUMABLE)
    code = rna("train", *at, *words, *budget, *together, accept=accept)
    by_its_clock = code == _RESUMABLE and left(told) < given / 2  # and not for a process that was lost
    if code == 0 or by_its_clock or not together:
        return code
    say(f"{processes} processes ended with {code}; going on with one")
    return train_in_time(at, words, told, processes=1)


def predict(inputs: Path, bundle: Path, work: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Test set -> submission.csv: early, and again with all that the time allows.

    From the first file on nothing ends this script: Kaggle scores no notebook that failed.
    """
    with tempfile.TemporaryDirectory(prefix="rna-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        place(bundle, told, home / told["competition"])
        raw = beside(find_raw(inputs, told), home / told["competition"] / "raw")
        at = ["--comp", told["competition"], "--artifacts", str(home)]
        rows = os.environ.get("RNA_ROWS", "")
        rna("data", *at, "--raw", str(raw), "--test-only", *(["--rows", rows] if rows else []))
        desk = Desk(at=at, home=home, work=work, told=told)
        if told["fill"]:  # simple shapes, or training's medians: a file is there whatever fails or takes too long
            desk.submit(joined=None)
        done, filled = list[str](), False
        if desk.is_written and not has_rows(work / "submission.csv"):
            say("the test set is empty, and submission.csv a header")
        else:
            done = predict_structures(desk, raw) if told["task"] == "structure" else predict_values(desk)
            filled = bool(told["fill"]) and not done
        if filled:
            say("nothing was predicted: submission.csv holds what was filled in")
    return {"state": "finished", "predicted": done, "filled": filled, "files": ["submission.csv"]}


@dataclass(kw_only=True)
class Desk:
    """Where predictions are made and the submission is written, and how long the latter takes."""

    at: list[str]  # options of every verb
    home: Path  # of the artefacts
    work: Path
    told: dict[str, Any]
    is_written: bool = False
    writing_s: float = 0.0

    def room(self) -> float:
        """Seconds for predictions that must be in the submission."""
        return left(self.told) - 1.5 * self.writing_s

    def attempt(self, *words: str, seconds: float | None = None, slot: int | None = None) -> bool:
        """Run a verb in the time given (None: all that there is for predictions); whether it did its work.

        Once there is a submission, a failure is told and ends nothing; before, it ends this script.
        """
        if not self.is_written:
            rna(*words, slot=slot)
            return True
        seconds = self.room() if seconds is None else seconds
        if seconds <= 0:
            say(f"rna {words[0]}: no time is left for it")
            return False
        try:
            code = rna(*words, accept=None, timeout=seconds, slot=slot)
        except subprocess.TimeoutExpired:
            say(f"rna {words[0]}: stopped, its time is up; going on without it")
            return False
        if code:
            say(f"rna {words[0]} ended with {code}; going on without it")
        return code == 0

    def submit(self, *, joined: Sequence[str] | None) -> bool:
        """Join what is predicted (None: nothing is), write and check the submission, give it its name in one step."""
        fill = ["--fill"] if self.told["fill"] else []
        before = time.monotonic()
        comp, aside = self.told["competition"], self.work / ".submission"
        named, file = [*self.at, "--name", "kernel"], aside / f"{comp}-kernel.csv"
        join = ["ensemble", *named, "--weights", str(self.home / comp / self.told["weights"]), *(joined or ())]
        seconds = left(self.told) + margin(self.told) / 2  # this is what time was kept for
        done = (
            (joined is None or self.attempt(*join, seconds=seconds))
            and self.attempt("submit", *named, "--to", str(aside), *fill, seconds=seconds)
            and self.attempt("check", *self.at, str(file), seconds=seconds)
        )
        if done:
            file.replace(self.work / "submission.csv")
            self.is_written = True
            say(f"submission.csv is written, {(self.work / 'submission.csv').stat().st_size:,} bytes")
        shutil.rmtree(aside, ignore_errors=True)
        self.writing_s = time.monotonic() - before
        return done


def find_pairs(desk: Desk, *, share: float, longest: str = "") -> None:
    """Pairing probabilities of as many test sequences as a share of the time suffices for, shorter ones alone if asked.

    Before there is a submission there is none without all of them.
    """
    if not (desk.told["bpp"] and find_spec("RNA")):
        return
    words = ["bpp", *desk.at, "--test-only", *(["--longest", longest] if longest else [])]
    if desk.is_written:
        words += ["--time-budget", f"{max(1.0, _SOFTLY * share * desk.room()):.0f}s", "--partial"]
    desk.attempt(*words, seconds=share * desk.room())


def predict_values(desk: Desk) -> list[str]:
    """After a first file of medians a submission as soon as a fold has predicted, the last one from all folds that
    there was time for."""
    find_pairs(desk, share=_PAIRING)
    for stage in desk.told["stages"]:  # seconds, and every mean needs them
        source = desk.home / desk.told["competition"] / stage["source"]
        rna(stage["verb"], *desk.at, *stage["words"], "--from", str(source))
    if not desk.told["words_of_runs"]:
        desk.submit(joined=())
    done: list[int] = []
    written = 0

    def submit() -> int:
        desk.submit(joined=[word for fold in done for word in ("--fold", str(fold))])
        return len(done)

    for folds in predict_networks(desk):
        done += folds
        written = written or submit()
    if len(done) > written:
        submit()
    return [f"fold{fold}" for fold in done]


def predict_structures(desk: Desk, raw: Path) -> list[str]:
    """After simple shapes pairing, templates and networks, each of which improves the submission."""
    for longest in (_SOON_FOLDED, ""):  # the time grows with the cube of the length
        find_pairs(desk, share=0.3, longest=longest)
    done: list[str] = []
    parts = len(desk.told["stages"]) + bool(desk.told["words_of_runs"])
    for number, stage in enumerate(desk.told["stages"]):
        words = [*stage["words"], "--from", str(desk.home / desk.told["competition"] / stage["source"])]
        words += ["--time-budget", f"{max(0.0, _BEGUN * desk.room() / (parts - number)):.0f}s"]
        aligned = ["--msa", str(found)] if stage["verb"] == "templates-predict" and (found := find_msa(raw)) else []
        tries = [aligned, []] if aligned else [[]]  # a damaged alignment is no reason to do without templates
        if any(desk.attempt(stage["verb"], *desk.at, *words, *more) for more in tries):
            done.append(stage["verb"])
            desk.submit(joined=["--partial"])
    for folds in predict_networks(desk):
        done += [f"fold{fold}" for fold in folds]
        desk.submit(joined=["--partial"])
    return done


def find_msa(raw: Path) -> Path | None:
    """Folder of the competition's alignments, where it ships them."""
    return next((raw / name for name in ("MSA_v2", "MSA") if any((raw / name).glob("*.MSA.fasta"))), None)


def predict_networks(desk: Desk) -> Iterator[list[int]]:
    """Folds that are predicted with every network, as many at once as there are GPUs, as long as the time suffices."""
    slots, slowest = accelerators(), 0.0
    todo = list(desk.told["folds"]) if desk.told["words_of_runs"] else []
    while todo:
        if desk.is_written and desk.room() < 1.2 * slowest:
            break
        wave, todo = todo[:slots], todo[slots:]
        before = time.monotonic()
        if len(wave) == 1:
            done = [predict_fold(desk, wave[0], slot=None)]
        else:
            with ThreadPoolExecutor(len(wave)) as pool:
                done = list(pool.map(lambda fold, slot: predict_fold(desk, fold, slot=slot), wave, range(slots)))
        slowest = max(slowest, time.monotonic() - before)
        if any(done):
            yield [fold for fold, is_done in zip(wave, done, strict=True) if is_done]
        if not all(done):
            break
    if todo:
        say(f"folds {todo} are not predicted in the time there is")


def predict_fold(desk: Desk, fold: int, *, slot: int | None) -> bool:
    """Predict the test set with one fold of every network; whether all of them did."""
    return all(
        desk.attempt("predict", *desk.at, *words, "--fold", str(fold), "--test-only", "--partial", slot=slot)
        for words in desk.told["words_of_runs"]
    )


# --- helpers ---


def left(told: dict[str, Any]) -> float:
    """Seconds until this must be at its end: the limit, less a margin, less what is spent."""
    return limit(told) - margin(told) - (time.monotonic() - STARTED)


def limit(told: dict[str, Any]) -> float:
    return float(os.environ.get("RNA_LIMIT", told["limit_s"]))


def margin(told: dict[str, Any]) -> float:
    return min(float(told["margin_s"]), 0.1 * limit(told))


def accelerators() -> int:
    """GPUs of this machine, or how many processes RNA_PROCESSES asks for; at least 1."""
    if asked := os.environ.get("RNA_PROCESSES"):
        return max(1, int(asked))
    program = shutil.which("nvidia-smi")
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False) if program else None
    return max(1, sum(line.startswith("GPU ") for line in listed.stdout.splitlines())) if listed else 1


def rna(
    *words: str, accept: tuple[int, ...] | None = (0,), timeout: float | None = None, slot: int | None = None
) -> int:
    """Run a verb of the program, on one of several GPUs if `slot` is given; its exit code.

    Any other code than those accepted ends this script; None accepts all of them.

    Raises:
        subprocess.TimeoutExpired: the time is up, and the verb is asked to end, with its workers, and then made to.
    """
    say(f"rna {shlex.join(words)}")
    own = {} if slot is None else {"CUDA_VISIBLE_DEVICES": str(slot)}
    with subprocess.Popen([sys.executable, "-m", "pipeline", *words], env=os.environ | own) as process:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            raise
    if accept is not None and code not in accept:
        fail(f"rna {words[0]} ended with {code}. Next: read its last line above.")
    return code


def place(bundle: Path, told: dict[str, Any], home: Path) -> None:
    """Copy the bundle's files to where they belong among the artefacts."""
    for name, entry in told["files"].items():
        for where in entry.get("places", ()):
            (home / where).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / name, home / where)


def has_rows(path: Path) -> bool:
    """Whether a CSV is more than a header."""
    with path.open("rb") as handle:
        return len(list(itertools.islice(handle, 2))) > 1


def beside(raw: Path, own: Path) -> Path:
    """The raw files as links beside those that the bundle brings, if it does: inputs are read-only."""
    if not own.is_dir():
        return raw
    for path in raw.iterdir():
        if not (own / path.name).exists():
            (own / path.name).symlink_to(path.resolve())
    return own


def copy_tree(source: Path, target: Path) -> None:
    """Copy files without their permissions: inputs are read-only."""
    for path in source.rglob("*"):
        if is_kept(path):
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def is_kept(path: Path) -> bool:
    """Whether a file is a result: locks and half-written files have a dot first, and mean nothing elsewhere."""
    return path.is_file() and not path.name.startswith(".")


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def say(message: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.0f} s] {message}", flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


if __name__ == "__main__":
    main()
