"""The documentation is true: links lead somewhere, examples run, tables are those of the code.

A Python block after the line `<!-- runnable -->` is executed; all such blocks of a page share their
names. Commands of this project are parsed with their real parsers, and words in capitals (DIR) are
taken for any value.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import dance_jax
from dance_jax.config import EngineOptions
from dance_jax.launch.cli import options
from dance_jax.launch.planning.defaults import engine_config
from dance_jax.launch.planning.hosts import KEYS, parse_hosts
from dance_jax.launch.planning.plan import rooms
from dance_jax.memory import format_bytes
from dance_jax.models.convert import outline
from dance_jax.models.families import FAMILIES, MULTIMODAL
from dance_jax.placement.policies import POLICIES, Policy, place
from tests.models.published import PUBLISHED
from tests.serve import test_metrics
from tests.serve.scripted import ScriptedQueue, application, serve_info

ROOT = pathlib.Path(__file__).parents[1]
#: All pages of the repository, by their path in it.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "research/*.md", "examples/**/*.md", "dance_jax/**/*.md")
    for path in sorted(ROOT.glob(pattern))
}
RUNNABLE = "<!-- runnable -->\n"
#: Scripts that users run, and modules with `python -m`.
SCRIPTS = (
    *("chaos", "clients", "peers", "real_size", "serve", "structured", "testbed", "throughput"),
    "viewers",
)
RESEARCH = ("apart", "migrate", "paper", "placement", "recovery", "simulate", "wire")
CONVERT = "dance_jax.models.convert"
HOSTS, STOP = "dance_jax.launch.cli.hosts", "dance_jax.launch.cli.stop"
BENCH = "dance_jax.bench.main"
#: Modules of the console script's commands, and the options that a command stands for.
COMMANDS = {
    "serve": ("dance_jax.launch",),
    "batch": ("dance_jax.launch",),
    "plan": ("dance_jax.launch", "--dry-run"),
    "preflight": ("dance_jax.launch", "--preflight"),
    "convert": (CONVERT,),
    "bench": (BENCH,),
    "hosts": (HOSTS,),
    "stop": (STOP,),
}
#: Options of other programs.
FOREIGN = {"--full", "--strict", "--user"}

_BLOCK = re.compile(r"^( *)```([a-z]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_PLACEHOLDER = re.compile(r"([a-z.]+=)?[A-Z]+([-/][A-Z]+)*(\.[a-z]+)?")


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of fenced blocks."""
    return [found[3] for found in _BLOCK.finditer(text) if found[2] in languages]


def runnable(text: str) -> list[str]:
    """The Python blocks that are executed."""
    return [part.split("```python\n", 1)[1].split("```", 1)[0] for part in text.split(RUNNABLE)[1:]]


def cells(page: str, section: str, column: int = 0) -> list[str]:
    """What stands in code marks in one column of the tables below a heading."""
    below = PAGES[page].split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in below.splitlines() if line.startswith("|")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row[column + 1])]


