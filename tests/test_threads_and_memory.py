"""One model in many threads, in forked workers, in many calls, copied and in other types."""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.attention.backends.sdpa import _cached_mask
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.patterns import (
    BigBird,
    GlobalTokens,
    RandomBlocks,
    SlidingWindow,
    Strided,
    big_bird,
    block_layout,
)
from adaptive_longformer.patterns.block_layout import _cached_layout
from adaptive_longformer.patterns.random_blocks import _chosen_blocks
from adaptive_longformer.testing import (
    tiny_adaptive_model,
    tiny_inputs,
    tiny_model,
    tiny_seq2seq_inputs,
    tiny_seq2seq_model,
)

ROOT = Path(__file__).resolve().parents[1]
FULL_GRID = os.environ.get("ADAPTIVE_LONGFORMER_FULL_GRID") == "1"
# Dense attention on a CPU up to 768 tokens, kernels beyond.
LENGTHS = [5, 64, 70, 300, 769, 800, 900, 1000]
CACHES = [
    _cached_layout,
    _cached_mask,
    _chosen_blocks,
    big_bird._cached_layout,
]

MODELS = {
    "longformer": lambda: tiny_model(),
    "random_blocks": lambda: tiny_model(attention_pattern="random_blocks", block_size=64),
    "big_bird": lambda: tiny_model(attention_pattern="big_bird", block_size=16),
    "adaptive": lambda: tiny_adaptive_model(),
    "causal": lambda: tiny_model(AdaptiveSparseForCausalLM),
    "seq2seq": lambda: tiny_seq2seq_model(),
}
of_every_model = pytest.mark.parametrize("name", MODELS)


def inputs_of(model, length):
    make = tiny_seq2seq_inputs if model.config.is_encoder_decoder else tiny_inputs
    return make(model, length)


@torch.no_grad()
def result(model, length=70):
    return model(**inputs_of(model, length))[0]


@of_every_model
def test_threads_that_share_a_model_get_what_one_gets(name):
    """Also where they fill the caches at once."""
    model = MODELS[name]()
    expected = [result(model, length) for length in LENGTHS]
    for _ in range(2):
        for cached in CACHES:
            cached.cache_clear()
        with ThreadPoolExecutor(len(LENGTHS)) as threads:
            found = threads.map(lambda length: result(model, length), LENGTHS * 2)
        for actual, wanted in zip(found, expected * 2, strict=True):
            torch.testing.assert_close(actual, wanted, atol=0, rtol=0)


def test_threads_that_share_parameters_get_the_gradients_that_one_gets():
    def gradients(length):
        query, key, value = torch.randn(
            3, 1, 2, length, 8, generator=torch.Generator().manual_seed(length)
        ).requires_grad_()
        output = sparse_attention(query, key, value, SlidingWindow(20) | GlobalTokens((3,)))
        return torch.autograd.grad(output.square().sum(), (query, key, value))

    expected = [gradients(length) for length in LENGTHS]
    with ThreadPoolExecutor(len(LENGTHS)) as threads:
        for actual, wanted in zip(threads.map(gradients, LENGTHS), expected, strict=True):
            assert all(map(torch.equal, actual, wanted))


# In a process of its own, which forks when its kernels are loaded and its threads have run.
FORKS = """
import sys
import torch
from adaptive_longformer.testing import tiny_inputs, tiny_model

torch.set_num_threads(2)
model = tiny_model()

class Results(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    @torch.no_grad()
    def __getitem__(self, index):
        return model(**tiny_inputs(model, 700 + 50 * index, batch_size=1))[0].double().sum()

expected = torch.stack([Results()[index] for index in range(6)])
loader = torch.utils.data.DataLoader(
    Results(), num_workers=2, multiprocessing_context="fork", timeout=60
)
for _ in range(2):
    torch.testing.assert_close(torch.cat(list(loader)), expected)
    torch.testing.assert_close(Results()[3], expected[3], rtol=0, atol=0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_workers_that_are_forked_after_the_first_call_get_what_it_gets():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert (done.returncode, done.stderr) == (0, "")


def resident_megabytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory")
def test_calls_of_changing_lengths_take_no_more_memory():
    """2,000 calls, all of other lengths, windows or backends, every second one with gradients."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 1, 8)
    reasons = explain_backends(query, query, query, SlidingWindow(1))
    backends = ["auto", *(name for name in ("cpp", "blocked") if reasons[name] is None)]
    used = []
    for count in range(1, 2001):
        backend = backends[count % len(backends)]
        length = 1 + count * 7919 % 200 + (769 if count % 20 == 0 else 0)
        query = torch.randn(1, 1, length, 8, generator=generator).requires_grad_(count % 2 == 0)
        output = sparse_attention(query, query, query, SlidingWindow(count), backend=backend)
        if query.requires_grad:
            output.sum().backward()
        if count % 500 == 0:
            used.append(resident_megabytes())
    assert max(used[1:]) - used[0] < 8, used


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory")
def test_requests_of_changing_lengths_take_no_more_memory():
    """As a server answers them: three models in turn, hardly two requests of one shape.

    ADAPTIVE_LONGFORMER_FULL_GRID=1 makes them 10,000.
    """
    count = 10_000 if FULL_GRID else 400
    models = [MODELS[name]() for name in ("longformer", "big_bird", "adaptive")]
    used = []
    for request in range(1, count + 1):
        length = 1 + request * 7919 % 250 + (750 if request % 20 == 0 else 0)
        model = models[request % len(models)]
        with torch.inference_mode():
            model(**tiny_inputs(model, length, batch_size=1 + request % 2))
        if request % (count // 20) == 0:
            used.append(resident_megabytes())
    print(used)
    assert all(cached.cache_info().maxsize for cached in CACHES)
    # The caches are full after half of them, whose sizes then still change.
    assert max(used[10:]) - max(used[:10]) < 16, used


def assert_same_results(model, other):
    for length in (70, 800):
        assert torch.equal(result(model, length), result(other, length))


@of_every_model
def test_copies_of_a_model_that_was_called_give_what_it_gives(name):
    model = MODELS[name]()
    result(model)
    assert_same_results(model, copy.deepcopy(model))
    assert_same_results(model, pickle.loads(pickle.dumps(model)))


def test_copies_of_patterns_and_layouts_are_equal():
    for pattern in (
        SlidingWindow(3, dilation=(1, 2)),
        SlidingWindow(4) | Strided(12) | GlobalTokens((3,)),
        RandomBlocks(2, 16, 5),
        BigBird(16, 1),
    ):
        layout = block_layout(pattern, 200, num_heads=2)
        for copied in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            other = copied(pattern)
            assert (other, hash(other), other.code) == (pattern, hash(pattern), pattern.code)
            other = copied(layout)
            assert torch.equal(other.key_blocks, layout.key_blocks)
            assert (other.window, other.pattern) == (layout.window, layout.pattern)


@of_every_model
def test_a_model_may_change_its_type_between_calls(name):
    model = MODELS[name]()
    for length in (70, 800):
        expected = result(model.float(), length)
        exact = result(model.double(), length)
        assert exact.dtype == torch.float64
        if name == "adaptive":  # in float32 bytes choose, and other blocks where masses are close
            assert (expected.double() - exact).norm() < 0.02 * exact.norm()
        else:
            torch.testing.assert_close(exact.float(), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(result(model.float(), length), expected)
        half = result(copy.deepcopy(model).to(torch.bfloat16), length)
        assert half.dtype == torch.bfloat16
        error = (half.double() - exact).norm() / exact.norm()
        assert error < 0.05, error
