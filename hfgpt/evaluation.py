"""Loss and perplexity of a causal language model over rows of tokens.

One pass, every target once, no logits kept. Loss is in nats per token, the mean over all targets.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from hfgpt.config import DataConfig
from hfgpt.documents import is_plain_text, read_source
from hfgpt.loss import IGNORE_INDEX
from hfgpt.processes import is_split
from hfgpt.tokenizer import encode_ids, load_tokenizer, require_end_of_text
from hfgpt.weights import load


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        loss: nats per token, the mean over `tokens` targets.
        tokens: targets scored, over all processes.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """E to the loss; infinite where that is beyond floating point, NaN where the loss is."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


@torch.no_grad()
def score_batches(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    """Score every target of `batches` once, in eval mode; the model's mode is as it was afterwards.

    Args:
        model: an `HFGPTForCausalLM`, or another causal language model of transformers.
        batches: `input_ids`, `shift_labels` and perhaps `position_ids`, each (B, T), as `hfgpt.data.collate` makes
            them. On several processes each gives its own part; the score is that of all.

    Returns:
        The mean loss, summed in fp64.

    Raises:
        ValueError: there is no target at all.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # fp64, because a corpus adds up millions of fp32 losses; MPS has no fp64, so the sum lives on the CPU.
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        for batch in batches:
            targets = batch["shift_labels"]
            batch_tokens = int((targets != IGNORE_INDEX).sum())
            if batch_tokens or is_split(model):
                inputs = {
                    name: each.to(device) for name, each in batch.items() if name in ("input_ids", "position_ids")
                }
                total += sum_loss(model, inputs, targets.to(device)).double().cpu()
                tokens += batch_tokens
    finally:
        model.train(was_training)
    if PartialState().num_processes > 1:
        sums = reduce(torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64)]).to(device), "sum")
        total, tokens = sums[0], int(sums[1])
    if not tokens:
        raise ValueError("there is nothing to score: no row holds a target.")
    return Score(float(total) / tokens, tokens)


def evaluate_files(source: str, files: list[str], text_column: str = "text", batch_size: int = 8) -> Score:
    """Score every token of some files but the first, in windows of the model's context.

    Documents are one stream with `<|endoftext|>` between them, cut as for training; the last, shorter window is scored
    as well. Within a window a token is scored from those before it in the window.

    Args:
        source: folder or Hub id of an hfgpt or GPT-2 model with its tokenizer.
        files: see `hfgpt.config.DataConfig`.
        text_column: see there.
        batch_size: windows in one forward pass.

    Raises:
        ValueError: there is no such model or file, no text in it, or an id that the model does not know.
    """
    data = DataConfig(files=files, text_column=text_column)
    if text_column != DataConfig.text_column and is_plain_text(data):
        raise ValueError(f"`--text-column` ({text_column!r}) has no effect: plain text has no columns.")
    model, tokenizer = load(source), load_tokenizer(source)
    documents = read_source(data, files, None)
    if len(documents) > 1:
        require_end_of_text(tokenizer, source)
    encoded = encode_ids(tokenizer, documents["text"][:])
    stream = [token_id for ids in encoded for token_id in (tokenizer.eos_token_id, *ids)][1:]
    if len(stream) < 2:
        raise ValueError(f"{', '.join(files)}: {len(stream)} token; the second one would be the first to be scored.")
    if max(stream) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} makes the id {max(stream)}, the model's `vocab_size` is "
            f"{model.config.vocab_size}. They do not belong together."
        )
    model.to(PartialState().device)
    return score_batches(model, windows(torch.tensor(stream), model.config.max_position_embeddings, batch_size))


def windows(stream: Tensor, context: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Cut a stream of N ids into windows of `context` targets that overlap by one id; the last one may be filled up.

    Yields:
        `input_ids` and `shift_labels`, (B, T); what fills up has no target, and nothing before it sees it.
    """
    filler = -(len(stream) - 1) % context
    inputs = F.pad(stream[:-1], (0, filler)).view(-1, context)
    targets = F.pad(stream[1:], (0, filler), value=IGNORE_INDEX).view(-1, context)
    for start in range(0, len(inputs), batch_size):
        chunk = slice(start, start + batch_size)
        yield {"input_ids": inputs[chunk], "shift_labels": targets[chunk]}


def sum_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Sum of the losses of one batch, in nats: hfgpt makes it without all logits, other models by theirs."""
    # `labels` stand for nothing beside `shift_labels`, but without them transformers' models make no loss.
    return model(
        **inputs,
        labels=inputs["input_ids"],
        shift_labels=targets,
        num_items_in_batch=1,
        skip_logits=True,
        use_cache=False,
    ).loss
