"""Time in interleaved repeats, and peak memory in a process of its own for every cell."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from side_by_side.results import REPOSITORY, commit_of_the_tree


def environment(device: torch.device) -> dict:
    """What a result depends on beside the code."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit_of_the_tree(),
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, its work on the device included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleaved_medians(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, float]:
    """Median seconds of every call: one round to warm up, then rounds in which each runs once.

    Taking turns exposes all of them to the same disturbances of the machine. Rounds of more than a
    minute are disturbed little: one is enough. The first round does not tell how long one is, for
    it may compile.

    Args:
        calls: By name.
        device: Whose work is timed.
        repeats: Rounds after the first.
        on_failure: What to do with the name and the error of a call that fails, which then has no
            median; None raises the error.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def run_round() -> None:
        for name in list(samples):
            try:
                samples[name].append(seconds(calls[name], device))
            except Exception as error:  # whatever the code of others raises
                if on_failure is None:
                    raise
                del samples[name]
                on_failure(name, error)

    run_round()
    run_round()
    if sum(values[-1] for values in samples.values()) < 60:
        for _ in range(repeats - 1):
            run_round()
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def default_dtype(device: str) -> str:
    """What models are usually trained in on a device."""
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def autocast_to(device: torch.device, dtype: str) -> torch.autocast:
    """A context in which float32 models compute in a type, as under a Trainer."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def peak_memory_in_child(script: str, cell: dict) -> int | None:
    """Bytes a cell needs at its peak above the idle process, or None if it ran out of memory.

    Args:
        script: The benchmark; called with `--memory-cell JSON` it must call `print_peak_memory`.
        cell: What to run.
    """
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, script, "--memory-cell", json.dumps(cell)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode < 0:
        return None  # Killed: the machine had no more memory.
    if finished.returncode:
        raise RuntimeError(f"memory cell {cell} failed:\n{finished.stderr[-2000:]}")
    return int(finished.stdout.split()[-1])


def print_peak_memory(device: torch.device, run: Callable[[], object]) -> None:
    """In the child: run a cell, weights included, and print its peak above the idle process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        print(torch.cuda.max_memory_allocated())
        return
    idle = _reset_peak()
    run()
    print(_memory("VmHWM") - idle)


def _reset_peak() -> int:
    """Forget the peak of the imports; bytes in use now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
