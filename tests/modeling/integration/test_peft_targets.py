import subprocess
import sys

import pytest
import torch

from adaptive_longformer.modeling.integration.peft_targets import register_peft_targets
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForSequenceClassification,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import left_padded, tiny_inputs, tiny_model, vary_with_position

pytest.importorskip("peft")


def test_targets_are_known_when_peft_is_imported_later():
    script = """
import sys
import adaptive_longformer
assert "peft" not in sys.modules
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping
print(mapping["adaptive_sparse"], len(mapping) > 10)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "['query', 'value'] True", run.stderr


def test_targets_are_known_when_peft_is_imported_already():
    from peft.utils import constants

    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    mapping.pop("adaptive_sparse", None)
    register_peft_targets()
    assert mapping["adaptive_sparse"] == ["query", "value"]


def test_lora_adapts_queries_and_values_by_default_and_trains():
    from peft import LoraConfig, get_peft_model

    model = tiny_model(AdaptiveSparseForSequenceClassification, separate_global_projections=True)
    inputs = tiny_inputs(model, with_labels=True)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS")).train()
    adapted(**inputs).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert {name.split(".")[-4] for name in trained if "lora_" in name} == {"query", "value"}
    assert any("classifier" in name for name in trained)


def test_lora_on_global_projections_changes_the_output():
    from peft import LoraConfig, get_peft_model

    targets = ["query_global", "key_global", "value_global"]
    model = tiny_model(separate_global_projections=True)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        adapted = get_peft_model(model, LoraConfig(target_modules=targets)).eval()
        unchanged = adapted(**inputs).last_hidden_state
        torch.testing.assert_close(unchanged, expected, atol=1e-5, rtol=1e-5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert (adapted(**inputs).last_hidden_state - expected).abs().max() > 0.01


def test_generation_after_a_learned_prefix_equals_recomputation():
    from peft import PrefixTuningConfig, get_peft_model

    model = vary_with_position(tiny_model(AdaptiveSparseForCausalLM, eos_token_id=None))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = get_peft_model(model, config).eval()
    input_ids, mask = left_padded([40, 25])
    found = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False
    )
    for length in range(40, 48):
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=mask).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        assert torch.equal(found[:, : length + 1], input_ids)
