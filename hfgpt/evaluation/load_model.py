"""Any causal language model of transformers, hfgpt's own and foreign formats included, with its tokenizer."""

from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data.tokenizer import load_tokenizer
from hfgpt.system.machine import DTYPES
from hfgpt.weights import load
from hfgpt.weights.detect import check_source_exists
from hfgpt.weights.formats import openai
from hfgpt.weights.own_code import BROKEN_MODEL, brings_own_code, load_by_own_code, load_whole

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""Names under which configs of transformers keep the longest sequence."""


def load_causal_lm(
    source: str, tokenizer: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model in eval mode, with a tokenizer that fits it.

    Args:
        source: folder or Hub id of any causal language model of transformers, or a file of a format that hfgpt reads.
        tokenizer: folder or Hub id; None is that of the model.
        dtype: of the weights in memory: a key of `DTYPES`, or "auto" for that of the file.
        trust_remote_code: whether code that lies beside the weights may be run, where nothing else knows the model.

    Raises:
        ValueError: there is no such model or tokenizer, it is of another kind, it is damaged, its code is not trusted,
            or a tensor is missing, which transformers would fill with random numbers.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {['auto', *DTYPES]}, got {dtype!r}.")
    wanted = DTYPES.get(dtype)
    if Path(source).is_file() or openai.recognises(Path(source)):
        return load(source, wanted), load_tokenizer(tokenizer or source)
    check_source_exists(source)
    if brings_own_code(source):
        return load_by_own_code(source, wanted, trust_remote_code), load_tokenizer(tokenizer or source)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
        model_type = fields.get("model_type")
        if not isinstance(model_type, str):
            raise ValueError("its config.json names no `model_type`.")
        if model_type == HFGPTConfig.model_type:
            return load(source, wanted), load_tokenizer(tokenizer or source)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"transformers {transformers.__version__} has no model type {model_type!r}.")
        if type(AutoConfig.from_pretrained(source, trust_remote_code=False)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"a {model_type!r} is no causal language model.")
        model = load_whole(source, wanted)
    except BROKEN_MODEL as error:
        # What transformers explains in paragraphs becomes one line.
        raise ValueError(f"no model {source!r}: {' '.join(str(error).split())}") from error
    return model, load_tokenizer(tokenizer or source)


def context_of(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's config names, in tokens; None where it names none."""
    config = model.config.get_text_config()
    for name in CONTEXT_FIELDS:
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def choose_context(model: PreTrainedModel, wanted: int | None) -> int:
    """The length of windows, in tokens.

    Raises:
        ValueError: none is wanted and the config names none, or more than the model has is wanted.
    """
    known = context_of(model)
    if wanted is None and known is None:
        raise ValueError(f"the config of a {model.config.model_type!r} names no context. Set `--context`.")
    if wanted is not None and known is not None and wanted > known:
        raise ValueError(f"`--context` ({wanted}) is longer than the model's ({known}). Lower it.")
    context = wanted or known
    assert context is not None
    return context


def choose_device(name: str | None) -> torch.device:
    """The device of this process: the one that is named, else accelerate's choice.

    Raises:
        ValueError: there is no such device, or several processes shall share one.
    """
    if name is None:
        return PartialState().device
    if PartialState().num_processes > 1:
        raise ValueError(f"`--device` ({name!r}) has no effect on several processes: each has its own.")
    try:
        return torch.empty(0, device=name).to(name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` ({name!r}) is not here: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Make sure that no token sees those after it: AutoModelForCausalLM loads encoders too, which would score too well.

    Raises:
        ValueError: other tokens in the second half of a short text changed what the model says in the first.
    """
    size = model.get_input_embeddings().weight.shape[0]
    context = context_of(model) or 16
    if context < 2:
        return  # there is nothing to look ahead to
    half = min(16, context) // 2
    ids = torch.arange(2 * half, device=model.device)[None] % size
    changed = ids.clone()
    changed[0, half:] = (ids[0, half:] + half) % size
    before, after = (model(input_ids=each).logits[0, :half].float() for each in (ids, changed))
    # A mask makes them equal to the last bit; experts, who see their tokens in other batches, only nearly so.
    bound = max(1e-4, 2 * torch.finfo(model.dtype).eps)
    if not torch.equal(before, after) and (before - after).abs().amax() > bound * before.abs().amax():
        raise ValueError(
            f"{type(model).__name__} lets tokens see those after them: it is no causal language model, and the next "
            "token would be no prediction."
        )
