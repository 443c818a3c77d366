"""A run made ready: folder, text, tokenizer, rows, model. Both loops start from here."""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfgpt.config.loading import config_yaml, flatten, load_config
from hfgpt.config.model_class import build_model_config, find_model_class
from hfgpt.config.schema import DROPOUT_FIELDS, OptimConfig, RunConfig
from hfgpt.config.validation import fit_warmup
from hfgpt.data.loaders import stream_loader, train_loader
from hfgpt.data.prepare import Rows, load_text
from hfgpt.data.rows import TokenRows
from hfgpt.data.tokenizer import count_rows, encode_prompt, tokenizer_hash
from hfgpt.data.vocabulary import check_rows, ids_of_text
from hfgpt.distributed.launch import join_launch
from hfgpt.distributed.sharding import shard_model
from hfgpt.results.records import RESULTS_FILE
from hfgpt.system.console import print_status
from hfgpt.system.quoting import quote
from hfgpt.system.storage import write_atomically
from hfgpt.training import checkpoint
from hfgpt.training.checkpoint import TrainState
from hfgpt.training.optim import block_matrices
from hfgpt.training.trackers import check_trackers
from hfgpt.weights import load
from hfgpt.weights.model_parts import model_class_of

RUN_FILE, LOCK_FILE = "run.yaml", ".lock"

ELASTIC = ("batch_size", "gradient_accumulation_steps", "trackers", "final_eval_rows")
"""Fields of `train` that may differ when a run goes on: the product of the first two with the processes is the rows
per step, and who watches, or what is scored after the last step, changes no weight."""


@dataclass(frozen=True)
class Run:
    """One run, ready to train.

    Attributes:
        optim: the config's, with a warmup that is no longer than the run.
        folder: what the run leaves.
        model: with its first weights, or those of the checkpoint to go on from.
        start: where training starts.
        resume_from: the checkpoint to go on from, or None.
        identity: what must be the same to go on: tokenizer, rows, rows per step.
        origins: where model and tokenizer come from: "nothing", "folder" or "hub".
        lock: held while the run writes into its folder; on the main process.
        is_compiled: whether the model runs through torch.compile; None if that is still to be decided.
    """

    config: RunConfig
    optim: OptimConfig
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    rows: Rows
    model: PreTrainedModel
    start: TrainState
    resume_from: Path | None
    identity: dict[str, Any]
    origins: dict[str, str]
    lock: FileLock | None
    is_compiled: bool | None

    @property
    def global_batch(self) -> int:
        """Rows in a micro-batch, over all processes."""
        return self.config.train.batch_size * PartialState().num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; the last one of an epoch may hold fewer rows."""
        return math.ceil(len(self.rows.train) / (self.global_batch * self.config.train.gradient_accumulation_steps))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.max_steps or (self.config.train.epochs or 0) * self.steps_per_epoch

    @property
    def final_rows(self) -> int:
        """Rows of the validation text, and at most as many to train on, that are scored at the end."""
        return min(self.config.train.final_eval_rows or len(self.rows.validation), len(self.rows.validation))

    def train_loader(self) -> DataLoader:
        """This process's micro-batches."""
        train, process = self.config.train, PartialState()
        pin_memory = process.device.type == "cuda"
        if self.rows.streamed is not None:
            return stream_loader(self.rows.streamed, train.batch_size, pin_memory)
        return train_loader(
            self.rows.train,
            train.batch_size,
            self.config.seed,
            process.process_index,
            process.num_processes,
            self.config.data.num_workers,
            pin_memory,
        )

    def next_state(self, state: TrainState, micro_batches: int, targets: int) -> TrainState:
        """Where training stands after one more step of so many micro-batches and, over all processes, targets."""
        rows = state.rows + micro_batches * self.global_batch
        is_epoch_done = self.rows.streamed is None and rows >= len(self.rows.train)
        return TrainState(
            step=state.step + 1,
            epoch=state.epoch + is_epoch_done,
            rows=0 if is_epoch_done else rows,
            tokens=state.tokens + targets,
        )


