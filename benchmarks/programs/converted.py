"""Random converted models, whose weights are drawn directly in their formats."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dance_jax.config import Rounding
from dance_jax.models.build import matrix_shapes
from dance_jax.models.checkpoint import write_manifest
from dance_jax.models.config import ModelConfig
from dance_jax.models.convert import GROUP_BYTES
from dance_jax.models.experts import ExpertFormat, expert_format
from dance_jax.models.families import model_config
from dance_jax.models.formats import FLOATS, TABLES, Matrix, WeightFormat, pack_words
from dance_jax.models.orbax_store import save_arrays
from dance_jax.models.random_weights import random_tensor, write_byte_tokenizer
from dance_jax.models.rounding import expected_formats
from dance_jax.models.tensors import arrays_of, trunk_rules


def write_random_converted(
    directory: str | pathlib.Path,
    fields: dict[str, Any],
    experts: str,
    trunk: str,
    seed: int = 0,
) -> pathlib.Path:
    """Write a random converted model, with its weights drawn directly in their formats.

    At most one checkpoint of `GROUP_BYTES` is in memory at a time, and no matrix is rounded, so a
    model of many GB takes only minutes.

    Args:
        directory: where to write; must not exist.
        fields: the content of config.json.
        experts, trunk: formats as in `Rounding`; "keep" is the float type in config.json.
        seed: of the weights.

    Returns:
        The directory.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    config = model_config(fields)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_byte_tokenizer(directory, config)
    rng = np.random.default_rng([seed, 2])
    formats = expected_formats(config, Rounding(experts, trunk))
    trunk_groups = _write_groups(directory / "trunk", _random_trunk(rng, config, formats.trunk))
    form = expert_format(config, formats.experts)
    expert_groups = [
        _write_groups(directory / "experts" / str(index), _random_experts(rng, config, form))
        for index in range(len(config.moe_layers))
    ]
    text = json.dumps([fields, experts, trunk, seed], sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    write_manifest(directory, fingerprint, fingerprint, formats, trunk_groups, expert_groups)
    return directory


def _random_trunk(
    rng: np.random.Generator, config: ModelConfig, forms: Mapping[str, WeightFormat]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the trunk's arrays, with their names in a converted model."""
    shapes = matrix_shapes(config)
    for rule in trunk_rules(config):
        plain = [target for target in rule.targets if not target.matrix]
        tensor = random_tensor(rng, rule, config) if plain else None
        for target in plain:
            assert tensor is not None
            yield target.path, np.ascontiguousarray(target.cut(tensor))
        for target in rule.targets:
            if target.matrix:
                heads, d_in, d_out = shapes[target.path]
                drawn = [random_matrix(rng, forms[target.path], d_in, d_out) for _ in range(heads)]
                part = drawn[0] if heads == 1 else drawn
                yield from arrays_of(target.path, part, forms[target.path]).items()


def _random_experts(
    rng: np.random.Generator, config: ModelConfig, form: ExpertFormat
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all experts of a layer, with their names in a converted model."""
    for expert in range(config.num_experts):
        arrays: dict[str, np.ndarray] = {}
        for name, (kept, d_in, d_out) in form.matrices.items():
            arrays |= arrays_of(name, random_matrix(rng, kept, d_in, d_out), kept)
        yield str(expert), form.joined(form.from_stored(arrays))


def random_matrix(rng: np.random.Generator, form: WeightFormat, d_in: int, d_out: int) -> Matrix:
    """Return a matrix of random codes, scaled so that a product is about as large as its input."""
    size = np.float32(d_in**-0.5)
    if form.kind in FLOATS:
        values = rng.standard_normal((d_in, d_out), np.float32) * size
        return Matrix(form, {"values": values.astype(FLOATS[form.kind])}, d_in)
    if form.kind == "int4":
        deviation = np.std(TABLES["int4"])
        codes = pack_words(rng.integers(0, 16, (d_in, d_out), np.uint8))
    elif form.kind == "int8":
        deviation = 127 / math.sqrt(3)
        codes = rng.integers(-127, 128, (d_in, d_out), np.int8)
    else:
        raise ValueError(f"random matrices of format {form} are not supported")
    kept = form.arrays(d_in, d_out)["scale"].dtype
    factors = rng.uniform(0.5, 1.5, (-(-d_in // form.group), d_out)).astype(np.float32)
    scale = (factors * size / np.float32(deviation)).astype(kept)
    return Matrix(form, {"codes": codes, "scale": scale}, d_in)


def _write_groups(
    directory: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]]
) -> list[list[str]]:
    """Write checkpoints 0, 1, ... of bounded size; return the names of the arrays in each."""
    directory.mkdir(parents=True)
    names: list[list[str]] = []
    group: dict[str, np.ndarray] = {}
    for name, array in arrays:
        if group and sum(a.nbytes for a in group.values()) + array.nbytes > GROUP_BYTES:
            save_arrays(directory / str(len(names)), group)
            names.append(list(group))
            group = {}
        group[name] = array
    save_arrays(directory / str(len(names)), group)
    return [*names, list(group)]
