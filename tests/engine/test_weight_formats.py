"""The engine gives the same answers for every weight format as for the dequantised floats."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from dance_jax.config import EngineConfig, Rounding
from dance_jax.engine.engine import Engine
from dance_jax.launch.worker.peer_weights import HeldWeights
from dance_jax.launch.worker.peers import WeightKind, WeightRequest
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import KEEP, _convert, convert
from dance_jax.models.ggml.model import open_source
from dance_jax.models.random_weights import Held, write_random_checkpoint
from dance_jax.models.rounding import ROUNDED
from dance_jax.models.tensors import expert_rules, trunk_rules
from dance_jax.models.tokenizer import Tokenizer
from tests.engine.traffic import Job
from tests.models import test_packed as packed
from tests.models.gguf_writing import MODELS as GGUF
from tests.models.gguf_writing import write_gguf, write_tokenizer
from tests.quick import SharedCache

ENGINE = EngineConfig(
    max_model_len=16, max_num_seqs=1, decode_rows=(1,), slice_rows=(1,), block_size=8
)
PROMPT, TOKENS = tuple(np.random.default_rng(0).integers(2, 258, 7).tolist()), 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint in some format."""

    #: Writes the source checkpoint into a folder and returns its path.
    make: Callable[[pathlib.Path], pathlib.Path]
    #: Formats of w_gate, w_up and w_down; one string if all three are equal.
    experts: str | tuple[str, str, str]
    #: Matrix of the trunk -> format, for some matrices.
    trunk: Mapping[str, str]
    rounding: Rounding = KEEP


