"""Transformers' own tests of models and configurations, run on ours."""

import unittest

import pytest
import torch
from left_out import LEFT_OUT
from transformers_tests import load

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseForCausalLM,
)
from adaptive_longformer.testing import (
    MODEL_CLASSES,
    SEQ2SEQ_MODEL_CLASSES,
    tiny_config,
    tiny_seq2seq_config,
)

try:
    common, configuration = load("test_modeling_common", "test_configuration_common")
except OSError as error:
    pytest.skip(str(error), allow_module_level=True)

ADAPTIVE = {
    "attention_pattern": "adaptive",
    "block_size": 8,
    "query_block_size": 8,
    "num_selected_blocks": 2,
    "selection_strength": 1.0,
}


class Tester:
    """What Transformers' tests ask for; `config` makes the configuration."""

    batch_size, seq_length, num_choices, is_training = 3, 40, 3, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, config):
        self.get_config = config

    def prepare_config_and_inputs_for_common(self):
        config, generator = self.get_config(), torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(5, config.vocab_size, shape, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][1, 30:] = 0
        if config.is_encoder_decoder:
            ids[:, 25] = config.eos_token_id
            inputs["decoder_input_ids"] = ids.flip(1)
        return config, inputs


class ModelTests(common.ModelTesterMixin):
    def setUp(self):
        self.model_tester = Tester(self.config)

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if model_class is AdaptiveSparseForMultipleChoice and return_labels:
            inputs["labels"] = torch.ones(self.model_tester.batch_size, dtype=torch.long)
        return inputs


for name in dir(ModelTests):
    if name.startswith(tuple(LEFT_OUT)):
        setattr(ModelTests, name, None)


class LongformerTest(ModelTests, unittest.TestCase):
    all_model_classes = MODEL_CLASSES

    @staticmethod
    def config():
        return tiny_config(attention_window=16, separate_global_projections=True)


class BigBirdTest(ModelTests, unittest.TestCase):
    all_model_classes = (AdaptiveSparseModel, AdaptiveSparseForMaskedLM)

    @staticmethod
    def config():
        return tiny_config(attention_pattern="big_bird", block_size=8, num_random_blocks=1)


class AdaptiveTest(ModelTests, unittest.TestCase):
    all_model_classes = (AdaptiveSparseModel, AdaptiveSparseForMaskedLM)

    @staticmethod
    def config():
        return tiny_config(attention_window=16, **ADAPTIVE)


class CausalTest(ModelTests, unittest.TestCase):
    all_model_classes = (AdaptiveSparseForCausalLM,)

    @staticmethod
    def config():
        return tiny_config(attention_window=16)


class AdaptiveCausalTest(ModelTests, unittest.TestCase):
    all_model_classes = (AdaptiveSparseForCausalLM,)

    @staticmethod
    def config():
        return tiny_config(attention_window=16, **ADAPTIVE)


class Seq2SeqTest(ModelTests, unittest.TestCase):
    all_model_classes = SEQ2SEQ_MODEL_CLASSES
    is_encoder_decoder = True

    @staticmethod
    def config():
        return tiny_seq2seq_config(attention_window=16, decoder_attention_heads=4)


class ConfigurationTest(unittest.TestCase):
    def test_encoder(self):
        configuration.ConfigTester(self, AdaptiveSparseConfig, hidden_size=36).run_common_tests()

    def test_encoder_decoder(self):
        configuration.ConfigTester(self, AdaptiveSparseSeq2SeqConfig, d_model=36).run_common_tests()


del ModelTests


def test_every_test_that_is_left_out_exists():
    names = [name for name in dir(common.ModelTesterMixin) if name.startswith("test_")]
    for beginning in LEFT_OUT:
        assert any(name.startswith(beginning) for name in names), beginning
