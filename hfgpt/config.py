"""`RunConfig`: every knob of a run, its default and its unit, on one screen; and how a recipe is read.

Defaults < recipe YAML < `key.path=value`. Whatever is misspelt, impossible or without effect is refused here, before
anything is loaded or written.
"""

import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hfgpt.configuration_hfgpt import HFGPTConfig, canonical_fields

DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
TOKENIZER_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
MODEL_FIELDS = {*HFGPTConfig.__annotations__, *HFGPTConfig.attribute_map}
LARGEST_SEED = 2**32 - 2**16
"""NumPy takes seeds below 2**32; each process adds its number to the run's."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: one that exists, or a byte-level BPE trained on the training split."""

    name: str | None = None
    """Hub id or folder of a tokenizer; null trains one."""
    vocab_size: int = 4096
    """Token ids of a trained tokenizer, `<|endoftext|>` included."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes rows of tokens."""

    source: str | None = None
    """`pydoc` (Python's own documentation) or the Hub id of a data set. Give this or `files`."""
    name: str | None = None
    """Configuration of a Hub data set, such as `wikitext-2-raw-v1`."""
    files: Any = None
    """Path, or list of paths, of .txt, .md, .jsonl, .json, .parquet or .csv files, or folders of them."""
    validation_files: Any = None
    """Like `files`; the validation text. null takes it from the training text, see `validation_fraction`."""
    text_column: str = "text"
    """Column that holds the text of a document; a .txt file is one document."""
    split: str = "train"
    """Split of a Hub data set to train on."""
    validation_split: str | None = None
    """Split of a Hub data set to validate on; null takes `validation_fraction` of the training split."""
    validation_fraction: float = 0.1
    """Share of the documents (of the characters, if there is only one), taken from the end, in (0, 1)."""
    shuffle_documents: bool = True
    """Whether documents are shuffled by `seed` before they are split and joined."""
    block_size: int = 128
    """Targets in one row, in tokens."""
    stride: int | None = None
    """Tokens from the start of one row to the next, 1 to `block_size`; null means `block_size`."""
    packing: str = "contiguous"
    """`contiguous`: rows are cut from one stream with `<|endoftext|>` between documents; `isolated`: the same rows, but no token sees another document; `padded`: a document never shares a row, and short rows are filled up."""  # noqa: E501
    streaming: bool = False
    """Whether the training text is read as it comes and never stored, for sets larger than the disk."""
    shuffle_buffer: int = 1000
    """With `streaming`: documents in memory, among which the next one is drawn."""
    validation_documents: int = 1000
    """With `streaming`: the validation text is so many documents from the beginning, unless it is named."""
    num_proc: int = 1
    """Processes that tokenize."""
    num_workers: int = 0
    """Processes that load rows; 0 loads them in the training process, fast enough for what is memory-mapped."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; read by hfgpt/optim.py."""

    name: str = "adamw"
    """A key of `hfgpt.optim.OPTIMIZERS`."""
    learning_rate: float = 1.0e-3
    """Peak of the schedule."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's averaging of gradients and of their squares, each in [0, 1)."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; norms and biases never decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 never scales."""
    schedule: str = "cosine"
    """A key of `hfgpt.optim.SCHEDULES`."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0 to its peak."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many rows at a time, how often to look."""

    max_steps: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: int | None = None
    """Passes over the training rows."""
    batch_size: int = 16
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (autocast)."""
    shard: bool = False
    """Whether weights, gradients and optimizer state are split over the processes (FSDP2), on CPUs too; else each process holds them whole (DDP)."""  # noqa: E501
    compile: bool = False
    """Whether the model runs through torch.compile."""
    log_every: int = 1
    """Steps between two training lines in metrics.jsonl."""
    eval_every: Any = 100
    """Steps between two evaluations, or `epoch`."""
    eval_rows: int = 128
    """At most this many rows of each split are scored at an evaluation during training; 0 scores all. The final one always scores all."""  # noqa: E501
    save_every: Any = 200
    """Steps between two checkpoints, or `epoch`; 0 keeps none."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    patience: int | None = None
    """Training ends when so many evaluations in a row have not lowered the validation loss, and the folder then holds the best weights instead of the last; null trains to the end and keeps the last."""  # noqa: E501
    on_nonfinite: str = "stop"
    """What a step whose loss or gradient is NaN or infinite does: `stop` ends the run before its weights are spoilt, `skip` leaves the step out and goes on, ten times in a row at most."""  # noqa: E501
    trackers: list[str] = field(default_factory=list)
    """Where the lines of metrics.jsonl go besides: `tensorboard`, `trackio`, `wandb`, `mlflow`."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is written at every evaluation."""

    prompt: str = "The"
    max_new_tokens: int = 80
    """Tokens to write; 0 writes no samples."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Likeliest tokens to draw from; 0 draws from all."""


