"""`python fake_launcher.py SERVERS ... --port P`: fake servers in place of a cluster.

SERVERS is the number of servers; with 0, the launcher fails.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from tests.bench.fake_server import FakeServer, listen


async def main() -> None:
    count, port = int(sys.argv[1]), int(sys.argv[-1])
    if count == 0:
        sys.exit("error: hosts.txt:3: no such memory")
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    listening = [await listen(FakeServer(loading=2), port + n) for n in range(count)]
    await ended.wait()
    for each in listening:
        each.close()


if __name__ == "__main__":
    asyncio.run(main())
