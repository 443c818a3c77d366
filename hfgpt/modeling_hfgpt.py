"""What it takes to make a PyTorch GPT a transformers model; the GPT itself is in gpt.py.

Read it as a list of what transformers wants, in the order in which it is needed: a block that can be checkpointed, a
base class with what the model supports, the model, its heads, and the names under which tools look for it.

This file, gpt.py, loss.py, loss_triton.py, positions.py, arguments.py and configuration_hfgpt.py travel to the Hub with
the weights and run where hfgpt is not installed, so they import one another by `from .x import y` only.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_peft_available
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments import CACHE, check_arguments, take_cache, with_both_cache_names, withhold_cache
from .configuration_hfgpt import GPT2_SOURCE, HFGPTConfig
from .gpt import Block, CausalSelfAttention, eager_attention, init_std
from .loss import IGNORE_INDEX, linear_cross_entropy, shift_left
from .positions import check_positions_exist, count_positions, find_documents, is_only_causal


class HFGPTBlock(GradientCheckpointingLayer, Block):
    """A `Block` whose activations can be dropped and computed again in the backward pass."""

    # Or transformers 5.23 takes the cache away without gradients too; with them `HFGPTModel` withholds it.
    _can_checkpoint_with_cache = True


class HFGPTPreTrainedModel(PreTrainedModel):
    """What every hfgpt model can do, in the words in which transformers asks for it."""

    config: HFGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HFGPTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HFGPTBlock, "attentions": CausalSelfAttention}
    # The causal masks that old GPT-2 files hold as buffers. The dot before `attn` spares `c_attn.bias`.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of one module as gpt.py's `GPT` does: one seed gives both the same tensors."""
        if not isinstance(module, nn.Linear | nn.Embedding):
            super()._init_weights(module)
            return
        name = next((name for name, candidate in self.named_modules() if candidate is module), "")
        init.normal_(module.weight, mean=0.0, std=init_std(name, self.config))
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load hfgpt or GPT-2 weights, from a folder or the Hub; see transformers' `from_pretrained`.

        Raises:
            WeightsDoNotFitError: tensors are missing, left over or of another shape than the config says. Pass
                `state_dict`, `output_loading_info=True` or `ignore_mismatched_sizes=True` to take them as transformers
                does.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        lenient = wants_info or kwargs.get("state_dict") is not None or kwargs.get("ignore_mismatched_sizes", False)
        if not lenient:
            kwargs["ignore_mismatched_sizes"] = True  # so that the refusal below can name tensors and shapes
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if not lenient:
            check_all_tensors_loaded(model, info, pretrained_model_name_or_path)
        if model.config.model_type == GPT2_SOURCE:
            del model.config.__dict__["model_type"]
            model._weight_conversions = []  # what is saved from now on has hfgpt's own layout
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(model, *args, **kwargs):
        if model.config.model_type == GPT2_SOURCE and GPT2_SOURCE not in USER_REGISTERED_MAPPINGS:
            raise ValueError("these are GPT-2 files. Install hfgpt, and `import hfgpt`, to import them.")
        return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save weights, config and the code that runs them without hfgpt; see transformers' `save_pretrained`."""
        # A model made from a GPT-2 config still carries the mark, by which transformers would write GPT-2's layout.
        self.config.__dict__.pop("model_type", None)
        self.config.auto_map = dict(AUTO_MAP)
        dressed = type(self)
        # FSDP2 puts a class of its own before the model's; transformers (5.23) would copy the code of that, torch's.
        self.__class__ = next(each for each in dressed.__mro__ if not each.__module__.startswith("torch."))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = dressed


class WeightsDoNotFitError(ValueError, RuntimeError):
    """A file and a config that do not belong together: hfgpt's ValueError, where transformers has a RuntimeError."""


