"""Models on a pretended GPU: they train and generate through the CUDA kernels, run in the emulator,
and no operation gets tensors of two devices.
"""

import pytest
import torch
from pretended_gpu import GpuTensor

from adaptive_longformer import (
    AdaptiveSparseConfig,
    AdaptiveSparseForCausalLM,
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.attention import explain_backends, sparse_attention
from adaptive_longformer.patterns import SlidingWindow, Strided, block_layout
from adaptive_longformer.testing import randomize_all_parameters

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "attention_window": 64,
    "max_position_embeddings": 400,
    "pad_token_id": 1,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
ADAPTIVE = {
    "attention_pattern": "adaptive",
    "block_size": 64,
    "query_block_size": 64,
    "selection_strength": 1.0,
    "num_selected_blocks": 2,
}


def on_gpu(model, inputs):
    """A copy of a model on the GPU, and the inputs there."""
    twin = type(model)(model.config).to(model.dtype)
    twin.load_state_dict(model.state_dict())
    # torch keeps ties only where it can replace the elements of a parameter.
    twin.cuda().tie_weights()
    return twin.train(model.training), {name: tensor.cuda() for name, tensor in inputs.items()}


def documents(length=140):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 50, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length - 60 :] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def gradients(model, inputs):
    """The loss of a training step and all gradients."""
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def assert_same_gradients(actual, expected):
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
            continue
        assert actual[name].is_cuda, name
        # No weight depends on what is added to all keys: that gradient is rounding alone.
        limit = 1e-3 if name.endswith("key.bias") else 0.05 * value.float().norm()
        assert (actual[name].cpu().float() - value.float()).norm() <= limit, name


def test_tensors_of_two_devices_are_refused(gpu_machine):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda") + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2)[torch.zeros(2, dtype=torch.long, device="cuda")]
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()
    total = (torch.arange(3.0, device="cuda") * torch.tensor(2.0)).sum()
    assert isinstance(total, GpuTensor) and total.is_cuda and total.item() == 6.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_pattern": "big_bird"},
        {"attention_pattern": "strided"},
        {"attention_pattern": "lsh"},
        {"attention_pattern": "window_linear"},
        ADAPTIVE,
        {**ADAPTIVE, "num_learned_global_blocks": 1, "max_global_tokens": 2},
        {**ADAPTIVE, "residual_rank": 2, "target_density": 0.3},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "longformer",
)
def test_a_model_trains_on_a_gpu_as_on_the_cpu(gpu_machine, options):
    config = AdaptiveSparseConfig(**{**SIZES, **options})
    # At their start the parameters are so small that rounding is all there is to some gradients.
    model = randomize_all_parameters(AdaptiveSparseForMaskedLM(config)).bfloat16()
    inputs = documents()
    inputs["labels"] = inputs["input_ids"]
    twin, moved = on_gpu(model, inputs)
    expected, actual = gradients(model, inputs), gradients(twin, moved)
    has_own_kernel = config.attention_pattern not in ("strided", "lsh")
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine) or not has_own_kernel
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_first_step_with_gradient_checkpointing_equals_one_without(gpu_machine, use_reentrant):
    """The kernels are checked inside of the first layer that is checkpointed."""
    torch.manual_seed(0)
    model = AdaptiveSparseForMaskedLM(AdaptiveSparseConfig(**SIZES)).bfloat16()
    inputs = documents()
    inputs["labels"] = inputs["input_ids"]
    twin, moved = on_gpu(model, inputs)
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(twin, moved)
    assert gpu_machine.count("grad_keys") == 2  # of the self-test and of the layer
    twin.gradient_checkpointing_disable()
    twin.zero_grad()
    for name, expected in gradients(twin, moved).items():
        assert torch.equal(checkpointed[name].cpu(), expected.cpu()), name


def test_deterministic_algorithms_can_be_asked_for(gpu_machine):
    torch.manual_seed(0)
    model = AdaptiveSparseForMaskedLM(AdaptiveSparseConfig(**SIZES, **ADAPTIVE)).bfloat16()
    inputs = documents()
    inputs["labels"] = inputs["input_ids"]
    twin, moved = on_gpu(model, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="cumsum_cuda_kernel"):
            torch.ones(3, device="cuda").cumsum(0)
        found = gradients(twin, moved)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found["loss"].cpu().isfinite() and "grad_keys" in gpu_machine


