"""The backends of an `LLM`: this process, or a cluster that the `LLM` starts."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Protocol

from dance_jax.cache import private_directory
from dance_jax.config import ClusterSpec, EngineConfig, ProgressCallback
from dance_jax.engine.sequence import OutputDelta, Request
from dance_jax.launch.cluster.trace import TraceFile

if TYPE_CHECKING:
    from dance_jax.engine.engine import Engine
    from dance_jax.models.checkpoint import Checkpoint
    from dance_jax.models.tokenizer import Tokenizer
    from dance_jax.placement.activations import Activations

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Runs the requests of an `LLM`."""

    @property
    def servers(self) -> tuple[str, ...]: ...

    def run(self, requests: list[tuple[int, Request]]) -> Generator[OutputDelta]:
        """Yield the deltas of (rank, request) pairs; closing the generator aborts the rest."""
        ...

    def close(self) -> None: ...


class InProcess:
    """One server in this process that holds all experts."""

    servers: tuple[str, ...] = ("",)

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        config: EngineConfig,
        cache_dir: pathlib.Path,
        report: ProgressCallback,
        trace: str | os.PathLike[str] | None,
    ) -> None:
        import jax

        from dance_jax.engine.compile_cache import CompileCache
        from dance_jax.engine.engine import Engine
        from dance_jax.engine.trace import Trace
        from dance_jax.launch.worker.memory import free_per_device
        from dance_jax.models import native

        compiled = private_directory(cache_dir / "compiled")
        if compiled is not None:
            native.load(compiled)
        # The seed is an input of the compiled code, not part of it.
        scope = (checkpoint.fingerprint, "one server", dataclasses.replace(config, seed=0))
        cache = CompileCache(compiled, scope)
        report("loading", 0, 0)
        free = free_per_device(jax.default_backend(), (1,))
        engine = Engine(
            checkpoint, tokenizer, None, 0, None, config, compile_cache=cache, free_memory=free
        )
        self._trace: TraceFile | None = None
        if trace is not None:
            self._trace = TraceFile(trace, ["server"])
            engine.trace = Trace(0, ["server"], self._trace.began_ns, engine.runner.calls)
        # Steps are compiled on first use, because no other server waits for them here.
        self._engine: Engine | None = engine

    def run(self, requests: list[tuple[int, Request]]) -> Generator[OutputDelta]:
        engine = self._engine
        if engine is None:
            raise RuntimeError("an earlier call was interrupted within a step; make a new LLM")
        for _, request in requests:
            engine.add(request)
        try:
            while engine.has_work:
                outputs = engine.step().outputs
                self._keep_trace(engine)
                yield from outputs
        except GeneratorExit:
            engine.abort()
            while engine.has_work:
                engine.step()
            raise
        except BaseException:
            # The interrupted step has consumed the KV cache, so the engine cannot go on.
            self._engine = None
            raise

    def _keep_trace(self, engine: Engine) -> None:
        if self._trace is not None and engine.trace is not None:
            self._trace.add(engine.trace.take())

    def close(self) -> None:
        self._engine = None
        if self._trace is not None:
            self._trace.close()


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """Options for servers on other machines; None if not given."""

    model: pathlib.Path | None
    cache_dir: pathlib.Path | None
    ssh_config: pathlib.Path | None


class Servers:
    """A cluster that this object starts and stops."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        cache_dir: pathlib.Path,
        log_dir: str | os.PathLike[str] | None,
        report: ProgressCallback,
        far: RemoteOptions,
        spec: ClusterSpec,
        policy: str,
        activations: Activations | None,
        *,
        trace: str | os.PathLike[str] | None,
    ) -> None:
        from dance_jax.launch.agent.network import Network
        from dance_jax.launch.cluster.batch import Cluster
        from dance_jax.launch.planning.plan import make_plan, matched, rooms
        from dance_jax.launch.preflight.run import run_preflight

        held = rooms(spec, checkpoint, config)
        activations = matched(activations, spec, checkpoint)
        network = Network(ssh_config=far.ssh_config)
        if network.any_remote(spec):
            found = run_preflight(
                spec,
                model=far.model,
                fingerprint=checkpoint.fingerprint,
                cache_dir=far.cache_dir,
                needs=[room.device_bytes for room in held],
                network=network,
                progress=lambda text: report(f"preflight: {text}", 0, 0),
            )
            spec, network = found.applied(network)
        report(f"placing experts ({policy})", 0, 0)
        plan = make_plan(spec, checkpoint, config, policy, activations)
        for note in plan.notes:
            log.warning(note)
        self.servers = spec.names
        self._cluster = Cluster(
            plan.spec,
            checkpoint,
            plan.layout,
            dataclasses.replace(config, exchange=plan.exchange.name),
            network=network,
            model=far.model,
            log_dir=log_dir,
            cache_dir=cache_dir,
            trace=trace,
            progress=lambda name, stage, done, total: report(f"{name}: {stage}", done, total),
        )
        self._cluster.start()

    def run(self, requests: list[tuple[int, Request]]) -> Generator[OutputDelta]:
        return self._cluster.generate(requests)

    def close(self) -> None:
        self._cluster.stop()
