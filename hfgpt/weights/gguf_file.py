"""GGUF, the file that llama.cpp runs: weights, shape and tokenizer in one. Written by the `gguf` package; not read.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerFast

from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights.tables import QKV, Entry, Step, expand, own_tensors, settings_of, walk_out

if TYPE_CHECKING:
    from gguf import GGUFWriter

WHOLE_MODEL = (
    Entry("token_embd.weight", ("embed_tokens.weight",)),
    Entry("position_embd.weight", ("embed_positions.weight",)),
    Entry("output_norm.weight", ("norm.weight",)),
    Entry("output_norm.bias", ("norm.bias",)),
)

EACH_BLOCK = tuple(
    Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours))
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

HEAD = Entry("output.weight", ("lm_head.weight",))

QUANTIZATIONS = {"fp32": "F32", "fp16": "F16", "q8_0": "Q8_0"}
"""What the matrices may be stored as; vectors and positions stay in fp32, as llama.cpp itself keeps them."""


def table(num_layers: int, tied: bool) -> list[Entry]:
    rows = expand(WHOLE_MODEL, EACH_BLOCK, "blk.{layer}.", num_layers)
    return rows if tied else [*rows, HEAD]


def write(model: HFGPTForCausalLM, file: Path, tokenizer: PreTrainedTokenizerFast, quantization: str) -> list[Step]:
    """Write a model with its tokenizer for llama.cpp.

    Args:
        model: any with GPT-2's activation.
        file: to be written.
        tokenizer: a byte-level BPE, as GPT-2's is.
        quantization: a key of `QUANTIZATIONS`.

    Raises:
        ValueError: the `gguf` package is not installed, or llama.cpp's GPT-2 cannot be this model or this tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF needs the gguf package: `pip install gguf`.") from error
    config = model.config
    settings_of(model, activation_function="gelu_new")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`--dtype` must be one of {list(QUANTIZATIONS)} for gguf, got {quantization!r}.")
    kind = gguf.GGMLQuantizationType[QUANTIZATIONS[quantization]]
    tensors = own_tensors(model.float())
    rows = table(config.num_hidden_layers, tied="lm_head.weight" not in tensors)
    converted, steps = walk_out(rows, tensors)

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
    for place, (name, tensor) in enumerate(converted.items()):
        array = tensor.numpy()
        is_matrix = array.ndim == 2 and name != "position_embd.weight"
        if is_matrix and kind == gguf.GGMLQuantizationType.Q8_0:
            if array.shape[1] % 32:
                raise ValueError(f"{name}: q8_0 takes rows of a multiple of 32, this has {array.shape[1]}.")
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.astype(np.float16 if is_matrix and quantization == "fp16" else np.float32))
        if is_matrix and quantization != "fp32":
            step = steps[place]
            steps[place] = Step(step.name, step.shape, f"{step.action}, rounded to {quantization}", is_exact=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return steps


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Write tokens, their kinds, and merges; rows of the embedding without a token get a name that no text has."""
    from gguf import TokenType

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        raise ValueError("llama.cpp's GPT-2 needs a byte-level BPE; the model's tokenizer is none.")
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(names) >= vocab_size:
        raise ValueError(f"the tokenizer has id {max(names)}, the model `vocab_size` ({vocab_size}).")
    special = set(tokenizer.all_special_ids)
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        tokens.append(names.get(token_id, f"[PAD{token_id}]"))
        is_known = token_id in names
        kinds.append(TokenType.CONTROL if token_id in special else TokenType.NORMAL if is_known else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = backend["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
