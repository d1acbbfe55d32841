"""What code gets wrong only on a GPU, without one: torch's fake tensors have a device and no
elements.
"""

import gc
import weakref
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from calls import layout_to
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.backends import compiled, cuda, triton
from adaptive_longformer.attention.backends.choose import choose_backend
from adaptive_longformer.attention.call import AttentionCall, make_call
from adaptive_longformer.patterns import SlidingWindow, Strided, block_layout
from adaptive_longformer.patterns.cached_tensors import kept_in_graphs, ready_for_every_stream
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.select_blocks import select_blocks

LENGTH = 300
# Not "cuda", for which a torch that is built for CPUs cannot index or differentiate.
DEVICE = "meta"


@pytest.fixture
def lists():
    """Of a window, on the device."""
    real = block_layout(SlidingWindow(90), LENGTH)
    with (
        config.patch(fake_tensor_allow_meta=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield layout_to(real, DEVICE)


def everything():
    """Query, key and value, and options with all masks and dropout."""
    query = torch.zeros(2, 2, LENGTH, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    position = torch.arange(LENGTH, device=DEVICE).expand(2, -1)
    options = {
        "attention_mask": position < LENGTH - 10, "global_mask": position < 2,
        "max_global_tokens": 4, "dropout_p": 0.1,
        "dropout_seed": torch.zeros((), dtype=torch.int64, device=DEVICE),
    }  # fmt: skip
    return (query, query, query), options


def test_tensors_of_two_devices_are_refused(lists):
    with pytest.raises(RuntimeError, match="same device"):
        lists.counts + torch.ones(1)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_no_operation_of_a_backend_is_on_two_devices(lists, backend):
    tensors, options = everything()
    output = sparse_attention(*tensors, lists, backend=backend, **options)
    (gradient,) = torch.autograd.grad(output.sum(), tensors[:1])
    assert output.device.type == gradient.device.type == DEVICE


def test_the_cuda_kernels_get_nothing_from_another_device(lists, monkeypatch):
    pointed_to = {}
    for name in ("set_arrays", "set_rows"):
        monkeypatch.setattr(
            cuda.CudaArguments, name, lambda self, **tensors: pointed_to.update(tensors)
        )
    tensors, options = everything()
    bias = torch.zeros(1, 2, *lists.key_blocks.shape[2:], device=DEVICE)
    arguments = cuda.CudaArguments(make_call(*tensors, lists, entry_bias=bias, **options))
    arguments.set_gradient_items()
    assert {"key_blocks", "open_keys", "row_words", "entry_bias", "item_slot"} <= set(pointed_to)
    assert {tensor.device.type for tensor in pointed_to.values()} == {DEVICE}


@pytest.mark.parametrize("num_candidates", [4096, 64])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_a_selection_is_on_one_device(lists, is_causal, num_candidates):
    (query, key, _), options = everything()
    chosen = select_blocks(
        query, key, SlidingWindow(20, 0 if is_causal else 20),
        SelectionOptions(2, 64, 64, num_candidates=num_candidates), is_causal=is_causal,
        global_mask=options["global_mask"], attention_mask=options["attention_mask"],
        max_global_tokens=2,
    )  # fmt: skip
    assert chosen.key_blocks.device.type == chosen.counts.device.type == DEVICE


@pytest.mark.parametrize("is_capturing", [False, True])
def test_what_a_graph_reads_outlives_its_cache(monkeypatch, is_capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    value = torch.ones(1)
    kept = weakref.ref(kept_in_graphs(value, torch.device("cuda")))
    del value
    gc.collect()
    assert (kept() is not None) == is_capturing


def test_the_device_is_idle_when_a_cache_drops_what_another_stream_may_read(monkeypatch):
    made, alive = [], []

    @lru_cache(maxsize=1)
    def cached(length):
        value = torch.ones(length)
        made.append(weakref.ref(value))
        return ready_for_every_stream(value, torch.device("cuda"))

    def synchronize(device):
        gc.collect()
        alive.append([value() is not None for value in made])

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    cached(1), cached(2)
    gc.collect()
    assert alive == [[True], [True, True]]
    assert [value() is not None for value in made] == [False, True]


REFUSED = {
    "head_dim 40 is not one of": {"head_dim": 40},
    "float32 is not one of bfloat16 and float16": {"dtype": torch.float32},
    "blocks of 16 x 64 tokens": {"query_block_size": 16},
    "blocks of 64 x 128 tokens": {"key_block_size": 128},
    "lists of 4097 entries, 4096 are allowed": {"key_block_size": 16, "width": 4097},
    "lists of 1025 entries, 1024 are allowed": {
        "query_block_size": 16, "key_block_size": 16, "width": 1025,
    },
    "and the lists of blocks below 64 are made in Triton": {"key_block_size": 32},
    "batch x heads is 65536 x 1, at most 65535": {"batch": 65536},
    "is not made of whole blocks": {"pattern": Strided(12)},
    "scale is -1.0, a number above 0 is needed": {"scale": -1.0},
    "capability 7.5, 8.0 is needed": {"gpu": {"major": 7, "minor": 5}},
    "bytes of shared memory are needed, the device has 101376": {
        "head_dim": 128, "query_block_size": 128, "gpu": {"shared_memory_per_block_optin": 101376},
    },
}  # fmt: skip


@pytest.mark.parametrize(("reason", "change"), REFUSED.items(), ids=REFUSED)
def test_what_the_cuda_kernels_cannot_run_has_a_reason(monkeypatch, reason, change):
    sizes = {
        "batch": 1, "head_dim": 32, "dtype": torch.bfloat16, "pattern": SlidingWindow(30),
        "query_block_size": 64, "key_block_size": 64, "gpu": {}, "scale": 1.0, "width": None,
        **change,
    }  # fmt: skip
    gpu = {"major": 9, "minor": 0, "shared_memory_per_block_optin": 232448, **sizes["gpu"]}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**gpu))
    monkeypatch.setattr(compiled, "why_unavailable", lambda kind: None)
    monkeypatch.setattr(compiled, "why_no_triton", lambda device: "Triton is not installed")
    compiled._check_cuda_kernel.cache_clear()
    layout = block_layout(
        sizes["pattern"], 70, query_block_size=sizes["query_block_size"],
        key_block_size=sizes["key_block_size"],
    )  # fmt: skip
    if sizes["width"] is not None:
        wide = layout.key_blocks.new_zeros((*layout.counts.shape, sizes["width"]))
        layout = replace(layout, key_blocks=wide, flags=wide)
    with FakeTensorMode():
        query = torch.zeros(
            sizes["batch"], 1, 70, sizes["head_dim"], dtype=sizes["dtype"], device="cuda"
        )
        call = AttentionCall(query, query, query, sizes["scale"], layout=layout)
        assert reason in (compiled.cuda_supports(call) or "")
    compiled._check_cuda_kernel.cache_clear()


@pytest.mark.parametrize("key_block", [16, 32, 64])
@pytest.mark.parametrize("query_block", [16, 32, 64, 128])
def test_auto_takes_the_cuda_kernels_for_blocks_that_they_get_right(
    monkeypatch, query_block, key_block
):
    """Those of an adaptive model included, which are 16 x 16 by default."""
    checked = []

    def check(name, run, device, *sizes):
        checked.append((name, *sizes))

    gpu = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(compiled, "why_unavailable", lambda kind: None)
    monkeypatch.setattr(compiled, "why_wrong", check)
    for module in (compiled, triton):
        monkeypatch.setattr(module, "why_no_triton", lambda device: None)
    monkeypatch.setattr(triton, "why_wrong", check)
    for cached in (compiled._check_cuda_kernel, triton._check_kernels):
        cached.cache_clear()
    layout = block_layout(
        SlidingWindow(30), 4096, query_block_size=query_block, key_block_size=key_block
    )
    with FakeTensorMode():
        query = torch.zeros(1, 1, 4096, 64, dtype=torch.bfloat16, device="cuda")
        call = AttentionCall(query, query, query, 1.0, layout=layout)
        name = choose_backend(call).name
    is_small_with_64 = key_block == 64 and query_block < 64
    assert name == ("triton" if is_small_with_64 else "cuda")
    assert checked == [(name, torch.bfloat16, 64, query_block, key_block)]
    for cached in (compiled._check_cuda_kernel, triton._check_kernels):
        cached.cache_clear()
