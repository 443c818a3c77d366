"""Is my run normal? Cheap looks at a new run before its first step, each a number, and a warning where it is odd.

They end no run: what is odd here may be meant.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, send_to_device
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from hfgpt.config.schema import DROPOUT_FIELDS
from hfgpt.data.loaders import collate
from hfgpt.data.prepare import SplitCounts
from hfgpt.data.rows import TokenArray, TokenRows
from hfgpt.data.vocabulary import MOST_UNKNOWN, describe_unknown
from hfgpt.distributed.sharding import for_own_gradients, is_sharded, reshard
from hfgpt.loss import IGNORE_INDEX
from hfgpt.system.console import print_status
from hfgpt.system.machine import matmul_peak, training_flops_per_token
from hfgpt.training.recorder import Recorder
from hfgpt.training.run import Run

MOST_TOKENS = 1024
"""About so many tokens go through the model: their logits must fit into memory."""
WINDOW = 64
"""Tokens that must follow one another in both splits to count as duplicated, about three sentences; a power of 2."""
MOST_POSITIONS = 4_000_000
"""Positions of each split that are searched for duplicates; of longer ones, pieces spread over all of it."""
PIECE = 100_000
KEPT_OF = 8
"""One window of so many is looked up, chosen by its content, so that its twin is chosen too."""


@dataclass(frozen=True)
class Check:
    """One look, and what it found: a number, whether it is as it should be, and both in words."""

    value: float
    is_normal: bool
    text: str


def make_check(value: float, is_normal: bool, text: str, meaning: str) -> Check:
    """A check whose text goes on with what the value can mean, where it is not normal."""
    return Check(value, is_normal, text if is_normal else f"{text}{meaning}")


def check_start(run: Run, recorder: Recorder) -> None:
    """Check a run that has not begun, after its first evaluation; log what was found.

    Every process calls it. Nothing is drawn from the random number generators of training.
    """
    recorder.pause()
    rows = run.rows.train.part(0, max(1, MOST_TOKENS // run.rows.train.block_size))
    if recorder.is_main or is_sharded(run.model):  # a model that is split runs on all processes together
        next_token = check_next_token(run.model, rows)
        reshard(run.model)
    if not recorder.is_main:
        return
    (start,) = (line for line in recorder.evaluations if line["step"] == 0)
    is_new = run.config.init_from is None
    vocab_size = run.model.config.vocab_size
    checks = {
        "initial_loss": check_loss(start["val_loss"], vocab_size, is_new),
        "label_shift": check_shift(rows),
        "next_token_loss": next_token,
        "ids_out_of_range": check_range(rows, vocab_size),
        "unknown": check_unknown(run.rows.train_counts, run.rows.validation_counts),
        "padding": check_padding(run.rows.train_counts.padding, run.rows.train_counts.targets),
        "duplicates": check_duplicates(run.rows.train.tokens, run.rows.validation.tokens),
    }
    recorder.write({"step": 0, "tokens": 0, "checks": {name: asdict(check) for name, check in checks.items()}}, "check")
    recorder.print_status("checks: " + "; ".join(check.text for check in checks.values() if check.is_normal))
    for check in checks.values():
        if not check.is_normal:
            recorder.print_status(f"warning: {check.text}")
    recorder.resume()


def check_loss(loss: float, vocab_size: int, is_new: bool) -> Check:
    """Check the loss at step 0, in nats per token: a new model must do as well as guessing, a trained one better."""
    even = math.log(vocab_size)
    text = f"loss {loss:.2f}, ln(vocab_size) {even:.2f}"
    if not is_new:
        return make_check(loss, loss <= even, text, ": worse than guessing. Do weights and tokenizer belong together?")
    meaning = ": the first weights are too large. Lower `model.initializer_range`."
    if loss < even:
        meaning = ": no new model can be so good. Does it see the tokens it has to predict?"
    return make_check(loss, even - 0.5 <= loss <= even + 1, text, meaning)


def check_shift(rows: TokenRows) -> Check:
    """In real rows, every target is the next id of the input."""
    batch = collate(list(rows))
    targets, following = batch["shift_labels"][:, :-1], batch["input_ids"][:, 1:]
    counted = (targets != IGNORE_INDEX) & (batch["shift_labels"][:, 1:] != IGNORE_INDEX)
    share = float((targets == following)[counted].double().mean()) if counted.any() else 1.0
    text = f"{share:.1%} of the targets are the next token"
    return make_check(share, share == 1, text, ": the rest is trained on something else.")


@torch.no_grad()
def check_next_token(model: PreTrainedModel, rows: TokenRows) -> Check:
    """The loss that is trained is that of the next token, made here by hand from the logits.

    The value is their difference, in nats per token.
    """
    batch = {name: each.to(model.device) for name, each in collate(list(rows)).items()}
    was_training = model.training
    model.eval()
    try:
        trained = float(model(**batch, skip_logits=True).loss)
        labels = ("labels", "shift_labels")
        logits = model(**{name: each for name, each in batch.items() if name not in labels}, use_cache=False).logits
    finally:
        model.train(was_training)
    # From the rows themselves, so that a collator that shifts wrongly is found.
    ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long().to(model.device)
    flat = logits.float().flatten(0, 1)
    following = float(F.cross_entropy(flat, ids[:, 1:].flatten(), ignore_index=IGNORE_INDEX))
    same = float(F.cross_entropy(flat, ids[:, :-1].flatten(), ignore_index=IGNORE_INDEX))
    difference = trained - following
    text = f"trained loss {trained:.2f}; of the next token {following:.2f}, of the same token {same:.2f}"
    is_normal = abs(difference) < 0.02  # what TF32 or bf16 change
    return make_check(difference, is_normal, text, ": labels are shifted twice, or not at all.")


def check_range(rows: TokenRows, vocab_size: int) -> Check:
    """Every id that is there is one that the model knows."""
    ids = np.concatenate([row["input_ids"] for row in rows])
    ids = ids[ids != IGNORE_INDEX]
    share = float(((ids < 0) | (ids >= vocab_size)).mean())
    text = f"ids {ids.min()} to {ids.max()} of {vocab_size:,}"
    return make_check(share, share == 0, text, ": tokenizer and model do not belong together.")


def check_unknown(train: SplitCounts, validation: SplitCounts) -> Check:
    """A loss says little of a text that the tokenizer mostly does not know; the value is the larger share of two."""
    share = max(train.unknown_share, validation.unknown_share)
    return Check(share, share <= MOST_UNKNOWN, describe_unknown(share))


def check_padding(padding: int, targets: int) -> Check:
    """Places that hold no target cost as much as those that do."""
    share = padding / (padding + targets)
    meaning = ": lower `data.block_size`, or pack documents."
    return make_check(share, share < 0.5, f"{share:.1%} padding", meaning)


def check_duplicates(train: TokenArray, validation: TokenArray) -> Check:
    """Text of the validation split that is in the training split too makes the validation loss too good."""
    share = duplicated_share(train, validation)
    text = f"{share:.1%} of the validation text is in the training text"
    meaning = f", {WINDOW} tokens and more at a stretch: the validation loss flatters."
    return make_check(share, share < 0.05, text, meaning)


def duplicated_share(train: TokenArray, validation: TokenArray) -> float:
    """Share of the windows of `WINDOW` tokens of one stream, wherever they begin, that are in the other one too."""
    wanted = chosen_windows(validation)
    return float(np.isin(wanted, chosen_windows(train)).mean()) if len(wanted) else 0.0


def chosen_windows(stream: TokenArray) -> np.ndarray:
    """Hashes (uint64) of the windows that are looked up: those divisible by `KEPT_OF`, wherever they stand."""
    pieces = -(-len(stream) // PIECE)
    taken = range(0, pieces, -(-pieces // (MOST_POSITIONS // PIECE)))
    found = []
    for piece in taken:
        ids = stream.slice(piece * PIECE, min((piece + 1) * PIECE + WINDOW - 1, len(stream)))
        hashes = window_hashes(ids)
        found.append(hashes[(hashes >> np.uint64(32)) % np.uint64(KEPT_OF) == 0])
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


def window_hashes(ids: np.ndarray) -> np.ndarray:
    """A hash (uint64) of each run of `WINDOW` ids, at every position: sums of scrambled ids times powers, mod 2**64."""
    if len(ids) < WINDOW:
        return np.empty(0, dtype=np.uint64)
    scrambled = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    scrambled ^= scrambled >> np.uint64(29)
    hashes, base, length = scrambled, np.uint64(0xBF58476D1CE4E5B9), 1
    with np.errstate(over="ignore"):
        while length < WINDOW:  # of two windows side by side, one of twice the length
            hashes = hashes[:-length] * base + hashes[length:]
            base, length = base * base, 2 * length
    return hashes


EAGER_SHARE = 0.45
"""Of a GPU's matrix products: what an eager step of 124M reaches on an H100, 324 of some 700 TFLOP/s."""
COMPILE_FROM = 300
"""Seconds without compiling from which it pays: on an H100 it took 40 s and saved 17 of 87 ms, so 200 s are even."""


