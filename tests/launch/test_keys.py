"""The file with the keys of users."""

from __future__ import annotations

import pathlib

import pytest

from dance_jax.config import UserError
from dance_jax.launch.cluster import keys
from dance_jax.launch.cluster.keys import KeyFile


def test_a_file_that_changes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_S", 0.0)
    path = tmp_path / "keys"
    path.write_text("# of the team\none\n\n two \n")
    file = KeyFile(str(path))
    assert file.keys == ["one", "two"] and not file.changed()
    path.write_text("three\n")
    assert file.changed() and file.keys == ["three"] and not file.changed()
    for content, why in (("a b\n", "line 1: a key must be visible"), ("#\n", "has no key")):
        path.write_text(content)
        with pytest.raises(UserError, match=why):
            file.changed()
        assert file.keys == ["three"] and not file.changed()
    path.write_text("a\x1cb\n")
    with pytest.raises(UserError, match="must be visible"):
        file.changed()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        file.changed()
    with pytest.raises(UserError, match=r"--api-key-file .*keys: cannot be read"):
        KeyFile(str(path))
