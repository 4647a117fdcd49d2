"""Read moved experts in the background while the server steps.

A separate thread reads one batch after the other into host memory; the stepping thread polls for
finished batches and hands them to the engine. The reader rests after each expert, because it takes
cores and interpreter time from the steps. A batch that cannot be read is also a result: none of its
experts reaches the engine.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import tensorstore

from dance_jax.config import UserError
from dance_jax.launch.control.protocol import ExpertLoad, Stage
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.experts import ExpertFormat, Weights

log = logging.getLogger("dance_jax.loading")

#: Reads the given experts, in the same order; returns the weights and the bytes that were read.
Read = Callable[[Sequence[ExpertLoad]], tuple[list[Weights], int]]

#: After an expert, the reader rests REST times as long as reading took, but at most LONGEST_REST_S
#: seconds: large experts are read by threads that hardly disturb the steps.
REST, LONGEST_REST_S = 20.0, 0.2

#: Metric of tensorstore, which reads files for orbax: bytes read in this process.
_BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The result of reading a batch."""

    stage: Stage
    #: By (local device, slot).
    experts: dict[tuple[int, int], Weights]
    seconds: float
    bytes_read: int
    #: Why the batch could not be read; "": it was read.
    why: str = ""


class Loader:
    """A thread that loads batches in order.

    Args:
        read: called in that thread; an exception ends the batch, not the thread.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._wanted: queue.SimpleQueue[Stage] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._dropped: set[int] = set()
        #: Numbers of the batches that were begun and not yet returned by `finished`.
        self._open: set[int] = set()
        threading.Thread(target=self._run, daemon=True, name="loader").start()

    @property
    def busy(self) -> bool:
        """Whether a batch is being read, or is read and not yet returned by `finished`."""
        return bool(self._open)

    def begin(self, stage: Stage) -> None:
        """Start to load a batch."""
        self._open.add(stage.number)
        self._wanted.put(stage)

    def drop(self, number: int) -> None:
        """Discard a batch: `finished` will not return it."""
        self._dropped.add(number)

    def drop_all(self) -> None:
        """Discard all batches that were begun."""
        self._dropped |= self._open

    def finished(self) -> list[Loaded]:
        """The batches read since the last call; does not wait."""
        found = []
        while self._open:
            try:
                loaded = self._done.get_nowait()
            except queue.Empty:
                break
            self._open.discard(loaded.stage.number)
            if loaded.stage.number not in self._dropped:
                found.append(loaded)
        return found

    def _run(self) -> None:
        while True:
            stage = self._wanted.get()
            self._done.put(self._load(stage))

    def _load(self, stage: Stage) -> Loaded:
        begin = time.monotonic()
        experts: dict[tuple[int, int], Weights] = {}
        size = 0
        try:
            for load in stage.loads:
                if stage.number in self._dropped:
                    break
                began = time.monotonic()
                (weights,), read = self._read([load])
                experts[load.device, load.slot] = weights
                size += read
                if not stage.urgent:
                    # Random, so that a step does not have to wait for the readers of all servers.
                    time.sleep(random.uniform(0.5, 1.5) * rest_s(time.monotonic() - began))
        except Exception as error:
            log.exception("batch %d cannot be loaded", stage.number)
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Loaded(stage, {}, time.monotonic() - begin, 0, why)
        return Loaded(stage, experts, time.monotonic() - begin, size)


def rest_s(read_s: float) -> float:
    """Mean seconds of rest after an expert that took `read_s` to read."""
    return min(REST * read_s, LONGEST_REST_S)


def checkpoint_reader(checkpoint: Checkpoint, form: ExpertFormat) -> Read:
    """Make a reader of experts in this machine's copy of the model.

    Args:
        checkpoint: that copy.
        form: format of the pool.
    """

    def read(loads: Sequence[ExpertLoad]) -> tuple[list[Weights], int]:
        before = bytes_read()
        pairs = [(load.layer, load.expert) for load in loads]
        found = dict(checkpoint.experts(pairs, form))
        return [found[place] for place in range(len(pairs))], bytes_read() - before

    return read


def bytes_read() -> int:
    """Bytes that the checkpoints of this process have read from files so far."""
    found = tensorstore.experimental_collect_matching_metrics(_BYTES_READ)
    return sum(int(each["value"]) for metric in found for each in metric["values"])
