"""`LLM`: offline inference in Python, with vLLM's names."""

from __future__ import annotations

import contextlib
import itertools
import numbers
import os
import pathlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from dance_jax.backends import Backend, InProcess, RemoteOptions, Servers
from dance_jax.cache import default_cache_dir
from dance_jax.config import (
    DEFAULT_POLICY,
    GENERATION_CONFIGS,
    ClusterSpec,
    EngineOptions,
    ProgressCallback,
    UserError,
)
from dance_jax.engine.generation import sampling_defaults
from dance_jax.engine.sequence import Request, RequestOutput, SamplingParams, request_seeds

if TYPE_CHECKING:
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations

#: Text, or token ids.
Prompt = str | Sequence[int]
#: One turn of a conversation: {"role": ..., "content": ...}.
Message = dict[str, Any]


class LLM:
    """A model that completes lists of prompts, in this process or on a cluster.

    >>> with LLM() as llm:                                                # doctest: +SKIP
    ...     llm.generate("Once upon", SamplingParams(temperature=0))[0].outputs[0].text

    Close the object, preferably by using it as a context manager; otherwise it is closed when it
    is garbage collected, or at exit.

    Args:
        model: directory in Hugging Face format or converted, or `org/name` or
            `org/name@revision` on the Hugging Face hub, downloaded into the hub's cache on first
            use; None: the demo model of this package.
        hosts: hosts file (or its content as a ClusterSpec): one engine process is started per
            server, on this machine or over ssh (only the command line has --node-rank). None: one
            server in this process, with all experts.
        policy: placement policy of the cluster, a name in `placement.POLICIES`; None:
            `placement.DEFAULT_POLICY`.
        activations: npz file with the counts and routes that the policy reads; None: all counts
            are equal.
        options: any field of `EngineOptions`, for example `max_model_len=4096`. With `seed`, the
            n-th request without its own seed draws the same samples on any server.
        ssh_config: file for `ssh -F`, for servers on other machines.
        cache_dir: directory of converted models and compiled steps.
        log_dir: directory of the cluster's server logs; None: logs are not kept.
        trace: file for a trace of all steps and expert calls, for https://ui.perfetto.dev,
            complete once the object is closed; None: no trace.
        progress: True shows progress on standard error while starting and generating; a function
            is called with the progress while starting.
        generation_config: "auto": prompts without sampling parameters are sampled as the model's
            generation_config.json says; "none": with the defaults of `SamplingParams`.
        chat_template: file with a chat template to use instead of the model's.

    Raises:
        UserError: an argument, a file or the model is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        hosts: str | os.PathLike[str] | ClusterSpec | None = None,
        policy: str | None = None,
        activations: str | os.PathLike[str] | None = None,
        *,
        ssh_config: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        trace: str | os.PathLike[str] | None = None,
        progress: bool | ProgressCallback = False,
        generation_config: Literal["auto", "none"] = "auto",
        chat_template: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        from dance_jax.launch.planning import defaults
        from dance_jax.models.chat_template import read_template
        from dance_jax.models.checkpoint import Checkpoint
        from dance_jax.models.convert import check_readable, ensure_converted
        from dance_jax.models.directory import demo_dir
        from dance_jax.models.hub import resolve
        from dance_jax.models.tokenizer import Tokenizer

        # Arguments are checked before anything slow starts.
        if generation_config not in GENERATION_CONFIGS:
            allowed = ", ".join(GENERATION_CONFIGS)
            raise UserError(f"generation_config={generation_config!r}: must be one of {allowed}")
        wanted = EngineOptions(**options)
        rounding = wanted.rounding
        if hosts is None:
            of_cluster = {"policy": policy, "activations": activations, "ssh_config": ssh_config}
            for name, value in of_cluster.items():
                if value is not None:
                    raise UserError(f"{name}: applies to a cluster; give hosts, or leave it out")
        servers = None if hosts is None else _cluster_arguments(hosts, policy, activations)
        self._show = progress is True
        report = progress if callable(progress) else _print_progress if progress else _silent
        # In this process, JAX's backend decides. With servers, asking JAX here would take GPU
        # memory from them.
        platform = _jax_platform() if servers is None else servers[0].platform
        cache = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir()
        if model is None:
            source = demo_dir()
        else:
            source = resolve(model, progress if callable(progress) else None)
        check_readable(source)
        self.tokenizer: Tokenizer = Tokenizer.load(source, read_template(chat_template))
        self._sampling = sampling_defaults(source, generation_config)
        checkpoint = Checkpoint.open(ensure_converted(source, cache / "models", report, rounding))
        self.config = defaults.engine_config(
            checkpoint.config, wanted, platform=platform, formats=checkpoint.formats
        )
        self._seeds = request_seeds(wanted.seed)
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
    def default_sampling_params(self) -> SamplingParams:
        """A copy of the parameters of prompts without any, to be changed as wanted."""
        return SamplingParams(**self._sampling)

    @property
    def servers(self) -> tuple[str, ...]:
        """Names of the servers; without hosts, one server with an empty name."""
        return self._backend.servers

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        server: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all at the same time.

        A prompt that cannot run (empty, longer than the context, unknown token ids) gets samples
        with finish_reason "error" and the reason as stop_reason; the others finish.

        Args:
            prompts: one or several, as text or as token ids.
            sampling_params: for all prompts, or one for each; default: `default_sampling_params`.
            server: name of the server that answers, one for all or one each; default: the servers
                take turns.
            progress: show a bar on standard error; default: the `progress` of the object.

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
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template; otherwise as `generate`.

        Args:
            messages: one conversation, or several.
            sampling_params: as for `generate`.
            server: as for `generate`.
            progress: as for `generate`.
            add_generation_prompt: end the prompt with the beginning of an answer.
            continue_final_message: the answer goes on where the last message ends.
            tools: functions that the model may call, in the form of OpenAI's API. Calls are in the
                text, as the model writes them; `dance_jax.serve.parsers` reads them.
            documents: texts for templates that take some.
            chat_template_kwargs: more variables for the template.

        Raises:
            UserError: as for `generate`; or the model has no chat template, or the template refuses
                the messages.
        """
        reserved = {"messages", "add_generation_prompt", "continue_final_message"}
        if wrong := reserved & {*(chat_template_kwargs or {})}:
            raise UserError(f"chat_template_kwargs: cannot have {', '.join(sorted(wrong))}")
        if tools and "tools" not in (self.tokenizer.template or ""):
            raise UserError("tools: the model's chat template has no tools")
        given = {"tools": tools, "documents": documents}
        variables = {name: [*value] for name, value in given.items() if value}
        variables |= chat_template_kwargs or {}
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Sequence[Any] = [messages] if single else messages
        encoded = []
        for conversation in conversations:
            _check_conversation(conversation)
            text = self.tokenizer.chat_text(
                conversation,
                add_generation_prompt,
                continue_final_message,
                **variables,
            )
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
        params = self.default_sampling_params if sampling_params is None else sampling_params
        params = _one_each("sampling_params", params, SamplingParams, len(prompts))
        # Copies, which are checked anew: fields may have changed since they were checked.
        params = [msgspec.structs.replace(each) for each in params]
        for structure in {id(s): s for p in params if (s := p.structured_outputs)}.values():
            structure.check()
        room = self.config.max_model_len
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("this LLM is closed")
            ranks = self._ranks(_one_each("server", server, str, len(prompts)))
            requests = []
            for (text, ids), each in zip(prompts, params, strict=True):
                if each.seed is None:
                    each.seed = next(self._seeds)
                name, ids = str(next(self._numbers)), each.truncated(ids, room)
                requests.append(Request(name, text, ids, each))
            outputs = {request.request_id: RequestOutput.of(request) for request in requests}
            show = self._show if progress is None else progress
            with (
                _bar(len(requests), show) as advance,
                contextlib.closing(
                    self._backend.run(list(zip(ranks, requests, strict=True)))
                ) as deltas,
            ):
                for delta in deltas:
                    output = outputs[delta.request_id]
                    output.add(delta)
                    advance(output.finished, len(delta.token_ids))
        return list(outputs.values())

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
                raise UserError(f"server: unknown server {name!r}; the servers are {known}")
        return ranks