@dataclass(frozen=True)
class RunConfig:
    """One run. `hfgpt config RECIPE` prints it with every value filled in."""

    output_dir: str = "out/run"
    """Folder that the run leaves; it becomes the Hub repository."""
    loop: str = "accelerate"
    """`accelerate` (hfgpt/loop.py) or `trainer` (transformers' Trainer): the same run, step for step."""
    seed: int = 0
    """Fixes weights, dropout, the order of the data and the samples."""
    init_from: str | None = None
    """Hub id or folder of a model to go on from (hfgpt or GPT-2); `model` may then set only dropouts."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `HFGPTConfig`, GPT-2's names included. `vocab_size` comes from the tokenizer."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe.

    Args:
        recipe: path of a YAML file, or the name of a recipe that hfgpt brings along (`demo`).
        overrides: `key.path=value`, later ones win. Text fields take what follows `=` as it is.

    Raises:
        ValueError: no such recipe, an unknown key, a value of the wrong type, or knobs that contradict one another.
    """
    try:
        merged = OmegaConf.structured(RunConfig)
        OmegaConf.set_readonly(merged, False)
        for layer in read_layers(recipe, overrides):
            merged = OmegaConf.merge(merged, layer)
        config = unescape(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"`{error.full_key}`: {unescape(str(error).splitlines()[0].rstrip('.'))}.") from error
    assert isinstance(config, RunConfig)
    return check(config)


def read_layers(recipe: str | Path, overrides: Iterable[str]) -> list[dict[str, Any]]:
    """What the recipe says, and then each override: values by key, checked, under the fields' names."""
    path = find_recipe(recipe)
    return [canonical_layer(layer) for layer in (yaml_mapping(path), *(parse_override(text) for text in overrides))]


def value_origins(config: RunConfig, recipe: str | Path, overrides: Iterable[str]) -> dict[str, str]:
    """Where each value of a loaded run comes from: key path -> `default`, `recipe` or `override`."""
    recipe_layer, *override_layers = read_layers(recipe, overrides)
    origins = dict.fromkeys(flatten(asdict(config)), "default")
    for origin, layers in [("recipe", [recipe_layer]), ("override", override_layers)]:
        for key in (key for layer in layers for key in flatten(layer)):
            origins[key] = origin
    return {key: origin for key, origin in origins.items() if key in flatten(asdict(config))}


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by their key paths; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        is_section = isinstance(value, Mapping) and value
        result |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return result


def config_yaml(config: RunConfig) -> str:
    """The run as YAML, every value written out, in the order of this file."""
    return yaml.dump(asdict(config), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def annotated_yaml(config: RunConfig, origins: Mapping[str, str], is_unicode: bool = True) -> str:
    """The same with a comment at each value that says where it comes from; it loads as the same run.

    Args:
        config: the run.
        origins: from `value_origins`.
        is_unicode: whether letters beyond ASCII may stand as they are.
    """
    lines: list[str] = []
    for name, value in asdict(config).items():
        is_section = isinstance(value, dict) and value
        if is_section:
            lines.append(f"{name}:")
        for key, inner in value.items() if is_section else [(name, value)]:
            # In one line, however long: a comment cannot stand inside of a folded text.
            text = yaml.dump({key: inner}, Dumper=RecipeDumper, allow_unicode=is_unicode, width=math.inf)
            first, *rest = text.splitlines()
            indent = "  " if is_section else ""
            origin = origins[f"{name}.{key}" if is_section else name]
            lines += [f"{indent + first:<40}  # {origin}", *(indent + line for line in rest)]
    return "\n".join(lines) + "\n"


class RecipeDumper(yaml.SafeDumper):
    """Writes text so that it is read back as the same text, by OmegaConf too."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote what is no plain line, and 1e3, which is text to PyYAML and a number to OmegaConf."""
        needs_quotes = not text.isprintable() or re.fullmatch(r"[-+]?[\d._]+[eE][-+]?\d+", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if needs_quotes else None)


RecipeDumper.add_representer(str, RecipeDumper.represent_text)


def find_recipe(recipe: str | Path) -> Path:
    """Find a recipe by path, or by the name of one that is installed with hfgpt.

    Raises:
        ValueError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    bundled = package_file(f"recipes/{recipe}.yaml")
    if re.fullmatch(r"[\w-]+", str(recipe)) and bundled.is_file():
        return bundled
    raise ValueError(f"no recipe {str(recipe)!r}: it is neither a file nor the name of a recipe of hfgpt (`demo`).")


def package_file(relative: str) -> Path:
    """Path of a file that the wheel carries inside `hfgpt/`, and a checkout beside it."""
    installed = Path(str(package_files("hfgpt"))) / relative
    return installed if installed.exists() else installed.parents[len(Path(relative).parts)] / relative


def yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file as OmegaConf does (1e-3 is a number), its text escaped.

    Raises:
        ValueError: the file is not YAML, or not a mapping.
    """
    try:
        text = escape(path.read_text(encoding="utf-8"))
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} is not a recipe: it must hold `key: value` lines.")
    return {str(key): value for key, value in loaded.items()}


