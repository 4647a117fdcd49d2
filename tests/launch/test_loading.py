"""The loader loads moved experts, and only those, in the background. Peers: see `test_peers`."""

from __future__ import annotations

import pathlib
import shutil
import threading

import numpy as np
import pytest

from dance_jax.config import UserError
from dance_jax.launch.control.protocol import ExpertLoad, Stage
from dance_jax.launch.worker.loading import Loaded, Loader, Read, checkpoint_reader
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.random_weights import write_random_checkpoint
from tests.stacks import stacked
from tests.tiny_models import DEEPSEEK

#: Large enough that the arrays' metadata are small in comparison.
WIDE = DEEPSEEK | {"hidden_size": 256, "moe_intermediate_size": 192}
LOADS = [ExpertLoad(0, 3, 0, 5, 1), ExpertLoad(1, 0, 1, 2, 2), ExpertLoad(0, 1, 1, 7, 1)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("wide")
    return Checkpoint.open(
        ensure_converted(write_random_checkpoint(folder / "hf", WIDE, seed=2), folder / "cache")
    )


def load(read: Read, loads: list[ExpertLoad], number: int = 1) -> Loaded:
    """A loader's result for one batch."""
    loader = Loader(read)
    loader.begin(Stage(number, [], loads))
    return first(loader)


def first(loader: Loader) -> Loaded:
    while not (found := loader.finished()):
        assert loader.busy
    (loaded,) = found
    assert not loader.busy
    return loaded


def test_only_what_moves_is_read(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint_reader(checkpoint, checkpoint.form("float32")), LOADS)
    assert loaded.why == "" and loaded.seconds > 0
    assert set(loaded.experts) == {(0, 3), (1, 0), (0, 1)}
    for each in LOADS:
        expected = stacked(checkpoint, [(each.layer, each.expert)])
        for ours, theirs in zip(loaded.experts[each.device, each.slot], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs[0])
    needed = len(LOADS) * checkpoint.expert_bytes("float32")
    assert 0.9 * needed < loaded.bytes_read < 1.1 * needed


def test_nothing_to_load_reads_nothing(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint_reader(checkpoint, checkpoint.form("float32")), [])
    assert (loaded.experts, loaded.bytes_read, loaded.why) == ({}, 0, "")


# Reads that run beside the failed one end after orbax has closed its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_torn_checkpoint(checkpoint: Checkpoint, tmp_path: pathlib.Path) -> None:
    """The batch fails with the file's name, and the next batch is loaded."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    torn = Checkpoint.open(copy)
    for path in (copy / "experts" / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            # Less than one array: the order of arrays in a file changes from run to run.
            path.write_bytes(path.read_bytes()[:10_000])
    loader = Loader(checkpoint_reader(torn, torn.form("float32")))
    loader.begin(Stage(1, [], LOADS))
    failed = first(loader)
    assert "damaged" in failed.why and str(copy) in failed.why and not failed.experts
    loader.begin(Stage(2, [], LOADS[:1]))
    assert first(loader).why == ""


def test_what_is_dropped_does_not_come() -> None:
    """A dropped batch is never delivered, whether its loading has begun or not."""
    begun, going = threading.Event(), threading.Event()

    def read(loads: object) -> tuple[list, int]:
        begun.set()
        going.wait()
        return [()], 0

    loader = Loader(read)
    for number in (1, 2, 3):
        loader.begin(Stage(number, [], LOADS[:1]))
    begun.wait()
    assert loader.finished() == [] and loader.busy
    loader.drop(1)
    loader.drop(2)
    going.set()
    assert first(loader).stage.number == 3


def test_there_is_no_such_expert(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="there is no expert 99"):
        checkpoint_reader(checkpoint, checkpoint.form("float32"))([ExpertLoad(0, 0, 0, 99, 0)])
