"""Send a submission to Kaggle, and believe that it arrived only when Kaggle lists it.

A submission costs a part of the day's budget, so nothing is ever sent twice: the file's sha256 is looked up in the
ledger, an unclear end is looked up in Kaggle's list, and a failed sending is told, not tried again.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import kaggle_cli
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, NetworkError
from pipeline.paths import Paths
from pipeline.runlog import Bar, amount, say
from pipeline.stage import Report, commit, read_manifest, sha256_file
from submissions import check, ledger, log
from submissions.ledger import Sent

_READ_S = 120.0  # for an answer that is no transfer
_SEND_S = 3600.0
_LOOKS = 5  # at the list until a submission that was sent must be there
_COLUMNS = "json(ref,status,publicScore,privateScore,date,description)"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The notebook version whose output is submitted, for a competition that takes code only."""

    name: str  # owner/slug
    version: str

    def output(self, paths: Paths) -> Path:
        """The notebook's own submission, as it was fetched.

        Raises:
            ConfigError: it is not here, or of another version.
        """
        slug = self.name.rpartition("/")[2]
        home = paths.kernel_dir(slug)
        file, told = home / "output" / "submission.csv", home / "pulled.json"
        how = f"Next: make kernel-pull COMP={paths.comp} SLUG={slug}"
        if not file.is_file():
            raise ConfigError(f"{file}: absent; expected the output of {self.name}, which is checked first. {how}.")
        version = json.loads(told.read_text())["version"] if told.is_file() else None
        if str(version) not in ("None", self.version):
            raise ConfigError(
                f"{file}: of version {version} of {self.name}; expected {self.version}. {how}, or VERSION={version}."
            )
        return file


def run(
    paths: Paths,
    *,
    competition: Competition,
    name: str,
    file: Path | None = None,
    fmt: str = "csv",
    kernel: Kernel | None = None,
    wait: float = 3600.0,
    every: float = 20.0,
) -> Report:
    """Check, send, find it listed, wait for its score, write ledger and log.

    Args:
        paths: where the submission and the log are.
        competition: to submit to.
        name: of the ensemble; part of the description.
        file: another submission than the ensemble's.
        fmt: of the ensemble's submission, csv or parquet.
        kernel: submit this notebook version, whose fetched output is checked instead of the ensemble's submission.
        wait: seconds to wait for the score; the same command later goes on waiting.
        every: seconds between looks at the list.

    Returns:
        ``current`` if these bytes were submitted and scored before; facts: the ledger's entry.

    Raises:
        DataError: the file is not valid (exit code 3).
        ConfigError: nothing to submit, or what an ensemble said before it was made anew; a notebook's output is not
            here; or no submission is left today (2).
        NetworkError: refused, not listed, or not scored in time (6).
    """
    competition.require_kaggle("submit-kaggle")
    started = time.monotonic()
    is_own = not (file or kernel)  # what `submissions.write` made of the ensemble
    file = file or (kernel.output(paths) if kernel else paths.submission(name, suffix=fmt))
    if not file.is_file():
        raise ConfigError(f"{file}: no such submission. Next: make submit COMP={competition.name} NAME={name}.")
    check.run(paths, competition=competition, file=file)
    book = paths.log.parent / "ledger.jsonl"
    digest = _digest(file, kernel)
    sent = ledger.find(book, comp=competition.name, sha256=digest)
    if sent is not None:
        what = f"version {kernel.version} of {kernel.name} was" if kernel else f"{file}: these bytes were"
        say(f"{what} submitted before ({sent.tag}, {sent.state}); not sent again")
        if sent.state == "scored":
            return _report(sent, book, status="current", seconds=time.monotonic() - started)
    else:
        if is_own:
            _require_newest(paths, file, name=name, fmt=fmt)
        _need_budget(competition)
        sent = Sent(comp=competition.name, sha256=digest, tag=_tag(name, digest), file=_told(file, kernel))
        ledger.append(book, sent)
        _send(sent, file, competition, kernel, book)
    sent = _find_listed(sent, competition, book, every=every)
    sent = _wait_for_score(sent, competition, book, wait=wait, every=every)
    _write_log(paths, competition, name, sent)
    return _report(sent, book, status="built", seconds=time.monotonic() - started)


def _require_newest(paths: Paths, file: Path, *, name: str, fmt: str) -> None:
    """See that a submission is of its ensemble's predictions as they are now."""
    home = paths.ensemble_dir(name)
    done, predictions = read_manifest(home / f"submit-{fmt}.manifest.json"), home / "test.parquet"
    written_of = done["inputs"].get("predictions") if done else None
    if written_of and predictions.is_file() and written_of != sha256_file(predictions):
        raise ConfigError(
            f"{file}: written before {predictions} was made anew. Next: make submit COMP={paths.comp} NAME={name}, or "
            f"FILE={file} to send it all the same."
        )


def _digest(file: Path, kernel: Kernel | None) -> str:
    """What is never sent twice: these bytes, or these of this version, as equal ones may hide other predictions."""
    digest = sha256_file(file)
    return hashlib.sha256(f"{digest} {kernel.name} {kernel.version}".encode()).hexdigest() if kernel else digest


def _told(file: Path, kernel: Kernel | None) -> str:
    return f"{kernel.name} version {kernel.version}: {file.name}" if kernel else file.name


