import pytest
import torch
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface

import adaptive_longformer
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.modeling.integration.registration import (
    AUTO_MODELS,
    register_with_transformers,
)
from adaptive_longformer.testing import tiny_config, tiny_inputs, tiny_model


@pytest.mark.parametrize("auto_model", AUTO_MODELS, ids=lambda auto_model: auto_model.__name__)
def test_auto_classes_build_and_load_our_models(auto_model, tmp_path):
    model_class = AUTO_MODELS[auto_model]
    assert type(auto_model.from_config(tiny_config())) is model_class
    tiny_model(model_class).save_pretrained(tmp_path)
    assert type(auto_model.from_pretrained(tmp_path)) is model_class


def test_auto_config_knows_our_model_type():
    assert isinstance(AutoConfig.for_model("adaptive_sparse"), AdaptiveSparseConfig)


def test_attention_and_mask_are_registered_under_one_name():
    assert "adaptive_sparse" in AttentionInterface()
    assert "adaptive_sparse" in AttentionMaskInterface()


def test_registering_again_does_no_harm():
    register_with_transformers()
    register_with_transformers()


def test_public_names_are_sorted_and_exist():
    names = adaptive_longformer.__all__
    assert names == sorted(names)
    assert all(hasattr(adaptive_longformer, name) for name in names)


def test_model_runs_after_a_round_trip_through_the_device_map(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="cpu").eval()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        )
