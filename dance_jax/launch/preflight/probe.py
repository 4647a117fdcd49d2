"""Answer a preflight's questions about this machine: `python -m dance_jax.launch.preflight.probe`.

Questions arrive on standard input and answers go to standard output, one line each. The probe ends
when its input ends or no question arrives for IDLE_TIMEOUT_S. It imports neither JAX nor numpy, so
that it starts at once and can report that they are broken.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import msgspec

from dance_jax.cache import default_cache_dir
from dance_jax.launch.agent.process import MARK
from dance_jax.launch.preflight import link
from dance_jax.launch.preflight.at_once import at_once
from dance_jax.launch.preflight.messages import (
    AskClock,
    AskMachine,
    Clock,
    Gpu,
    Listen,
    Listening,
    Machine,
    Measure,
    Measured,
    ModelState,
    PortState,
    Refused,
    Reply,
    Request,
    Resolved,
    decode_request,
    encode,
)
from dance_jax.launch.preflight.model_state import model_state

#: Packages whose versions are reported.
PACKAGES = (
    "dance-jax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml_dtypes",
    "msgspec",
    "pyzmq",
    "tokenizers",
)
#: Packages installed only where JAX computes on NVIDIA GPUs.
GPU_PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin")

#: Seconds until a name lookup counts as failed, and nvidia-smi as hanging.
LOOKUP_TIMEOUT_S, GPU_TIMEOUT_S = 4.0, 4.0
#: Seconds without a question after which the launcher counts as gone.
IDLE_TIMEOUT_S = 60.0
#: Seconds after the end of the input for answers in progress.
_GRACE_S = 1.0


def answer(request: Request) -> Reply:
    """Answer one question; a question that cannot be answered is refused with the reason."""
    try:
        match request:
            case AskClock():
                return Clock(time.time())
            case AskMachine():
                return _machine(request)
            case Listen():
                return Listening(link.listen(request.address, request.token, request.seconds))
            case Measure():
                return Measured(link.measure(request.peers, request.token, request.seconds))
    except (OSError, UnicodeError) as error:  # UnicodeError: an impossible host name
        return Refused(link.reason(error))


def answer_json(request: bytes) -> bytes:
    """`answer`, from JSON to JSON."""
    try:
        return encode(answer(decode_request(request)))
    except msgspec.DecodeError as error:
        return encode(Refused(f"dance_jax there does not know this question: {error}"))


def _machine(request: AskMachine) -> Machine:
    gpus, gpu_problem = (None, "") if request.platform == "cpu" else gpus_free()
    cache = pathlib.Path(request.cache_dir) if request.cache_dir else default_cache_dir()
    resolved = _resolve_all([*request.names, request.address])
    address_problem = resolved[request.address].problem
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        executable=sys.executable,
        packages={name: _version(name) for name in (*PACKAGES, *GPU_PACKAGES)},
        source_hash=source_hash(pathlib.Path(__file__).resolve().parents[2]),
        host_name=socket.gethostname(),
        machine_id=_machine_id(),
        network_id=_network_id(),
        resolved=resolved,
        memory_free=memory_free(),
        gpus=gpus,
        gpu_problem=gpu_problem,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        compiler=_has_native(),
        ssh_client=next(iter(os.environ.get("SSH_CONNECTION", "").split()), None),
        ports=[
            PortState(port, address_problem) if address_problem else _try_port(request, port)
            for port in request.ports
        ],
        model=model_state(request.model)
        if request.needs_model
        else ModelState(path="", kind="from peers"),
        cache_problem=_cache_problem(cache),
    )


def _has_native() -> bool:
    """Whether the C++ library is part of the package (a wheel), or can be compiled here."""
    folder = pathlib.Path(__file__).resolve().parents[2] / "models" / "native"
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    return any(folder.glob("native-*.so")) or shutil.which(compiler) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_hash(package: pathlib.Path) -> str:
    """Hash (hex) of a package's Python and C++ sources: equal where the same code runs."""
    digest = hashlib.sha256()
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".cc")]
    for path in sorted(files, key=lambda path: path.relative_to(package).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _machine_id() -> str:
    """The running kernel's boot id, shared by all containers and namespaces of a machine."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _network_id() -> str:
    """The network namespace: processes in one namespace share the network interfaces."""
    try:
        return f"{_machine_id()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


def _resolve_all(names: Sequence[str]) -> dict[str, Resolved]:
    unique = list(dict.fromkeys(names))
    found = at_once([functools.partial(_resolve, name) for name in unique], LOOKUP_TIMEOUT_S)
    return {
        name: Resolved([], link.reason(result)) if isinstance(result, Exception) else result
        for name, result in zip(unique, found, strict=True)
    }


def _resolve(name: str) -> Resolved:
    entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return Resolved(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))


def memory_free() -> int | None:
    """Bytes of RAM available to a new program; None if unknown."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def gpus_free() -> tuple[list[Gpu], str]:
    """The machine's GPUs, or the reason why none was found."""
    command = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GPU_TIMEOUT_S,
            check=True,
        )
        rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
        return [Gpu(int(index), int(free) << 20) for index, free in rows], ""
    except FileNotFoundError:
        return [], "nvidia-smi was not found"
    except subprocess.TimeoutExpired:
        return [], "nvidia-smi hangs"
    except subprocess.CalledProcessError as error:
        return [], f"nvidia-smi failed: {(error.stderr or error.stdout).strip()[-200:]}"
    except (OSError, ValueError) as error:
        return [], f"the output of nvidia-smi cannot be parsed: {error}"


def _try_port(request: AskMachine, port: int) -> PortState:
    try:
        with link.bound(request.address, port) as listener:
            return PortState(listener.getsockname()[1])
    except (OSError, UnicodeError) as error:
        return PortState(port, link.reason(error))


def _cache_problem(directory: pathlib.Path) -> str:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return ""
    return f"{existing} cannot be written"


def main() -> None:
    """Answer questions until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):  # the process may already lead a group
        os.setpgid(0, 0)
    questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    with contextlib.suppress(queue.Empty, BrokenPipeError):
        while (line := questions.get(timeout=IDLE_TIMEOUT_S)) is not None:
            sys.stdout.buffer.write(MARK + answer_json(line) + b"\n")
            sys.stdout.buffer.flush()
    os._exit(0)  # threads may still wait for peers


def _read(questions: queue.SimpleQueue[bytes | None]) -> None:
    """Queue the lines of the input; shortly after its end, kill the process group."""
    for line in sys.stdin.buffer:
        questions.put(line)
    questions.put(None)
    time.sleep(_GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
