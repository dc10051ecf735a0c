"""A Kaggle that lives on the loopback interface: the real command line client talks to it through a proxy setting.

`requests` honours ``http_proxy``, and the client knows an environment whose address is plain ``http://localhost``: so
every call arrives here as ``POST http://localhost/api/v1/<package.Service>/<Method>`` with a JSON body.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

#: What the server says with each error code.
MESSAGES = {
    401: "Unauthenticated",
    403: "You must accept this competition's rules before you'll be able to download files.",
    404: "Not found",
    429: "Too many requests",
    500: "Internal error",
}


@dataclass
class FakeKaggle:
    """The server's state; tests set it and read it."""

    files: dict[str, bytes] = field(default_factory=dict)  # of the competition
    fail: dict[str, int | str] = field(
        default_factory=dict
    )  # method -> HTTP code, "slow" or "html"; "cut": once in a GET
    budget: int = 5  # submissions left today
    score_after: int = 1  # listings until a submission is scored
    final_status: str = "COMPLETE"
    hidden: bool = False  # the list of submissions stays empty
    arrive_on_failure: bool = False  # a submission whose answer is an error counts all the same
    submissions: list[dict[str, Any]] = field(default_factory=list)
    code_submissions: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    kernel_states: list[str] = field(default_factory=lambda: ["QUEUED", "RUNNING", "COMPLETE"])
    kernel_outputs: dict[str, bytes] = field(default_factory=dict)
    invalid_sources: list[str] = field(default_factory=list)
    push_error: str = ""  # what SaveKernel refuses a notebook with, in an answer of success
    datasets: dict[str, int] = field(default_factory=dict)  # owner/slug -> version
    dataset_error: str = ""
    dataset_state: str = "READY"
    blobs: dict[str, str] = field(default_factory=dict)  # token of an upload -> file name
    uploads: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that make the client talk to this server, with credentials of a canary."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": "tester",
            "KAGGLE_KEY": "canary-0123456789abcdef",
            "http_proxy": f"http://127.0.0.1:{self.port}",
            "no_proxy": "",
            "HOME": str(home),
        }

    # --- one method each; the name is the service's ---

    def DownloadDataFile(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return _Redirect(f"http://localhost/files/{body['fileName']}")

    def DownloadDataFiles(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return _Redirect(f"http://localhost/files/{body['competitionName']}.zip")

    def GetSubmissionLimits(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return {"numToday": 5 - self.budget, "numTotal": len(self.submissions), "numAllowedNow": self.budget}

    def StartSubmissionUpload(self, body: dict[str, Any]) -> Any:  # noqa: N802
        token = f"token{len(self.uploads)}"
        return {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    def CreateSubmission(self, body: dict[str, Any]) -> Any:  # noqa: N802
        self.budget -= 1
        row = {
            "ref": 1000 + len(self.submissions),
            "status": "PENDING",
            "description": body.get("submissionDescription", ""),
            "fileName": "submission.csv",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
        }
        self.submissions.insert(0, row)
        return {"message": "Successfully submitted", "ref": row["ref"]}

    def CreateCodeSubmission(self, body: dict[str, Any]) -> Any:  # noqa: N802
        self.code_submissions.append(body)
        return self.CreateSubmission(body)

    def ListSubmissions(self, body: dict[str, Any]) -> Any:  # noqa: N802
        self.score_after -= 1
        if self.score_after < 0:
            for row in self.submissions:
                row |= {"status": self.final_status, "publicScore": "0.20831", "privateScore": "0.21064"}
        return {"submissions": [] if self.hidden else self.submissions}

    def SaveKernel(self, body: dict[str, Any]) -> Any:  # noqa: N802
        if self.push_error:
            return {"error": self.push_error}
        slug = body.get("slug") or body.get("newTitle", "")
        self.kernels[slug] = body
        answer = {"ref": f"/code/{slug}", "url": f"http://localhost/code/{slug}", "versionNumber": 1}
        return answer | {"invalidDatasetSources": self.invalid_sources}

    def StartBlobUpload(self, body: dict[str, Any]) -> Any:  # noqa: N802
        token = f"blob{len(self.blobs)}"
        self.blobs[token] = body["name"]
        return {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    def GetDatasetStatus(self, body: dict[str, Any]) -> Any:  # noqa: N802
        there = f"{body['ownerSlug']}/{body['datasetSlug']}" in self.datasets
        return {"status": self.dataset_state} if there else 404

    def GetDataset(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return {"currentVersionNumber": self.datasets[f"{body['ownerSlug']}/{body['datasetSlug']}"]}

    def CreateDataset(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return self._save_dataset(f"{body['ownerSlug']}/{body['slug']}")

    def CreateDatasetVersion(self, body: dict[str, Any]) -> Any:  # noqa: N802
        return self._save_dataset(f"{body['ownerSlug']}/{body['datasetSlug']}")

    def _save_dataset(self, name: str) -> Any:
        if self.dataset_error:
            return {"status": "error", "error": self.dataset_error}
        self.datasets[name] = self.datasets.get(name, 0) + 1
        return {"status": "ok", "url": f"http://localhost/datasets/{name}"}

    def GetKernelSessionStatus(self, body: dict[str, Any]) -> Any:  # noqa: N802
        state = self.kernel_states.pop(0) if len(self.kernel_states) > 1 else self.kernel_states[0]
        return {"status": state, "failureMessage": "out of memory" if state == "ERROR" else ""}

    def ListKernelSessionOutput(self, body: dict[str, Any]) -> Any:  # noqa: N802
        files = [
            {"fileName": name, "url": f"http://localhost/output/{quote(name, safe='')}"} for name in self.kernel_outputs
        ]
        return {"files": files, "log": "done"}


class _Redirect(str):
    """Answer with 302 to this address."""

    __slots__ = ()


def _handler(server: FakeKaggle) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            method = self.path.rsplit("/", 1)[-1]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.calls.append(method)
            if method == "CreateSubmission" and server.arrive_on_failure:
                server.CreateSubmission(json.loads(body))
            if self._failed(method):
                return
            answer = getattr(server, method)(json.loads(body or b"{}"))
            if isinstance(answer, int):
                self._refuse(answer)
            elif isinstance(answer, _Redirect):
                self._send(302, b"", Location=str(answer))
            else:
                self._send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

        def do_PUT(self) -> None:
            server.calls.append("PUT")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self._failed("PUT"):
                server.uploads[self.path.rsplit("/", 1)[-1]] = body
                self._send(200, b"")

        def do_GET(self) -> None:
            _, kind, name = re.sub("^http://localhost", "", self.path).split("/", 2)
            content = {"files": server.files, "output": server.kernel_outputs}[kind].get(unquote(name))
            if self._failed("GET"):
                return
            if content is None:
                self._send(404, b"{}")
                return
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            more = {"Accept-Ranges": "bytes", "ETag": f'"{hash(content)}"'}
            if start:
                more["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = server.fail.pop("cut", None) is not None  # once
            self._send(206 if start else 200, content[start:], cut=cut, **more)

        def _failed(self, method: str) -> bool:
            how = server.fail.get(method)
            if isinstance(how, int):
                self._refuse(how)
            elif how == "html":
                self._send(200, b"<!DOCTYPE html><html><title>Login | Kaggle</title></html>")
            elif how == "slow":
                server.closing.wait(600)
            return how is not None

        def _refuse(self, code: int) -> None:
            text = {"code": code, "message": MESSAGES[code]}
            self._send(code, json.dumps(text).encode(), **{"Content-Type": "application/json"})

        def _send(self, code: int, body: bytes, *, cut: bool = False, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[FakeKaggle]:
    """Run a fake Kaggle on a free port for the length of a ``with`` block."""
    state = FakeKaggle()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()
