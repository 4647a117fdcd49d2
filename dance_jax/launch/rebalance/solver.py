"""A process of low priority that computes placements beside the engines.

The process is kept between decisions, so that later ones need no compilation, and ends with its
parent. Questions and answers are pickled, because both ends run the same program.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import pickle
import queue
import subprocess
import sys
import threading
from typing import IO

from dance_jax.launch.rebalance.decision import Answer, DecisionInputs

#: Niceness. With less, users notice that a placement is computed; with more, under full load it is
#: not finished before the next one is due.
NICENESS = 10
#: Seconds for an answer. Then the process, which gets what the engines leave, is killed.
TIMEOUT_S = 600.0


class SolverError(RuntimeError):
    """No placement could be computed; the message says why."""


class Solver:
    """Answers one question at a time, in another process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "solver")

    def ask(self, question: DecisionInputs) -> concurrent.futures.Future[Answer]:
        """Start to answer a question; the future raises a SolverError on failure."""
        return self._thread.submit(self._answer, question)

    def close(self) -> None:
        """Kill the process; may be called twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answer(self, question: DecisionInputs) -> Answer:
        try:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
        except OSError as error:
            raise SolverError(f"the solver process cannot be started: {error}") from error
        process, late = self._process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIMEOUT_S, end)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            found = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            process.kill()
            status = process.wait()
            if late.is_set():
                raise SolverError(
                    f"no placement within {TIMEOUT_S:g} s: the launcher's machine is too busy, or "
                    "the policy is too slow for this model; choose another --rebalance-policy"
                ) from error
            raise SolverError(f"the solver process ended with status {status}") from error
        finally:
            timer.cancel()
        if isinstance(found, Answer):
            return found
        raise SolverError(str(found))


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dance_jax.launch.rebalance.solver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        start_new_session=True,
    )


def main() -> None:
    """Answer questions from standard input until it ends."""
    _give_way()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions: queue.SimpleQueue[DecisionInputs] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, questions), daemon=True).start()
    from dance_jax.launch.rebalance.decision import answer

    while True:
        question = questions.get()
        try:
            found = answer(question)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        pickle.dump(found, answers)
        answers.flush()


def _give_way() -> None:
    """Give all other processes of the machine priority."""
    os.nice(NICENESS)
    # Where the kernel shares cores between sessions first, a process's own niceness is useless.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/autogroup").write_text(str(NICENESS))


def _listen(source: IO[bytes], questions: queue.SimpleQueue[DecisionInputs]) -> None:
    """Queue questions; end this process when the parent is gone, even during a computation."""
    while True:
        try:
            questions.put(pickle.load(source))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)


if __name__ == "__main__":
    main()