def choose_compile(run: Run) -> bool:
    """What `train.compile=auto` means for a run, with a line that says why; all processes decide the same."""
    config, process = run.config, PartialState()
    train, block_size = config.train, config.data.block_size
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    chosen, reason = False, "that takes a CUDA GPU"
    if train.shard or any(map(parse_flag_from_env, engines)):
        reason = "the model, or what trains it, is split"
    elif process.device.type == "cuda":
        tokens = run.total_steps * train.gradient_accumulation_steps * train.batch_size * block_size
        flops = tokens * training_flops_per_token(run.model, block_size)
        seconds = eager_seconds(flops, matmul_peak(process.device, train.precision))
        (seconds,) = broadcast_object_list([seconds])
        chosen = seconds >= COMPILE_FROM
        reason = f"about {seconds:,.0f} s without, and it pays from {COMPILE_FROM} s"
    print_status(f"`train.compile=auto`: {'compiled' if chosen else 'not compiled'} ({reason})")
    return chosen


def eager_seconds(flops: float, peak: float) -> float:
    """How long a run takes, at least, that is not compiled.

    Args:
        flops: operations of its matrix products, see `training_flops_per_token`.
        peak: the most of them that the machine does in a second. Small models reach less of it, and take longer.
    """
    return flops / (EAGER_SHARE * peak)


