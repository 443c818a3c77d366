"""Loss and perplexity of rows: right against brute force, every target once, and without holding all logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.data.loaders import collate
from hfgpt.evaluation.loss import Score, score_batches
from hfgpt.loss import CHUNK_TOKENS


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = HFGPTForCausalLM(tiny_config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform, so that a wrong target costs
    return model


@pytest.fixture
def stream():
    """150 ids: in windows of 64 two whole ones and one of 21 targets."""
    return torch.randint(320, (150,), generator=torch.Generator().manual_seed(0))


def windows(stream, context, batch_size):
    """Batches of windows of `context` targets, overlapping by one id; the last one is filled up."""
    filler = -(len(stream) - 1) % context
    inputs = torch.nn.functional.pad(stream[:-1], (0, filler)).view(-1, context)
    targets = torch.nn.functional.pad(stream[1:], (0, filler), value=-100).view(-1, context)
    for chunk in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        yield dict(zip(("input_ids", "shift_labels"), chunk, strict=True))


@torch.no_grad()
def brute_force(model, stream, context):
    """Loss of every token but the first, each by a forward pass of its own prefix within its window."""
    model = model.eval()
    losses = []
    for i in range(1, len(stream)):
        start = (i - 1) // context * context
        log_probabilities = model(stream[None, start:i]).logits[0, -1].double().log_softmax(-1)
        losses.append(-float(log_probabilities[stream[i]]))
    return losses


def test_the_score_is_that_of_each_token_after_its_own_prefix(model, stream):
    score = score_batches(model, windows(stream, context=64, batch_size=2))

    losses = brute_force(model, stream, context=64)
    assert score.tokens == len(losses) == 149
    assert score.loss == pytest.approx(math.fsum(losses) / 149, abs=1e-6)  # fp32 logits, summed in another order


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_batch_size_does_not_change_the_score(model, stream, batch_size):
    score = score_batches(model, windows(stream, 64, batch_size))

    whole = score_batches(model, windows(stream, 64, 100))
    assert score.tokens == whole.tokens
    assert score.loss == pytest.approx(whole.loss, abs=1e-6)


@torch.no_grad()
def test_what_is_no_target_counts_for_nothing(model, stream):
    batch = next(windows(stream, 64, 2))
    batch["shift_labels"][0, 10:] = -100
    batch["shift_labels"][1, ::2] = -100
    everything_ignored = {**batch, "shift_labels": torch.full_like(batch["shift_labels"], -100)}

    score = score_batches(model, [everything_ignored, batch])

    logits = model.eval()(batch["input_ids"]).logits.double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert score.tokens == 10 + 32
    assert score.loss == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_rows_of_training_are_scored_as_they_are(model):
    rows = torch.randint(320, (5, 17)).int().numpy()

    score = score_batches(model, [collate([{"input_ids": row} for row in rows])])

    ids = torch.from_numpy(rows).long()
    assert score.tokens == 5 * 16
    assert score.loss == pytest.approx(float(model.eval()(ids, labels=ids).loss), abs=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_off_and_the_models_mode_is_as_before(model, stream, mode):
    model.train(mode)

    first = score_batches(model, windows(stream, 64, 2))

    assert model.training is mode
    assert score_batches(model, windows(stream, 64, 2)) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_causal_language_model_scores_alike(make_twins, stream):
    gpt2, model = make_twins()

    theirs = score_batches(gpt2, windows(stream, 64, 2))

    ours = score_batches(model, windows(stream, 64, 2))
    assert (theirs.tokens, theirs.loss) == (149, pytest.approx(ours.loss, abs=1e-5))


def test_a_model_in_bf16_is_summed_in_fp64(model, stream):
    model = model.to(torch.bfloat16)
    batches = list(windows(stream, 64, 1)) * 40

    score = score_batches(model, batches)

    # A sum of 120 batches in bf16 would be off by percents; each batch's own is the same arithmetic here and there.
    alone = [score_batches(model, [batch]) for batch in batches[:3]]
    expected = math.fsum(part.loss * part.tokens for part in alone) / 149
    assert score.tokens == 40 * 149
    assert score.loss == pytest.approx(expected, abs=1e-12)
    losses = brute_force(model, stream, 64)
    assert score.loss == pytest.approx(math.fsum(losses) / 149, rel=0.01)  # bf16 has 8 bits


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("windows_per_batch", [1, 48])
def test_logits_of_all_tokens_never_exist(windows_per_batch):
    config = HFGPTConfig(
        vocab_size=1920, max_position_embeddings=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = HFGPTForCausalLM(config)
    stream = torch.randint(1920, (48 * 64 + 1,))

    with LargestTensor() as largest:
        score = score_batches(model, windows(stream, 64, windows_per_batch))

    assert score.tokens == 48 * 64
    assert largest.elements == min(CHUNK_TOKENS, windows_per_batch * 64) * 1920  # not 48 * 64 * 1920


def test_nothing_to_score_is_refused(model):
    ids = torch.zeros(1, 8, dtype=torch.int64)

    with pytest.raises(ValueError, match="nothing to score"):
        assert score_batches(model, []).loss
    with pytest.raises(ValueError, match="nothing to score"):
        assert score_batches(model, [{"input_ids": ids, "shift_labels": torch.full_like(ids, -100)}]).loss


def test_perplexity_is_e_to_the_loss():
    assert Score(1, 0.0).perplexity == 1
    assert Score(1, math.log(50257)).perplexity == pytest.approx(50257)
    assert Score(1, 1e4).perplexity == math.inf
    assert math.isnan(Score(1, math.nan).perplexity)