def open_run(config: RunConfig, resume: bool | str = False) -> Run | None:
    """Make a run ready: its folder, its text, its model, and a lock on the folder.

    A run that goes on needs its text and its checkpoint, which holds weights and tokenizer; not the model that it
    started from.

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
    check_trackers(config.train.trackers)
    if config.model_class is not None:
        find_model_class(config) if config.init_from else build_model_config(config)
    join_launch(config)
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
        tokenizer, rows = load_text(config, resume_from)
    set_seed(config.seed)
    model = make_model(config, tokenizer, resume_from)
    check_fit(config, tokenizer, model)
    run = Run(
        config=config,
        optim=config.optim,
        folder=folder,
        tokenizer=tokenizer,
        rows=rows,
        model=model,
        start=TrainState(),
        resume_from=resume_from,
        identity=identify(config, tokenizer, rows),
        origins={"model": origin(config.init_from), "tokenizer": origin(config.tokenizer.name or config.init_from)},
        lock=None,
        is_compiled=None if config.train.compile == "auto" else config.train.compile,
    )
    optim = replace(config.optim, warmup_steps=fit_warmup(config.optim.warmup_steps, run.total_steps))
    run = replace(run, optim=optim)
    if resume_from is not None:
        manifest = checkpoint.load_manifest(resume_from)
        check_same_run(run, manifest)
        is_compiled = run.is_compiled
        if is_compiled is None and PartialState().device.type == "cuda":
            is_compiled = manifest.is_compiled  # so that the steps are those of a run that never stopped
        origins = manifest.origins or run.origins
        run = replace(run, start=manifest.state, origins=origins, is_compiled=is_compiled)
    return lock_run(place_model(run), resume)


def identify(config: RunConfig, tokenizer: PreTrainedTokenizerFast, rows: Rows) -> dict[str, Any]:
    """What must be the same for a run to go on, by its name in messages."""
    process, train = PartialState(), config.train
    identity = {
        "tokenizer": tokenizer_hash(tokenizer),
        "training rows": rows_hash(rows.train),
        "validation rows": rows_hash(rows.validation),
        # So that every step sees the same rows, on however many processes.
        "number of rows per step": train.batch_size * process.num_processes * train.gradient_accumulation_steps,
    }
    if rows.streamed is not None:
        identity["number of processes"] = process.num_processes  # each reads a share of its own
    return identity


def origin(name: str | None) -> str:
    """Where a model or a tokenizer of a recipe comes from: nothing, a folder of this machine, or the Hub."""
    return "nothing" if name is None else "folder" if Path(name).exists() else "hub"


def check_same_run(run: Run, manifest: checkpoint.Manifest) -> None:
    """Refuse to go on from a checkpoint with another tokenizer, other rows or other steps.

    Raises:
        ValueError: naming what differs.
    """
    for name, value in run.identity.items():
        if manifest.identity.get(name) != value:
            raise ValueError(
                f"{run.resume_from} was written with another {name}: {manifest.identity.get(name)}, now {value}. "
                "Go on with the same, or start in another `output_dir`."
            )


def place_model(run: Run) -> Run:
    """Bring the model to this process's device, or, with `train.shard`, each process a part of it."""
    if run.config.train.shard and PartialState().num_processes > 1:
        return replace(run, model=shard_model(run.model))
    run.model.to(PartialState().device)
    if run.config.train.shard:
        print_status("`train.shard` has no effect on one process: there is nothing to split.")
    return run