TOLERANCES = {"fp32": 20 * 2**-11, "fp16": 20 * 2**-11, "bf16": 20 * 2**-8}
"""How far apart two right steps may be, relative: some twenty roundings in a row, each half a unit in the last place of
what is multiplied (on a GPU accelerate multiplies in TF32 where a compiled run is fp32). What is wrong is off by 1."""


def check_compiled(
    run: Run, recorder: Recorder, accelerator: Accelerator, model: nn.Module, batch: dict[str, Tensor], targets: Any
) -> None:
    """Compare loss and gradients of the prepared model, compiled, with those of the very same one run eagerly.

    Dropout is off, since compiled code draws other masks; a model that has any is therefore compiled once more when
    training begins. Random numbers, gradients and weights are left as they are. Every process calls this, with its
    first micro-batch and the targets of the whole step over all processes.

    Raises:
        ValueError: they are not the same; naming both norms and what to do.
    """
    recorder.pause()
    started_at = time.perf_counter()
    device = accelerator.device
    batch = send_to_device(batch, device)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    config = run.model.config
    dropouts = {name: getattr(config, name) for name in DROPOUT_FIELDS if hasattr(config, name)}
    config.update(dict.fromkeys(dropouts, 0.0))
    model.train()
    devices = [] if device.type == "cpu" else [device]
    model, context = for_own_gradients(accelerator, model, run.model, run.config.train.precision)
    try:
        with context, torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            loss, gradients = differentiate(model, parameters, batch, targets)
            # Row by row, since eager code may need memory that compiled code does not.
            rows = [{name: each[row : row + 1] for name, each in batch.items()} for row in range(len(batch["labels"]))]
            with torch.compiler.set_stance("force_eager"):
                eager_loss, eager_gradients = differentiate(model, parameters, rows[0], targets)
                for row in rows[1:]:
                    row_loss, row_gradients = differentiate(model, parameters, row, targets)
                    eager_loss += row_loss
                    torch._foreach_add_(eager_gradients, row_gradients)
    finally:
        config.update(dropouts)
    if any(dropouts.values()):
        torch.compiler.reset()  # or the changed numbers would be compiled as if they were to change again and again
    scale = 1 / max(1, int(targets))  # of the mean, as in the lines of training
    norm, eager_norm = float(get_total_norm(gradients)) * scale, float(get_total_norm(eager_gradients)) * scale
    torch._foreach_sub_(gradients, eager_gradients)
    apart = float(get_total_norm(gradients)) * scale
    seconds = time.perf_counter() - started_at
    tolerance = TOLERANCES[run.config.train.precision]
    is_same = apart <= tolerance * eager_norm and abs(loss - eager_loss) <= tolerance * max(1.0, eager_loss)
    # Where eager code itself is not finite there is nothing to compare with, and the first step will tell.
    problem = None
    if math.isfinite(eager_norm) and not is_same:
        problem = (
            f"`train.compile` computes another step than eager code (torch {torch.__version__}, "
            f"{run.config.train.precision}, {device.type}): gradient norm {norm:.4g}, eager {eager_norm:.4g}, "
            f"{apart:.4g} apart; loss {loss:.6g}, eager {eager_loss:.6g}. Nothing was trained. Set "
            "`train.compile=false` in another `output_dir`, or take another torch."
        )
    for found in gather_object([problem]):  # of all processes, so that all stop
        if found is not None:
            raise ValueError(found)
    recorder.print_status(
        f"the compiled step is the eager one: gradient norm {norm:.4g} and {eager_norm:.4g}, {apart:.1e} apart "
        f"({seconds:.0f} s)"
    )
    recorder.resume()


def differentiate(
    model: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor], targets: Any
) -> tuple[float, list[Tensor]]:
    """The loss of a micro-batch, divided by the targets of its step, and the gradients of its sum, made apart.

    Of the sum, because without the scaler of training gradients of the mean would vanish in fp16.
    """
    loss = model(**batch, num_items_in_batch=targets, skip_logits=True).loss
    gradients = torch.autograd.grad(loss * targets, parameters, allow_unused=True, materialize_grads=True)
    return float(loss.detach()), list(gradients)
