"""Converts a Hugging Face directory or a GGUF file to orbax checkpoints:
python -m dance_jax.models.convert SRC DST

Tensors are read one at a time and written in groups of bounded size, so memory use is small
regardless of the model's size. Everything is written to a directory next to the destination, which
is renamed at the end, so a destination that exists is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from dance_jax.config import EXPERT_CHOICES, TRUNK_CHOICES, ProgressCallback, Rounding, UserError
from dance_jax.memory import format_bytes
from dance_jax.models.checkpoint import (
    FORMAT,
    Checkpoint,
    Outline,
    is_converted,
    write_manifest,
)
from dance_jax.models.directory import (
    indexed_files,
    is_gguf,
    model_directory,
    own_name,
    read_config,
    weight_files,
)
from dance_jax.models.experts import expert_format
from dance_jax.models.formats import Formats
from dance_jax.models.ggml.model import open_source
from dance_jax.models.hf import HFDirectory
from dance_jax.models.orbax_store import save_arrays
from dance_jax.models.rounding import expected_formats, model_formats, unfit_report
from dance_jax.models.tensors import (
    TensorRule,
    arrays_of,
    expert_rules,
    parts_of,
    trunk_rules,
)

#: Most bytes of arrays in one checkpoint; a larger tensor gets a checkpoint of its own.
GROUP_BYTES = 128 << 20
#: Seconds in which the writer threads of an interrupted conversion must stop.
_REMOVE_TIMEOUT_S = 10.0


KEEP = Rounding()


def convert(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    progress: ProgressCallback | None = None,
    rounding: Rounding = KEEP,
) -> pathlib.Path:
    """Convert a model.

    Two conversions to the same destination may run concurrently: the second waits and then finds
    the finished result. Leftovers of a killed conversion are removed by the next one.

    Args:
        source: directory in Hugging Face format, or a GGUF file.
        destination: directory to create. If the directory exists and is not empty, it must be the
            same model in the same formats.
        progress: called after each group of tensors.
        rounding: formats to which weights are rounded.

    Returns:
        The destination.

    Raises:
        UserError: the source is invalid, or the destination contains something else.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination).absolute()
    if os.path.lexists(destination) and not destination.is_dir():
        raise UserError(f"{destination}: exists and is not a directory; choose another destination")
    return _convert(open_source(source), destination, progress, rounding)


def _convert(
    model: HFDirectory,
    destination: pathlib.Path,
    progress: ProgressCallback | None,
    rounding: Rounding,
) -> pathlib.Path:
    """`convert` for an opened model."""
    formats, source = model_formats(model, rounding), model.fingerprint()
    fingerprint = _fingerprint(source, formats)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _lock_path(destination).touch()
    except OSError as error:
        raise UserError(f"{destination.parent}: cannot be written: {error}") from error
    with _exclusive(destination):
        if destination.exists() and any(destination.iterdir()):
            if (
                is_converted(destination)
                and Checkpoint.open(destination).fingerprint == fingerprint
            ):
                return destination
            raise UserError(
                f"{destination}: exists and is not this model in these formats; choose another "
                "directory"
            )
        partial = _partial(destination)
        _remove(partial)
        try:
            report = progress or (lambda text, done, total: None)
            _Conversion(model, formats, partial, report).run(source, fingerprint)
            partial.rename(destination)
        except OSError as error:
            raise UserError(f"{destination}: cannot be written: {error}") from error
        finally:
            _remove(partial)
    return destination


def ensure_converted(
    source: str | pathlib.Path,
    cache_dir: str | pathlib.Path,
    progress: ProgressCallback | None = None,
    rounding: Rounding = KEEP,
) -> pathlib.Path:
    """Return the converted form of a model, converting the model to the cache on first use.

    Args:
        source: directory in Hugging Face format, a GGUF file, or a directory that is already
            converted.
        cache_dir: contains one directory for each combination of model and formats.
        progress: called only if the model is converted now.
        rounding: formats to which weights are rounded.

    Returns:
        A directory for `Checkpoint.open`.

    Raises:
        UserError: the source or the cached conversion is invalid.
    """
    source, cache_dir = pathlib.Path(source), pathlib.Path(cache_dir)
    if is_converted(source):
        if rounding != KEEP:
            raise UserError(
                f"{source}: already converted; weights are rounded only during conversion: use the "
                "original model, or leave out --experts and --trunk"
            )
        return source
    model = open_source(source, scales=False)
    # Conversions with an earlier version of the layout stay until the user removes them.
    fingerprint = _fingerprint(model.fingerprint(), model_formats(model, rounding))
    name = f"{own_name(source)}-{fingerprint[:16]}-{FORMAT}"
    if not is_converted(cache_dir / name):
        _remove_abandoned(cache_dir)
        # Opened again, now with a check of all scales, which only a conversion needs.
        _convert(open_source(source), (cache_dir / name).absolute(), progress, rounding)
    return cache_dir / name


