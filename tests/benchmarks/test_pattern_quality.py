"""The tasks of the quality benchmark are what they claim to be, and a run can be interrupted."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quality.tasks")


def _asked(batch, row):
    return (batch.labels[row] >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("far_share", [0.0, 1.0])
def test_recall_asks_for_the_value_of_the_one_other_place_of_a_word(tasks, far_share):
    batch = tasks.make_batch(
        "recall", 3, 1024, far_share=far_share, generator=torch.Generator().manual_seed(0)
    )
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    for row in range(3):
        asked = _asked(batch, row)
        assert len(asked) == 1024 // 64
        for place in asked:
            (other,) = set((words[row] == words[row, place]).nonzero().flatten().tolist()) - {place}
            assert types[row, place] == 0
            assert types[row, other] == batch.labels[row, place] + 1
            distance = abs(other - place)
            assert distance > tasks.FAR if far_share else distance <= tasks.NEAR
            assert bool(batch.is_far[row, place]) == bool(far_share)


@pytest.mark.parametrize("far_share", [0.0, 1.0])
def test_spans_asks_as_often_for_words_that_recur_as_for_words_that_do_not(tasks, far_share):
    batch = tasks.make_batch(
        "spans", 3, 1024, far_share=far_share, generator=torch.Generator().manual_seed(0)
    )
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    for row in range(3):
        labels = batch.labels[row]
        assert (labels == tasks.MATCH).sum() == (labels == tasks.NO_MATCH).sum() == 32
        for place in _asked(batch, row):
            places = (words[row] == words[row, place]).nonzero().flatten()
            others = places[places != place]
            assert types[row, place] == tasks.SECOND_DOCUMENT
            assert len(others) == int(labels[place] == tasks.MATCH)
            if len(others):
                distance = place - int(others)
                assert types[row, others] == tasks.FIRST_DOCUMENT
                assert distance > tasks.FAR if far_share else distance <= tasks.NEAR
            assert bool(batch.is_far[row, place]) == bool(far_share)


def test_other_tasks_and_lengths_are_refused(tasks):
    draw = {"generator": torch.Generator(), "far_share": 0.5}
    with pytest.raises(ValueError, match="task is 'sums'"):
        tasks.make_batch("sums", 1, 1024, **draw)
    with pytest.raises(ValueError, match="length is 256, 512 to 4096"):
        tasks.make_batch("recall", 1, 256, **draw)


def test_an_interrupted_run_goes_on_and_ends_with_table_and_figures(tmp_path):
    command = [
        sys.executable, str(BENCHMARKS / "pattern_quality.py"), "--length", "512",
        "--pretraining-steps", "2", "--steps", "2", "--documents", "2", "--hidden-size", "32",
        "--tasks", "spans", "--parts", "patterns", "learned budgets", "--results", str(tmp_path),
    ]  # fmt: skip
    first = subprocess.run(
        [*command, "--patterns", "longformer", "--parts", "patterns"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "longformer" in first.stdout
    file = tmp_path / "pattern_quality_ci.jsonl"
    line = file.read_text()
    file.write_text(line + line[: len(line) // 2])  # killed while it wrote
    second = subprocess.run(
        [*command, "--patterns", "longformer", "adaptive"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Nothing is measured twice: the cell of the first run is not.
    assert "longformer" not in second.stderr
    whole, half, *others = file.read_text().splitlines()
    assert whole.startswith(half)
    cells = [json.loads(text) for text in others]
    assert {cell.get("variant", cell["part"]) for cell in cells} == {"adaptive", "learned budgets"}
    adaptive = next(cell for cell in cells if cell.get("variant") == "adaptive")
    assert set(adaptive["by_strength"]) >= {"0.0", "1.0"}
    assert "| `adaptive` |" in (tmp_path / "pattern_quality_ci.md").read_text()
    assert (tmp_path / "pattern_quality_ci.png").stat().st_size > 0
