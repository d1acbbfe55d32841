from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adaptive_longformer.attention.backends import compiled
from adaptive_longformer.attention.backends.blocked import run_blocked
from adaptive_longformer.attention.backends.self_test import why_wrong
from adaptive_longformer.attention.kernels import load

CPU = torch.device("cpu")


def test_what_the_caller_is_doing_does_not_matter():
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert why_wrong("blocked", run_blocked, CPU, torch.bfloat16, 32, 64) is None


def test_a_checkpointed_layer_may_be_the_first_to_call_a_kernel():
    """What the self-test saves for its own backward pass is none of the layer's business."""
    results = []

    def layer(tensor):
        squared = tensor.square()
        if not results:
            results.append(why_wrong("blocked", run_blocked, CPU, torch.bfloat16, 32, 64))
        return squared.sin()

    tensor = torch.linspace(-1, 1, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(checkpoint(layer, tensor, use_reentrant=False).sum(), tensor)
    torch.testing.assert_close(gradient, tensor.square().cos() * 2 * tensor)
    assert results == [None]


def test_it_does_not_run_while_a_cuda_graph_is_captured(monkeypatch, caplog):
    """It would fail, and the kernel would be out of use from then on."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="'cuda' cannot run while a CUDA graph is captured"):
        why_wrong("cuda", run_blocked, torch.device("cuda", 0), torch.bfloat16, 32, 64)
    assert not caplog.records


def test_a_kernel_that_is_wrong_or_fails_is_named_in_the_log(caplog):
    def wrong(call):
        output, lse = run_blocked(call)
        return output * 1.1, lse

    def failing(call):
        raise RuntimeError("no image for this device")

    assert "relative error of 0." in str(why_wrong("wrong", wrong, CPU, torch.float32, 32, 64))
    assert "no image" in str(why_wrong("failing", failing, CPU, torch.float32, 32, 64))
    assert [record.args[0] for record in caplog.records] == ["wrong", "failing"]


def test_missing_memory_says_nothing_of_a_kernel():
    def hungry(call):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        why_wrong("hungry", hungry, CPU, torch.float32, 32, 64)


def test_forgetting_has_a_gpu_checked_again(no_library, monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=2**18)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(compiled, "why_unavailable", lambda kind: None)
    answers = iter(["it failed", None])
    monkeypatch.setattr(compiled, "why_wrong", lambda *_: next(answers))

    def why_not():
        return compiled._check_cuda_kernel(0, torch.float16, 64, 64, 64)

    load.forget()
    assert [why_not() for _ in range(2)] == ["it failed"] * 2
    load.forget()
    assert [why_not() for _ in range(2)] == [None] * 2
    load.forget()
