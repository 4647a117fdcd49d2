"""Activation statistics and their file."""

import numpy as np
import pytest

from dance_jax.config import UserError
from dance_jax.placement.activations import Activations


def example(routes=True):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (3, 2, 5))
    chosen = tuple(rng.integers(0, 5, (tokens, 2, 2)) for tokens in (4, 0, 7))
    return Activations(("a", "b", "c"), counts, "hash", chosen if routes else ())


@pytest.mark.parametrize("routes", [True, False])
def test_file_round_trip(tmp_path, routes):
    saved = example(routes)
    saved.save(tmp_path / "activations.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["activations.npz"]
    loaded = Activations.load(tmp_path / "activations.npz")
    assert (loaded.servers, loaded.model) == (("a", "b", "c"), "hash")
    assert loaded.counts.dtype == np.int64 and (loaded.counts == saved.counts).all()
    assert [r.dtype for r in loaded.routes] == [np.int16] * (3 if routes else 0)
    for got, want in zip(loaded.routes, saved.routes, strict=True):
        assert (got == want).all() and got.shape == want.shape


def test_for_servers_reorders_and_names_the_absent():
    chosen = example().for_servers(["c", "a"])
    assert chosen.servers == ("c", "a")
    assert (chosen.counts == example().counts[[2, 0]]).all()
    assert [len(route) for route in chosen.routes] == [7, 4]
    with pytest.raises(UserError, match="server x, y; there are some for a, b, c"):
        example().for_servers(["x", "a", "y"])


def test_check_model():
    example().check_model("hash", 2, 5)
    with pytest.raises(UserError, match="2 MoE layers of 5 experts, not of 2 x 6"):
        example().check_model("hash", 2, 6)
    with pytest.raises(UserError, match="another model"):
        example().check_model("other", 2, 5)


def test_unreadable_files(tmp_path):
    path = tmp_path / "file.npz"
    with pytest.raises(UserError, match=r"file\.npz"):
        Activations.load(path)
    example().save(path)
    torn = path.read_bytes()[:100]
    for content in (torn, b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"file\.npz"):
            Activations.load(path)


def test_missing_unknown_and_inconsistent_keys(tmp_path):
    path = tmp_path / "file.npz"
    arrays = {"servers": np.array(["a"]), "counts": np.ones((1, 2, 5), int), "model": "hash"}
    np.savez(path, servers=arrays["servers"], counts=arrays["counts"])
    with pytest.raises(UserError, match=r"file\.npz: missing model"):
        Activations.load(path)
    np.savez(path, **arrays, extra=np.ones(1))
    with pytest.raises(UserError, match=r"file\.npz: unknown extra"):
        Activations.load(path)
    np.savez(path, **arrays, routes_0=np.full((1, 2, 2), 5))
    with pytest.raises(UserError, match=r"file\.npz: .* routes of server a .* 0\.\.4"):
        Activations.load(path)
    np.savez(path, **(arrays | {"servers": np.array(["a", "b"])}))
    with pytest.raises(UserError, match=r"file\.npz: .* shape \(1, 2, 5\)"):
        Activations.load(path)


@pytest.mark.parametrize(
    ("servers", "counts", "routes", "message"),
    [
        (("a", "a"), np.ones((2, 1, 3), int), (), "repeated"),
        (("a",), np.full((1, 1, 3), -1), (), "negative"),
        (("a",), np.ones((1, 1, 3)), (), "integers"),
        (("a", "b"), np.ones((2, 1, 3), int), (np.zeros((1, 1, 1), int),), "1 arrays of routes"),
        (("a",), np.ones((1, 1, 3), int), (np.zeros((1, 2, 1), int),), "1 layers"),
    ],
)
def test_malformed_inputs(servers, counts, routes, message):
    with pytest.raises(UserError, match=message):
        Activations(servers, counts, "", routes)
