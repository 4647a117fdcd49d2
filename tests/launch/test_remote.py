"""Launches over ssh (a fake one): the same answers, and nothing left on any host."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator

import psutil
import pytest

from dance_jax.launch.control.channel import ALIVE_TIMEOUT_S
from tests.launch.cold_run import Tiny
from tests.launch.fake_ssh import FakeSsh
from tests.launch.launched import (
    completion,
    eventually,
    free_ports,
    gone,
    in_order,
    kill_all,
    only_child,
)
from tests.launch.test_cluster import many_prompts
from tests.launch.tiny import HOSTS

#: Seconds within which everything must end, on every host.
PATIENCE_S = 10
#: Seconds of a pause, such as a suspended machine's.
PAUSE_S = 6


class Blind:
    """A Python that, like all its children, cannot open files in some directories."""

    def __init__(self, ssh: FakeSsh, directories: list[pathlib.Path]) -> None:
        folder = ssh.folder / "blind"
        folder.mkdir()
        self._log = folder / "log"
        (folder / "sitecustomize.py").write_text(
            textwrap.dedent(f"""\
                import os, sys

                def look(event, arguments):
                    if event in ("open", "os.scandir", "os.listdir"):
                        path = arguments[0]
                        if isinstance(path, (str, os.PathLike)):
                            if os.path.realpath(path).startswith({(*map(str, directories),)!r}):
                                note(f"opened {{path}}")
                                raise PermissionError(path)

                def note(text):
                    with open({str(self._log)!r}, "a") as log:
                        log.write(f"{{text}}\\n")

                note(f"{{sys.orig_argv[1:3]}} {{os.getpid()}}")
                sys.addaudithook(look)
                """)
        )
        self.python = ssh.python("blind-python", PYTHONPATH=f"{folder}:$PYTHONPATH")

    def count(self, module: str) -> int:
        """How many processes ran this module. Asserts that they opened nothing forbidden."""
        text = self._log.read_text()
        assert "opened" not in text, text
        # A server's process re-executes itself once, for its memory settings (memory.py).
        return len({line for line in text.splitlines() if f"{['-m', module]}" in line})


class Remote:
    """A launch of the tiny cluster with its servers behind ssh."""

    def __init__(self, tiny: Tiny, folder: pathlib.Path) -> None:
        self.ssh = FakeSsh(folder / "ssh")
        self.output = folder / "terminal"
        #: Temporary files of the launch. If it is killed, no server removes them: all are remote.
        self.private = folder / "tmp"
        self.private.mkdir()
        lines = [line for line in HOSTS.splitlines() if "address=" in line]
        self.blind = Blind(self.ssh, [tiny.folder / "model", tiny.folder / "cache" / "models"])
        hosts = folder / "hosts.txt"
        hosts.write_text(
            "\n".join(
                line.replace(
                    "address=localhost",
                    f"address=127.0.0.{n + 1} ssh=me@host-{n}"
                    + f" python={self.blind.python}" * ("checkpoint=peer" in line),
                )
                for n, line in enumerate(lines)
            )
        )
        self._command = tiny.command("--policy", "uniform", "--control-address", "127.0.0.1")
        self._command[self._command.index("--hosts") + 1] = str(hosts)
        self.process: psutil.Popen | None = None

    def start(self, *options: str | os.PathLike[str]) -> psutil.Popen:
        with open(self.output, "wb") as output:
            self.process = psutil.Popen(
                [*self._command, *map(str, options)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"PATH": self.ssh.path, "COLUMNS": "200", "TMPDIR": str(self.private)},
            )
        return self.process

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        assert eventually(lambda: text in self.text, seconds), self.text

    @property
    def workers(self) -> list[psutil.Process]:
        """All processes that run a server, on both sides of ssh."""
        assert self.process is not None
        return self.process.children(recursive=True)

    def worker(self, rank: int) -> psutil.Process:
        """The process of a server."""
        assert self.process is not None
        over_ssh = in_order(self.process.children())[rank]
        below = over_ssh.children(recursive=True)
        return next(each for each in below if "-m" in each.cmdline() and each.name() != "sh")


@pytest.fixture
def remote(tiny: Tiny, tmp_path: pathlib.Path) -> Iterator[Remote]:
    remote = Remote(tiny, tmp_path)
    yield remote
    if remote.process is not None and remote.process.is_running():
        kill_all([*remote.workers, remote.process])
        remote.process.wait()


@pytest.mark.slow  # the testbed compares the answers of a batch over real ssh in each CI run
def test_servers_over_ssh_give_the_same(tiny: Tiny, remote: Remote, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    prompts = tiny.folder / "prompts.jsonl"
    process = remote.start("--prompts", prompts, "--max-tokens", "8", "--output", output)
    remote.wait_for("alpha: ready")
    workers = remote.workers
    assert process.wait(120) == 0, remote.text
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not alive
    assert "preflight: all servers can work together" in remote.text
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for line, before in zip(lines, tiny.lines, strict=True):
        assert {**line, "metrics": None} == {**before, "metrics": None}
    assert remote.blind.count("dance_jax.launch.worker.main") == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill launch", "interrupt", "kill worker", "freeze launch"])
def test_all_hosts_are_left_clean(how: str, remote: Remote, tmp_path: pathlib.Path) -> None:
    """To servers, a frozen launch looks like a broken network: no sign of life arrives."""
    process = remote.start("--prompts", many_prompts(tmp_path))
    remote.wait_for(" | ")
    workers = remote.workers
    if how == "kill worker":
        remote.worker(1).kill()
    else:
        names = {
            "interrupt": signal.SIGINT,
            "kill launch": signal.SIGKILL,
            "freeze launch": signal.SIGSTOP,
        }
        process.send_signal(names[how])
    # A launch that is only suspended is waited for.
    silence_s = ALIVE_TIMEOUT_S if how == "freeze launch" else 0.0
    assert gone(workers, silence_s + PATIENCE_S)
    process.send_signal(signal.SIGCONT)
    code = process.wait(PATIENCE_S)
    assert code == {"interrupt": 130, "kill launch": -signal.SIGKILL}.get(how, 1), remote.text
    assert how == "kill launch" or not list(remote.private.iterdir())
    if how == "kill worker":
        assert re.search(r"server beta \(process \d+\) was killed by signal 9", remote.text)


@pytest.mark.slow
def test_servers_over_ssh_serve(tiny: Tiny, remote: Remote) -> None:
    """Servers go on when an engine dies, and when the launch pauses."""
    port = free_ports(3)
    process = remote.start("--port", str(port))
    remote.wait_for("curl ")
    urls = [f"http://127.0.0.1:{port + rank}" for rank in range(3)]
    expected = tiny.lines[0]["text"]
    assert [completion(url) for url in urls] == [expected] * 3
    engine = only_child(remote.worker(1))
    engine.kill()
    remote.wait_for(f"beta: its engine (process {engine.pid}) was killed by signal 9")
    remote.wait_for("all engines are running again")
    assert [completion(url) for url in urls] == [expected] * 3
    assert remote.blind.count("dance_jax.serve.frontend") == 1
    assert remote.blind.count("dance_jax.launch.worker.main") == 1  # gamma's has not ended
    process.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    process.send_signal(signal.SIGCONT)
    assert [completion(url) for url in urls] == [expected] * 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, remote.text


def test_a_host_that_lacks_the_model_starts_nothing(remote: Remote, tmp_path) -> None:
    path = remote.ssh.folder.parent / "hosts.txt"
    path.write_text(path.read_text().replace("ssh=me@host-1", "ssh=me@host-1 model=/no/model"))
    process = remote.start("--prompts", many_prompts(tmp_path))
    assert process.wait(60) == 2
    assert "/no/model" in remote.text and "beta" in remote.text
    assert "preparing" not in remote.text, "no server was started"
