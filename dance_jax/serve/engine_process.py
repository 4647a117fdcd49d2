"""A front end's engine: its child process, and the channel between the two."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import msgspec

from dance_jax.config import ServerSpec
from dance_jax.launch.agent.process import ServerProcess
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlListener, new_key
from dance_jax.serve.loop_socket import LoopSocket

WORKER = "dance_jax.launch.worker.main"
#: Seconds an engine has to end by itself, and, killed, until it is not waited for any more.
END_TIMEOUT_S, KILL_TIMEOUT_S = 0.3, 5.0


class EngineProcess:
    """One engine, from its start to its end; it prints where this process does.

    Args:
        setup: of the engine, but for its control channel, which is made here.
        on_event: called with what it says, on the event loop.
        on_death: called once when it ends or fails, on the event loop; not after `end`.
    """

    def __init__(
        self,
        setup: protocol.Setup,
        on_event: Callable[[protocol.Event], None],
        on_death: Callable[[], None],
    ) -> None:
        self._on_event, self._on_death = on_event, on_death
        self._ending = False
        #: What it said when it failed.
        self.failure: protocol.Failed | None = None
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        key = new_key()
        self._listener = ControlListener(key)
        self._socket = LoopSocket(self._listener.socket, self._receive)
        self._name = b"server-%d" % setup.rank
        server = ServerSpec(setup.spec.servers[setup.rank].name, "")
        self._process = ServerProcess(
            server, None, WORKER, on_end=lambda: loop.call_soon_threadsafe(self._has_ended)
        )
        setup = msgspec.structs.replace(
            setup, control=self._listener.private, control_key=key, beats=False
        )
        self._process.tell(msgspec.json.encode(setup))

    @property
    def pid(self) -> int:
        return self._process.popen.pid

    @property
    def status(self) -> int | None:
        """Exit status as a shell has it; None: it lives."""
        return self._process.status

    def send(self, command: protocol.Command) -> None:
        """Tells it something; an engine that is gone does not mind."""
        self._socket.send(self._name, protocol.encode(command))

    async def end(self) -> None:
        """Ends it and what it started, and closes the channel."""
        self._ending = True
        self.send(protocol.Stop())
        if not await self._within(END_TIMEOUT_S):
            self.kill()
            await self._within(KILL_TIMEOUT_S)
        self._process.let_go()
        self._socket.close()
        self._listener.close(linger_s=0)

    def kill(self) -> None:
        """Kills it and what it started, unless it has ended; from any thread."""
        if self._process.ended is None:
            self._process.kill(signal.SIGKILL)

    async def _within(self, seconds: float) -> bool:
        """It ends within so long."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _receive(self, message: list[bytes]) -> None:
        event = protocol.decode_event(message[1])
        if not isinstance(event, protocol.Failed):
            self._on_event(event)
        elif not self._ending:
            self._ending, self.failure = True, event
            self._on_death()

    def _has_ended(self) -> None:
        self._ended.set()
        if not self._ending:
            self._ending = True
            self._on_death()
