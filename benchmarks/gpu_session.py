"""What a few minutes on a GPU can tell, in one command: the most important first.

    python benchmarks/gpu_session.py --output gpu-session
    python benchmarks/gpu_session.py --dry --output dry-session    # tiny, on the CPU

Every stage is a process with a time limit of its own, and what it finds is in `session.json` as
soon as it is found; what the processes print is in `session.log`. A stage that fails or runs out of
time does not stop the next ones. All limits together are below nine minutes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention_operator import (
    BLOCK,
    DENSE,
    FORWARD,
    FORWARD_BACKWARD,
    NUM_SELECTED,
    PRODUCTS,
    WINDOW,
    executed_tiles,
    make_call_of,
    routed_layout,
)
from side_by_side.measure import environment, first_line, seconds
from side_by_side.results import REPOSITORY
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adaptive_longformer.attention.backends.choose import BACKENDS, FUSED
from adaptive_longformer.attention.backends.self_test import TOLERANCE, largest_error
from adaptive_longformer.attention.kernels.load import why_unavailable
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention

LOG_LINES = 15  # of a stage that did not pass, printed


class Scale(NamedTuple):
    """How large everything is: on a GPU, or in a dry run."""

    device: str
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    head_dims: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]  # query blocks and key blocks of the small problem
    matrix: int
    repeats: int


GPU = Scale(
    "cuda", ("bfloat16", "float16"), (4096, 16384, 65536), 12, 64, (32, 64, 96, 128),
    ((64, 64), (16, 16), (128, 64), (64, 32)), 8192, 20,
)  # fmt: skip
DRY = Scale("cpu", ("float32",), (2048,), 1, 16, (16,), ((64, 64), (16, 16)), 64, 1)
# Of the lists of the larger problems: a tile, and what adaptive models have by default.
BLOCKS = (BLOCK, 16)

Say = Callable[..., None]


class Stage(NamedTuple):
    """A part of a session.

    Attributes:
        limit: its seconds.
        run: called with a scale and a function that records what is found, by name.
    """

    limit: float
    run: Callable[[Scale, Say], None]


def build(scale: Scale, say: Say) -> None:
    """Compiles our kernels."""
    say(environment=environment(torch.device(scale.device)))
    kind = "cuda" if scale.device == "cuda" else "cpu"
    started = time.monotonic()
    reason = why_unavailable(kind)
    say(seconds_of_build=time.monotonic() - started, why_unavailable=reason)
    if reason is not None:
        sys.exit(f"the {kind} kernels cannot be used: {reason}")


def correct(scale: Scale, say: Say) -> None:
    """Every type and size of the fused backends against float64, forward and backward."""
    cells, wrong = [], 0
    for name, dtype, head_dim, blocks in product(
        FUSED[scale.device], scale.dtypes, scale.head_dims, scale.blocks
    ):
        cell: dict[str, Any] = {"backend": name, "dtype": dtype, "head_dim": head_dim}
        cell["blocks"] = blocks
        where = (torch.device(scale.device), getattr(torch, dtype), head_dim, *blocks)
        try:
            cell["error"] = largest_error(BACKENDS[name].run, *where)
            cell["is_right"] = cell["error"] < TOLERANCE
        except Exception as error:  # whatever a kernel that was never run may raise
            cell["failure"] = first_line(error)
        wrong += not cell.get("is_right", False)
        cells.append(cell)
        say(cells=cells)
    if wrong:
        sys.exit(f"{wrong} of {len(cells)} are wrong or fail")


def speed(scale: Scale, say: Say) -> None:
    """Times of the operator, replayed from a CUDA graph, beside torch's dense attention; the times
    of its kernels; and what the device can do at most.
    """
    device = torch.device(scale.device)
    say(ceilings=ceilings(scale, device))
    dense = DENSE[scale.device]
    cells = []
    for length, mode, size in product(scale.lengths, (FORWARD, FORWARD_BACKWARD), BLOCKS):
        layout = routed_layout(length, device, size)
        for name in (*FUSED[scale.device], *(dense if size == BLOCK else ())):
            cell: dict[str, Any] = {"name": name, "length": length, "mode": mode, "block": size}
            tiles = executed_tiles(name, layout, scale.heads)
            operations = 2 * PRODUCTS[mode] * tiles * size**2 * scale.head_dim
            try:
                call = make_call_of(name, length, 0.0, mode, settings(scale), size)
                cell["seconds"] = replayed_seconds(call, device, scale.repeats)
                cell["operations_per_second"] = operations / cell["seconds"]
                if name not in dense:
                    cell |= profiled(call, device.type == "cuda")
            except Exception as error:  # whatever the code of others raises
                cell["failure"] = first_line(error)
            cells.append(cell)
            say(cells=cells)


def layer(scale: Scale, say: Say) -> None:
    """One adaptive layer as a model runs it: time, launches, and the kernels that take longest."""
    device = torch.device(scale.device)
    on_gpu = device.type == "cuda"
    size = scale.heads * scale.head_dim
    dtype = getattr(torch, scale.dtypes[0])
    cells = []
    for block, length, wants_gradient in product(BLOCKS, scale.lengths, (False, True)):
        config = AdaptiveSparseConfig(
            hidden_size=size, num_attention_heads=scale.heads, attention_window=WINDOW,
            attention_pattern="adaptive", block_size=block, query_block_size=block,
            num_selected_blocks=NUM_SELECTED, max_global_tokens=1,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        module = AdaptiveSparseAttention(config, 0).to(device, dtype)
        hidden_states = torch.randn(1, length, size, device=device, dtype=dtype)
        mask = torch.ones(1, length, dtype=torch.bool, device=device)
        is_global = torch.arange(length, device=device)[None] == 0

        def call(module=module, given=(hidden_states, mask, is_global), grad=wants_gradient):
            with nullcontext() if grad else torch.no_grad():
                output, _ = module(*given)
            if grad:
                output.float().square().mean().backward()

        mode = FORWARD_BACKWARD if wants_gradient else FORWARD
        cell: dict[str, Any] = {"length": length, "mode": mode, "block": block}
        try:
            call()
            cell["seconds"] = min(seconds(call, device) for _ in range(min(scale.repeats, 5)))
            cell |= profiled(call, on_gpu)
        except Exception as error:  # as above
            cell["failure"] = first_line(error)
        cells.append(cell)
        say(cells=cells)


def profiled(call: Callable[[], None], on_gpu: bool) -> dict[str, Any]:
    """What torch's profiler says of one call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    rows = [
        (row.key, row.count, row.self_device_time_total if on_gpu else row.self_cpu_time_total)
        for row in profiler.key_averages()
        if row.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]
    rows.sort(key=lambda row: -row[2])
    return {
        "launches": sum(count for _, count, _ in rows),
        "microseconds": sum(time for *_, time in rows),
        "longest": [
            {"name": name[:100], "count": count, "microseconds": time}
            for name, count, time in rows[:15]
        ],
    }


