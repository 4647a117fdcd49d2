"""Config, tokenizer and formats of the model on a server's machine.

A server without a copy of the model (`checkpoint=peer`) gets them with its setup: front end and
engine need them before there is anybody to ask.
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

#: Most bytes that a setup carries of them, compressed.
MAX_BYTES = 32 << 20


def pack(directory: str | os.PathLike[str]) -> bytes:
    """The small files of a model's directory, as a zip file's content.

    Raises:
        UserError: they are not small.
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
            f"{directory}: config and tokenizer have {content.tell():,} bytes, compressed; servers "
            f"with checkpoint=peer are sent {MAX_BYTES:,} at most: give them a copy of the model"
        )
    return content.getvalue()


class ModelFiles:
    """Where a server's processes find them: in its copy of the model, or, as they came with the
    setup, in a directory that is there until they have been read.

    Args:
        setup: of the server.
        private: for that directory, of this process; "": the system's for temporary files.
    """

    def __init__(self, setup: Setup, private: str) -> None:
        self._own = setup.model
        #: How weights are kept, where that came with the setup and has been read.
        self.formats: Formats | None = None
        self._given: tempfile.TemporaryDirectory[str] | None = None
        if setup.model_files:
            self._given = tempfile.TemporaryDirectory(prefix="dance-jax-", dir=private or None)
            with zipfile.ZipFile(io.BytesIO(setup.model_files)) as packed:
                packed.extractall(self._given.name)

    def read(self) -> tuple[ModelConfig, Tokenizer]:
        """Reads both; the directory, if it is not the server's own, is gone then.

        Raises:
            UserError: one is missing, torn or not supported.
        """
        # Not above: it brings JAX along.
        from dance_jax.launch.planning.defaults import demo_dir
        from dance_jax.models import hub
        from dance_jax.models.checkpoint import read_formats
        from dance_jax.models.directory import read_config
        from dance_jax.models.tokenizer import Tokenizer

        try:
            if self._given is not None:
                directory = pathlib.Path(self._given.name)
                self.formats = read_formats(directory)
            else:
                directory = hub.fetch_definition(self._own) if self._own else demo_dir()
            return read_config(directory), Tokenizer.load(directory)
        finally:
            self.close()

    def close(self) -> None:
        """Removes what came with the setup; from any thread, and more than once."""
        if self._given is not None:
            self._given.cleanup()
