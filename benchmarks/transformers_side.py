"""Child process of benchmarks/programs/hugging_face.py; runs under a Python that has torch.

Each line of standard input is a JSON object that asks for a measurement; a JSON object on standard
output answers it:
{"kind": "decode" | "prefill", "tokens": [[int]], "steps": int, "implementation": str}
-> {"seconds": [float], "tokens": [[int]]}, one time per step and the greedy tokens of every row.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output that libraries print must not mix with the replies
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.set_grad_enabled(False)
    torch.set_num_threads(int(sys.argv[2]))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model.eval()

    def answer(value: object) -> None:
        print(json.dumps(value), file=replies, flush=True)

    answer({"versions": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    for line in sys.stdin:
        request = json.loads(line)
        model.set_experts_implementation(request["implementation"])
        prompt = torch.tensor(request["tokens"])
        seconds: list[float] = []
        if request["kind"] == "prefill":
            output = None
            for _ in range(request["steps"]):
                began = time.perf_counter()
                output = model(prompt, use_cache=True, logits_to_keep=1)
                seconds.append(time.perf_counter() - began)
            assert output is not None
            answer({"seconds": seconds, "tokens": output.logits[:, -1:].argmax(-1).tolist()})
            continue
        cache = transformers.DynamicCache(config=model.config)
        output = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        produced = [output.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(request["steps"]):
            began = time.perf_counter()
            output = model(produced[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            produced.append(output.logits[:, -1].argmax(-1, keepdim=True))
            seconds.append(time.perf_counter() - began)
        answer({"seconds": seconds, "tokens": torch.cat(produced, dim=1).tolist()})


if __name__ == "__main__":
    main()
