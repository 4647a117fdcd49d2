"""Config and tokenizer for servers without a copy of the model, and how setups reach servers."""

from __future__ import annotations

import os
import pathlib
import threading

import msgspec
import numpy as np
import pytest

from dance_jax.config import EngineConfig, Rounding, ServerSpec, UserError
from dance_jax.launch.agent import child, model_files
from dance_jax.launch.agent.model_files import ModelFiles, pack
from dance_jax.launch.agent.process import ChildProcess
from dance_jax.launch.control.protocol import Setup
from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.launch.worker.main import _open_model
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import convert
from dance_jax.models.directory import FORMATS, SIDE_FILES, read_config
from tests.launch.tiny import HOSTS, write_model


def setup_with(files: bytes, model: str = "") -> Setup:
    return Setup(
        spec=parse_hosts(HOSTS),
        rank=2,
        config=EngineConfig(64),
        model=model,
        model_files=files,
        fingerprint="f00d",
        experts="float32",
        layout=b"",
        control="",
        control_key=b"",
        key=b"",
        first_gpu=0,
        coordinator_port=0,
        machine_devices=(1, 1, 2),
        machine_index=2,
        cache_dir=None,
        beats=False,
    )


def test_they_are_there_until_they_are_closed(tmp_path: pathlib.Path) -> None:
    source, private = write_model(tmp_path / "source"), tmp_path / "private"
    model = convert(source, tmp_path / "model", rounding=Rounding("int4", "int8"))
    private.mkdir()
    sent = msgspec.json.encode(setup_with(pack(model)))
    files = ModelFiles(msgspec.json.decode(sent, type=Setup), str(private))
    (directory,) = private.iterdir()
    there = {path.name: path.read_bytes() for path in directory.iterdir()}
    names = [n for n in (*SIDE_FILES, FORMATS) if (model / n).exists()]
    assert there == {n: (model / n).read_bytes() for n in names}
    assert FORMATS in there
    config, tokenizer = files.read()
    assert config == read_config(model)
    formats = files.formats()
    assert formats == Checkpoint.open(model).formats
    assert str(formats.experts["w_up"]) == "int4:32:bfloat16"
    assert tokenizer.decode(tokenizer.encode("Es war")) == "Es war"
    files.close()
    assert list(private.iterdir()) == []
    files.close()


def test_nobody_reads_them(tmp_path: pathlib.Path) -> None:
    files = ModelFiles(setup_with(pack(write_model(tmp_path / "model"))), str(tmp_path))
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_server_with_a_copy_reads_that(tmp_path: pathlib.Path) -> None:
    model = write_model(tmp_path / "model")
    config, _ = ModelFiles(setup_with(b"", str(model)), str(tmp_path)).read()
    assert config == read_config(model)
    assert model.exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_that_are_not_small(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_BYTES", 1 << 16)
    (tmp_path / "tokenizer.json").write_bytes(np.random.default_rng(0).bytes(1 << 17))
    with pytest.raises(
        UserError, match=r"checkpoint=peer .* give these servers a copy of the model"
    ):
        pack(tmp_path)


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (b"\n\n{1}\n\n\n", b"{1}"),
        (b"{" + b"2" * 300_000 + b"}\n\n", b"{" + b"2" * 300_000 + b"}"),
        (b"\n{3", b""),  # the parent was killed while writing
        (b"", b""),
    ],
)
def test_a_setup_between_signs_of_life(written: bytes, line: bytes) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb") as pipe:
            pipe.write(written)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert child._read_line(reading) == line
    finally:
        os.close(reading)
        thread.join()


def test_nobody_waits_until_a_setup_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent does not wait for a process that reads late; the setup arrives complete."""
    gate, line = tmp_path / "gate", b"x" * (1 << 20)
    os.mkfifo(gate)
    opened = os.open(gate, os.O_RDWR)
    (tmp_path / "late.py").write_text(
        f"import sys; open({str(gate)!r}).read(1); print(len(sys.stdin.read()))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = ChildProcess(ServerSpec("late", ""), "late", log_path=tmp_path / "log")
    process.write(line)
    process.let_go()
    os.write(opened, b"!")
    assert process.popen.wait(60) == 0
    os.close(opened)
    assert (tmp_path / "log").read_text() == f"{len(line) + 1}\n"


def test_a_copy_in_another_format_of_experts_is_refused(tmp_path: pathlib.Path) -> None:
    """Even of the same model: answers to calls are only the same with one expert format."""
    source = write_model(tmp_path / "source")
    convert(source, tmp_path / "model", rounding=Rounding("int4", "int8"))
    setup = setup_with(b"", str(tmp_path / "model"))
    with pytest.raises(UserError) as error:
        _open_model(setup, tmp_path, channel=None)  # type: ignore[arg-type]
    words = f"{tmp_path / 'model'}: its experts have the format int4:32:bfloat16, but those of the "
    assert str(error.value).startswith(
        f"{words}launch have float32; all servers need the same format: convert"
    )
