"""Makes examples/activations.npz: what each server's domain uses, from prompts that no demo shows.

    python examples/make_activations.py alpha=FILE.jsonl beta=FILE.jsonl gamma=FILE.jsonl

Every file has a domain's prompts, {"prompt": ...} a line. They run on their server (placed
uniformly: placement does not change what the router chooses), and `--save-activations` counts.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

EXAMPLES = pathlib.Path(__file__).resolve().parent


def main(arguments: list[str]) -> int:
    """Runs the launch; returns its exit code."""
    if not arguments or not all("=" in argument for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as prompts:
        for argument in arguments:
            server, _, path = argument.partition("=")
            for line in pathlib.Path(path).read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    fields = {"prompt": json.loads(line)["prompt"], "server": server}
                    prompts.write(json.dumps(fields) + "\n")
        prompts.flush()
        command = [sys.executable, "-m", "dance_jax.launch", "--policy", "uniform"]
        command += ["--hosts", EXAMPLES / "hosts.txt", "--prompts", prompts.name]
        command += ["--max-tokens", "32", "--save-activations", EXAMPLES / "activations.npz"]
        return subprocess.run(list(map(str, command)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
