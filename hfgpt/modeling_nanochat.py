"""What it takes to make nanochat.py a transformers model: the same that modeling_hfgpt.py tells for gpt.py.

These classes train, resume and score. What they save is a folder of transformers' own `nanochat`: it names the class
that transformers has, brings no code along, and loads wherever transformers does. Nothing is registered here, so that
AutoModel goes on to give transformers' class; `hfgpt.weights.load` gives this one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, NanoChatConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments import CACHE, check_arguments, take_cache, withhold_cache
from .loss import IGNORE_INDEX, linear_cross_entropy, shift_left
from .modeling_hfgpt import without_cache_in_training
from .nanochat import Block, CausalSelfAttention, RMSNorm, cap_softly, grouped_attention, init_weight, rotations
from .positions import count_positions, find_documents, is_only_causal


def check_config(config: NanoChatConfig) -> None:
    """Refuse shapes that cannot be built, and what transformers' class can be told to do and nanochat.py does not.

    Raises:
        ValueError: naming the field.
    """
    sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "intermediate_size", "num_key_value_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")
    width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if width % (2 * heads):
        raise ValueError(
            f"`hidden_size` (`n_embd`, {width}) is no multiple of twice `num_attention_heads` (`n_head`, {heads}). "
            "Each head needs the same width, an even number."
        )
    if heads % shared:
        raise ValueError(f"`num_attention_heads` ({heads}) is no multiple of `num_key_value_heads` ({shared}).")
    if not 0 <= config.attention_dropout <= 1:
        raise ValueError(f"`attention_dropout` must be between 0 and 1, got {config.attention_dropout}.")
    theta, cap = config.rope_parameters["rope_theta"], config.final_logit_softcapping
    for name, value in (("rope_theta", theta), ("rms_norm_eps", config.rms_norm_eps), ("final_logit_softcapping", cap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be finite and above 0, got {value}.")
    for name, value, built in (
        ("hidden_act", config.hidden_act, "relu2"),
        ("attention_bias", config.attention_bias, False),
        ("rope_parameters.rope_type", config.rope_parameters["rope_type"], "default"),
        ("head_dim", getattr(config, "head_dim", width // heads), width // heads),
    ):
        if value != built:
            raise ValueError(f"`{name}` is {value!r}: of nanochat hfgpt builds {built!r} only.")


class NanoChatBlock(GradientCheckpointingLayer, Block):
    """A `Block` whose activations can be dropped and computed again in the backward pass."""

    _can_checkpoint_with_cache = True  # as in modeling_hfgpt.py


class NanoChatPreTrainedModel(PreTrainedModel):
    """What the models can do, in the words in which transformers asks for it."""

    config: NanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoChatBlock, "attentions": CausalSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights of one module as nanochat.py's `NanoChat` does: one seed gives both the same tensors."""
        if isinstance(module, nn.Linear | nn.Embedding):
            name = next((name for name, candidate in self.named_modules() if candidate is module), "")
            init_weight(name, module.weight, self.config)


class NanoChatModel(NanoChatPreTrainedModel):
    """The network without a head: token ids to hidden states."""

    def __init__(self, config: NanoChatConfig) -> None:
        check_config(config)
        super().__init__(config)
        # No `padding_idx`, with which transformers' class would not learn that token, though it may be a text's end.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanoChatBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.rms_norm_eps)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Turn tokens into hidden states; arguments, result and errors are those of `HFGPTModel.forward`.

        Only that there are angles for any position, also beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give `input_ids` or `inputs_embeds`, one of them.")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, grouped_attention)
        check_arguments(kwargs, attend, NanoChatForCausalLM.forward)
        past_key_values = take_cache(past_key_values, cache, kwargs)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            withhold_cache(past_key_values)
            past_key_values = None
        x_BTC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

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
        if use_cache and past_key_values is None:  # after the mask, as in modeling_hfgpt.py
            past_key_values = DynamicCache(config=self.config)

        rotation = rotations(position_ids, self.config, x_BTC.dtype)
        x_BTC = self.norm(x_BTC)
        for block in self.layers:
            x_BTC = block(
                x_BTC,
                rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                attend=attend,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTC), **{CACHE: past_key_values})


class NanoChatForCausalLM(NanoChatPreTrainedModel, GenerationMixin):
    """The network with the head that scores every next token: pretraining and `generate`.

    It has the name of transformers' class, which is what config.json says of a saved model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoChatConfig) -> None:
        super().__init__(config)
        self.model = NanoChatModel(config)
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
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Score every next token, and the whole sequence if there are labels; all as in `HFGPTForCausalLM.forward`."""
        shift_labels, ignore_index = kwargs.pop("shift_labels", None), kwargs.pop("ignore_index", IGNORE_INDEX)
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
        targets = shift_left(labels) if shift_labels is None and labels is not None else shift_labels
        cap = self.config.final_logit_softcapping

        loss = logits = None
        if skip_logits and targets is not None:
            targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
            items: Any = kwargs.get("num_items_in_batch")
            loss = linear_cross_entropy(hidden_BTC, self.lm_head.weight, targets, items, softcap=cap)
        else:
            logits = cap_softly(self.lm_head(slice_logits_to_keep(hidden_BTC, logits_to_keep)), cap)
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