def check_all_tensors_loaded(model: PreTrainedModel, info: dict[str, Any], source: Any) -> None:
    """Check that every tensor of the file went into the model, and every tensor of the model came from the file.

    A new head may be put on a body, and a body be taken out from under another head: the parameters of a head may have
    no counterpart. Only a missing `lm_head` is refused, which nothing would train before it is used.

    Raises:
        WeightsDoNotFitError: naming the first tensor for which the two disagree, and how many more there are.
    """
    prefix = model.base_model_prefix + "."
    is_base = not hasattr(model, model.base_model_prefix)
    missing = [
        key
        for key in info["missing_keys"]
        if (is_base or key.startswith((prefix, "lm_head"))) and key not in model.all_tied_weights_keys
    ]
    heads_here = {name for name, _ in model.named_children()}
    left_over = [key for key in info["unexpected_keys"] if key.partition(".")[0] not in HEADS - heads_here]
    faults = [
        f"{name}: in the file {tuple(there)}, in the model {tuple(here)}"
        for name, there, here in sorted(info["mismatched_keys"])
    ]
    faults += [f"{name}: not in the file" for name in sorted(missing)]
    faults += [f"{name}: in the file, not in the model" for name in sorted(left_over)]
    faults += info["error_msgs"]
    head = model.get_output_embeddings()
    is_tied = model.config.tie_word_embeddings and isinstance(head, nn.Linear)  # a pipeline's first stage has no head
    if is_tied and head.weight is not model.get_input_embeddings().weight:
        faults.append("lm_head.weight: in the file, and not the token embedding, though `tie_word_embeddings` is true")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WeightsDoNotFitError(f"{source}: the weights do not fit the config. {faults[0]}{more}.")


def without_cache_in_training(forward: Callable) -> Callable:
    """Let `use_cache=None` mean False in training, where copies of all keys and values would stay, for nothing."""

    @wraps(forward)
    def wrapper(self, *args, use_cache: bool | None = None, **kwargs):
        return forward(self, *args, use_cache=False if use_cache is None and self.training else use_cache, **kwargs)

    return wrapper


class HFGPTModel(HFGPTPreTrainedModel):
    """The GPT without a head: token ids to hidden states."""

    def __init__(self, config: HFGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(HFGPTBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @without_cache_in_training
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Turn tokens into hidden states.

        Args:
            input_ids: (B, T) token ids. Give these or `inputs_embeds`.
            attention_mask: (B, S), 1 for tokens and 0 for padding on either side; or (B, 1, T, S) as `attend` takes it.
            position_ids: (B, T) positions from 0. Where they do not go on by one, a new document begins that sees
                nothing before it, unless a (B, 1, T, S) mask says otherwise or the cache holds what came before. None
                counts the unmasked tokens.
            past_key_values: keys and values of what came before; `cache` from transformers 5.24 on.
            inputs_embeds: (B, T, C) token embeddings in place of `input_ids`.
            use_cache: whether to return keys and values; None asks the config, or in training returns none.
            cache: another name of `past_key_values`. Give one of them.
            token_type_ids: (B, T) ids whose token embeddings are added, as in GPT-2.
            **kwargs: what transformers itself hands on, to the attention function; see `check_arguments`.

        Returns:
            `last_hidden_state` (B, T, C) after the last norm, and `past_key_values` or `cache`, as the installed
            transformers calls it.

        Raises:
            TypeError: an argument that nothing reads.
            ValueError: both or neither of `input_ids` and `inputs_embeds`; two caches; more tokens than positions;
                documents in one row that the attention implementation cannot keep apart; a cache that holds tokens,
                with gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give `input_ids` or `inputs_embeds`, one of them.")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        check_arguments(kwargs, attend, HFGPTForCausalLM.forward)
        past_key_values = take_cache(past_key_values, cache, kwargs)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            withhold_cache(past_key_values)
            past_key_values = None
        x_BTC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # Documents are told apart by the positions the caller gave, never by those derived from a padding mask.
        documents_BS = find_documents(
            self.config._attn_implementation, x_BTC, attention_mask, position_ids, past_key_values, kwargs
        )
        mask = None
        if not is_only_causal(self.config, attention_mask, past_key_values, documents_BS):
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_BTC,
                attention_mask=attention_mask,
                and_mask_function=None if documents_BS is None else packed_sequence_mask_function(documents_BS),
                **{CACHE: past_key_values},
            )
        if position_ids is None:
            position_ids = count_positions(x_BTC, attention_mask, past_key_values)
        check_positions_exist(position_ids, past_key_values, self.config.max_position_embeddings)
        # A cache made here comes after the mask: it would hide from transformers that this is one whole pass.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # A later stage of a pipeline has no first block; its `inputs_embeds` are hidden states of the stage before.
        if not isinstance(self.layers[0], nn.Identity):
            x_BTC = x_BTC + self.embed_positions(position_ids)
            if token_type_ids is not None:
                x_BTC = x_BTC + self.embed_tokens(token_type_ids)
            x_BTC = F.dropout(x_BTC, p=self.config.embd_pdrop, training=self.training)
        for block in self.layers:
            x_BTC = block(
                x_BTC,
                attention_mask=mask,
                past_key_values=past_key_values,
                attend=attend,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTC), **{CACHE: past_key_values})


