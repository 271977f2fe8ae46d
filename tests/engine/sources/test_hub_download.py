"""A model fetched by the hub's own client from a server of the hub's protocol on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.models import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEVER_WANTED = {"modeling_llama.py": b"raise SystemExit", "pytorch_model.bin": b"\x80pickle"}
PROGRAM = "import sys; from engine.models import resolve; print(resolve(sys.argv[1]))"
TIMEOUT = 120  # seconds, for one child


class Hub(ThreadingHTTPServer):
    """Serves one repository, org/toy, and refuses two: org/gated and everything else."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The three requests that a download makes: what is there, what of it is new, the bytes."""

    server: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        """Silent."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if "org/gated" in path:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"}, with_body)
        elif path.startswith(("/api/models/org/toy/revision/", "/api/models/org/toy")):
            names = [{"rfilename": name} for name in sorted(self.server.files)]
            facts = {"id": "org/toy", "sha": COMMIT, "siblings": names, "private": False}
            if "/tree/" in path:
                facts = [
                    {"type": "file", "path": n, "size": len(b), "oid": COMMIT}
                    for n, b in self.server.files.items()
                ]
            self._send(200, json.dumps(facts).encode(), {}, with_body)
        elif path.startswith("/org/toy/resolve/"):
            name = path.split("/", 5)[5]
            body = self.server.files[name]
            if with_body:
                self.server.fetched.append(name)
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self._send(200, body, {"X-Repo-Commit": COMMIT, "ETag": etag}, with_body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def toy() -> Path:
    return resolve("toy")


@pytest.fixture
def hub(toy: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in toy.iterdir() if path.is_file()}
    server = Hub({**files, **NEVER_WANTED})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(name: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess:
    """Resolves a name in a process whose hub is `endpoint`: the client reads it when imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", **more}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_a_repository_is_fetched_without_its_code_and_pickles(hub: Hub, toy: Path, tmp_path: Path):
    done = fetch("org/toy", hub.url, tmp_path)

    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.splitlines()[-1])
    assert (directory / "config.json").read_bytes() == (toy / "config.json").read_bytes()
    assert (directory / "model.safetensors").read_bytes() == (
        toy / "model.safetensors"
    ).read_bytes()
    assert not NEVER_WANTED.keys() & {path.name for path in directory.iterdir()}
    assert not NEVER_WANTED.keys() & set(hub.fetched)


def test_a_fetched_repository_serves_without_a_connection(hub: Hub, tmp_path: Path):
    online = fetch("org/toy", hub.url, tmp_path)
    hub.files.clear()  # whoever asks for a file now gets none
    offline = fetch("org/toy", hub.url, tmp_path, HF_HUB_OFFLINE="1")

    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/gated", "org/gated: access is gated: accept its licence on its page"),
        ("org/missing", "org/missing: no such repository on the hub"),
    ],
)
def test_a_refusal_says_why(hub: Hub, tmp_path: Path, name: str, expected: str):
    done = fetch(name, hub.url, tmp_path)

    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]


def test_a_hub_that_nobody_reaches_is_said_so(tmp_path: Path):
    done = fetch("org/toy", "http://127.0.0.1:9", tmp_path)

    assert done.returncode == 1
    assert "org/toy: not in the local cache, and the hub cannot be reached" in done.stderr
