"""The KV blocks of one device: who uses each, and which prompt prefixes they hold.

A block is in use (referenced by sequences), cached (by none, but what it holds may be wanted again)
or free. Only full blocks are published, and nothing writes into them any more, so sequences share
them without copies.
"""

from __future__ import annotations

import array
import collections
import hashlib


class BlockPool:
    """Blocks 1..num_blocks; block 0 is the step's scratch and is never handed out.

    Args:
        num_blocks: blocks that can be handed out.
        block_size: positions of each.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        #: How many sequences hold each block.
        self._refs = [0] * (num_blocks + 1)
        self._free = list(range(num_blocks, 0, -1))
        #: Published blocks that nobody holds, the one released longest ago first.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        #: What each full block holds: its tokens and all before them.
        self._content: dict[int, bytes] = {}
        #: The published block of each content. Of two with equal content one is published.
        self._published: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds, but whose content can be found."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return self.free + self.cached

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.available

    def is_published(self, block: int) -> bool:
        """The block can be found by its content, so nobody may write into it."""
        return self._published.get(self._content.get(block, b"")) == block

    def allocate(self) -> int | None:
        """A block for one holder to fill, taken from the cache if none is free; None: all used."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._published[self._content.pop(block)]
        else:
            return None
        self._refs[block] = 1
        return block

    def lookup(self, tokens: list[int]) -> list[int]:
        """Published blocks that hold the longest prefix of the tokens, in its order.

        They are not held before `take`.
        """
        size, content, found = self.block_size, b"", []
        for start in range(0, len(tokens) - size + 1, size):
            content = _digest(content, tokens[start : start + size])
            if content not in self._published:
                break
            found.append(self._published[content])
        return found

    def take(self, blocks: list[int]) -> None:
        """One more holder of blocks that `lookup` found."""
        for block in blocks:
            self._cached.pop(block, None)
            self._refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less of a sequence's blocks, which are given in the order of its positions.

        Those that can be found again stay in the cache. The last positions leave it first, because
        a block cannot be found without all before it.

        Raises:
            RuntimeError: nobody holds one of them.
        """
        for block in reversed(blocks):
            if not self._refs[block]:
                raise RuntimeError(f"block {block} is released, but nobody holds it")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self.is_published(block):
                self._cached[block] = None
            else:
                self._content.pop(block, None)
                self._free.append(block)

    def publish(self, parent: int | None, tokens: list[int], block: int) -> None:
        """Makes a full block findable, unless another with equal content is.

        Args:
            parent: the block of the positions before, full as well; None: there are none.
            tokens: [block_size], what the block holds.
            block: held by one sequence, which fills it no more.
        """
        content = _digest(b"" if parent is None else self._content[parent], tokens)
        self._content[block] = content
        self._published.setdefault(content, block)


def _digest(before: bytes, tokens: list[int]) -> bytes:
    """32 bytes that tell a block's tokens and all before them.

    Users choose tokens, so a hash that can be made to collide would show them others' caches.
    """
    return hashlib.blake2b(before + array.array("q", tokens).tobytes(), digest_size=32).digest()
