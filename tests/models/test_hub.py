"""Models by name on the hub: what is downloaded, what is not, and the error messages."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dance_jax.config import UserError
from dance_jax.launch.preflight import model_state
from dance_jax.models import hf, hub
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.hub import HubName
from dance_jax.models.random_weights import write_random_checkpoint
from tests.models.fake_hub import TOKEN, Caller, FakeHub, environment, running_hub
from tests.tiny_models import SERVED

CONFIG = ["config.json", "generation_config.json"]
DEFINITION = [*CONFIG, "tokenizer.json", "tokenizer_config.json", hub.INDEX]
#: Files in a repository that are not needed.
OTHERS = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "model.gguf",
    "onnx/model.onnx",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with several files of weights, and with files that are not needed."""
    path = write_random_checkpoint(
        tmp_path_factory.mktemp("published") / "model", SERVED, seed=3, shard_bytes=100_000
    )
    (path / "generation_config.json").write_text("{}")
    for name in OTHERS:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not needed")
    return path


@pytest.fixture(scope="module")
def shards(model: pathlib.Path) -> list[str]:
    names = sorted(path.name for path in model.glob("model-*.safetensors"))
    assert len(names) >= 3
    return names


@pytest.fixture(scope="module")
def caller() -> Iterator[Caller]:
    caller = Caller()
    yield caller
    caller.close()


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def call(fake: FakeHub, caller: Caller, tmp_path: pathlib.Path) -> Callable[..., Any]:
    """call(function of hub, *arguments, **environment variables), with the fake hub."""

    def call(function: str, *arguments: str, **variables: str) -> Any:
        name = function if ":" in function else f"dance_jax.models.hub:{function}"
        known = environment(fake, tmp_path / "hf", **variables)
        return caller(name, *arguments, variables=known)

    return call


def test_names_and_paths() -> None:
    for text in ("org/name", "Org-1/na.me_2"):
        assert hub.parse_name(text) == HubName(text)
    for revision in ("main", "v1.0", "refs/pr/3", "0" * 40):
        assert hub.parse_name(f"org/name@{revision}") == HubName("org/name", revision)
    for text in (
        "name", "./name", "../name", "~/name", "/org/name", "org/name/", "a/b/c", "org/na me",
        "org/name@", "org/name@..", "org/--name", "-org/name", "org/name.git", "org/", "/", "",
        "https://hub/org/name", "örg/name",
    ):  # fmt: skip
        assert hub.parse_name(text) is None, text


def test_what_exists_here_is_no_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file").touch()
    assert hub.resolve("org/name") == hub.fetch_config("org/name") == pathlib.Path("org/name")
    assert hub.portable_name("org/name") == str(tmp_path / "org" / "name")
    assert hub.served_name("org/name") == "name"
    with pytest.raises(UserError, match=r"^org/file: no such directory"):
        hub.resolve("org/file")
    with pytest.raises(UserError, match=r"^\./name: no such directory; .* or org/name@revision on"):
        hub.resolve("./name")


def test_only_what_is_needed_is_downloaded_and_once(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, shards: list[str]
) -> None:
    commit = fake.add("org/name", model)
    directory = pathlib.Path(call("resolve", "org/name"))
    assert fake.fetched() == DEFINITION + shards
    assert sorted(path.name for path in directory.iterdir()) == sorted(DEFINITION + shards)
    assert all((directory / n).read_bytes() == (model / n).read_bytes() for n in shards)
    assert hf.HFDirectory(directory).fingerprint() == hf.HFDirectory(model).fingerprint()

    fake.requests.clear()
    assert call("resolve", "org/name") == str(directory)
    assert [path for _, path, _ in fake.requests] == ["api/models/org/name"]

    # For a commit that is in the cache, no request is sent.
    fake.requests.clear()
    assert call("portable_name", "org/name") == f"org/name@{commit}"
    assert call("resolve", f"org/name@{commit}") == str(directory)
    assert call("served_name", f"org/name@{commit}") == "org/name"
    assert fake.requests == []


