"""Conversions of quantised models and conversions to fewer bits: rejected input, and leftovers."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import dance_jax.models.convert as convert_module
from dance_jax import LLM
from dance_jax.config import EngineConfig, Rounding, UserError
from dance_jax.launch.planning.plan import model_notes
from dance_jax.models.checkpoint import FORMAT, MANIFEST, Checkpoint
from dance_jax.models.convert import convert, ensure_converted, main, outline
from dance_jax.models.families import model_config
from dance_jax.models.formats import WeightFormat
from dance_jax.models.orbax_store import save_arrays
from dance_jax.models.random_weights import write_random_checkpoint
from dance_jax.models.rounding import ROUNDED, unfit_report
from tests.models import test_packed as packed
from tests.models.gguf_writing import MODELS as GGUF
from tests.models.gguf_writing import write_gguf, write_tokenizer
from tests.stacks import stacked

EXPERTS = ("w_gate", "w_up", "w_down")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("floats") / "model"
    return write_random_checkpoint(folder, packed.QWEN, dtype="bfloat16")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with four-bit codes and zero points."""
    folder = tmp_path_factory.mktemp("codes") / "model"
    fields, config, encode = packed.MODELS["awq"]
    packed.quantised(folder, fields, config, encode)
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("gguf")
    fields = GGUF["qwen3moe"][1] | {"moe_intermediate_size": 32}
    write_random_checkpoint(folder / "hf", fields, tokenizer=False)
    write_tokenizer(folder / "hf")
    kinds = {"ffn_down_exps": "Q8_0", "ffn_gate_exps": "MXFP4"}
    return write_gguf(folder / "model.gguf", folder / "hf", "qwen3moe", kinds=kinds)


def nothing_is_left(folder: pathlib.Path, name: str = "out") -> None:
    assert not [path.name for path in folder.iterdir() if name in path.name]


def run(code: str, *arguments: object) -> tuple[int, str]:
    """Exit status and output of a process."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return process.returncode, (process.stdout + process.stderr).strip()


# Bad input.


@pytest.mark.parametrize("choice", ["bf16", "int8", "int4", "int4-mixed", "mxfp4"])
def test_codes_of_experts_are_not_rounded_again(
    choice: str, codes: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    message = f"the experts are stored as int4; --experts {choice} rounds floats only"
    for refuse in (
        lambda: convert(codes, tmp_path / "out", rounding=Rounding(choice)),
        lambda: ensure_converted(codes, tmp_path / "out", rounding=Rounding(choice)),
        lambda: outline(codes, Rounding(choice)),
    ):
        with pytest.raises(UserError, match=message):
            refuse()
    assert main([str(codes), str(tmp_path / "out"), "--experts", choice]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    nothing_is_left(tmp_path)


def test_codes_of_the_trunk_stay_and_its_floats_are_rounded(
    codes: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    made = Checkpoint.open(convert(codes, tmp_path / "out", rounding=Rounding(trunk="int8")))
    forms = {path: str(form) for path, form in made.formats.trunk.items()}
    assert forms["layers.0.mixer.q.weight"] == "int4:32:float32:offset"
    assert forms["embedding"] == forms["head"] == "int8:32:bfloat16"
    assert forms["layers.0.router.weight"] == "float32"


def test_choices_that_do_not_exist(floats: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    for option, wrong in (("--experts", "int3"), ("--trunk", "mxfp4")):
        with pytest.raises(SystemExit):
            main([str(floats), str(tmp_path / "out"), option, wrong])
        assert f"invalid choice: '{wrong}'" in capsys.readouterr().err
    with pytest.raises(UserError, match="trunk='mxfp4': must be one of keep, bf16, int8, int4"):
        Rounding(trunk="mxfp4")
    for options in ({"experts": "int3"}, {"trunk": "mxfp4"}):
        with pytest.raises(UserError, match="one of keep, bf16, int8, int4"):
            LLM(tmp_path / "nothing", **options)
    nothing_is_left(tmp_path)


def test_what_is_converted_already_is_not_rounded(
    floats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    made = convert(floats, tmp_path / "out")
    with pytest.raises(UserError, match="already converted; weights are rounded only during"):
        ensure_converted(made, tmp_path / "cache", rounding=Rounding("int8"))


def test_weights_that_are_no_numbers_are_not_rounded(
    floats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in floats.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name][3, 5] = np.nan
        tensors[name][3, 6] = np.inf

    packed.change(source, edit)
    for choice in ("int8", "int4", "mxfp4"):
        with pytest.raises(UserError, match=rf"safetensors: {name}: 2 of 2048 weights are NaN or"):
            convert(source, tmp_path / "out", rounding=Rounding(choice))
        nothing_is_left(tmp_path)
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("part", ["down", "gate"])
def test_scales_of_a_gguf_file_that_are_no_numbers(
    part: str, gguf: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The float16 scale of Q8_0, and the exponent of MXFP4."""
    from dance_jax.models.ggml.header import read_header

    path = tmp_path / "model.gguf"
    content = bytearray(gguf.read_bytes())
    place = read_header(gguf).tensors[f"blk.1.ffn_{part}_exps.weight"]
    wrong = np.array(np.nan, np.float16).tobytes() if part == "down" else b"\xff"
    content[place.offset : place.offset + len(wrong)] = wrong
    path.write_bytes(content)
    name = rf"model\.layers\.1\.mlp\.experts\.0\.{part}_proj\.weight"
    with pytest.raises(UserError, match=rf"model\.gguf: {name}: 1 of \d+ scales are NaN or inf"):
        convert(path, tmp_path / "out")
    nothing_is_left(tmp_path)


