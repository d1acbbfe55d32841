"""What runs only where there is a GPU, on a pretended one: commands, benchmarks, and what a CUDA
graph can hold.
"""

import gc
import importlib
import json
import weakref
from pathlib import Path

import pytest
import test_cuda_graphs
import torch
from pretended_gpu import GpuTensor, PretendedGpu

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseModel,
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.attention import sparse_attention
from adaptive_longformer.attention.backends import sdpa as dense
from adaptive_longformer.attention.call import make_call
from adaptive_longformer.patterns import BigBird, SlidingWindow, big_bird_layout, block_layout
from adaptive_longformer.patterns.big_bird import _cached_layout as cached_big_bird
from adaptive_longformer.patterns.block_layout import _cached_layout as cached_lists
from adaptive_longformer.testing import randomize_all_parameters
from adaptive_longformer.training.small_longformer import train_byte_level_tokenizer
from adaptive_longformer_command_line import main

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The kernels on a GPU take no smaller ones.
BLOCKS_OF_64 = {"block_size": 64, "query_block_size": 64}
TEXT = "The cat sat on the mat. The dog ran after the bird. " * 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of checkpoints by the command that reads them, and a document."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_byte_level_tokenizer([TEXT], vocab_size=300, max_length=128)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 64, "attention_window": 64,
        "max_position_embeddings": 200,
    }  # fmt: skip
    seq2seq = AdaptiveSparseSeq2SeqConfig(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, attention_window=64, max_encoder_position_embeddings=200,
    )  # fmt: skip
    adaptive = {"attention_pattern": "adaptive", "num_selected_blocks": 1, **BLOCKS_OF_64}
    models = {
        "answer": AdaptiveSparseForQuestionAnswering(AdaptiveSparseConfig(**sizes)),
        "summarize": AdaptiveSparseForConditionalGeneration(seq2seq),
        "report": AdaptiveSparseModel(AdaptiveSparseConfig(**sizes, **adaptive)),
    }
    for name, model in models.items():
        randomize_all_parameters(model).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "document.txt").write_text(TEXT)
    return root


@pytest.mark.parametrize(
    ("command", "question", "options"),
    [
        ("answer", ["Who sat?"], []),
        ("summarize", [], ["--max-new-tokens", "2"]),
        ("report", [], []),
    ],
    ids=["answer", "summarize", "report"],
)
def test_a_command_reads_on_the_gpu_in_bfloat16_unless_told_not_to(
    checkpoints, gpu_machine, capsys, command, question, options
):
    document = str(checkpoints / "document.txt")
    arguments = [command, str(checkpoints / command), *question, document, *options]
    assert main(arguments) == 0
    output, errors = capsys.readouterr()
    assert output and "on Pretended GPU, bfloat16\n" in errors
    assert "forward" in gpu_machine
    gpu_machine.clear()
    assert main([*arguments, "--cpu"]) == 0
    assert "Pretended" not in capsys.readouterr().err and not gpu_machine


class WhileCapturing(test_cuda_graphs.NoWaiting):
    """Fails also at what copies between the GPU and the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "adaptive_longformer":
            with PretendedGpu():
                return super().__torch_dispatch__(function, types, args, kwargs)
        if function._schema.name in ("aten::_to_copy", "aten::copy_"):
            sides = {isinstance(arg, GpuTensor) for arg in args if isinstance(arg, torch.Tensor)}
            device = (kwargs or {}).get("device")
            if device is not None:
                sides.add(device.type != "cpu")
            assert len(sides) == 1, f"{function} copies between the devices"
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.fixture
def capture(gpu_machine, monkeypatch):
    """Runs a function before and during a capture; gives what it returned during it."""

    def no_list(tensor):
        raise AssertionError("tolist waits for the device")

    def run(step):
        step()
        with monkeypatch.context() as during, WhileCapturing():
            during.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            during.setattr(GpuTensor, "tolist", no_list)
            return step()

    return run


def test_a_copy_from_the_cpu_during_a_capture_is_found(capture):
    values = torch.ones(2)
    with pytest.raises(AssertionError, match="copies between the devices"):
        capture(lambda: values.to("cuda"))


@pytest.mark.parametrize("has_layout", [False, True], ids=["pattern", "layout"])
def test_a_call_with_everything_can_be_captured(capture, has_layout):
    batch, heads, length, head_dim = 2, 2, 100, 32
    pattern = SlidingWindow(30)
    if has_layout:
        pattern = block_layout(pattern, length, device="cuda")
    leaves = [
        torch.randn(batch, heads, length, head_dim, device="cuda").bfloat16().requires_grad_()
        for _ in range(3)
    ]
    projections = test_cuda_graphs.global_projections(
        batch, length, heads * head_dim, torch.bfloat16
    )
    moved = [tensor.detach().cuda().requires_grad_() for tensor in projections]
    position = torch.arange(length, device="cuda").expand(batch, -1)
    options = {
        "attention_mask": position < length - 10, "global_mask": position == 0,
        "max_global_tokens": 4, "dropout_p": 0.1, "dropout_seed": torch.tensor(7, device="cuda"),
        "global_qkv": type(projections)(*moved), "backend": "cuda",
    }  # fmt: skip
    upstream = torch.ones(batch, heads, length, head_dim, dtype=torch.bfloat16, device="cuda")

    def step():
        output = sparse_attention(*leaves, pattern, **options)
        return [output, *torch.autograd.grad(output, [*leaves, *moved], upstream)]

    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in capture(step))


def test_an_adaptive_layer_can_be_captured(capture, gpu_machine):
    layer = test_cuda_graphs.adaptive_layer(
        hidden_size=64, num_attention_heads=2, attention_backend="cuda",
        attention_probs_dropout_prob=0.0,
    ).cuda()  # fmt: skip
    hidden_states = torch.randn(1, 150, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    position = torch.arange(150, device="cuda")[None]
    attention_mask, global_mask = position < 140, position == 0
    leaves, upstream = [hidden_states, *layer.parameters()], torch.ones_like(hidden_states)

    def step():
        output, _ = layer(hidden_states, attention_mask, global_mask)
        return [output, *torch.autograd.grad(output, leaves, upstream)]

    assert all(tensor.is_cuda and tensor.isfinite().all() for tensor in capture(step))
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine)


def lists_of_a_window():
    return block_layout(SlidingWindow(30), 100, device="cuda").key_blocks


def lists_of_big_bird():
    return big_bird_layout(BigBird(16, 1), 200, device="cuda").key_blocks


def mask_of_a_window():
    query = torch.zeros(1, 1, 100, 32, device="cuda")
    return dense._pattern_mask(make_call(query, query, query, SlidingWindow(30)), 100)


@pytest.mark.parametrize("make", [lists_of_a_window, lists_of_big_bird, mask_of_a_window])
def test_what_a_graph_reads_outlives_its_cache(capture, make):
    caches = [cached_lists, cached_big_bird, dense._cached_mask]
    made = weakref.ref(make())
    for cache in caches:
        cache.cache_clear()  # as after very many other lengths
    gc.collect()
    assert made() is None
    read = weakref.ref(capture(make))
    for cache in caches:
        cache.cache_clear()
    gc.collect()
    assert read() is not None


@pytest.fixture
def gpu_tests(gpu_machine, monkeypatch):
    """The module of the tests for GPUs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "attention"))
    return importlib.import_module("test_gpu")