# Links.


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as they are made from them."""
    text = _BLOCK.sub("", text)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    folder, wrong = (ROOT / page).parent, []
    for target in _LINK.findall(_BLOCK.sub("", PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (folder / name).resolve() if name else ROOT / page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


def test_pages_of_the_docs_folder_are_found() -> None:
    """Each has a link from README."""
    linked = {os.path.normpath(name) for name in _LINK.findall(PAGES["README.md"])}
    pages = {page for page in PAGES if page.startswith("docs/")} - {"docs/reference.md"}
    assert pages <= linked


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 6000


# Python.


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> dict[str, Policy]:
    """The registry, which is as before at the end; pages may add `home`."""
    for name in [*POLICIES, "home"]:
        monkeypatch.setitem(POLICIES, name, POLICIES.get(name, POLICIES["uniform"]))
    return POLICIES


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if runnable(text)])
def test_runnable_blocks_run(
    page: str, policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for block in runnable(PAGES[page]):
        exec(compile(block, page, "exec"), names)


def test_the_example_of_a_policy_is_one(policies: dict[str, Policy]) -> None:
    """`place` checks coverage and capacities."""
    names: dict[str, object] = {}
    exec(runnable(PAGES["docs/add-a-policy.md"])[0], names)
    policies["home"] = Policy(names["home"])  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    for _ in range(20):
        servers, layers, experts = random.integers(1, 6, 3)
        capacities = random.multinomial(layers * experts, np.full(servers, 1 / servers))
        counts = random.integers(0, 9, (servers, layers, experts))
        given = capacities + random.integers(0, 4, servers)
        assert place("home", counts, given) == place("home", counts, given)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_calls_in_examples_have_such_arguments(page: str) -> None:
    """Of public names; what runs on servers is not run here."""
    known: dict[str, Callable[..., object]] = {
        **{name: getattr(dance_jax, name) for name in dance_jax.__all__},
        "generate": dance_jax.LLM.generate,
        "chat": dance_jax.LLM.chat,
        "place": place,
    }
    for block in blocks(PAGES[page], "python"):
        if block.startswith(" "):  # a line of a larger whole
            continue
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in known:
                signature = inspect.signature(known[name])
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert given <= set(signature.parameters), f"{page}: {name}"


def test_the_example_of_a_family_is_the_real_one() -> None:
    families = ROOT / "dance_jax" / "models" / "families"
    example, line, names = blocks(PAGES["docs/add-a-model.md"], "python")
    assert example == (families / "olmoe.py").read_text(encoding="utf-8")
    assert line in (families / "__init__.py").read_text(encoding="utf-8")
    assert names in (families / "mixtral.py").read_text(encoding="utf-8")


# Commands.


class _Made(Exception):
    """A command has made its parser."""


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a module that is a command, whether `parser` or `main` makes it."""
    if name == "dance_jax.launch":
        return options.parser()
    module = importlib.import_module(name)
    if hasattr(module, "parser"):
        return module.parser()

    def caught(self: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        raise _Made(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Made) as made:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        patch.setattr("signal.signal", lambda *_: None)
        module.main([]) if inspect.signature(module.main).parameters else module.main()
    return made.value.args[0]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, words) of the commands of this project in a page."""
    lines = [
        line.removeprefix("$ ")
        for language in ("sh", "bash", "ini", "console")
        for block in blocks(text, language)
        for line in block.replace("\\\n", " ").splitlines()
        if language != "console" or line.startswith("$ ")
    ]
    for line in lines:
        line = line.removeprefix("ExecStart=")
        words = shlex.split(line, comments=True)
        if words and words[0].endswith("dance-jax"):
            module, *options = COMMANDS[words[1]]
            yield module, [*options, *words[2:]]
        start = next((i for i, w in enumerate(words) if re.search(r"python[0-9.]*$", w)), None)
        if start is None:
            continue
        program, *rest = words[start + 1 :]
        if program == "-m":
            module, *rest = rest
        else:
            module = program.removesuffix(".py").replace("/", ".")
        if module.split(".")[0] in ("dance_jax", "benchmarks", "research"):
            yield module, rest


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if any(commands(text))])
def test_commands_are_understood(
    page: str, policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser_of.cache_clear()  # with the policies of now
    strict = argparse.ArgumentParser._get_value

    def value(self: argparse.ArgumentParser, action: argparse.Action, text: str) -> object:
        return text if _PLACEHOLDER.fullmatch(text) else strict(self, action, text)

    monkeypatch.setattr(argparse.ArgumentParser, "_get_value", value)
    for module, words in commands(PAGES[page]):
        own = words[: words.index("--")] if "--" in words else words
        found = parser_of(module).parse_args(own)
        if module == "dance_jax.launch":
            options.check_mode(found)


def every_option(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a parser and of its commands."""
    found = set()
    for action in parser._actions:
        found |= {name for name in action.option_strings if name.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(every_option(each) for each in action.choices.values()))
    return found


def test_options_that_are_written_of_exist_and_all_are_written_of() -> None:
    launch = every_option(parser_of("dance_jax.launch"))
    listed = set(re.findall(r"^\| (`--.*?) \|", PAGES["docs/operations.md"], re.MULTILINE))
    assert set(re.findall(r"--[a-z-]+", " ".join(listed))) == launch - {"--help"}
    modules = [f"benchmarks.{name}" for name in SCRIPTS] + [f"research.{name}" for name in RESEARCH]
    modules += [CONVERT, BENCH, HOSTS, STOP]
    known = launch.union(*(every_option(parser_of(name)) for name in modules))
    for page, text in PAGES.items():
        if not page.startswith(("dance_jax", "examples")):
            marked = " ".join(re.findall(r"`[^`\n]+`", text))
            written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", marked))
            assert written <= known | FOREIGN | {"--help"}, page


