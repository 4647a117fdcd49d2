"""`--dry-run` plans a model of which only config.json is present."""

from __future__ import annotations

import json
import pathlib

import pytest

import dance_jax.launch.__main__ as launch
from tests.models.published import PUBLISHED

#: Three servers with the given memory for experts; together a little more than one copy of all.
HOSTS = """\
alpha address=localhost memory={} bandwidth=10Gbps
beta  address=localhost memory={} bandwidth=1Gbps
gamma address=localhost memory={} bandwidth=1Gbps
"""


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """run(name, memories, option, ...): runs the command in this process, on config.json alone."""
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "model").mkdir()

    def command(name: str, memories: tuple[str, ...], *options: str) -> tuple[int, str, str]:
        (tmp_path / "model" / "config.json").write_text(json.dumps(PUBLISHED[name]))
        (tmp_path / "hosts").write_text(HOSTS.format(*memories))
        words = ["--hosts", tmp_path / "hosts", "--model", tmp_path / "model"]
        words += ["--cache-dir", tmp_path / "cache", "--dtype", "bfloat16", *options]
        code = launch.main(list(map(str, words)))
        return code, *capsys.readouterr()

    return command


#: By model and, for some, options: memories, the title, formats of weights, trunk, KV cache and
#: states of each server, experts and slots of the servers in turn, and the text of a note.
PLANS = {
    "Qwen3-30B-A3B": (
        ("32GB", "24GB", "8GB"),
        "6144 experts in 48 MoE layers, 9.0 MiB each",
        "experts bfloat16 (16 bits a weight), trunk bfloat16 (16 bits a weight)",
        ("2.9 GiB", "3.0 GiB"),
        (("29.8 GiB", "3390"), ("22.4 GiB", "2543"), ("7.4 GiB", "847")),
        "No activations were given",
    ),
    "Qwen3-30B-A3B --experts int4-mixed --trunk int8": (
        ("12GB", "6GB", "4GB"),
        "6144 experts in 48 MoE layers, 3.3 MiB each",
        "experts int4 and int8 (5.83 bits a weight), trunk int8 and bfloat16 (8.56 bits a weight)",
        ("1.5 GiB", "3.0 GiB"),
        (("11.2 GiB", "3487"), ("5.6 GiB", "1743"), ("3.7 GiB", "1162")),
        "No activations were given",
    ),
    "DeepSeek-V3": (
        ("420GB", "200GB", "90GB"),
        "14848 experts in 58 MoE layers, 43.3 MiB each",
        "experts fp8 (8.25 bits a weight), trunk fp8 and bfloat16 (9.6 bits a weight)",
        ("19.1 GiB", "2.1 GiB"),
        (("391.1 GiB", "9247"), ("186.2 GiB", "4403"), ("83.8 GiB", "1981")),
        "quantised (fp8, blocks of 128 x 128) and stay as they are",
    ),
    "Qwen3.5-35B-A3B": (
        ("40GB", "24GB", "8GB"),
        "10240 experts in 40 MoE layers, 6.0 MiB each",
        "experts bfloat16 (16 bits a weight), trunk bfloat16 (16 bits a weight)",
        ("4.6 GiB", "640.6 MiB", "2.0 GiB"),
        (("37.2 GiB", "6357"), ("22.3 GiB", "3814"), ("7.4 GiB", "1271")),
        "62.8 MiB for each of the 16 sequences",
    ),
    "gpt-oss-20b": (
        ("8GB", "4GB", "2GB"),
        "768 experts in 24 MoE layers, 12.6 MiB each",
        "experts mxfp4 (4.25 bits a weight), trunk bfloat16 (16 bits a weight)",
        ("3.3 GiB", "1.5 GiB"),
        (("7.4 GiB", "603"), ("3.7 GiB", "301"), ("1.9 GiB", "150")),
        "quantised (mxfp4) and stay as they are",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_of_a_config(run, case: str) -> None:
    memories, title, weights, fixed, pools, note = PLANS[case]
    name, *options = case.split()
    # The default policy compiles for each number of experts: it runs for one model alone.
    if name != "Qwen3-30B-A3B":
        options += ["--policy", "uniform"]
    code, out, err = run(name, memories, "--dry-run", *options)
    assert (code, err) == (0, "")
    assert title in out and f"Weights: {weights}.\n" in out and note in out
    assert ("quantised" in out) == ("quantization_config" in PUBLISHED[name])
    states = " states," if len(fixed) == 3 else ""
    assert f"trunk, KV cache,{states} experts and slots are per device; spare slots" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert [row[:-2] for row in rows if row] == [
        [server, "1", *fixed, *pool, "4"]
        for server, pool in zip(("alpha", "beta", "gamma"), pools, strict=True)
    ]


def test_too_little_memory_for_a_config(run) -> None:
    code, out, err = run("DeepSeek-V3", ("420GB", "150GB", "60GB"), "--dry-run")
    assert code == 2 and out == ""
    # 14,848 experts of 43.3 MiB; whole slots in 420, 150 and 60 GB.
    held = 9247 + 3302 + 1321
    assert f"the model has 14,848 experts of 43.3 MiB, but the servers have {held:,}" in err
    assert "(alpha 9247, beta 3302, gamma 1321)" in err
    assert f"{14848 - held:,} slots are missing" in err and "give servers more memory=" in err


def test_experts_with_codes_are_not_rounded(run) -> None:
    code, out, err = run("gpt-oss-20b", ("8GB",) * 3, "--dry-run", "--experts", "int4")
    assert (code, out) == (2, "")
    assert "config.json: the experts are stored as mxfp4; --experts int4 rounds floats" in err


def test_without_dry_run_the_weights_are_missing(run, tmp_path: pathlib.Path) -> None:
    code, out, err = run("Qwen3-30B-A3B", ("80GB",) * 3)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'model'}: the weights are missing" in err and "--dry-run" in err
    code, _, err = run("gpt-oss-20b", ("80GB",) * 3)
    assert code == 2 and "the weights are missing" in err
