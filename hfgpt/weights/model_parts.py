"""A model as its parts: config, how it writes text, and tensors; made from a checkpoint, joined, split."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, NanoChatConfig

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.modeling_nanochat import NanoChatForCausalLM
from hfgpt.weights.lazy_tensors import LazyTensor
from hfgpt.weights.table import NONE, Change, TensorMapping, import_tensors

Config: TypeAlias = HFGPTConfig | NanoChatConfig
LanguageModel: TypeAlias = HFGPTForCausalLM | NanoChatForCausalLM
"""A model of either architecture that hfgpt builds."""


@dataclass(frozen=True)
class Unsaid:
    """What files of some formats do not say of their model, as the user says it; None is left to the format.

    Attributes:
        heads: attention heads.
        activation: of the MLP.
        lora_alpha: by which LoRA layers are scaled, over their rank.
    """

    heads: int | None = None
    activation: str | None = None
    lora_alpha: float | None = None


@dataclass
class SourceModel:
    """A checkpoint of another format, read and not yet imported.

    Attributes:
        tensors: by their names in the format; most are read from the file when they are wanted.
        config: the architecture, shape, activation and tying that give the same logits in hfgpt.
        table: what each tensor is in hfgpt.
        logits: the format's own forward pass, on its own tensors and by its own rules, from ids (B, T) to (B, T, V) in
            the dtype it is given; the oracle of `hfgpt convert --verify`.
        dropped: pattern of names that hfgpt has no use for, such as causal masks.
        changes: what reading alone has done, such as a head dropped because it is the token embedding.
        guesses: what the file does not say and would change the logits, as it was taken, with the option that says it.
            Where a guess is wrong, this is another model, and `logits` does not see that: it rests on the guess too.
        notes: what else a user should know.
        generation: how the model writes text, if the source says it.
        dataset: name of the data set that it was trained on, where that has the tokenizer (nanoGPT); else empty.
    """

    tensors: dict[str, LazyTensor | Tensor]
    config: Config
    table: list[TensorMapping]
    logits: Callable[[Tensor, torch.dtype], Tensor]
    dropped: str = NONE
    changes: list[Change] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    generation: GenerationConfig | None = None
    dataset: str = ""


@dataclass
class ModelParts:
    """A model taken apart, so that its tensors can be written, and let go, one after the other.

    Attributes:
        config: of the model.
        generation: how it writes text.
        tensors: by hfgpt's names; without the output layer, if that is the token embedding.
    """

    config: Config
    generation: GenerationConfig | None
    tensors: dict[str, Tensor]

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the token embedding."""
        return "lm_head.weight" not in self.tensors

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return next(iter(self.tensors.values())).dtype


def build(checkpoint: SourceModel) -> tuple[LanguageModel, list[Change]]:
    """Make the model of a checkpoint, in eval mode, and say what was done.

    Raises:
        ValueError: the tensors do not fit.
    """
    shapes = {name: tuple(each.shape) for name, each in empty_model(checkpoint.config).state_dict().items()}
    tensors, changes = import_tensors(checkpoint.table, checkpoint.tensors, shapes, checkpoint.dropped)
    return join_model(ModelParts(checkpoint.config, checkpoint.generation, tensors)), [*checkpoint.changes, *changes]


def build_from(source: Any, checkpoint: SourceModel) -> tuple[LanguageModel, list[Change]]:
    """`build`, with the source named in what it refuses."""
    try:
        return build(checkpoint)
    except ValueError as error:
        raise named(source, error) from error


def named(source: Any, error: Exception) -> ValueError:
    """An error in one line that names the source."""
    reason = " ".join(str(error).split())
    return ValueError(reason if str(source) in reason else f"{source}: {reason}")


def model_class_of(config: Config) -> type[LanguageModel]:
    """The class that trains, resumes and writes models of a config's architecture."""
    return NanoChatForCausalLM if isinstance(config, NanoChatConfig) else HFGPTForCausalLM


def empty_model(config: Config) -> LanguageModel:
    """A model of shapes alone, on the meta device.

    Raises:
        ValueError: its sizes are beyond what 64 bits count.
    """
    try:
        with torch.device("meta"):
            return model_class_of(config)(config)
    except RuntimeError as error:
        raise ValueError(f"impossible sizes: {str(error).partition(chr(10))[0]}.") from error


def join_model(parts: ModelParts) -> LanguageModel:
    """The model of these parts, in eval mode; the tensors are not copied, and belong to it from now on."""
    parts.config.tie_word_embeddings = parts.is_tied
    model = empty_model(parts.config)
    head = {"lm_head.weight": parts.tensors["model.embed_tokens.weight"]} if parts.is_tied else {}
    model.load_state_dict(parts.tensors | head, assign=True)
    parts.tensors.clear()
    model.tie_weights()
    model.config.dtype = model.dtype
    if parts.generation is not None:
        model.generation_config = parts.generation
    return model.eval()


def split_model(model: LanguageModel) -> ModelParts:
    """The parts of a model; the tensors are its own, the settings copies."""
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    tensors = {name: each.detach() for name, each in model.state_dict().items() if not (is_tied and "lm_head" in name)}
    return ModelParts(copy.deepcopy(model.config), copy.deepcopy(model.generation_config), tensors)


def check_architecture(config: Config, to: str) -> None:
    """Refuse a format that holds another network than a model's: all but "nanochat" hold GPT-2's.

    Raises:
        ValueError: naming both.
    """
    is_nanochat = isinstance(config, NanoChatConfig)
    if is_nanochat != (to == "nanochat"):
        has, can = ("nanochat", "only 'nanochat'") if is_nanochat else ("GPT-2", "any but 'nanochat'")
        raise ValueError(f"the model has the network of {has}, which the format {to!r} cannot hold; {can} can.")


def check_single_dtype(model: LanguageModel) -> None:
    """Refuse a model whose tensors have not all the same type, in which no format and no forward pass is at home.

    Raises:
        ValueError: naming the types.
    """
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) > 1:
        raise ValueError(f"the tensors are of several types, {sorted(map(str, kinds))}. Give `--dtype`.")
