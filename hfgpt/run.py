"""What both loops share: a run is made ready, watched and finished here; they differ in nothing but the loop."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hfgpt import checkpoint
from hfgpt.checkpoint import Position
from hfgpt.config import DROPOUT_FIELDS, RunConfig, load_config, save_config
from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data import Rows, check_ids, eval_loader, load_rows
from hfgpt.decoding import generate, stream_text
from hfgpt.documents import load_documents
from hfgpt.evaluation import Score, score_batches
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.ngram import ngram_perplexities
from hfgpt.optim import check_optim
from hfgpt.recorder import Recorder, talk
from hfgpt.results import environment, peak_memory_bytes, plot_losses, read_metrics, write_json
from hfgpt.tokenizer import load_tokenizer, train_tokenizer

RUN_FILE, RESULTS_FILE, METRICS_FILE = "run.yaml", "results.json", "metrics.jsonl"
SAMPLES_FILE, PLOT_FILE = "samples.md", "loss.png"


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
        micro_batches_per_epoch: on each process.
        steps_per_epoch: optimizer steps; the last one of an epoch may hold fewer micro-batches.
        total_steps: optimizer steps of the whole run.
    """

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    rows: Rows
    model: HFGPTForCausalLM
    position: Position
    resume_from: Path | None
    micro_batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int

    def next_position(self, position: Position, micro_batches: int, targets: int) -> Position:
        """The position after one more step of so many micro-batches and, over all processes, targets."""
        micro_batch = position.micro_batch + micro_batches
        is_epoch_done = micro_batch == self.micro_batches_per_epoch
        return Position(
            step=position.step + 1,
            epoch=position.epoch + is_epoch_done,
            micro_batch=0 if is_epoch_done else micro_batch,
            tokens=position.tokens + targets,
        )


def prepare_run(config: RunConfig, resume: bool | str = False) -> Run | None:
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
    join_processes()
    folder = Path(config.output_dir)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            check_folder(config, folder, resume)
    if (folder / RESULTS_FILE).is_file():
        return None
    resume_from = find_checkpoint(folder, resume)

    with PartialState().main_process_first():
        documents = load_documents(config.data, config.seed)
        tokenizer = make_tokenizer(config, documents.train)
        rows = load_rows(documents, tokenizer, config.data)
    set_seed(config.seed)
    model = make_model(config, tokenizer)
    check_ids(rows.train, model.config.vocab_size, "the training split")
    check_ids(rows.validation, model.config.vocab_size, "the validation split")
    check_prompt(config, tokenizer, model)

    global_batch = config.train.batch_size * PartialState().num_processes
    micro_batches = -(-len(rows.train) // global_batch)
    steps_per_epoch = -(-micro_batches // config.train.gradient_accumulation_steps)
    total_steps = config.train.max_steps or (config.train.epochs or 0) * steps_per_epoch
    if config.optim.warmup_steps > total_steps:
        raise ValueError(
            f"`optim.warmup_steps` ({config.optim.warmup_steps}) is longer than the run ({total_steps} steps). "
            "The learning rate would never reach its peak: lower it, or train longer."
        )
    position = Position() if resume_from is None else checkpoint.verify_checkpoint(resume_from)
    if resume_from is not None:
        model.load_state_dict(HFGPTForCausalLM.from_pretrained(resume_from, dtype="auto").state_dict())
    run = Run(
        config, folder, tokenizer, rows, model, position, resume_from, micro_batches, steps_per_epoch, total_steps
    )
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / RUN_FILE)
    return run


def join_processes() -> None:
    """Let the processes of a launch find one another, before anything asks how many there are.

    Raises:
        ValueError: this is one of several processes, but they do not come together.
    """
    process = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    started = int(os.environ.get("WORLD_SIZE", 1))
    if process.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but each is alone ({process.num_processes} in its group). "
            "Without GPUs, set ACCELERATE_USE_CPU=true."
        )


