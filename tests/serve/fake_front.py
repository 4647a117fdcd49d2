"""A fake front end without users or an engine, which sends the launcher the events of a `Script`.

The script is passed as the served model's name. SIGUSR1 makes its engine die.
"""

from __future__ import annotations

import os
import signal

import msgspec

from dance_jax.launch.agent import child
from dance_jax.launch.control import protocol
from dance_jax.launch.control.channel import ControlConnection
from dance_jax.launch.control.protocol import FrontSetup

#: Process id of the fake engine.
ENGINE_PID = 4242


class Script(msgspec.Struct):
    """What happens to the second server, and how the others follow."""

    #: Numbers of the starts at which the second server's engine dies at once.
    dead_at_once: list[int] = []
    #: Message of the engine's failure when it dies; "" if the engine is killed.
    says: str = ""
    #: Whether the failure is a user's error.
    user: bool = False
    #: Whether the second server never drains.
    runs_on: bool = False
    #: Whether all servers step on their own.
    calls: bool = False


def main() -> None:
    child.prepare()
    setup = child.read_setup(FrontSetup)
    assert setup is not None
    child.end_with_parent(setup.engine)
    rank = setup.engine.rank
    script = msgspec.json.decode(setup.options.served_model_name, type=Script)
    second = rank == 1
    connection = ControlConnection(setup.engine.control, setup.engine.control_key, f"server-{rank}")
    start = 0

    def tell(event: protocol.FrontEvent) -> None:
        connection.send(protocol.encode(event))

    def die(*_: object) -> None:
        if script.calls and not second:
            return  # a server that steps on its own outlives the second server's engine
        if not second:
            failed = protocol.Failed("server beta closed the connection", user=False)
            tell(protocol.EngineDied(start, ENGINE_PID, None, failed))
        elif script.says:
            failed = protocol.Failed(script.says, script.user)
            tell(protocol.EngineDied(start, ENGINE_PID, None, failed))
        else:
            tell(protocol.EngineDied(start, ENGINE_PID, 128 + signal.SIGKILL, None))

    def begin() -> None:
        if start in script.dead_at_once:
            die()
        else:
            prepared = protocol.Prepared(f"host-{rank}:{start}", f"{rank}:{start}")
            tell(protocol.FromEngine(start, prepared))

    signal.signal(signal.SIGUSR1, die)
    signal.signal(signal.SIGTERM, lambda *_: tell(protocol.DrainWanted()))
    tell(protocol.Hello(os.getpid()))
    begin()
    while True:
        match protocol.decode_front_command(connection.receive()):
            case protocol.Stop():
                break
            case protocol.Restart(number):
                # The launcher must ignore a late event from the previous engine.
                tell(protocol.EngineDied(start, ENGINE_PID, 1, None))
                start = number
                begin()
            case protocol.Drain():
                if not (second and script.runs_on):
                    tell(protocol.Drained())
            case protocol.Join(coordinator, endpoints, calls):
                assert calls == script.calls
                assert endpoints[rank] == f"{rank}:{start}"
                if not calls:
                    assert coordinator == f"host-0:{start}"
                    assert endpoints == [f"0:{start}", f"1:{start}"]
                tell(protocol.FromEngine(start, protocol.Joined()))
                tell(protocol.FromEngine(start, protocol.Ready(start, 0)))
    connection.close()
    child.end(0)


if __name__ == "__main__":
    main()
