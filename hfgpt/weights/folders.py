"""Folders and Hub repositories of transformers: hfgpt's own and GPT-2's; in shards or not, .safetensors or .bin."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hfgpt.configuration_hfgpt import GPT2_SOURCE, HFGPTConfig
from hfgpt.modeling_hfgpt import HEADS, HFGPTForCausalLM
from hfgpt.weights import gpt2
from hfgpt.weights.stored import Stored, in_pickle, in_safetensors
from hfgpt.weights.tables import Checkpoint, Entry, Parts, Step, drop_tied_head, put_together

OTHER_HEADS = HEADS - {"lm_head"} | {
    "classifier",
    "multiple_choice_head",
}  # of models that classify, hfgpt's and GPT-2's


def read_folder(source: str | Path) -> tuple[str, Checkpoint]:
    """Read a folder or Hub repository: "hfgpt" or "gpt2", and its tensors, which stay on the disk until they are used.

    Raises:
        ValueError: there is none, it is of another architecture, or a file is missing or damaged.
    """
    try:
        config = HFGPTConfig.from_pretrained(source)
        files = weight_files(source)
    except (OSError, StrictDataclassError) as error:
        # What transformers explains in paragraphs becomes one line.
        raise ValueError(f"no model {str(source)!r}: {' '.join(str(error).split())}") from error
    tensors: dict[str, Stored | Tensor] = {}
    for file in files:
        tensors |= in_safetensors(file) if file.suffix == ".safetensors" else in_pickle(file, [])
    is_gpt2 = config.model_type == GPT2_SOURCE
    config.__dict__.pop("model_type", None)
    prefix = "transformer." if is_gpt2 else "model."
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""  # saved without a head, as GPT-2's own files on the Hub are
    steps: list[Step] = []
    if config.tie_word_embeddings:
        embedding = prefix + ("wte.weight" if is_gpt2 else "embed_tokens.weight")
        is_tied, steps = drop_tied_head(tensors, "lm_head.weight", embedding)
        if not is_tied:
            raise ValueError(
                f"{source}: lm_head.weight differs from {embedding}, though config.json ties them: set "
                "`tie_word_embeddings` to false there to keep both."
            )
    if is_gpt2:
        table = gpt2.entries(config.num_hidden_layers, config.tie_word_embeddings, prefix)
    else:
        table = own_names(config, prefix)
    dropped = r"\.attn\.(masked_)?bias$|" + rf"^({'|'.join(sorted(OTHER_HEADS))})\."  # masks, and other heads

    def logits(ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return logits_of_transformers(source, ids_BT, dtype) if is_gpt2 else logits_of_hfgpt(source, ids_BT, dtype)

    return "gpt2" if is_gpt2 else "hfgpt", Checkpoint(
        tensors, config, table, logits, dropped=dropped, steps=steps, generation=generation_of(source)
    )


def weight_files(source: str | Path) -> list[Path]:
    """The files that hold the weights, fetched where they are on the Hub.

    Raises:
        OSError: there are none, or not all of them.
    """

    def find(name: str, is_needed: bool = False) -> str | None:
        return cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=is_needed,
            _raise_exceptions_for_gated_repo=is_needed,
            _raise_exceptions_for_connection_errors=is_needed,
        )

    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        found = find(name)
        if found is None:
            continue
        if name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
            return [Path(found)]
        return [Path(str(find(shard, is_needed=True))) for shard in shards_of(Path(found))]
    find(SAFE_WEIGHTS_NAME, is_needed=True)
    raise OSError(f"{source} has no weights.")


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index lists.

    Raises:
        ValueError: it is no index, or names a file elsewhere.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of shards: {error!r}.") from error
    if strange:
        raise ValueError(f"{index}: names {strange[0]!r}, which is no file beside it.")
    return names


def generation_of(source: str | Path) -> GenerationConfig | None:
    """The settings of generation_config.json, or None where there is no such file."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return None


def own_names(config: HFGPTConfig, prefix: str) -> list[Entry]:
    """The table of hfgpt's own files, which changes nothing."""
    with torch.device("meta"):
        names = HFGPTForCausalLM(config).state_dict()
    table = [Entry(prefix + name.removeprefix("model."), (name,)) for name in names if name != "lm_head.weight"]
    return table if config.tie_word_embeddings else [*table, Entry("lm_head.weight", ("lm_head.weight",))]


@torch.no_grad()
def logits_of_transformers(source: str | Path, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What transformers' own GPT-2 makes of its folder: (B, T) to (B, T, V)."""
    return GPT2LMHeadModel.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()(ids_BT).logits


@torch.no_grad()
def logits_of_hfgpt(source: str | Path, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What hfgpt makes of its folder, read as users read it: (B, T) to (B, T, V)."""
    return HFGPTForCausalLM.from_pretrained(source, dtype=dtype).eval()(ids_BT).logits


def write(parts: Parts, folder: Path) -> list[Step]:
    """Save in hfgpt's own layout, with the code that runs it."""
    steps = [Step(name, tuple(tensor.shape), "copied") for name, tensor in parts.tensors.items()]
    put_together(parts).save_pretrained(folder)
    return steps
