"""Is it the same model? hfgpt's logits, loss and greedy text beside those of transformers' GPT-2 on the same weights.

Shape letters: B texts, T tokens, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hfgpt.configuration_hfgpt import GPT2_SOURCE, HFGPTConfig
from hfgpt.generation import decoding
from hfgpt.generation.params import SamplingParams
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.weights import load
from hfgpt.weights.formats.gpt2 import to_gpt2

SIZES = {
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
"""The four sizes of GPT-2."""

TOLERANCE = 2e-5
"""Allowed |Δlogit| in fp32 while logits stay below 3; it grows with them, as their rounding does. What transformers'
GPT-2 itself differs by between eager and sdpa, `reference_spread`, is printed beside it."""

BF16_FACTOR = 1.2
"""In bf16 the argmax may leave the fp32 reference's at most so many times as often as the reference's own bf16 does."""

BF16_POSITIONS = 4096
"""Positions that this is counted over. About 2 % of them differ; among 512 chance alone would exceed the factor."""


@dataclass(frozen=True)
class Verification:
    """What was compared and found; `passed` is the verdict.

    Attributes:
        max_abs_diff: largest |Δlogit|, sdpa against sdpa and eager against eager, fp32.
        max_rel_diff: the same, divided by the largest |logit|.
        tolerance: what `max_abs_diff` may be.
        reference_spread: largest |Δlogit| between the reference's own eager and sdpa.
        argmax_agreement: share of positions where both give the same likeliest token, in [0, 1].
        loss_diff: largest |Δloss|, nats per token, sdpa against sdpa and eager against eager.
        greedy_equal: whether both write the same 64 tokens.
        greedy_distinct: different tokens among those 64; with 1 the equality says little.
        bf16_disagreement: share of positions where hfgpt's argmax in bf16 is not the reference's in fp32; None if not
            asked for.
        reference_bf16_disagreement: the same for the reference in bf16.
        parameters: of the model.
        depth: blocks compared.
        passed: whether all of it is within its bounds.
    """

    max_abs_diff: float
    max_rel_diff: float
    tolerance: float
    reference_spread: float
    argmax_agreement: float
    loss_diff: float
    greedy_equal: bool
    greedy_distinct: int
    bf16_disagreement: float | None
    reference_bf16_disagreement: float | None
    parameters: int
    depth: int
    passed: bool


def verify(source: str | Path, bf16: bool = False) -> Verification:
    """Compare a model with transformers' GPT-2 on the same weights.

    Args:
        source: folder or Hub id. GPT-2 files are read by transformers for the reference and through hfgpt's map for
            hfgpt; an hfgpt model goes through the map the other way.
        bf16: whether to compare in bf16 as well; slow on most CPUs.

    Raises:
        ValueError: there is no such model, it does not fit its config, or it is a file, of which GPT-2 reads none.
    """
    if Path(source).is_file():
        raise ValueError(f"{source} is a file, and GPT-2 reads folders. `hfgpt convert --verify` compares files.")
    model = load(source, dtype=torch.float32)
    if HFGPTConfig.from_pretrained(source).model_type == GPT2_SOURCE:
        reference = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32)
    else:
        reference = to_gpt2(model)
    return compare(model, reference, bf16)


def verify_random(size: str, layers: int | None = None, seed: int = 0, bf16: bool = False) -> Verification:
    """Compare on random weights of one of GPT-2's sizes; every parameter is drawn, biases and gains too.

    Args:
        size: a key of `SIZES`.
        layers: compare at this depth instead of the size's own.
        seed: of the weights.
        bf16: see `verify`.

    Raises:
        ValueError: no such size, or more layers than it has.
    """
    reference = random_gpt2(GPT2Config(**shape_of(size, layers)), seed)
    config = HFGPTConfig.from_dict(reference.config.to_dict())
    model, info = HFGPTForCausalLM.from_pretrained(
        None, config=config, state_dict=reference.state_dict(), output_loading_info=True
    )
    for kind, names in info.items():
        if names:
            raise ValueError(f"the map leaves {kind}: {sorted(map(str, names))[0]}.")
    return compare(model, reference, bf16)


def shape_of(size: str, layers: int | None) -> dict[str, int]:
    """The fields of a size's config, at its own depth or at `layers`.

    Raises:
        ValueError: no such size, or more layers than it has.
    """
    if size not in SIZES:
        raise ValueError(f"`--random` must be one of {list(SIZES)}, got {size!r}.")
    depth = SIZES[size]["n_layer"]
    if layers is not None and not 1 <= layers <= depth:
        raise ValueError(f"`--layers` must be between 1 and {depth} for {size!r}, got {layers}.")
    return {**SIZES[size], "n_layer": layers or depth}


def random_gpt2(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with every parameter from N(0, 0.1) and every gain from N(1, 0.1).

    With GPT-2's own initialisation, zero biases and unit gains, exchanged norms or biases would not be seen.
    """
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "ln_" in name and name.endswith("weight")
            parameter.normal_(mean=1.0 if is_gain else 0.0, std=0.1, generator=draws)
    return model


