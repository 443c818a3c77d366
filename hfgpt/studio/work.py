"""What one side of a benchmark does, in a process of its own: once, to be compared, and then again and again.

Shape letters: B rows, T tokens in each.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch import Tensor, nn

from hfgpt.data.tokenizer import load_tokenizer
from hfgpt.loss import IGNORE_INDEX
from hfgpt.studio.agreement import LOOSE, check_same
from hfgpt.studio.job import WHOLE_RUNS, Job
from hfgpt.studio.pacer import Pacer
from hfgpt.studio.sides import HFGPT, Side, Transformers, eager_loss, make_side, parameters_of
from hfgpt.studio.whole_run import run_training
from hfgpt.system.machine import DTYPES, training_flops_per_token

CHECKED_ROWS = 2
"""Rows of the comparison in fp32: enough to see that two sides differ."""
BATCHES = 4


def make_batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of random ids and the next ids, or -100 where none is scored, both (B, T), the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(BATCHES):
        ids = torch.randint(job.shape["vocab_size"], (job.rows, job.row_tokens + 1), generator=generator)
        inputs_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].clone()  # one row's would share memory
        if job.stride is not None:
            targets_BT[:, : -job.stride] = IGNORE_INDEX
        yield inputs_BT.to(job.device), targets_BT.to(job.device)


def run_once(name: str, job: Job, place: str, vocab_size: int) -> dict[str, Tensor]:
    """What a side computes, eagerly and in fp32, from the weights or the text of the job, in hfgpt's names."""
    side = make_side(name, job)
    if job.command == "data":
        assert isinstance(side, HFGPT | Transformers)  # PEERS
        return {"ids": side.ids_of(side.encode(*load_documents(job), job.processes))}
    model: Any = side.load(job.place(place), vocab_size).to(job.device).eval()
    if job.command == "load":
        return side.as_hfgpt(model.cpu(), parameters_of(model), job.place(f"{name}-loaded"))
    inputs_BT, targets_BT = (each[:CHECKED_ROWS] for each in next(make_batches(job)))
    if job.command == "generate":
        tokens = {"tokens": side.generate(model, inputs_BT, job.written_tokens)}
        if job.top_k is None:
            return tokens
        assert isinstance(side, HFGPT | Transformers)  # SHOWS_PROBABILITIES
        return {**tokens, "probabilities": side.next_probabilities(model, inputs_BT, job.top_k)}
    if job.command == "evaluate":
        with torch.no_grad():
            return {"loss": side.score(model, inputs_BT, targets_BT).float()}
    loss = side.loss(model, inputs_BT, targets_BT)
    loss.backward()
    gradients = {key: each.cpu() for key, each in gradients_of(model).items()}
    ours = side.as_hfgpt(model.cpu(), gradients, job.place(f"{name}-gradients"))
    return {"loss": loss.detach(), **{f"gradient of {key}": each for key, each in ours.items()}}


def run_again(name: str, job: Job, place: str, vocab_size: int, pace: Pacer) -> None:
    """Do the work of a job step after step, as its users do it, until `pace` ends it."""
    if name in WHOLE_RUNS:
        run_training(job, WHOLE_RUNS[name], pace)
    side = make_side(name, job)
    if job.command == "data":
        repeat_encoding(side, job, pace)
    elif job.command == "load":
        repeat_loading(side, job, place, vocab_size, pace)
    model: Any = side.load(job.place(place), vocab_size).to(job.device)
    if isinstance(side, HFGPT):
        pace.costs |= costs(job, model)
    STEPS[job.command](side, job, model, pace)


