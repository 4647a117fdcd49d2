"""Delay frames between a host and the bridge, to simulate distance.

    python -m benchmarks.namespaces.delay SECONDS NAME ...    # in the head's namespace

For each name the program creates the interfaces NAMEa and NAMEb. It then prints "ready" and
forwards every frame from one interface of a pair to the other, SECONDS later and in order. The
interfaces disappear when the program ends. (The kernel's netem is a module that many systems lack.)
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

#: From linux/if_tun.h.
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
#: Maximum bytes of a frame, on links with an MTU of 1,500 bytes.
_FRAME = 2048


def _tap(name: str) -> int:
    """Create a tap interface: reads return frames that it sends, and it receives written frames."""
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(opened, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return opened


def _write(tap: int, frame: bytes) -> None:
    """Write a frame; drop the frame if the interface is full or down, as any interface does."""
    with contextlib.suppress(OSError):
        os.write(tap, frame)


def main(seconds: float, names: list[str]) -> None:
    """Forward frames until the process is ended."""
    other: dict[int, int] = {}
    for name in names:
        one, two = _tap(f"{name}a"), _tap(f"{name}b")
        other |= {one: two, two: one}
    print("ready", flush=True)
    # All frames wait equally long, so a queue keeps them in order of departure.
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        left = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        readable, _, _ = select.select(list(other), [], [], left)
        now = time.monotonic()
        for tap in readable:
            waiting.append((now + seconds, other[tap], os.read(tap, _FRAME)))
        while waiting and waiting[0][0] <= now:
            _, tap, frame = waiting.popleft()
            _write(tap, frame)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
