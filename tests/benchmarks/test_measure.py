"""How the benchmarks measure time."""

import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("seconds", "rounds"), [((100, 1), 1 + 5), ((1, 1), 1 + 5), ((100, 100), 1 + 1)]
)
def test_rounds_are_few_where_one_is_long_and_not_where_the_first_compiles(
    monkeypatch, seconds, rounds
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("side_by_side.measure")
    calls = []

    def imitation(call, device):
        calls.append(call)
        return seconds[0] if len(calls) == 1 else seconds[1]

    monkeypatch.setattr(measure, "seconds", imitation)
    medians = measure.interleaved_medians({"one": print}, torch.device("cpu"), 5)
    assert len(calls) == rounds and medians["one"] == seconds[1]
