"""The session on a GPU, on the CPU: every stage finds what it shall, and none stops the others."""

import argparse
import importlib
import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Finds something, starts a process of its own, and never ends.
HANGING = """
import subprocess, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output") + 1])
if "speed" in sys.argv:
    sys.exit(print("nothing is wrong"))
(folder / "session.json").write_text('{"correct": {"cells": [1]}}')
child = subprocess.Popen(["sleep", "1000"])
(folder / "child").write_text(str(child.pid))
child.wait()
"""


@pytest.fixture
def session(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_session")


def found(folder):
    return json.loads((folder / "session.json").read_text())


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++)")
def test_stages_record_what_they_find(session, tmp_path):
    for name in ("build", "correct", "speed", "layer"):
        session.STAGES[name].run(session.DRY, partial(session.record, tmp_path, name))
    stages = found(tmp_path)
    assert stages["build"]["why_unavailable"] is None and stages["build"]["environment"]["commit"]
    for cell, blocks in zip(stages["correct"]["cells"], ([64, 64], [16, 16]), strict=True):
        assert cell["backend"] == "cpp" and cell["is_right"] and cell["error"] < 1e-5
        assert cell["blocks"] == blocks
    assert all(rate > 0 for rate in stages["speed"]["ceilings"].values())
    cells = {(cell["name"], cell["mode"], cell["block"]): cell for cell in stages["speed"]["cells"]}
    assert len(cells) == 6 and all(cell["seconds"] > 0 for cell in cells.values())
    assert "longest" not in cells["sdpa", "forward", 64]
    assert [cell["block"] for cell in stages["layer"]["cells"]] == [64, 64, 16, 16]
    for cell in (cells["cpp", "forward+backward", 16], *stages["layer"]["cells"]):
        names = [row["name"] for row in cell["longest"]]
        assert any("compiled_attention" in name for name in names) and cell["launches"] > 1


def test_a_backend_that_is_wrong_or_fails_fails_its_stage(session, monkeypatch, tmp_path):
    def fails(call):
        raise RuntimeError("an illegal memory access\nwas encountered")

    broken = session.BACKENDS["blocked"]._replace(run=fails)
    monkeypatch.setitem(session.BACKENDS, "blocked", broken)
    monkeypatch.setattr(session, "FUSED", {"cpu": ("blocked", "cpp")})
    with pytest.raises(SystemExit, match="2 of 4 are wrong or fail"):
        session.correct(session.DRY, partial(session.record, tmp_path, "correct"))
    cells = found(tmp_path)["correct"]["cells"]
    assert cells[0]["failure"] == "RuntimeError: an illegal memory access"
    assert [cell.get("is_right") for cell in cells] == [None, None, True, True]


def test_a_stage_without_end_is_ended_with_its_processes_and_the_next_runs(
    session, monkeypatch, tmp_path, capsys
):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    monkeypatch.setattr(session, "__file__", str(script))
    monkeypatch.setitem(session.STAGES, "correct", session.Stage(5, session.correct))
    monkeypatch.setattr(
        session, "parse_arguments",
        lambda: argparse.Namespace(
            output=tmp_path, stages=["correct", "speed"], dry=True, stage=None
        ),
    )  # fmt: skip
    assert session.main() == 1
    stages = found(tmp_path)
    assert stages["correct"]["status"] == "out of time" and stages["correct"]["cells"] == [1]
    assert stages["speed"]["status"] == "passed"
    assert "correct    out of time" in capsys.readouterr().out
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("its process goes on")
    assert "nothing is wrong" in (tmp_path / "session.log").read_text()


def test_all_stages_together_take_less_than_nine_minutes(session):
    assert sum(stage.limit for stage in session.STAGES.values()) < 540
