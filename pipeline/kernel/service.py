"""Bundles to Kaggle, and what notebooks left there back: believed only as far as the service's own answers go.

The client ends with 0 after a push that was refused, an upload that broke off and an input that does not exist, so its
text is read and the state asked for afterwards. Nothing is pushed twice by itself: a push costs accelerator time.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import kaggle_cli
from pipeline.errors import DataError, NetworkError
from pipeline.kernel.bundle import read_bundle
from pipeline.paths import Paths
from pipeline.runlog import Bar, amount, say, warn
from pipeline.stage import Report, sha256_file, sweep, write_json
from pipeline.training.stop import run_lock

_READ_S = 120.0  # for an answer that is no transfer
_SEND_S = 6 * 3600.0
_DATASET_S = 1800.0  # until an uploaded data set must be ready
_RUNNING = ("QUEUED", "RUNNING", "NEW_SCRIPT")
_NEST = ("a", "b", "c", "output")  # a name with ".." in it still lands where it is seen
_RESULT = "KERNEL.json"  # what the notebook declares
_SENT = "sent.json"  # the data set as Kaggle has it
PULLED = "pulled.json"  # which version's output is here


def push(paths: Paths, *, slug: str, every: float = 10.0) -> Report:
    """Send a bundle's data set, unless Kaggle has it, then its notebook, which starts to run.

    Args:
        paths: where the bundle is.
        slug: of the bundle.
        every: seconds between looks at the data set's state.

    Returns:
        Facts: ``kernel`` (owner/slug), ``version``, ``state``, ``url``.

    Raises:
        DataError: the bundle is not what was built (exit code 3).
        NetworkError: refused, not arrived, or an input that Kaggle does not know (6).
    """
    started = time.monotonic()
    home = paths.kernel_dir(slug)
    told, code = read_bundle(home), _metadata(home)
    _send_dataset(home, code["dataset_sources"][0], told, every=every)
    what = f"push of {code['id']}"
    limit = str(int(told["limit_s"]))
    answer = kaggle_cli.call("kernels", "push", "-p", str(home / "code"), "-t", limit, timeout=_READ_S)
    _require_taken(answer, r"Kernel push error: *(.*)", what=what)
    unknown = re.search(r"not valid (\w+) sources and could\s*not be added to the kernel: *(.*)", answer.text)
    if unknown:
        (home / _SENT).unlink(missing_ok=True)  # the next push sends the data set again
        raise NetworkError(
            f"{what}: Kaggle knows no {unknown[1]} {unknown[2]}; the notebook runs without it and will fail. "
            f"Next: accept the rules of the competition, or correct the name, then make kernel-push."
        )
    done = re.search(r"Kernel version (\d+) successfully pushed.*?(https?://\S+)", answer.text, re.DOTALL)
    if answer.code != 0 or not done:
        raise kaggle_cli.explain(answer, what=what, slug=told["slug"])
    state, _ = _state(code)
    facts = {"kernel": code["id"], "version": int(done[1]), "state": state, "url": done[2]}
    write_json(home / "pushed.json", facts | {"manifest": sha256_file(home / "dataset" / "MANIFEST.json")})
    seconds = time.monotonic() - started
    return Report(stage="kernel-push", status="built", outputs={"bundle": home}, facts=facts, seconds=seconds)


def status(paths: Paths, *, slug: str, wait: float = 0.0, every: float = 30.0) -> Report:
    """Ask how a notebook is doing, and wait until it ended.

    Args:
        paths: where its bundle is.
        slug: of the bundle.
        wait: seconds at most; 0 = ask once.
        every: seconds between two looks.

    Raises:
        DataError: no such bundle (exit code 3).
        NetworkError: it failed or was cancelled, or still runs after `wait` (6).
    """
    started = time.monotonic()
    read_bundle(paths.kernel_dir(slug))
    code = _metadata(paths.kernel_dir(slug))
    name = code["id"]
    with Bar(f"notebook {name}", unit="looks") as bar:
        while True:
            state, reason = _state(code)
            if state == "COMPLETE":
                break
            if state not in _RUNNING:
                because = f": {reason}" if reason else ""
                raise NetworkError(f"{name}: ended with {state}{because}. Next: make kernel-pull fetches its log.")
            if time.monotonic() - started >= wait:
                if wait:
                    raise NetworkError(f"{name}: still {state} after {wait:.0f} s. Next: the same command waits on.")
                break
            bar.advance(note=state)
            time.sleep(every)
    facts = {"kernel": name, "state": state}
    return Report(stage="kernel-status", status="built", outputs={}, facts=facts, seconds=time.monotonic() - started)


def pull(paths: Paths, *, slug: str) -> Report:
    """Fetch what a notebook left, check it against what it declared, and give trained folds their place.

    Returns:
        Outputs: the folder; facts: ``files``, ``state`` of the run, ``placed`` (fold folders that are now local runs).

    Raises:
        DataError: a declared file is absent or other than declared, or a name would leave the folder (exit code 3).
        NetworkError: not reachable, or there is no output (6).
    """
    started = time.monotonic()
    home = paths.kernel_dir(slug)
    read_bundle(home)
    code = _metadata(home)
    name = code["id"]
    nest = home / ".incoming"
    shutil.rmtree(nest, ignore_errors=True)
    incoming = nest.joinpath(*_NEST)
    incoming.mkdir(parents=True)
    try:
        # tables stay: the next notebook reads them
        wanted = rf"(^|/)({_RESULT}|submission\.csv)$|^artifacts/[^/]+/runs/"
        request = ["kernels", "output", name, "-p", str(incoming), "--page-size", "200", "--file-pattern", wanted]
        answer = kaggle_cli.call(*request, timeout=_SEND_S)
        came = _arrived(nest, incoming)
        log = incoming / f"{slug}.log"
        if log in came:
            log.replace(home / log.name)
        if answer.code != 0:
            raise _explain(answer, code, what=f"output of {name}")
        told = _declared(incoming, name, home / log.name)
        output = home / "output"
        shutil.rmtree(output, ignore_errors=True)
        incoming.rename(output)
        write_json(home / PULLED, {"version": _pushed_version(home)})
    finally:
        shutil.rmtree(nest, ignore_errors=True)
    if told.get("filled"):
        warn(f"{name}: nothing was predicted, and submission.csv holds what was filled in; {slug}.log says why")
    placed = place_folds(output, paths) if told["mode"] == "train" else []
    facts = {"kernel": name, "files": len(told["files"]), "state": told["state"], "placed": placed}
    seconds = time.monotonic() - started
    return Report(stage="kernel-pull", status="built", outputs={"output": output}, facts=facts, seconds=seconds)


def describe(facts: Mapping[str, Any]) -> list[str]:
    """What `push`, `status` or `pull` found, in lines."""
    lines = [f"{facts['kernel']}: {facts['state']}"]
    if "url" in facts:
        lines.append(f"version {facts['version']}, {facts['url']}")
    if "files" in facts:
        lines.append(f"{amount(facts['files'], 'declared file')}, each with its sha256")
        lines += [f"placed: {folder}" for folder in facts["placed"]]
    return lines


def _require_taken(answer: kaggle_cli.Answer, refusal: str, *, what: str) -> None:
    if refused := re.search(refusal, answer.text):
        raise NetworkError(
            f"{what}: Kaggle refused it: {refused[1][:300].rstrip('.')}. Next: cure that, then make kernel-push."
        )


def _pushed_version(home: Path) -> int | None:
    """Version of the notebook that was pushed last from here; None if it was pushed elsewhere."""
    path = home / "pushed.json"
    return int(json.loads(path.read_text())["version"]) if path.is_file() else None


# --- the data set ---


def _send_dataset(home: Path, name: str, told: Mapping[str, Any], *, every: float) -> None:
    """Upload the bundle's files as a new data set or version, and wait until notebooks can read it."""
    digest = sha256_file(home / "dataset" / "MANIFEST.json")
    entry = {"dataset": name, "manifest": digest}
    if (home / _SENT).is_file() and json.loads((home / _SENT).read_text()) == entry:
        say(f"data set {name}: was sent before and has not changed")
        return
    state, before = _dataset(name, told)
    what = f"upload of {name}"
    verb = ["create"] if state in ("absent", "deleted") else ["version", "-m", told["commit"] or digest[:10]]
    request = ["datasets", *verb, "-p", str(home / "dataset"), "-r", "skip"]
    answer = kaggle_cli.call(*request, timeout=_SEND_S)
    _require_taken(answer, r"creation error: *(.*)", what=what)
    lost = [file for file in [*told["files"], "MANIFEST.json"] if f"Upload successful: {file} (" not in answer.text]
    if answer.code != 0 or (not lost and "is being created" not in answer.text):
        raise kaggle_cli.explain(answer, what=what, slug=told["slug"])
    if lost:
        raise NetworkError(f"{what}: {', '.join(lost[:3])} did not arrive. Next: make kernel-push sends it again.")
    _wait_until_ready(name, told, after=before, every=every)
    write_json(home / _SENT, entry)


