"""Folders of transformers, here or on the Hub: hfgpt's, GPT-2's, nanochat's; .safetensors or .bin, in shards or not."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hfgpt.configuration_hfgpt import GPT2_SOURCE, TRANSFORMERS_KEYS, HFGPTConfig
from hfgpt.modeling_hfgpt import HEADS, HFGPTForCausalLM
from hfgpt.modeling_nanochat import check_config
from hfgpt.system.network import limit_waiting
from hfgpt.system.storage import MANIFEST, check_files
from hfgpt.weights.formats import gpt2
from hfgpt.weights.lazy_tensors import LazyTensor, in_pickle, in_safetensors, read
from hfgpt.weights.model_parts import Config, ModelParts, SourceModel, empty_model, join_model
from hfgpt.weights.remote_code import warn_of_other_code
from hfgpt.weights.state_dict import check_tensors, state_dict_in, unwrap
from hfgpt.weights.table import Change, TensorMapping, check_num_blocks, drop_tied_head

OTHER_HEADS = HEADS - {"lm_head"} | {"classifier", "multiple_choice_head"}
"""Heads of models that classify, hfgpt's and GPT-2's."""

DROPPED = r"\.attn\.(masked_)?bias$|" + rf"^({'|'.join(sorted(OTHER_HEADS))})\."
"""Pattern of names that hfgpt has no use for: masks, and other heads."""


def read_folder(source: str | Path) -> tuple[str, SourceModel]:
    """Read a folder or Hub repository: "hfgpt", "gpt2" or "nanochat", and its tensors; each is read when it is used.

    Raises:
        ValueError: there is none, it is of another architecture, or a file is missing or damaged.
    """
    limit_waiting()
    try:
        config, notes = read_config(source)
        files = weight_files(source)
    except (OSError, TypeError, AttributeError, StrictDataclassError) as error:
        # What transformers explains in paragraphs becomes one line.
        reason = " ".join(str(error).split())
        here = "" if Path(source).exists() else "there is no such folder here, and the Hub does not give it: "
        raise ValueError(f"no model {str(source)!r}: {here}{reason}") from error
    check_manifest(Path(source), files)
    if Path(source).is_dir():  # of a repository on the Hub only the weights are fetched here, not its code
        warn_of_other_code(Path(source))
    tensors, wrappers = unwrap(read_files(files))
    check_num_blocks(config, tensors)
    is_gpt2 = config.model_type == GPT2_SOURCE
    if is_gpt2:
        del config.__dict__["model_type"]
    prefix = "transformer." if is_gpt2 else "model."
    if not any(name.startswith(prefix) for name in tensors):
        prefix = ""  # saved without a head, as GPT-2's own files on the Hub are
    changes: list[Change] = []
    if config.tie_word_embeddings:
        embedding = prefix + ("wte.weight" if is_gpt2 else "embed_tokens.weight")
        is_tied, changes = drop_tied_head(tensors, "lm_head.weight", embedding)
        if not is_tied:
            raise ValueError(
                f"{source}: lm_head.weight differs from {embedding}, though config.json ties them: set "
                "`tie_word_embeddings` to false there to keep both."
            )
    if is_gpt2:
        found, table = "gpt2", gpt2.entries(config.num_hidden_layers, config.tie_word_embeddings, prefix)
    else:
        found, table = config.model_type, own_names(config, prefix)
    return found, SourceModel(
        tensors,
        config,
        table,
        logits=partial(logits, FORWARD_PASSES[found], source, tensors if wrappers else None),
        dropped=DROPPED,
        changes=changes,
        notes=[*wrappers, *notes],
        generation=read_generation_config(source),
    )


def holds(content: Mapping[Any, Any]) -> bool:
    """Whether a file of these tensors is one of such a folder, and says nothing of their config."""
    matrices = [content[name] for name in content if str(name).endswith("h.0.attn.c_attn.weight")]
    is_gpt2 = any(
        tuple(each.shape[1:]) == (3 * each.shape[0],) for each in matrices if isinstance(each, LazyTensor | Tensor)
    )
    return is_gpt2 or any(str(name).endswith("embed_tokens.weight") for name in content)


def read_config(source: str | Path) -> tuple[Config, list[str]]:
    """The config of config.json, with a note on the keys that neither hfgpt nor transformers' GPT-2 knows.

    Raises:
        ValueError: it is of another architecture, or has impossible values.
        OSError: there is none.
    """
    if PreTrainedConfig.get_config_dict(source)[0].get("model_type") == NanoChatConfig.model_type:
        nanochat = NanoChatConfig.from_pretrained(source)
        check_config(nanochat)
        return nanochat, []
    fields, _ = HFGPTConfig.get_config_dict(source)
    known = {*HFGPTConfig.__dataclass_fields__, *HFGPTConfig.attribute_map, *GPT2Config().to_dict(), *TRANSFORMERS_KEYS}
    unknown = sorted(set(fields) - known - {"hfgpt_source"})
    notes = [f"{CONFIG_NAME}: ignored what hfgpt does not know: {', '.join(unknown)}."] if unknown else []
    return HFGPTConfig.from_dict(fields), notes


def read_generation_config(source: str | Path) -> GenerationConfig | None:
    """The settings of generation_config.json, or None where there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    if find(source, GENERATION_CONFIG_NAME) is None:
        return None
    try:
        return GenerationConfig.from_pretrained(source)
    except (OSError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}/{GENERATION_CONFIG_NAME}: no settings of generation: {reason}") from error


