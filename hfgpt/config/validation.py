"""What no type can say of a run's knobs: choices, ranges, and knobs that contradict one another or have no effect."""

import math

from huggingface_hub.errors import StrictDataclassError

from hfgpt.config.schema import (
    DROPOUT_FIELDS,
    LARGEST_SEED,
    TOKENIZER_FIELDS,
    TRACKERS,
    DataConfig,
    RunConfig,
    TokenizerConfig,
)
from hfgpt.configuration_hfgpt import HFGPTConfig


def check(config: RunConfig) -> RunConfig:
    """Refuse what no type can say: choices, ranges, and knobs that contradict one another or have no effect.

    Raises:
        ValueError: naming the knob, its value, and what would be right.
    """
    data, optim, train, sample = config.data, config.optim, config.train, config.sample
    check_choice("loop", config.loop, ["accelerate", "trainer"])
    check_choice("train.precision", train.precision, ["fp32", "bf16", "fp16"])
    check_choice("data.packing", data.packing, ["contiguous", "isolated", "padded"])
    check_choice("train.on_nonfinite", train.on_nonfinite, ["stop", "skip"])
    for name in train.trackers:
        check_choice("train.trackers", name, list(TRACKERS))
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
            f"give `train.max_steps` or `train.epochs`, one of them: got {train.max_steps} and {train.epochs}. "
            "`train.epochs=null` takes back what a recipe says."
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


def check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