def _wait_until_ready(name: str, told: Mapping[str, Any], *, after: int, every: float) -> None:
    end = time.monotonic() + _DATASET_S
    with Bar(f"data set {name}", unit="looks") as bar:
        while True:
            state, version = _dataset(name, told)
            if state == "failed":
                raise NetworkError(f"{name}: Kaggle failed to unpack it. Next: see {kaggle_cli.PAGE}/datasets/{name}.")
            if state == "ready" and version > after:
                break
            if time.monotonic() > end:
                raise NetworkError(f"{name}: {state} after {_DATASET_S:.0f} s. Next: make kernel-push looks again.")
            bar.advance(note=state)
            time.sleep(every)
    say(f"data set {name}: {len(told['files']) + 1} files arrived, version {version}")


def _dataset(name: str, told: Mapping[str, Any]) -> tuple[str, int]:
    """State and version of a data set; absent where Kaggle shows none."""
    request = ["datasets", "status", name, "--format", "json"]
    answer = kaggle_cli.call(*request, timeout=_READ_S)
    found = re.search(r"\{.*\}", answer.out, re.DOTALL)
    if answer.code == 0 and found:
        here = json.loads(found[0])
        return str(here["status"]), int(here["current_version_number"] or 0)
    if re.search(r"Not found|\b404\b|Permission '?datasets", answer.text):
        return "absent", 0
    raise kaggle_cli.explain(answer, what=f"state of {name}", slug=told["slug"])