def check_manifest(folder: Path, weights: list[Path]) -> None:
    """Compare what is read of a folder with its manifest, if it has one, as checkpoints of hfgpt do.

    Raises:
        ValueError: a file is not what was written.
    """
    if (folder / MANIFEST).is_file():
        settings = [name for name in (CONFIG_NAME, GENERATION_CONFIG_NAME) if (folder / name).is_file()]
        check_files(folder, [*settings, *(file.name for file in weights)])


def read_files(files: list[Path]) -> dict[str, LazyTensor | Tensor]:
    """The tensors of all files together.

    Raises:
        ValueError: a file is damaged, or two of them have the same tensor.
    """
    tensors: dict[str, LazyTensor | Tensor] = {}
    for file in files:
        found: Any = in_safetensors(file) if file.suffix == ".safetensors" else in_pickle(file, [])
        if not isinstance(found, dict):
            raise ValueError(f"{file}: holds a {type(found).__name__}, not a dictionary of tensors.")
        found = check_tensors(state_dict_in(found))
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(f"{file}: {min(twice)} is in another shard too.")
        tensors |= found
    return tensors


def weight_files(source: str | Path) -> list[Path]:
    """The files that hold the weights, fetched where they are on the Hub.

    Raises:
        OSError: there are none, or not all of them.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        found = find(source, name)
        if found is None:
            continue
        if name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
            return [found]
        fetched = (find(source, shard, is_needed=True) for shard in shards_of(found))
        return [shard for shard in fetched if shard is not None]
    find(source, SAFE_WEIGHTS_NAME, is_needed=True)
    raise OSError(f"{source} has no weights.")


def find(source: str | Path, name: str, is_needed: bool = False) -> Path | None:
    """A file of a folder or repository, fetched where it is on the Hub; None if there is none.

    Raises:
        OSError: there is none, and it is needed.
    """
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=is_needed,
        _raise_exceptions_for_gated_repo=is_needed,
        _raise_exceptions_for_connection_errors=is_needed,
    )
    return None if found is None else Path(found)


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


def own_names(config: Config, prefix: str) -> list[TensorMapping]:
    """The table of hfgpt's own files, and of nanochat's, which changes nothing."""
    names = empty_model(config).state_dict()
    table = [TensorMapping(prefix + name.removeprefix("model."), (name,)) for name in names if name != "lm_head.weight"]
    return table if config.tie_word_embeddings else [*table, TensorMapping("lm_head.weight", ("lm_head.weight",))]


FORWARD_PASSES: dict[str, type[PreTrainedModel]] = {
    "gpt2": GPT2LMHeadModel,
    "hfgpt": HFGPTForCausalLM,
    "nanochat": NanoChatForCausalLM,
}
"""Format -> the class that runs its folder, read as users read it: transformers' own two, or hfgpt's model."""


@torch.no_grad()
def logits(
    model_class: type[PreTrainedModel],
    source: str | Path,
    tensors: Mapping[str, LazyTensor | Tensor] | None,
    ids_BT: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What a class makes of a folder: (B, T) to (B, T, V); of `tensors`, where it would not know the files' names."""
    options: dict[str, Any] = {"dtype": dtype}
    if model_class is GPT2LMHeadModel:
        options["attn_implementation"] = "eager"
    if tensors is None:
        return model_class.from_pretrained(source, **options).eval()(ids_BT).logits
    options["config"] = model_class.config_class.from_pretrained(source)
    options["state_dict"] = {name: read(each) for name, each in tensors.items()}
    return model_class.from_pretrained(None, **options).eval()(ids_BT).logits


def write(parts: ModelParts, folder: Path) -> list[Change]:
    """Save in the model's own layout; hfgpt's with the code that runs it."""
    changes = [Change(name, tuple(tensor.shape), "copied") for name, tensor in parts.tensors.items()]
    join_model(parts).save_pretrained(folder)
    return changes
