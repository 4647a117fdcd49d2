"""`LLM`: offline inference in Python, with vLLM's names."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import os
import pathlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from dance_jax.backends import Backend, InProcess, RemoteOptions, Servers
from dance_jax.cache import default_cache_dir
from dance_jax.config import ClusterSpec, ProgressCallback, Rounding, UserError
from dance_jax.engine.output import OutputCollector
from dance_jax.engine.sequence import (
    Request,
    RequestOutput,
    SamplingParams,
    sample_seed,
)

if TYPE_CHECKING:
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations

#: Text, or token ids.
Prompt = str | Sequence[int]
#: One turn of a conversation: {"role": ..., "content": ...}.
Message = dict[str, Any]


class LLM:
    """A model that answers lists of prompts, from this process or from a cluster.

    >>> with LLM() as llm:                                                # doctest: +SKIP
    ...     llm.generate("Once upon", SamplingParams(temperature=0))[0].outputs[0].text

    Close it, best as a context manager; what is forgotten is closed with the object or at exit.

    Args:
        model: directory in Hugging Face format, or converted, or `org/name` or
            `org/name@revision` on the Hugging Face hub, which is downloaded into the hub's cache
            on first use; None: the model of this package.
        hosts: hosts file (or its content as a ClusterSpec): one engine process per server is
            started, here or over ssh. None: one server in this process with all experts.
        policy: placement policy of the cluster, a name in `placement.POLICIES`; None:
            `placement.DEFAULT_POLICY`.
        activations: npz file with the counts and routes that the policy reads; None: all counts
            are equal.
        max_model_len: context in tokens, prompt and output; default: the model's, at most
            2,048.
        seed: of requests without a seed; the n-th such request of the object draws the same
            whichever server runs it.
        dtype: of activations and KV cache, "float32" or "bfloat16"; None: bfloat16 if all servers
            compute on accelerators, else float32.
        max_num_seqs: sequences that run at once on each device.
        kv_memory: bytes of each device's KV cache; None: all sequences at full length, in at most
            half of the memory that is free.
        exchange: how servers exchange rows: "calls" (each steps on its own), "collectives" (all
            step together), or "auto": calls on CPUs and on mixed platforms, and on accelerators
            whichever is predicted to be faster.
        wire_dtype: what hidden states are rounded to before routed experts, wherever these are:
            "float32" (they are not), "bfloat16", or "auto": bfloat16 where the weights of routed
            experts have 16 bits or less. With "int8" only those are rounded that go to another
            server.
        experts: what the weights of routed experts are rounded to when the model is converted:
            "keep" (they are not), "bf16", "int8", "int4", "int4-mixed" (the last projection has
            eight bits), "mxfp4".
        trunk: what all other matrices are rounded to: "keep", "bf16", "int8", "int4" or
            "int4-mixed" (attention, embedding and output have eight bits).
        ssh_config: file for `ssh -F`, for servers on other machines.
        cache_dir: where converted models and compiled steps are kept.
        log_dir: where the cluster's servers keep their logs; None: nowhere.
        trace: file in which to draw what steps and expert calls did and when, for
            https://ui.perfetto.dev, complete once the object is closed; None: it is not recorded.
        progress: show on standard error what happens while starting and generating; or a
            function that is told while starting.

    Raises:
        UserError: an argument, a file or the model is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        hosts: str | os.PathLike[str] | ClusterSpec | None = None,
        policy: str | None = None,
        activations: str | os.PathLike[str] | None = None,
        max_model_len: int | None = None,
        seed: int = 0,
        *,
        dtype: str | None = None,
        max_num_seqs: int = 16,
        kv_memory: int | None = None,
        wire_dtype: str = "auto",
        exchange: str = "auto",
        experts: str = "keep",
        trunk: str = "keep",
        ssh_config: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        trace: str | os.PathLike[str] | None = None,
        progress: bool | ProgressCallback = False,
    ) -> None:
        from dance_jax.launch.planning import defaults
        from dance_jax.models.checkpoint import Checkpoint
        from dance_jax.models.convert import check_readable, ensure_converted
        from dance_jax.models.hub import resolve
        from dance_jax.models.tokenizer import Tokenizer

        # What can be wrong at once comes before what takes long.
        rounding = Rounding(experts, trunk)
        servers = None if hosts is None else _cluster_arguments(hosts, policy, activations)
        self._show = progress is True
        report = progress if callable(progress) else _print_progress if progress else _silent
        # In this process JAX has the say; of servers it must not be asked here, or it would take
        # their GPU's memory.
        platform = _jax_platform() if servers is None else servers[0].platform
        cache = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir()
        if model is None:
            source = defaults.demo_dir()
        else:
            source = resolve(model, progress if callable(progress) else None)
        check_readable(source)
        self.tokenizer: Tokenizer = Tokenizer.load(source)
        checkpoint = Checkpoint.open(ensure_converted(source, cache / "models", report, rounding))
        self.config = defaults.engine_config(
            checkpoint.config,
            max_model_len,
            seed=seed,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            platform=platform,
            wire_dtype=wire_dtype,
            exchange=exchange,
            kv_memory=kv_memory,
            rounding=rounding,
            formats=checkpoint.formats,
        )
        self._seeds = (sample_seed(seed, number) for number in itertools.count())
        self._numbers = itertools.count()
        self._next_server = 0
        self._lock = threading.Lock()
        self._backend: Backend
        if servers is None:
            engine = (checkpoint, self.tokenizer, self.config)
            self._backend = InProcess(*engine, cache, report, trace)
        else:
            given = (model, cache_dir, ssh_config)
            far = RemoteOptions(*(None if each is None else pathlib.Path(each) for each in given))
            self._backend = Servers(
                checkpoint,
                self.config,
                cache,
                log_dir,
                report,
                far,
                *servers,
                trace=trace,
            )
        self._finalizer = weakref.finalize(self, self._backend.close)

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers; one nameless server without hosts."""
        return self._backend.servers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        server: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; they run together.

        A prompt that cannot run (empty, longer than the context, unknown token ids) gets samples
        with finish_reason "error" and the reason as stop_reason; the others finish.

        Args:
            prompts: one or several, as text or as token ids.
            sampling_params: for all prompts, or one for each; default: SamplingParams().
            server: name of the server that answers, for all or one for each; default: they go
                round.
            progress: show a bar on standard error; default: as the object was made.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            UserError: an argument is wrong; nothing was started.
            ClusterError: a server died; the cluster is stopped.
        """
        given = _prompt_list(prompts)
        encoded = [
            (prompt, self.tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
            for prompt in given
        ]
        return self._run(encoded, sampling_params, server, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        server: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template; otherwise as `generate`.

        Args:
            messages: one conversation, or several.

        Raises:
            UserError: as `generate`; the model has no chat template, or it refuses the messages.
        """
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Sequence[Any] = [messages] if single else messages
        encoded = []
        for conversation in conversations:
            _check_conversation(conversation)
            text = self.tokenizer.chat_text(conversation)
            encoded.append((text, self.tokenizer.encode(text, add_special_tokens=False)))
        return self._run(encoded, sampling_params, server, progress)

    def close(self) -> None:
        """Stop the servers and free the memory; may be called twice."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        server: str | Sequence[str] | None,
        progress: bool | None,
    ) -> list[RequestOutput]:
        params = _one_each("sampling_params", sampling_params, SamplingParams, len(prompts))
        for each in params:
            (each or SamplingParams()).verify()
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("this LLM is closed")
            ranks = self._ranks(_one_each("server", server, str, len(prompts)))
            requests = [
                self._request(prompt, token_ids, each or SamplingParams())
                for (prompt, token_ids), each in zip(prompts, params, strict=True)
            ]
            collectors = {request.request_id: OutputCollector(request) for request in requests}
            show = self._show if progress is None else progress
            with (
                _bar(len(requests), show) as advance,
                contextlib.closing(
                    self._backend.run(list(zip(ranks, requests, strict=True)))
                ) as deltas,
            ):
                for delta in deltas:
                    output = collectors[delta.request_id].apply(delta)
                    advance(output.finished, len(delta.token_ids))
        return [collector.output for collector in collectors.values()]

    def _request(self, prompt: str | None, token_ids: list[int], params: SamplingParams) -> Request:
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=next(self._seeds))
        return Request(str(next(self._numbers)), prompt, token_ids, params, time.time())

    def _ranks(self, names: Sequence[str | None]) -> list[int]:
        servers = self._backend.servers
        ranks = []
        for name in names:
            if name is None:
                ranks.append(self._next_server)
                self._next_server = (self._next_server + 1) % len(servers)
            elif name in servers:
                ranks.append(servers.index(name))
            else:
                known = ", ".join(map(repr, servers))
                raise UserError(f"server: there is no server {name!r}; there are {known}")
        return ranks


