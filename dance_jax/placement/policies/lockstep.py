"""Layer times of many placements in a row, on a sample of routes: what `latency` anneals on.

The sample is cut into blocks of a few tokens of every server, as steps are, and a layer's time is
the mean over blocks of what each block waits for. The busiest link of a whole sample is a smaller
number than the mean of its steps' busiest links, and one that unseen tokens do not keep to.

Everything is bytes: where a token's k experts are, as bitmasks of servers in arrays
[k, rows, layers, lanes], with a lane for each (server, block), so that all of it runs in vector
registers. A change of who holds an expert is one comparison and select, without a table look-up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dance_jax.placement.cost import Cost
from dance_jax.placement.visit import fewest_servers

#: Tokens of each server in one block.
BLOCK_TOKENS = 64
#: At most so many blocks: what a longer sample has more is left out, evenly.
MAX_BLOCKS = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["experts", "weight", "state", "call", "transfer"],
    meta_fields=["num_servers"],
)
@dataclasses.dataclass(frozen=True)
class Sample:
    """Blocks of routes and what their flows cost; lanes = servers x blocks."""

    #: uint8 or uint16 [k, BLOCK_TOKENS, layers, lanes]: the experts of each token.
    experts: jax.Array
    #: float32 [servers]: tokens of each server per token of the mean server; 0 without routes.
    weight: jax.Array
    #: float32 [servers]: seconds of a hidden state on the link; of a call on the whole server.
    state: jax.Array
    call: jax.Array
    #: float32 []: seconds of a transfer, over the number of servers that send any.
    transfer: jax.Array
    num_servers: int

    @classmethod
    def of(
        cls,
        routes: Sequence[np.ndarray],
        cost: Cost,
        weights: np.ndarray,
        num_experts: int,
    ) -> Sample:
        """Deals every server's tokens to blocks in turn, so that neighbours are apart.

        A server with fewer tokens than the others has some of them in several blocks.

        Args:
            routes: per server int [tokens, layers, k]; not all empty.
            cost: seconds of each part.
            weights: float [servers], tokens of each server per token of the mean server.
            num_experts: of a layer.
        """
        num_servers = len(routes)
        longest = max(len(route) for route in routes)
        blocks = min(max(1, -(-longest // BLOCK_TOKENS)), MAX_BLOCKS)
        size = blocks * BLOCK_TOKENS
        _, layers, k = routes[0].shape
        dealt = np.zeros((num_servers, size, layers, k), np.min_scalar_type(num_experts))
        for n, route in enumerate(routes):
            if len(route):
                dealt[n] = route[np.arange(size) * len(route) // size]
        # [servers, rows, blocks, layers, k] -> [k, rows, layers, servers, blocks]
        dealt = dealt.reshape(num_servers, BLOCK_TOKENS, blocks, layers, k)
        experts = dealt.transpose(4, 1, 3, 0, 2).reshape(k, BLOCK_TOKENS, layers, -1)
        active_n = np.array([len(route) > 0 for route in routes])
        return cls(
            jnp.asarray(experts),
            jnp.asarray(weights * active_n, jnp.float32),
            jnp.asarray(cost.state, jnp.float32),
            jnp.asarray(cost.call / cost.devices, jnp.float32),
            jnp.float32(cost.transfer / active_n.sum()),
            num_servers,
        )


def locate(sample: Sample, holders_le: jax.Array) -> jax.Array:
    """Who holds each expert of each token: bitmasks [k, rows, layers, lanes].

    Args:
        sample: the routes.
        holders_le: bitmasks [layers, experts].
    """
    layer_l = jnp.arange(holders_le.shape[0], dtype=jnp.int32)[None, None, :, None]
    return holders_le[layer_l, sample.experts.astype(jnp.int32)]


def relocate(
    sample: Sample, where: jax.Array, expert_l: jax.Array, holders_l: jax.Array
) -> jax.Array:
    """`locate` after one expert of each layer got other holders.

    Args:
        sample: the routes.
        where: what `locate` gave before.
        expert_l: int32 [layers], the expert; the number of experts for none.
        holders_l: bitmasks [layers], who holds it now.
    """
    expert_l = expert_l.astype(sample.experts.dtype)
    moved = sample.experts == expert_l[None, None, :, None]
    return jnp.where(moved, holders_l[None, None, :, None], where)


def layer_times(sample: Sample, where: jax.Array) -> jax.Array:
    """Seconds per token of a server of each layer, mean over blocks: float32 [layers].

    The fixed part of a layer is left out. `Traffic.layer_time` is the same of one block of all
    tokens.

    Args:
        sample: the routes.
        where: what `locate` gives.
    """
    num_servers, dtype = sample.num_servers, where.dtype
    k, rows, layers, lanes = where.shape
    blocks = lanes // num_servers
    home_lane = np.repeat(np.left_shift(1, np.arange(num_servers)), blocks).astype(dtype)
    missing = jnp.where((where & home_lane[None, None, None]) != 0, dtype.type(0), where)
    chosen = fewest_servers(missing[None], num_servers)[0]

    def per_token(counts: list[jax.Array]) -> jax.Array:
        """Sums over rows to flows per token: float32 [to, layers, from, blocks]."""
        shape = (num_servers, layers, num_servers, blocks)
        flows = jnp.stack(counts).astype(jnp.float32).reshape(shape) / rows
        return flows * sample.weight[None, None, :, None]

    sent, served = [], []
    for n in range(num_servers):
        bit = dtype.type(1 << n)
        sent.append(((chosen & bit) != 0).sum(axis=0, dtype=jnp.uint8))
        # Of several visited holders the lowest serves: no bit below n may be among them.
        serves = (missing & (chosen & dtype.type((2 << n) - 1))[None]) == bit
        served.append(serves.sum(axis=0, dtype=jnp.uint8).sum(axis=0, dtype=jnp.uint16))
    sent_mlnb, served_mlnb = per_token(sent), per_token(served)
    ways_nlb = jnp.maximum(sent_mlnb.sum(axis=2), sent_mlnb.sum(axis=0).transpose(1, 0, 2))
    away_lnb = served_mlnb.sum(axis=0)
    home_nlb = (k * sample.weight[None, :, None] - away_lnb).transpose(1, 0, 2)
    calls_nlb = home_nlb + served_mlnb.sum(axis=2)
    busiest_lb = (ways_nlb * sample.state[:, None, None]).max(axis=0)
    compute_lb = (calls_nlb * sample.call[:, None, None]).max(axis=0)
    transfers_lb = sent_mlnb.sum(axis=(0, 2)) * sample.transfer
    return (busiest_lb + compute_lb + transfers_lb).mean(axis=1)