class HFGPTForCausalLM(HFGPTPreTrainedModel, GenerationMixin):
    """The GPT with the head that scores every next token: pretraining and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HFGPTConfig) -> None:
        super().__init__(config)
        self.model = HFGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,  # not False: a pipeline hands every default that is not None to the body
        cache: Cache | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Score every next token, and the whole sequence if there are labels.

        Args:
            input_ids: see `HFGPTModel.forward`.
            attention_mask: see `HFGPTModel.forward`.
            position_ids: see `HFGPTModel.forward`.
            past_key_values: see `HFGPTModel.forward`.
            inputs_embeds: see `HFGPTModel.forward`.
            labels: (B, T) the tokens themselves, -100 where nothing is to be predicted; they are shifted here.
                `shift_labels`, in which place t holds the target of position t, takes their place if it is given.
            use_cache: whether to return keys and values; None asks the config, or in training returns none.
            logits_to_keep: make logits of the last so many positions only; 0 makes all.
            skip_logits: whether to make the loss without ever holding all logits; `logits` is then None. None: not.
            cache: see `HFGPTModel.forward`.
            token_type_ids: see `HFGPTModel.forward`.
            **kwargs: `shift_labels`; `num_items_in_batch`, what the summed loss is divided by (default: the number of
                targets); `ignore_index` in place of -100; the rest as in `HFGPTModel.forward`.

        Returns:
            `loss` in nats per token, `logits` (B, T, V), the cache as in `HFGPTModel.forward`.
        """
        shift_labels, ignore_index = kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", IGNORE_INDEX)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        hidden_BTC = outputs.last_hidden_state
        targets = shift_left(labels) if shift_labels is None and labels is not None else shift_labels

        loss = logits = None
        if skip_logits and targets is not None:
            if ignore_index != IGNORE_INDEX:
                targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
            loss = linear_cross_entropy(hidden_BTC, self.lm_head.weight, targets, kwargs.get("num_items_in_batch"))
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_BTC, logits_to_keep))
            if targets is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    shift_labels=None if shift_labels is None else shift_labels.contiguous(),  # it takes a view
                    vocab_size=self.config.vocab_size,
                    ignore_index=ignore_index,
                    **kwargs,
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