def memory_needed(size: str, layers: int | None = None) -> int:
    """Bytes that `verify_random` takes at its peak, about: both models in fp32, and their logits.

    Raises:
        ValueError: no such size, or more layers than it has.
    """
    shape = shape_of(size, layers)
    width, depth, vocab_size, positions = shape["n_embd"], shape["n_layer"], 50257, 1024
    parameters = (vocab_size + positions + 2) * width + depth * (12 * width**2 + 13 * width)
    return 4 * (2 * parameters + 6 * 2 * 256 * vocab_size)


@torch.no_grad()
def compare(model: HFGPTForCausalLM, reference: GPT2LMHeadModel, bf16: bool) -> Verification:
    """Run both on the same tokens.

    Args:
        model: hfgpt's, in fp32.
        reference: transformers', in fp32, with the same weights.
        bf16: whether to compare in bf16 as well; both models are then left in bf16.
    """
    model, reference = model.eval(), reference.eval()
    length = min(256, model.config.max_position_embeddings)
    draws = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (2, length), generator=draws)

    logits: dict[str, tuple[Tensor, Tensor]] = {}
    losses = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        reference.set_attn_implementation(implementation)
        own, other = model(ids_BT, labels=ids_BT), reference(ids_BT, labels=ids_BT)
        logits[implementation] = own.logits, other.logits
        losses.append(own.loss - other.loss)
    # The maximum is torch's because it, unlike Python's, is NaN if anything is.
    max_abs_diff = largest(torch.tensor([largest(ours - theirs) for ours, theirs in logits.values()]))
    scale = max(largest(theirs) for _, theirs in logits.values())
    loss_diff = largest(torch.stack(losses))
    ours, theirs = logits["sdpa"]

    new_tokens = min(64, length // 2)
    prompt = ids_BT[:1, : length - new_tokens][:, :16]
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    text = reference.generate(prompt, **settings)
    greedy_equal = False
    if not math.isnan(max_abs_diff):  # which decoding.py refuses to choose by
        own_text = decoding.generate(model, prompt, SamplingParams(max_new_tokens=new_tokens, temperature=0))
        greedy_equal = torch.equal(model.generate(prompt, **settings), text) and torch.equal(own_text, text)

    disagreement = reference_disagreement = None
    if bf16:
        more_BT = torch.randint(model.config.vocab_size, (BF16_POSITIONS // length, length), generator=draws)
        best_BT = likeliest(reference, more_BT)
        disagreement = disagreement_share(likeliest(model.to(torch.bfloat16), more_BT), best_BT)
        reference_disagreement = disagreement_share(likeliest(reference.to(torch.bfloat16), more_BT), best_BT)
    tolerance = TOLERANCE * max(1.0, scale / 3)
    bf16_passed = (
        disagreement is None or reference_disagreement is None or disagreement <= BF16_FACTOR * reference_disagreement
    )
    return Verification(
        max_abs_diff=max_abs_diff,
        max_rel_diff=max_abs_diff / scale,
        tolerance=tolerance,
        reference_spread=largest(logits["eager"][1] - theirs),
        argmax_agreement=1 - disagreement_share(ours.argmax(-1), theirs.argmax(-1)),
        loss_diff=loss_diff,
        greedy_equal=greedy_equal,
        greedy_distinct=text[0, prompt.shape[1] :].unique().numel(),
        bf16_disagreement=disagreement,
        reference_bf16_disagreement=reference_disagreement,
        parameters=model.num_parameters(),
        depth=model.config.num_hidden_layers,
        # Logits that differ by at most d give losses that differ by at most 2 d.
        passed=max_abs_diff <= tolerance and loss_diff <= 2 * tolerance and greedy_equal and bf16_passed,
    )


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def likeliest(model: HFGPTForCausalLM | GPT2LMHeadModel, ids_BT: Tensor) -> Tensor:
    """The likeliest next token at each position, (B, T); one text at a time, so that few logits exist at once."""
    return torch.cat([model(ids_1T).logits.argmax(-1) for ids_1T in ids_BT.split(1)])


def disagreement_share(ours_BT: Tensor, theirs_BT: Tensor) -> float:
    return float((ours_BT != theirs_BT).double().mean())


def render(result: Verification) -> str:
    """The comparison as a few lines to read."""
    lines = [
        f"{result.parameters:,} parameters, {result.depth} blocks, fp32, eager and sdpa",
        f"max |Δlogit|      {result.max_abs_diff:.2e}   (allowed {result.tolerance:.2e}; the reference's own eager and "
        f"sdpa differ by {result.reference_spread:.2e})",
        f"max relative      {result.max_rel_diff:.2e}   of the largest |logit|",
        f"argmax agreement  {result.argmax_agreement:.2%}",
        f"|Δloss|           {result.loss_diff:.2e}   nats/token",
        f"greedy text       {'equal' if result.greedy_equal else 'DIFFERENT'}   "
        f"({result.greedy_distinct} different tokens in it)",
    ]
    if result.bf16_disagreement is not None and result.reference_bf16_disagreement is not None:
        lines.append(
            f"bf16 argmax       {result.bf16_disagreement:.2%} away from the fp32 reference; the reference in bf16: "
            f"{result.reference_bf16_disagreement:.2%}"
        )
    verdict = "passed: the same model" if result.passed else "FAILED: outside the bounds"
    if not result.passed and result.greedy_equal and result.max_abs_diff <= result.reference_spread:
        verdict += ", though nearer to the reference than its own eager and sdpa are to each other"
    return "\n".join([*lines, verdict])