def check_folder(config: RunConfig, folder: Path, resume: bool | str) -> None:
    """Refuse an output folder that holds anything but this run.

    Raises:
        ValueError: naming the folder and what is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` ({folder}) is a file. Name a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"`output_dir` ({folder}) holds files of something else. Name an empty folder or a new one.")
    try:
        is_same = load_config(folder / RUN_FILE) == config
    except ValueError:
        is_same = False  # not even a recipe of this version
    if not is_same:
        raise ValueError(
            f"`output_dir` ({folder}) holds another run: its {RUN_FILE} differs from this recipe. Name another folder."
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
        return checkpoint.newest_checkpoint(folder, warn=talk)
    path = Path(resume)
    if not path.is_dir():
        there = ", ".join(found.name for found in checkpoint.checkpoints(folder)) or "none"
        raise ValueError(f"no such checkpoint: {resume}. In {folder} there are: {there}.")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{resume} is a checkpoint of another run: `output_dir` is {folder}.")
    checkpoint.verify_checkpoint(path)
    return path


def make_tokenizer(config: RunConfig, train_documents: Dataset) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe names, that of the model to go on from, or one trained on the training split."""
    name = config.tokenizer.name or config.init_from
    if name is not None:
        return load_tokenizer(name)
    longest = HFGPTConfig(**config.model).max_position_embeddings
    texts = (text for batch in train_documents.iter(batch_size=1000) for text in batch["text"])
    return train_tokenizer(texts, config.tokenizer.vocab_size, model_max_length=longest)


