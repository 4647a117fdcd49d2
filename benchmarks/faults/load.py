"""Requests in flight on every server, each of whose answers is compared with the right one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from benchmarks.background import background, watch
from dance_jax.bench.cluster import RunError
from dance_jax.bench.http import Address, HttpError, NotReached, request

#: Output tokens of each request.
TOKENS = 120
#: Seconds before a user whose request failed sends the next one.
RETRY_S = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, which has one right answer."""

    prompt: str
    #: None: greedy.
    seed: int | None
    stream: bool

    def body(self) -> bytes:
        fields = {"prompt": self.prompt, "max_tokens": TOKENS, "stream": self.stream}
        sampled = {"temperature": 0.0} if self.seed is None else {"seed": self.seed}
        return json.dumps(fields | sampled | {"ignore_eos": True}).encode()


@dataclasses.dataclass
class Record:
    """What became of a request; times are of time.monotonic()."""

    rank: int
    begin: float
    end: float = 0.0
    #: "same", "changed", "lost", "refused" (503), or "cut": the way to its server, or the server's
    #: front end, was taken away.
    outcome: str = "lost"
    why: str = ""
    #: Longest time between two pieces of a stream, and its end.
    gap: float = 0.0
    gap_end: float = 0.0


class Load:
    """The same number of requests in flight on every server.

    Args:
        addresses: of the servers.
        each: requests in flight on each server.
    """

    def __init__(self, addresses: Sequence[Address], each: int) -> None:
        self._addresses, self._each = addresses, each
        self._cases: list[Case] = []
        self._right: dict[Case, str] = {}
        self.records: list[Record] = []
        #: Servers whose front ends the present fault ends: their users lose connections.
        self.dead: set[int] = set()
        #: Servers that the present fault puts out of their users' reach: no new connections.
        self.away: set[int] = set()
        #: By user, when the request in flight began.
        self._begun: dict[tuple[int, int], float] = {}

    async def learn(self, cases: Iterator[Case], wanted: int) -> int:
        """Take requests that all servers answer alike, and remember their answers.

        Servers add up the sums of experts in different orders, so that rounding decides a request
        on whose way two tokens are nearly as likely. Such a request has no one right answer.

        Args:
            cases: more of them than wanted.
            wanted: number of requests.

        Returns:
            How many others were left out.
        """
        left_out = 0
        while len(self._right) < wanted:
            case = next(cases)
            ranks = range(len(self._addresses))
            answers = {await self._answer(rank, case, Record(rank, 0)) for rank in ranks}
            if len(answers) == 1:
                (self._right[case],) = answers
            else:
                left_out += 1
            if left_out > wanted:
                raise RunError("servers answer most requests differently")
        self._cases = list(self._right)
        return left_out

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep requests in flight within the block, while a dashboard watches each server."""
        ranks = range(len(self._addresses))
        users = (self._user(rank, number) for rank in ranks for number in range(self._each))
        async with background(users), background(map(watch, self._addresses)):
            yield

    async def settled(self, seconds: float) -> int:
        """Wait until all requests now in flight have ended; return how many have not in time."""
        now = time.monotonic()
        while True:
            late = sum(begun < now for begun in self._begun.values())
            if not late or time.monotonic() > now + seconds:
                return late
            await asyncio.sleep(0.1)

    async def _user(self, rank: int, number: int) -> None:
        user = rank, number
        while True:
            case = self._cases[number % len(self._cases)]
            number += self._each
            record = Record(rank, time.monotonic())
            self._begun[user] = record.begin
            was_dead, was_away = rank in self.dead, rank in self.away
            try:
                text = await self._answer(rank, case, record)
                record.outcome = "same" if text == self._right[case] else "changed"
            except _Refused as error:
                record.outcome, record.why = "refused", str(error)
            except NotReached as error:
                cut = was_dead or was_away or rank in self.dead | self.away
                record.outcome, record.why = "cut" if cut else "lost", str(error)
            except (HttpError, KeyError, ValueError) as error:
                cut = was_dead or rank in self.dead
                record.outcome = "cut" if cut else "lost"
                record.why = f"{type(error).__name__}: {error}"
            record.end = time.monotonic()
            self.records.append(record)
            if record.outcome not in ("same", "changed"):
                await asyncio.sleep(RETRY_S)

    async def _answer(self, rank: int, case: Case, record: Record) -> str:
        address, text = self._addresses[rank], ""
        async with request(
            address, "POST", "/v1/completions", case.body(), {"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                why = (await response.read()).decode(errors="replace")
                raise _Refused(why) if response.status == 503 else HttpError(why)
            if not case.stream:
                return json.loads(await response.read())["choices"][0]["text"]
            last = time.monotonic()
            async for event in response.events():
                now = time.monotonic()
                if now - last > record.gap:
                    record.gap, record.gap_end = now - last, now
                last = now
                if event == b"[DONE]":
                    return text
                content = json.loads(event)
                if "error" in content:
                    raise HttpError(content["error"]["message"])
                text += content["choices"][0]["text"]
        raise HttpError("the stream ended early")


class _Refused(Exception):
    """The server answered 503."""
