"""One orbax checkpoint of named arrays, written and read by this process alone.

Orbax meets the other processes of a jax.distributed job in barriers unless it is told that this one
is its whole world; see `_alone`. Single arrays are read without their neighbours.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from dance_jax.config import UserError

#: An array is cut into pieces of at most this many bytes, so that few are in memory compressed.
_CHUNK_BYTES = 64 << 20


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a new checkpoint.

    Raises:
        OSError: it cannot be written, as where the disk is full.
    """
    options = _alone()
    saved = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), dict(arrays))
    with ocp.Checkpointer(_handler(options), multiprocessing_options=options) as checkpointer:
        try:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(dict(arrays), saved))
        except ValueError as error:
            # What tensorstore makes of an error of the system; its message has every path twice.
            if found := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


def load_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads the named arrays and no byte of the others.

    By orbax's handler of arrays. Restoring a tree of them would read and build what is known of all
    its arrays first: twice the processor time for an expert, which steps lack while experts move.

    Raises:
        UserError: the checkpoint is torn; the message names it.
    """
    names, directory = list(names), epath.Path(path.absolute())
    context = type_handlers.get_ts_context(use_ocdbt=True)
    arrays = [
        type_handlers.ParamInfo(
            name=name,
            parent_dir=directory,
            path=directory / name,
            is_ocdbt_checkpoint=True,
            ts_context=context,
        )
        for name in names
    ]
    try:
        # In a thread of its own: an event loop may run in the caller's, as in a notebook.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            reading = type_handlers.NumpyHandler().deserialize(arrays)
            restored = thread.submit(asyncio.run, reading).result()
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: torn: {error}; delete the converted model and convert it again"
        ) from error
    return dict(zip(names, restored, strict=True))


def _handler(options: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=options)


def _alone() -> ocp.options.MultiprocessingOptions:
    rank = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"dance-{rank}"
    )
