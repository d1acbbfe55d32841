import pytest
import torch

from adaptive_longformer.configuration.configuration_adaptive_sparse import (
    BASELINE_PATTERNS,
    SELECTING_PATTERNS,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
)
from adaptive_longformer.testing import tiny_adaptive_model, tiny_inputs, tiny_model

HEADS = (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
)
SMALL = {"block_size": 16}
# Every head once with a pattern, every pattern with at least two heads.
PAIRS = [
    (head, pattern)
    for index, head in enumerate(HEADS)
    for pattern in (
        BASELINE_PATTERNS[index % 3],
        ("random_selection", "oracle")[index % 2],
    )
]


@pytest.mark.parametrize("model_class, pattern", PAIRS)
def test_every_parameter_gets_a_gradient(model_class, pattern):
    make = tiny_adaptive_model if pattern in SELECTING_PATTERNS else tiny_model
    model = make(model_class, attention_pattern=pattern, **SMALL).train()
    model(**tiny_inputs(model, 150, with_labels=True)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # A pooler that the head does not read is no part of the pattern.
    assert [name for name in without if "pooler" not in name] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pattern", BASELINE_PATTERNS)
def test_baselines_are_saved_and_loaded(pattern, tmp_path):
    model = tiny_model(attention_pattern=pattern, **SMALL)
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(model, 100)
    with torch.no_grad():
        loaded = AdaptiveSparseModel.from_pretrained(tmp_path)
        assert torch.equal(model(**inputs)[0], loaded(**inputs)[0])


@pytest.mark.parametrize("pattern", BASELINE_PATTERNS)
def test_padding_behind_the_text_changes_nothing(pattern):
    model = tiny_model(attention_pattern=pattern, **SMALL)
    ids = tiny_inputs(model, 60, padding="none")["input_ids"]
    longer = torch.nn.functional.pad(ids, (0, 9), value=model.config.pad_token_id)
    mask = (torch.arange(69) < 60).long().expand(2, -1)
    with torch.no_grad():
        short = model(input_ids=ids)[0]
        long = model(input_ids=longer, attention_mask=mask)[0][:, :60]
    if pattern == "lsh":
        # Longer rows are cut into more chunks and may get more buckets: only the padding's
        # content must not matter.
        other = longer.masked_fill(mask == 0, 7)
        with torch.no_grad():
            long, short = long, model(input_ids=other, attention_mask=mask)[0][:, :60]
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)


def test_a_fresh_mix_is_the_sliding_window(tmp_path):
    window = tiny_model(attention_pattern="sliding_window")
    window.save_pretrained(tmp_path)
    mixed = AdaptiveSparseModel.from_pretrained(tmp_path, attention_pattern="window_linear")
    inputs = tiny_inputs(window, 100)
    with torch.no_grad():
        torch.testing.assert_close(mixed(**inputs)[0], window(**inputs)[0])
        for layer in mixed.layers:
            layer.attention.baseline.linear_share.fill_(1.0)
        linear = AdaptiveSparseModel.from_pretrained(tmp_path, attention_pattern="linear")
        torch.testing.assert_close(mixed(**inputs)[0], linear(**inputs)[0])


def test_the_oracle_and_the_selection_agree_where_there_is_little_to_choose():
    """With room for every block all three ways of choosing read everything."""
    outputs = []
    for pattern in SELECTING_PATTERNS:
        model = tiny_adaptive_model(attention_pattern=pattern, num_selected_blocks=12)
        with torch.no_grad():
            for layer in model.layers:
                layer.attention.adaptive.budget.fill_(1.0)
            outputs.append(model(**tiny_inputs(model, 150))[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", BASELINE_PATTERNS)
def test_probabilities_are_refused(pattern):
    model = tiny_model(attention_pattern=pattern, **SMALL)
    with pytest.raises(ValueError, match=f"attention_pattern '{pattern}' has no probabilities"):
        model(**tiny_inputs(model, 20), output_attentions=True)