def _cluster_arguments(
    hosts: str | os.PathLike[str] | ClusterSpec,
    policy: str | None,
    activations: str | os.PathLike[str] | None,
) -> tuple[ClusterSpec, str, Activations | None]:
    """Servers, policy and counts, from what the user gave."""
    from dance_jax.launch.planning.defaults import default_platform
    from dance_jax.launch.planning.hosts import read_hosts
    from dance_jax.placement.activations import Activations
    from dance_jax.placement.policies import DEFAULT_POLICY, POLICIES

    policy = DEFAULT_POLICY if policy is None else policy
    if policy not in POLICIES:
        raise UserError(f"policy: there is no {policy!r}; there are {', '.join(POLICIES)}")
    spec = hosts
    if not isinstance(spec, ClusterSpec):
        spec = read_hosts(spec, default_platform())
    return spec, policy, None if activations is None else Activations.load(activations)


def _jax_platform() -> str:
    """Of accelerators, whatever they are, as of GPUs."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _check_conversation(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages: a list of them is needed; got {messages!r:.80}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'messages[{number}]: needs "role", a string; got {message!r:.80}')
        if not isinstance(message.get("content"), str | list):
            raise UserError(f'messages[{number}]: needs "content", text; got {message!r:.80}')


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise UserError(f"prompts: text, token ids or a list of them; got {type(prompts).__name__}")
    if prompts and all(_is_token(token) for token in prompts):
        return [[int(token) for token in prompts]]  # type: ignore[arg-type]
    result: list[str | list[int]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            result.append(prompt)
        elif isinstance(prompt, list | tuple) and all(_is_token(token) for token in prompt):
            result.append([int(token) for token in prompt])
        else:
            raise UserError(f"prompts[{number}]: must be text or token ids; got {prompt!r:.80}")
    return result


def _is_token(value: object) -> bool:
    """An integer that can cross processes; whether the model knows it is another question."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return -(2**63) <= int(value) < 2**63


def _one_each(name: str, value: Any, kind: type, count: int) -> list[Any]:
    """`value` for everybody, or a list of one for each."""
    if value is None or isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(each, kind) for each in value):
        raise UserError(f"{name}: must be a {kind.__name__} or a list of them; got {value!r:.80}")
    if len(value) != count:
        raise UserError(f"{name}: {len(value)} given for {count} prompts; give one, or one each")
    return list(value)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[bool, int], None]]:
    """A bar of finished prompts; yields a function of (one more finished, new tokens)."""
    if not show:
        yield lambda finished, tokens: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.fields[tokens]} tokens"),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total, tokens=0)
        seen = 0

        def advance(finished: bool, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            bar.update(task, advance=int(finished), tokens=seen)

        yield advance


def _silent(what: str, done: int, total: int) -> None:
    pass


def _print_progress(what: str, done: int, total: int) -> None:
    """A line on standard error that is overwritten by the next."""
    share = f" {done}/{total}" if total else ""
    end = "\n" if total and done >= total else ""
    print(f"\r\033[K{what}{share}", end=end, file=sys.stderr, flush=True)
