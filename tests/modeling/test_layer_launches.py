"""How many kernels an adaptive layer launches on a GPU, and that it never waits for the device."""

import pytest
import torch
from launches import launches
from triton_on_cpu import needs_triton

from adaptive_longformer.attention.backends.choose import BACKENDS
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.attention_layer import AdaptiveSparseAttention, layer_masks

pytestmark = needs_triton

# What a layer knows about its parameters on the host, as `HeadBudgets` reads it once.
KNOWN = {"strength": True, "head_budgets": 2**31 - 1, "span": False, "head_windows": False}


# Without masks 4 and 18 are of the projections, and 2 of the test. With masks most are small ones,
# of the rows of global queries. To be lowered, never raised.
@pytest.mark.parametrize("has_masks, forward, in_all", [(False, 12, 42), (True, 42, 109)])
def test_a_training_step_of_a_layer(has_masks, forward, in_all, monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(unsupported=lambda _: None))
    config = AdaptiveSparseConfig(
        attention_pattern="adaptive",
        selection_strength=1.0,
        max_global_tokens=16,
        attention_backend="triton",
        attention_probs_dropout_prob=0.0,
    )
    layer = AdaptiveSparseAttention(config, 0).to("meta", torch.bfloat16)
    assert layer.adaptive is not None
    monkeypatch.setattr(layer.adaptive, "_on_host", lambda name, read, safe: KNOWN[name])
    hidden_states = torch.empty(1, 4096, config.hidden_size, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 4096, dtype=torch.bool, device="meta") if has_masks else None
    with launches() as counts:
        # Once for all layers of a model.
        masks = layer_masks([layer], hidden_states, mask, mask)
        of_masks = counts.total()
        context, _ = layer(hidden_states.requires_grad_(), masks)
        assert counts["attention_forward"] == counts["masses_kernel"] == 1
        assert of_masks <= (29 if has_masks else 0), counts
        assert counts.total() - of_masks <= forward, counts
        context.sum().backward()
    assert counts.total() - of_masks <= in_all, counts
