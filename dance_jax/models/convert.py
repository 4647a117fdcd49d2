"""Turns a Hugging Face directory or a GGUF file into orbax checkpoints:
python -m dance_jax.models.convert SRC DST

Tensors are read one at a time and written in groups of bounded size, so memory stays small however
large the model is. Everything is written beside the destination and renamed at the end: what bears
the destination's name is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from dance_jax.config import UserError
from dance_jax.models.checkpoint import (
    FORMAT,
    Checkpoint,
    Outline,
    expert_leaf,
    is_converted,
    write_manifest,
)
from dance_jax.models.directory import (
    check_loadable,
    indexed_files,
    is_gguf,
    model_directory,
    own_name,
    read_config,
    weight_files,
)
from dance_jax.models.ggml.model import open_source
from dance_jax.models.hf import HFDirectory
from dance_jax.models.orbax_store import save_arrays
from dance_jax.models.tensors import TensorRule, expert_rules, trunk_rules

#: progress(text, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]

#: Bytes of the arrays of one checkpoint; a larger single tensor has a checkpoint of its own.
GROUP_BYTES = 128 << 20
#: Seconds that writers of an interrupted conversion have to notice.
_REMOVE_TIMEOUT_S = 10.0


def convert(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Converts a model.

    Two conversions to one destination may run at once: the second waits and finds it done. What a
    killed conversion left is removed by the next one.

    Args:
        source: directory in Hugging Face format, or a GGUF file.
        destination: made by this; if it exists already it must hold the same model.
        progress: told after each group of tensors.

    Returns:
        The destination.

    Raises:
        UserError: the source is wrong, or the destination is something else.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination).absolute()
    if os.path.lexists(destination) and not destination.is_dir():
        raise UserError(f"{destination}: exists and is no directory; choose another one")
    model = open_source(source)
    fingerprint = model.fingerprint()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _lock_path(destination).touch()
    except OSError as error:
        raise UserError(f"{destination.parent}: cannot be written: {error}") from error
    with _only_one(destination):
        if destination.exists() and any(destination.iterdir()):
            if (
                is_converted(destination)
                and Checkpoint.open(destination).fingerprint == fingerprint
            ):
                return destination
            raise UserError(
                f"{destination}: exists and is not this model; choose another directory"
            )
        partial = _partial(destination)
        _remove(partial)
        try:
            _write(model, partial, fingerprint, progress or (lambda text, done, total: None))
            partial.rename(destination)
        except OSError as error:
            raise UserError(f"{destination}: cannot be written: {error}") from error
        finally:
            _remove(partial)
    return destination


def ensure_converted(
    source: str | pathlib.Path,
    cache_dir: str | pathlib.Path,
    progress: Progress | None = None,
) -> pathlib.Path:
    """The converted form of a model, made in the cache on first use.

    Args:
        source: directory in Hugging Face format, a GGUF file, or a directory that is converted
            already.
        cache_dir: holds one directory for each content that was converted.
        progress: called only if the model is converted now.

    Returns:
        A directory for `Checkpoint.open`.

    Raises:
        UserError: the source or the cached conversion is wrong.
    """
    source, cache_dir = pathlib.Path(source), pathlib.Path(cache_dir)
    if is_converted(source):
        return source
    model = open_source(source)
    # Conversions of earlier versions of the layout stay until the user removes them.
    name = f"{own_name(source)}-{model.fingerprint()[:16]}-{FORMAT}"
    if not is_converted(cache_dir / name):
        _remove_abandoned(cache_dir)
        convert(source, cache_dir / name, progress)
    return cache_dir / name


def check_readable(directory: str | pathlib.Path) -> None:
    """Check that a model's weights can be converted, before its other files are read.

    Raises:
        UserError: the weights are missing or quantised, or config.json is wrong.
    """
    directory = model_directory(directory)
    if is_gguf(directory):
        open_source(directory)
    elif not is_converted(directory):
        check_loadable(read_config(directory), directory)
        weight_files(directory)


def outline(directory: str | pathlib.Path) -> Outline:
    """What can be planned of a model without converting it, from its config.json alone if need be.

    Args:
        directory: in Hugging Face format, with or without weights, or converted; or a GGUF file.

    Raises:
        UserError: the model is not supported, or weights that are there do not fit it.
    """
    directory = pathlib.Path(directory)
    if is_converted(directory):
        return Checkpoint.open(directory)
    if is_gguf(directory):
        model = open_source(directory)
        return Outline(model.config, model.fingerprint())
    config = read_config(directory)
    files = [directory / name for name in indexed_files(directory) or ()]
    files = files or [*directory.glob("*.safetensors")]
    # Weights may be on their way, or not wanted before the plan is known.
    if config.quantization or not files or not all(file.exists() for file in files):
        return Outline(config)
    return Outline(config, HFDirectory(directory).fingerprint())


def _write(
    model: HFDirectory, directory: pathlib.Path, fingerprint: str, progress: Progress
) -> None:
    config = model.config
    trunk_items = [("", rule) for rule in trunk_rules(config)]
    total = sum(model.tensors[rule.source].size for _, rule in trunk_items)
    layers = []
    for layer in config.moe_layers:
        rules = [expert_rules(config, layer, e) for e in range(config.num_experts)]
        layers.append(rules)
        total += sum(model.tensors[rule.source].size for own in rules for rule in own)
    free = shutil.disk_usage(directory.parent).free
    if free < total:
        raise UserError(
            f"{directory.parent}: {free / 1e9:.1f} GB are free, the converted model needs about "
            f"{total / 1e9:.1f} GB"
        )
    directory.mkdir()
    model.write_side_files(directory)

    done = 0

    def group(items: list[tuple[str, TensorRule]], where: pathlib.Path) -> list[list[str]]:
        """Writes the arrays of (prefix of the name, rule), a checkpoint at a time."""
        nonlocal done
        where.mkdir(parents=True)
        names: list[list[str]] = []
        for part in _parts(model, items):
            arrays = dict(_arrays(model, part))
            save_arrays(where / str(len(names)), arrays)
            names.append(list(arrays))
            done += sum(model.tensors[rule.source].size for _, rule in part)
            progress("converting", done, total)
        return names

    trunk = group(trunk_items, directory / "trunk")
    experts = [
        group(
            [(expert_leaf(e, ""), rule) for e, own in enumerate(rules) for rule in own],
            directory / "experts" / str(index),
        )
        for index, rules in enumerate(layers)
    ]
    write_manifest(directory, fingerprint, trunk, experts)


def _parts(
    model: HFDirectory, items: list[tuple[str, TensorRule]]
) -> Iterator[list[tuple[str, TensorRule]]]:
    part: list[tuple[str, TensorRule]] = []
    size = 0
    for item in items:
        new = model.tensors[item[1].source].size
        if part and size + new > GROUP_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += new
    if part:
        yield part


def _arrays(
    model: HFDirectory, part: list[tuple[str, TensorRule]]
) -> Iterator[tuple[str, np.ndarray]]:
    for prefix, rule in part:
        tensor = model.tensors[rule.source].read()
        if tensor.dtype == np.float64:
            tensor = tensor.astype(np.float32)
        for target in rule.targets:
            yield prefix + target.path, np.ascontiguousarray(target.cut(tensor))


def _partial(destination: pathlib.Path) -> pathlib.Path:
    return destination.with_name(f".{destination.name}.partial")


def _lock_path(destination: pathlib.Path) -> pathlib.Path:
    return destination.with_name(f".{destination.name}.lock")


@contextlib.contextmanager
def _only_one(destination: pathlib.Path, wait: bool = True) -> Iterator[bool]:
    """Holds the destination's lock, which ends with the process; yields False if it is taken."""
    path = _lock_path(destination)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        # whoever held it before may have removed the file: then others lock another one
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
    """Removes what conversions that died have left in the cache."""
    for partial in cache_dir.glob(".*.partial"):
        name = partial.name.removeprefix(".").removesuffix(".partial")
        with _only_one(cache_dir / name, wait=False) as ours:
            if ours:
                _remove(partial)


def _remove(partial: pathlib.Path) -> None:
    """Removes what a conversion wrote; orbax's threads may still write after an interruption."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
        if time.monotonic() > deadline:
            raise UserError(f"{partial}: cannot be removed; delete it")
        time.sleep(0.05)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dance_jax.models.convert",
        description="Converts a model in Hugging Face format or in GGUF files for dance_jax.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="directory with config.json and *.safetensors, or a .gguf file (of several: any)",
    )
    parser.add_argument("destination", metavar="DST", help="directory to make")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    try:
        with bars.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("reading headers", total=None)
            convert(
                options.source,
                options.destination,
                lambda text, done, total: bar.update(
                    task, description=text, completed=done, total=total
                ),
            )
            report = open_source(options.source).report()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130
    if report:
        print(report, file=sys.stderr)
    print(options.destination)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no array of a conversion needs a device
    sys.exit(main())
