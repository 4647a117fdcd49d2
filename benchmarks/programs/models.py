"""Random models in the file formats of all programs, generated at first use and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import tokenizers

from benchmarks.families import LARGE, SHAPES
from benchmarks.programs import gguf_file
from benchmarks.programs.converted import write_random_converted
from dance_jax.config import Rounding
from dance_jax.models.convert import ensure_converted
from dance_jax.models.hf import HFDirectory
from dance_jax.models.random_weights import write_random_checkpoint

#: Shapes whose float32 copy would be too large: their weights are drawn directly in each format.
_DIRECT = ("olmoe", "qwen3-24-layers")


@dataclasses.dataclass(frozen=True)
class Model:
    """A shape with random weights.

    Args:
        name: "200m" for the family's shape in SHAPES, or one of LARGE.
        family: model_type in SHAPES; used with "200m" only.
        work: directory in which all files are kept.
    """

    name: str
    family: str
    work: pathlib.Path
    #: Number of layers; that of the shape if None.
    layers: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The content of config.json."""
        shape = SHAPES[self.family] if self.name == "200m" else LARGE[self.name]
        return shape if self.layers is None else shape | {"num_hidden_layers": self.layers}

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.fields["vocab_size"]

    def source(self) -> pathlib.Path:
        """Return the model in float32, as a Hugging Face directory."""
        with _made(self._path("float32")) as (path, missing):
            if missing:
                write_random_checkpoint(path, self.fields)
        return self._path("float32")

    def named(self) -> pathlib.Path:
        """Return `source` with a tokenizer that calls token 12 `<12>`, as in `gguf`."""
        source = self.source()
        with _made(self._path("named")) as (path, missing):
            if missing:
                path.mkdir()
                for file in source.iterdir():
                    if not file.name.startswith("tokenizer"):
                        (path / file.name).symlink_to(file.absolute())
                write_word_tokenizer(path, self.vocabulary)
        return self._path("named")

    def converted(self, experts: str, trunk: str) -> pathlib.Path:
        """Return the model converted for this project, in formats of `dance_jax.models.convert`.

        The weights of shapes in _DIRECT differ from those in `gguf`.
        """
        if self.name in _DIRECT:
            with _made(self._path(f"converted-{experts}-{trunk}")) as (path, missing):
                if missing:
                    write_random_converted(path, self.fields, experts, trunk)
            return self._path(f"converted-{experts}-{trunk}")
        rounding = Rounding(experts, trunk)
        return ensure_converted(self.source(), self.work / "models", rounding=rounding)

    def gguf(self, kind: str) -> pathlib.Path:
        """Return the model as a GGUF file with matrices of `kind`, such as "Q8_0"."""
        with _made(self._path(f"{kind}.gguf")) as (path, missing):
            if missing:
                direct = self.name in _DIRECT
                source = None if direct else HFDirectory(self.source()).tensors
                gguf_file.write(path, self.fields, kind, source)
        return self._path(f"{kind}.gguf")

    def _path(self, form: str) -> pathlib.Path:
        name = f"200m-{self.family}" if self.name == "200m" else self.name
        cut = "" if self.layers is None else f"-{self.layers}"
        return self.work / f"{name}{cut}-{form}"


def write_word_tokenizer(directory: pathlib.Path, size: int) -> None:
    """Write a tokenizer of made-up words (`gguf_file.token_name`) into a model's directory."""
    words = {gguf_file.token_name(token): token for token in range(size)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(words, unk_token=gguf_file.token_name(0))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}\n")


@contextlib.contextmanager
def _made(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, bool]]:
    """Yield a temporary path at which to create `path`, and whether `path` is missing.

    The temporary path is renamed to `path` when the block ends without an error.
    """
    partial = path.with_name(f".{path.name}.partial")
    if path.exists():
        yield partial, False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    yield partial, True
    partial.rename(path)
