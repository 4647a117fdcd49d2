"""The demo model: a small DeepSeek-V2 in functional JAX, for training.

Shapes: B sequences, T positions, N = B x T tokens, D hidden, H heads, K experts per token,
E experts, C rows per expert, F expert width, V vocabulary. Matrices are [in, out].
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

Params = dict
FINAL_CONSTANT = 3.0  # approximate value of input 0 after the last norm at the start of training
AXIS = "data"  # the mesh axis that a batch is split over; parameters are replicated on it


@dataclass(frozen=True)
class Config:
    """Sizes, named as in the Hugging Face config.json (see export.py)."""

    vocab: int = 4096
    hidden: int = 128
    layers: int = 6  # the first one is dense
    heads: int = 4
    kv_rank: int = 64
    nope: int = 32
    rope: int = 16
    value: int = 32
    dense_width: int = 384
    experts: int = 64
    experts_per_token: int = 6
    shared_experts: int = 2
    expert_width: int = 64
    routed_scale: float = 3.0
    rope_theta: float = 10000.0
    epsilon: float = 1e-6
    capacity: float = 2.0  # rows per expert, as a multiple of the mean
    balance: float = 0.005  # weight of the load-balancing loss
    residual: float = 0.1  # weight of the residual stream's mean square


def init(config: Config, key: Array, unigram: Array) -> Params:
    """Draw random parameters; matrices that write into the residual stream start small.

    Input 0 is the same constant for every token. From it, the output projection produces the
    tokens' frequencies `unigram` [V], which the layers would otherwise have to learn first.
    """
    keys = iter(jax.random.split(key, 200))
    c = config

    def matrix(*shape: int, gain: float = 1.0) -> Array:
        scale = gain / math.sqrt(shape[-2])
        return scale * jax.random.normal(next(keys), shape, jnp.float32)

    def ffn(width: int, *stack: int) -> Params:
        return {
            "gate": matrix(*stack, c.hidden, width),
            "up": matrix(*stack, c.hidden, width),
            "down": matrix(*stack, width, c.hidden, gain=0.3),
        }

    layers = []
    for index in range(c.layers):
        layer = {
            "norm1": jnp.ones(c.hidden),
            "norm2": jnp.ones(c.hidden),
            "kv_norm": jnp.ones(c.kv_rank),
            "q": matrix(c.hidden, c.heads * (c.nope + c.rope)),
            "kv_a": matrix(c.hidden, c.kv_rank + c.rope),
            "kv_b": matrix(c.kv_rank, c.heads * (c.nope + c.value)),
            "o": matrix(c.heads * c.value, c.hidden, gain=0.3),
        }
        if index == 0:
            layer["mlp"] = ffn(c.dense_width)
        else:
            layer["router"] = matrix(c.hidden, c.experts)
            layer["experts"] = ffn(c.expert_width, c.experts)
            layer["shared"] = ffn(c.expert_width * c.shared_experts)
        layers.append(layer)
    embedding = jax.random.normal(next(keys), (c.vocab, c.hidden)) / math.sqrt(c.hidden)
    embedding = embedding.at[:, 0].set(0.5)  # the same for every token
    log_share = jnp.log(unigram / unigram.sum())
    head = embedding.at[:, 0].set((log_share - log_share.mean()) / FINAL_CONSTANT)
    layers[0] |= look_back(layers[0], c)
    layers[1] |= find_again(layers[1], layers[0], c)
    return {"embed": embedding, "norm": jnp.ones(c.hidden), "head": head, "layers": layers}


def look_back(layer: Params, c: Config) -> Params:
    """Return query and key matrices with which each head h but the last looks h + 1 tokens back.

    A head that copies from far back ("A B ... A" continues with B) needs a head in an earlier layer
    that tells each token its predecessor. A short training does not find such a pair of heads. Here
    the constant input 0 of the embedding becomes a key of fixed direction, and a query rotated back
    by h + 1 positions, on the faster half of the rotary frequencies.
    """
    pairs = c.rope // 4
    frequency = c.rope_theta ** (-jnp.arange(pairs) * 2 / c.rope)
    gain = 1.5  # times the normed input 0 (about 5), squared, over the softmax scale: 8
    key = jnp.zeros(c.rope).at[0 : 2 * pairs : 2].set(gain)
    q = layer["q"].reshape(c.hidden, c.heads, c.nope + c.rope)
    for head in range(c.heads - 1):
        angle = -frequency * (head + 1)
        turned = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1).reshape(-1)
        q = q.at[:, head].multiply(0.1)
        q = q.at[0, head, c.nope :].set(jnp.zeros(c.rope).at[: 2 * pairs].set(gain * turned))
    kv_a = layer["kv_a"].at[:, c.kv_rank :].multiply(0.1).at[0, c.kv_rank :].set(key)
    return {"q": q.reshape(layer["q"].shape), "kv_a": kv_a, "o": 0.3 * layer["o"]}


def find_again(layer: Params, before: Params, c: Config) -> Params:
    """Return matrices of the second layer whose head 0 copies what last followed the token.

    Head 0 of the layer `before` has written each token's predecessor, multiplied by its value
    matrix, into the residual stream. Here the first half of the latent reads the predecessor back
    as the key. The query is the token itself, multiplied by the same matrix, so it matches the
    positions after earlier occurrences of the token. The second half of the latent is the value,
    which is written back as it was read.
    """
    half = c.kv_rank // 2
    assert c.value == c.nope == half
    value = slice(c.nope, c.nope + c.value)  # columns of kv_b: head 0's value
    read = layer["kv_a"][:, half : c.kv_rank]
    kv_a = layer["kv_a"].at[:, :half].set(0.3 * jnp.linalg.pinv(before["o"][: c.value]))
    kv_b = layer["kv_b"].at[:, : value.stop].set(0)
    kv_b = kv_b.at[:half, : c.nope].set(5 * jnp.eye(half)).at[half:, value].set(jnp.eye(half))
    q = layer["q"].at[:, : c.nope + c.rope].set(0)
    q = q.at[:, : c.nope].set(before["kv_a"][:, : c.kv_rank] @ before["kv_b"][:, value])
    return {"q": q, "kv_a": kv_a, "kv_b": kv_b, "o": layer["o"].at[: c.value].set(0.3 * read.T)}


def learnt(params: Params, c: Config) -> Params:
    """Return 1 for weights that may change from the start, 0 for `look_back` and `find_again`.

    The first steps are large and noisy: within 300 steps they would change what these heads attend
    to, before any layer above has learnt to use them. Later the loss itself preserves the heads.
    """
    free = jax.tree.map(jnp.ones_like, params)
    free["embed"] = free["embed"].at[:, 0].set(0)
    before, layer = free["layers"][:2]
    for name in ("norm1", "kv_norm", "q", "kv_a", "kv_b", "o"):
        before[name] = jnp.zeros_like(before[name])
    layer["norm1"], layer["kv_norm"] = before["norm1"], before["kv_norm"]
    layer["q"] = layer["q"].at[:, : c.nope + c.rope].set(0)
    layer["kv_a"] = layer["kv_a"].at[:, : c.kv_rank].set(0)
    layer["kv_b"] = layer["kv_b"].at[:, : c.nope + c.value].set(0)
    layer["o"] = layer["o"].at[: c.value].set(0)
    return free


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * weight


def swiglu(x: Array, weights: Params) -> Array:
    """[..., D] -> [..., D]; also batched over experts, [E, C, D] -> [E, C, D]."""
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]


def rotate(x: Array, theta: float) -> Array:
    """Rotary embedding on pairs (2i, 2i+1) of the last axis. x: [B, T, H, R]."""
    length, width = x.shape[1], x.shape[-1]
    frequency = theta ** (-jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None, None] * frequency  # [T, 1, R/2]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def attention(x: Array, layer: Params, c: Config) -> Array:
    """Causal multi-head latent attention. x: [B, T, D] -> [B, T, D]."""
    batch, length, _ = x.shape
    q = (x @ layer["q"]).reshape(batch, length, c.heads, c.nope + c.rope)
    latent, k_rope = jnp.split(x @ layer["kv_a"], [c.kv_rank], axis=-1)
    kv = rms_norm(latent, layer["kv_norm"], 1e-6) @ layer["kv_b"]
    k_nope, v = jnp.split(kv.reshape(batch, length, c.heads, -1), [c.nope], axis=-1)
    q = jnp.concatenate([q[..., : c.nope], rotate(q[..., c.nope :], c.rope_theta)], -1)
    k_rope = jnp.broadcast_to(
        rotate(k_rope[:, :, None], c.rope_theta), (batch, length, c.heads, c.rope)
    )
    q = q.transpose(0, 2, 1, 3) / math.sqrt(c.nope + c.rope)
    k = jnp.concatenate([k_nope, k_rope], -1).transpose(0, 2, 3, 1)
    v = v.transpose(0, 2, 1, 3)
    block = min(length, 128)  # a block of queries skips all later keys, about half the work
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = q[:, :, start:stop] @ k[..., :stop]
        hidden = jnp.arange(stop) > jnp.arange(start, stop)[:, None]
        scores = jnp.where(hidden, -1e30, scores)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        outputs.append((weights @ v[:, :, :stop]) / weights.sum(-1, keepdims=True))
    out = jnp.concatenate(outputs, 2).transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return out @ layer["o"]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def permute(x: Array, index: Array, inverse: Array, copies: int) -> Array:
    """Return the rows x[index], zero where index is out of range.

    With `inverse` [rows of x, copies] the gradient is a gather too; a scatter is slow on CPU.
    """
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _permute_forward(x: Array, index: Array, inverse: Array, copies: int):
    return permute(x, index, inverse, copies), inverse


def _permute_backward(copies: int, inverse: Array, grad: Array):
    rows = jnp.take(grad, inverse, axis=0, mode="fill", fill_value=0)
    return rows.reshape(-1, copies, grad.shape[-1]).sum(1), None, None


permute.defvjp(_permute_forward, _permute_backward)


def moe(x: Array, layer: Params, c: Config) -> tuple[Array, dict[str, Array]]:
    """Routed and shared experts. x: [N, D] -> ([N, D], statistics).

    Assignments are sorted by expert. Each expert gets C rows; further assignments are dropped (in
    training only).
    """
    n, k, e = x.shape[0], c.experts_per_token, c.experts
    probs = jax.nn.softmax(x @ layer["router"], -1)  # [N, E]
    weight, choice = jax.lax.top_k(probs, k)  # [N, K]
    rows = min(n, math.ceil(n * k / e * c.capacity))

    flat = choice.reshape(-1)
    order = jnp.argsort(flat)  # assignments, sorted by expert
    counts = jnp.zeros(e, jnp.int32).at[flat].add(1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.arange(n * k, dtype=jnp.int32) - starts[flat[order]]
    row = jnp.where(rank < rows, flat[order] * rows + rank, e * rows)
    row_of = jnp.zeros(n * k, jnp.int32).at[order].set(row)  # assignment -> row
    source = starts[:, None] + jnp.arange(rows)
    filled = jnp.arange(rows) < counts[:, None]
    assignment = jnp.where(filled, order[jnp.minimum(source, n * k - 1)], n * k).reshape(-1)

    inputs = permute(x, jnp.where(assignment < n * k, assignment // k, n), row_of, k)
    outputs = swiglu(inputs.reshape(e, rows, -1), layer["experts"])
    back = permute(outputs.reshape(e * rows, -1), row_of, assignment, 1).reshape(n, k, -1)
    routed = jnp.einsum("nkd,nk->nd", back, weight * c.routed_scale)

    share = jax.lax.pmean(counts / (n * k), AXIS)  # over the whole batch, not per sequence
    stats = {
        "balance": e * jnp.sum(share * probs.mean(0)),
        "dropped": jnp.mean(row_of == e * rows),
    }
    return routed + swiglu(x, layer["shared"]), stats


def forward(
    params: Params, tokens: Array, c: Config
) -> tuple[Array, list[dict[str, Array]], Array]:
    """Run the layers on tokens [B, T].

    Returns:
        (normed hidden states [B, T, D], statistics of each MoE layer, mean square of the residual
        stream).
    """
    x = params["embed"][tokens]
    stats, size = [], jnp.float32(0)
    for layer in params["layers"]:
        x = x + attention(rms_norm(x, layer["norm1"], c.epsilon), layer, c)
        normed = rms_norm(x, layer["norm2"], c.epsilon)
        if "mlp" in layer:
            x = x + swiglu(normed, layer["mlp"])
        else:
            out, stat = moe(normed.reshape(-1, c.hidden), layer, c)
            x = x + out.reshape(x.shape)
            stats.append(stat)
        size += jnp.mean(x * x) / c.layers
    return rms_norm(x, params["norm"], c.epsilon), stats, size


def cross_entropy(hidden: Array, head: Array, targets: Array) -> Array:
    """Negative log likelihood. hidden [..., D], head [V, D], targets [...] -> [...]."""
    logits = hidden @ head.T
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


@jax.custom_vjp
def mean_cross_entropy(hidden: Array, embed: Array, targets: Array) -> tuple[Array, Array]:
    """Return (mean over all tokens, mean of each sequence). hidden [B, T, D], targets [B, T].

    Computes loss and gradient one sequence at a time, so that no [B, T, V] array ever exists.
    """
    return _mean_cross_entropy_forward(hidden, embed, targets)[0]


def _mean_cross_entropy_forward(hidden: Array, embed: Array, targets: Array):
    def one(total: Array, row: tuple[Array, Array]):
        value, (grad_hidden, grad_embed) = jax.value_and_grad(
            lambda h, e: cross_entropy(h, e, row[1]).mean(), argnums=(0, 1)
        )(row[0], embed)
        return total + grad_embed, (value, grad_hidden)

    count = hidden.shape[0]
    total, (values, grads) = jax.lax.scan(one, jnp.zeros_like(embed), (hidden, targets))
    return (values.mean(), values), (grads / count, total / count)


def _mean_cross_entropy_backward(saved: tuple[Array, Array], grad: tuple[Array, Array]):
    return saved[0] * grad[0], saved[1] * grad[0], None


mean_cross_entropy.defvjp(_mean_cross_entropy_forward, _mean_cross_entropy_backward)


def loss(params: Params, tokens: Array, c: Config) -> tuple[Array, dict[str, Array]]:
    """Return the training loss of a batch [B, T+1], and figures for the log."""
    hidden, stats, size = forward(params, tokens[:, :-1], c)
    mean, of_sequence = mean_cross_entropy(hidden, params["head"], tokens[:, 1:])
    balance = sum(s["balance"] for s in stats) / len(stats)
    dropped = sum(s["dropped"] for s in stats) / len(stats)
    logged = {"nll": of_sequence, "balance": balance, "dropped": dropped, "size": size}
    return mean + c.balance * balance + c.residual * size, logged
