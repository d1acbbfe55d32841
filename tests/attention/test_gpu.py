"""The backends on a CUDA device: `make gpu`."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import (
    assert_half_precision,
    layout_to,
    pairwise,
    random_call,
    readable,
    routed_layout,
    to_device,
    value_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.backends import cuda
from adaptive_longformer.attention.kernels import load
from adaptive_longformer.patterns import SlidingWindow, Strided

DEVICE = "cuda"
HALF_TYPES = [torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
CUDA_GRID = {
    "dtype": HALF_TYPES,
    "head_dim": [32, 64, 96, 128],
    "query_block": [64, 128],
    "length": [64, 65, 127, 128, 700],
    "padding": [None, "left", "right", "all"],
    "is_causal": [False, True],
    "global_tokens": [None, "few"],
    "key_heads": [None, 1],
    "extra": ["none", "entry_bias", "span", "dropout", "everything"],
}
EVERYTHING = {
    "entry_bias": {"entry_bias": True},
    "span": {"span": True},
    "dropout": {"dropout_p": 0.1},
    "everything": {"entry_bias": True, "span": True, "dropout_p": 0.1},
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("global_qkv", [None, "explicit", "absorbed"])
def test_blocked_on_the_device_matches_the_reference_on_the_cpu(
    global_qkv, length, dtype, tolerance
):
    pattern = SlidingWindow(33) | Strided(100)
    call = random_call(
        pattern,
        length=length,
        head_dim=32,
        padding="left",
        global_tokens="few",
        global_qkv=global_qkv,
        dropout_p=0.1,
    )
    for leaf in call[2]:  # the same rounded numbers on both sides
        leaf.data = leaf.data.to(dtype).double()
    expected = value_and_gradients(pattern, *call, "reference")
    actual = value_and_gradients(pattern, *to_device(call, DEVICE, dtype), "blocked")
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = float((a.cpu().double() - e.double()).abs().max())
        bound = tolerance * max(1.0, float(e.abs().max()))
        assert error <= bound, f"result {index}: error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize("options", pairwise(CUDA_GRID), ids=readable)
def test_cuda_kernels_are_as_exact_as_dense_attention(options):
    options = dict(options)
    dtype, query_block = options.pop("dtype"), options.pop("query_block")
    options |= EVERYTHING.get(options.pop("extra"), {})
    layout = replace(routed_layout(options["length"], query_block), bias=None)
    assert_half_precision(layout, "cuda", dtype, DEVICE, **options)


@pytest.mark.parametrize("global_qkv", ["explicit", "absorbed"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_cuda_kernels_match_reference_for_a_pattern_with_separate_global_rows(dtype, global_qkv):
    assert_half_precision(
        SlidingWindow(200), "cuda", dtype, DEVICE, length=1000, head_dim=64, padding="right",
        global_tokens="few", global_qkv=global_qkv, dropout_p=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cuda", "blocked"])
def test_garbage_in_padding_does_not_leak(backend):
    layout = layout_to(replace(routed_layout(300), bias=None), DEVICE)
    call = random_call(layout, length=300, head_dim=64, padding="left", global_tokens="few")
    tensors, options, leaves = to_device(call, DEVICE, torch.bfloat16)
    mask = options["attention_mask"]
    results = []
    for garbage in (0.0, torch.nan):
        for leaf in leaves:
            leaf.data.transpose(1, 2)[~mask] = garbage
        output = sparse_attention(*tensors, layout, backend=backend, **options)
        output = output.masked_fill(~mask[:, None, :, None], 0.0)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    assert results[0][0].any()
    for clean, dirty in zip(*results, strict=True):
        # Some of torch's own sums on a GPU have no fixed order.
        clean, dirty = (result.transpose(1, 2)[mask] for result in (clean, dirty))
        torch.testing.assert_close(dirty, clean, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("backend", ["cuda", "blocked"])
def test_a_row_that_sees_nothing_is_zero_with_zero_gradients(backend):
    layout = layout_to(replace(routed_layout(300), bias=None), DEVICE)
    call = random_call(layout, length=300, head_dim=64, padding="all")
    call = to_device(call, DEVICE, torch.bfloat16)
    output, lse, *gradients = value_and_gradients(layout, *call, backend)
    assert output[0].eq(0).all() and lse[0].eq(-1).all() and output[1].any()
    assert all(gradient[0].eq(0).all() for gradient in gradients)


def test_twenty_runs_give_the_same_bits():
    layout = layout_to(replace(routed_layout(2000, 128), bias=None), DEVICE)
    call = random_call(
        layout, length=2000, heads=4, head_dim=64, padding="right", global_tokens="few",
        entry_bias=True, span=True, dropout_p=0.1,
    )  # fmt: skip
    call = to_device(call, DEVICE, torch.bfloat16)
    first = value_and_gradients(layout, *call, "cuda")
    for _ in range(19):
        again = value_and_gradients(layout, *call, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def small_call(device=DEVICE, length=777):
    """Leaves on a device, and a function of them that calls the kernels."""
    call = random_call(SlidingWindow(100), length=length, head_dim=64, global_tokens="few")
    leaves, options, _ = to_device(call, device, torch.bfloat16)

    def attend(*tensors):
        return sparse_attention(*tensors, SlidingWindow(100), backend="cuda", **options)

    return leaves, attend


def test_another_stream_gives_the_same_bits():
    leaves, attend = small_call()
    expected = [output := attend(*leaves), *torch.autograd.grad(output.sum(), leaves)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [output := attend(*leaves), *torch.autograd.grad(output.sum(), leaves)]
    torch.cuda.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device is visible")
def test_a_second_gpu_is_used_while_the_first_is_current():
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves, attend = small_call(device)
        output = attend(*leaves)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
        assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second.cpu(), first.cpu())


def test_a_checkpointed_layer_may_be_the_first_to_call_the_kernels():
    leaves, attend = small_call()
    load.forget()  # the kernels are loaded and checked again, in the checkpointed call
    output = checkpoint(attend, *leaves, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), leaves)
    for actual, wanted in zip(found, torch.autograd.grad(attend(*leaves).sum(), leaves)):
        assert torch.equal(actual, wanted)


def test_compiling_with_cuda_graphs_equals_no_compiling():
    """The first call makes the lists of its pattern, which stay."""
    leaves, attend = small_call(length=779)
    compiled = torch.compile(
        lambda *tensors: attend(*(tensor * 2 for tensor in tensors)) * 2,
        mode="reduce-overhead", fullgraph=True,
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(4):
            found = compiled(*leaves).clone()
        expected = attend(*(tensor * 2 for tensor in leaves)) * 2
    assert torch.equal(found, expected)


def test_memory_grows_with_the_length_and_not_faster():
    peaks = []
    for length in (65536, 131072):
        tensors = [
            torch.randn(1, length, 4, 64, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        ]
        leaves = [tensor.requires_grad_() for tensor in tensors]
        global_mask = (torch.arange(length, device=DEVICE) < 2)[None]

        def step(leaves=leaves, global_mask=global_mask):
            output = sparse_attention(
                *leaves, SlidingWindow(256), global_mask=global_mask, max_global_tokens=2,
                backend="cuda",
            )  # fmt: skip
            torch.autograd.grad(output, leaves, torch.ones_like(output))

        step()  # the lists are made once
        torch.cuda.synchronize()
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated() - idle)
        del tensors, leaves, step
    assert 1.5 * peaks[0] < peaks[1] < 2.2 * peaks[0], peaks


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    child = run_with_sanitizer(tool, "test_gpu.run_small_calls()")
    told = child.stdout + child.stderr
    assert child.returncode == 0, told[-3000:]
    assert "COMPUTE-SANITIZER" in told and "calls done" in told


def test_compute_sanitizer_looks_at_our_kernels():
    child = run_with_sanitizer("memcheck", "test_gpu.cut_open_keys(); test_gpu.run_small_calls()")
    told = child.stdout + child.stderr
    assert child.returncode != 0 and "Invalid __global__ read" in told, told[-3000:]


def run_with_sanitizer(tool, statement):
    """What a process said in which compute-sanitizer watched our kernels."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    run_small_calls()  # in this process: compiles what the child then finds in the cache
    options = ["--tool", tool, "--error-exitcode", "86", "--kernel-name", "kns=adaptive"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks for what a driver may not have
    paths = [str(Path(__file__).parent), *sys.path]
    child = subprocess.run(
        [sanitizer, *options, sys.executable, "-c", f"import test_gpu; {statement}"],
        # Otherwise what lies beside a tensor belongs to torch as well.
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "Device not supported" in child.stdout + child.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    return child


def cut_open_keys():
    """From here on the kernels read past the end of an array."""
    set_arrays = cuda.CudaArguments.set_arrays

    def set_cut_arrays(call, **arrays):
        if "open_keys" in arrays:
            arrays["open_keys"] = arrays["open_keys"].flatten()[:1].clone()
        set_arrays(call, **arrays)

    cuda.CudaArguments.set_arrays = set_cut_arrays


def run_small_calls():
    """A forward and a backward pass of everything, with both sizes of query blocks."""
    for query_block in (64, 128):
        layout = layout_to(replace(routed_layout(150, query_block), bias=None), DEVICE)
        call = random_call(
            layout, length=150, head_dim=64, padding="right", global_tokens="few",
            entry_bias=True, span=True, dropout_p=0.1,
        )  # fmt: skip
        call = to_device(call, DEVICE, torch.bfloat16)
        assert explain_backends(*call[0], layout, **call[1])["cuda"] is None
        value_and_gradients(layout, *call, "cuda")
    torch.cuda.synchronize()
    print("calls done")
