"""The selection in the encoder of an encoder-decoder."""

import pytest
import torch

from adaptive_longformer.modeling.adaptive_selection import selections, set_selection_strength
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)
from adaptive_longformer.testing import tiny_seq2seq_inputs, tiny_seq2seq_model
from adaptive_longformer.training.calibration import calibrate

SELECTION = {
    "attention_pattern": "adaptive",
    "block_size": 16,
    "query_block_size": 16,
    "num_selected_blocks": 3,
}


def adaptive_from(folder, **overrides):
    return AdaptiveSparseForConditionalGeneration.from_pretrained(
        folder, **SELECTION, **overrides
    ).eval()


@pytest.fixture(params=["post", "pre"])
def source(request, tmp_path):
    model = tiny_seq2seq_model(AdaptiveSparseForConditionalGeneration, norm_style=request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_without_strength_it_is_the_source_bit_for_bit(source):
    model, folder = source
    inputs = tiny_seq2seq_inputs(model, 150)
    with torch.no_grad():
        assert torch.equal(adaptive_from(folder)(**inputs).logits, model(**inputs).logits)


def test_with_strength_every_parameter_learns_and_the_choice_is_read(source):
    model, folder = source
    adaptive = adaptive_from(folder, target_density=0.5)
    inputs = tiny_seq2seq_inputs(model, 150)
    with torch.no_grad():
        before = adaptive(**inputs).logits
        set_selection_strength(adaptive, 1.0)
        assert not torch.allclose(adaptive(**inputs).logits, before)
    adaptive.train()
    adaptive(**tiny_seq2seq_inputs(model, 150, with_labels=True)).loss.backward()
    assert [n for n, p in adaptive.named_parameters() if p.grad is None] == []
    # The density is pressed through the loss of this head too.
    assert all(part.price > 0 for part in selections(adaptive))


def test_generation_reads_the_choice_and_is_saved(source, tmp_path):
    model, folder = source
    adaptive = adaptive_from(folder, selection_strength=1.0)
    inputs = tiny_seq2seq_inputs(model, 150)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    written = adaptive.generate(**inputs, **options)
    adaptive.save_pretrained(tmp_path / "saved")
    loaded = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded.generate(**inputs, **options), written)
    assert [float(part.strength) for part in selections(loaded)] == [1.0] * len(selections(loaded))


@pytest.mark.parametrize("pattern", ["linear", "window_linear", "lsh", "oracle"])
def test_the_baselines_run_in_the_encoder(pattern):
    model = tiny_seq2seq_model(
        AdaptiveSparseForConditionalGeneration, **{**SELECTION, "attention_pattern": pattern}
    )
    with torch.no_grad():
        assert model(**tiny_seq2seq_inputs(model, 100)).logits.isfinite().all()


def test_calibrated_budgets_and_windows_are_saved_with_the_encoder(source, tmp_path):
    model, folder = source
    adaptive = adaptive_from(folder, selection_strength=1.0, attention_window=128)
    inputs = tiny_seq2seq_inputs(model, 200)
    with torch.no_grad():
        for part in selections(adaptive):
            part.span.fill_(0.1)  # of 64 tokens, and 32 to fade out
            part.budget.fill_(0.0)
        expected = adaptive(**inputs).logits
        result = calibrate(adaptive, [inputs])
        assert (result.head_budgets, result.head_windows) == ([[1] * 4] * 2, [[38] * 4] * 2)
        assert torch.equal(adaptive(**inputs).logits, expected)
        adaptive.save_pretrained(tmp_path / "saved")
        loaded = AdaptiveSparseForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
        assert loaded.config.head_windows == result.head_windows
        assert torch.equal(loaded(**inputs).logits, expected)