class HFGPTForSequenceClassification(HFGPTPreTrainedModel):
    """The GPT with a classifier, or regressor, of whole texts: it reads the last token, which has seen all others."""

    def __init__(self, config: HFGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HFGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Score every label of each row.

        Args:
            input_ids: see `HFGPTModel.forward`.
            attention_mask: see `HFGPTModel.forward`. It also marks the last token of a row; without it, every token
                but `pad_token_id` counts.
            position_ids: see `HFGPTModel.forward`.
            past_key_values: see `HFGPTModel.forward`.
            inputs_embeds: see `HFGPTModel.forward`.
            labels: (B,) class ids, or numbers if `num_labels` is 1; (B, L) for several labels at once.
            use_cache: see `HFGPTModel.forward`.
            cache: see `HFGPTModel.forward`.
            **kwargs: see `HFGPTModel.forward`.

        Returns:
            `loss` by `config.problem_type`, `logits` (B, L), the cache as in `HFGPTModel.forward`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_BTC = outputs.last_hidden_state
        last_B = find_last_tokens(hidden_BTC, input_ids, attention_mask, self.config.pad_token_id)
        rows_B = torch.arange(hidden_BTC.shape[0], device=hidden_BTC.device)
        logits_BL = self.score(hidden_BTC[rows_B, last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BL, labels=labels, pooled_logits=logits_BL, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits_BL,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


def find_last_tokens(
    hidden_BTC: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """Find the place of each row's last token that is not padding: (B,).

    The mask knows best: a text may end with the very token that also pads. Without mask and pad token, rows are full.
    """
    rows, length, _ = hidden_BTC.shape
    if attention_mask is not None and attention_mask.ndim == 2:
        is_token_BT = attention_mask[:, -length:] != 0
    elif input_ids is not None and pad_token_id is not None:
        is_token_BT = input_ids != pad_token_id
    else:
        is_token_BT = hidden_BTC.new_ones((rows, length), dtype=torch.bool)
    places_T = torch.arange(length, device=hidden_BTC.device)
    return (places_T * is_token_BT.to(hidden_BTC.device)).argmax(dim=-1)


class HFGPTForTokenClassification(GenericForTokenClassification, HFGPTPreTrainedModel):
    """The GPT with a classifier of every token, which knows only the tokens before it."""

    forward = with_both_cache_names(GenericForTokenClassification.forward)

    def __init__(self, config: HFGPTConfig) -> None:
        # Not transformers' own constructor: it makes the body by AutoModel, which does not know remote code.
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HFGPTModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HFGPTForQuestionAnswering(GenericForQuestionAnswering, HFGPTPreTrainedModel):
    """The GPT with two scores for every token: is it where the answer starts, and is it where it ends?"""

    forward = with_both_cache_names(GenericForQuestionAnswering.forward)

    def __init__(self, config: HFGPTConfig) -> None:
        PreTrainedModel.__init__(self, config)  # as above
        self.model = HFGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


HEADS = {"lm_head", "score", "qa_outputs"}
"""The names of the heads' own modules, beside `model`."""

AUTO_CLASSES = {
    "AutoModel": HFGPTModel,
    "AutoModelForCausalLM": HFGPTForCausalLM,
    "AutoModelForSequenceClassification": HFGPTForSequenceClassification,
    "AutoModelForTokenClassification": HFGPTForTokenClassification,
    "AutoModelForQuestionAnswering": HFGPTForQuestionAnswering,
}
"""Which class each Auto class makes; `hfgpt/__init__.py` registers them where hfgpt is installed."""

AUTO_MAP = {"AutoConfig": "configuration_hfgpt.HFGPTConfig"} | {
    auto_class: f"modeling_hfgpt.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES.items()
}
"""Where code that comes with the weights is found in the folder; written into config.json."""

# `save_pretrained` copies the files of classes that are registered so.
HFGPTConfig.register_for_auto_class("AutoConfig")
for auto_class, model_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class)

# Trainer's label smoothing, pipelines, `transformers serve` and model cards look only here, not at what is registered.
for names, model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, HFGPTModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, HFGPTForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, HFGPTForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, HFGPTForTokenClassification),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, HFGPTForQuestionAnswering),
):
    names[HFGPTConfig.model_type] = model_class.__name__

# PEFT finds the layers to adapt by model type. Their names here are Llama's, so what it has for Llama fits.
if is_peft_available():
    from peft.utils import constants as peft_tables

    for table_name, table in vars(peft_tables).items():
        if table_name.endswith("_MODULES_MAPPING") and "llama" in table:
            table[HFGPTConfig.model_type] = table["llama"]