def tests(scale: Scale, say: Say, expression: str = "not sanitizer") -> None:
    """The tests that need a GPU; in a dry run they are only collected."""
    files = sorted(
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", expression]
    command += ["--durations=10"] if scale.device == "cuda" else ["--collect-only"]
    say(files=files)
    sys.exit(subprocess.run([*command, *files], cwd=REPOSITORY, check=False).returncode)


def counters(scale: Scale, say: Say) -> None:
    """What Nsight Compute counts in the kernels of one forward and backward pass."""
    if (ncu := shutil.which("ncu")) is None:
        say(skipped="ncu was not found")
        return
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
    command = [ncu, "--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name"]
    command += ["regex:adaptive::", "--launch-count", "5"]
    command += [word for section in sections for word in ("--section", section)]
    child = [sys.executable, __file__, "--stage", "once"]
    done = subprocess.run([*command, *child], capture_output=True, text=True, check=False)
    say(report=(done.stdout + done.stderr)[-30_000:])
    sys.exit(done.returncode)


def once(scale: Scale, say: Say) -> None:
    """A forward and a backward pass of the first fused backend, for `counters`."""
    name, length = FUSED[scale.device][0], scale.lengths[len(scale.lengths) // 2]
    make_call_of(name, length, 0.0, FORWARD_BACKWARD, settings(scale))()


STAGES = {
    "build": Stage(100, build),
    "correct": Stage(60, correct),
    "speed": Stage(100, speed),
    "layer": Stage(60, layer),
    "tests": Stage(120, tests),
    "sanitizer": Stage(45, partial(tests, expression="sanitizer")),
    "counters": Stage(45, counters),
}
ONLY_ON_A_GPU = ("sanitizer", "counters")


def settings(scale: Scale) -> argparse.Namespace:
    """As attention_operator.py takes them."""
    return argparse.Namespace(
        device=scale.device, dtype=scale.dtypes[0], heads=scale.heads, head_dim=scale.head_dim
    )


def ceilings(scale: Scale, device: torch.device) -> dict[str, float]:
    """Operations per second of a large product, bytes per second of a large copy."""
    shape = (scale.matrix, scale.matrix)
    left, right = torch.randn(2, *shape, device=device, dtype=getattr(torch, scale.dtypes[0]))
    source = torch.empty(8, *shape, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    calls = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    best = {}
    for name, call in calls.items():
        call()
        best[name] = min(seconds(call, device) for _ in range(scale.repeats))
    return {
        "operations_per_second": 2 * scale.matrix**3 / best["product"],
        "bytes_per_second": 2 * source.numel() * source.element_size() / best["copy"],
    }


def replayed_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """How long the kernels of a call take, launched by a CUDA graph, so that the host's work is not
    counted; on a CPU, how long the call takes.
    """
    call()
    if device.type != "cuda":
        return min(seconds(call, device) for _ in range(repeats))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> None:
        for _ in range(repeats):
            graph.replay()

    return min(seconds(replay, device) for _ in range(3)) / repeats


def record(folder: Path, stage: str, **found: Any) -> None:
    """Adds to what the session has found; the file is whole at any time."""
    path = folder / "session.json"
    session = json.loads(path.read_text()) if path.exists() else {}
    session.setdefault(stage, {}).update(found)
    unfinished = folder / "session.json.unfinished"
    unfinished.write_text(json.dumps(session, indent=1))
    os.replace(unfinished, path)


def run_stage(name: str, limit: float, folder: Path, is_dry: bool) -> str:
    """Runs a stage in a process of its own; "passed", "failed" or "out of time"."""
    command = [sys.executable, __file__, "--stage", name, "--output", str(folder)]
    paths = [str(REPOSITORY), str(REPOSITORY / "tests" / "attention")]
    paths += [os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with open(folder / "session.log", "a") as log:
        print(f"==== {name}", file=log, flush=True)
        process = subprocess.Popen(
            [*command, *(["--dry"] if is_dry else [])], env={**os.environ, **variables},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
    record(folder, name, status=status, seconds=round(time.monotonic() - started, 1))
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT"), metavar="DIR",
        help="folder for session.json and session.log; default: the variable OUT",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--stage", choices=[*STAGES, "once"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output is None and args.stage != "once":
        parser.error("--output DIR is needed, or the variable OUT")
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --dry runs the script on the CPU")
    return args


def main() -> int:
    args = parse_arguments()
    scale = DRY if args.dry else GPU
    if args.stage == "once":
        once(scale, print)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    if args.stage:
        STAGES[args.stage].run(scale, partial(record, args.output, args.stage))
        return 0
    statuses = {}
    for name in args.stages:
        if args.dry and name in ONLY_ON_A_GPU:
            continue
        statuses[name] = run_stage(name, STAGES[name].limit, args.output, args.dry)
        print(f"{name:<10} {statuses[name]}", flush=True)
        if statuses[name] != "passed":
            lines = (args.output / "session.log").read_text().splitlines()
            print("\n".join(f"    {line}" for line in lines[-LOG_LINES:]), flush=True)
    return int(any(status != "passed" for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
