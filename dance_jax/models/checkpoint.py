"""A converted model: orbax checkpoints from which the trunk or single experts can be read."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import jax
import numpy as np

from dance_jax.config import UserError
from dance_jax.models.build import fill, matrix_shapes, weight_shapes
from dance_jax.models.config import ModelConfig
from dance_jax.models.directory import FORMATS, MANIFEST, SIDE_FILES, read_config, read_json
from dance_jax.models.experts import ExpertFormat, Weights, expert_format
from dance_jax.models.formats import Formats, described
from dance_jax.models.orbax_store import load_arrays
from dance_jax.models.trunk import Trunk

_Read = TypeVar("_Read")

#: Version of the layout described in `Checkpoint`; other versions are rejected.
FORMAT = 5


def is_converted(directory: str | pathlib.Path) -> bool:
    """True if the directory has a manifest; `Checkpoint.open` verifies the content."""
    return (pathlib.Path(directory) / MANIFEST).exists()


class WeightSource(Protocol):
    """Source of an engine's weights, such as a `Checkpoint`."""

    config: ModelConfig

    def form(self, dtype: str) -> ExpertFormat: ...

    def trunk(self, dtype: str) -> Trunk: ...

    def experts(
        self, pairs: Sequence[tuple[int, int]], form: ExpertFormat
    ) -> Iterator[tuple[int, Weights]]: ...


