"""Conversion: exact, interruptible, bounded in memory; single experts can be read alone."""

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest

import dance_jax.models.convert as convert_module
from dance_jax.config import Rounding, UserError
from dance_jax.models import native
from dance_jax.models.checkpoint import MANIFEST, Checkpoint
from dance_jax.models.convert import convert, ensure_converted, main, outline
from dance_jax.models.directory import INDEX, demo_dir
from dance_jax.models.hf import HFDirectory
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.tokenizer import Tokenizer
from dance_jax.placement.activations import Activations
from tests.launch.launched import free_ports
from tests.stacks import stacked
from tests.tiny_models import DEEPSEEK, MIXTRAL

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A DeepSeek-V2 whose experts are large compared to the metadata of an orbax checkpoint."""
    fields = DEEPSEEK | {
        "hidden_size": 128,
        "intermediate_size": 64,
        "moe_intermediate_size": 256,
        "q_lora_rank": 24,
    }
    path = tmp_path_factory.mktemp("source") / "model"
    write_random_checkpoint(path, fields, dtype="bfloat16")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    return convert(source, tmp_path_factory.mktemp("converted") / "model")


def python(code, *arguments, **options):
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def test_experts_equal_the_source(source, converted):
    checkpoint, model = Checkpoint.open(converted), HFDirectory(source)
    pairs = [(1, 7), (0, 0), (1, 0), (1, 7)]
    gate, up, down = stacked(checkpoint, pairs)
    assert gate.shape == up.shape == (4, 128, 256) and down.shape == (4, 256, 128)
    for row, (layer, expert) in enumerate(pairs):
        for pool, name in ((gate, "gate_proj"), (up, "up_proj"), (down, "down_proj")):
            tensor = model.tensors[f"model.layers.{layer + 1}.mlp.experts.{expert}.{name}.weight"]
            np.testing.assert_array_equal(pool[row], tensor.read().T)
    assert gate.dtype == ml_dtypes.bfloat16, "as they are stored"
    assert stacked(checkpoint, [])[0].shape == (0, 128, 256)
    for pair in ((2, 0), (0, 8), (-1, 0)):
        with pytest.raises(UserError, match="there is no expert"):
            stacked(checkpoint, [pair])


def test_sizes(converted, monkeypatch):
    monkeypatch.setattr(native, "_library", None)  # the library pads weights to whole vectors
    checkpoint = Checkpoint.open(converted)
    for dtype in ("float32", "bfloat16"):  # types of activations; weights keep their stored type
        assert checkpoint.expert_bytes(dtype) == 3 * 128 * 256 * 2
    import jax
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(checkpoint.trunk("bfloat16")))
    assert checkpoint.trunk_bytes("bfloat16") == sum(leaf.nbytes for leaf in leaves)


def test_one_expert_reads_one_expert(converted):
    def read_bytes():
        return int(pathlib.Path("/proc/self/io").read_text().split()[1])

    checkpoint = Checkpoint.open(converted)
    stacked(checkpoint, [(1, 2)])
    before = read_bytes()
    stacked(checkpoint, [(0, 3)])
    used = read_bytes() - before
    size = checkpoint.expert_bytes("bfloat16")
    print(f"read {used} bytes for an expert of {size}")
    assert 0.5 * size < used < 1.5 * size  # the layer's checkpoint has 8 experts


def test_experts_are_read_beside_an_event_loop(converted):
    """In a notebook, cells run within an event loop."""
    checkpoint = Checkpoint.open(converted)

    async def cell():
        return stacked(checkpoint, [(0, 1)])

    for found, expected in zip(asyncio.run(cell()), stacked(checkpoint, [(0, 1)]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_converted_model_stands_alone(source, converted):
    assert Tokenizer.load(converted).encode("a") == Tokenizer.load(source).encode("a")
    checkpoint = Checkpoint.open(converted)
    assert checkpoint.config == HFDirectory(source).config
    assert checkpoint.config.eos_token_ids == (1, 2)
    assert checkpoint.fingerprint == outline(source).fingerprint


def test_rounding_makes_another_model_of_the_same_source(source, converted):
    four, kept = outline(source, Rounding("int4")), Checkpoint.open(converted)
    assert four.source == kept.source == HFDirectory(source).fingerprint()
    assert four.fingerprint != kept.fingerprint
    recorded = Activations.load(EXAMPLES / "activations.npz")
    assert outline(demo_dir(), Rounding("int4")).source == recorded.model


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "config.json").write_text("{}"),
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: next((path / "experts" / "1").rglob("manifest.ocdbt")).unlink(),
        lambda path: os.truncate(max(path.rglob("d/*"), key=lambda p: p.stat().st_size), 100),
        lambda path: (path / MANIFEST).write_text('{"format": 1}'),
        lambda path: (path / MANIFEST).write_text('{"format": 99}'),
        lambda path: (path / MANIFEST).write_text('{"format":'),
        lambda path: (path / MANIFEST).unlink(),
    ],
)
def test_what_is_not_whole_is_refused(converted, tmp_path, damage):
    import shutil

    copy = shutil.copytree(converted, tmp_path / "copy")
    Checkpoint.open(copy)
    damage(copy)
    with pytest.raises(UserError, match="copy"):
        Checkpoint.open(copy)


def test_bytes_flipped_on_disk_are_noticed_when_read(converted, tmp_path):
    import shutil

    copy = shutil.copytree(converted, tmp_path / "copy")
    checkpoint = Checkpoint.open(copy)
    for path in (copy / "experts" / "0").rglob("d/*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match="damaged"):
        stacked(checkpoint, [(0, 0)])


def test_small_groups_hold_the_same_weights(source, converted, tmp_path, monkeypatch):
    # With 1 MB, the trunk and every layer take several checkpoints.
    monkeypatch.setattr(convert_module, "GROUP_BYTES", 1_000_000)
    several = Checkpoint.open(convert(source, tmp_path / "several"))
    assert len(list((tmp_path / "several" / "experts" / "0").iterdir())) == 2
    one = Checkpoint.open(converted)
    pairs = [(layer, expert) for layer in range(2) for expert in range(8)]
    for left, right in zip(
        stacked(several, pairs),
        stacked(one, pairs),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)


def test_what_can_be_planned_before_a_conversion(source, converted, tmp_path):
    """For a config alone, for weights that are downloaded in part, and for complete weights."""
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = HFDirectory(source)
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    for name, content in ((INDEX, json.dumps(index)), ("1.safetensors", "")):
        found = outline(tmp_path)
        assert (found.fingerprint, found.config.layers) == ("", whole.config.layers)
        (tmp_path / name).write_text(content)
    assert outline(tmp_path).fingerprint == "", "one of the two files is not there"
    assert outline(source).fingerprint == outline(converted).fingerprint != ""
    assert outline(source).expert_bytes("float32") == outline(converted).expert_bytes("float32")


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path):
    def interrupt(text, done, total):
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "model", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_named(source, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=name):
            convert(source, tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_killed_conversion_is_not_taken_for_a_whole_one(source, tmp_path):
    code = """
        import os, signal, sys
        from dance_jax.models.convert import convert
        convert(sys.argv[1], sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    """
    killed = tmp_path / "killed"
    assert finish(python(code, source, killed))[0] == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".killed.partial", ".killed.lock"}
    with pytest.raises(UserError):
        Checkpoint.open(killed)
    # The next conversion to this cache removes the leftovers, whatever model it converts.
    path = ensure_converted(source, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    Checkpoint.open(path)


def test_two_conversions_at_once(source, tmp_path, monkeypatch):
    written = []
    original = convert_module.write_manifest

    def write(*arguments):
        written.append(arguments)
        original(*arguments)

    monkeypatch.setattr(convert_module, "write_manifest", write)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(ensure_converted(source, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(written) == 1 and len(set(results)) == 1 and len(results) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == [results[0].name]


def test_the_cache_is_by_content(source, converted, tmp_path):
    import shutil

    assert ensure_converted(converted, tmp_path) == converted
    model = shutil.copytree(source, tmp_path / "model")
    calls = []
    first = ensure_converted(model, tmp_path / "cache", lambda *step: calls.append(step))
    assert calls[-1][1] == calls[-1][2]
    calls.clear()
    assert ensure_converted(model, tmp_path / "cache", lambda *step: calls.append(step)) == first
    assert not calls
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert ensure_converted(model, tmp_path / "cache") != first


def test_command(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out")]) == 0
    Checkpoint.open(tmp_path / "out")
    assert main([str(source), str(tmp_path / "out")]) == 0  # same model: nothing to do
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main([str(source), str(tmp_path / "other")]) == 2
    assert "other" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out2")]) == 2
    assert not (tmp_path / "out2").exists()
    (tmp_path / "plain").touch()
    assert main([str(source), str(tmp_path / "plain" / "out")]) == 2
    assert "plain: cannot be written" in capsys.readouterr().err.replace("\n", "")


def sparse_checkpoint(path, layers, experts, d, f):
    """A Mixtral of zeros that takes no disk space: the data are a hole in the safetensors file."""
    from dance_jax.models import model_config
    from dance_jax.models.tensors import expert_rules, trunk_rules

    fields = MIXTRAL | {
        "vocab_size": 512,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": experts,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    config = model_config(fields)
    rules = trunk_rules(config)
    for layer in range(layers):
        for expert in range(experts):
            rules += expert_rules(config, layer, expert)
    header, end = {}, 0
    for rule in rules:
        begin, end = end, end + 2 * int(np.prod(rule.shape))
        header[rule.source] = {"dtype": "BF16", "shape": rule.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
def test_memory_stays_below_two_thirds_of_a_gigabyte_above_the_largest_tensor(tmp_path):
    total = sparse_checkpoint(tmp_path / "model", layers=1, experts=7, d=2048, f=8192)
    largest, most = 2048 * 8192 * 2, 640 << 20
    assert total > most + largest  # the test fails if all weights are held in memory
    code = """
        import re, sys
        from dance_jax.models.convert import main
        status = main(sys.argv[1:])
        # Not getrusage: its peak includes the process this one was forked from.
        print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
        sys.exit(status)
    """
    status, output, errors = finish(python(code, tmp_path / "model", tmp_path / "out"))
    assert status == 0, errors
    peak = int(output.split()[-1]) * 1024
    print(f"peak {peak / 1e6:.0f} MB for a model of {total / 1e6:.0f} MB")
    assert peak < largest + most


def test_one_process_of_a_distributed_job_loads_alone(converted):
    """The other process does not load anything, so a barrier in orbax would hang."""
    code = """
        import sys
        import jax
        jax.config.update("jax_enable_preemption_service", False)
        rank, port = int(sys.argv[1]), sys.argv[2]
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        assert len(jax.devices()) == 2  # both meet here and nowhere else
        from dance_jax.models.checkpoint import Checkpoint
        if rank == 1:
            checkpoint = Checkpoint.open(sys.argv[3])
            checkpoint.trunk("float32")
            list(checkpoint.experts([(0, 1), (1, 5)], checkpoint.form("float32")))
            print("loaded", flush=True)
        else:
            sys.stdin.read()
    """
    port = free_ports(1)
    idle = python(code, 0, port, converted, stdin=subprocess.PIPE)
    loader = python(code, 1, port, converted, stdin=subprocess.DEVNULL)
    deadline = threading.Timer(240, loader.kill)
    deadline.start()
    try:
        assert loader.stdout.readline() == "loaded\n"
    finally:
        deadline.cancel()
        for process in (loader, idle):
            process.kill()
            process.communicate()
