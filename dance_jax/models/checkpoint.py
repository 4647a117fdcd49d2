"""A converted model: orbax checkpoints of which the trunk or single experts are read."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from dance_jax.config import UserError
from dance_jax.models.build import fill, weight_shapes
from dance_jax.models.config import ModelConfig
from dance_jax.models.hf import SIDE_FILES, read_config, read_json
from dance_jax.models.layers import Trunk
from dance_jax.models.orbax_store import load_arrays

#: Written last; a directory without it is no converted model.
MANIFEST = "dance_jax.json"
#: Number of the layout below; another one is refused.
FORMAT = 1

#: The three projections of an expert, in the order of the pool.
PROJECTIONS = ("w_gate", "w_up", "w_down")


def expert_leaf(expert: int, projection: str) -> str:
    """Name of one projection of one expert in its layer's checkpoints."""
    return f"{expert}.{projection}"


def is_converted(directory: str | pathlib.Path) -> bool:
    """True if the directory says that it is a converted model; `Checkpoint.open` checks it."""
    return (pathlib.Path(directory) / MANIFEST).exists()


class WeightSource(Protocol):
    """Where an engine's weights come from; `Checkpoint` is one."""

    config: ModelConfig

    def trunk(self, dtype: str) -> Trunk: ...

    def experts(
        self, pairs: Sequence[tuple[int, int]], dtype: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class Checkpoint:
    """An opened converted model; made by `Checkpoint.open`.

    Layout: MANIFEST, the small files of the source, trunk/0.. and experts/LAYER/0..: orbax
    checkpoints of bounded size, each with whole arrays under the names the manifest lists.
    """

    def __init__(self, path: pathlib.Path, config: ModelConfig, manifest: dict):
        self.path = path
        self.config = config
        #: Hash (hex) of the source's weights, config and tokenizer.
        self.fingerprint: str = manifest["fingerprint"]
        self._trunk_groups: list[list[str]] = manifest["trunk"]
        self._group_of: list[dict[str, int]] = [
            {leaf: index for index, group in enumerate(groups) for leaf in group}
            for groups in manifest["experts"]
        ]

    @staticmethod
    def open(directory: str | pathlib.Path) -> Checkpoint:
        """Opens a converted model and checks that all of it is there.

        Raises:
            UserError: not a converted model, made by another version, or torn.
        """
        path = pathlib.Path(directory)
        if not is_converted(path):
            raise UserError(
                f"{path}: not a converted model ({MANIFEST} is missing); "
                "make one with python -m dance_jax.models.convert SRC DST"
            )
        manifest = read_json(path / MANIFEST) or {}
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads "
                f"{FORMAT}; delete the directory and convert the model again"
            )
        try:
            damaged = _damaged(path, manifest)
            if not damaged:
                return Checkpoint(path, read_config(path), manifest)
        except (KeyError, TypeError, AttributeError) as error:
            damaged = f"{MANIFEST} lacks {error}"
        raise UserError(
            f"{path}: torn: {damaged}; delete the directory and convert the model again"
        )

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert in `dtype`."""
        return 3 * self.config.hidden_size * self.config.expert_width * jnp.dtype(dtype).itemsize

    def trunk_bytes(self, dtype: str) -> int:
        """Bytes of all weights but the routed experts, in a trunk of `dtype`."""
        shapes = weight_shapes(self.config, dtype).values()
        return sum(shape.size * shape.dtype.itemsize for shape in shapes)

    def trunk(self, dtype: str) -> Trunk:
        """The trunk with its weights, on this process's default device."""

        def weights() -> Iterator[tuple[str, np.ndarray]]:
            for group in self._trunk_groups:
                yield from self.trunk_weights(group).items()

        return fill(self.config, dtype, weights())

    def trunk_weights(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Reads weights of the trunk and nothing else, as they are stored.

        Args:
            names: their dotted paths.

        Raises:
            UserError: the checkpoint is torn.
        """
        found: dict[str, np.ndarray] = {}
        for index, group in enumerate(self._trunk_groups):
            if wanted := [name for name in group if name in names]:
                found |= load_arrays(self.path / "trunk" / str(index), wanted)
        return found

    def experts(
        self, pairs: Sequence[tuple[int, int]], dtype: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads routed experts and nothing else.

        Args:
            pairs: (MoE layer counted from 0, expert) of each, in the order wanted.
            dtype: "float32" or "bfloat16".

        Returns:
            w_gate [n, d, f], w_up [n, d, f] and w_down [n, f, d] in `dtype`.

        Raises:
            UserError: there is no such expert, or the checkpoint is torn.
        """
        d, f = self.config.hidden_size, self.config.expert_width
        shapes = ((d, f), (d, f), (f, d))
        gate, up, down = (np.empty((len(pairs), *shape), jnp.dtype(dtype)) for shape in shapes)
        wanted: dict[tuple[int, int], list[tuple[str, int, int]]] = collections.defaultdict(list)
        for row, (layer, expert) in enumerate(pairs):
            if not (0 <= layer < len(self._group_of) and 0 <= expert < self.config.num_experts):
                raise UserError(f"{self.path}: there is no expert {expert} in MoE layer {layer}")
            for which, projection in enumerate(PROJECTIONS):
                leaf = expert_leaf(expert, projection)
                group = self._group_of[layer][leaf]
                wanted[layer, group].append((leaf, which, row))
        for (layer, group), leaves in sorted(wanted.items()):
            path = self.path / "experts" / str(layer) / str(group)
            arrays = load_arrays(path, {leaf for leaf, _, _ in leaves})
            for leaf, which, row in leaves:
                (gate, up, down)[which][row] = arrays[leaf]
        return gate, up, down


def write_manifest(
    directory: pathlib.Path,
    fingerprint: str,
    trunk: list[list[str]],
    experts: list[list[list[str]]],
) -> None:
    """Declares everything now in `directory` a converted model.

    Args:
        directory: with all checkpoints and small files.
        fingerprint: of the source.
        trunk: names of the arrays in trunk/0, trunk/1 ...
        experts: for each MoE layer, names of the arrays in experts/LAYER/0, 1 ...
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "trunk": trunk,
        "experts": experts,
        "files": {str(path.relative_to(directory)): path.stat().st_size for path in files},
        "hashes": {
            name: _hash(directory / name) for name in SIDE_FILES if (directory / name).exists()
        },
    }
    (directory / MANIFEST).write_text(json.dumps(manifest) + "\n")


def _damaged(path: pathlib.Path, manifest: dict) -> str:
    """What differs between the directory and its manifest; empty if nothing does."""
    for name, size in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    for name, digest in manifest["hashes"].items():
        if _hash(path / name) != digest:
            return f"{name} was changed after the conversion"
    return ""


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
