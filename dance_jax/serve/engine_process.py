"""The engine of a front end: a child process and the channel to it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import msgspec

from dance_jax.config import ServerSpec
from dance_jax.launch.agent.child import STACKS_SIGNAL
from dance_jax.launch.agent.process import ChildProcess
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import (
    ControlListener,
    new_key,
    pulse_identity,
    server_identity,
)
from dance_jax.serve.loop_channel import LoopChannel
from dance_jax.serve.watchdog import CHECK_S, Watchdog

#: Seconds for a hung engine to write the stacks of its threads to the log.
STACKS_S = 0.2
WORKER = "dance_jax.launch.worker.main"
#: Seconds to wait for an engine to exit on its own, and, after SIGKILL, until the front end gives
#: up waiting.
END_TIMEOUT_S, KILL_TIMEOUT_S = 0.3, 5.0


class EngineProcess:
    """One engine process, from start to exit; it shares this process's stdout and stderr.

    Args:
        setup: the engine's setup; its control channel is filled in here.
        private: directory that the child removes if its parent, this front end, is killed.
        watchdog_s: seconds without progress after which the engine is killed; 0: never.
        on_event: called on the event loop with each event from the engine.
        on_silence: called on the event loop with True when the engine gives no sign of life, and
            with False when it does again.
        on_death: called once on the event loop if the engine exits or fails; not after `end`.
    """

    def __init__(
        self,
        setup: protocol.Setup,
        private: str,
        watchdog_s: float,
        on_event: Callable[[protocol.Event], None],
        on_silence: Callable[[bool], None],
        on_death: Callable[[], None],
    ) -> None:
        self._on_event, self._on_silence, self._on_death = on_event, on_silence, on_death
        self._ending = False
        #: The failure that the engine reported, if any.
        self.failure: protocol.Failed | None = None
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        key = new_key()
        self._identity = server_identity(setup.rank)
        self._listener = ControlListener(key, [self._identity, pulse_identity(setup.rank)])
        self._channel = LoopChannel(self._listener.socket, self._listener.receive, self._receive)
        server = ServerSpec(setup.spec.servers[setup.rank].name, "")
        self._process = ChildProcess(
            server,
            WORKER,
            private=private,
            on_change=lambda: loop.call_soon_threadsafe(self._has_ended),
        )
        setup = msgspec.structs.replace(
            setup,
            control=self._listener.private,
            control_key=key,
            beats=False,
            watched=watchdog_s > 0,
        )
        self._process.write(msgspec.json.encode(setup))
        self._watchdog = Watchdog(watchdog_s, self.pid)
        self._watching = asyncio.create_task(self._watch()) if watchdog_s else None

    @property
    def pid(self) -> int:
        return self._process.popen.pid

    @property
    def status(self) -> int | None:
        """Exit status as a shell gives it; None while the engine runs."""
        return self._process.status

    def send(self, command: protocol.Command) -> None:
        """Send a command to the engine; a command to a dead engine is lost."""
        self._listener.send(self._identity, protocol.encode(command))
        self._channel.look_again()

    async def end(self) -> None:
        """Stop the engine and its child processes, and close the channel."""
        self._ending = True
        if self._watching is not None:
            self._watching.cancel()
        self.send(protocol.Stop())
        if not await self._within(END_TIMEOUT_S):
            self.kill()
            await self._within(KILL_TIMEOUT_S)
        self._process.let_go()
        self._channel.close()
        self._listener.close(linger_s=0)

    def kill(self) -> None:
        """Kill the engine and its child processes unless it has exited; safe in any thread."""
        if self._process.ended is None:
            self._process.kill(signal.SIGKILL)

    async def _within(self, seconds: float) -> bool:
        """Wait for the engine to exit; False on timeout."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _receive(self, message: tuple[str, bytes]) -> None:
        match protocol.decode_event(message[1]):
            case protocol.Pulse() as pulse:
                self._watchdog.heard(pulse)
            case protocol.Failed() as failure:
                self._fail(failure)
            case event:
                self._on_event(event)

    def _fail(self, failure: protocol.Failed) -> None:
        if not self._ending:
            self._ending, self.failure = True, failure
            self._on_death()

    async def _watch(self) -> None:
        """Kill the engine once it makes no progress."""
        silent = False
        while not (why := self._watchdog.verdict()):
            if self._watchdog.silent != silent:
                silent = self._watchdog.silent
                self._on_silence(silent)
            await asyncio.sleep(CHECK_S)
        self._process.kill(STACKS_SIGNAL)
        await asyncio.sleep(STACKS_S)
        self.kill()
        self._fail(protocol.Failed(why, user=False))

    def _has_ended(self) -> None:
        self._ended.set()
        if not self._ending:
            self._ending = True
            self._on_death()
