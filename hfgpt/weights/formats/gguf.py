"""GGUF, the file that llama.cpp runs: weights, shape and tokenizer in one. Written by the `gguf` package; not read.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hfgpt.system.extras import needs
from hfgpt.weights.formats import bpe
from hfgpt.weights.model_parts import ModelParts
from hfgpt.weights.table import QKV, Change, TensorMapping, check_config_supported, expand, export_tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter

WHOLE_MODEL = (
    TensorMapping("token_embd.weight", ("embed_tokens.weight",)),
    TensorMapping("position_embd.weight", ("embed_positions.weight",)),
    TensorMapping("output_norm.weight", ("norm.weight",)),
    TensorMapping("output_norm.bias", ("norm.bias",)),
)

EACH_BLOCK = tuple(
    TensorMapping(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours))
    for theirs, ours in (
        ("attn_norm", ("input_layernorm",)),
        ("attn_qkv", QKV),
        ("attn_output", ("self_attn.o_proj",)),
        ("ffn_norm", ("post_attention_layernorm",)),
        ("ffn_up", ("mlp.up_proj",)),
        ("ffn_down", ("mlp.down_proj",)),
    )
    for kind in ("weight", "bias")
)

HEAD = TensorMapping("output.weight", ("lm_head.weight",))

QUANTIZATIONS = {"fp32": "F32", "fp16": "F16", "q8_0": "Q8_0"}
"""What the matrices may be stored as; vectors and positions stay in fp32, as llama.cpp itself keeps them."""


def table(num_layers: int, tied: bool) -> list[TensorMapping]:
    mappings = expand(WHOLE_MODEL, EACH_BLOCK, "blk.{layer}.", num_layers)
    return mappings if tied else [*mappings, HEAD]


def write(parts: ModelParts, file: Path, tokenizer: PreTrainedTokenizerFast, quantization: str) -> list[Change]:
    """Write a model with its tokenizer for llama.cpp.

    Args:
        parts: of any model with GPT-2's activation.
        file: to be written.
        tokenizer: a byte-level BPE, as GPT-2's is.
        quantization: a key of `QUANTIZATIONS`.

    Raises:
        ValueError: the `gguf` package is not installed, or llama.cpp's GPT-2 cannot be this model or this tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(needs("GGUF", "gguf")) from error
    config = parts.config
    check_config_supported(config, activation_function="gelu_new")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`--dtype` must be one of {list(QUANTIZATIONS)} for gguf, got {quantization!r}.")
    kind = gguf.GGMLQuantizationType[QUANTIZATIONS[quantization]]
    converted, changes = export_tensors(table(config.num_hidden_layers, parts.is_tied), parts.tensors)

    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name}")])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for place, change in enumerate(changes):
        tensor = converted.pop(change.name)
        array = tensor.float().numpy()
        is_small = tensor.ndim == 2 and change.name != "position_embd.weight" and quantization != "fp32"
        is_exact = torch.equal(tensor, torch.from_numpy(array).to(tensor.dtype))  # fp64 has no place in the file
        if is_small:
            before, array = array, rounded(change.name, array, quantization)
            is_exact = is_exact and array.dtype == np.float16 and np.array_equal(before, array)
        if not is_exact:
            stored_as = quantization if is_small else "fp32"
            changes[place] = Change(
                change.name, change.shape, f"{change.action}, rounded to {stored_as}", is_exact=False
            )
        writer.add_tensor(change.name, array, raw_dtype=kind if is_small else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changes


def rounded(name: str, array: np.ndarray, quantization: str) -> np.ndarray:
    """A matrix in fp16 or in llama.cpp's blocks of 32 numbers.

    Raises:
        ValueError: it has rows that are no blocks, or numbers beyond fp16.
    """
    from gguf import GGMLQuantizationType, quants

    if quantization == "q8_0":
        if array.shape[1] % 32:
            raise ValueError(f"{name}: q8_0 takes rows of a multiple of 32, this has {array.shape[1]}.")
        return quants.quantize(array, GGMLQuantizationType.Q8_0)
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name}: holds {np.abs(array).max():.3g}, and fp16 ends at 65504.")
    return array.astype(np.float16)


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Write tokens, their kinds, and merges; rows of the embedding without a token get a name that no text has."""
    from gguf import TokenType

    vocabulary, merges = bpe.split_model(tokenizer)
    names = {token_id: token for token, token_id in vocabulary.items()}
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():  # what is kept whole
        kinds[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    tokens = [names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token_id, TokenType.UNUSED) for token_id in range(vocab_size)])
    writer.add_token_merges(merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