def lock_run(run: Run, resume: bool | str) -> Run:
    """Lock the folder, until this process releases it or ends, and begin to write into it.

    run.yaml is written, and checkpoints that are no longer part of the run go.

    Raises:
        ValueError: another process writes there, or another run has begun there in the meantime.
    """
    if PartialState().is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is writing into `output_dir` ({run.folder}). Wait, or name another."
            ) from error
        run = replace(run, lock=lock)
        check_folder(run.config, run.folder, resume)
        write_atomically(run.folder / RUN_FILE, config_yaml(run.config).encode())
        if run.resume_from is not None:
            checkpoint.supersede(run.folder, run.start.step)
            checkpoint.prune(run.folder, run.config.train.keep_last)  # what a run that was killed has not come to
    PartialState().wait_for_everyone()
    return run


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
    # An empty section is none, or a difference within it would be named after the section.
    old, new = (
        {name: value for name, value in flatten(asdict(each)).items() if value != {}} for each in (there, config)
    )
    for name in old | new:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"`output_dir` ({folder}) holds another run: its `{name}` is {quote(old.get(name))}, this one's "
                f"{quote(new.get(name))}. Name another folder."
            )
    if not (folder / RESULTS_FILE).is_file() and not resume:
        raise ValueError(
            f"`output_dir` ({folder}) holds this run, unfinished. Add `--resume` to go on, or name another folder."
        )


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


def make_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast, resume_from: Path | None) -> PreTrainedModel:
    """The model of the checkpoint, a new one of the recipe's shape, or the one to start from, in fp32.

    Raises:
        ValueError: the model has no row for an id that text becomes, or a row is longer than the model's positions.
    """
    if resume_from is not None:
        return load_model(config, resume_from)
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.init_from is None:
        built = build_model_config(config, vocab_size=count_rows(tokenizer), **token_ids)
        return (model_class_of(built) if config.model_class is None else find_model_class(config))(built)
    dropouts = {name: value for name, value in config.model.items() if name in DROPOUT_FIELDS}
    try:
        model = load_model(config, config.init_from, **dropouts)
    except (ValueError, OSError) as error:
        raise ValueError(f"`init_from`: {error}") from error
    if config.data.block_size > model.config.max_position_embeddings:
        raise ValueError(
            f"`data.block_size` ({config.data.block_size}) is longer than the `n_positions` of {config.init_from} "
            f"({model.config.max_position_embeddings}). Lower it."
        )
    return model


def load_model(config: RunConfig, source: str | Path, **dropouts: Any) -> PreTrainedModel:
    """Load a model of the recipe's class, in fp32 and in eval mode.

    Raises:
        ValueError: there is none, or it is of another kind or damaged.
        OSError: the same, of a class of your own.
    """
    if config.model_class is None:
        return load(source, dtype=torch.float32, **dropouts)
    return find_model_class(config).from_pretrained(source, dtype=torch.float32, **dropouts)


def prompt_ids(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(1, T) ids of the sample's prompt; an empty one is a document's start.

    Raises:
        ValueError: see `hfgpt.data.tokenizer.encode_prompt`.
    """
    name = config.tokenizer.name or config.init_from or "of this run"
    try:
        return torch.tensor([encode_prompt(tokenizer, config.sample.prompt, name)])
    except ValueError as error:
        remedy = "Set another, or `sample.max_new_tokens=0` for no samples."
        raise ValueError(f"`sample.prompt` ({quote(config.sample.prompt)}): {error} {remedy}") from error


def check_fit(config: RunConfig, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Refuse ids without a row in the model, a sample longer than its positions, and Muon where it has no matrices.

    Raises:
        ValueError: naming what does not fit.
    """
    if config.optim.name == "muon":
        block_matrices(model)
    separator = set() if config.data.separator is None else {tokenizer.eos_token_id}
    name = f"the tokenizer {config.tokenizer.name or config.init_from}"
    remedy = "Leave `tokenizer.name` out to use the model's own." if config.tokenizer.name else None
    check_rows(tokenizer, ids_of_text(tokenizer) | separator, model.config.vocab_size, name, remedy)
    if config.sample.max_new_tokens == 0:
        return
    wanted = prompt_ids(config, tokenizer).shape[1] + config.sample.max_new_tokens
    if wanted > model.config.max_position_embeddings:
        raise ValueError(
            f"`sample.prompt` and `sample.max_new_tokens` make {wanted} tokens, the model's `n_positions` are "
            f"{model.config.max_position_embeddings}. Shorten the sample."
        )
