"""Opens a model in GGUF files like a Hugging Face directory."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib

from dance_jax.config import UserError
from dance_jax.memory import format_bytes
from dance_jax.models.directory import is_gguf, side_files
from dance_jax.models.ggml.config import more_layers
from dance_jax.models.ggml.header import content_hash, read_parts
from dance_jax.models.ggml.kinds import KINDS, NOT_EXACT, PLAIN
from dance_jax.models.ggml.names import renamed
from dance_jax.models.ggml.side_files import gguf_config
from dance_jax.models.ggml.tensors import GgufTensor
from dance_jax.models.hf import HFDirectory

#: Maximum number of tensors named in a message.
_LISTED = 8


class GGUFModel(HFDirectory):
    """An opened GGUF file, or all files of a split model; `path` is the first file.

    Tensors have Hugging Face's names, shapes and row order. Each expert is a tensor of its own.

    Raises:
        UserError: a file is missing or truncated, the architecture or a type of tensors is not
            supported, or tensors are missing, unknown or of the wrong shape.
    """

    described_by = "its metadata"

    def __init__(self, file: str | pathlib.Path):
        self._parts = read_parts(pathlib.Path(file))
        self.files = [part.path for part in self._parts]
        self.path = self.files[0]
        config = gguf_config(self._parts)
        more = [rf"model\.layers\.{layer}\." for layer in more_layers(self._parts)]
        names = dataclasses.replace(
            config.names,
            experts_as="single",
            joined_delta=False,
            ignored=tuple(dict.fromkeys([*config.names.ignored, *more])),
        )
        self.config = dataclasses.replace(config, names=names)
        stored = self._stored()
        self.kinds = _bytes_by_kind(stored)
        self.tensors = renamed(stored, self.config, str(self.path))
        self.left_out = self._leave_out()
        self._check([])

    def _stored(self) -> dict[str, GgufTensor]:
        """All tensors under the names they have in the files."""
        found: dict[str, GgufTensor] = {}
        for part in self._parts:
            for name, place in part.tensors.items():
                if name in found:
                    raise UserError(f"{part.path}: {name} is also in {found[name].file.name}")
                found[name] = GgufTensor.at(place)
        wrong = [f"{name} is {each.kind}" for name, each in found.items() if not each.is_float]
        if wrong:
            more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            supported = ", ".join([*PLAIN, *KINDS])
            raise UserError(
                f"{self.path}: of an unsupported type: {', '.join(wrong[:_LISTED])}{more}; "
                f"supported: {supported}: use another quantisation of the model"
            )
        return found

    def fingerprint(self) -> str:
        """Hash (hex) of the weights and of the side files made from the metadata.

        The hash does not depend on where the files are.
        """
        digest = hashlib.sha256()
        for name, content in sorted(side_files(self.path).items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        for part in self._parts:
            digest.update(content_hash(part))
        return digest.hexdigest()

    def report(self) -> str:
        """One line for each weight type and the format it becomes, then what is left out."""
        lines = [_kind_report(kind, size) for kind, size in self.kinds.items()]
        return "\n".join([*lines, *filter(None, [self.left_out_report()])])


def _bytes_by_kind(tensors: dict[str, GgufTensor]) -> dict[str, int]:
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.size
    return dict(sizes.most_common())


def _kind_report(kind: str, size: int) -> str:
    """One report line about a weight type."""
    stored = f"{kind}: {format_bytes(size)}"
    if kind in PLAIN:
        return f"{stored}, {PLAIN[kind]}"
    own = KINDS[kind]
    exact = "offsets rounded to float32" if kind in NOT_EXACT else "without loss"
    return (
        f"{stored} of {own.bits:.3g} bits a weight, held as {own.format} of {own.our_bits:.3g}, "
        f"{exact}"
    )


def open_source(path: str | pathlib.Path, scales: bool = True) -> HFDirectory:
    """Opens a model to convert: a GGUF file, or a directory in Hugging Face format.

    Args:
        scales: see `HFDirectory`.

    Raises:
        UserError: see `GGUFModel` and `HFDirectory`.
    """
    return GGUFModel(path) if is_gguf(path) else HFDirectory(path, scales)
