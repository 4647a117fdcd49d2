"""Delays frames between a host and the bridge, as if the host were far away.

    python -m benchmarks.namespaces.delay SECONDS NAME ...    # in the head's namespace

Makes the interfaces NAMEa and NAMEb for each name, prints "ready", and passes every frame from one
of the pair to the other, SECONDS later and in order. The interfaces vanish when the process ends.
(The kernel's own netem is a module that many systems lack.)
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
#: Most bytes of a frame, on links with an MTU of 1,500 bytes.
_FRAME = 2048


def _tap(name: str) -> int:
    """Makes an interface; returns a file to read what it sends, and to write what it receives."""
    opened = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(opened, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return opened


def _write(tap: int, frame: bytes) -> None:
    """Writes a frame; it is lost if the interface is full or down, as on real ones."""
    with contextlib.suppress(OSError):
        os.write(tap, frame)


def main(seconds: float, names: list[str]) -> None:
    """Passes frames on until the process ends."""
    other: dict[int, int] = {}
    for name in names:
        one, two = _tap(f"{name}a"), _tap(f"{name}b")
        other |= {one: two, two: one}
    print("ready", flush=True)
    # All frames wait equally long, so they leave in the order in which they came.
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
