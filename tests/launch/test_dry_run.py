"""`--dry-run` plans a model of which only config.json is there."""

from __future__ import annotations

import json
import pathlib

import pytest

import dance_jax.launch.__main__ as launch
from tests.models.published import PUBLISHED

#: Three servers with memory for experts as given; together a little more than one copy of all.
HOSTS = """\
alpha address=localhost memory={} bandwidth=10Gbps
beta  address=localhost memory={} bandwidth=1Gbps
gamma address=localhost memory={} bandwidth=1Gbps
"""


@pytest.fixture
def run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    """run(name, memories, option, ...): the command in this process, on a config alone."""
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


#: By model: memories, the title, trunk, KV cache and states of each server, experts and slots of
#: one after the other, and what a note says.
PLANS = {
    "Qwen3-30B-A3B": (
        ("32GB", "24GB", "8GB"),
        "6144 experts in 48 MoE layers, 9.0 MiB each",
        ("2.9 GiB", "3.0 GiB"),
        (("29.8 GiB", "3390"), ("22.4 GiB", "2543"), ("7.4 GiB", "847")),
        "No activations were given",
    ),
    "DeepSeek-V3": (
        ("800GB", "500GB", "200GB"),
        "14848 experts in 58 MoE layers, 84.0 MiB each",
        ("32.1 GiB", "2.1 GiB"),
        (("745.0 GiB", "9082"), ("465.6 GiB", "5676"), ("186.2 GiB", "2270")),
        "quantised (fp8, blocks of 128 x 128) and cannot be loaded",
    ),
    "Qwen3.5-35B-A3B": (
        ("40GB", "24GB", "8GB"),
        "10240 experts in 40 MoE layers, 6.0 MiB each",
        ("4.6 GiB", "640.6 MiB", "1.0 GiB"),
        (("37.2 GiB", "6357"), ("22.3 GiB", "3814"), ("7.4 GiB", "1271")),
        "62.8 MiB for each of 16 sequences",
    ),
    "gpt-oss-20b": (
        ("24GB", "16GB", "8GB"),
        "768 experts in 24 MoE layers, 47.5 MiB each",
        ("3.4 GiB", "1.5 GiB"),
        (("22.3 GiB", "481"), ("14.9 GiB", "321"), ("7.4 GiB", "160")),
        "quantised (mxfp4) and cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_of_a_config(run, name: str) -> None:
    memories, title, fixed, pools, note = PLANS[name]
    code, out, err = run(name, memories, "--dry-run")
    assert (code, err) == (0, "")
    assert title in out and note in out
    assert ("quantised" in out) == ("quantization_config" in PUBLISHED[name])
    states = " states," if len(fixed) == 3 else ""
    assert f"trunk, KV cache,{states} experts and slots are per device" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert [row[:-2] for row in rows if row] == [
        [server, "1", *fixed, *pool]
        for server, pool in zip(("alpha", "beta", "gamma"), pools, strict=True)
    ]


def test_too_little_memory_for_a_config(run) -> None:
    code, out, err = run("DeepSeek-V3", ("800GB", "300GB", "100GB"), "--dry-run")
    assert code == 2 and out == ""
    # 14,848 experts of 84 MiB, and whole slots in 800, 300 and 100 GB.
    held = 9082 + 3405 + 1135
    assert f"the model has 14,848 experts of 84.0 MiB, the servers hold {held:,}" in err
    assert "(alpha 9082, beta 3405, gamma 1135)" in err
    assert f"{14848 - held:,} slots are missing" in err and "give servers more memory=" in err


def test_without_dry_run_the_weights_are_missing(run, tmp_path: pathlib.Path) -> None:
    code, out, err = run("Qwen3-30B-A3B", ("80GB",) * 3)
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'model'}: the weights are missing" in err and "--dry-run" in err
    code, _, err = run("gpt-oss-20b", ("80GB",) * 3)
    assert code == 2 and "the weights are missing" in err