class Outline:
    """What a model's config alone tells: enough to plan which server holds which expert.

    Args:
        formats: formats of the model's weights.
        source: hash (hex) of the source's weights, config and tokenizer; "" if unknown. Statistics
            of a model's experts belong to a source, regardless of the formats of the weights.
        fingerprint: hash of the source and the formats; "" if unknown.
    """

    def __init__(
        self, config: ModelConfig, formats: Formats, source: str = "", fingerprint: str = ""
    ) -> None:
        self.config = config
        self.formats = formats
        self.source = source
        self.fingerprint = fingerprint

    def form(self, dtype: str) -> ExpertFormat:
        """Format of routed experts in engines that compute in `dtype`."""
        return expert_format(self.config, self.formats.computed_in(dtype).experts)

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert in that format."""
        return self.form(dtype).bytes

    def trunk_bytes(self, dtype: str) -> int:
        """Bytes of all weights except the routed experts, in a trunk of `dtype`."""
        shapes = self.trunk_shapes(dtype).values()
        return sum(shape.size * shape.dtype.itemsize for shape in shapes)

    def expert_formats(self, dtype: str) -> str:
        """Formats of routed experts in engines that compute in `dtype`, as text for users."""
        return described(self.form(dtype).matrices.values())

    def trunk_formats(self, dtype: str) -> str:
        """Formats of the trunk's matrices, as text for users."""
        forms = self.formats.computed_in(dtype).trunk
        return described(
            (forms[path], d_in, d_out)
            for path, (heads, d_in, d_out) in matrix_shapes(self.config).items()
            for _ in range(heads)
        )

    def trunk_shapes(self, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every array of the trunk, by dotted path."""
        return weight_shapes(self.config, dtype, self.formats.computed_in(dtype).trunk)


class Checkpoint(Outline):
    """An opened converted model; create with `Checkpoint.open`.

    Layout: MANIFEST, FORMATS, the small files of the source, and orbax checkpoints of bounded size
    in trunk/0.. and experts/LAYER/0.., each with the arrays that the manifest lists. The trunk's
    arrays are its vectors and, for each matrix, either values or codes, scales and offsets. An
    expert is a single array named by its number (`ExpertFormat.joined`), because each read takes
    0.3 ms regardless of size (measured).
    """

    def __init__(self, path: pathlib.Path, config: ModelConfig, manifest: dict):
        super().__init__(config, read_formats(path), manifest["source"], manifest["fingerprint"])
        self.path = path
        self._trunk_groups: list[list[str]] = manifest["trunk"]
        #: For each MoE layer, the number of each expert's checkpoint.
        self._group_of: list[dict[str, int]] = [
            {expert: index for index, group in enumerate(groups) for expert in group}
            for groups in manifest["experts"]
        ]

    @staticmethod
    def open(directory: str | pathlib.Path) -> Checkpoint:
        """Open a converted model and check that it is complete.

        Raises:
            UserError: not a converted model, converted by another version, or damaged.
        """
        path = pathlib.Path(directory)
        if not is_converted(path):
            raise UserError(
                f"{path}: not a converted model ({MANIFEST} is missing); "
                "convert a model with python -m dance_jax.models.convert SRC DST"
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
        except KeyError as error:
            damaged = f"{MANIFEST} lacks {error}"
        except (TypeError, AttributeError) as error:
            damaged = f"{MANIFEST} has a value of a wrong type: {error}"
        raise UserError(
            f"{path}: damaged: {damaged}; delete the directory and convert the model again"
        )

    def trunk(self, dtype: str) -> Trunk:
        """Load the trunk with its weights on the default device of this process."""

        def weights() -> Iterator[tuple[str, np.ndarray]]:
            for group in self._trunk_groups:
                yield from self.trunk_weights(group).items()

        return fill(self.config, dtype, weights(), self.formats.computed_in(dtype).trunk)

    def trunk_weights(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Read the named weights of the trunk and nothing else, as they are stored.

        Args:
            names: dotted paths of the weights.

        Raises:
            UserError: the checkpoint is damaged.
        """
        found: dict[str, np.ndarray] = {}
        for index, group in enumerate(self._trunk_groups):
            if wanted := [name for name in group if name in names]:
                found |= load_arrays(self.path / "trunk" / str(index), wanted)
        return found

    def experts(
        self, pairs: Sequence[tuple[int, int]], form: ExpertFormat
    ) -> Iterator[tuple[int, Weights]]:
        """Read routed experts and nothing else, in the order in which they are stored.

        Args:
            pairs: (MoE layer counted from 0, expert) of each expert.
            form: format in which to return the experts: `self.form(dtype)`.

        Yields:
            The index in `pairs`, and the expert.

        Raises:
            UserError: there is no such expert, or the checkpoint is damaged.
        """
        rows: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        wanted: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
        for row, (layer, expert) in enumerate(pairs):
            if not (0 <= layer < len(self._group_of) and 0 <= expert < self.config.num_experts):
                raise UserError(f"{self.path}: there is no expert {expert} in MoE layer {layer}")
            rows[layer, expert].append(row)
            wanted[layer, self._group_of[layer][str(expert)]].add(str(expert))
        stored = expert_format(self.config, self.formats.experts)

        def read(layer: int, group: int) -> tuple[int, dict[str, np.ndarray]]:
            path = self.path / "experts" / str(layer) / str(group)
            return layer, load_arrays(path, wanted[layer, group])

        for layer, arrays in _prefetched(
            [functools.partial(read, *each) for each in sorted(wanted)]
        ):
            for number, array in arrays.items():
                weights = stored.split(array)
                if form != stored:
                    weights = form.from_stored(dict(zip(stored.leaves, weights, strict=True)))
                for row in rows[layer, int(number)]:
                    yield row, weights


def _prefetched(reads: Iterable[Callable[[], _Read]]) -> Iterator[_Read]:
    """Results of `reads` in order; the next read runs while the caller uses the current result."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        reading = None
        for read in reads:
            following = thread.submit(read)
            if reading is not None:
                yield reading.result()
            reading = following
        if reading is not None:
            yield reading.result()


def read_formats(directory: pathlib.Path) -> Formats:
    """Formats of the weights of a converted model.

    Raises:
        UserError: the file FORMATS is missing or damaged.
    """
    path = directory / FORMATS
    try:
        return Formats.from_json(read_json(path) or {})
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged: {error}; convert the model again") from error


def write_manifest(
    directory: pathlib.Path,
    source: str,
    fingerprint: str,
    formats: Formats,
    trunk: list[list[str]],
    experts: list[list[list[str]]],
) -> None:
    """Write the manifest, which makes `directory` a converted model.

    Args:
        directory: already contains all checkpoints and small files.
        source, fingerprint: see `Outline`.
        formats: formats of the weights.
        trunk: names of the arrays in trunk/0, trunk/1 ...
        experts: for each MoE layer, numbers of the experts in experts/LAYER/0, 1 ...
    """
    (directory / FORMATS).write_text(json.dumps(formats.to_json(), indent=1) + "\n")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "source": source,
        "fingerprint": fingerprint,
        "trunk": trunk,
        "experts": experts,
        "files": {str(path.relative_to(directory)): path.stat().st_size for path in files},
        "hashes": {
            name: _hash(directory / name)
            for name in (*SIDE_FILES, FORMATS)
            if (directory / name).exists()
        },
    }
    (directory / MANIFEST).write_text(json.dumps(manifest) + "\n")


def _damaged(path: pathlib.Path, manifest: dict) -> str:
    """The first difference between the directory and its manifest; "" if there is none."""
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
