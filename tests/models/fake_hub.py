"""A small HTTP server that imitates the Hugging Face hub, and processes that use it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from dance_jax.config import UserError

#: The token that may read gated models.
TOKEN = "hf_good"
_RANGE = re.compile(r"bytes=([0-9]+)-")


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves directories of models, with as much of the hub's API as huggingface_hub uses.

    Models are added with `add`; the other attributes change how requests are answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        #: Directories by commit, by org/name.
        self.models: dict[str, dict[str, pathlib.Path]] = {}
        #: Commits by branch or tag, by org/name.
        self.refs: dict[str, dict[str, str]] = {}
        #: Models that need TOKEN.
        self.gated: set[str] = set()
        #: Models that no token may read.
        self.forbidden: set[str] = set()
        #: For a file, the number of bytes after which its connection is cut, once.
        self.cuts: dict[str, int] = {}
        #: For a file, an event for which the server waits in the middle of the file.
        self.holds: dict[str, threading.Event] = {}
        #: For a file, the size that the hub reports instead of the true one.
        self.sizes: dict[str, int] = {}
        #: (method, path, Range) of every request.
        self.requests: list[tuple[str, str, str | None]] = []
        #: Set when the server waits in the middle of a held file.
        self.held = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, directory: pathlib.Path, *revisions: str) -> str:
        """Add a commit with the content of a directory; returns the commit's hash."""
        known = self.models.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(known)}".encode()).hexdigest()
        known[commit] = directory
        self.refs.setdefault(repo, {}).update(dict.fromkeys(revisions or ("main",), commit))
        return commit

    def fetched(self) -> list[str]:
        """Names of the files that were downloaded, in order."""
        gets = [path.split("/", 4) for method, path, _ in self.requests if method == "GET"]
        return [parts[4] for parts in gets if parts[2:3] == ["resolve"]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        # Slashes within a revision are quoted.
        parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
        self.server.requests.append((self.command, "/".join(parts), self.headers["Range"]))
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo, kind, rest = "/".join(parts[:2]), (parts[2:] or ["revision"])[0], parts[3:]
        if repo not in self.server.models:
            return self._refuse(404, "RepoNotFound")
        if repo in self.server.forbidden:
            return self._refuse(403, "Forbidden")
        revision = rest[0] if rest else "main"
        commit = self.server.refs[repo].get(revision, revision)
        if commit not in self.server.models[repo]:
            return self._refuse(404, "RevisionNotFound")
        if kind == "revision":
            return self._json({"id": repo, "sha": commit, "siblings": []})
        if repo in self.server.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo")
        directory = self.server.models[repo][commit]
        if kind == "paths-info":
            wanted = urllib.parse.parse_qs(body)["paths"]
            files = {name: directory / name for name in wanted if (directory / name).exists()}
            return self._json(
                [
                    {
                        "type": "file",
                        "path": name,
                        "oid": "0" * 40,
                        "size": self.server.sizes.get(name, file.stat().st_size),
                    }
                    for name, file in files.items()
                ]
            )
        assert kind == "resolve", self.path
        self._file("/".join(rest[1:]), directory, commit)

    def _file(self, name: str, directory: pathlib.Path, commit: str) -> None:
        file = directory / name
        if not file.exists():
            return self._refuse(404, "EntryNotFound", commit)
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        begin = 0
        if match := _RANGE.fullmatch(self.headers["Range"] or ""):
            begin = int(match[1])
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(content) // 2
        if name in self.server.holds and not match:
            self.wfile.write(content[:half])
            self.wfile.flush()
            self.server.held.set()
            self.server.holds[name].wait(60)
            begin = half
        if (cut := self.server.cuts.pop(name, None)) is not None:
            self.wfile.write(content[begin:cut])
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):  # a client that is interrupted stops reading
            self.wfile.write(content[begin:])

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that answers until the end of the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def environment(hub: FakeHub, home: pathlib.Path, **variables: str) -> dict[str, str]:
    """Variables for a process that uses only this hub and caches files under `home`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
    } | variables


class Caller:
    """Calls functions of the package, each in a new process with its own environment variables.

    huggingface_hub reads the variables when it is imported. Because importing JAX takes seconds,
    the processes are forks of one that has imported slow modules but not huggingface_hub.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.models.fake_hub"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
        )

    def __call__(self, function: str, *arguments: str, variables: dict[str, str]) -> Any:
        """Call `module:function`; returns the result as text, or raises the same UserError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, arguments, variables]) + "\n")
        self._process.stdin.flush()
        returned, error = json.loads(self._process.stdout.readline())
        if error is not None:
            raise UserError(error)
        return returned

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _call(function: str, arguments: list[str], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    for name in [name for name, value in variables.items() if not value]:
        del os.environ[name]
    module, _, name = function.partition(":")
    try:
        result = str(getattr(importlib.import_module(module), name)(*arguments)), None
    except UserError as error:
        result = None, str(error)
    print(json.dumps(result), flush=True)


def _main() -> None:
    for module in ("dance_jax.models.tokenizer", "httpx2", "filelock", "tqdm.auto", "yaml"):
        importlib.import_module(module)
    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _call(*json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main()
