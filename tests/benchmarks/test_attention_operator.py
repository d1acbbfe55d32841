"""The benchmark of the operator counts the right tiles and survives a contestant that fails."""

import argparse
import importlib
import json
from datetime import date, datetime, timezone
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention_operator")


@pytest.fixture
def settings():
    return argparse.Namespace(
        device="cpu", kind="cpu", dtype="float32", heads=1, head_dim=8, lengths=[2048],
        dropout=[0.0], repeats=1, names=["blocked", "cpp", "sdpa"], no_memory=True,
    )  # fmt: skip


def test_a_contestant_that_fails_is_named_and_the_others_go_on(
    benchmark, settings, monkeypatch, capsys
):
    original, calls = benchmark.make_attention, []

    def make_attention(name, layout, dropout):
        if name == "sdpa":
            return original(name, layout, dropout)
        if name == "cpp":
            raise ValueError("no kernel\nfor these blocks")

        def fails_later(query, key, value):
            calls.append(name)
            if len(calls) > 1:
                raise RuntimeError("no memory")
            return query

        return fails_later

    monkeypatch.setattr(benchmark, "make_attention", make_attention)
    cells = benchmark.time_cells(settings, (benchmark.FORWARD,), {})
    found = {cell["name"]: cell for cell in cells}
    assert found["sdpa"]["seconds"] > 0 and "why_not" not in found["sdpa"]
    assert found["cpp"]["why_not"] == "ValueError: no kernel"
    assert found["blocked"]["why_not"] == "RuntimeError: no memory" and len(calls) == 2
    printed = capsys.readouterr().out
    assert "cpp failed at" in printed and "blocked failed at" in printed
    assert "RuntimeError: no memory (length 2048)" in benchmark.notes(cells)


def test_a_wrong_backend_is_named_and_not_timed(benchmark, settings, monkeypatch, capsys):
    original = benchmark.sparse_attention

    def wrong(query, *arguments, backend, **options):
        output = original(query, *arguments, backend="blocked", **options)
        return output * 1.1 if backend == "blocked" else output

    monkeypatch.setattr(benchmark, "OURS", {"cpu": ("blocked",)})
    monkeypatch.setattr(benchmark, "sparse_attention", wrong)
    problems = benchmark.verify(settings)
    assert "it is wrong by 1.0e-01" in problems["blocked"]
    assert "FAIL blocked" in capsys.readouterr().out
    settings.names = ["blocked"]
    (cell,) = benchmark.time_cells(settings, (benchmark.FORWARD,), problems)
    assert cell["why_not"] == problems["blocked"]


def test_memory_that_cannot_be_measured_is_told(benchmark, settings, monkeypatch, capsys):
    def fails(script, cell):
        raise RuntimeError("memory cell failed: out of memory")

    monkeypatch.setattr(benchmark, "peak_memory_in_child", fails)
    assert benchmark.peak_memory({"name": "sdpa"}, settings) is None
    assert "out of memory" in capsys.readouterr().out


def test_a_run_leaves_a_table_that_says_where_and_when(benchmark, tmp_path, monkeypatch):
    cell = {"name": "blocked", "length": 2048, "dropout": 0.0, "mode": "forward", "seconds": 0.5}
    missing = {**cell, "name": "cpp", "why_not": "no kernel"}
    del missing["seconds"]
    monkeypatch.setattr(benchmark, "verify", lambda args: {})
    monkeypatch.setattr(benchmark, "time_cells", lambda *arguments: [cell, missing])
    monkeypatch.setattr(
        "sys.argv",
        ["", "--device", "cpu", "--dtype", "float32", "--results", str(tmp_path), "--allow-dirty"],
    )
    assert benchmark.main() == 0
    about = json.loads((tmp_path / "attention_operator_cpu.json").read_text())["environment"]
    assert date.fromisoformat(about["date"]) <= datetime.now(timezone.utc).date()
    heading, *rest = (tmp_path / "attention_operator_cpu.txt").read_text().splitlines()
    assert all(about[name] in heading for name in ("device", "date", "commit"))
    assert "500 ms" in "".join(rest) and "cpp: no kernel" in rest[-1]