def test_a_file_cut_off_while_it_is_converted(gguf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf.read_bytes())

    def cut(text: str, done: int, total: int) -> None:
        os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(UserError, match=r"model\.gguf: truncated"):
        convert(path, tmp_path / "out", cut)
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("source", ["floats", "codes", "gguf"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_nothing(
    source: str,
    after: int,
    request: pytest.FixtureRequest,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
        if len(written) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        save_arrays(path, arrays)

    monkeypatch.setattr(convert_module, "save_arrays", save)
    model = request.getfixturevalue(source)
    with pytest.raises(UserError, match=r"out: cannot be written: .*No space left on device"):
        convert(model, tmp_path / "out")
    assert len(written) == after
    nothing_is_left(tmp_path)
    written.clear()
    with pytest.raises(UserError, match="cannot be written"):
        ensure_converted(model, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_orbax_cannot_write_is_an_error_of_the_system(
    floats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Like a full disk: files may not be larger than an array of the model."""
    code = """
        import resource, signal, sys
        from dance_jax.models.convert import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.exit(main(sys.argv[1:]))
    """
    status, said = run(code, floats, tmp_path / "out")
    assert status == 2 and "cannot be written: [Errno 27] File too large" in said, said
    nothing_is_left(tmp_path)


def test_room_is_asked_for_what_is_written(
    floats: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check uses the size of the result, not of the source.

    Four bits take less space than the source; a common format may take more.
    """
    source = (floats / "model.safetensors").stat().st_size
    usage = type("Usage", (), {"free": int(source * 0.6)})
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"[1-9][0-9.]* [KM]iB are free, the .* needs about [1-9][0-9.]* [KM]iB:"
    ):
        convert(floats, tmp_path / "out")
    nothing_is_left(tmp_path)
    convert(floats, tmp_path / "out", rounding=Rounding("int4", "int4"))


# Matrices that the chosen format does not support.


def test_matrices_that_a_choice_does_not_fit_are_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = packed.QWEN | {"moe_intermediate_size": 20}
    source = write_random_checkpoint(tmp_path / "model", fields)
    assert main([str(source), str(tmp_path / "out"), "--experts", "int4"]) == 0
    line = "--experts int4 needs a multiple of 8 inputs; unchanged matrices of all"
    assert f"{line} experts: w_down (20 inputs)" in " ".join(capsys.readouterr().err.split())
    made = Checkpoint.open(tmp_path / "out")
    planned = EngineConfig(64, experts="int4")
    assert any(note.startswith(line) for note in model_notes(made.config, planned))
    assert not any("--experts" in note for note in model_notes(made.config, EngineConfig(64)))
    forms = {name: str(form) for name, form in made.formats.experts.items()}
    assert forms == {"w_gate": "int4:32:bfloat16", "w_up": "int4:32:bfloat16", "w_down": "float32"}
    assert unfit_report(Rounding("int4-mixed"), made.config) == [], "eight bits fit any"
    for choice in ("keep", "bf16", "int8"):
        assert unfit_report(Rounding(choice, choice), made.config) == []
    narrow = model_config(fields | {"hidden_size": 20, "moe_intermediate_size": 64})
    experts, trunk = unfit_report(Rounding("int4", "int4"), narrow)
    assert experts.endswith("of all experts: w_gate (20 inputs), w_up (20 inputs)")
    assert trunk.startswith("--trunk int4 needs") and "mixer.q.weight (20 inputs)" in trunk
    assert "router" not in trunk and trunk.count("mixer.q.weight") == 1
    assert unfit_report(Rounding("int4", "int4-mixed"), narrow) == [experts]


@pytest.mark.parametrize("choice", ["int8", "int4", "mxfp4", "int4-mixed"])
@pytest.mark.parametrize(("d", "f"), [(24, 40), (40, 12), (33, 7)])
def test_sizes_that_no_group_divides(choice: str, d: int, f: int, tmp_path: pathlib.Path) -> None:
    """Last groups are shorter, and matrices that do not fit keep their format, as planned."""
    fields = packed.QWEN | {"hidden_size": d, "moe_intermediate_size": f}
    source = write_random_checkpoint(tmp_path / "model", fields, dtype="bfloat16")
    rounding = Rounding(choice)
    expected = outline(source, rounding)
    made = Checkpoint.open(convert(source, tmp_path / "out", rounding=rounding))
    assert made.formats == expected.formats and made.fingerprint == expected.fingerprint
    found = stacked(made, [(1, 2)])
    assert sum(array.nbytes for array in found) == made.expert_bytes("float32")
    form = made.form("float32")
    arrays = {name: array[0] for name, array in zip(form.leaves, found, strict=True)}
    stored = load_file(source / "model.safetensors")
    for part in ("gate", "up", "down"):
        kept, d_in, _ = form.matrices[f"w_{part}"]
        start = f"w_{part}."
        own = {n.removeprefix(start): array for n, array in arrays.items() if n.startswith(start)}
        values = stored[f"model.layers.1.mlp.experts.2.{part}_proj.weight"].T.astype(np.float32)
        wanted = kept.dequantise(kept.quantise(values), d_in)
        np.testing.assert_array_equal(kept.dequantise(own, d_in), wanted)
        most = np.abs(values).max() * {"int8": 0.01, "bfloat16": 0}.get(kept.kind, 0.3)
        np.testing.assert_allclose(wanted, values, rtol=0, atol=most)


# Two at once, and interruptions.


def test_two_choices_in_one_cache_at_once(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found: dict[str, pathlib.Path] = {}
    together = threading.Barrier(4, timeout=60)

    def make(choice: str) -> None:
        together.wait()
        found[choice] = ensure_converted(floats, tmp_path, rounding=Rounding(choice))

    threads = [threading.Thread(target=make, args=(c,)) for c in ("keep", "int8", "int4", "mxfp4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in found.values()
    )
    made = {choice: Checkpoint.open(path) for choice, path in found.items()}
    assert len({each.fingerprint for each in made.values()}) == 4
    for choice, each in made.items():
        wanted = ROUNDED.get(choice, WeightFormat("bfloat16"))
        assert each.formats.experts == dict.fromkeys(EXPERTS, wanted)
        assert each.fingerprint == outline(floats, Rounding(choice)).fingerprint


@pytest.mark.parametrize(
    ("source", "number"),
    [("codes", signal.SIGINT), ("gguf", signal.SIGTERM), ("codes", signal.SIGKILL)],
)
def test_an_interrupted_conversion_of_codes(
    source: str, number: int, request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> None:
    code = """
        import os, signal, sys
        import dance_jax.models.convert as convert
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save, saved = convert.save_arrays, []
        def save_arrays(path, arrays):
            save(path, arrays)
            saved.append(path)
            if len(saved) == 2:
                os.kill(os.getpid(), int(sys.argv[3]))
        convert.save_arrays = save_arrays
        sys.exit(convert.main(sys.argv[1:3]))
    """
    model, out = request.getfixturevalue(source), tmp_path / "out"
    status, said = run(code, model, out, int(number))
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number), said
    assert not out.exists()
    if number != signal.SIGKILL:
        nothing_is_left(tmp_path)
    made = convert(model, out)  # removes the leftovers
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Checkpoint.open(made).fingerprint == outline(model).fingerprint


def test_a_model_of_the_version_before(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The old version has no formats.json; in a cache the old model is kept."""
    made = ensure_converted(floats, tmp_path / "cache")
    old = made.rename(made.with_name(made.name.removesuffix(f"-{FORMAT}") + f"-{FORMAT - 1}"))
    (old / "formats.json").unlink()
    manifest = json.loads((old / MANIFEST).read_text()) | {"format": FORMAT - 1}
    (old / MANIFEST).write_text(json.dumps(manifest))
    message = f"format {FORMAT - 1}, this version reads {FORMAT}; delete the directory and convert"
    for read in (Checkpoint.open, outline, lambda path: convert(floats, path)):
        with pytest.raises(UserError, match=message):
            read(old)
    assert ensure_converted(floats, tmp_path / "cache") == made
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {made.name, old.name}


def test_formats_that_were_changed(floats: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = convert(floats, tmp_path / "out", rounding=Rounding("int8"))
    text = (made / "formats.json").read_text()
    (made / "formats.json").write_text(text.replace("int8:32", "int8:16"))
    with pytest.raises(UserError, match=r"formats\.json was changed after the conversion"):
        Checkpoint.open(made)


def test_codes_of_experts_in_a_trunk_of_floats(tmp_path: pathlib.Path) -> None:
    """fp8 for the experts, bfloat16 for tensors in `modules_to_not_convert`."""
    fields, config, encode = packed.MODELS["fp8"]
    config = config | {"modules_to_not_convert": ["self_attn", "shared_experts", "lm_head"]}

    def some(name: str, shape: tuple[int, int], rng: Any, config: Any) -> Any:
        if ".experts." in name:
            return encode(name, shape, rng, config)
        values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        return {name: values}, values

    packed.quantised(tmp_path / "model", fields, config, some)
    made = Checkpoint.open(convert(tmp_path / "model", tmp_path / "out"))
    assert made.formats.experts == dict.fromkeys(EXPERTS, WeightFormat("fp8", 128, "float32"))
    forms = {path: str(form) for path, form in made.formats.trunk.items()}
    attention = [form for path, form in forms.items() if ".mixer." in path]
    assert attention and set(attention) == {"bfloat16"}
    rounded = outline(tmp_path / "model", Rounding(trunk="int8")).formats
    assert rounded.experts == made.formats.experts
    assert str(rounded.trunk["layers.0.mixer.out.weight"]) == "int8:32:bfloat16"


def test_experts_of_which_some_are_floats(tmp_path: pathlib.Path) -> None:
    """All experts get one common format without loss."""
    fields, config, encode = packed.MODELS["compressed-tensors"]

    def some(name: str, shape: tuple[int, int], rng: Any, config: Any) -> Any:
        if ".experts.1.down_proj" in name:
            values = rng.standard_normal(shape).astype(np.float16)
            return {name: values}, values
        return encode(name, shape, rng, config)

    values = packed.quantised(tmp_path / "model", fields, config, some)
    made = Checkpoint.open(convert(tmp_path / "model", tmp_path / "out"))
    assert str(made.formats.experts["w_down"]) == "float32"
    assert str(made.formats.experts["w_up"]) == "int4:32:float16"
    for expert in (0, 1):
        (down,) = stacked(made, [(0, expert)])[-1]
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        np.testing.assert_array_equal(down, values[name].T.astype(np.float32))
