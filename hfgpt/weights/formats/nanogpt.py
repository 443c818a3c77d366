"""nanoGPT and its relatives, minGPT and build-nanogpt: GPT-2's names, with matrices as `nn.Linear` has them.

nanoGPT, https://github.com/karpathy/nanoGPT, saves a dictionary `ckpt.pt` with `model`, `model_args` and more;
build-nanogpt one with `model` and a `config` object; minGPT's users save the bare state dict.
"""

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.weights.formats import reference_forward
from hfgpt.weights.lazy_tensors import LazyTensor
from hfgpt.weights.model_parts import ModelParts, SourceModel, Unsaid
from hfgpt.weights.table import (
    QKV,
    Change,
    TensorMapping,
    check_gpt2_like,
    drop_tied_head,
    expand,
    export_tensors,
    heads_of,
    leave_out_zero_biases,
    read_sizes,
)

WHOLE_MODEL = (
    TensorMapping("transformer.wte.weight", ("embed_tokens.weight",)),
    TensorMapping("transformer.wpe.weight", ("embed_positions.weight",)),
    TensorMapping("transformer.ln_f.weight", ("norm.weight",)),
    TensorMapping("transformer.ln_f.bias", ("norm.bias",), is_optional=True),
)

EACH_BLOCK = (
    TensorMapping("ln_1.weight", ("input_layernorm.weight",)),
    TensorMapping("ln_1.bias", ("input_layernorm.bias",), is_optional=True),
    TensorMapping("attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV)),
    TensorMapping("attn.c_attn.bias", tuple(f"{name}.bias" for name in QKV), is_optional=True),
    TensorMapping("attn.c_proj.weight", ("self_attn.o_proj.weight",)),
    TensorMapping("attn.c_proj.bias", ("self_attn.o_proj.bias",), is_optional=True),
    TensorMapping("ln_2.weight", ("post_attention_layernorm.weight",)),
    TensorMapping("ln_2.bias", ("post_attention_layernorm.bias",), is_optional=True),
    TensorMapping("mlp.c_fc.weight", ("mlp.up_proj.weight",)),
    TensorMapping("mlp.c_fc.bias", ("mlp.up_proj.bias",), is_optional=True),
    TensorMapping("mlp.c_proj.weight", ("mlp.down_proj.weight",)),
    TensorMapping("mlp.c_proj.bias", ("mlp.down_proj.bias",), is_optional=True),
)

HEAD = TensorMapping("lm_head.weight", ("lm_head.weight",))

META = "meta.pkl"
"""Where nanoGPT's character-level data sets keep their vocabulary: in `data/<dataset>` of nanoGPT's own folder."""

FOLDERS_UP = 3
"""How far above a checkpoint's folder nanoGPT's own is looked for; its `out_dir` is mostly one in it."""

SIZES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Sizes as nanoGPT calls them -> as hfgpt does."""

SETTINGS = {*SIZES, "n_head", "bias", "dropout"}
"""What nanoGPT's `model_args` say, and build-nanogpt's config."""


def table(num_layers: int, tied: bool) -> list[TensorMapping]:
    mappings = expand(WHOLE_MODEL, EACH_BLOCK, "transformer.h.{layer}.", num_layers)
    return mappings if tied else [*mappings, HEAD]


def recognises(tensors: Mapping[Any, Any]) -> bool:
    """Whether tensors of these names are of this family."""
    return "transformer.wte.weight" in tensors


def read(tensors: dict[str, LazyTensor | Tensor], content: dict[str, Any], told: Unsaid) -> SourceModel:
    """Understand what `torch.load` gave.

    Args:
        tensors: by their names.
        content: what else the file holds.
        told: the number of attention heads, where the file does not say it (minGPT), and the activation of the MLP;
            without, it is nanoGPT's, or that of the others.

    Raises:
        ValueError: the number of heads is not to be known, a matrix is missing, or the file's settings contradict it.
    """
    is_tied, changes = drop_tied_head(tensors, "lm_head.weight", "transformer.wte.weight")
    sizes = read_sizes(tensors, "transformer.wte.weight", "transformer.wpe.weight", ".ln_1.weight")
    num_layers = sizes["num_hidden_layers"]
    found = {theirs: sizes[ours] for theirs, ours in SIZES.items()}
    run = fields_of(content.get("config", {}))
    settings = fields_of(content["model_args"]) if "model_args" in content else run
    guesses: list[str] = []
    if told.lora_alpha is not None:
        raise ValueError("`--lora-alpha` is for LoRA layers in a file of LLMs-from-scratch's, and this is none.")
    if settings:
        heads = said_heads(settings, found, told.heads)
    else:
        heads, guesses = heads_of(sizes["hidden_size"], told.heads)
    activation = told.activation
    if activation is None:
        activation, guess = activation_of(content, tensors)
        guesses += guess
    dropout = settings.get("dropout", 0.0) if settings else 0.1
    config = HFGPTConfig(
        **sizes,
        num_attention_heads=heads,
        activation_function=activation,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        tie_word_embeddings=is_tied,
    )
    return SourceModel(
        tensors,
        config,
        table(num_layers, is_tied),
        logits=partial(logits, tensors, num_layers, heads, config.activation_function),
        dropped=r"\.attn\.(masked_)?bias$",  # masks; the dot spares `c_attn.bias`
        changes=changes,
        guesses=guesses,
        dataset=run["dataset"] if isinstance(run.get("dataset"), str) else "",
    )


def fields_of(settings: Any) -> dict[Any, Any]:
    """The settings in a file, a dictionary or an object of build-nanogpt's.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(settings, GPTConfig):
        return vars(settings)
    if not isinstance(settings, dict):
        raise ValueError(f"the file's settings are a {type(settings).__name__}, not a dictionary.")
    return settings


def activation_of(content: dict[str, Any], tensors: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The activation of the program that has probably written a file, since no file says it; and what is guessed."""
    settings = fields_of(content.get("config", {}))
    has_options = "model_args" in content or settings.keys() & {"bias", "dropout"}
    if has_options or "transformer.ln_f.bias" not in tensors:  # only nanoGPT has models without
        which = "gelu, nanoGPT's since June 2023: the file does not say. Give `--activation gelu`, or gelu_new if it is"
        return "gelu", [f"activation {which} older."]
    if isinstance(content.get("config"), GPTConfig):
        return "gelu_new", []  # build-nanogpt's, which never had another
    which = "gelu_new, minGPT's: the file does not say. Give `--activation gelu_new`, or gelu if nanoGPT has written it"
    return "gelu_new", [f"activation {which}."]


def said_heads(settings: dict[str, Any], found: dict[str, int], asked: int | None) -> int:
    """The number of heads that a file's own settings say.

    Args:
        settings: `model_args`, or the fields of the config object.
        found: what the tensors say of the others.
        asked: what the user says of the heads.

    Raises:
        ValueError: the settings do not say it, say something else than the tensors or the user, or something that
            nanoGPT's do not say, whose mathematics may then be other ones too.
    """
    unknown = sorted(map(str, settings.keys() - SETTINGS))
    if unknown:
        raise ValueError(f"the file's settings have `{unknown[0]}`, which nanoGPT does not know: another model.")
    for name, value in found.items():
        if settings.get(name, value) != value:
            raise ValueError(f"the file says `{name}` = {settings[name]!r}, its tensors say {value}.")
    heads = settings.get("n_head")
    if not isinstance(heads, int):
        if asked is not None:
            return asked
        raise ValueError(
            f"the file's settings have no `n_head`; they have {', '.join(map(str, settings)) or 'nothing'}. Give "
            "`--heads`."
        )
    if asked not in (None, heads):
        raise ValueError(f"`--heads` is {asked}, the file says `n_head` = {heads}.")
    return heads


def logits(
    tensors: dict[str, LazyTensor | Tensor],
    layers: int,
    heads: int,
    activation: str,
    ids_BT: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The own forward pass of nanoGPT and minGPT: (B, T) to (B, T, V)."""
    weight = reference_forward.reader(tensors, dtype)

    def bias(name: str) -> Tensor | None:
        return weight(name) if name in tensors else None

    def norm(x: Tensor, name: str) -> Tensor:
        return reference_forward.norm(x, weight(f"{name}.weight"), bias(f"{name}.bias"))

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, weight(f"{name}.weight"), bias(f"{name}.bias"))

    embedding = weight("transformer.wte.weight")
    x = embedding[ids_BT] + weight("transformer.wpe.weight")[: ids_BT.shape[1]]
    for block in (f"transformer.h.{layer}" for layer in range(layers)):
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        x = x + linear(reference_forward.attend(q, k, v, heads), f"{block}.attn.c_proj")
        inner = ACT2FN[activation](linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inner, f"{block}.mlp.c_proj")
    head = weight("lm_head.weight") if "lm_head.weight" in tensors else embedding
    return norm(x, "transformer.ln_f") @ head.T


def meta_of(file: Path, dataset: str) -> Path | None:
    """Where the characters of a checkpoint lie: beside it, or in its data set's folder; None if nowhere.

    Args:
        file: the checkpoint.
        dataset: its name for the data set; one that leads elsewhere is not followed.
    """
    places = [file.with_name(META)]
    if dataset and not Path(dataset).is_absolute() and ".." not in Path(dataset).parts:
        here = file.resolve().parent
        places += [folder / "data" / dataset / META for folder in (here, *here.parents[:FOLDERS_UP], Path.cwd())]
    return next((place for place in places if place.is_file()), None)


def read_meta(file: Path) -> PreTrainedTokenizerFast:
    """The characters of a `meta.pkl` as a tokenizer, which refuses all others; it has no token that ends a text.

    Raises:
        ValueError: it is damaged, wants to run something, or is no vocabulary of characters.
    """
    try:
        with file.open("rb") as stream:
            content = PlainUnpickler(stream).load()
        characters = {str(character): int(number) for character, number in content["stoi"].items()}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{file}: no vocabulary of nanoGPT's: {error!r}.") from error
    if sorted(characters.values()) != list(range(len(characters))) or any(len(each) != 1 for each in characters):
        raise ValueError(f"{file}: not one number, from 0 on, for each of {len(characters)} characters.")
    tokenizer = Tokenizer(models.WordLevel(characters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings and numbers, and nothing that would have to be imported or run."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def write(parts: ModelParts, file: Path) -> list[Change]:
    """Write a nanoGPT `ckpt.pt`, to sample from or to go on training with `--init_from=resume`, at iteration 0.

    With `bias=False` if all biases are zero.

    Raises:
        ValueError: the model has an untied output layer, another inner width than four times its own, another
            activation than nanoGPT's, or several dropouts.
    """
    config = parts.config
    same_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop"), config.resid_pdrop)
    check_gpt2_like(config, activation_function="gelu", tie_word_embeddings=True, **same_dropout)
    mappings = table(config.num_hidden_layers, tied=True)
    tensors, changes = export_tensors(mappings, parts.tensors)
    has_biases, changes = leave_out_zero_biases(mappings, tensors, changes)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    arguments = {
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "block_size": config.max_position_embeddings,
        "bias": has_biases,
        "vocab_size": config.vocab_size,
        "dropout": float(config.resid_pdrop),
    }
    content: dict[str, Any] = {"model": tensors, "model_args": arguments, "iter_num": 0, "config": {}}
    content |= {"best_val_loss": torch.tensor(1e9), "optimizer": new_optimizer(tensors)}
    torch.save(content, file)
    return [*changes, Change("lm_head.weight", tuple(tensors["lm_head.weight"].shape), "written again: tied")]


def new_optimizer(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step, without which its train.py does not resume.

    Its hyperparameters are train.py's defaults: those are resumed too, but for the learning rate.
    """
    parameters = [each for name, each in tensors.items() if name != HEAD.foreign]
    matrices = {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": 0.1}
    vectors = {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=6e-4, betas=(0.9, 0.95)).state_dict()


class GPTConfig(SimpleNamespace):
    """Stands in for build-nanogpt's class, whose pickled objects name `__main__.GPTConfig`; it only holds fields."""


def allowed_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What may be unpickled besides tensors and plain values."""
    return [(GPTConfig, "__main__.GPTConfig")]
