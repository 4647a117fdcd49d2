"""The weights a server starts with, from the servers that have a copy of the model: both ends.

Names, shapes and dtypes follow from the model's config, which both have; only contents travel, in
the dtype that the engines compute in.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dance_jax.launch.worker.peers import Held, Like, Peers, WeightKind, WeightRequest
from dance_jax.models.build import fill
from dance_jax.models.checkpoint import Checkpoint, Outline
from dance_jax.models.config import ModelConfig
from dance_jax.models.experts import ExpertFormat, Weights
from dance_jax.models.formats import Formats
from dance_jax.models.trunk import Trunk

#: Bytes of an answer: so much is in memory twice, on both ends. A single weight may have more.
PORTION_BYTES = 32 << 20
#: Seconds between two looks whether a source has failed.
ARRIVAL_POLL_S = 0.05


class HeldWeights:
    """Where a server finds what others ask for.

    Args:
        checkpoint: its copy of the model; None: it has none.
        dtype: that the engines compute in.
    """

    def __init__(self, checkpoint: Checkpoint | None, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._shapes: list[tuple[str, jax.ShapeDtypeStruct]] = []
        #: Reads experts from the pool; None: it is not filled yet.
        self.held: Held | None = None
        #: One answer is read at a time.
        self._reading = threading.Lock()

    def find(self, question: WeightRequest) -> Sequence[np.ndarray]:
        """The answer to a question; from any thread.

        Raises:
            LookupError: it is not here.
            UserError: the copy of the model is torn.
        """
        if question.kind is WeightKind.HELD:
            if self.held is None:
                raise LookupError("it holds no experts yet")
            (expert,) = question.numbers
            return self.held(question.layer, expert)
        if self._checkpoint is None:
            raise LookupError("it has no copy of the model")
        with self._reading:
            if question.kind is WeightKind.TRUNK:
                return self._trunk(self._checkpoint, question.numbers)
            pairs = [(question.layer, expert) for expert in question.numbers]
            form = self._checkpoint.form(self._dtype)
            return form.stacked(len(pairs), self._checkpoint.experts(pairs, form))

    def _trunk(self, checkpoint: Checkpoint, numbers: Sequence[int]) -> list[np.ndarray]:
        self._shapes = self._shapes or _trunk_shapes(checkpoint, self._dtype)
        wanted = [self._shapes[number] for number in numbers]
        found = checkpoint.trunk_weights([name for name, _ in wanted])
        return [found[name].astype(shape.dtype, copy=False) for name, shape in wanted]


class PeerWeights(Outline):
    """What an engine needs of `models.checkpoint.Checkpoint`, read from other servers.

    Args:
        config: of the model.
        formats: how its weights are kept.
        peers: connections to all servers.
        sources: ranks of those that have a copy of the model, one at least.
    """

    def __init__(
        self, config: ModelConfig, formats: Formats, peers: Peers, sources: Sequence[int]
    ) -> None:
        super().__init__(config, formats)
        self._peers = peers
        # Servers that load at the same time begin with different ones.
        first = peers.rank % len(sources)
        self._sources = [*sources[first:], *sources[:first]]

    def trunk(self, dtype: str) -> Trunk:
        """As `Checkpoint.trunk`.

        Raises:
            OSError, LookupError: a server does not send its part.
        """
        forms = self.formats.computed_in(dtype).trunk
        return fill(self.config, dtype, self._trunk_weights(dtype), forms)

    def _trunk_weights(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        shapes = _trunk_shapes(self, dtype)
        sizes = [shape.size * shape.dtype.itemsize for _, shape in shapes]
        source = itertools.cycle(self._sources)
        for numbers in _portions(sizes, PORTION_BYTES):
            wanted = [shapes[number] for number in numbers]
            likes: list[Like] = [(shape.shape, shape.dtype) for _, shape in wanted]
            found = self._peers.ask(
                next(source), WeightRequest(WeightKind.TRUNK, 0, numbers), likes
            )
            yield from zip((name for name, _ in wanted), found, strict=True)

    def experts(
        self, pairs: Sequence[tuple[int, int]], form: ExpertFormat
    ) -> Iterator[tuple[int, Weights]]:
        """As `Checkpoint.experts`; all servers that have them send at the same time, each as many
        as its link allows.

        Raises:
            OSError, LookupError: a server does not send its part.
        """
        portions = queue.SimpleQueue[tuple[int, list[int]]]()
        for portion in _expert_portions(pairs, form.bytes):
            portions.put(portion)
        #: Of each source one portion may wait to be taken.
        arrived = queue.Queue[tuple[list[int], list[np.ndarray]]](len(self._sources))
        failed = threading.Event()

        def fetch(source: int) -> None:
            try:
                while not failed.is_set():
                    layer, rows = portions.get_nowait()
                    question = WeightRequest(
                        WeightKind.EXPERTS, layer, tuple(pairs[row][1] for row in rows)
                    )
                    likes: list[Like] = [
                        ((len(rows), *leaf.shape), leaf.dtype) for leaf in form.leaves.values()
                    ]
                    arrived.put((rows, self._peers.ask(source, question, likes)))
            except queue.Empty:
                return
            except BaseException:
                failed.set()  # the others need not go on
                raise

        with concurrent.futures.ThreadPoolExecutor(len(self._sources)) as threads:
            fetching = [threads.submit(fetch, source) for source in self._sources]
            while not (all(each.done() for each in fetching) and arrived.empty()):
                try:
                    rows, found = arrived.get(timeout=ARRIVAL_POLL_S)
                except queue.Empty:
                    continue
                for place, row in enumerate(rows):
                    yield row, tuple(array[place] for array in found)
            for each in fetching:
                each.result()


def _expert_portions(
    pairs: Sequence[tuple[int, int]], expert_bytes: int
) -> Iterator[tuple[int, list[int]]]:
    """Layers, and positions in `pairs` of some experts of theirs."""
    rows_of: dict[int, list[int]] = collections.defaultdict(list)
    for row, (layer, _) in enumerate(pairs):
        rows_of[layer].append(row)
    for layer, rows in rows_of.items():
        for portion in _portions([expert_bytes] * len(rows), PORTION_BYTES):
            yield layer, [rows[number] for number in portion]


def _trunk_shapes(model: Outline, dtype: str) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Name and shape of every array of the trunk; all servers have them in the same order."""
    return sorted(model.trunk_shapes(dtype).items())


def _portions(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Positions of `sizes` in their order, in groups with a sum within the limit where possible."""
    group: list[int] = []
    total = 0
    for number, size in enumerate(sizes):
        if group and total + size > limit:
            yield tuple(group)
            group, total = [], 0
        group.append(number)
        total += size
    if group:
        yield tuple(group)
