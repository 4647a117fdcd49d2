"""Reads moved experts in the background, while the server steps on.

A thread of its own reads one batch after the other into host memory; the thread that steps asks for
what is there and hands it to the engine. It reads an expert at a time and rests in between, as what
it takes of the cores and of the interpreter the steps lack. A batch that cannot be read is a result
too: nothing of it reaches the engine.
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

#: Reads what is to be loaded, in the same order: the weights, and the bytes that took.
Read = Callable[[Sequence[ExpertLoad]], tuple[list[Weights], int]]

#: After an expert the reader rests so many times as long as that took, but no longer than so many
#: seconds: large experts are read by threads that steps hardly notice.
REST, LONGEST_REST_S = 20.0, 0.2

#: What tensorstore, which reads for orbax, has read from files in this process.
_BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A batch that was read, or was not."""

    stage: Stage
    #: By (local device, slot).
    experts: dict[tuple[int, int], Weights]
    seconds: float
    bytes_read: int
    #: Why it was not; "": it was.
    why: str = ""


class Loader:
    """A thread that loads batches, in their order.

    Args:
        read: called in that thread; whatever it raises is the end of the batch, not of the thread.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._wanted: queue.SimpleQueue[Stage] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._dropped: set[int] = set()
        #: Batches that were begun and not handed out.
        self._open = 0
        threading.Thread(target=self._run, daemon=True, name="loader").start()

    @property
    def busy(self) -> bool:
        """Something is being read, or was read and not handed out."""
        return self._open > 0

    def begin(self, stage: Stage) -> None:
        """Loads a batch."""
        self._open += 1
        self._wanted.put(stage)

    def drop(self, number: int) -> None:
        """The batch is not wanted any more: it is not handed out."""
        self._dropped.add(number)

    def finished(self) -> list[Loaded]:
        """What was read since the last call; returns at once."""
        found = []
        while self._open:
            try:
                loaded = self._done.get_nowait()
            except queue.Empty:
                break
            self._open -= 1
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
                # Not as long as on other servers, so that one step does not wait for all readers.
                time.sleep(random.uniform(0.5, 1.5) * rest_s(time.monotonic() - began))
        except Exception as error:
            log.exception("batch %d cannot be loaded", stage.number)
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return Loaded(stage, {}, time.monotonic() - begin, 0, why)
        return Loaded(stage, experts, time.monotonic() - begin, size)


def rest_s(read_s: float) -> float:
    """Seconds of rest after an expert that took so long to read, in the mean."""
    return min(REST * read_s, LONGEST_REST_S)


def checkpoint_reader(checkpoint: Checkpoint, form: ExpertFormat) -> Read:
    """Reads experts from this machine's copy of the model.

    Args:
        checkpoint: that copy.
        form: of the pool.
    """

    def read(loads: Sequence[ExpertLoad]) -> tuple[list[Weights], int]:
        before = bytes_read()
        pairs = [(load.layer, load.expert) for load in loads]
        found = dict(checkpoint.experts(pairs, form))
        return [found[place] for place in range(len(pairs))], bytes_read() - before

    return read


def bytes_read() -> int:
    """Bytes that checkpoints of this process have read from files so far."""
    found = tensorstore.experimental_collect_matching_metrics(_BYTES_READ)
    return sum(int(each["value"]) for metric in found for each in metric["values"])
