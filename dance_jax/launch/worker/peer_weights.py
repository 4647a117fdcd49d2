"""Initial weights for servers without a copy of the model, from servers that have one: both ends.

Names, shapes and dtypes follow from the model's config, which both ends have; only contents are
sent, in the dtype that the engines compute in.
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

#: Bytes of an answer, held in memory on both ends; a single larger weight is not split.
PORTION_BYTES = 32 << 20
#: Seconds between two checks whether a source has failed.
ARRIVAL_POLL_S = 0.05


class HeldWeights:
    """Finds the weights that other servers ask for.

    Args:
        checkpoint: this server's copy of the model; None if it has none.
        dtype: the dtype that the engines compute in.
    """

    def __init__(self, checkpoint: Checkpoint | None, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._shapes: list[tuple[str, jax.ShapeDtypeStruct]] = []
        #: Reads experts from the pool; None until the pool is filled.
        self.held: Held | None = None
        #: Serialises the reading of answers.
        self._reading = threading.Lock()

    def find(self, question: WeightRequest) -> Sequence[np.ndarray]:
        """Answer a question; may be called by any thread.

        Raises:
            LookupError: this server does not have the weights.
            UserError: the copy of the model is damaged.
        """
        if question.kind is WeightKind.HELD:
            if self.held is None:
                raise LookupError("the server holds no experts yet")
            (expert,) = question.numbers
            return self.held(question.layer, expert)
        if self._checkpoint is None:
            raise LookupError("the server has no copy of the model")
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
    """The part of `models.checkpoint.Checkpoint` that an engine needs, read from other servers.

    Args:
        config: of the model.
        formats: formats of the model's weights.
        peers: connections to all servers.
        sources: ranks of the servers with a copy of the model; at least one.
    """

    def __init__(
        self, config: ModelConfig, formats: Formats, peers: Peers, sources: Sequence[int]
    ) -> None:
        super().__init__(config, formats)
        self._peers = peers
        # Servers that load at the same time start with different sources.
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
        """As `Checkpoint.experts`.

        All sources send at the same time, each as many experts as its link allows. The others send
        the part of a source that is gone.

        Raises:
            OSError, LookupError: no server sends a part.
        """
        portions = queue.SimpleQueue[tuple[int, list[int]]]()
        for portion in _expert_portions(pairs, form.bytes):
            portions.put(portion)
        sources = self._sources
        while not portions.empty():
            gone: list[int] = []
            yield from self._fetch(pairs, form, sources, portions, gone)
            sources = [source for source in sources if source not in gone]

    def _fetch(
        self,
        pairs: Sequence[tuple[int, int]],
        form: ExpertFormat,
        sources: Sequence[int],
        portions: queue.SimpleQueue[tuple[int, list[int]]],
        gone: list[int],
    ) -> Iterator[tuple[int, Weights]]:
        """Fetch portions from all sources; the portion of a source that is gone is put back.

        Args:
            gone: gets the sources that are gone.

        Raises:
            OSError: all sources are gone.
            LookupError: a source does not send its part.
        """
        #: Each source may have one portion waiting here.
        arrived = queue.Queue[tuple[list[int], list[np.ndarray]]](len(sources))
        failed = threading.Event()

        def fetch(source: int) -> None:
            while not failed.is_set():
                try:
                    portion = layer, rows = portions.get_nowait()
                except queue.Empty:
                    return
                question = WeightRequest(
                    WeightKind.EXPERTS, layer, tuple(pairs[row][1] for row in rows)
                )
                likes: list[Like] = [
                    ((len(rows), *leaf.shape), leaf.dtype) for leaf in form.leaves.values()
                ]
                try:
                    arrived.put((rows, self._peers.ask(source, question, likes)))
                except OSError:
                    portions.put(portion)
                    gone.append(source)
                    if len(gone) == len(sources):
                        raise
                    return
                except BaseException:
                    failed.set()  # the other threads stop early
                    raise

        with concurrent.futures.ThreadPoolExecutor(len(sources)) as threads:
            fetching = [threads.submit(fetch, source) for source in sources]
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
    """Group pairs into portions: the layer, and positions in `pairs` of experts of that layer."""
    rows_of: dict[int, list[int]] = collections.defaultdict(list)
    for row, (layer, _) in enumerate(pairs):
        rows_of[layer].append(row)
    for layer, rows in rows_of.items():
        for portion in _portions([expert_bytes] * len(rows), PORTION_BYTES):
            yield layer, [rows[number] for number in portion]


def _trunk_shapes(model: Outline, dtype: str) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    """Name and shape of every array of the trunk, in the same order on all servers."""
    return sorted(model.trunk_shapes(dtype).items())


def _portions(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, ...]]:
    """Group positions of `sizes`, in order, such that sums stay within the limit if possible."""
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