# --- the notebook ---


def _metadata(home: Path) -> dict[str, Any]:
    return dict(json.loads((home / "code" / "kernel-metadata.json").read_text()))


def _explain(answer: kaggle_cli.Answer, code: Mapping[str, Any], *, what: str) -> NetworkError:
    if re.search(r"Not found|\b404\b|Permission '?kernels\.get", answer.text):
        return NetworkError(
            f"{what}: Kaggle shows this account no such notebook. Next: compare OWNER with your user name there, or "
            "make kernel-push."
        )
    return kaggle_cli.explain(answer, what=what, slug="".join(code["competition_sources"]))


def _state(code: Mapping[str, Any]) -> tuple[str, str]:
    """State of a notebook's last run, and the reason where it failed."""
    answer = kaggle_cli.call("kernels", "status", code["id"], timeout=_READ_S)
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', answer.text)
    if answer.code != 0 or not found:
        raise _explain(answer, code, what=f"state of {code['id']}")
    reason = re.search(r'Failure message: "(.*)"', answer.text)
    return found[1], reason[1] if reason else ""


def _arrived(nest: Path, incoming: Path) -> list[Path]:
    """What came; a file that was put outside its folder, or that is no plain file, is refused."""
    came = []
    for path in sorted(nest.rglob("*")):
        astray = not path.is_relative_to(incoming) and not incoming.is_relative_to(path)
        if astray or path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DataError(
                f"{path}: left the folder that it was fetched into, or is no plain file; all of it is removed. "
                "Next: look at the notebook's output on Kaggle before fetching it again."
            )
        came += [path] if path.is_file() else []
    return came


def _declared(incoming: Path, name: str, log: Path) -> dict[str, Any]:
    """What the notebook says it left, each file compared with its sha256."""
    where = f"{log} says why" if log.is_file() else "it left no log either"
    try:
        told = json.loads((incoming / _RESULT).read_text())
        files = dict(told["files"])
        told["mode"], told["state"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{name}: its output holds no {_RESULT}, so it did not come to its end; {where}. Next: make kernel-status."
        ) from err
    for file, digest in files.items():
        path = incoming / file
        if not path.is_file() or sha256_file(path) != digest:
            what = "is other than declared" if path.is_file() else "is absent"
            raise DataError(
                f"{name}: {file}, which it declared, {what}; nothing was taken. Next: make kernel-pull again."
            )
    return dict(told)


def place_folds(output: Path, paths: Paths) -> list[str]:
    """Copy trained folds to where local runs are, each complete or not at all.

    A local one of the same name is left alone, unless it is what the fetched one went on from.
    """
    placed = []
    for folder in sorted(output.glob(f"artifacts/{paths.comp}/runs/*/fold*")):
        target = paths.fold_dir(folder.parent.name, int(folder.name.removeprefix("fold")))
        goes_on = target.exists() and _goes_on(folder, target)
        if target.exists() and not goes_on:
            say(f"{target}: is there already and stays; the fetched one is in {folder}")
            continue
        sweep(target)
        part = target.with_name(f".{target.name}.part-{os.getpid()}")
        try:
            for path in filter(Path.is_file, folder.rglob("*")):
                (part / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, part / path.relative_to(folder))
            with run_lock(target) if goes_on else contextlib.nullcontext():
                if goes_on:
                    shutil.rmtree(target)
                part.rename(target)
        finally:
            sweep(target)
        placed.append(str(target))
    return placed


def _goes_on(folder: Path, target: Path) -> bool:
    """Whether a fetched fold is the same run as a local one, trained on: its metrics begin with all of that one's."""
    files = [place / "metrics.jsonl" for place in (folder, target)]
    told, known = (path.read_bytes() if path.is_file() else b"" for path in files)
    return b"" != known != told and told.startswith(known)