def _cluster_arguments(
    hosts: str | os.PathLike[str] | ClusterSpec,
    policy: str | None,
    activations: str | os.PathLike[str] | None,
) -> tuple[ClusterSpec, str, Activations | None]:
    """The servers, the policy and the expert counts, from the user's arguments."""
    from dance_jax.launch.planning.defaults import default_platform
    from dance_jax.launch.planning.hosts import read_hosts
    from dance_jax.placement.activations import Activations
    from dance_jax.placement.policies import POLICIES

    policy = DEFAULT_POLICY if policy is None else policy
    if policy not in POLICIES:
        raise UserError(f"policy: unknown policy {policy!r}; choose from {', '.join(POLICIES)}")
    spec = hosts
    if not isinstance(spec, ClusterSpec):
        spec = read_hosts(spec, default_platform())
    return spec, policy, None if activations is None else Activations.load(activations)


def _jax_platform() -> str:
    """The platform of this process; any accelerator counts as "cuda"."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _check_conversation(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"messages: must be a non-empty list; got {messages!r:.80}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'messages[{number}]: "role" must be a string; got {message!r:.80}')
        if not isinstance(message.get("content"), str | list | None):
            raise UserError(f'messages[{number}]: "content" must be text; got {message!r:.80}')


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise UserError(
            f"prompts: must be text, token ids or a list of them; got {type(prompts).__name__}"
        )
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
    """Whether the value is an integer of 64 bits; the vocabulary is checked elsewhere."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return -(2**63) <= int(value) < 2**63


def _one_each(name: str, value: Any, kind: type, count: int) -> list[Any]:
    """`value` repeated `count` times, or the list that `value` is."""
    if value is None or isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(each, kind) for each in value):
        raise UserError(f"{name}: must be a {kind.__name__} or a list of them; got {value!r:.80}")
    if len(value) != count:
        raise UserError(f"{name}: {len(value)} values for {count} prompts; give one, or one each")
    return list(value)


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[bool, int], None]]:
    """Show a bar of finished prompts; yields a function of (one more finished, new tokens)."""
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
    """Print a line on standard error that the next one overwrites."""
    share = f" {done}/{total}" if total else ""
    end = "\n" if total and done >= total else ""
    print(f"\r\033[K{what}{share}", end=end, file=sys.stderr, flush=True)