def parse_override(text: str) -> dict[str, Any]:
    """Turn `key.path=value` into a layer, its text escaped.

    Raises:
        ValueError: there is no `=`, or what follows it is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not an override. Write `key.path=value`, such as `train.max_steps=100`.")
    names = key.strip().split(".")
    kind = field_type(names)
    parsed: Any = escape(value)
    if kind not in (str, str | None):
        try:
            parsed = OmegaConf.from_dotlist([f"value={parsed}"])["value"]
        except yaml.YAMLError as error:
            raise ValueError(f"`{key}`: {value!r} is not YAML. Is a bracket or a quote left open?") from error
    elif kind is not str and value in ("", "null"):
        parsed = None
    for name in reversed(names):
        parsed = {name: parsed}
    return parsed


def field_type(names: list[str]) -> Any:
    """The type of the field that a key path leads to, or None."""
    section: Any = RunConfig
    for name in names:
        section = get_type_hints(section).get(name) if is_dataclass(section) else None
    return section


def escape(text: str) -> str:
    """Take the meaning that OmegaConf gives them from `${` and `???`: a recipe holds values, not expressions."""
    return re.sub(r"[$?]", r"\g<0>.", text)


def unescape(value: Any) -> Any:
    """Undo `escape` in every text of a config."""
    if isinstance(value, str):
        return re.sub(r"([$?])\.", r"\1", value)
    if isinstance(value, dict):
        return {key: unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: unescape(getattr(value, item.name)) for item in fields(value)})
    return value


def canonical_layer(layer: Mapping[Any, Any]) -> dict[str, Any]:
    """Check the keys of one layer against `RunConfig` and write the model's aliases under their fields' names.

    Raises:
        ValueError: an unknown key, with the nearest known one.
    """
    check_keys(layer, RunConfig, "")
    result = {str(key): value for key, value in layer.items()}
    if result.get("model") is not None:
        if not isinstance(result["model"], Mapping):
            raise ValueError(f"`model` must hold `field: value` lines, got {result['model']!r}.")
        for name in result["model"]:
            if name not in MODEL_FIELDS:
                nearest = difflib.get_close_matches(str(name), MODEL_FIELDS, n=1)
                hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
                raise ValueError(f"`model`: unknown field `{name}`.{hint}")
        result["model"] = whole_numbers(canonical_fields(result["model"]), HFGPTConfig.__annotations__)
    return whole_numbers(result, get_type_hints(RunConfig))


def check_keys(layer: Mapping[Any, Any], section: Any, name: str) -> None:
    known = get_type_hints(section)
    for key, value in layer.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else f" It has {sorted(known)}."
            raise ValueError(f"Key '{key}' not in '{name or 'the recipe'}'.{hint}")
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"`{key}` must hold `key: value` lines, got {value!r}.")
            check_keys(value, known[key], str(key))


def whole_numbers(layer: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Read 1e3 as a whole number where one is meant."""
    result = dict(layer)
    for key, value in layer.items():
        if is_dataclass(hints[key]):
            result[key] = whole_numbers(value, get_type_hints(hints[key]))
        elif isinstance(value, float) and value.is_integer() and hints[key] in (int, int | None, Any):
            result[key] = int(value)
    return result


