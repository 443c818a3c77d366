"""transformers' own tests of a model, run unchanged on its GPT-2 and on hfgpt; see `make upstream`.

hfgpt must fail nowhere, and skip nothing that GPT-2 does not skip, but for what `HFGPTTest` leaves out by name.
"""

import unittest

import torch
import transformers
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

from hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import AUTO_CLASSES

# The package `tests` is what fetch.py made, not the folder this file is in.
from tests import test_fsdp_mixin, test_tensor_parallel_mixin

# transformers runs these for a few of its models only, to save time.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class TinyModel:
    """What transformers' tests ask of a model tester: a small config, a batch, and the names of both."""

    def __init__(self, config_class, causal_lm_class):
        self.config_class, self.causal_lm_class = config_class, causal_lm_class
        self.sequence_classification_class = None
        self.batch_size, self.seq_length = 14, 7
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 2
        self.is_training = True

    def get_config(self):
        return self.config_class(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            n_inner=37,
            max_position_embeddings=512,
            # Processes that share one model draw other dropout than a process alone.
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class UpstreamTests(ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin):
    all_generative_model_classes = ()
    pipeline_model_mapping = {}
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self):
        self.model_tester = TinyModel(self.config_class, self.all_model_classes[1])


class GPT2Test(UpstreamTests, unittest.TestCase):
    config_class = transformers.GPT2Config
    all_model_classes = (
        transformers.GPT2Model,
        transformers.GPT2LMHeadModel,
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2ForTokenClassification,
        transformers.GPT2ForQuestionAnswering,
    )


class HFGPTTest(UpstreamTests, unittest.TestCase):
    config_class = HFGPTConfig
    all_model_classes = tuple(AUTO_CLASSES.values())

    def test_bc_cache_name_forward(self):
        self.skipTest("wants a deprecation warning for `past_key_values`, which hfgpt takes for good")
