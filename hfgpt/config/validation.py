"""What the range of one option cannot say: options that contradict one another or have no effect."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hfgpt.config.model_class import build_model_config
from hfgpt.config.ranges import check_choice, check_ranges
from hfgpt.config.schema import (
    DROPOUT_FIELDS,
    TOKENIZER_FIELDS,
    TRACKERS,
    DataConfig,
    OptimConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from hfgpt.system.console import print_status


def check_options(config: RunConfig) -> None:
    """Refuse options out of their range, that contradict one another, or without effect; all but the `model` section.

    It imports no torch, so that most mistakes are answered at once.

    Raises:
        ValueError: naming the option, its value, and what would be right.
    """
    if not config.output_dir:
        raise ValueError("`output_dir` is empty. Name the folder to write the run to.")
    check_ranges(config)
    check_data(config.data)
    check_train(config.train)
    check_optim(config)
    if config.data.streaming:
        check_streaming(config)
    check_warmup(config)
    check_tokenizer(config)


def check_data(data: DataConfig) -> None:
    if data.streaming and data.source == "pydoc":
        raise ValueError("`data.streaming` has no effect on `data.source=pydoc`, which is small. Leave it out.")
    if (data.source is None) == (data.files is None):
        raise ValueError(
            f"give `data.source` or `data.files`, one of them: got {data.source!r} and {data.files!r}. "
            "`data.source=pydoc` is on every machine."
        )
    has_no_set = data.source in (None, "pydoc")
    is_named = data.validation_files is not None or data.validation_split is not None
    for is_so, reason, names in [
        (has_no_set, "`data.source` is no Hub data set", ["name", "split", "validation_split"]),
        (data.files is None, "`data.files` is not given", ["validation_files"]),
        (is_named, "the validation text is named", ["validation_fraction", "validation_documents"]),
        (not data.streaming, "`data.streaming` is false", ["shuffle_buffer", "validation_documents"]),
        (not data.shuffle_documents, "`data.shuffle_documents` is false", ["shuffle_buffer"]),
        (data.streaming, "a stream has no end; see `data.validation_documents`", ["validation_fraction"]),
        (data.streaming, "a stream is cut into rows without overlap", ["stride"]),
        (data.streaming, "a stream is tokenized as it is read", ["num_proc", "num_workers"]),
        (data.packing == "padded", "rows of `packing: padded` begin with their documents", ["stride"]),
    ]:
        for name in names:
            value = getattr(data, name)
            if is_so and value != getattr(DataConfig, name):
                raise ValueError(f"`data.{name}` ({value!r}) has no effect: {reason}. Leave it out.")
    if data.separator is None and data.packing != "contiguous":
        raise ValueError(
            f"`data.packing` ({data.packing!r}) keeps documents apart, and with `data.separator` null nothing marks "
            "where one ends. Set `data.packing=contiguous`, or leave `data.separator` out."
        )
    if data.stride is not None and data.stride > data.block_size:
        raise ValueError(
            f"`data.stride` ({data.stride}) is longer than `data.block_size` ({data.block_size}): tokens between rows "
            "would never be scored. Lower the one or raise the other."
        )


def check_train(train: TrainConfig) -> None:
    for tracker in train.trackers:
        check_choice("train.trackers", tracker, TRACKERS)
    for name, value in [("compile", train.compile is True), ("precision", train.precision == "fp16" and "fp16")]:
        if train.shard and value:
            raise ValueError(f"`train.shard` does not go with `train.{name}` ({value!r}) yet. Leave one of them out.")
    if (train.max_steps is None) == (train.epochs is None):
        raise ValueError(
            f"give `train.max_steps` or `train.epochs`, one of them: got {train.max_steps} and {train.epochs}. "
            "`train.epochs=null` takes back what a recipe says."
        )
    if train.final_eval_rows and not 0 < train.eval_rows <= train.final_eval_rows:
        raise ValueError(
            f"`train.final_eval_rows` ({train.final_eval_rows}) is below `train.eval_rows` "
            f"({train.eval_rows or '0: all rows'}): the final losses would be of fewer rows than those before them. "
            "Raise the one or lower the other."
        )
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


def check_optim(config: RunConfig) -> None:
    optim, train = config.optim, config.train
    for name, owner, is_so in [
        ("muon_learning_rate", "`optim.name` is not muon", optim.name != "muon"),
        ("decay_share", "`optim.schedule` is not wsd", optim.schedule != "wsd"),
    ]:
        value = getattr(optim, name)
        if is_so and value != getattr(OptimConfig, name):
            raise ValueError(f"`optim.{name}` ({value}) has no effect: {owner}. Leave it out.")
    for name, value in [("shard", train.shard), ("precision", train.precision == "fp16" and "fp16")]:
        if optim.name == "muon" and value:
            raise ValueError(
                f"`optim.name` muon does not go with `train.{name}` ({value!r}) yet. Leave one of them out."
            )


def check_streaming(config: RunConfig) -> None:
    """Refuse what only a text that is stored as a whole can give."""
    if config.tokenizer.name is None and config.init_from is None:
        raise ValueError(
            "`data.streaming` needs a tokenizer that is trained already: set `tokenizer.name`. "
            "`hfgpt tokenizer train` makes one of a part of the text."
        )
    train = config.train
    for name, value in [("epochs", train.epochs), ("eval_every", train.eval_every), ("save_every", train.save_every)]:
        if value == "epoch" or (name == "epochs" and value is not None):
            raise ValueError(
                f"`train.{name}` ({value!r}) needs an end of the text, `data.streaming` has none: count steps."
            )


def check_warmup(config: RunConfig) -> None:
    warmup_steps, max_steps = config.optim.warmup_steps, config.train.max_steps
    if max_steps is not None and warmup_steps > max_steps:
        raise ValueError(
            f"`optim.warmup_steps` ({warmup_steps}) is longer than `train.max_steps` ({max_steps}). "
            "The learning rate would never reach its peak: lower the one or raise the other."
        )


def shorten_warmup(config: RunConfig, layers: Sequence[Mapping[str, Any]]) -> RunConfig:
    """Shorten a warmup that a later `train.max_steps` has made longer than the run, and say so.

    Where both come from the same place, they are left as they are, for `check_warmup` to refuse.

    Args:
        config: of all layers, over the defaults.
        layers: what the recipe says, and then each override.
    """
    max_steps, warmup_steps = config.train.max_steps, config.optim.warmup_steps

    def place(section: str, name: str) -> int:
        """Where an option comes from: the defaults, the recipe, or the overrides, which were given together."""
        places = [min(index, 1) for index, layer in enumerate(layers) if name in layer.get(section, {})]
        return max(places, default=-1)

    if max_steps is None or max_steps < 1:  # which is refused as it is
        return config
    if place("optim", "warmup_steps") >= place("train", "max_steps"):
        return config
    shortened = fit_warmup(warmup_steps, max_steps, "`train.max_steps`")
    return replace(config, optim=replace(config.optim, warmup_steps=shortened))


def fit_warmup(warmup_steps: int, total_steps: int, name: str = "the run") -> int:
    """The warmup of a run of so many steps: a tenth of them, with a warning, if what is asked for is longer.

    `name` is what the steps are called in the warning.
    """
    if warmup_steps <= total_steps:
        return warmup_steps
    shortened = total_steps // 10
    print_status(
        f"warning: `optim.warmup_steps` ({warmup_steps}) is longer than {name} ({total_steps}): {shortened} are taken, "
        "a tenth."
    )
    return shortened


def check_tokenizer(config: RunConfig) -> None:
    trained = config.tokenizer.name or config.init_from
    if trained is not None and config.tokenizer.vocab_size != TokenizerConfig.vocab_size:
        raise ValueError(
            f"`tokenizer.vocab_size` ({config.tokenizer.vocab_size}) has no effect: the tokenizer of {trained!r} is "
            "trained already. Leave it out."
        )


def check_model(config: RunConfig) -> RunConfig:
    """Refuse a `model` section that cannot be built or would have no effect."""
    for name in TOKENIZER_FIELDS:
        if name in config.model:
            raise ValueError(
                f"`model.{name}` ({config.model[name]}) comes from the tokenizer: leave it out, and set `tokenizer`."
            )
    if config.init_from is not None:
        for name in config.model:
            if name not in DROPOUT_FIELDS:
                raise ValueError(
                    f"`model.{name}` has no effect: `init_from` ({config.init_from!r}) fixes the shape. "
                    f"Only {', '.join(DROPOUT_FIELDS)} may be set."
                )
        return config
    if config.model_class is None:  # else when the run is opened
        build_model_config(config)
    return config
