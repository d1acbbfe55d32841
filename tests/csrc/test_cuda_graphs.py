"""With `max_global_tokens` no call waits for the device, so that CUDA graphs can hold it."""

from dataclasses import replace

import pytest
import torch
from test_emulated_cuda import SEED, masks, random_layout
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_longformer.attention import (
    AttentionSpan,
    GlobalProjections,
    global_keys,
    padding,
    sparse_attention,
)
from adaptive_longformer.attention.backends import compiled, cuda
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling import attention_layer
from adaptive_longformer.modeling import padding as model_masks
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention
from adaptive_longformer.patterns import SlidingWindow, block_layout
from adaptive_longformer.selection import exact
from adaptive_longformer.selection import select_blocks as selection
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.testing import randomize_all_parameters

# What reads a value back from the device, copies one there, or gives a size that depends on values.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere",
    "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "lift_fresh",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails at what would wait for a GPU, also inside of our own operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "adaptive_longformer":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        assert name.rstrip("_") not in WAITING, f"{function} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype == torch.int64 for index in args[1])
        if name == "repeat_interleave" and function._overloadname != "self_int":
            assert "output_size" in kwargs
        return function(*args, **kwargs)


def global_projections(batch, length, size, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, length, size), *[(size, size), (size,)] * 3]
    tensors = [torch.randn(*shape, generator=generator) / size**0.5 for shape in shapes]
    return GlobalProjections(*(tensor.to(dtype).requires_grad_() for tensor in tensors))


def with_global_rows(call, count):
    """The call with as many rows of global queries as on a GPU, whose mask is not looked at."""
    mask = call.global_keys.mask
    positions = None if count is None else global_keys.pack_global_tokens(mask, count)
    return replace(call, global_keys=global_keys.GlobalKeys(mask, positions))


def run_call(max_global_tokens, global_qkv):
    """Output, LSE and all gradients of a call with everything in it, by the CUDA kernels."""
    length, heads = 100, 1
    layout = random_layout(length)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(2, heads, length, 32, generator=generator).bfloat16().requires_grad_()
        for _ in range(3)
    ]
    bias = torch.randn(1, heads, *layout.key_blocks.shape[2:], generator=generator)
    span = torch.tensor([20.0])
    options = {
        "entry_bias": bias.requires_grad_(),
        "span": AttentionSpan(span.requires_grad_(), 9.5),
        "dropout_p": 0.2,
        "dropout_seed": SEED,
        **masks(length, 2),
    }
    leaves += [bias, span]
    if global_qkv == "absorbed":
        options["global_qkv"] = global_projections(2, length, 32 * heads, torch.bfloat16)
        leaves += options["global_qkv"]
    call = with_global_rows(make_call(*leaves[:3], layout, **options), max_global_tokens)
    upstream = torch.ones(2, heads, length, 32, dtype=torch.bfloat16)
    with NoWaiting():
        output, lse = compiled.run_compiled(call)
        grads = torch.autograd.grad(output, leaves, upstream)
    return [output, lse, *grads]


@pytest.mark.parametrize("global_qkv", [None, "absorbed"])
def test_nothing_waits_for_the_device_forward_and_backward(emulator, monkeypatch, global_qkv):
    monkeypatch.setattr(compiled, "_kernels", lambda call: cuda)
    monkeypatch.setattr(padding, "may_look", lambda tensor: False)
    assert all(tensor.isfinite().all() for tensor in run_call(8, global_qkv)[2:])
    with pytest.raises(AssertionError, match="waits for the device"):
        run_call(None, global_qkv)


