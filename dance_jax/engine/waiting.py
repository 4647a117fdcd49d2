"""The order in which waiting sequences are admitted: round robin between clients."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterator

from dance_jax.engine.sequence import Sequence


class WaitingQueue:
    """The sequences that wait to be admitted.

    Sequences with a turn come first, in the order of their turns: they were preempted, or resumed
    from an earlier engine. The others follow round robin: each client in turn has its oldest
    sequence admitted. So a client waits for at most one sequence of each other client before its
    own next one, however many the others have. One client alone is served first come, first served.
    """

    def __init__(self) -> None:
        self._turns = 0
        #: Heap of (turn, sequence).
        self._begun: list[tuple[int, Sequence]] = []
        #: Per client with a new sequence, those sequences, oldest first; the next client is first.
        self._new: collections.OrderedDict[str, collections.deque[Sequence]] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._begun) + sum(map(len, self._new.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, in any order."""
        yield from (sequence for _, sequence in self._begun)
        for sequences in self._new.values():
            yield from sequences

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence; one with output goes before those without."""
        if sequence.output_token_ids:
            sequence.turn = self._next_turn()
            self.put_back(sequence)
        else:
            self._new.setdefault(sequence.client, collections.deque()).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a sequence that has its turn already."""
        heapq.heappush(self._begun, (sequence.turn, sequence))

    def first(self) -> Sequence:
        """The sequence to admit next; there must be one."""
        if self._begun:
            return self._begun[0][1]
        return next(iter(self._new.values()))[0]

    def take_first(self) -> None:
        """Remove `first()`, which is admitted now, and give it its turn if it has none."""
        if self._begun:
            heapq.heappop(self._begun)
            return
        client, sequences = next(iter(self._new.items()))
        sequences.popleft().turn = self._next_turn()
        self._new.move_to_end(client)
        if not sequences:
            del self._new[client]

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence.

        Raises:
            ValueError: the sequence does not wait.
        """
        if sequence.turn >= 0:
            self._begun.remove((sequence.turn, sequence))
            heapq.heapify(self._begun)
            return
        sequences = self._new.get(sequence.client, collections.deque())
        sequences.remove(sequence)
        if not sequences:
            del self._new[sequence.client]

    def _next_turn(self) -> int:
        self._turns += 1
        return self._turns - 1