def check(config: RunConfig) -> RunConfig:
    """Refuse what no type can say: choices, ranges, and knobs that contradict one another or have no effect.

    Raises:
        ValueError: naming the knob, its value, and what would be right.
    """
    data, optim, train, sample = config.data, config.optim, config.train, config.sample
    choose("loop", config.loop, ["accelerate", "trainer"])
    choose("train.precision", train.precision, ["fp32", "bf16", "fp16"])
    choose("data.packing", data.packing, ["contiguous", "isolated", "padded"])
    choose("train.on_nonfinite", train.on_nonfinite, ["stop", "skip"])
    for name in train.trackers:
        choose("train.trackers", name, list(TRACKERS))
    if data.streaming:
        check_streaming(config)
    if not config.output_dir:
        raise ValueError("`output_dir` is empty. Name the folder that the run shall leave.")
    if (data.source is None) == (data.files is None):
        raise ValueError(
            f"give `data.source` or `data.files`, one of them: got {data.source!r} and {data.files!r}. "
            "`data.source=pydoc` is on every machine."
        )
    has_validation = data.validation_files is not None or data.validation_split is not None
    for name, reason, is_without_effect in [
        ("name", "`data.source` is no Hub data set", data.source in (None, "pydoc")),
        ("split", "`data.source` is no Hub data set", data.source in (None, "pydoc")),
        ("validation_split", "`data.source` is no Hub data set", data.source in (None, "pydoc")),
        ("validation_files", "`data.files` is not given", data.files is None),
        ("validation_fraction", "the validation text is named", has_validation),
        ("shuffle_buffer", "`data.streaming` is false", not data.streaming),
        ("shuffle_buffer", "`data.shuffle_documents` is false", not data.shuffle_documents),
        ("validation_documents", "`data.streaming` is false", not data.streaming),
        ("validation_documents", "the validation text is named", has_validation),
        ("validation_fraction", "a stream has no end; see `data.validation_documents`", data.streaming),
        ("stride", "a stream is cut into rows without overlap", data.streaming),
        ("num_proc", "a stream is tokenized as it is read", data.streaming),
        ("num_workers", "a stream is tokenized as it is read", data.streaming),
        ("stride", "rows of `packing: padded` begin with their documents", data.packing == "padded"),
    ]:
        value = getattr(data, name)
        if is_without_effect and value != getattr(DataConfig, name):
            raise ValueError(f"`data.{name}` ({value!r}) has no effect: {reason}. Leave it out.")
    for name, value in [("compile", train.compile), ("precision", train.precision == "fp16" and "fp16")]:
        if train.shard and value:
            raise ValueError(f"`train.shard` does not go with `train.{name}` ({value!r}) yet. Leave one of them out.")
    if (train.max_steps is None) == (train.epochs is None):
        raise ValueError(
            f"give `train.max_steps` or `train.epochs`, one of them: got {train.max_steps} and {train.epochs}."
        )
    for name, value, least in [
        ("seed", config.seed, 0),
        ("train.max_steps", train.max_steps, 1),
        ("train.epochs", train.epochs, 1),
        ("train.batch_size", train.batch_size, 1),
        ("train.gradient_accumulation_steps", train.gradient_accumulation_steps, 1),
        ("train.log_every", train.log_every, 1),
        ("train.eval_rows", train.eval_rows, 0),
        ("train.keep_last", train.keep_last, 1),
        ("train.patience", train.patience, 1),
        ("data.block_size", data.block_size, 1),
        ("data.num_proc", data.num_proc, 1),
        ("data.num_workers", data.num_workers, 0),
        ("data.stride", data.stride, 1),
        ("data.shuffle_buffer", data.shuffle_buffer, 1),
        ("data.validation_documents", data.validation_documents, 1),
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, 257),
        ("optim.warmup_steps", optim.warmup_steps, 0),
        ("optim.weight_decay", optim.weight_decay, 0),
        ("optim.max_grad_norm", optim.max_grad_norm, 0),
        ("sample.max_new_tokens", sample.max_new_tokens, 0),
        ("sample.temperature", sample.temperature, 0),
        ("sample.top_k", sample.top_k, 0),
    ]:
        if value is not None and not least <= value < math.inf:
            limit = "finite" if value == math.inf else f"at least {least}"
            raise ValueError(f"`{name}` must be {limit}, got {value}.")
    if config.seed > LARGEST_SEED:
        raise ValueError(f"`seed` must be at most {LARGEST_SEED}, got {config.seed}.")
    for name, value, least in [
        ("train.eval_every", train.eval_every, 1),
        ("train.save_every", train.save_every, 0),
    ]:
        if value != "epoch" and not (type(value) is int and value >= least):
            raise ValueError(f"`{name}` must be a number of steps, at least {least}, or 'epoch', got {value!r}.")
    if train.patience is not None and train.save_every == 0:
        raise ValueError(
            f"`train.patience` ({train.patience}) keeps the best weights in a checkpoint, and `train.save_every` is 0: "
            "none are kept. Set it to a number of steps, or leave `train.patience` out."
        )
    if train.on_nonfinite == "skip" and train.precision == "fp16":
        raise ValueError(
            "`train.on_nonfinite` (skip) has no effect with `train.precision` fp16, whose scaler skips such steps "
            "itself. Leave it out."
        )
    if data.stride is not None and data.stride > data.block_size:
        raise ValueError(
            f"`data.stride` ({data.stride}) is longer than `data.block_size` ({data.block_size}): tokens between rows "
            "would never be scored. Lower the one or raise the other."
        )
    if not 0 < data.validation_fraction < 1:
        raise ValueError(f"`data.validation_fraction` must be between 0 and 1, got {data.validation_fraction}.")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"`optim.betas` must be two numbers in [0, 1), got {optim.betas}.")
    if not 0 < optim.learning_rate < math.inf:
        raise ValueError(f"`optim.learning_rate` must be finite and above 0, got {optim.learning_rate}.")
    if train.max_steps is not None and optim.warmup_steps > train.max_steps:
        raise ValueError(
            f"`optim.warmup_steps` ({optim.warmup_steps}) is longer than `train.max_steps` ({train.max_steps}). "
            "The learning rate would never reach its peak: lower the one or raise the other."
        )
    trained = config.tokenizer.name or config.init_from
    if trained is not None and config.tokenizer.vocab_size != TokenizerConfig.vocab_size:
        raise ValueError(
            f"`tokenizer.vocab_size` ({config.tokenizer.vocab_size}) has no effect: the tokenizer of {trained!r} is "
            "trained already. Leave it out."
        )
    check_model(config)
    return config