def _packed(
    name: str, change: Callable[[dict[str, Any]], None] = lambda tensors: None
) -> Callable[[pathlib.Path], pathlib.Path]:
    """Write one of `test_packed.MODELS`."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        fields, config, encode = packed.MODELS[name]
        if encode is None:
            packed._oss(folder, fields, config)
        else:
            packed.quantised(folder, fields, config, encode)
        packed.change(folder, change)
        return folder

    return make


def _calm(tensors: dict[str, Any]) -> None:
    """Reduce the scales, because random fp8 codes are too large for weights."""
    for name in tensors:
        if name.endswith("_scale_inv"):
            tensors[name] = tensors[name] / np.float32(128)


def _floats(dtype: str) -> Callable[[pathlib.Path], pathlib.Path]:
    return lambda folder: write_random_checkpoint(folder, packed.QWEN, dtype=dtype)


#: Types of most experts of a Q4_K_M; the types of down projections differ from layer to layer.
_MIXTURE = {
    "blk.0.ffn_down_exps": "Q4_K",
    "ffn_down_exps": "Q6_K",
    "ffn_gate_exps": "Q4_K",
    "ffn_up_exps": "Q4_K",
    "attn_v": "Q6_K",
    "attn_q.": "Q4_K",
    "output.": "Q6_K",
    "token_embd": "Q4_K",
}
_ALL = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q.", "attn_output", "token_embd")
_WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}
_OSS_WIDE = {"hidden_size": 64, "intermediate_size": 32}


def _gguf(
    kinds: Mapping[str, str], model: str = "qwen3moe", fields: Mapping[str, int] = _WIDE
) -> Callable[[pathlib.Path], pathlib.Path]:
    def make(folder: pathlib.Path) -> pathlib.Path:
        made = GGUF[model][1] | fields
        write_random_checkpoint(folder / "hf", made, tokenizer=False)
        write_tokenizer(folder / "hf")
        return write_gguf(folder / "model.gguf", folder / "hf", model, kinds=dict(kinds))

    return make


_Q = "layers.0.mixer.q.weight"
_ROUTER = {"layers.1.router.weight": "float32"}
#: What users have most; the other cases are slow.
USUAL = ("fp8", "mxfp4", "awq", "GGUF Q4_K and Q6_K", "to int4")
CASES = {
    "fp8": Case(
        _packed("fp8", _calm),
        "fp8:128:float32",
        {
            "layers.0.mixer.q_a.weight": "fp8:128:float32",
            "layers.0.mixer.w_uk": "bfloat16",
            "head": "float32",
        }
        | _ROUTER,
    ),
    "mxfp4": Case(_packed("mxfp4"), "mxfp4:32:e8m0", {_Q: "float32"} | _ROUTER),
    "gptq": Case(
        _packed("gptq"), "int4:32:float32:offset", {_Q: "int4:32:float32:offset"} | _ROUTER
    ),
    "awq": Case(_packed("awq"), "int4:32:float32:offset", {_Q: "int4:32:float32:offset"}),
    "compressed-tensors": Case(
        _packed("compressed-tensors"), "int4:32:float16", {_Q: "int4:32:float16"}
    ),
    "GGUF Q8_0": Case(
        _gguf(dict.fromkeys(_ALL, "Q8_0")),
        "int8:32:float16",
        dict.fromkeys([_Q, "embedding", "layers.1.mixer.out.weight"], "int8:32:float16"),
    ),
    "GGUF Q4_0": Case(
        _gguf(dict.fromkeys(_ALL, "Q4_0")), "int4:32:float16", {_Q: "int4:32:float16"}
    ),
    "GGUF Q4_K and Q6_K": Case(
        _gguf(_MIXTURE),
        ("int4:32:float32:offset", "int4:32:float32:offset", "int8:16:float32:offset"),
        {_Q: "int4:32:float32:offset", "head": "int8:16:float32"} | _ROUTER,
    ),
    "GGUF MXFP4": Case(
        _gguf(
            {f"ffn_{part}_exps.weight": "MXFP4" for part in ("gate", "up", "down")}
            | {"attn_q.weight": "Q8_0"},
            *("gpt-oss", _OSS_WIDE),
        ),
        "mxfp4:32:e8m0",
        {_Q: "int8:32:float16"} | _ROUTER,
    ),
    "GGUF F16": Case(
        _gguf(dict.fromkeys(_ALL, "F16")), "float16", {_Q: "float16", "head": "float32"}
    ),
    "GGUF BF16": Case(_gguf(dict.fromkeys(_ALL, "BF16")), "bfloat16", {_Q: "bfloat16"}),
    "bf16 kept": Case(_floats("bfloat16"), "bfloat16", {_Q: "bfloat16", "head": "bfloat16"}),
    "to bf16": Case(
        _floats("float32"),
        "bfloat16",
        {_Q: "bfloat16", "head": "bfloat16"} | _ROUTER,
        Rounding("bf16", "bf16"),
    ),
    "to int8": Case(
        _floats("float32"),
        "int8:32:bfloat16",
        {_Q: "int8:32:bfloat16", "embedding": "int8:32:bfloat16"} | _ROUTER,
        Rounding("int8", "int8"),
    ),
    "to int4": Case(
        _floats("float32"),
        "int4:32:bfloat16",
        {_Q: "int4:32:bfloat16", "head": "int4:32:bfloat16"} | _ROUTER,
        Rounding("int4", "int4"),
    ),
    "to int4-mixed": Case(
        _floats("float32"),
        ("int4:32:bfloat16", "int4:32:bfloat16", "int8:32:bfloat16"),
        {_Q: "int8:32:bfloat16"} | _ROUTER,
        Rounding("int4-mixed", "int8"),
    ),
    "to mxfp4": Case(
        _floats("float32"), "mxfp4:32:e8m0", {_Q: "float32"} | _ROUTER, Rounding("mxfp4")
    ),
}


class Floats:
    """A model with the values of its weights in float32.

    Args:
        model: an opened model.
        rounding: format to which matrices are rounded first.
    """

    def __init__(self, model: Any, rounding: Rounding) -> None:
        self.config, self.path = model.config, model.path
        self._model = model
        self.tensors: dict[str, Tensor] = {}
        rules = [(None, rule) for rule in trunk_rules(model.config)]
        for layer in model.config.moe_layers:
            for expert in range(model.config.num_experts):
                rules += [(expert, rule) for rule in expert_rules(model.config, layer, expert)]
        for expert, rule in rules:
            tensor = model.tensors[rule.source]
            values = tensor.read().astype(np.float32)
            (first, *_) = rule.targets
            if first.matrix and first.outputs is None and tensor.format.group:
                # Conversion splits the matrix and encodes it again, so codes change.
                values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
            choice = rounding.trunk if expert is None else rounding.experts
            if choice == "int4-mixed":
                choice = "int8" if first.path == "w_down" else "int4"
            if first.matrix and choice != "keep" and not first.path.endswith("router.weight"):
                form = ROUNDED[choice]
                values = form.dequantise(form.quantise(values.T), values.shape[1]).T
            self.tensors[rule.source] = Tensor(np.ascontiguousarray(values))

    def fingerprint(self) -> str:
        return "floats"

    def write_side_files(self, directory: pathlib.Path) -> None:
        self._model.write_side_files(directory)


class Tensor(Held):
    """A tensor of `Floats`."""

    @property
    def size(self) -> int:
        return self.values.nbytes


@pytest.fixture(scope="module")
def steps(expert_library: pathlib.Path | None) -> dict[str, jax.stages.Compiled]:
    """Compiled steps, shared by the tests of this module."""
    return {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(write_random_checkpoint(folder, packed.QWEN))


def make_engine(
    checkpoint: Checkpoint, tokenizer: Tokenizer, steps: dict[str, jax.stages.Compiled]
) -> Engine:
    cache = SharedCache(steps, (checkpoint.config, checkpoint.formats))
    return Engine(checkpoint, tokenizer, None, 0, None, ENGINE, compile_cache=cache)


def answer(engine: Engine) -> Iterator[tuple[int, np.ndarray]]:
    """Greedy tokens, and the logits from which they were chosen."""
    found: list[np.ndarray] = []
    run = engine.runner.run

    def recorded(*arguments: Any, **more: Any) -> Any:
        outcomes, extras = run(*arguments, **more)
        found.append(engine.runner.read(extras.logits)[0][0])
        return outcomes, extras

    engine.runner.run = recorded
    engine.add(Job(PROMPT, TOKENS, 0, None).request("x"))
    while engine.has_work:
        outputs = engine.step().outputs
        yield from ((token, found[-1]) for delta in outputs for token in delta.token_ids)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in CASES],
)
def test_weights_in_codes_answer_what_their_floats_answer(
    name: str, steps: dict[str, jax.stages.Compiled], tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    case = CASES[name]
    (tmp_path / "model").mkdir()
    source = case.make(tmp_path / "model")
    converted = convert(source, tmp_path / "converted", rounding=case.rounding)
    check_formats(converted, case)
    floats = Floats(open_source(source), case.rounding)
    plain = Checkpoint.open(
        _convert(floats, tmp_path / "floats", None, KEEP)  # type: ignore[arg-type]
    )
    assert all(str(form) == "float32" for form in plain.formats.experts.values())
    ours, theirs = (
        list(answer(make_engine(each, tokenizer, steps)))
        for each in (Checkpoint.open(converted), plain)
    )
    assert len(ours) == TOKENS and [token for token, _ in ours] == [token for token, _ in theirs]
    for (_, logits), (_, wanted) in zip(ours, theirs, strict=True):
        assert 0.1 < np.ptp(wanted) < 50, "logits that mean something"
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def check_formats(converted: pathlib.Path, case: Case) -> None:
    """Check that formats.json has the expected formats and that stored weights match."""
    said = json.loads((converted / "formats.json").read_text())
    wanted = (case.experts,) * 3 if isinstance(case.experts, str) else case.experts
    assert said["experts"] == dict(zip(("w_gate", "w_up", "w_down"), wanted, strict=True))
    assert {path: said["trunk"].get(path) for path in case.trunk} == dict(case.trunk)
    checkpoint = Checkpoint.open(converted)
    form = checkpoint.form("float32")
    (_, weights), *_ = checkpoint.experts([(0, 1)], form)
    for (leaf, like), array in zip(form.leaves.items(), weights, strict=True):
        assert (array.shape, array.dtype) == (like.shape, like.dtype), leaf


def test_last_projections_of_two_types_become_one_without_loss(tmp_path: pathlib.Path) -> None:
    """As in a Q4_K_M model: Q4_K in the first layer, Q6_K in the second."""
    source = CASES["GGUF Q4_K and Q6_K"].make(tmp_path)
    checkpoint = Checkpoint.open(convert(source, tmp_path / "converted"))
    model, form = open_source(source), checkpoint.form("float32")
    kinds = []
    for layer in range(2):
        (_, weights), *_ = checkpoint.experts([(layer, 3)], form)
        arrays = dict(zip(form.leaves, weights, strict=True))
        own = {name: arrays[f"w_down.{name}"] for name in ("codes", "scale", "offset")}
        tensor: Any = model.tensors[f"model.layers.{layer}.mlp.experts.3.down_proj.weight"]
        kinds.append(tensor.kind)
        np.testing.assert_array_equal(form.down.dequantise(own, 256).T, tensor.read())
    assert kinds == ["Q4_K", "Q6_K"]


def test_sixteen_bits_take_two_bytes_on_disk_in_the_pool_and_on_the_way(
    steps: dict[str, jax.stages.Compiled], tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    fields = packed.QWEN | {"hidden_size": 128, "moe_intermediate_size": 128}
    model = write_random_checkpoint(tmp_path / "model", fields, dtype="bfloat16")
    checkpoint = Checkpoint.open(convert(model, tmp_path / "converted"))
    weights = 3 * 128 * 128
    for dtype in ("float32", "bfloat16"):
        form = checkpoint.form(dtype)
        assert form.bytes == 2 * weights
        question = WeightRequest(WeightKind.EXPERTS, 1, (0, 3))
        sent = HeldWeights(checkpoint, dtype).find(question)
        assert sum(array.nbytes for array in sent) == 2 * form.bytes
    held = make_engine(checkpoint, tokenizer, steps).runner.pools
    assert held.bytes == [2 * 4 * 2 * weights]
    for layer in ("0", "1"):
        stored = (checkpoint.path / "experts" / layer).rglob("*")
        size = sum(path.stat().st_size for path in stored if path.is_file())
        # The stored data is compressed, but orbax adds its own files.
        assert 1.5 * 4 * weights < size < 2.2 * 4 * weights