def _need_budget(competition: Competition) -> None:
    answer = kaggle_cli.call("competitions", "submission-limits", competition.slug, "--json", timeout=_READ_S)
    try:
        left = int(json.loads(answer.out).get("numAllowedNow", 0))  # a zero is left out of the answer
    except (ValueError, AttributeError) as err:
        raise kaggle_cli.explain(answer, what="question for the daily budget", slug=competition.slug) from err
    if left < 1:
        raise ConfigError(f"{competition.slug}: no submission is left today. Next: the same command tomorrow.")
    say(f"{competition.slug}: {amount(left, 'submission')} left today")


def _send(sent: Sent, file: Path, competition: Competition, kernel: Kernel | None, book: Path) -> None:
    """Submit once; what the client says only tells a refusal from an unclear end, which the list decides."""
    from_kernel = ["-k", kernel.name, "-v", kernel.version] if kernel else []
    given = file.name if kernel else str(file)
    answer = kaggle_cli.call(
        "competitions", "submit", competition.slug, "-f", given, "-m", sent.tag, *from_kernel, timeout=_SEND_S
    )
    if "Successfully submitted" not in answer.text and not _listed(sent, competition):
        ledger.append(book, sent.now("failed"))
        raise kaggle_cli.explain(answer, what=f"submission of {file.name}", slug=competition.slug)


def _find_listed(sent: Sent, competition: Competition, book: Path, *, every: float) -> Sent:
    """The same submission with Kaggle's number, once the list shows it."""
    for look in range(_LOOKS):
        row = _listed(sent, competition)
        if row is not None:
            listed = sent.now("listed", ref=int(row["ref"]))
            if sent.state == "sent":
                ledger.append(book, listed)
            return listed
        if look < _LOOKS - 1:
            time.sleep(every)
    if sent.state == "listed":  # it did arrive: as failed, it would be sent again
        raise NetworkError(
            f"{sent.file}: Kaggle's list does not show {sent.tag!r} (submission {sent.ref}), as it did before. "
            "Next: the same command looks again and sends nothing."
        )
    ledger.append(book, sent.now("failed"))
    raise NetworkError(
        f"{sent.file}: Kaggle does not list {sent.tag!r}; the submission did not arrive. "
        f"Next: look at {kaggle_cli.PAGE}/competitions/{competition.slug}/submissions, then run this again."
    )


def _wait_for_score(sent: Sent, competition: Competition, book: Path, *, wait: float, every: float) -> Sent:
    give_up = time.monotonic() + wait
    with Bar(f"score of {sent.tag}", unit="looks") as bar:
        while True:
            row = _listed(sent, competition) or {}
            status = str(row.get("status", "")).rpartition(".")[2]  # "SubmissionStatus.COMPLETE"
            if status == "COMPLETE":
                scores = {"public": str(row.get("publicScore", "")), "private": str(row.get("privateScore", ""))}
                scored = sent.now("scored", **scores)
                ledger.append(book, scored)
                return scored
            if status == "ERROR":
                ledger.append(book, sent.now("failed"))
                raise NetworkError(
                    f"{sent.file}: Kaggle could not score {sent.tag!r} (submission {sent.ref}). Next: read the reason "
                    f"at {kaggle_cli.PAGE}/competitions/{competition.slug}/submissions."
                )
            if time.monotonic() >= give_up:
                raise NetworkError(
                    f"{sent.file}: {sent.tag!r} is listed (submission {sent.ref}) and has no score after {wait:.0f} s. "
                    "Next: the same command goes on waiting and sends nothing."
                )
            bar.advance(note=status)
            time.sleep(every)


def _listed(sent: Sent, competition: Competition) -> Mapping[str, Any] | None:
    answer = kaggle_cli.call("competitions", "submissions", competition.slug, "--format", _COLUMNS, timeout=_READ_S)
    try:
        rows = json.loads(answer.out)
        return next((row for row in rows if sent.tag in str(row.get("description", ""))), None)
    except (ValueError, TypeError, AttributeError) as err:
        if "No submissions found" in answer.text:
            return None
        raise kaggle_cli.explain(answer, what="list of submissions", slug=competition.slug) from err


def _tag(name: str, digest: str) -> str:
    """A description that no other submission has."""
    return f"{name} {digest[:8]}-{secrets.token_hex(3)}"


def _write_log(paths: Paths, competition: Competition, name: str, sent: Sent) -> None:
    entry = log.LogEntry(
        date=log.today(),
        comp=competition.name,
        name=name,
        split="leaderboard",
        folds="",
        metric=competition.metric,
        score=f"public {sent.public or '-'}, private {sent.private or '-'}",
        floors="",
        data="",
        config=sent.sha256[:10],
        commit=commit(),
        note=f"submission {sent.ref}, {sent.tag}",
    )
    log.append(paths.log, entry)


def _report(sent: Sent, book: Path, *, status: Any, seconds: float) -> Report:
    facts = {"tag": sent.tag, "ref": sent.ref, "public": sent.public, "private": sent.private}
    return Report(stage="submit-kaggle", status=status, outputs={"ledger": book}, facts=facts, seconds=seconds)


def describe(facts: Mapping[str, Any]) -> str:
    """What `run` found, in one line."""
    private = f", private {facts['private']}" if facts["private"] else ""
    return f"submission {facts['ref']} ({facts['tag']}): public score {facts['public'] or '-'}{private}"