def test_the_tests_of_the_kernels_run(gpu_tests, gpu_machine):
    gpu_tests.test_cuda_kernels_are_as_exact_as_dense_attention(
        {
            "dtype": torch.bfloat16, "head_dim": 32, "query_block": 128, "length": 65,
            "padding": "left", "is_causal": False, "global_tokens": "few", "key_heads": 1,
            "extra": "none",
        }
    )  # fmt: skip
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine)


@pytest.mark.slow
def test_what_compute_sanitizer_looks_at_runs(gpu_tests, gpu_machine, capsys):
    gpu_tests.run_small_calls()
    assert "calls done" in capsys.readouterr().out
    assert {"forward", "row_sums", "grad_keys", "grad_queries"} <= set(gpu_machine)


@pytest.fixture
def benchmark(gpu_machine, monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_benchmark_of_the_operator_writes_what_it_timed_and_where(
    benchmark, monkeypatch, tmp_path
):
    operator = benchmark("attention_operator")
    monkeypatch.setattr(operator, "WINDOW", 64)
    monkeypatch.setattr(operator, "NUM_SELECTED", 1)
    monkeypatch.setattr(
        "sys.argv",
        ["", "--lengths", "2048", "--heads", "1", "--head-dim", "32", "--repeats", "1", "--dropout",
         "0", "--no-memory", "--results", str(tmp_path), "--names", "cuda", "blocked"],
    )  # fmt: skip
    args = operator.parse_arguments()
    assert (args.device, args.dtype) == ("cuda", "bfloat16")
    args.lengths = [256, 320]
    monkeypatch.setattr(operator, "parse_arguments", lambda: args)
    monkeypatch.setattr(operator, "verify", lambda args: {})
    assert operator.main() == 0
    written = json.loads((tmp_path / "attention_operator_cuda.json").read_text())
    assert written["environment"]["device"] == "Pretended GPU"
    assert (written["settings"]["device"], written["settings"]["dtype"]) == ("cuda", "bfloat16")
    assert len(written["cells"]) == 8 and all(cell["seconds"] > 0 for cell in written["cells"])
    table = (tmp_path / "attention_operator_cuda.txt").read_text()
    assert table.startswith("device Pretended GPU,") and "320" in table


@pytest.mark.parametrize("name", ["attention_speed", "model_throughput"])
def test_the_other_benchmarks_time_the_kernels(benchmark, gpu_machine, monkeypatch, name):
    module, contestants = benchmark(name), benchmark("side_by_side.contestants")
    monkeypatch.setattr("sys.argv", [""])
    args = module.parse_arguments()
    assert (args.device, args.dtype) == ("cuda", "bfloat16")
    shape = contestants.Shape(
        128, hidden_size=64, num_layers=1, num_heads=2, attention_window=64, vocab_size=50
    )
    where = (0.1, module.FORWARD_BACKWARD, torch.device("cuda"), args.dtype)
    call = module.make_call(module.OURS, shape, *where)
    assert module.interleaved_medians({"ours": call}, where[2], 1)["ours"] > 0
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine)
