import subprocess
import sys

import pytest
import torch

from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForSequenceClassification,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import AdaptiveSparseForCausalLM
from adaptive_longformer.testing import left_padded, tiny_inputs, tiny_model, vary_with_position

pytest.importorskip("peft")


PACKAGE = "from adaptive_longformer import AdaptiveSparseConfig, AdaptiveSparseModel"
PEFT = "from peft import LoraConfig, get_peft_model"
MODEL = """
config = AdaptiveSparseConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1,
                              num_attention_heads=2, intermediate_size=16)
model = AdaptiveSparseModel(config)
"""


@pytest.mark.parametrize(
    "lines",
    [
        (PACKAGE, "import sys; assert 'peft' not in sys.modules", PEFT, MODEL),
        (PEFT, PACKAGE, MODEL),
        (PACKAGE, MODEL, "import sys; assert 'peft' not in sys.modules", PEFT),
    ],
    ids=["package_first", "peft_first", "model_before_peft"],
)
def test_lora_needs_no_targets_in_any_order(lines):
    adapt = """
adapted = get_peft_model(model, LoraConfig())
print(sorted(adapted.peft_config["default"].target_modules))
"""
    script = "\n".join([*lines, adapt])
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "['query', 'value']", run.stderr


def test_add_adapter_of_transformers_needs_no_targets():
    from peft import LoraConfig

    model = tiny_model(AdaptiveSparseForSequenceClassification)
    model.add_adapter(LoraConfig())
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"query", "value"}


def test_targets_that_somebody_else_registered_stay():
    from peft.utils import constants

    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, "adaptive_sparse", ["key"])
        tiny_model().config.to_dict()
        assert table["adaptive_sparse"] == ["key"]


def test_every_method_that_knows_bert_knows_us():
    from peft.utils import constants

    tiny_model().config.to_dict()
    tables = {name: table for name, table in vars(constants).items() if "_MODULES_MAPPING" in name}
    knowing = {name: table for name, table in tables.items() if "bert" in table}
    assert len(knowing) > 5
    for name, table in tables.items():
        assert ("adaptive_sparse" in table) == (name in knowing), name


@pytest.mark.parametrize("method", ["IA3", "AdaLora", "Vera", "OFT"])
def test_methods_adapt_the_layers_that_they_adapt_in_bert(method):
    import peft
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    options = {"total_step": 10} if method == "AdaLora" else {}
    found = []
    for model in (BertModel(BertConfig(**sizes)), tiny_model(**sizes)):
        adapted = peft.get_peft_model(model, getattr(peft, f"{method}Config")(**options))
        names = adapted.targeted_module_names
        found.append(sorted(name.removesuffix(".dense").rpartition(".")[2] for name in names))
    assert found[1] == found[0] != []


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