def repeat_training_steps(side: Side, job: Job, model: Any, pace: Pacer) -> None:
    """Forward, backward, clipping to 1.0, AdamW."""
    model.train()
    optimizer = side.optimizer(model)
    runner: Any = torch.compile(model) if job.compile else model
    batches = list(make_batches(job))
    if job.compile or job.precision != "fp32":
        check_as_timed(side, job, model, runner, *batches[0])
    for inputs_BT, targets_BT in cycle(batches):
        pace()
        with autocast(job):
            loss = side.loss(runner, inputs_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def repeat_scoring(side: Side, job: Job, model: Any, pace: Pacer) -> None:
    """The loss of the same rows."""
    model.eval().to(DTYPES[job.precision])
    with torch.no_grad():
        for inputs_BT, targets_BT in cycle(list(make_batches(job))):
            pace()
            float(side.score(model, inputs_BT, targets_BT))


def repeat_generating(side: Side, job: Job, model: Any, pace: Pacer) -> None:
    """Continue the same prompts, greedily or with samples."""
    model.eval().to(DTYPES[job.precision])
    prompt_BT, _ = next(make_batches(job))
    while True:
        pace()
        side.generate(model, prompt_BT, job.written_tokens, job.top_k)


STEPS: dict[str, Callable[[Side, Job, Any, Pacer], None]] = {
    "train": repeat_training_steps,
    "evaluate": repeat_scoring,
    "generate": repeat_generating,
}


def repeat_loading(side: Side, job: Job, place: str, vocab_size: int, pace: Pacer) -> None:
    """From the file to a model that is ready."""
    parameters = parameters_of(side.load(job.place(place), vocab_size)).values()
    size = sum(each.numel() * each.element_size() for each in parameters)
    pace.costs |= {"unit": "bytes", "units": size, "bytes": size}
    del parameters
    while True:
        pace()
        side.load(job.place(place), vocab_size).to(job.device)


def repeat_encoding(side: Side, job: Job, pace: Pacer) -> None:
    """From documents to stored ids."""
    assert isinstance(side, HFGPT | Transformers)
    documents, tokenizer = load_documents(job)
    pace.costs |= {"unit": "tokens", "units": len(side.ids_of(side.encode(documents, tokenizer, job.processes)))}
    while True:
        pace()
        side.encode(documents, tokenizer, job.processes)


def load_documents(job: Job) -> tuple[Dataset, Any]:
    """The text of the job, one document a row, and its tokenizer."""
    documents = datasets.load_dataset("json", data_files=str(job.place("text.jsonl")), split="train")
    return documents, load_tokenizer(job.tokenizer or str(job.place("tokenizer")))


def check_as_timed(side: Side, job: Job, model: Any, runner: Any, inputs_BT: Tensor, targets_BT: Tensor) -> None:
    """Refuse a step that, compiled or in half precision, no longer computes what it does eagerly in fp32.

    Raises:
        ValueError: naming the gradient.
    """
    with autocast(job):
        loss = side.loss(runner, inputs_BT, targets_BT)
    loss.backward()
    timed = {"loss": loss.detach(), **gradients_of(model)}
    model.zero_grad()
    eager = {"loss": eager_loss(side, model, inputs_BT, targets_BT), **gradients_of(model)}
    model.zero_grad()
    check_same(timed, eager, (f"a step {'compiled' if job.compile else 'in bf16'}", "the same in fp32"), LOOSE)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the names of their parameters; parameters without one are left out."""
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def autocast(job: Job) -> AbstractContextManager:
    """The precision of a training step."""
    return nullcontext() if job.precision == "fp32" else torch.autocast(job.device, DTYPES[job.precision])


def costs(job: Job, model: Any) -> dict[str, Any]:
    """What a step of a job costs: tokens, operations of its matrix products, and bytes of weights read to generate."""
    if job.command == "generate":
        tokens = job.rows * job.written_tokens
        read = sum(each.numel() for each in model.parameters()) * DTYPES[job.precision].itemsize
        flops = training_flops_per_token(model, job.row_tokens + job.written_tokens // 2) / 3
        return {"unit": "tokens", "units": tokens, "flops": tokens * flops, "bytes": job.written_tokens * read}
    tokens = job.rows * job.row_tokens
    flops = training_flops_per_token(model, job.row_tokens)  # forward one part, backward two
    return {"unit": "tokens", "units": tokens, "flops": tokens * flops / (1 if job.command == "train" else 3)}
