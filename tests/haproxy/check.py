"""Kill a server behind HAProxy with examples/haproxy.cfg: `make haproxy`.

    python -m tests.haproxy.check    # installs Debian's haproxy if it is missing, as root

Three servers of the demo run on this machine, with HAProxy in front of them. The script prints
every check and ends with exit code 1 if one fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator

import httpx

from tests.checks import NAMES, Checks, haproxy, run_checks, three_servers
from tests.launch.launched import Launch, free_ports

CONFIGURATION = pathlib.Path("examples/haproxy.cfg")
#: Rank of the server whose front end is killed.
VICTIM = 1
#: Calls in flight when it is killed, every second one streamed, and the number of their clients.
CALLS, CLIENTS = 36, 12
#: Tokens of each answer: a few seconds for all of them.
LENGTH = 64
#: Sequences that run at once on a server: few, so that streams wait for their first token.
NUM_SEQS = 4
#: Calls of one client that may wait on a server.
CLIENT_QUEUE = 8
#: Seconds between later calls.
PAUSE_S = 0.2
#: Seconds in which a killed server must be back.
BACK_S = 60.0
#: The number of repetitions in a line of HAProxy's log: the last of five numbers.
_REPEATED = re.compile(r" \d+/\d+/\d+/\d+/\+(\d+) ")


@dataclasses.dataclass
class Answer:
    """What a client got."""

    streamed: bool
    #: Name of the server that answered; "" if HAProxy itself did, or nobody.
    server: str = ""
    status: int = 0
    text: str = ""
    #: Why the answer is incomplete; "" if it is complete.
    error: str = ""


class Client:
    """A client of HAProxy with its own address.

    Args:
        url: HAProxy's.
        number: last byte of the client's address, 127.0.0.NUMBER.
    """

    def __init__(self, url: str, number: int) -> None:
        transport = httpx.AsyncHTTPTransport(
            local_address=f"127.0.0.{number}", limits=httpx.Limits(max_connections=None)
        )
        self._http = httpx.AsyncClient(base_url=url, transport=transport, timeout=120)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, prompt: str, length: int = LENGTH) -> Answer:
        answer = Answer(False)
        try:
            response = await self._http.post("/v1/completions", json=_body(prompt, length, False))
        except httpx.HTTPError as error:
            answer.error = repr(error)
            return answer
        _head(answer, response)
        if response.is_success:
            answer.text = response.json()["choices"][0]["text"]
        else:
            answer.error = response.text
        return answer

    async def stream(self, prompt: str, begun: asyncio.Event) -> Answer:
        """Ask for a stream; `begun` is set when it comes from the victim and has a token."""
        answer, lines = Answer(True), ["the stream has no end"]
        body = _body(prompt, LENGTH, True)
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                _head(answer, response)
                async for line in response.aiter_lines():
                    lines.append(line)
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        answer.text += chunk["choices"][0]["text"]
                    if answer.server == NAMES[VICTIM]:
                        begun.set()
        except httpx.HTTPError as error:
            answer.error = repr(error)
        if not answer.error and "data: [DONE]" not in lines:
            answer.error = lines[-1]
        return answer


def _body(prompt: str, length: int, stream: bool) -> dict[str, object]:
    return {
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


def _head(answer: Answer, response: httpx.Response) -> None:
    answer.status = response.status_code
    answer.server = response.headers.get("x-served-by", "")


def prompt_of(number: int) -> str:
    return f"{number} + {number} ="


@contextlib.contextmanager
def proxied(folder: pathlib.Path, port: int) -> Iterator[tuple[str, pathlib.Path]]:
    """HAProxy in front of the servers, with the committed configuration; its URL and its log."""
    own = free_ports(1)
    text, binds = re.subn(r"bind :\d+", f"bind 127.0.0.1:{own}", CONFIGURATION.read_text())
    for rank, name in enumerate(NAMES):
        text, found = re.subn(rf"(server {name}) \S+", rf"\1 127.0.0.1:{port + rank}", text)
        assert found == 1, name
    assert binds == 1
    with haproxy(folder, text) as log:
        yield f"http://127.0.0.1:{own}", log


async def check_loss(checks: Checks, launch: Launch, url: str, log: pathlib.Path) -> None:
    """Kill a front end under load; ask until the server is back."""
    begun = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(url, 10 + number)) for number in range(CLIENTS)
        ]
        expected = [await clients[0].ask(prompt_of(number)) for number in range(3)]
        checks.check(not any(one.error for one in expected), "HAProxy passes answers on")
        calls = []
        for number in range(CALLS):
            client, prompt = clients[number % CLIENTS], prompt_of(number % 3)
            call = client.stream(prompt, begun) if number % 2 else client.ask(prompt)
            calls.append(asyncio.create_task(call))
        await asyncio.wait_for(begun.wait(), 60)
        launch.worker(VICTIM).kill()
        killed = time.monotonic()
        later = await _ask_until_back(clients, killed)
        back_s = time.monotonic() - killed
        answers = await asyncio.gather(*calls)
    _check_answers(checks, answers, [one.text for one in expected])
    repeated = sum(int(count) for count in _REPEATED.findall(log.read_text()))
    checks.check(repeated > 0, f"HAProxy repeated {repeated} calls on other servers")
    failed = [one for one in later if one.error]
    checks.check(not failed, f"{len(later)} later calls are answered {failed[:2] or ''}")
    back = any(one.server == NAMES[VICTIM] for one in later)
    checks.check(back, f"{NAMES[VICTIM]} gets calls again after {back_s:.1f} s")


async def _ask_until_back(clients: list[Client], killed: float) -> list[Answer]:
    """Short calls, PAUSE_S apart, until the victim answers one; all answers."""
    calls: list[asyncio.Task[Answer]] = []
    answered = asyncio.Event()

    async def ask(client: Client) -> Answer:
        answer = await client.ask(prompt_of(0), length=1)
        if answer.server == NAMES[VICTIM]:
            answered.set()
        return answer

    while not answered.is_set() and time.monotonic() < killed + BACK_S:
        calls.append(asyncio.create_task(ask(clients[len(calls) % len(clients)])))
        await asyncio.sleep(PAUSE_S)
    return await asyncio.gather(*calls)


def _check_answers(checks: Checks, answers: list[Answer], expected: list[str]) -> None:
    whole = [
        (answer, expected[number % 3]) for number, answer in enumerate(answers) if not answer.error
    ]
    checks.check(
        all(answer.text == text for answer, text in whole), f"{len(whole)} answers are whole"
    )
    plain = [answer for answer in answers if not answer.streamed]
    failed = [answer for answer in plain if answer.error]
    checks.check(
        not failed, f"{len(plain)} calls without streaming see no error {failed[:2] or ''}"
    )
    cut = [answer for answer in answers if answer.streamed and answer.error]
    lost = [answer for answer in cut if answer.server != NAMES[VICTIM] or not answer.text]
    checks.check(not lost, f"no stream that had not begun is lost {lost[:2] or ''}")
    text = f"{len(cut)} streams that {NAMES[VICTIM]} had begun are cut, which their clients see"
    checks.check(1 <= len(cut) <= NUM_SEQS, text)


async def check_clients(checks: Checks, url: str) -> None:
    """Check that servers tell clients apart behind HAProxy, and take large requests."""
    async with Client(url, 2) as many, Client(url, 3) as one:
        # So long that the first calls that end are refused ones.
        count, length = len(NAMES) * (CLIENT_QUEUE + NUM_SEQS) + 20, 10 * LENGTH
        flood = [asyncio.create_task(many.ask(prompt_of(n), length)) for n in range(count)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        answer = await one.ask(prompt_of(1), length=1)
        waiting = sum(not call.done() for call in flood)
        text = f"a client is answered while {waiting} calls of another one wait {answer.error}"
        checks.check(not answer.error and waiting > 0, text)
        refused = [call.result() for call in flood if call.done() and call.result().error]
        full = [one for one in refused if one.status == 429 and "client_queue_full" in one.error]
        text = f"{len(full)} of {count} calls of one client are more than its share of the queues"
        checks.check(len(full) == len(refused) > 0, text)
        for call in flood:
            call.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        answer = await one.ask("long " * 100_000)
        text = f"a request larger than HAProxy's buffer reaches a server {answer.error[:80]}"
        checks.check(answer.status == 400 and answer.server in NAMES, text)


async def check_end(checks: Checks, url: str, launch: Launch) -> None:
    """Check what clients get when no server is left, and that the launch leaves nothing."""
    launch.note_workers()
    launch.process.terminate()
    code = await asyncio.to_thread(launch.process.wait, 60)
    checks.check(code == 0, f"the launch drains and ends with exit code {code}")
    async with Client(url, 2) as client:
        answer = await client.ask(prompt_of(0), length=1)
    message = json.loads(answer.error)["error"]["message"] if answer.status == 503 else answer
    checks.check(answer.status == 503, f"without servers a client gets 503: {message}")
    launch.assert_nothing_left()


def check(checks: Checks, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Run all checks."""
    limits = ("--max-num-seqs", NUM_SEQS, "--max-queue-per-client", CLIENT_QUEUE)
    launch, port = stack.enter_context(three_servers(folder, *limits))
    url, log = stack.enter_context(proxied(folder, port))
    asyncio.run(check_loss(checks, launch, url, log))
    asyncio.run(check_clients(checks, url))
    asyncio.run(check_end(checks, url, launch))


if __name__ == "__main__":
    sys.exit(run_checks(["haproxy"], check))
