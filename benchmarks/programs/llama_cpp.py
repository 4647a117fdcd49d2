"""llama.cpp as a side to measure, with its own benchmarks and its server.

`llama-bench` measures prefill and the decode of one stream, `llama-batched-bench` the decode of
several streams. Both call only the library, without sampling and HTTP. Greedy tokens, processor
time, the first token and memory are measured on `llama-server`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import pathlib
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from benchmarks.programs import Side, Unsupported, Work
from benchmarks.programs.child import memory, processor_seconds
from benchmarks.programs.models import Model
from dance_jax.bench.cluster import first_free_port

#: Context length of the server in tokens.
CONTEXT = 1024
#: Seconds between two checks whether the server is ready; seconds within which it must be.
ASK_S, READY_S = 0.005, 300.0


class LlamaCpp:
    """Opens models with llama.cpp.

    Args:
        directory: with the programs of a build.
        threads: that compute.
    """

    name: ClassVar = "llama.cpp"
    formats: ClassVar[Mapping[str, str]] = {
        "float32": "F32",
        "bf16": "F16",
        "int8": "Q8_0",
        "int4": "Q4_0",
    }

    def __init__(self, directory: pathlib.Path, threads: int) -> None:
        self._directory, self._threads = directory, threads

    def open(self, model: Model, form: str) -> LlamaCppSide:
        file = model.gguf(self.formats[form])
        return LlamaCppSide(self._directory, self._threads, file, model)

    def version(self) -> str:
        command = [str(self._directory / "llama-bench"), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return f"llama.cpp {(done.stdout + done.stderr).splitlines()[0].removeprefix('version: ')}"


def directory(text: str) -> pathlib.Path:
    """Parse an option llama.cpp=DIR; return the directory of llama.cpp's programs."""
    name, _, path = text.partition("=")
    if name != LlamaCpp.name or not (pathlib.Path(path) / "llama-bench").exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not llama.cpp=DIR with a directory DIR that has the program llama-bench"
        )
    if importlib.util.find_spec("gguf") is None:
        raise argparse.ArgumentTypeError(
            "writing llama.cpp's model files needs the package gguf: pip install gguf"
        )
    return pathlib.Path(path).absolute()


class LlamaCppSide(Side):
    """A GGUF file; each measurement starts a new process."""

    def __init__(
        self, directory: pathlib.Path, threads: int, file: pathlib.Path, model: Model
    ) -> None:
        self._directory, self._threads, self._file, self._model = directory, threads, file, model

    def speed(self, work: Work) -> float:
        if work.rows == 1:
            return self._bench(work)
        if work.kind == "decode":
            return self._batched_bench(work)
        raise Unsupported

    def processor_time(self, work: Work) -> float:
        with self._server() as server:
            prompts = work.prompts(self._model.vocabulary)
            server.complete(prompts[0], 1)
            begun = server.processor_seconds()
            server.complete(prompts[0], 1)
            one = server.processor_seconds()
            server.complete(prompts[0], work.tokens + 1)
            return (server.processor_seconds() - one - (one - begun)) / work.tokens

    def greedy(self, work: Work) -> list[list[int]]:
        # With a float32 KV cache, as the other sides have.
        with self._server("-ctk", "f32", "-ctv", "f32", "-fa", "off") as server:
            prompts = work.prompts(self._model.vocabulary)
            return [server.complete(prompt, work.tokens + 1)["tokens"] for prompt in prompts]

    def first_token(self, cold: bool) -> float:
        began = time.perf_counter()
        with self._server() as server:
            server.complete(list(range(2, 34)), 1)
            return time.perf_counter() - began

    def resident(self) -> float:
        with self._server() as server:
            server.complete(list(range(2, 34)), 1)
            return server.resident() - self._file.stat().st_size - self._cache_bytes()

    def close(self) -> None:
        pass

    def _cache_bytes(self) -> int:
        """Return the bytes of the server's KV cache, which is in float16."""
        fields = self._model.fields
        if "kv_lora_rank" in fields:
            width = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
        else:
            head_dim = fields["hidden_size"] // fields["num_attention_heads"]
            width = 2 * fields["num_key_value_heads"] * fields.get("head_dim", head_dim)
        return 2 * CONTEXT * width * fields["num_hidden_layers"]

    def _bench(self, work: Work) -> float:
        decode = work.kind == "decode"
        asked = ["-p", "0", "-n", str(work.tokens), "-d", str(work.prompt)]
        asked = asked if decode else ["-p", str(work.tokens), "-n", "0"]
        output = self._run("llama-bench", *asked, "-r", "1", "-o", "json")
        (result,) = json.loads(output)
        return result["avg_ts"]

    def _batched_bench(self, work: Work) -> float:
        asked = {"-npp": work.prompt, "-ntg": work.tokens, "-npl": work.rows}
        words = [str(word) for pair in asked.items() for word in pair]
        context = ["-c", str(work.rows * (work.prompt + work.tokens)), "-fit", "off"]
        output = self._run("llama-batched-bench", *words, *context, "--output-format", "jsonl")
        (line,) = [line for line in output.splitlines() if line.startswith("{")]
        return json.loads(line)["speed_tg"]

    def _run(self, program: str, *words: str) -> str:
        """Run a program on the file and return its standard output."""
        command = [str(self._directory / program), "-m", str(self._file), *words]
        command += ["-t", str(self._threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr[-2000:]}")
        return done.stdout

    @contextlib.contextmanager
    def _server(self, *words: str) -> Iterator[_Server]:
        """Run llama-server for the block; yield it when it is ready."""
        port = first_free_port(1)
        command = [str(self._directory / "llama-server"), "-m", str(self._file), *words]
        command += ["-t", str(self._threads), "-c", str(CONTEXT), "-np", "1", "-fit", "off"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                server = _Server(process, f"http://127.0.0.1:{port}")
                if not server.ready():
                    log.seek(0)
                    tail = log.read()[-2000:].decode(errors="replace")
                    raise RuntimeError(
                        f"`{' '.join(command)}` ended or was not ready after {READY_S:g} s:\n{tail}"
                    )
                yield server
            finally:
                process.kill()
                process.wait()


class _Server:
    """A running llama-server."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process, self._url = process, url

    def ready(self) -> bool:
        """Wait until the server is ready; return False if it ends before, or takes too long."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            # The server refuses connections at first, then returns 503 while it loads the model.
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{self._url}/health").close()
                return True
            time.sleep(ASK_S)
        return False

    def complete(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Request greedy tokens after a prompt; return the server's answer."""
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{self._url}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def processor_seconds(self) -> float:
        return processor_seconds(self._process.pid)

    def resident(self) -> int:
        return memory(self._process.pid)["Rss"]
