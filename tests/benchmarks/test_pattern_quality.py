"""The tasks of the quality benchmark are what they claim to be, and a run can be interrupted."""

import importlib
import json
import re
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


@pytest.mark.parametrize("task", ["recall", "needles"])
@pytest.mark.parametrize("far_share", [0.0, 1.0])
def test_every_question_has_its_answer_at_the_one_other_place_of_the_word(tasks, task, far_share):
    batch = tasks.make_batch(
        task, 3, 1024, far_share=far_share, generator=torch.Generator().manual_seed(0)
    )
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    for row in range(3):
        asked = (batch.labels[row] >= 0).nonzero().flatten().tolist()
        assert len(asked) == 1024 // 8 if task == "recall" or not far_share else 1024 // 64
        for place in asked:
            (other,) = set((words[row] == words[row, place]).nonzero().flatten().tolist()) - {place}
            assert types[row, place] == 0
            assert types[row, other] == batch.labels[row, place] + 1
            distance = abs(other - place)
            assert distance > tasks.FAR if far_share else distance <= tasks.NEAR
            assert bool(batch.is_far[row, place]) == bool(far_share)


def test_a_pair_of_documents_asks_what_both_have_and_what_only_one_has(tasks):
    batch = tasks.make_batch("pairs", 8, 1024, generator=torch.Generator().manual_seed(0))
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    assert bool((types[:, 1:512] == 1).all()) and not bool(types[:, 512:].any())
    counts = {0: 0, 1: 0}
    for row in range(8):
        for place in (batch.labels[row] >= 0).nonzero().flatten().tolist():
            assert place >= 512 and bool(batch.is_far[row, place])
            others = set((words[row] == words[row, place]).nonzero().flatten().tolist()) - {place}
            label = int(batch.labels[row, place])
            assert len(others) == 1 - label
            assert all(other < 512 and place - other > tasks.FAR for other in others)
            counts[label] += 1
    assert min(counts.values()) > 300


def test_all_questions_about_a_table_have_their_answer_in_one_run(tasks):
    batch = tasks.make_batch("table", 4, 1024, generator=torch.Generator().manual_seed(0))
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    for row in range(4):
        table = types[row].nonzero().flatten()
        assert len(table) == 64 and table[-1] - table[0] == 63
        asked = (batch.labels[row] >= 0).nonzero().flatten().tolist()
        assert len(asked) == 1024 // 32
        for place in asked:
            (source,) = [int(t) for t in table if words[row, t] == words[row, place]]
            assert types[row, source] == batch.labels[row, place] + 1
            assert bool(batch.is_far[row, place]) and abs(source - place) > tasks.FAR


def test_what_is_nearby_has_no_far_questions(tasks):
    batch = tasks.make_batch("nearby", 2, 1024, generator=torch.Generator().manual_seed(0))
    assert bool((batch.labels >= 0).any()) and not bool(batch.is_far.any())


def test_masked_names_can_be_read_where_they_stand_elsewhere(tasks):
    generator = torch.Generator().manual_seed(0)
    batch = tasks.make_batch("bytes", 16, 1024, held_out=True, generator=generator)
    words, types = batch.inputs["input_ids"], batch.inputs["token_type_ids"]
    is_asked = batch.labels >= 0
    assert torch.equal(words == 1, is_asked)
    assert not bool((batch.is_near & batch.is_far).any())
    assert not bool(((batch.is_near | batch.is_far) & ~is_asked).any())
    assert int(batch.is_near.sum()) > 100 and int(batch.is_far.sum()) > 100
    for row in range(16):
        answered = words[row].where(batch.labels[row] < 0, batch.labels[row] + 2)
        text = bytes((answered[1:] - 2).tolist())
        for name in re.finditer(rb"\w{6,}", text):
            first, last = 1 + name.start() + 3, name.end()
            here = slice(first, last + 1)
            if not is_asked[row, first]:
                continue
            places = [
                1 + other.start()
                for other in re.finditer(rb"\b" + name.group() + rb"\b", text)
                if not is_asked[row, 1 + other.start() + 3]
            ]
            closest = min((abs(place - 1 - name.start()) for place in places), default=None)
            assert bool(batch.is_near[row, here].all()) == (closest is not None and closest <= 64)
            assert bool(batch.is_far[row, here].all()) == (closest is not None and closest > 256)
            for place in places:
                assert torch.equal(
                    types[row, here], types[row, place + 3 : place + 3 + last - first + 1]
                )


def test_training_and_held_out_files_differ_and_what_is_near_can_be_asked_alone(tasks):
    from quality.source_code import files_of_the_library

    held_out = set(files_of_the_library(True))
    assert held_out and not held_out & set(files_of_the_library(False))
    draw = {"far_share": 0.0, "generator": torch.Generator().manual_seed(0)}
    batch = tasks.make_batch("bytes", 4, 256, **draw)
    assert torch.equal(batch.labels >= 0, batch.is_near) and bool(batch.is_near.any())


def test_other_tasks_and_lengths_are_refused(tasks):
    draw = {"generator": torch.Generator(), "far_share": 0.5}
    with pytest.raises(ValueError, match="task is 'sums'"):
        tasks.make_batch("sums", 1, 1024, **draw)
    with pytest.raises(ValueError, match="length is 256, 512 to 4096"):
        tasks.make_batch("recall", 1, 256, **draw)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_with_table_and_figures(tmp_path):
    command = [
        sys.executable, str(BENCHMARKS / "pattern_quality.py"), "--length", "512",
        "--pretraining-steps", "2", "--steps", "2", "--documents", "4", "--hidden-size", "32",
        "--tasks", "recall", "--parts", "patterns", "learned budgets", "--results", str(tmp_path),
        "--allow-dirty",
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