def check_streaming(config: RunConfig) -> None:
    """Refuse what only a text that is there as a whole can give."""
    data, train = config.data, config.train
    if data.source == "pydoc":
        raise ValueError("`data.streaming` has no effect on `data.source=pydoc`, which is small. Leave it out.")
    if config.tokenizer.name is None and config.init_from is None:
        raise ValueError(
            "`data.streaming` needs a tokenizer that is trained already: set `tokenizer.name`. "
            "`hfgpt tokenizer train` makes one of a part of the text."
        )
    for name, value in [("epochs", train.epochs), ("eval_every", train.eval_every), ("save_every", train.save_every)]:
        if value == "epoch" or (name == "epochs" and value is not None):
            raise ValueError(
                f"`train.{name}` ({value!r}) needs an end of the text, `data.streaming` has none: count steps."
            )


def check_model(config: RunConfig) -> None:
    """Refuse a `model` section that cannot be built or would have no effect."""
    for name in TOKENIZER_FIELDS:
        if name in config.model:
            raise ValueError(
                f"`model.{name}` ({config.model[name]}) comes from the tokenizer: leave it out, and set `tokenizer`."
            )
    if config.init_from is not None:
        shape = [name for name in config.model if name not in DROPOUT_FIELDS]
        if shape:
            raise ValueError(
                f"`model.{shape[0]}` has no effect: `init_from` ({config.init_from!r}) fixes the shape. "
                f"Only {', '.join(DROPOUT_FIELDS)} may be set."
            )
        return
    try:
        built = HFGPTConfig(**config.model)
    except StrictDataclassError as error:
        raise ValueError(f"`model`: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"`model`: {error}") from error
    if config.data.block_size > built.max_position_embeddings:
        raise ValueError(
            f"`data.block_size` ({config.data.block_size}) is longer than the model's `n_positions` "
            f"({built.max_position_embeddings}). Lower the one or raise the other."
        )


def choose(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
