"""A run made ready: folder, text, tokenizer, rows, model. Both loops start from here."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hfgpt.config.loading import config_yaml, load_config
from hfgpt.config.schema import DROPOUT_FIELDS, RunConfig
from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data.loaders import stream_loader, train_loader
from hfgpt.data.prepare import (
    Rows,
    check_ids,
    load_text,
)
from hfgpt.data.rows import TokenRows
from hfgpt.data.tokenizer import encode_ids, tokenizer_hash
from hfgpt.distributed.deepspeed import check_deepspeed
from hfgpt.distributed.launch import check_launcher, join_processes
from hfgpt.distributed.sharding import shard_model
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.results.records import RESULTS_FILE
from hfgpt.system.console import print_status
from hfgpt.system.storage import write_atomically
from hfgpt.training import checkpoint
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.optim import check_optim, check_warmup
from hfgpt.training.trackers import check_trackers
from hfgpt.weights import load

RUN_FILE, LOCK_FILE = "run.yaml", ".lock"

ELASTIC = ("batch_size", "gradient_accumulation_steps", "trackers")
"""Fields of `train` that may differ when a run goes on: the product of the first two with the processes is the rows
per step, and who watches changes nothing."""


@dataclass(frozen=True)
class Run:
    """One run, ready to train.

    Attributes:
        config: every knob.
        folder: what the run leaves.
        tokenizer: of the model.
        rows: training and validation rows.
        model: with its first weights, or those of the checkpoint to go on from.
        position: where training starts.
        resume_from: the checkpoint to go on from, or None.
        identity: what must be the same to go on: tokenizer, rows, rows per step.
        global_batch: rows in a micro-batch, over all processes.
        steps_per_epoch: optimizer steps; the last one of an epoch may hold fewer rows.
        total_steps: optimizer steps of the whole run.
        lock: held while the run writes into its folder; on the main process.
    """

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    rows: Rows
    model: HFGPTForCausalLM
    position: TrainState
    resume_from: Path | None
    identity: dict[str, Any]
    global_batch: int
    steps_per_epoch: int
    total_steps: int
    lock: FileLock | None

    def train_loader(self) -> DataLoader:
        """This process's micro-batches."""
        train, process = self.config.train, PartialState()
        if self.rows.streamed is not None:
            return stream_loader(self.rows.streamed, train.batch_size)
        return train_loader(
            self.rows.train,
            train.batch_size,
            self.config.seed,
            process.process_index,
            process.num_processes,
            self.config.data.num_workers,
        )

    def next_position(self, position: TrainState, micro_batches: int, targets: int) -> TrainState:
        """The position after one more step of so many micro-batches and, over all processes, targets."""
        rows = position.rows + micro_batches * self.global_batch
        is_epoch_done = self.rows.streamed is None and rows >= len(self.rows.train)
        return TrainState(
            step=position.step + 1,
            epoch=position.epoch + is_epoch_done,
            rows=0 if is_epoch_done else rows,
            tokens=position.tokens + targets,
        )


