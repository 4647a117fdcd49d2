"""Tests of benchmarks/throughput.py: sides that take turns, and random converted models."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from benchmarks.families import SHAPES
from benchmarks.programs import Unsupported, Work
from benchmarks.programs.converted import random_matrix, write_random_converted
from benchmarks.throughput import MEASURES, Measure, measured
from dance_jax.models.checkpoint import Checkpoint
from dance_jax.models.formats import WeightFormat
from dance_jax.models.rounding import ROUNDED

SMALL = SHAPES["olmoe"] | {"num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}


class FakeSide:
    """A side with given speeds; with none left, its measurement is unsupported."""

    def __init__(self, name: str, speeds: list[float], turns: list[str]) -> None:
        self._name, self._speeds, self._turns = name, speeds, turns

    def speed(self, work: Work) -> float:
        self._turns.append(self._name)
        if not self._speeds:
            raise Unsupported
        return self._speeds.pop(0)


def test_sides_take_turns_and_ratios_are_of_pairs() -> None:
    turns: list[str] = []
    sides = {
        "dance_jax": FakeSide("dance_jax", [2.0, 9.0, 4.0], turns),
        "slow": FakeSide("slow", [1.0, 3.0, 4.0], turns),
        "mute": FakeSide("mute", [], turns),
    }
    work = Work("decode", 1, 2)
    measure = Measure("decode", "tokens/s", lambda side: side.speed(work))
    line = measured(measure, "float32", sides, pairs=3)  # type: ignore[arg-type]
    assert turns == ["dance_jax", "slow", "mute", "dance_jax", "slow", "dance_jax", "slow"]
    entry = line.entry()
    assert entry["medians"] == {"dance_jax": 4.0, "slow": 3.0}
    assert entry["ratios"] == {"slow": 2.0}


def test_all_sides_get_the_same_prompts() -> None:
    work = Work("prefill", 3, 5)
    assert work.prompts(100) == work.prompts(100)
    assert np.shape(work.prompts(100)) == (3, 5)
    assert np.shape(Work("decode", 2, 5, prompt=7).prompts(100)) == (2, 7)


def test_every_measure_has_a_direction() -> None:
    assert {measure.unit for measure in MEASURES if measure.less} == {"ms", "MB", "s"}


@pytest.mark.parametrize("form", [ROUNDED[name] for name in ("bf16", "int8", "int4")], ids=str)
def test_random_matrices_keep_the_size_of_their_input(form: WeightFormat) -> None:
    matrix = random_matrix(np.random.default_rng(0), form, 64, 512)
    arrays = form.arrays(64, 512)
    assert {name: array.shape for name, array in matrix.arrays.items()} == {
        name: like.shape for name, like in arrays.items()
    }
    assert all(matrix.arrays[name].dtype == like.dtype for name, like in arrays.items())
    assert np.std(matrix.values()) == pytest.approx(64**-0.5, rel=0.1)


def test_a_model_drawn_as_converted_is_read(tmp_path: pathlib.Path) -> None:
    path = write_random_converted(tmp_path / "model", SMALL, "bf16", "keep")
    checkpoint = Checkpoint.open(path)
    ((_, (gate, *_)),) = checkpoint.experts([(0, 1)], checkpoint.form("float32"))
    assert gate.shape == (512, 256)
    assert np.std(gate.astype(np.float32)) == pytest.approx(512**-0.5, rel=0.05)
    assert checkpoint.trunk("float32") is not None
