"""A GPT that knows nothing of transformers, as a model of transformers.

This file travels with the weights, as do the GPT's own files beside it, so it imports nothing of hfgpt. The GPT takes
token ids and gives logits, and nothing else is known of it: it has no cache, so `generate` computes the whole prefix
again for every token.

Shape letters: B batch, T positions, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils import can_return_tuple

from .gpt_call import Call, decode


class AdoptedForCausalLM(PreTrainedModel, GenerationMixin):
    """The GPT with a loss, labels and `generate`. A subclass says what the GPT is and how it is called."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # Trainer hands `num_items_in_batch` over
    call = Call()
    embedding: str | None = None
    head: str | None = None
    constant_buffers: tuple[str, ...] = ()
    vocab_argument: str | None = None

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        # `from_pretrained` builds on the meta device, in the weights' precision and to be filled: a GPT that is not
        # written for it would lose its tables. It is built as its author does, and what is drawn is drawn aside.
        is_loading, dtype = torch.get_default_device().type == "meta", torch.get_default_dtype()
        with torch.random.fork_rng([], enabled=is_loading), torch.device("cpu") if is_loading else nullcontext():
            torch.set_default_dtype(torch.float32)
            try:
                self.gpt = self.build(
                    {name: decode(getattr(config, field)) for name, field in config.arguments.items()}
                )
            finally:
                torch.set_default_dtype(dtype)
        if dtype != torch.float32:
            self.gpt.to(dtype)
        self.keep_constants()
        self.post_init()

    def build(self, arguments: dict[str, Any]) -> nn.Module:
        """The GPT made by its own constructor."""
        raise NotImplementedError

    def keep_constants(self) -> None:
        """Leave buffers that the constructor always makes the same out of what is saved, and remember their values."""
        for name in self.constant_buffers:
            path, _, buffer = name.rpartition(".")
            self.gpt.get_submodule(path)._non_persistent_buffers_set.add(buffer)
        for module in self.gpt.modules():
            constants = {
                name: buffer.detach().clone()
                for name, buffer in module.named_buffers(recurse=False)
                if name in module._non_persistent_buffers_set
            }
            if constants:
                module._constants = constants  # type: ignore[assignment] # a plain attribute

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give buffers that are in no file their values back; the constructor has drawn the weights."""
        for name, value in getattr(module, "_constants", {}).items():
            buffer = getattr(module, name)
            setattr(module, name, value.to(buffer.device, buffer.dtype, copy=True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load weights, and refuse those that do not fit, which transformers would fill with random numbers.

        Raises:
            ValueError: tensors are missing, left over or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        faults = [
            f"{name}: not in the file" for name in sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys))
        ]
        faults += [f"{name}: in the file, not in the model" for name in sorted(info["unexpected_keys"])]
        if faults and not wants_info and kwargs.get("state_dict") is None:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit. {faults[0]}{more}.")
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        if self.embedding is None:
            raise NotImplementedError(f"{type(self).__name__} has no layer that takes the ids alone.")
        return self.gpt.get_submodule(self.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.embedding is not None:
            self.gpt.set_submodule(self.embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.head is None else self.gpt.get_submodule(self.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.head is not None:
            self.gpt.set_submodule(self.head, new_embeddings)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """Change the vocabulary; refused where the constructor could not make the model anew at that size."""
        if new_num_tokens is not None and self.vocab_argument is None:
            raise ValueError(
                "the vocabulary cannot be resized: no argument of the constructor is its size, so that the saved model "
                "could not be built again. Change the size in the GPT's own code, and adopt it again."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> dict:
        """The whole prefix, every time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Score every next token, and the whole sequence if there are labels.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding on either side. The GPT takes no mask: tokens are
                moved to the beginning of their row, where nothing before them is padding, and their logits back.
            labels: (B, T) the tokens themselves, -100 where nothing is to be predicted; they are shifted here.
            shift_labels: (B, T) in their place: place t holds the target of position t.
            num_items_in_batch: what the summed loss is divided by; None divides by the number of targets.
            ignore_index: in place of -100.
            logits_to_keep: return logits of the last so many positions only; 0 returns all.
            use_cache: has no effect: there is no cache.
            inputs_embeds: None; PEFT names it.
            output_attentions: not true, as the next: what is inside the GPT is not known.
            output_hidden_states: see there.

        Returns:
            `loss` in nats per token, `logits` (B, T, V); those of padding are without meaning.

        Raises:
            ValueError: no ids; more tokens than the GPT takes; an argument that it cannot honour.
        """
        if input_ids is None or inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError(
                "give `input_ids`: this model's GPT turns ids into logits, and nothing else is known of it."
            )
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than the {limit} that this model takes.")
        logits = self.score(input_ids, attention_mask)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),  # it takes a view
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def score(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The logits (B, T, V) of every token, each as if its row held no padding."""
        if mask_BT is None:
            return self.call.logits(self.gpt, ids_BT)
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(f"`attention_mask` must be {tuple(ids_BT.shape)} as the ids, got {tuple(mask_BT.shape)}.")
        is_token_BT = mask_BT.to(ids_BT.device) != 0
        last_B1 = is_token_BT.sum(dim=1, keepdim=True) - 1
        places_BT = torch.where(is_token_BT, is_token_BT.cumsum(1) - 1, last_B1 + (~is_token_BT).cumsum(1))
        moved_BT = torch.zeros_like(ids_BT).scatter(1, places_BT, ids_BT.masked_fill(~is_token_BT, 0))
        logits_BTV = self.call.logits(self.gpt, moved_BT)
        return logits_BTV.gather(1, places_BT.unsqueeze(2).expand(-1, -1, logits_BTV.shape[2]))


def register(config_class: type[PreTrainedConfig], model_class: type[AdoptedForCausalLM]) -> None:
    """Let `save_pretrained` copy the code along, and Trainer's label smoothing know that labels are to be shifted."""
    config_class.register_for_auto_class("AutoConfig")
    model_class.register_for_auto_class("AutoModelForCausalLM")
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__
