"""Files appear whole or not at all, and never replace a device."""

from __future__ import annotations

import os
import pathlib
import threading

import pytest

from dance_jax.files import whole_file


def test_a_file_appears_when_it_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_symlink_stays_one(tmp_path: pathlib.Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write(b"x")
    assert link.is_symlink() and target.read_text() == "x"


def test_a_pipe_is_written_to(tmp_path: pathlib.Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with whole_file(pipe) as file:
        file.write(b"x")
    reader.join(10)
    assert got == [b"x"] and pipe.is_fifo()
