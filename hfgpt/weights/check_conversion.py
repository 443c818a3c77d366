"""Comparison of a conversion's source and destination, each run by its own forward pass on the same tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hfgpt.weights.detect import read_any
from hfgpt.weights.formats import onnx
from hfgpt.weights.model_parts import Config, Unsaid

WHO_RUNS = {
    "hfgpt": "hfgpt",
    "gpt2": "transformers' GPT-2",
    "nanochat": "transformers' NanoChat",
    "openai": "OpenAI's mathematics",
    "nanogpt": "nanoGPT's mathematics",
    "llms-from-scratch": "LLMs-from-scratch's mathematics",
    "llm.c": "llm.c's mathematics",
    "onnx": "onnxruntime",
}
"""Format -> what runs it. "Mathematics" is a forward pass written from that project's code, on the file's own tensors
and names: `logits` in the module of the format."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Allowed |Δlogit| per 3 of the largest |logit|. In fp64 rounding stays below 1e-12 even at the depth of GPT-2 xl, so
that anything above 1e-9 is another model; fp32, where a runtime has no fp64, is bounded as in `hfgpt verify`."""


@dataclass(frozen=True)
class Comparison:
    """What the destination says, beside what the source says, on the same random tokens.

    Attributes:
        source_by: what ran the source.
        dest_by: what ran the destination.
        dtype: in which both computed, "float64" or "float32".
        max_abs_diff: largest |Δlogit|, over the vocabulary that both have.
        kl: mean divergence of the next-token distributions, in nats.
        argmax_agreement: share of positions with the same likeliest token, in [0, 1].
        tolerance: what `max_abs_diff` may be; None if a change was asked for: then it is measured, not judged.
        is_guess: whether both rest on something that the source does not say: then they agree in what may be wrong.
    """

    source_by: str
    dest_by: str
    dtype: str
    max_abs_diff: float
    kl: float
    argmax_agreement: float
    tolerance: float | None
    is_guess: bool

    @property
    def passed(self) -> bool:
        """Whether the destination is the same model, as far as that was to be expected, and guessed."""
        return self.tolerance is None or self.max_abs_diff <= self.tolerance


@torch.no_grad()
def compare(
    run_source: Callable[[Tensor, torch.dtype], Tensor],
    source_format: str,
    dest: Path,
    to: str,
    config: Config,
    is_exact: bool = True,
    is_guess: bool = False,
) -> Comparison:
    """Run the destination beside the source.

    Args:
        run_source: its forward pass, from ids (B, T) to logits in a dtype.
        source_format: a key of `WHO_RUNS`.
        dest: what was written.
        to: its format, a key of `WHO_RUNS`.
        config: of the model that was written.
        is_exact: whether nothing was rounded or cut on the way.
        is_guess: whether `run_source` and `config` rest on something that the source does not say.

    Raises:
        ValueError: what was written cannot be read.
    """
    dtype = torch.float32 if to == "onnx" else torch.float64
    length = min(64, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = run_source(ids, dtype)
    if to == "onnx":
        found = onnx.run(dest, ids)
    else:
        says_no_heads = to == "llms-from-scratch"
        _, written = read_any(dest, Unsaid(heads=config.num_attention_heads if says_no_heads else None))
        found = written.logits(ids, dtype)
    width = min(expected.shape[-1], found.shape[-1])
    log_expected, log_found = (each.log_softmax(dim=-1)[..., :width] for each in (expected, found))
    expected, found = expected[..., :width], found[..., :width]
    scale = max(1.0, float(expected.abs().max()) / 3)
    return Comparison(
        source_by=WHO_RUNS[source_format],
        dest_by=WHO_RUNS[to],
        dtype=str(dtype).removeprefix("torch."),
        max_abs_diff=float((expected - found).abs().max()),
        kl=float((log_expected.exp() * (log_expected - log_found)).sum(dim=-1).mean()),
        argmax_agreement=float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        tolerance=TOLERANCES[dtype] * scale if is_exact else None,
        is_guess=is_guess,
    )


def render(result: Comparison) -> str:
    """The comparison as a line to read."""
    if result.tolerance is None:
        verdict = "measured, after a change that was asked for"
    else:
        agreed = "the same on a guess, which both share and this cannot judge" if result.is_guess else "verified"
        found = agreed if result.passed else "FAILED, another model"
        verdict = f"{found}: at most {result.tolerance:.1e} was to be expected"
    return (
        f"{result.dest_by} beside {result.source_by}, in {result.dtype}: max |Δlogit| {result.max_abs_diff:.2e}, KL "
        f"{result.kl:.1e} nats, the same likeliest token at {result.argmax_agreement:.2%} of the positions ({verdict})"
    )