def open_run(config: RunConfig, resume: bool | str = False) -> Run | None:
    """Make a run ready: folder, text, tokenizer, rows, model.

    Args:
        config: a checked config, from `load_config`.
        resume: True goes on from the newest checkpoint that verifies, or starts if there is none; a path goes on from
            that checkpoint.

    Returns:
        The run, or None if the folder holds this very run and it is finished.

    Raises:
        ValueError: the folder holds something else, there is no such checkpoint, or text, tokenizer and model do not
            fit together. Nothing has been written then.
    """
    check_optim(config.optim)
    check_trackers(config.train.trackers)
    check_launcher(config)
    join_processes()
    check_deepspeed(config)
    if config.train.precision == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("`train.precision` is fp16, which a CPU does not compute in. Use fp32 or bf16.")
    folder = Path(config.output_dir)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            check_folder(config, folder, resume)
    resume_from = find_checkpoint(folder, resume)
    if (folder / RESULTS_FILE).is_file():
        if isinstance(resume, str):
            raise ValueError(f"`output_dir` ({folder}) holds this run, finished: there is nothing to go on with.")
        return None

    with PartialState().main_process_first():
        tokenizer, rows = load_text(config)
    set_seed(config.seed)
    model = make_model(config, tokenizer)
    if max(tokenizer.get_vocab().values()) >= model.config.vocab_size:  # else no id can be too large: spare the look
        check_ids(rows.train, model.config.vocab_size, "the training split")
        check_ids(rows.validation, model.config.vocab_size, "the validation split")
    check_prompt(config, tokenizer, model)

    global_batch = config.train.batch_size * PartialState().num_processes
    rows_per_step = global_batch * config.train.gradient_accumulation_steps
    steps_per_epoch = -(-len(rows.train) // rows_per_step)
    total_steps = config.train.max_steps or (config.train.epochs or 0) * steps_per_epoch
    check_warmup(config.optim, total_steps)
    identity = {
        "tokenizer": tokenizer_hash(tokenizer),
        "training rows": rows_hash(rows.train),
        "validation rows": rows_hash(rows.validation),
        "number of rows per step": rows_per_step,  # so that every step sees the same rows, on however many processes
    }
    if rows.streamed is not None:
        identity["number of processes"] = PartialState().num_processes  # each reads a share of its own
    position = TrainState()
    if resume_from is not None:
        manifest = checkpoint.verify_checkpoint(resume_from)
        for name, value in identity.items():
            if manifest.identity.get(name) != value:
                raise ValueError(
                    f"{resume_from} was written with another {name}: {manifest.identity.get(name)}, now {value}. "
                    "Go on with the same, or start in another `output_dir`."
                )
        position = manifest.position
        model.load_state_dict(load(resume_from).state_dict())
    if config.train.shard and PartialState().num_processes > 1:
        model = shard_model(model)
    else:
        model.to(PartialState().device)
        if config.train.shard:
            print_status("`train.shard` has no effect on one process: there is nothing to split.")
    lock = None
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        check_folder(config, folder, resume)  # another run may have begun here in the meantime
        write_atomically(folder / RUN_FILE, config_yaml(config).encode())
        if resume_from is not None:
            checkpoint.supersede(folder, position.step)
            checkpoint.prune(folder, config.train.keep_last)  # what a run that was killed has not come to
    PartialState().wait_for_everyone()
    return Run(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        position=position,
        resume_from=resume_from,
        identity=identity,
        global_batch=global_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        lock=lock,
    )


def lock_folder(folder: Path) -> FileLock:
    """Keep other runs out of a folder until this process releases it, or ends in whatever way.

    Raises:
        ValueError: another process has it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is writing into `output_dir` ({folder}). Wait, or name another.") from error
    return lock


def rows_hash(rows: TokenRows) -> str:
    """SHA-256 of the ids of up to 10,000 rows, spread over all: a token more or less anywhere shifts what follows."""
    digest = hashlib.sha256(f"{len(rows)}".encode())
    for index in range(0, len(rows), 1 + len(rows) // 10_000):
        digest.update(rows[index]["input_ids"].tobytes())
    return digest.hexdigest()


def check_folder(config: RunConfig, folder: Path, resume: bool | str) -> None:
    """Refuse an output folder that holds anything but this run.

    Raises:
        ValueError: naming the folder and what is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` ({folder}) is a file. Name a folder.")
    # Hidden files are no content: the system makes them, and an interrupted write leaves one.
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"`output_dir` ({folder}) holds files of something else. Name an empty folder or a new one.")
    try:
        there = replace(load_config(folder / RUN_FILE), output_dir=config.output_dir)  # the folder may have been moved
        if resume:
            elastic = {name: getattr(config.train, name) for name in ELASTIC}
            there = replace(there, train=replace(there.train, **elastic))
    except ValueError as error:
        raise ValueError(f"`output_dir` ({folder}) holds another run, unreadable: {error}") from error
    difference = first_difference(asdict(there), asdict(config))
    if difference is not None:
        name, old, new = difference
        raise ValueError(
            f"`output_dir` ({folder}) holds another run: its `{name}` is {old!r}, this one's {new!r}. "
            "Name another folder."
        )
    if not (folder / RESULTS_FILE).is_file() and not resume:
        raise ValueError(
            f"`output_dir` ({folder}) holds this run, unfinished. Add `--resume` to go on, or name another folder."
        )


def first_difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first knob in which two runs differ, and its two values."""
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = first_difference(old, new)
            if inner is not None:
                return f"{name}.{inner[0]}", inner[1], inner[2]
        elif old != new:
            return name, old, new
    return None


def find_checkpoint(folder: Path, resume: bool | str) -> Path | None:
    """The checkpoint to go on from, or None to start.

    Raises:
        ValueError: the one that was named is not there, is not of this run, or is damaged.
    """
    if not resume:
        return None
    if resume is True:
        return checkpoint.newest_checkpoint(folder, warn=print_status)
    path = Path(resume)
    if not path.is_dir():
        there = ", ".join(found.name for found in checkpoint.checkpoints(folder)) or "none"
        raise ValueError(f"no such checkpoint: {resume}. In {folder} there are: {there}.")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{resume} is a checkpoint of another run: `output_dir` is {folder}.")
    checkpoint.verify_checkpoint(path)
    return path


def make_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> HFGPTForCausalLM:
    """A new model of the recipe's shape, or the one to go on from, in fp32.

    Raises:
        ValueError: the tokenizer knows more ids than the model, or a row is longer than the model's positions.
    """
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.init_from is None:
        return HFGPTForCausalLM(HFGPTConfig(vocab_size=len(tokenizer), **token_ids, **config.model))
    dropouts = {name: value for name, value in config.model.items() if name in DROPOUT_FIELDS}
    try:
        model = load(config.init_from, dtype=torch.float32, **dropouts)
    except ValueError as error:
        raise ValueError(f"`init_from`: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, `init_from` ({config.init_from}) a `vocab_size` of "
            f"{model.config.vocab_size}. Leave `tokenizer.name` out to use the model's own."
        )
    if config.data.block_size > model.config.max_position_embeddings:
        raise ValueError(
            f"`data.block_size` ({config.data.block_size}) is longer than the `n_positions` of {config.init_from} "
            f"({model.config.max_position_embeddings}). Lower it."
        )
    return model


def prompt_ids(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(1, T) ids of the sample's prompt; an empty one is a document's start."""
    (ids,) = encode_ids(tokenizer, [config.sample.prompt])
    return torch.tensor([ids or [tokenizer.eos_token_id]])


def check_prompt(config: RunConfig, tokenizer: PreTrainedTokenizerFast, model: HFGPTForCausalLM) -> None:
    """Refuse a sample that does not fit the model's positions."""
    wanted = prompt_ids(config, tokenizer).shape[1] + config.sample.max_new_tokens
    if config.sample.max_new_tokens and wanted > model.config.max_position_embeddings:
        raise ValueError(
            f"`sample.prompt` and `sample.max_new_tokens` make {wanted} tokens, the model's `n_positions` are "
            f"{model.config.max_position_embeddings}. Shorten the sample."
        )
