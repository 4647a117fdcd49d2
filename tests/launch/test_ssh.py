"""Commands for remote servers: what ssh is given, and what the remote shell makes of it."""

from __future__ import annotations

import shlex
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from dance_jax.config import ServerSpec, SshTarget
from dance_jax.launch.agent.command import _quoted, server_command


def test_a_server_here_needs_no_ssh() -> None:
    server = ServerSpec("a", "localhost", python="/v/bin/python")
    assert server_command(server, "x.y") == ["/v/bin/python", "-m", "x.y"]
    assert server_command(ServerSpec("a", "localhost"), "x.y")[0] == sys.executable


def test_ssh_asks_nothing_and_reads_no_option_from_a_field(tmp_path) -> None:
    server = ServerSpec("a", "10.0.0.1", ssh=SshTarget("10.0.0.1", "me", 2222))
    *options, command = server_command(server, "x.y", tmp_path / "config")
    assert options[:3] == ["ssh", "-F", str(tmp_path / "config")]
    assert "BatchMode=yes" in options
    assert options[-6:] == ["-l", "me", "-p", "2222", "--", "10.0.0.1"]
    assert shlex.split(command)[-3:] == [sys.executable, "-m", "x.y"]


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=4))
def test_words_reach_the_program_as_they_are(words: list[str]) -> None:
    """Through the login shell that sshd starts, and our own shell inside that."""
    program = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode())"
    line = _quoted([sys.executable, "-I", "-S", "-c", program, *words])
    done = subprocess.run(["sh", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode() == "\0".join(words)


def test_a_signal_becomes_an_exit_status() -> None:
    line = _quoted(["sh", "-c", "kill -9 $$"])
    assert subprocess.run(["sh", "-c", line], capture_output=True).returncode == 128 + 9
    assert subprocess.run(["sh", "-c", _quoted(["sh", "-c", "exit 3"])]).returncode == 3
