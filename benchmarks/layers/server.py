"""One server's process: joins the others as launch's servers do, then answers on its pipes.

What `Servers` writes to standard input and reads from standard output are pickles: (name,
arguments) of a method of `Server`, and its result or an `Unanswered`. None crosses the network.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pickle
import sys
import traceback
from typing import TYPE_CHECKING, Any

from dance_jax.config import ClusterSpec, EngineConfig
from dance_jax.launch import environment, join
from dance_jax.launch.protocol import Setup

from .routes import Sizes

if TYPE_CHECKING:
    from dance_jax.models.messages import Transport
    from dance_jax.placement.core import Layout

    from .step import Timed
    from .texts import Score


@dataclasses.dataclass(frozen=True)
class Unanswered:
    """A method failed."""

    traceback: str


class Server:
    """What a server can be asked for; every server is asked the same, at the same time."""

    def __init__(self, spec: ClusterSpec, rank: int, key: bytes, library: pathlib.Path):
        environment.prepare("cpu", ())
        devices = spec.devices[rank]
        self.setup = Setup(
            spec=spec,
            rank=rank,
            config=EngineConfig(max_model_len=2),
            model="",
            fingerprint="",
            layout=b"",
            control="",
            control_key=key,
            key=key,
            platform="cpu",
            coordinator_port=0,
            machine_devices=(devices,),
            machine_index=0,
            cache_dir=None,
            private_dir="",
            beats=False,
        )
        self.library = library

    def prepare(self) -> tuple[str, str]:
        """host:port where this server would coordinate, and where it listens for the others."""
        self.listener = join.listen(self.setup, self.setup.key)
        return join.coordinator_endpoint(self.setup), self.listener.endpoint

    def join(self, coordinator: str, endpoints: list[str], delayed: bool) -> str:
        """Becomes one of the servers; returns the name of the transport.

        Args:
            coordinator: of the first server.
            endpoints: of all servers, by rank.
            delayed: what the links send takes a while, see delay.py.
        """
        from dance_jax.models import links_cpu, native
        from dance_jax.models.collectives import Collectives

        from . import delay

        native.register(self.library)
        join.join(self.setup, coordinator)
        self.delay = delay.Delay()
        if delayed:
            delay.install(self.delay)
        me = (self.setup.rank, self.setup.spec.names, self.listener, endpoints, self.setup.key)
        own = links_cpu.connect(*me, usable=native.library() is not None)
        self.transports: dict[str, Transport] = {each.name: each for each in (Collectives(), own)}
        return own.name

    def compile(self, sizes: Sizes, tokens: int, room: int, transport: str, wire: str) -> None:
        """The step that is run from here on; see `step.Layers`."""
        from .step import Layers

        self.layers = Layers(sizes, self.setup.rank, tokens, room, self.transports[transport], wire)

    def draw(self, local_share: float, seed: int) -> None:
        self.layers.draw(local_share, seed)

    def run(self, steps: int) -> Timed:
        return self.layers.run(steps)

    def trace(self, steps: int) -> dict[str, float]:
        return self.layers.trace(steps)

    def set_delay(self, seconds: float) -> None:
        self.delay.seconds = seconds

    def score(
        self, model: pathlib.Path, layout: Layout, waves: list[list[list[list[int]]]], rows: int
    ) -> dict[str, Score]:
        """See `texts.score`."""
        from .texts import score

        transport = self.transports["sockets" if "sockets" in self.transports else "collectives"]
        return score(model, layout, self.setup.rank, waves, rows, transport)


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up among the pickles
    server = Server(*pickle.load(sys.stdin.buffer))
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        reply: Any
        try:
            reply = getattr(server, name)(**arguments)
        except Exception:
            reply = Unanswered(traceback.format_exc())
        pickle.dump(reply, replies)
        replies.flush()
    # Not sys.exit: jax.distributed would wait for processes that may be gone.
    os._exit(0)


if __name__ == "__main__":
    main()