def capture(step):
    """A CUDA graph of a function, and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def adaptive_layer(**options):
    """A layer that chooses, narrows its windows, and has a block for all, in bfloat16."""
    config = AdaptiveSparseConfig(
        **{
            "hidden_size": 32,
            "num_attention_heads": 1,
            "attention_window": 20,
            "attention_pattern": "adaptive",
            "block_size": 64,
            "query_block_size": 64,
            "num_selected_blocks": 2,
            "num_learned_global_blocks": 1,
            "selection_strength": 1.0,
            "max_global_tokens": 3,
            **options,
        }
    )
    layer = randomize_all_parameters(AdaptiveSparseAttention(config, 0))
    assert layer.adaptive is not None
    layer.adaptive.reset_parameters()
    with torch.no_grad():
        layer.adaptive.span.fill_(0.7)
    return layer.bfloat16().train()


def on_a_gpu(monkeypatch, max_global_tokens):
    """Makes a layer do on tensors of the CPU what it does on those of a GPU."""

    def run_call(*tensors, backend, **options):
        call = with_global_rows(make_call(*tensors, **options), max_global_tokens)
        return compiled.run_compiled(call)[0]

    def no_list(tensor):
        raise AssertionError("tolist waits for the device")

    monkeypatch.setattr(compiled, "_kernels", lambda call: cuda)
    monkeypatch.setattr(padding, "may_look", lambda tensor: False)
    monkeypatch.setattr(global_keys, "_may_read", lambda tensor: False)
    monkeypatch.setattr(attention_layer, "sparse_attention", run_call)
    monkeypatch.setattr(global_keys, "_READ_BACK", ())
    monkeypatch.setattr(exact, "can_select", lambda call: False)
    monkeypatch.setattr(model_masks, "may_look", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "tolist", no_list)


@pytest.mark.parametrize("max_global_tokens", [3, None])
def test_an_adaptive_layer_does_not_wait_for_the_device(emulator, monkeypatch, max_global_tokens):
    length = 200
    layer = adaptive_layer(max_global_tokens=max_global_tokens)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, length, 32, generator=generator).bfloat16().requires_grad_()
    position = torch.arange(length)[None]
    where = ((position >= 5) & (position < 190), (position == 5) | (position == 60))
    chosen = []
    original = attention_layer.AdaptiveSelection._select

    def select(*arguments, **options):
        chosen.append(original(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(attention_layer.AdaptiveSelection, "_select", select)
    with torch.no_grad():
        layer(hidden_states, *where)  # what is read once, as before a capture
    on_a_gpu(monkeypatch, max_global_tokens)
    leaves = [hidden_states, *layer.parameters()]
    upstream = torch.ones_like(hidden_states)
    with NoWaiting():
        if max_global_tokens is None:
            with pytest.raises(AssertionError, match="waits for the device"):
                layer(hidden_states, *where)
            return
        output, _ = layer(hidden_states, *where)
        grads = torch.autograd.grad(output, leaves, upstream)
    assert all(grad.isfinite().all() for grad in grads)
    assert chosen[1].counts.sum() > 0 and chosen[1].global_open.any()


@pytest.mark.parametrize("num_candidates", [4096, 32])
def test_a_causal_choice_does_not_wait_for_the_device(monkeypatch, num_candidates):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 400, 8, generator=generator)
    options = SelectionOptions(2, 16, 16, num_candidates=num_candidates)
    monkeypatch.setattr(global_keys, "_READ_BACK", ())
    monkeypatch.setattr(exact, "can_select", lambda call: False)
    global_mask = torch.arange(400)[None] < 2
    with NoWaiting():
        selected = selection.select_blocks(
            query, key, SlidingWindow(20, 0), options, global_mask=global_mask, is_causal=True,
            max_global_tokens=2,
        )  # fmt: skip
    assert selected.counts.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize("has_layout", [False, True], ids=["pattern", "layout"])
@pytest.mark.parametrize("global_qkv", [None, "absorbed"])
def test_a_cuda_graph_replays_what_is_computed_without_it(global_qkv, has_layout):
    batch, heads, length, head_dim = 2, 2, 1000, 64
    shape, size = (batch, length, heads, head_dim), heads * head_dim
    pattern = SlidingWindow(128)
    if has_layout:
        pattern = block_layout(pattern, length, device="cuda")
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    upstream = torch.randn_like(leaves[0])
    position = torch.arange(length, device="cuda").expand(batch, -1)
    attention_mask = position < length - 100
    global_mask = position == 0
    seed = torch.tensor(7, device="cuda")
    options = {
        "attention_mask": attention_mask, "global_mask": global_mask, "max_global_tokens": 4,
        "dropout_p": 0.1, "dropout_seed": seed, "backend": "cuda",
    }  # fmt: skip
    if global_qkv == "absorbed":
        projections = global_projections(batch, length, size, torch.bfloat16)
        moved = [tensor.detach().cuda().requires_grad_() for tensor in projections]
        options["global_qkv"] = GlobalProjections(*moved)
        leaves += moved

    def step():
        output = sparse_attention(*leaves[:3], pattern, **options)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    graph, captured = capture(step)
    for number_of_global_tokens in (1, 3, 0):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_(std=0.5)
            global_mask.copy_(position % 50 == 7)
            global_mask.logical_and_(position < 50 * number_of_global_tokens)
            attention_mask.copy_(position < length - 10 * number_of_global_tokens)
            seed.add_(1)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for index, (actual, expected) in enumerate(zip(replayed, step(), strict=True)):
            assert torch.equal(actual, expected), f"result {index} with {number_of_global_tokens}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_a_cuda_graph_holds_an_adaptive_layer():
    batch, length = 2, 1000
    layer = adaptive_layer(
        hidden_size=128, num_attention_heads=2, attention_window=128, attention_backend="cuda",
        attention_probs_dropout_prob=0.0,
    ).cuda()  # fmt: skip
    hidden_states = torch.randn(batch, length, 128, device="cuda", dtype=torch.bfloat16)
    hidden_states.requires_grad_()
    upstream = torch.randn_like(hidden_states)
    position = torch.arange(length, device="cuda").expand(batch, -1)
    attention_mask, global_mask = position < length - 100, position == 0
    leaves = [hidden_states, *layer.parameters()]

    def step():
        output, _ = layer(hidden_states, attention_mask, global_mask)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    graph, captured = capture(step)
    for number in (1, 3):
        with torch.no_grad():
            hidden_states.normal_()
            attention_mask.copy_((position >= number) & (position < length - 10 * number))
            global_mask.copy_((position % 50 == 7) & (position < 50 * number))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for index, (actual, expected) in enumerate(zip(replayed, step(), strict=True)):
            # The gradient of the residual scores is a sum in no fixed order, and what follows from
            # it cancels in other sums.
            difference = (actual.float() - expected.float()).norm()
            assert difference <= 1e-2 * expected.float().norm(), f"result {index} with {number}"
