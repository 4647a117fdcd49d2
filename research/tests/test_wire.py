"""Test of research/wire.py on a tiny model."""

from __future__ import annotations

import json
import pathlib

import pytest

from research import wire
from tests.launch.tiny import write_model


@pytest.mark.slow
def test_rows_of_the_table(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other types are compared with float32; int8 rounds the rows that leave a server."""
    monkeypatch.setattr(wire, "WINDOW", 32)
    texts = []
    for n in range(3):
        texts.append(tmp_path / f"{n}.jsonl")
        lines = [json.dumps({"prompt": f"{n} {k} are numbers, and so on"}) for k in range(3)]
        texts[-1].write_text("\n".join(lines))
    arguments = ["--model", write_model(tmp_path / "model"), "--texts", *texts]
    assert wire.main([*map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "3 servers" in printed and "of expert calls are remote" in printed
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed.splitlines()
        if line.startswith("│")
    ]
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    assert rows[0][2] == "100.00%"
    bits = [float(row[1]) for row in rows]
    assert len(set(bits)) == 3 and max(bits) - min(bits) < 0.01
    assert int(rows[0][3]) > int(rows[1][3]) > int(rows[2][3])
