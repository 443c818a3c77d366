"""What a run's speed is measured by."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hfgpt import HFGPTConfig, HFGPTForCausalLM, speed
from hfgpt.speed import matmul_peak, training_flops_per_token

BATCH, BLOCK = 3, 24


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token_are_those_that_torch_counts(tiny, tied):
    model = HFGPTForCausalLM(HFGPTConfig(**tiny, tie_word_embeddings=tied, attn_implementation="eager"))
    ids = torch.randint(320, (BATCH, BLOCK), generator=torch.Generator().manual_seed(0))

    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits  # the loss that makes none has a product in place, which is not counted
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()

    assert training_flops_per_token(model, BLOCK) * BATCH * BLOCK == counter.get_total_flops()


def test_the_peak_is_the_fastest_product_measured_once_for_a_process(monkeypatch):
    seconds = iter([9.0, 0.2, 0.1, 0.4, 9.0, 9.0])
    monkeypatch.setattr(speed, "multiply", lambda *matrices: next(seconds))
    matmul_peak.cache_clear()
    try:
        peaks = [matmul_peak(torch.device("cpu"), "fp32") for _ in range(2)]
    finally:
        matmul_peak.cache_clear()

    # The first product is for warming up; the others end when they have taken a second.
    assert peaks == [2 * 512**3 / 0.1] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_measuring_draws_nothing_and_finds_a_number_of_operations(precision):
    before = torch.get_rng_state()

    peak = matmul_peak.__wrapped__(torch.device("cpu"), precision)

    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak < 1e14  # between a very slow core and more than any CPU has


@pytest.mark.gpu
def test_measuring_on_a_gpu_is_not_counted_as_the_memory_of_the_run():
    peak = matmul_peak.__wrapped__(torch.device("cuda", torch.cuda.current_device()), "bf16")

    assert peak > 1e12
    assert torch.cuda.max_memory_allocated() < 100e6
