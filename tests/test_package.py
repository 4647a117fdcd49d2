"""What a wheel and a container bring along."""

from __future__ import annotations

import pathlib
import platform
import re
import tomllib

import yaml

from dance_jax.launch.planning.hosts import parse_hosts
from dance_jax.models import native

ROOT = pathlib.Path(__file__).parents[1]


def test_a_wheel_has_a_library_for_each_set_of_instructions() -> None:
    """With the compiler's options that a checkout has."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = {
        name: options.split()
        for name, options in re.findall(r"^ *add_native\((\w+)(.*)\)$", text, re.M)
    }
    assert list(found) == [each.name for each in native.INSTRUCTIONS]
    if platform.machine() == "x86_64":
        for each in native.INSTRUCTIONS[:-1]:
            assert tuple(found[each.name]) == each.flags
    assert set(native._FLAGS) - {"-std=c++20", "-fPIC"} <= set(re.findall(r"-[\w=-]+", text))


def test_a_library_of_a_wheel_goes_first(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(native, "INSTALLED", tmp_path)
    assert native.prebuilt() is None
    for name in ("portable", native.usable_instructions()[0].name):
        library = tmp_path / f"native-{name}.so"
        library.touch()
        assert native.prebuilt() == native.build(tmp_path) == library


def test_the_package_is_typed_and_has_a_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "dance_jax" / "py.typed").exists()
    module, _, function = project["project"]["scripts"]["dance-jax"].partition(":")
    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_compose_starts_a_server_for_each_line_of_its_hosts_file() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    spec = parse_hosts(compose["configs"]["hosts"]["content"])
    assert tuple(compose["services"]) == spec.names
    for rank, service in enumerate(compose["services"].values()):
        assert service["command"][-1] == str(rank) and service["command"][-2] == "--node-rank"
