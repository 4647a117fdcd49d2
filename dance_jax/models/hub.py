"""Finds a model given as a directory, a GGUF file or a name on the Hugging Face hub.

`org/name` or `org/name@revision` is downloaded by huggingface_hub into its own cache (HF_HOME,
HF_HUB_CACHE) from HF_ENDPOINT, with HF_TOKEN, or not at all with HF_HUB_OFFLINE=1. That library
reads these variables when it is imported, so it is imported where it is needed. JAX is not imported
here either: the preflight and the reader of the hosts file use this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence

from dance_jax.config import ProgressCallback, UserError
from dance_jax.memory import format_bytes
from dance_jax.models.directory import (
    INDEX,
    SIDE_FILES,
    indexed_files,
    model_directory,
    own_name,
    read_config,
)

#: The file of weights of a model without an index.
SINGLE_FILE = "model.safetensors"
#: The files from which `ModelConfig` is read.
_CONFIG = ("config.json", "generation_config.json")

# The hub's rules for names; the library checks the same in `validate_repo_id`.
_PART = r"\b[A-Za-z0-9_.-]{1,96}\b"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./+-]+))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model on the hub.

    >>> str(HubName("org/name", "v1"))
    'org/name@v1'
    """

    #: org/name
    repo: str
    #: Branch, tag or commit; None for the main branch.
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_name(text: str) -> HubName | None:
    """Parse `org/name` or `org/name@revision`.

    Returns:
        None if the text is neither. Files on this machine are not considered.

    >>> parse_name("org/name@v1")
    HubName(repo='org/name', revision='v1')
    >>> parse_name("./name") or parse_name("/models/name") or parse_name("models/tiny/name")
    """
    match = _NAME.fullmatch(text)
    if (
        match is None
        or "--" in match["repo"]
        or ".." in text
        or match["repo"].endswith((".git", ".gguf"))
    ):
        return None
    return HubName(match["repo"], match["revision"])


def hub_name(model: str | os.PathLike[str]) -> HubName | None:
    """Parse the name of a model on the hub.

    Returns:
        None if the model is a path that exists on this machine, or not a valid name.
    """
    return None if os.path.exists(model) else parse_name(os.fspath(model))


def resolve(
    model: str | os.PathLike[str], progress: ProgressCallback | None = None
) -> pathlib.Path:
    """Find a model's directory; a model on the hub is downloaded unless the cache has it.

    Only what is needed is downloaded: config and tokenizer first, then weights (safetensors) if
    config and tokenizer can be used. If a download is interrupted, complete files are kept, and the
    next call downloads the others.

    Args:
        model: a directory, a GGUF file, `org/name` or `org/name@revision`. A path that exists on
            this machine takes precedence over a name on the hub.
        progress: called before each file of weights; None to show the library's progress bars if
            standard error is a terminal.

    Raises:
        UserError: there is no such model, it is not supported, or it cannot be downloaded.
    """
    name = hub_name(model)
    if name is None:
        return model_directory(model)
    with _explained(name), _bars(progress is None):
        repository = _Repository(name)
        directory = repository.definition()
        files = indexed_files(directory) or [SINGLE_FILE]
        missing = [file for file in files if repository.cached(file) is None]
        if missing:
            repository.check(missing)
            _check_tokenizer(directory)
            for number, file in enumerate(missing, 1):
                if progress is not None:
                    progress(f"downloading {name.repo}, file", number, len(missing))
                repository.get(file)
    return directory


def fetch_config(model: str | os.PathLike[str]) -> pathlib.Path:
    """Find a model's directory with config.json and, if there is one, generation_config.json.

    For a model on the hub, nothing else is downloaded.

    Raises:
        UserError: see `resolve`.
    """
    return _fetch(model, _Repository.config)


def fetch_definition(model: str | os.PathLike[str]) -> pathlib.Path:
    """Find a model's directory with config and tokenizer.

    For a model on the hub, no weights are downloaded.

    Raises:
        UserError: see `resolve`.
    """
    return _fetch(model, _Repository.definition)