def train_run_tokenizer(config: RunConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer that a run of this recipe would train.

    Raises:
        ValueError: the recipe names a tokenizer that is trained already, or its text cannot be read.
    """
    if config.tokenizer.name or config.init_from:
        raise ValueError(
            f"the recipe names a tokenizer that is trained already ({config.tokenizer.name or config.init_from!r})."
        )
    return make_tokenizer(config, load_documents(config.data, config.seed).train)


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
        model = HFGPTForCausalLM.from_pretrained(config.init_from, dtype=torch.float32, **dropouts)
    except OSError as error:
        raise ValueError(f"`init_from`: {' '.join(str(error).split())}") from error
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
    ids = tokenizer(config.sample.prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return torch.tensor([ids])


def check_prompt(config: RunConfig, tokenizer: PreTrainedTokenizerFast, model: HFGPTForCausalLM) -> None:
    """Refuse a sample that does not fit the model's positions."""
    wanted = prompt_ids(config, tokenizer).shape[1] + config.sample.max_new_tokens
    if config.sample.max_new_tokens and wanted > model.config.max_position_embeddings:
        raise ValueError(
            f"`sample.prompt` and `sample.max_new_tokens` make {wanted} tokens, the model's `n_positions` are "
            f"{model.config.max_position_embeddings}. Shorten the sample."
        )


def is_due(every: int | str, step: int, run: Run) -> bool:
    """Whether what happens `every` so many steps, or every `epoch`, happens after this step."""
    steps = run.steps_per_epoch if every == "epoch" else int(every)
    return steps > 0 and step % steps == 0


def is_checkpoint_due(step: int, run: Run) -> bool:
    """Whether this step ends with a checkpoint; the last one does, unless the recipe wants none."""
    every = run.config.train.save_every
    return every != 0 and (is_due(every, step, run) or step == run.total_steps)


def seed_training(config: RunConfig) -> None:
    """Set every random number generator as training starts: each process draws dropout of its own."""
    set_seed(config.seed + PartialState().process_index)


def make_recorder(run: Run) -> Recorder:
    """Open the run's records where training starts: a resumed run drops the lines that it will write again."""
    recorder = Recorder(
        folder=run.folder,
        total_steps=run.total_steps,
        prompt=run.config.sample.prompt,
        settings={name: getattr(run.config.sample, name) for name in ("max_new_tokens", "temperature", "top_k")},
        start=run.position,
    )
    counts = run.rows.train_counts, run.rows.validation_counts
    recorder.say(
        f"{run.model.num_parameters():,} parameters, {len(run.tokenizer):,} token ids; "
        + "; ".join(
            f"{name} {count.tokens:,} tokens in {len(rows):,} rows, {count.remainder} left over"
            for name, count, rows in zip(
                ("train", "validation"), counts, (run.rows.train, run.rows.validation), strict=True
            )
        )
    )
    if run.resume_from is not None:
        recorder.say(f"going on from {run.resume_from} at step {run.position.step}")
    return recorder


def score_split(run: Run, rows: Dataset, limit: int) -> Score:
    """Score the first `limit` rows of a split, or all of them if `limit` is 0, on all processes together."""
    process = PartialState()
    chosen = rows.select(range(min(limit or len(rows), len(rows))))
    return score_batches(
        run.model, eval_loader(chosen, run.config.train.batch_size, process.process_index, process.num_processes)
    )


def evaluate(run: Run, recorder: Recorder, position: Position, limit: int) -> dict[str, Any]:
    """Score both splits, write the line and a sample text; every process calls it.

    The training rows are as many as the validation rows, always the same ones, scored in the same way.
    """
    recorder.pause()
    limit = min(limit or len(run.rows.validation), len(run.rows.validation), len(run.rows.train))
    train, validation = score_split(run, run.rows.train, limit), score_split(run, run.rows.validation, limit)
    line = {
        "step": position.step,
        "tokens": position.tokens,
        "train_loss": train.loss,
        "val_loss": validation.loss,
        "val_perplexity": validation.perplexity,
    }
    if PartialState().is_main_process:
        recorder.evaluation(line, write_sample(run))
    PartialState().wait_for_everyone()
    recorder.resume()
    return line


def write_sample(run: Run) -> str:
    """Write on from the recipe's prompt; drawing from a generator of its own, so that training draws as it would."""
    sample = run.config.sample
    if sample.max_new_tokens == 0:
        return ""
    device = run.model.device
    ids = generate(
        run.model,
        prompt_ids(run.config, run.tokenizer).to(device),
        max_new_tokens=sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        eos_token_id=run.tokenizer.eos_token_id,
        generator=torch.Generator(device).manual_seed(run.config.seed),
    )
    return "".join(stream_text(run.tokenizer, ids[0]))


def save_checkpoint(run: Run, recorder: Recorder, position: Position, states: dict[str, Any]) -> None:
    """Write a checkpoint that is also a model folder; every process calls it."""

    def write(folder: Path) -> None:
        save_model(run, folder)
        # Where transformers' Trainer reads its place from, and what it compares with its arguments.
        place = {"global_step": position.step, "epoch": position.epoch, "train_batch_size": run.config.train.batch_size}
        write_json(folder / "trainer_state.json", place)

    recorder.pause()
    checkpoint.save_checkpoint(run.folder, position, write, states, run.config.train.keep_last)
    recorder.resume()


def save_model(run: Run, folder: Path) -> None:
    """Save weights, config, code and tokenizer: what AutoModel and AutoTokenizer load."""
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        os.chmod(path, 0o666 & ~checkpoint.current_umask())  # they come out readable by their owner only


def finish_run(run: Run, recorder: Recorder, position: Position, started_at: float) -> dict[str, Any]:
    """Score all rows, save the model and leave results.json, loss.png and the rest; every process calls it.

    Args:
        run: the run, trained.
        recorder: its records.
        position: where training ended.
        started_at: `time.perf_counter()` when this process began to train.

    Returns:
        What results.json holds.
    """
    line = evaluate(run, recorder, position, limit=0)
    results: dict[str, Any] = {}
    if PartialState().is_main_process:
        baselines = ngram_perplexities(
            run.rows.train.with_format("numpy")["input_ids"][:],
            run.rows.validation.with_format("numpy")["input_ids"][:],
            len(run.tokenizer),
        )
        results = {
            **line,
            "unigram_perplexity": baselines.unigram,
            "bigram_perplexity": baselines.bigram,
            "parameters": run.model.num_parameters(),
            "train_tokens": run.rows.train_counts.tokens,
            "validation_tokens": run.rows.validation_counts.tokens,
            "peak_memory_bytes": peak_memory_bytes(),
            "elapsed_seconds": time.perf_counter() - started_at,
            "environment": environment(),
        }
        save_model(run, run.folder)
        plot_losses(
            read_metrics(run.folder / METRICS_FILE),
            run.folder / PLOT_FILE,
            baselines={"unigram": baselines.unigram, "bigram": baselines.bigram},
        )
        write_json(run.folder / RESULTS_FILE, results)  # last: its presence says that the run is finished
    recorder.close()
    PartialState().wait_for_everyone()
    return results