def test_options_of_bench_are_those_of_its_table() -> None:
    below = PAGES["docs/benchmarks.md"].split("\n## Your own servers\n", 1)[1].split("\n## ", 1)[0]
    listed = " ".join(re.findall(r"^\| (.*?) \|", below, re.MULTILINE))
    said = every_option(parser_of(BENCH)) - {"--help", "--output"}
    assert set(re.findall(r"--[a-z][a-z-]+", listed)) == said


def test_targets_of_make_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, text in PAGES.items():
        code = "\n".join([*blocks(text, "sh"), *re.findall(r"`([^`\n]+)`", text)])
        assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= set(targets), page


# Tables.


def test_hosts_files_are_read_and_all_keys_are_written_of() -> None:
    files = [
        block
        for text in PAGES.values()
        for block in blocks(text, "text")
        if block.startswith("# hosts.txt")
    ]
    assert files
    for content in files:
        parse_hosts(content)
    assert {*cells("docs/operations.md", "Hosts file")} == {*KEYS}


def test_families_and_policies_are_written_of() -> None:
    assert {*cells("docs/models.md", "Families")} - {"model_type"} == {*FAMILIES, *MULTIMODAL}
    assert cells("docs/placement.md", "Policies") == ["--policy", *POLICIES]
    for name in POLICIES:
        assert f"\n### {name}\n" in PAGES["docs/placement.md"]


def test_paths_are_written_of(tmp_path: pathlib.Path) -> None:

    described = application(ScriptedQueue(), serve_info(tmp_path)).openapi()["paths"]  # type: ignore
    there = {
        f"{method.upper()} {path.replace(':path', '')}"
        for path, methods in described.items()
        for method in methods
    }
    assert set(cells("docs/operations.md", "HTTP paths")) == there | {"GET /openapi.json"}


def test_metrics_are_written_of() -> None:
    written = set(cells("docs/operations.md", "Metrics"))
    reported = test_metrics.EXPECTED | test_metrics.CALLS | test_metrics.FRONT_END
    assert {name for name, *_ in reported} <= written
    source = (ROOT / "dance_jax" / "serve" / "metrics.py").read_text(encoding="utf-8")
    for name in written - {name for name, *_ in reported}:
        stem = name.removesuffix("_total").removeprefix("placement_")
        assert f'"{stem}"' in source or f"_{stem}" in source, name


def test_the_grafana_dashboard_shows_metrics_that_are_there() -> None:
    board = json.loads((ROOT / "examples" / "grafana.json").read_text(encoding="utf-8"))
    shown = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    names = {re.sub("_bucket$", "", name) for name in re.findall(r"dance_jax:(\w+)", shown)}
    assert len(names) > 15 and names <= set(cells("docs/operations.md", "Metrics"))


def literals() -> list[str]:
    """All strings of the package, with … for what is put into them."""
    found = []
    for path in (ROOT / "dance_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
                found.append("".join(map(str, parts)))
    return found


def test_messages_are_those_that_users_get() -> None:
    sections = re.findall(r"^## (.*)$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    said = literals()
    for section in sections[:-1]:
        for message in cells("docs/troubleshooting.md", section):
            pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
            assert any(pattern.search(text) for text in said), message


def test_the_example_of_sizes_is_what_the_plan_says(tmp_path: pathlib.Path) -> None:
    text = PAGES["docs/models.md"]
    (hosts,) = (block for block in blocks(text, "text") if block.startswith("# hosts.txt"))
    spec = parse_hosts(hosts)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"]))
    too_large, fits = blocks(text, "console")
    model = outline(tmp_path)
    with pytest.raises(ValueError, match="too little memory") as error:
        rooms(spec, model, engine_config(model.config, formats=model.formats))
    assert f"error: {error.value}" in " ".join(too_large.split("\n"))
    options = EngineOptions(max_num_seqs=4, experts="int4", trunk="int8")
    model = outline(tmp_path, options.rounding)
    config = engine_config(model.config, options, formats=model.formats)
    for room in rooms(spec, model, config):
        row = [
            cell.strip()
            for cell in next(
                line for line in fits.splitlines() if line.startswith(f"│ {room.name}")
            ).split("│")
        ]
        sizes = map(format_bytes, (room.trunk_bytes, room.kv_bytes, room.pool_bytes))
        assert row[3:8] == [*sizes, str(room.slots), str(room.spare)]