def _fetch(
    model: str | os.PathLike[str], part: Callable[[_Repository], pathlib.Path]
) -> pathlib.Path:
    name = hub_name(model)
    if name is None:
        return model_directory(model)
    with _explained(name):
        return part(_Repository(name))


def cached(name: HubName) -> pathlib.Path | None:
    """Find a model's directory in this machine's cache, without asking the hub.

    Returns:
        None if a file of the model is missing.

    Raises:
        UserError: the model's index of files in the cache is invalid.
    """
    from huggingface_hub.errors import RevisionResolutionError

    try:
        repository = _Repository(name, local_only=True)
    except RevisionResolutionError:
        return None
    config = repository.cached("config.json")
    if config is None:
        return None
    repository.cached(INDEX)
    files = indexed_files(config.parent) or [SINGLE_FILE]
    return None if any(repository.cached(file) is None for file in files) else config.parent


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests to the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def portable_name(model: str | os.PathLike[str]) -> str:
    """Name a model for processes on other machines.

    Returns:
        An absolute path or, for a model on the hub, `org/name@commit` with the commit that this
        machine resolved last, so that all machines use the same commit.
    """
    name = hub_name(model)
    if name is None:
        return str(pathlib.Path(model).absolute())
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return str(HubName(name.repo, _Repository(name, local_only=True).commit))
    except RevisionResolutionError:
        return str(name)


def served_name(model: str | os.PathLike[str]) -> str:
    """Name a model for requests and responses: `org/name`, or the directory's or file's name."""
    name = hub_name(model)
    return own_name(model) if name is None else name.repo


