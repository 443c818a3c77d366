"""GPT-2 <-> hfgpt: one table, used both ways.

transformers' GPT-2 keeps its matrices as (in, out), hfgpt as `nn.Linear` does, (out, in); GPT-2 keeps query, key and
value in one tensor, hfgpt in three. Everything else is a change of name.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, Transpose, WeightConverter, WeightRenaming

from hfgpt.configuration_hfgpt import GPT2_SOURCE, HFGPTConfig
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights.formats import bpe
from hfgpt.weights.model_parts import ModelParts, check_architecture, split_model
from hfgpt.weights.table import QKV, Change, TensorMapping, expand, export_tensors, with_prefixes

WHOLE_MODEL = (
    TensorMapping("wte.weight", ("embed_tokens.weight",)),
    TensorMapping("wpe.weight", ("embed_positions.weight",)),
    TensorMapping("ln_f.weight", ("norm.weight",)),
    TensorMapping("ln_f.bias", ("norm.bias",)),
)

EACH_BLOCK = (
    TensorMapping("ln_1.weight", ("input_layernorm.weight",)),
    TensorMapping("ln_1.bias", ("input_layernorm.bias",)),
    TensorMapping("attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV), transposed=True),
    TensorMapping("attn.c_attn.bias", tuple(f"{name}.bias" for name in QKV)),
    TensorMapping("attn.c_proj.weight", ("self_attn.o_proj.weight",), transposed=True),
    TensorMapping("attn.c_proj.bias", ("self_attn.o_proj.bias",)),
    TensorMapping("ln_2.weight", ("post_attention_layernorm.weight",)),
    TensorMapping("ln_2.bias", ("post_attention_layernorm.bias",)),
    TensorMapping("mlp.c_fc.weight", ("mlp.up_proj.weight",), transposed=True),
    TensorMapping("mlp.c_fc.bias", ("mlp.up_proj.bias",)),
    TensorMapping("mlp.c_proj.weight", ("mlp.down_proj.weight",), transposed=True),
    TensorMapping("mlp.c_proj.bias", ("mlp.down_proj.bias",)),
)


def entries(num_layers: int, tied: bool, prefix: str = "transformer.") -> list[TensorMapping]:
    """The table for a whole `ForCausalLM` model, with full names.

    Args:
        num_layers: number of blocks.
        tied: whether the output layer is the token embedding; if not, it is an entry of its own.
        prefix: of every name; files of a model without a head have none.
    """
    whole = [with_prefixes(mapping, prefix, "") for mapping in WHOLE_MODEL]
    mappings = expand(whole, EACH_BLOCK, prefix + "h.{layer}.", num_layers)
    return mappings if tied else [*mappings, TensorMapping("lm_head.weight", ("lm_head.weight",))]


def import_mapping(
    whole_model: Sequence[TensorMapping] = WHOLE_MODEL, each_block: Sequence[TensorMapping] = EACH_BLOCK
) -> list[WeightRenaming | WeightConverter]:
    """The table as transformers' weight conversions, which `from_pretrained` applies while it reads a GPT-2 file.

    A model of somebody else's has a table of its own.
    """
    # `h.` must not match inside a longer word; a lookbehind does that without changing the name that is written.
    conversions: list[WeightRenaming | WeightConverter] = [
        WeightRenaming(r"^transformer\.", r"^model\."),
        WeightRenaming(r"(?<!\w)h\.(\d+)\.", r"layers.\1."),
        WeightRenaming(r"^classifier\.", r"score."),  # GPT2ForTokenClassification's head; the other heads' names agree
    ]
    for mapping in (*whole_model, *each_block):
        operations: list[ConversionOps] = [Transpose(0, 1)] if mapping.transposed else []
        if len(mapping.hfgpt) > 1:
            operations.append(Chunk(dim=0))
        source = r"(?<!\w)" + mapping.foreign.replace(".", r"\.")
        if operations:
            conversions.append(WeightConverter(mapping.foreign, list(mapping.hfgpt), operations))
        else:
            conversions.append(WeightRenaming(source, mapping.hfgpt[0]))
    return conversions


def register() -> None:
    """Let `HFGPTForCausalLM.from_pretrained` read GPT-2 files.

    Under a private key rather than 'hfgpt' or 'gpt2': transformers undoes a model's own mapping when it saves, and its
    own GPT-2 would use one under 'gpt2'.
    """
    register_checkpoint_conversion_mapping(GPT2_SOURCE, import_mapping(), overwrite=True)


def to_gpt2_config(config: HFGPTConfig) -> GPT2Config:
    """The same shape in transformers' GPT-2 config.

    Raises:
        ValueError: it is of another architecture.
    """
    check_architecture(config, "gpt2")
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_ctx=config.max_position_embeddings,  # llama.cpp's converter reads this one
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.activation_function,
        resid_pdrop=config.resid_pdrop,
        embd_pdrop=config.embd_pdrop,
        attn_pdrop=config.attn_pdrop,
        layer_norm_epsilon=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        use_cache=config.use_cache,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def to_gpt2(model: HFGPTForCausalLM) -> GPT2LMHeadModel:
    """Make transformers' GPT-2 with the same weights, dtype, device and generation settings.

    The tensors are copies: training the one does not change the other.
    """
    gpt2, _ = from_parts(split_model(model))
    gpt2.config._attn_implementation = model.config._attn_implementation
    return gpt2.train(model.training)


def from_parts(parts: ModelParts) -> tuple[GPT2LMHeadModel, list[Change]]:
    """Make transformers' GPT-2 of a model's parts, which are used up, and say what was done to each tensor."""
    config = to_gpt2_config(parts.config)
    # A model may have a head of its own though its config says that it is tied.
    config.tie_word_embeddings = parts.is_tied
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(config)
    tensors, changes = export_tensors(entries(parts.config.num_hidden_layers, parts.is_tied), parts.tensors)
    head = {"lm_head.weight": tensors["transformer.wte.weight"]} if config.tie_word_embeddings else {}
    gpt2.load_state_dict(tensors | head, assign=True)
    gpt2.tie_weights()
    if parts.generation is not None:
        gpt2.generation_config = GenerationConfig.from_dict(parts.generation.to_dict())
    return gpt2, changes


def write_vocabulary(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: int) -> list[str]:
    """Write GPT-2's two files beside tokenizer.json, for tools such as KerasHub, and note what they cannot say.

    Tokens beyond the `rows` of the model are left out.
    """
    try:
        bpe.write_files(tokenizer, rows, folder / "vocab.json", folder / "merges.txt")
    except ValueError as error:
        return [f"tokenizer.json alone, no vocab.json and merges.txt, which KerasHub would read: {error}"]
    added = bpe.kept_whole(tokenizer, rows)
    if added:
        return [f"who reads vocab.json and merges.txt alone splits {added[0]!r}, which tokenizer.json keeps whole."]
    return []


def write(parts: ModelParts, folder: Path) -> list[Change]:
    """Save as a plain GPT-2 folder, for tools that know GPT-2 and run no code from elsewhere."""
    gpt2, changes = from_parts(parts)
    gpt2.save_pretrained(folder)
    return changes
