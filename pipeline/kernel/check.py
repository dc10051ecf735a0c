"""A rehearsal of both kinds of notebook: bare Python, no network, inputs that nothing may be written to.

On synthetic data of values, structures, classes, numbers and profiles: a training notebook trains every fold of a tiny
network, a prediction notebook predicts a test set of another size with all that the ensemble has, and again a few rows
as in an interactive session, and the submission is checked here. Or a bundle that is to be sent, on raw files of one's
own. Two processes work at once, as they do on two GPUs.

Bare means: an interpreter whose packages are those that Kaggle's image has (`wheels.IMAGE`) and what these need, linked
from an environment that has them, so that nothing of torch's size is installed again; our own code and everything that
the image lacks is there only if the notebook installs it from its bundle.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import synthetic
from pipeline.competitions import competition_of, get_competition
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.kernel import script
from pipeline.kernel.bundle import Order, build, read_bundle
from pipeline.kernel.wheels import IMAGE
from pipeline.paths import REPOSITORY, Paths
from pipeline.runlog import say
from pipeline.stage import Report

_OWNER, _SPLIT, _MODEL, _NAME = "rehearsal", "sim80_k2", "tiny_transformer_sepconv", "rehearsal"
_SYNTHETIC: dict[str, Callable[..., object]] = {
    "ribonanza": partial(synthetic.write_ribonanza, sequences=60),
    "rna3d": partial(synthetic.write_rna3d, targets=16),
    "labelled-motifs": partial(synthetic.write_labelled, sequences=120),
    "labelled-places": partial(synthetic.write_labelled, sequences=120, numbers=True),
    "profiles-rates": partial(synthetic.write_openvaccine, sequences=60),
}
_RERUN = {"KAGGLE_IS_COMPETITION_RERUN": "1", "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
_TWO = {"RNA_PROCESSES": "2"}  # as on Kaggle's two T4
_TIMEOUT_S, _GRACE_S = 600.0, 120.0
#: A new namespace has a loopback interface that is down; torchrun's processes talk over it, as they do on Kaggle.
_LOOPBACK = """import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
os.execv(sys.argv[1], sys.argv[1:])
"""
_REFUSAL = """import socket
def _refuse(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise OSError(101, "the rehearsal has no network")
    return _connect(self, address)
_connect, socket.socket.connect = socket.socket.connect, _refuse
socket.socket.connect_ex = _refuse
"""
#: Prints the distributions that were asked for and what they need, each with the entries of site-packages it owns.
_LIST = """import json, re, sys
from importlib import metadata
todo, found = sys.argv[1:], {}
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
    if name in found:
        continue
    try:
        one = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue
    tops = {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}
    found[name] = [one.version, sorted(str(one.locate_file(top)) for top in tops)]
    todo += [re.match(r"[\\w.-]+", text)[0] for text in one.requires or () if "extra ==" not in text]
print(json.dumps({"python": sys.version.split()[0], "found": found}))
"""


def run(folder: Path, *, python: Path) -> Report:
    """Rehearse both kinds of notebook, for every kind of data, in a folder that is emptied first.

    Args:
        folder: for environment, inputs and outputs.
        python: interpreter of an environment that has the image's packages; 3.11 or 3.12.

    Returns:
        Facts: versions, how the network is refused, seconds and rows of the notebooks of each competition.

    Raises:
        ConfigError: that environment lacks a package (exit code 2).
        DataError: a notebook failed, wrote to its inputs, or left an invalid submission (3).
    """
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    room = Room(folder, python)
    facts = {name: _rehearse(room, get_competition(name), write) for name, write in _SYNTHETIC.items()}
    told = {"versions": room.versions, "network": room.refusal, "competitions": facts}
    outputs = {name: folder / name / "hidden-work" / "submission.csv" for name in facts}
    return Report(stage="kernel-check", status="built", outputs=outputs, facts=told, seconds=time.monotonic() - started)


def run_bundle(
    folder: Path, *, python: Path, home: Path, competition: Competition, raw: Path, limit_s: float | None = None
) -> Report:
    """Play a bundle that is to be sent, on a folder of raw files, as a code competition's rerun does.

    Args:
        folder: for environment, inputs and outputs; emptied first.
        python: as of `run`.
        home: of the bundle.
        competition: whose bundle it is.
        raw: with a test set of any size, which the notebook is to predict.
        limit_s: time for the notebook, instead of the bundle's own.

    Returns:
        Facts: versions, how the network is refused, seconds, and rows of the submission.

    Raises:
        ConfigError: that environment lacks a package (exit code 2).
        DataError: as of `run`, or the bundle is not what was built (3).
    """
    started = time.monotonic()
    told = read_bundle(home)
    shutil.rmtree(folder, ignore_errors=True)
    room = Room(folder, python)
    limit = {} if limit_s is None else {"RNA_LIMIT": str(limit_s)}
    outputs = {"code": home / "code", "dataset": home / "dataset"}
    work, span = folder / "work", limit_s or told["limit_s"]
    played = {"notebook": room.play(outputs, raw, work=work, more=_RERUN | limit, timeout=span + _GRACE_S)}
    if told["mode"] == "predict":
        played["rows"] = _judge(home, competition, raw, work / "submission.csv", folder / "judge")
    facts = {"versions": room.versions, "network": room.refusal, "competitions": {competition.name: played}}
    outputs = {"work": work}
    return Report(
        stage="kernel-check", status="built", outputs=outputs, facts=facts, seconds=time.monotonic() - started
    )


def _rehearse(room: "Room", competition: Competition, write: Callable[..., object]) -> dict[str, float]:
    """Train in a notebook, predict in another a hidden test set of another size, and a few rows interactively."""
    folder = room.folder / competition.name
    write(folder / "raw", test=8)
    write(folder / "hidden", test=13, seed=1)
    order: dict[str, Any] = {"competition": competition, "owner": _OWNER, "split": _SPLIT, "gpu": False}
    order["wheels"] = room.folder.parent / "wheels"
    changes: dict[str, Any] = {"model": _MODEL, "tag": "rehearsal", "overrides": ("train.epochs=2",)}
    changes["run"] = f"{_MODEL}+rehearsal.{_SPLIT}"
    here = Paths(comp=competition.name, root=folder / "here")
    if competition.is_own:  # its tables travel along
        _here("data", "--comp", competition.name, "--artifacts", str(here.root), "--raw", str(folder / "raw"))
        order["competition"] = competition = competition_of(here)
    trained = build(Order(mode="train", paths=here, folds=(0, 1), **changes, **order)).outputs
    seconds = {"train": room.play(trained, folder / "raw", work=folder / "raw-work", more=_TWO)}
    after = Paths(comp=competition.name, root=folder / "raw-work" / "artifacts")
    at = ["--comp", competition.name, "--artifacts", str(after.root), "--split", _SPLIT]
    for verb in ("denovo", "templates-predict") if competition.task == "structure" else ():
        _here(verb, *at)
    _here("ensemble", *at, "--name", _NAME)
    packed = build(Order(mode="predict", paths=after, ensemble=_NAME, **order)).outputs
    work = folder / "hidden-work"
    seconds["predict"] = room.play(packed, folder / "hidden", work=work, more=_RERUN | _TWO)
    home = packed["dataset"].parent
    rows = _judge(home, competition, folder / "hidden", work / "submission.csv", folder / "judge")
    trial = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
    seconds["interactive"] = room.play(packed, folder / "raw", work=folder / "trial-work", more=trial)
    return seconds | {"rows": rows}


def _judge(home: Path, competition: Competition, raw: Path, submission: Path, folder: Path) -> int:
    """Check a submission of a bundle here, against the raw files that it is for; returns its rows.

    Raises:
        DataError: it is not accepted, or holds no prediction: in a rerun better than no file, here no rehearsal.
    """
    if json.loads((submission.parent / "KERNEL.json").read_text()).get("filled"):
        raise DataError(
            f"{submission}: nothing was predicted, and it holds what was filled in. Next: read what the notebook "
            "printed above; where it lacks pairs, IMAGE=<a Python 3.12>, for which ViennaRNA's wheel is packed."
        )
    at = ["--comp", competition.name, "--artifacts", str(folder)]
    own = folder / competition.name
    script.place(home / "dataset", read_bundle(home), own)
    _here("data", *at, "--raw", str(script.beside(raw, own / "raw")), "--test-only")
    _here("check", *at, str(submission))
    with submission.open() as lines:
        return sum(1 for _ in lines) - 1


def describe(facts: Mapping[str, Any]) -> list[str]:
    """What the rehearsal found, in lines."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"bare environment: {versions}", f"network: {facts['network']}; inputs: unchanged"]
    for name, told in facts["competitions"].items():
        spent = ", ".join(f"{what} {told[what]:.0f} s" for what in told if what != "rows")
        lines.append(f"{name}: {spent}")
        if "rows" in told:
            test = "the test set in RAW" if "notebook" in told else "a test set of another size"
            lines.append(f"  submission.csv of {test}: {told['rows']:,} rows, accepted")
    return lines


class Room:
    """A bare environment without a network, in which notebooks are played."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.python = (folder / "env" / "bin" / "python").absolute()  # notebooks run in folders of their own
        self.versions = self._furnish(python)
        unshare = shutil.which("unshare")
        allowed = unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0
        self.prefix = [unshare, "-rn", sys.executable, "-c", _LOOPBACK] if unshare and allowed else []
        self.refusal = "none (a namespace of its own)" if allowed else "connections refused in Python"
        if not allowed:
            (self._site() / "sitecustomize.py").write_text(_REFUSAL)
        self._prove_refusal()

    def play(
        self,
        outputs: Mapping[str, Path],
        raw: Path,
        *,
        work: Path,
        more: Mapping[str, str] | None = None,
        timeout: float = _TIMEOUT_S,
    ) -> float:
        """Lay out inputs as Kaggle does, run the notebook, see that it left its inputs alone; returns seconds.

        Raises:
            DataError: it failed, or wrote to its inputs.
        """
        told = json.loads((outputs["code"] / "kernel-metadata.json").read_text())
        inputs = work.with_name(f"{work.name}-input")
        owner, _, slug = told["dataset_sources"][0].partition("/")
        shutil.copytree(outputs["dataset"], inputs / "datasets" / owner / slug)
        for name in told["competition_sources"]:
            shutil.copytree(raw, inputs / "competitions" / name)
        (inputs / "datasets" / owner / slug / "dataset-metadata.json").unlink()  # is not part of what is mounted
        for path in [inputs, *inputs.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = _listing(inputs)
        work.mkdir(parents=True)
        started = time.monotonic()
        command = [*self.prefix, str(self.python), str((outputs["code"] / "kernel.py").resolve())]
        where = {"RNA_INPUT": str(inputs.resolve()), **(more or {})}
        done = subprocess.run(command, cwd=work, env=self._environment() | where, timeout=timeout, check=False)
        seconds = time.monotonic() - started
        for path in [inputs, *inputs.rglob("*")]:  # so that the folder can be removed by whoever is not root
            path.chmod(path.stat().st_mode | 0o200)
        if done.returncode or not (work / "KERNEL.json").is_file():
            raise DataError(f"{work}: the notebook ended with {done.returncode}. Next: read what it printed above.")
        if _listing(inputs) != before:
            raise DataError(
                f"{inputs}: the notebook wrote to its inputs, which are read-only on Kaggle. Next: look for what it "
                "writes beside the results; on Kaggle it would fail."
            )
        return seconds

    def _furnish(self, python: Path) -> dict[str, str]:
        """Make the environment; returns the versions in it."""
        if not (python.is_file() and os.access(python, os.X_OK)):
            raise ConfigError(f"{python}: expected a Python interpreter. Next: IMAGE=<folder>/bin/python (--python).")
        listed = subprocess.run([python, "-c", _LIST, *IMAGE, "pip"], capture_output=True, text=True, check=False)
        if listed.returncode:
            said = listed.stderr.strip().splitlines()[-1:]
            raise ConfigError(f"{python}: does not run: {said}. Next: IMAGE=<another folder>/bin/python.")
        told = json.loads(listed.stdout)
        lacking = [name for name in (*IMAGE, "pip") if name.lower() not in told["found"]]
        if lacking or told["python"].split(".")[:2] not in (["3", "11"], ["3", "12"]):
            raise ConfigError(
                f"{python}: Python {told['python']} without {', '.join(lacking) or 'nothing'}; expected 3.11 or 3.12 "
                "with all packages of Kaggle's image. Next: --python of an environment that has them."
            )
        subprocess.run([python, "-m", "venv", "--without-pip", self.folder / "env"], check=True)
        site = self._site()
        for entries in (entries for _, entries in told["found"].values()):
            for entry in map(Path, entries):
                if entry.exists() and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
        return {"Python": told["python"]} | {name: told["found"][name][0] for name in IMAGE}

    def _site(self) -> Path:
        return next((self.folder / "env" / "lib").glob("python3.*")) / "site-packages"

    def _environment(self) -> dict[str, str]:
        """Of a notebook: nothing of ours but a home and where programs are."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        kept = {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "LANG", "CUDA_VISIBLE_DEVICES") if name in os.environ
        }
        return kept | {"HOME": str(home.resolve()), "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONNOUSERSITE": "1"}

    def _prove_refusal(self) -> None:
        """A server of ours, reachable from here, must not be reachable from within."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            ask = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
            from_here = subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False)
            within = [*self.prefix, str(self.python), "-c", ask]
            from_within = subprocess.run(within, capture_output=True, env=self._environment(), check=False)
        if from_here.returncode or not from_within.returncode:
            raise DataError(
                "kernel-check: the rehearsal's network could not be cut off; nothing was proved. Next: make "
                "kernel-check as root, or where `unshare --net` works."
            )


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    stats = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _here(*words: str) -> None:
    """A verb of the program in this environment."""
    say(f"rna {shlex.join(words)}")
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=REPOSITORY, check=False)
    if done.returncode:
        raise DataError(f"rna {words[0]} ended with {done.returncode}. Next: read its last line above.")
