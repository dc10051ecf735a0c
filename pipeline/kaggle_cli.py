"""Kaggle's command line client, run as a program of its own and believed only as far as its answer can be checked.

It is never imported: importing it prints, writes below HOME and asks the network. Its exit codes are no evidence (a
failed upload and a refused kernel end with 0), so callers look at what it wrote or list what came of it. Credentials
are its own business: they are read by the client alone, and what it prints is cleaned of them before anyone sees it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import NetworkError

PAGE = "https://www.kaggle.com"
_POLL_S = 0.2
_SECRET = re.compile(
    r"(?i)(bearer\s+|authorization:\s*\w+\s+|\"?(?:key|token|password)\"?\s*[:=]\s*\"?|KGAT_)[\w.~+/=-]{8,}"
)
#: What the client or the service says -> what it means and what to do; the first that is found counts. Status codes are
#: words of their own: an address such as 0x7f4011c0d5d0 stands in every error of the connection.
_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        r"Authentication required|Unauthenticated|\b401\b|could not find kaggle\.json|Missing username",
        "Kaggle does not know who asks; expected a valid API token. "
        f"Next: make one at {PAGE}/settings/api and run `kaggle auth login`, or save it as ~/.kaggle/access_token.",
    ),
    (
        r"accept this competition's rules|\b403\b|Forbidden",
        "Kaggle refuses access; expected that this account has joined the competition. "
        f"Next: accept the rules at {PAGE}/competitions/{{slug}}/rules, then run this again.",
    ),
    (
        r"Not found|\b404\b",
        f"Kaggle knows no such thing. Next: compare the name with {PAGE}/competitions/{{slug}}/data.",
    ),
    (
        r"Too many requests|\b429\b",
        "Kaggle asks for patience (too many requests). Next: run this again in some minutes.",
    ),
    (r"5\d\d Server Error|Internal error|\b50[0234]\b", "Kaggle has a failure of its own. Next: run this again later."),
    (
        r"ConnectionError|Max retries|NameResolution|timed out|IncompleteRead|ConnectionReset|Connection broken|"
        r"Connection refused|Remote end closed|ProxyError",
        "the connection to Kaggle failed or broke off. Next: check the network, then run this again: it resumes.",
    ),
)


class Answer(NamedTuple):
    """What the client left behind, secrets blotted out."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}".strip()


def call(*arguments: str, timeout: float, on_wait: Callable[[], object] = lambda: None) -> Answer:
    """Run ``kaggle <arguments>`` to its end.

    Args:
        *arguments: as on the command line.
        timeout: seconds after which it is stopped.
        on_wait: called a few times a second meanwhile.

    Raises:
        NetworkError: the client is not installed, or took too long.
    """
    program = _program()
    started = time.monotonic()
    with (
        # 2.2.4 keeps upload states with signed addresses in a guessable folder of TMPDIR: it gets a private one
        tempfile.TemporaryDirectory(prefix="kaggle-") as private,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        command = [program, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_environment(private))
        try:
            while process.poll() is None:
                if time.monotonic() - started > timeout:
                    raise NetworkError(
                        f"kaggle {' '.join(arguments[:2])}: no end after {timeout:.0f} s. "
                        "Next: check the network, then run this again: downloads resume."
                    )
                on_wait()
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(redact(stream.read().decode(errors="replace")))
    return Answer(process.returncode, *texts)


def explain(answer: Answer, *, what: str, slug: str) -> NetworkError:
    """One sentence for an answer that is no success.

    Args:
        answer: of `call`.
        what: was asked, for the start of the sentence.
        slug: of the competition, for the page to open.
    """
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, answer.text):
            return NetworkError(f"{what}: {meaning.format(slug=slug)}")
    last = next((line for line in reversed(answer.text.splitlines()) if line.strip()), "(nothing)")
    return NetworkError(f"{what}: kaggle ended with {answer.code} and said {last.strip()[:200]!r}. Next: make doctor.")


def redact(text: str) -> str:
    """`text` without anything that looks like a credential, and without the user's own key where it is known.

    >>> redact('Authorization: Bearer abcdef0123456789')
    'Authorization: Bearer [hidden]'
    """
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        secret = os.environ.get(name, "")
        if len(secret) >= 8:
            text = text.replace(secret, "[hidden]")
    return _SECRET.sub(lambda found: found.group(1) + "[hidden]", text)


def _program() -> str:
    beside = Path(sys.executable).parent / "kaggle"
    found = str(beside) if beside.is_file() else shutil.which("kaggle")
    if found is None:
        raise NetworkError(
            "kaggle: the command line client is not installed. Next: make setup EXTRAS=dev,kaggle, or "
            "pip install 'kaggle==2.2.*' six."
        )
    return found


def _environment(private: str) -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VERBOSE")}  # prints the token
    return kept | {"TMPDIR": private, "PYTHONWARNINGS": "ignore", "PYTHONIOENCODING": "utf-8"}
