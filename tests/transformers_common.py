"""transformers' own common model tests on our classes: run by scripts/common_tests.py, which fetches their source.

None is left out by us. Two are overridden for hybrid models: one asks each layer for a map of attention, and one asks sdpa
for maps, which is refused. Those that skip themselves say why: they ask for attention, an accelerator, experts or a
tensor-parallel plan.
"""

import unittest

import pytest
import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers.models.auto import modeling_auto

from hf_lstm import (
    LSTMConfig,
    LSTMForCausalLM,
    LSTMForSequenceClassification,
    LSTMForTokenClassification,
    LSTMModel,
)

# A test that trains asks of classes without these entries that they compute a loss, or gives them no labels.
modeling_auto.MODEL_MAPPING_NAMES[LSTMConfig.model_type] = "LSTMModel"
for kind in ("SEQUENCE", "TOKEN"):
    names = getattr(modeling_auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES")
    names[LSTMConfig.model_type] = f"LSTMFor{kind.title()}Classification"


class LSTMTester:
    """What the mixin asks of a tester: a small config and a batch."""

    block = {}

    def __init__(self, parent):
        self.parent, self.is_training = parent, True
        self.batch_size, self.seq_length, self.hidden_size, self.num_hidden_layers = 5, 7, 32, 2

    def get_config(self):
        return LSTMConfig(vocab_size=99, hidden_size=self.hidden_size, num_hidden_layers=2, **self.block)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {"input_ids": ids_tensor(shape, 99), "attention_mask": random_attention_mask(shape)}


class ResidualTester(LSTMTester):
    block = {"block_type": "residual", "intermediate_size": 48}


class GRUTester(LSTMTester):
    block = {"cell_type": "gru", "output_bias": True}


class MogrifierTester(LSTMTester):
    block = {"cell_type": "mogrifier", "output_projection_size": 32}


class HybridTester(LSTMTester):
    block = {
        "block_type": "residual",
        "intermediate_size": 48,
        "layer_types": ["hf_lstm", "hf_lstm_window"],
        "attention_window": 5,
        "attn_implementation": "eager",  # for maps; the tests of other kinds of attention load it anew
        "num_attention_heads": 4,
    }


class ConcatTester(LSTMTester):
    block = {"classifier_pooling": "concat", "classifier_hidden_size": 16}


class HeadsTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LSTMForSequenceClassification, LSTMForTokenClassification)
    has_attentions = False
    lstm_tester = LSTMTester

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = self.lstm_tester(self)


class ConcatTest(HeadsTest):
    lstm_tester = ConcatTester


class StackedTest(HeadsTest, GenerationTesterMixin):
    all_model_classes = (LSTMModel, LSTMForCausalLM)


class ResidualTest(StackedTest):
    lstm_tester = ResidualTester


class GRUTest(StackedTest):
    lstm_tester = GRUTester


class MogrifierTest(StackedTest):
    lstm_tester = MogrifierTester


class HybridTest(StackedTest):
    lstm_tester = HybridTester
    has_attentions = True

    def test_attention_outputs(self):
        """One map for each layer of attention, over the tokens of the call."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for way in ("argument", "config"):
                model = model_class._from_config(config, attn_implementation="eager").eval()
                model.config.output_attentions = way == "config"
                options = {"output_attentions": True} if way == "argument" else {}
                with torch.no_grad():
                    outputs = model(**inputs, **options)
                assert [shares.shape for shares in outputs.attentions] == [(5, 4, 7, 7)]

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self):
        model = LSTMModel._from_config(self.model_tester.get_config(), attn_implementation="sdpa")

        with pytest.raises(ValueError, match="cannot be returned by the attention 'sdpa'"):
            model(torch.tensor([[5, 6]]), output_attentions=True)