class _Repository:
    """The files of one commit of a model, in the cache or on the hub.

    Args:
        name: name of the model; the revision is resolved once, so that all files are of one commit.
        local_only: make no requests to the hub.
    """

    def __init__(self, name: HubName, local_only: bool = False) -> None:
        from huggingface_hub import resolve_revision

        self._name = name
        #: 40 hex digits.
        self.commit: str = resolve_revision(
            name.repo, revision=name.revision, local_files_only=local_only
        ).resolved

    def config(self) -> pathlib.Path:
        """The directory, with the files from which a `ModelConfig` is read.

        Raises:
            UserError: the model has no config.json.
        """
        config = self.get("config.json")
        if config is None:
            raise UserError(
                f"{self._name}: the model has no config.json on the hub, so its format is not that "
                "of transformers; choose another model"
            )
        for file in _CONFIG:
            self.get(file)
        return config.parent

    def definition(self) -> pathlib.Path:
        """The directory, with config, tokenizer and the index of weights.

        Raises:
            UserError: the model is not supported.
        """
        directory = self.config()
        read_config(directory)
        for file in (*SIDE_FILES, INDEX):
            self.get(file)
        return directory

    def cached(self, file: str) -> pathlib.Path | None:
        """A file in the cache; None if the cache does not have the file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._name.repo, file, revision=self.commit)
        return pathlib.Path(found) if isinstance(found, str) else None

    def get(self, file: str) -> pathlib.Path | None:
        """A file, downloaded if the cache lacks it; None if the model has no such file."""
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        found = try_to_load_from_cache(self._name.repo, file, revision=self.commit)
        if isinstance(found, str):
            return pathlib.Path(found)
        if found is not None:  # the cache has a record that the model lacks the file
            return None
        try:
            return pathlib.Path(hf_hub_download(self._name.repo, file, revision=self.commit))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:
            # Cache entries of other programs do not record which files the model lacks.
            if is_offline() and self.cached("config.json") is not None:
                return None
            raise
        except RuntimeError as error:  # raised by hf_xet, which transfers large files
            raise _download_failed(self._name, constants.ENDPOINT, error) from error

    def check(self, files: Sequence[str]) -> None:
        """Check that files can be downloaded: the hub has the files, and the disk has enough space.

        Raises:
            UserError: files or disk space are missing.
        """
        from huggingface_hub import HfApi, constants

        if is_offline():
            raise UserError(
                f"{self._name}: HF_HUB_OFFLINE is set, and {_some(files)} of its weights "
                f"{'is' if len(files) == 1 else 'are'} not in the cache {constants.HF_HUB_CACHE}: "
                "unset it, or copy the cache of a machine that has the model"
            )
        found = HfApi().get_paths_info(self._name.repo, list(files), revision=self.commit)
        sizes = {each.path: getattr(each, "size", 0) for each in found}
        if lacking := [file for file in files if file not in sizes]:
            raise UserError(
                f"{self._name}: the model has no {_some(lacking)} on the hub; weights must be in "
                f"safetensors files, either {SINGLE_FILE} or those listed in {INDEX}: choose "
                "another model or revision, or convert the weights"
            )
        cache = pathlib.Path(constants.HF_HUB_CACHE)
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        free, needed = shutil.disk_usage(existing).free, sum(sizes.values())
        if free < needed:
            raise UserError(
                f"{self._name}: the download to {cache} needs {format_bytes(needed)}, but only "
                f"{format_bytes(free)} are free: free some space, or set HF_HOME to a directory on "
                "a larger disk"
            )


def _check_tokenizer(directory: pathlib.Path) -> None:
    """Check that the tokenizer can be used, before the weights are downloaded."""
    from dance_jax.models.tokenizer import Tokenizer

    Tokenizer.load(directory).check_chat_template()


def _some(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import disable_progress_bars

    with contextlib.nullcontext() if shown else disable_progress_bars():
        yield


@contextlib.contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn the library's errors into `UserError`s that say what to do."""
    import httpx2  # the library's HTTP client; its errors reach the caller
    from huggingface_hub import constants, errors

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: access to this model is restricted: accept its conditions at "
            f"{hub}/{name.repo}, and set HF_TOKEN to a token of that account{_token()}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such directory, and the hub ({hub}) has no such model, or it is private: "
            f"correct the path or the name, or set HF_TOKEN to a token that may read it{_token()}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the hub ({hub}) has {name.repo}, but no revision {name.revision or 'main'}: "
            "name a branch, a tag or a commit of it"
        ) from error
    except (
        errors.RevisionResolutionError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        cause = error.__cause__ or error
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: no such directory, HF_HUB_OFFLINE is set, and the cache {cache} does not "
                "have this model and revision: correct the path or the name, unset HF_HUB_OFFLINE, "
                "or copy the cache of a machine that has the model"
            ) from error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(name, hub, cause) from error
        raise UserError(
            f"{name}: no such directory, and the request to the hub ({hub}) failed: "
            f"{_first_line(cause)}; correct the path or, if this is a model on the hub, check the "
            "network, HTTPS_PROXY and HF_ENDPOINT; with HF_HUB_OFFLINE=1 only the cache is used: "
            f"{cache}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(name, hub, error) from error
    except (httpx2.HTTPError, errors.XetDownloadError) as error:
        raise _download_failed(name, hub, error) from error
    except OSError as error:
        if error.errno is None:  # raised by the library: a file has the wrong length
            raise _download_failed(name, hub, error) from error
        what = "is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written"
        raise UserError(
            f"{name}: the cache {cache} {what}: {error}; free some space or set HF_HOME to another "
            "directory, and run this again: complete files are kept"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}: the response of {hub} is not valid JSON: {_first_line(error)}; check "
            "HF_ENDPOINT and proxies"
        ) from error


def _refused(name: HubName, hub: str, error: Exception) -> UserError:
    status = error.response.status_code  # pyright: ignore[reportAttributeAccessIssue]
    advice = {
        401: f"HF_TOKEN is not valid: create a new token at {hub}/settings/tokens",
        403: f"HF_TOKEN must be a token that may read this model{_token()}",
        404: "HF_ENDPOINT is not the address of a hub: correct or unset HF_ENDPOINT",
        429: "there were too many requests: wait some minutes, or set HF_TOKEN",
    }.get(status, "run this again later: complete files are kept")
    return UserError(f"{name}: the hub ({hub}) answered with status {status}; {advice}")


def _download_failed(name: HubName, hub: str, error: Exception) -> UserError:
    return UserError(
        f"{name}: the download from {hub} failed: {_first_line(error)}; run this again: complete "
        "files are kept"
    )


def _token() -> str:
    from huggingface_hub import get_token

    return " (the current token may not read it)" if get_token() else " (no token is set)"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
