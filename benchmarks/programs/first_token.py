"""Start this project's engine and generate one token: python -m ... MODEL CACHE

Prints {"array_bytes": int}, the bytes of weights and KV cache, and waits until its input ends.
"""

from __future__ import annotations

import json
import sys

from dance_jax import LLM, SamplingParams


def main() -> None:
    model, cache = sys.argv[1:]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with LLM(model, cache_dir=cache) as llm:
        llm.generate([list(range(2, 34))], params)
        import jax

        engine = llm._backend._engine  # type: ignore[attr-defined]
        size = sum(array.nbytes for array in jax.live_arrays()) + sum(engine.runner.pools.bytes)
        print(json.dumps({"array_bytes": size}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