def _fingerprint(source: str, formats: Formats) -> str:
    """Hash (hex) of a conversion, from the hash of its source and the formats."""
    text = source + json.dumps(formats.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_readable(directory: str | pathlib.Path) -> None:
    """Check that a model's weights can be converted, before its other files are read.

    Raises:
        UserError: the weights are missing, config.json is invalid, or the model is quantised in an
            unsupported way.
    """
    directory = model_directory(directory)
    if is_gguf(directory):
        open_source(directory)
    elif not is_converted(directory):
        read_config(directory)
        weight_files(directory)


def outline(directory: str | pathlib.Path, rounding: Rounding = KEEP) -> Outline:
    """The `Outline` of a model, without converting the model; config.json alone is enough.

    Args:
        directory: directory in Hugging Face format, with or without weights, or converted; or a
            GGUF file.
        rounding: formats to which weights are to be rounded.

    Raises:
        UserError: the model is not supported, or existing weights do not match its config.
    """
    directory = pathlib.Path(directory)
    if is_converted(directory):
        return Checkpoint.open(directory)
    if is_gguf(directory):
        return _outline(open_source(directory), rounding)
    config = read_config(directory)
    files = [directory / name for name in indexed_files(directory) or ()]
    files = files or [*directory.glob("*.safetensors")]
    # The weights may not be downloaded yet, for example because the user plans first.
    if not files or not all(file.exists() for file in files):
        return Outline(config, expected_formats(config, rounding))
    return _outline(open_source(directory, scales=False), rounding)


def _outline(model: HFDirectory, rounding: Rounding) -> Outline:
    formats, source = model_formats(model, rounding), model.fingerprint()
    return Outline(model.config, formats, source, _fingerprint(source, formats))


#: Tensors that are written together: the number of an expert and the rules of its tensors, or None
#: and the rule of a tensor of the trunk.
_Item = tuple[int | None, list[TensorRule]]


class _Conversion:
    """Writes a converted model.

    Args:
        model: the source.
        formats: formats of the converted weights.
        directory: the directory to create.
        progress: called after each group of tensors.
    """

    def __init__(
        self,
        model: HFDirectory,
        formats: Formats,
        directory: pathlib.Path,
        progress: ProgressCallback,
    ) -> None:
        self._model, self._formats = model, formats
        self._directory, self._progress = directory, progress
        config = model.config
        self._trunk: list[_Item] = [(None, [rule]) for rule in trunk_rules(config)]
        self._layers: list[list[_Item]] = [
            [(expert, expert_rules(config, layer, expert)) for expert in range(config.num_experts)]
            for layer in config.moe_layers
        ]
        self._expert = expert_format(config, formats.experts)
        #: Bytes of the source, the unit of progress.
        self._total = sum(self._size(item) for items in self._all() for item in items)
        self._done = 0
        planned = Outline(config, formats)
        experts = len(config.moe_layers) * config.num_experts
        #: Bytes of the converted model, uncompressed.
        self._converted_bytes = planned.trunk_bytes("float32") + experts * planned.expert_bytes(
            "float32"
        )

    def _all(self) -> list[list[_Item]]:
        return [self._trunk, *self._layers]

    def _size(self, item: _Item) -> int:
        """Bytes of an item's tensors in the source."""
        return sum(self._model.tensors[rule.source].size for rule in item[1])

    def run(self, source: str, fingerprint: str) -> None:
        """Write everything, the manifest last.

        Raises:
            UserError: there is too little space on the disk.
            OSError: writing failed.
        """
        directory = self._directory
        free = shutil.disk_usage(directory.parent).free
        if free < self._converted_bytes:
            raise UserError(
                f"{directory.parent}: {format_bytes(free)} are free, the converted model needs "
                f"about {format_bytes(self._converted_bytes)}: free some space, or use a directory "
                "on another disk"
            )
        directory.mkdir()
        self._model.write_side_files(directory)
        trunk = self._write(self._trunk, directory / "trunk")
        experts = [
            self._write(items, directory / "experts" / str(index))
            for index, items in enumerate(self._layers)
        ]
        write_manifest(directory, source, fingerprint, self._formats, trunk, experts)

    def _write(self, items: list[_Item], where: pathlib.Path) -> list[list[str]]:
        """Write the arrays of some tensors to checkpoints; return the names in each checkpoint."""
        where.mkdir(parents=True)
        names: list[list[str]] = []
        for part in self._parts(items):
            arrays = {name: array for item in part for name, array in self._arrays(item)}
            save_arrays(where / str(len(names)), arrays)
            names.append(list(arrays))
            self._done += sum(map(self._size, part))
            self._progress("converting", self._done, self._total)
        return names

    def _parts(self, items: list[_Item]) -> Iterator[list[_Item]]:
        part: list[_Item] = []
        size = 0
        for item in items:
            new = self._size(item)
            if part and size + new > GROUP_BYTES:
                yield part
                part, size = [], 0
            part.append(item)
            size += new
        if part:
            yield part

    def _arrays(self, item: _Item) -> Iterator[tuple[str, np.ndarray]]:
        """Names and arrays of an item, as they are written."""
        expert, rules = item
        arrays = {name: array for rule in rules for name, array in self._made_of(rule, expert)}
        if expert is None:
            yield from arrays.items()
        else:
            yield str(expert), self._expert.joined(self._expert.from_stored(arrays))

    def _made_of(self, rule: TensorRule, expert: int | None) -> Iterator[tuple[str, np.ndarray]]:
        forms = self._formats.trunk if expert is None else self._formats.experts
        tensor = self._model.tensors[rule.source]
        for path, part in parts_of(rule, tensor):
            try:
                arrays = arrays_of(path, part, forms.get(path))
                for name, array in arrays.items():
                    _check_scales(name, array)
            except ValueError as error:
                raise UserError(
                    f"{tensor.file}: {rule.source}: {error}; download the model again"
                ) from error
            for name, array in arrays.items():
                if array.dtype == np.float64:
                    array = array.astype(np.float32)
                yield name, np.ascontiguousarray(array)


def _check_scales(name: str, array: np.ndarray) -> None:
    """Check that scales and offsets are finite; other arrays are not checked.

    Raises:
        ValueError: some are NaN or infinite.
    """
    if not name.endswith((".scale", ".offset")):
        return
    wrong = array == 255 if array.dtype == np.uint8 else ~np.isfinite(array)
    if count := np.count_nonzero(wrong):
        kind = name.rpartition(".")[2]
        raise ValueError(f"{count} of {array.size} {kind}s are NaN or infinite")


def _partial(destination: pathlib.Path) -> pathlib.Path:
    return destination.with_name(f".{destination.name}.partial")


def _lock_path(destination: pathlib.Path) -> pathlib.Path:
    return destination.with_name(f".{destination.name}.lock")


@contextlib.contextmanager
def _exclusive(destination: pathlib.Path, wait: bool = True) -> Iterator[bool]:
    """Hold the destination's lock, which the system releases when the process ends.

    Args:
        wait: wait while another process holds the lock.

    Yields:
        False if the lock is held by another process and `wait` is False; otherwise True.
    """
    path = _lock_path(destination)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        # The previous holder may have removed the file; other processes then lock a new file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                break
        os.close(handle)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _remove_abandoned(cache_dir: pathlib.Path) -> None:
    """Remove the leftovers of killed conversions from the cache."""
    for partial in cache_dir.glob(".*.partial"):
        name = partial.name.removeprefix(".").removesuffix(".partial")
        with _exclusive(cache_dir / name, wait=False) as ours:
            if ours:
                _remove(partial)


def _remove(partial: pathlib.Path) -> None:
    """Remove a partial conversion.

    Retries for a while, because orbax's threads may still write after an interruption.
    """
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
        if time.monotonic() > deadline:
            raise UserError(f"{partial}: cannot be removed; delete it")
        time.sleep(0.05)


def main(
    arguments: list[str] | None = None, prog: str = "python -m dance_jax.models.convert"
) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Converts a model in Hugging Face format or in GGUF files for dance_jax.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="directory with config.json and *.safetensors, or a .gguf file (any part of a split "
        "model)",
    )
    parser.add_argument("destination", metavar="DST", help="directory to create")
    parser.add_argument(
        "--experts",
        choices=EXPERT_CHOICES,
        default="keep",
        help="format to which routed experts are rounded (default: %(default)s)",
    )
    parser.add_argument(
        "--trunk",
        choices=TRUNK_CHOICES,
        default="keep",
        help="format to which all other matrices are rounded (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion needs no accelerator

    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    rounding = Rounding(options.experts, options.trunk)
    try:
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("reading headers", total=None)
            convert(
                options.source,
                options.destination,
                lambda text, done, total: bar.update(
                    task, description=text, completed=done, total=total
                ),
                rounding,
            )
            model = open_source(options.source, scales=False)
            lines = [*unfit_report(rounding, model.config), model.report()]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the partial conversion was removed", file=sys.stderr)
        return 130
    for line in filter(None, lines):
        print(line, file=sys.stderr)
    print(options.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
