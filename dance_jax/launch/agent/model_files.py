"""The model's config, tokenizer and formats on a server's machine.

A server without a copy of the model (`checkpoint=peer`) gets these files with its setup, because
front end and engine need them before any peer can be asked.
"""

from __future__ import annotations

import io
import os
import pathlib
import tempfile
import zipfile
from typing import TYPE_CHECKING

from dance_jax.config import UserError
from dance_jax.launch.control.protocol import Setup

if TYPE_CHECKING:
    from dance_jax.models.config import ModelConfig
    from dance_jax.models.formats import Formats
    from dance_jax.models.tokenizer import Tokenizer

#: Largest compressed size in bytes of the model files in a setup.
MAX_BYTES = 32 << 20


def pack(directory: str | os.PathLike[str]) -> bytes:
    """Pack the small files of a model's directory into a zip file.

    Raises:
        UserError: the files are larger than MAX_BYTES.
    """
    from dance_jax.models.directory import FORMATS, SIDE_FILES

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in (*SIDE_FILES, FORMATS):
            path = pathlib.Path(directory) / name
            if path.exists():
                packed.writestr(name, path.read_bytes())
    if content.tell() > MAX_BYTES:
        raise UserError(
            f"{directory}: config and tokenizer have {content.tell():,} compressed bytes, but "
            f"servers with checkpoint=peer are sent at most {MAX_BYTES:,}: give these servers a "
            "copy of the model"
        )
    return content.getvalue()


class ModelFiles:
    """The model files of a server: from its copy of the model, or from its setup.

    Files from the setup are kept in a temporary directory until `close`.

    Args:
        setup: of the server.
        private: parent of that directory, private to this process; "": the system's default.
    """

    def __init__(self, setup: Setup, private: str) -> None:
        #: Directory or name on the hub; "": the demo model.
        self._model = setup.model
        self._given: tempfile.TemporaryDirectory[str] | None = None
        if setup.model_files:
            self._given = tempfile.TemporaryDirectory(prefix="dance-jax-", dir=private or None)
            with zipfile.ZipFile(io.BytesIO(setup.model_files)) as packed:
                packed.extractall(self._given.name)

    def read(self, chat_template: tuple[str, str] | None = None) -> tuple[ModelConfig, Tokenizer]:
        """Read config and tokenizer.

        Args:
            chat_template: see `Tokenizer.load`.

        Raises:
            UserError: a file is missing, damaged or not supported.
        """
        from dance_jax.models import hub
        from dance_jax.models.directory import demo_dir, read_config
        from dance_jax.models.tokenizer import Tokenizer

        if self._given is not None:
            directory = pathlib.Path(self._given.name)
        else:
            directory = hub.fetch_definition(self._model) if self._model else demo_dir()
        return read_config(directory), Tokenizer.load(directory, chat_template)

    def formats(self) -> Formats:
        """Read the formats of weights that came with the setup.

        Raises:
            UserError: the file is missing or damaged.
        """
        from dance_jax.models.checkpoint import read_formats  # which imports JAX

        assert self._given is not None
        return read_formats(pathlib.Path(self._given.name))

    def close(self) -> None:
        """Remove the files that came with the setup; callable by any thread, more than once."""
        if self._given is not None:
            self._given.cleanup()
