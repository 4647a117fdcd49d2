"""`make dist`: builds wheel and sdist into dist/, and tries both in empty environments.

In each, `dance-jax plan`, the help of `dance-jax bench` and the demo must run outside this
checkout; with the wheel, without a C++ compiler.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
CONSTRAINTS = str(ROOT / "constraints.txt")
#: Says whether the library of this package serves, and from where.
LIBRARY = "from dance_jax.models import native; print(native.build(native.INSTALLED))"


def run(*command: str | os.PathLike[str], **options: object) -> None:
    print("$", *map(str, command), flush=True)
    subprocess.run(command, check=True, **options)  # pyright: ignore[reportCallIssue]


def check(artefact: pathlib.Path, compiler: bool) -> None:
    """Installs an artefact in an empty environment and runs what users run first."""
    with tempfile.TemporaryDirectory(prefix="dance-jax-dist-") as name:
        folder = pathlib.Path(name)
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / "bin"
        run(binaries / "python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS, artefact)
        environment = os.environ | ({} if compiler else {"CXX": "no-compiler"})
        environment.pop("PYTHONPATH", None)
        for command in (
            [binaries / "dance-jax", "--version"],
            [binaries / "dance-jax", "bench", "--help"],
            [binaries / "python", "-c", LIBRARY],
            [binaries / "dance-jax", "plan", "--hosts", EXAMPLES / "hosts.txt"],
            [binaries / "python", EXAMPLES / "demo.py"],
        ):
            run(*command, cwd=folder, env=environment)


def main() -> None:
    """Builds and checks everything."""
    output = ROOT / "dist"
    shutil.rmtree(output, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", output, ROOT)
    (wheel,) = output.glob("dance_jax-*.whl")
    (sdist,) = output.glob("dance_jax-*.tar.gz")
    check(wheel, compiler=False)
    check(sdist, compiler=True)
    print(f"{wheel.name} and {sdist.name} work")


if __name__ == "__main__":
    main()
