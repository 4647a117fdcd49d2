"""`LLM` on a tiny random model: what users rely on, through the real engine."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from flax import nnx

from dance_jax import LLM, RequestOutput, SamplingParams
from dance_jax.config import UserError
from dance_jax.models.attention import Rows
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.convert import ensure_converted
from dance_jax.models.random_weights import write_random_checkpoint
from tests.forward import forward
from tests.models.fake_hub import environment, running_hub
from tests.quick import cache_directory
from tests.stacks import stacked
from tests.tiny_models import DEEPSEEK
from tests.traces import read_trace

FIELDS = DEEPSEEK | {"num_hidden_layers": 2, "max_position_embeddings": 256}
PROMPTS = [
    "a",
    "Two servers of unequal size",
    "नमस्ते दुनिया",
    "x" * 150,
    "def f(x):\n    return x",
    "🎉" * 9,
    "last but not least, ",
    "1 + 1 =",
    "one more than there are slots",
    "and another one",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("model") / "tiny", FIELDS, seed=3)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory, expert_library):
    return cache_directory(tmp_path_factory.mktemp("llm"), expert_library)


@pytest.fixture(scope="module")
def llm(model, cache_dir):
    with LLM(model, max_model_len=192, cache_dir=cache_dir) as llm:
        yield llm


def greedy(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})


def tokens(outputs):
    return [sample.token_ids for output in outputs for sample in output.outputs]


def test_outputs_are_complete_and_in_order(llm):
    outputs = llm.generate(PROMPTS, greedy())
    assert [output.prompt for output in outputs] == PROMPTS
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert isinstance(output, RequestOutput) and output.finished
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)
        (sample,) = output.outputs
        assert (sample.index, sample.finish_reason, len(sample.token_ids)) == (0, "length", 8)
        whole = llm.tokenizer.decode(output.prompt_token_ids + sample.token_ids)
        assert (prompt + sample.text).rstrip("\ufffd") == whole.rstrip("\ufffd")
        assert 0 < output.metrics.ttft_s <= output.metrics.e2e_s
    assert len({output.request_id for output in outputs}) == len(PROMPTS)


def test_token_ids_and_single_prompts(llm):
    ids = llm.tokenizer.encode(PROMPTS[1])
    by_text, by_ids = llm.generate([PROMPTS[1], ids], greedy())
    assert by_ids.prompt is None and by_ids.prompt_token_ids == ids
    assert tokens([by_text]) == tokens([by_ids])
    assert tokens(llm.generate(PROMPTS[1], greedy())) == tokens([by_text])
    assert tokens(llm.generate(ids, greedy())) == tokens([by_text])
    assert llm.generate([], greedy()) == []


def test_greedy_is_the_same_alone_and_in_a_batch(llm):
    together = tokens(llm.generate(PROMPTS, greedy()))
    assert together == [tokens(llm.generate(prompt, greedy()))[0] for prompt in PROMPTS]


def test_a_seed_gives_the_same_whatever_else_is_in_the_batch(llm):
    params = [
        SamplingParams(
            temperature=0.8, top_p=0.9, top_k=k, seed=i, max_tokens=6 + i, ignore_eos=True
        )
        for i, k in enumerate([0, 5, 50] * 4)
    ][: len(PROMPTS)]
    together = tokens(llm.generate(PROMPTS, params))
    backwards = tokens(llm.generate(PROMPTS[::-1], params[::-1]))[::-1]
    alone = [tokens(llm.generate(p, each))[0] for p, each in zip(PROMPTS, params, strict=True)]
    assert together == backwards == alone
    other = tokens(llm.generate(PROMPTS[0], SamplingParams(seed=99, max_tokens=16)))
    assert other != tokens(llm.generate(PROMPTS[0], SamplingParams(seed=98, max_tokens=16)))


def test_the_objects_seed(model, cache_dir, llm):
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def two_calls(seed):
        with LLM(model, max_model_len=192, seed=seed, cache_dir=cache_dir) as llm:
            return tokens(llm.generate(PROMPTS[:3], params)), tokens(llm.generate("a", params))

    first = two_calls(7)
    assert first == two_calls(7)
    assert first != two_calls(8)


def test_samples_of_a_prompt(llm):
    params = SamplingParams(n=4, seed=5, max_tokens=12, ignore_eos=True)
    first, other = llm.generate(["same", "other"], params)
    assert [sample.index for sample in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(sample.token_ids) for sample in first.outputs}) == 4
    (again,) = llm.generate("same", params)
    assert tokens([again]) == tokens([first])
    assert tokens([other]) != tokens([first])


def test_logprobs_are_consistent(llm):
    outputs = llm.generate(PROMPTS[:4], greedy(logprobs=3))
    outputs += llm.generate(PROMPTS[:4], SamplingParams(seed=1, logprobs=20, ignore_eos=True))
    outputs += llm.generate(PROMPTS[:4], SamplingParams(seed=1, logprobs=0, ignore_eos=True))
    for number, output in enumerate(outputs):
        (sample,) = output.outputs
        assert len(sample.logprobs) == len(sample.token_ids)
        chosen = [p[t] for p, t in zip(sample.logprobs, sample.token_ids, strict=True)]
        assert math.isclose(sum(p.logprob for p in chosen), sample.cumulative_logprob, abs_tol=1e-4)
        for entry, own in zip(sample.logprobs, chosen, strict=True):
            asked = [3, 20, 0][number // 4]
            assert len(entry) == max(1, asked + (own.rank > asked))
            if number < 4:
                assert own.rank == 1
            ranked = sorted(entry.values(), key=lambda p: p.rank)
            values = [p.logprob for p in ranked]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1 + 1e-5
    assert tokens(outputs[4:8]) == tokens(outputs[8:])
    silent = llm.generate(PROMPTS[0], greedy())[0].outputs[0]
    assert silent.logprobs is None
    # Another batch size sums over an expert's width in other parts.
    logprob = outputs[0].outputs[0].cumulative_logprob
    assert math.isclose(silent.cumulative_logprob, logprob, abs_tol=1e-4)


def test_logprobs_equal_the_plain_model(llm, model, cache_dir):
    """The reference runs the whole sequence at once: every expert, no cache, no slots."""
    checkpoint = Checkpoint.open(ensure_converted(model, cache_dir / "models"))
    experts = range(FIELDS["n_routed_experts"])
    w_gate, w_up, w_down = stacked(checkpoint, [(0, e) for e in experts])

    def moe(layer, x_td, expert_tk, weight_tk):
        inner = jax.nn.silu(jnp.einsum("td,edf->tef", x_td, w_gate))
        inner = inner * jnp.einsum("td,edf->tef", x_td, w_up)
        each_ted = jnp.einsum("tef,efd->ted", inner, w_down)
        chosen_tkd = jnp.take_along_axis(each_ted, expert_tk[:, :, None], axis=1)
        return jnp.einsum("tkd,tk->td", chosen_tkd, weight_tk)

    graph, state = nnx.split(checkpoint.trunk("float32"))
    cached = [jnp.zeros((1, 192, layer.mixer.cache_width)) for layer in checkpoint.config.layers]

    @jax.jit
    def plain(state, tokens):
        trunk = nnx.merge(graph, state)
        whole = Rows.whole(len(tokens))
        hidden, _ = forward(trunk, tokens, [whole], cached, moe, len(tokens))
        return jax.nn.log_softmax(trunk.logits(hidden))

    sampled = SamplingParams(
        temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3, logprobs=20, ignore_eos=True
    )
    for params in (greedy(logprobs=20), sampled):
        for output in llm.generate([PROMPTS[1], PROMPTS[3]], params):
            (sample,) = output.outputs
            known = output.prompt_token_ids + sample.token_ids
            padded = np.zeros(192, np.int32)
            padded[: len(known)] = known
            before_outputs = slice(len(output.prompt_token_ids) - 1, len(known) - 1)
            expected = np.asarray(plain(state, padded))[before_outputs]
            for row, entry, token in zip(expected, sample.logprobs, sample.token_ids, strict=True):
                ids = list(entry)
                np.testing.assert_allclose([entry[i].logprob for i in ids], row[ids], atol=1e-4)
                assert entry[token].rank == 1 + (row > row[token]).sum()
                if params.greedy:
                    assert token == row.argmax()


def test_chunked_prefill_gives_the_same_logprobs(llm):
    """A prompt prefilled in two chunks (150 > 128), and a prompt continued by decode steps."""
    prompt = llm.tokenizer.encode(PROMPTS[3])
    (long,) = llm.generate(prompt, greedy(max_tokens=1, logprobs=5))
    (short,) = llm.generate(prompt[:40], greedy(max_tokens=20, logprobs=5))
    steps = short.outputs[0]
    for count in (1, 7, 19):
        grown = prompt[:40] + steps.token_ids[:count]
        (again,) = llm.generate(grown, greedy(max_tokens=1, logprobs=5))
        sample = again.outputs[0]
        assert sample.token_ids == steps.token_ids[count : count + 1]
        np.testing.assert_allclose(
            [p.logprob for p in sample.logprobs[0].values()],
            [p.logprob for p in steps.logprobs[count].values()],
            atol=1e-4,
        )
    assert long.outputs[0].logprobs[0][long.outputs[0].token_ids[0]].rank == 1


def test_stops(llm):
    whole = llm.generate("stop", greedy(max_tokens=24))[0].outputs[0]
    text = whole.text
    at = next(i for i in range(4, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    stop = text[at : at + 2]
    sample = llm.generate("stop", greedy(max_tokens=24, stop=["never there", stop]))[0].outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == text[: text.find(stop)]
    assert whole.token_ids[: len(sample.token_ids)] == sample.token_ids
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    sample = llm.generate("stop", greedy(max_tokens=24, stop_token_ids=[token]))[0].outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", token)
    assert sample.token_ids == whole.token_ids[: first + 1]
    held = llm.generate(
        "stop", greedy(max_tokens=24, stop_token_ids=[token], min_tokens=first + 3)
    )[0].outputs[0]
    assert held.token_ids[:first] == whole.token_ids[:first]
    assert token not in held.token_ids[: first + 3] and len(held.token_ids) >= first + 3


def test_repetition_penalty(llm):
    free = llm.generate(PROMPTS[3], greedy(max_tokens=20))[0].outputs[0]
    fresh = llm.generate(PROMPTS[3], greedy(max_tokens=20, repetition_penalty=1e6))[0].outputs[0]
    assert len(set(fresh.token_ids)) == 20
    assert llm.tokenizer.encode("x")[0] not in fresh.token_ids
    # A reused slot keeps nothing of the previous sequence.
    assert tokens(llm.generate(PROMPTS[3], greedy(max_tokens=20))) == [free.token_ids]


def test_what_cannot_run_is_an_error_of_its_own(llm):
    outputs = llm.generate(["fine", "", "x" * 192, [5, 999], "x" * 191], greedy(max_tokens=None))
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["length", "error", "error", "error", "length"]
    assert "empty" in outputs[1].outputs[0].stop_reason
    assert "192" in outputs[2].outputs[0].stop_reason
    assert "999" in outputs[3].outputs[0].stop_reason
    assert [len(outputs[i].outputs[0].token_ids) for i in (0, 4)] == [188, 1]
    assert all(output.finished for output in outputs)


def test_wrong_arguments_name_themselves(llm, model, cache_dir):
    for call, name in [
        (lambda: llm.generate(["a", "b"], [SamplingParams()]), "sampling_params: 1 values for 2"),
        (lambda: llm.generate("a", {"n": 1}), "sampling_params"),
        (lambda: llm.generate("a", server="alpha"), "server.*alpha"),
        (lambda: llm.generate(["a", 3.5]), r"prompts\[1\]"),
        (lambda: llm.generate(17), "prompts"),
        (lambda: llm.generate(b"text"), "prompts.*bytes"),
        (lambda: llm.generate([b"text"]), r"prompts\[0\]"),
        (lambda: llm.generate([[2**70]]), r"prompts\[0\]"),
        (lambda: llm.generate("\ud800"), "surrogate"),
        (lambda: llm.chat("hello"), "messages: must be a non-empty list"),
        (lambda: llm.chat([{"foo": 1}]), r'messages\[0\]: "role" must be a string'),
        (
            lambda: llm.chat([{"role": "user", "content": 5}]),
            r'messages\[0\]: "content" must be text',
        ),
        (lambda: LLM(model, max_model_len=257, cache_dir=cache_dir), "max_model_len=257.*256"),
        (lambda: LLM(model, dtype="int8", cache_dir=cache_dir), "dtype='int8'"),
        (lambda: LLM(model, hosts="nowhere.txt", cache_dir=cache_dir), "nowhere.txt"),
        (lambda: LLM(model, policy="dance"), "policy: applies to a cluster; give hosts"),
        (lambda: LLM(model, hosts="nowhere.txt", policy="best"), "policy.*'best'.*uniform"),
        (lambda: LLM(model / "nothing", cache_dir=cache_dir), "nothing"),
    ]:
        with pytest.raises(UserError, match=name):
            call()
    changed = SamplingParams()
    changed.top_p = 7
    with pytest.raises(UserError, match="top_p"):
        llm.generate("a", changed)


def test_chat(llm):
    message = {"role": "user", "content": "hello"}
    (single,) = llm.chat([message], greedy())
    assert single.prompt == "user: hello\nassistant:"
    several = llm.chat([[message], [message, {**message, "content": "more"}]], greedy())
    assert tokens(several[:1]) == tokens([single])
    assert several[1].prompt == "user: hello\nuser: more\nassistant:"


def test_progress_shows_on_standard_error(llm, capfd):
    llm.generate(PROMPTS[:2], greedy(), progress=True)
    shown = capfd.readouterr()
    assert "2/2" in shown.err and shown.out == ""


def test_a_call_that_ends_early_leaves_nothing_behind(llm, monkeypatch):
    expected = tokens(llm.generate(PROMPTS[:3], greedy()))
    with monkeypatch.context() as patch:
        patch.setattr(RequestOutput, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(PROMPTS, greedy(max_tokens=100))
    assert tokens(llm.generate(PROMPTS[:3], greedy())) == expected


def test_a_step_that_fails_ends_the_engine(model, cache_dir, monkeypatch):
    llm = LLM(model, max_model_len=192, cache_dir=cache_dir)
    monkeypatch.setattr(llm._backend._engine, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate("a", greedy())
    with pytest.raises(RuntimeError, match="interrupted"):
        llm.generate("a", greedy())
    llm.close()


def test_close_is_idempotent_and_final(model, cache_dir, tmp_path):
    llm = LLM(model, max_model_len=192, cache_dir=cache_dir, trace=tmp_path / "trace.json")
    llm.generate("a", greedy(max_tokens=2))
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")
    steps = [event["name"] for event in read_trace(tmp_path / "trace.json")]
    assert "step 0" in steps and "step 1" in steps


def test_a_cluster_of_unequal_servers(model, cache_dir, llm, tmp_path, caplog):
    """Two processes, one with two devices, give the same tokens as one process with all experts."""
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(
        "single address=localhost experts=5\npair address=localhost devices=2 experts=2\n"
    )
    logs = tmp_path / "logs"
    params = [greedy(), SamplingParams(seed=2, max_tokens=8, logprobs=2), greedy(stop="x")] * 3
    expected = llm.generate(PROMPTS[:9], params)
    with LLM(
        model,
        hosts,
        max_model_len=192,
        cache_dir=cache_dir,
        log_dir=logs,
        trace=tmp_path / "trace.json",
        max_num_seqs=4,
    ) as cluster:
        assert cluster.servers == ("single", "pair")
        assert "latency needs routes, there are none: policy optimal is used instead" in caplog.text
        outputs = cluster.generate(PROMPTS[:9], params)
        assert tokens(outputs) == tokens(expected)
        for output, alone in zip(outputs, expected, strict=True):
            assert output.prompt == alone.prompt
            (sample,), (other,) = output.outputs, alone.outputs
            assert (sample.text, sample.finish_reason) == (other.text, other.finish_reason)
            assert math.isclose(sample.cumulative_logprob, other.cumulative_logprob, abs_tol=1e-3)
        one, error = cluster.generate([PROMPTS[0], ""], greedy(), server=["pair", "single"])
        assert tokens([one]) == tokens(expected[:1])
        assert error.outputs[0].finish_reason == "error"
        with pytest.raises(UserError, match="nobody"):
            cluster.generate("a", server="nobody")
        pids = cluster._backend._cluster.pids
    assert sorted(path.name for path in logs.iterdir()) == ["pair.log", "single.log"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    requests = [event for event in read_trace(tmp_path / "trace.json") if event["ph"] == "b"]
    assert {event["pid"] for event in requests} == {0, 1}


def test_names_come_without_jax():
    code = (
        "import sys, dance_jax, dance_jax.config, dance_jax.launch.control.protocol;"
        "assert 'jax' not in sys.modules;"
        "assert dance_jax.SamplingParams().n == 1;"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_of_the_hub(model, cache_dir, llm, tmp_path):
    """A downloaded model answers like its directory and reuses the directory's compiled code."""
    with running_hub() as hub:
        hub.add("org/tiny", model)
        code = (
            "import sys; from dance_jax import LLM, SamplingParams\n"
            "with LLM('org/tiny', max_model_len=192, cache_dir=sys.argv[1]) as llm:\n"
            "    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)\n"
            "    print(llm.generate('1 + 1 =', params)[0].outputs[0].token_ids)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, cache_dir],
            env=os.environ | environment(hub, tmp_path / "hf"),
            check=True,
            capture_output=True,
            text=True,
        )
        assert hub.fetched()[-1] == "model.safetensors"
    assert done.stdout.strip() == str(tokens(llm.generate("1 + 1 =", greedy()))[0])
