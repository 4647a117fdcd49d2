"""Make examples/activations.npz: the experts that each server's domain activates.

    python examples/make_activations.py alpha=FILE.jsonl beta=FILE.jsonl gamma=FILE.jsonl

Each file has the prompts of one domain, one {"prompt": ...} per line; use other prompts than the
demo's. The prompts run on the given server, and `--save-activations` counts the router's choices.
Experts are placed uniformly, because the placement does not change these choices.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

EXAMPLES = pathlib.Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Run dance_jax.launch on the prompts and return its exit code."""
    if not arguments or not all("=" in argument for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as prompts:
        for argument in arguments:
            server, _, path = argument.partition("=")
            try:
                text = pathlib.Path(path).read_text(encoding="utf-8")
                found = [json.loads(line)["prompt"] for line in text.split("\n") if line.strip()]
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f'{path}: not a file of {{"prompt": ...}} lines: {error}', file=sys.stderr)
                return 2
            prompts.writelines(
                json.dumps({"prompt": prompt, "server": server}) + "\n" for prompt in found
            )
        prompts.flush()
        command = [sys.executable, "-m", "dance_jax.launch", "--policy", "uniform"]
        command += ["--hosts", EXAMPLES / "hosts.txt", "--prompts", prompts.name]
        command += ["--max-tokens", "32", "--save-activations", EXAMPLES / "activations.npz"]
        return subprocess.run(list(map(str, command)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
