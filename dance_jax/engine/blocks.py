"""The KV blocks of one device: reference counts and the prefix cache.

A block is in use (referenced by sequences), cached (referenced by none, but its content may be
reused) or free. Only full blocks are published, and published blocks are never written again, so
sequences share them without copies.
"""

from __future__ import annotations

import array
import collections
import hashlib


class BlockPool:
    """Blocks 1..num_blocks; block 0 is the step's scratch block and is never allocated.

    Args:
        num_blocks: number of blocks that can be allocated.
        block_size: positions per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        #: Number of sequences that hold each block.
        self._refs = [0] * (num_blocks + 1)
        self._free = list(range(num_blocks, 0, -1))
        #: Published blocks that no sequence holds, least recently released first.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        #: Full block -> digest of its tokens and all tokens before them.
        self._content: dict[int, bytes] = {}
        #: Digest -> published block. Of several blocks with equal content, only one is published.
        self._published: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Number of blocks without content."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Number of blocks that no sequence holds but whose content can be found."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` can return."""
        return self.free + self.cached

    @property
    def used(self) -> int:
        """Number of blocks that sequences hold."""
        return self.num_blocks - self.available

    def is_published(self, block: int) -> bool:
        """Whether the block can be found by its content, and so must not be written."""
        return self._published.get(self._content.get(block, b"")) == block

    def allocate(self) -> int | None:
        """A block for one sequence to fill, evicted from the cache if no block is free.

        Returns:
            The block, or None if all blocks are in use.
        """
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
        """Published blocks that hold the longest cached prefix of the tokens, in order.

        The caller does not hold them before it calls `take`.
        """
        size, content, found = self.block_size, b"", []
        for start in range(0, len(tokens) - size + 1, size):
            content = _digest(content, tokens[start : start + size])
            if content not in self._published:
                break
            found.append(self._published[content])
        return found

    def take(self, blocks: list[int]) -> None:
        """Add a holder to blocks that `lookup` found."""
        for block in blocks:
            self._cached.pop(block, None)
            self._refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Remove a holder from a sequence's blocks, given in the order of their positions.

        Published blocks stay in the cache. The last positions are evicted first, because a block
        cannot be found without all blocks before it.

        Raises:
            RuntimeError: no sequence holds one of the blocks.
        """
        for block in reversed(blocks):
            if not self._refs[block]:
                raise RuntimeError(f"block {block} is released, but no sequence holds it")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self.is_published(block):
                self._cached[block] = None
            else:
                self._content.pop(block, None)
                self._free.append(block)

    def publish(self, parent: int | None, tokens: list[int], block: int) -> None:
        """Make a full block findable, unless another block with equal content is published.

        Args:
            parent: the full block of the positions before; None if the block is the first.
            tokens: [block_size], the block's tokens.
            block: a block that one sequence holds and has filled.
        """
        content = _digest(b"" if parent is None else self._content[parent], tokens)
        self._content[block] = content
        self._published.setdefault(content, block)


def _digest(before: bytes, tokens: list[int]) -> bytes:
    """A 32-byte digest of a block's tokens and all tokens before them.

    The hash is cryptographic because users choose the tokens: with a hash that can be made to
    collide, one user could read another's cache.
    """
    return hashlib.blake2b(before + array.array("q", tokens).tobytes(), digest_size=32).digest()