def test_a_model_in_one_file(
    fake: FakeHub, call: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    fake.add("org/name", write_random_checkpoint(tmp_path / "model", SERVED))
    directory = pathlib.Path(call("resolve", "org/name"))
    assert fake.fetched()[-1] == hub.SINGLE_FILE
    Checkpoint.open(ensure_converted(directory, tmp_path / "cache"))


def test_config_alone(fake: FakeHub, call: Callable[..., Any], model: pathlib.Path) -> None:
    fake.add("org/name", model)
    directory = call("fetch_config", "org/name")
    assert fake.fetched() == CONFIG
    assert call("fetch_definition", "org/name") == directory
    assert fake.fetched() == DEFINITION


def test_a_connection_that_is_cut_goes_on_where_it_was(
    fake: FakeHub, call: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    """The library saves received data in chunks of 10 MiB."""
    fields = SERVED | {"moe_intermediate_size": 1024}
    model = write_random_checkpoint(tmp_path / "model", fields)
    fake.add("org/name", model)
    fake.cuts[hub.SINGLE_FILE] = 11 << 20
    directory = pathlib.Path(call("resolve", "org/name"))
    ranges = [range_ for _, path, range_ in fake.requests if path.endswith(hub.SINGLE_FILE)]
    assert ranges[-2:] == [None, f"bytes={10 << 20}-"]
    content = (model / hub.SINGLE_FILE).read_bytes()
    assert (directory / hub.SINGLE_FILE).read_bytes() == content


def test_after_ctrl_c_the_next_run_goes_on(
    fake: FakeHub,
    call: Callable[..., Any],
    model: pathlib.Path,
    shards: list[str],
    tmp_path: pathlib.Path,
) -> None:
    fake.add("org/name", model)
    (tmp_path / "hosts.txt").write_text("alpha address=localhost experts=16\n")
    hold = fake.holds[shards[1]] = threading.Event()
    command = [sys.executable, "-m", "dance_jax.launch", "--hosts", str(tmp_path / "hosts.txt")]
    process = subprocess.Popen(
        [*command, "--model", "org/name", "--cache-dir", str(tmp_path / "cache")],
        env=os.environ | environment(fake, tmp_path / "hf"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert fake.held.wait(60)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        hold.set()
    assert process.returncode == 130, out
    assert f"downloading org/name, file 2 of {len(shards)}" in out and "interrupted" in out
    assert not list((tmp_path / "hf").rglob("*.incomplete"))

    fake.requests.clear()
    fake.holds.clear()
    call("resolve", "org/name")
    assert fake.fetched() == shards[1:]


def test_offline(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, shards: list[str]
) -> None:
    fake.add("org/name", model)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and the cache .* does not have"):
        call("resolve", "org/name", HF_HUB_OFFLINE="1")
    call("fetch_definition", "org/name")
    match = rf"{shards[0]} and {len(shards) - 1} more of its weights are not in the cache .*unset"
    with pytest.raises(UserError, match=match):
        call("resolve", "org/name", HF_HUB_OFFLINE="1")
    directory = call("resolve", "org/name")
    fake.requests.clear()
    assert call("resolve", "org/name", HF_HUB_OFFLINE="1") == directory
    with pytest.raises(UserError, match=r"^org/name@other: .*this model and revision"):
        call("resolve", "org/name@other", HF_HUB_OFFLINE="1")
    assert fake.requests == []


def test_without_a_network_the_cache_serves(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path
) -> None:
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=rf"hub \({nowhere}\) failed.*check the network"):
        call("resolve", "org/name", HF_ENDPOINT=nowhere)
    fake.add("org/name", model)
    directory = call("resolve", "org/name")
    assert call("resolve", "org/name", HF_ENDPOINT=nowhere) == directory


def test_what_the_hub_refuses(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, shards: list[str]
) -> None:
    match = r"^org/nane: no such directory, and the hub .* has no such model, or it is private"
    with pytest.raises(UserError, match=match):
        call("resolve", "org/nane")
    fake.add("org/name", model)
    with pytest.raises(UserError, match=r"^org/name@v9: .* but no revision v9: name a branch"):
        call("resolve", "org/name@v9")
    fake.forbidden.add("org/name")
    with pytest.raises(UserError, match=r"answered with status 403; HF_TOKEN must be a token that"):
        call("resolve", "org/name", HF_TOKEN=TOKEN)
    fake.forbidden.clear()
    fake.gated.add("org/name")
    with pytest.raises(UserError, match=rf"restricted.*{fake.url}/org/name.*HF_TOKEN.*no token is"):
        call("resolve", "org/name")
    with pytest.raises(UserError, match=r"restricted.*the current token may not read it"):
        call("resolve", "org/name", HF_TOKEN="hf_other")
    assert fake.fetched() == []
    call("resolve", "org/name", HF_TOKEN=TOKEN)
    assert fake.fetched() == DEFINITION + shards


def test_what_cannot_be_used_is_refused_before_weights(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def published(name: str) -> pathlib.Path:
        fake.add(f"org/{name}", shutil.copytree(model, tmp_path / name))
        return tmp_path / name

    (published("dense") / "config.json").write_text(json.dumps(SERVED | {"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2"):
        call("resolve", "org/dense")
    assert fake.fetched() == CONFIG
    (published("empty") / "config.json").unlink()
    with pytest.raises(UserError, match=r"^org/empty: the model has no config.json on the hub"):
        call("resolve", "org/empty")
    (published("mute") / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        call("resolve", "org/mute")
    pickled = published("pickled")
    (pickled / hub.INDEX).unlink()
    with pytest.raises(UserError, match=r"^org/pickled: the model has no model.safetensors on"):
        call("resolve", "org/pickled")
    (published("odd") / hub.INDEX).write_text('{"weight_map": {"w": "pytorch_model.bin"}}')
    with pytest.raises(UserError, match=r"org--odd.*does not map names to safetensors files"):
        call("resolve", "org/odd")
    assert not any(name.endswith((".safetensors", ".bin")) for name in fake.fetched())


def test_no_room(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, shards: list[str]
) -> None:
    fake.add("org/name", model)
    fake.sizes[shards[0]] = 10**18
    with pytest.raises(UserError, match=r"needs 909494\.7 TiB, but only .*iB are free.* HF_HOME"):
        call("resolve", "org/name")
    assert fake.fetched() == DEFINITION


def test_revisions(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    older = write_random_checkpoint(tmp_path / "older", SERVED, seed=4)
    old = fake.add("org/name", older, "v1", "refs/pr/1")
    new = fake.add("org/name", model)
    assert pathlib.Path(call("resolve", "org/name")).name == new
    for revision in ("v1", "refs/pr/1", old):
        directory = pathlib.Path(call("resolve", f"org/name@{revision}"))
        assert directory.name == old
    assert hf.HFDirectory(directory).fingerprint() == hf.HFDirectory(older).fingerprint()
    assert call("portable_name", "org/name@v1") == f"org/name@{old}"
    assert call("portable_name", "org/unknown") == "org/unknown"


def test_a_preflight_downloads_nothing(
    fake: FakeHub, call: Callable[..., Any], model: pathlib.Path, shards: list[str]
) -> None:
    state = "dance_jax.launch.preflight.model_state:model_state"
    fake.add("org/name", model)
    assert "kind='to download', problem=''" in call(state, "org/name")
    assert "problem='HF_HUB_OFFLINE is set" in call(state, "org/name", HF_HUB_OFFLINE="1")
    assert fake.requests == []
    directory = pathlib.Path(call("resolve", "org/name"))
    fake.requests.clear()
    found, here = call(state, "org/name"), model_state.model_state(directory)
    assert here.kind == "hf" and not here.problem
    for name in ("kind", "problem", "definition", "index"):
        assert f"{name}={getattr(here, name)!r}" in found
    (directory / shards[0]).unlink()
    assert "kind='to download'" in call(state, "org/name")
    assert fake.requests == []