REFUSED = {
    "head_dim 40 is not one of": {"head_dim": 40},
    "float32 is not one of bfloat16 and float16": {"dtype": torch.float32},
    "blocks of 16 x 64 tokens": {"query_block_size": 16},
    "blocks of 64 x 32 tokens": {"key_block_size": 32},
    "batch x heads is 65536 x 1, at most 65535": {"batch": 65536},
    "is not made of whole blocks": {"pattern": Strided(12)},
    "scale is -1.0, a number above 0 is needed": {"scale": -1.0},
    "capability 7.5, 8.0 is needed": {"gpu": {"major": 7, "minor": 5}},
    "bytes of shared memory are needed, the device has 101376": {
        "head_dim": 128, "query_block_size": 128, "gpu": {"shared_memory_per_block_optin": 101376},
    },
}  # fmt: skip


@pytest.mark.parametrize(("reason", "change"), REFUSED.items(), ids=REFUSED)
def test_what_the_kernels_cannot_run_has_a_reason_and_another_backend(
    gpu_machine, monkeypatch, reason, change
):
    sizes = {
        "batch": 1, "head_dim": 32, "dtype": torch.bfloat16, "pattern": SlidingWindow(30),
        "query_block_size": 64, "key_block_size": 64, "gpu": {}, "scale": None, **change,
    }  # fmt: skip
    gpu = torch.cuda.get_device_properties(0)
    for name, value in sizes["gpu"].items():
        monkeypatch.setattr(gpu, name, value)
    query = torch.zeros(sizes["batch"], 1, 70, sizes["head_dim"], dtype=sizes["dtype"])
    query = query.cuda()
    lists = block_layout(
        sizes["pattern"], 70, query_block_size=sizes["query_block_size"],
        key_block_size=sizes["key_block_size"], device="cuda",
    )  # fmt: skip
    reasons = explain_backends(query, query, query, lists, scale=sizes["scale"])
    assert reason in (reasons["cuda"] or "") and reasons["blocked"] is None
    with pytest.raises(ValueError, match="'cuda' cannot run this call"):
        sparse_attention(query, query, query, lists, scale=sizes["scale"], backend="cuda")
    assert not gpu_machine


def generated(model, inputs, **options):
    model.eval()
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, **options)


@pytest.mark.parametrize("options", [{}, ADAPTIVE], ids=["window", "adaptive"])
def test_a_causal_model_trains_and_generates_on_a_gpu(gpu_machine, options):
    torch.manual_seed(0)
    config = AdaptiveSparseConfig(**{**SIZES, **options}, is_decoder=True)
    model = randomize_all_parameters(AdaptiveSparseForCausalLM(config)).bfloat16()
    inputs = documents(150)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # generation pads on the left
    twin, moved = on_gpu(model, inputs)
    step = {**inputs, "labels": inputs["input_ids"]}
    expected = gradients(model, step)
    actual = gradients(twin, {name: tensor.cuda() for name, tensor in step.items()})
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine)
    assert_same_gradients(actual, expected)
    answer = generated(twin, moved)
    assert answer.is_cuda and answer.shape == (2, 153)
    assert torch.equal(answer.cpu()[:, :150], inputs["input_ids"])


def test_an_encoder_decoder_trains_and_generates_on_a_gpu(gpu_machine):
    torch.manual_seed(0)
    config = AdaptiveSparseSeq2SeqConfig(
        vocab_size=50, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=64,
        max_encoder_position_embeddings=400, max_decoder_position_embeddings=40, pad_token_id=1,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = randomize_all_parameters(AdaptiveSparseForConditionalGeneration(config)).bfloat16()
    inputs = documents(150)
    twin, moved = on_gpu(model, inputs)
    step = {**inputs, "labels": inputs["input_ids"][:, :7]}
    expected = gradients(model, step)
    actual = gradients(twin, {name: tensor.cuda() for name, tensor in step.items()})
    assert {"forward", "grad_keys", "grad_queries"} <= set(gpu_machine)
    assert_same_gradients(actual, expected)
    answer = generated(twin, moved, num_beams=2, use_cache=True)
    assert answer.is_cuda and len(answer) == 2
