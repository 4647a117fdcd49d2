"""Orbax checkpoints of named arrays, written and read by a single process.

By default orbax waits in barriers for the other processes of a jax.distributed job; `_alone`
prevents that. Single arrays can be read without the other arrays of their checkpoint.
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

#: Most bytes of a chunk of an array; small chunks limit the memory that compression needs.
_CHUNK_BYTES = 64 << 20


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a new checkpoint.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    options = _alone()
    saved = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), dict(arrays))
    with ocp.Checkpointer(_handler(options), multiprocessing_options=options) as checkpointer:
        try:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(dict(arrays), saved))
        except ValueError as error:
            # tensorstore turns an OSError into a ValueError whose message has every path twice.
            if found := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
                number = int(found[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


def load_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read the named arrays and no other bytes.

    Uses orbax's array handler directly. Restoring a tree would first read the metadata of all
    arrays of the checkpoint, which takes twice the processor time for an expert, at the expense of
    steps that run while experts move.

    Raises:
        UserError: the checkpoint is damaged; the message names it.
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
        # In a separate thread, because the caller's thread may run an event loop (a notebook).
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            reading = type_handlers.NumpyHandler().deserialize(arrays)
            restored = thread.submit(asyncio.run, reading).result()
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: damaged: {error}; delete the converted model and convert it again"
        ) from error
    return dict(zip(names, restored, strict=True))


def _handler(options: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=options)


def _alone() -> ocp.options.MultiprocessingOptions:
    rank = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"dance-{rank}"
    )
