"""Optimizers and schedules: what decays, what AdamW does, and where a learning rate starts, peaks and ends."""

import math

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.config.loading import load_config
from hfgpt.config.schema import OptimConfig
from hfgpt.training.optim import OPTIMIZERS, SCHEDULES, decay_groups, make_optimizer, make_schedule


def count(group):
    return sum(parameter.numel() for parameter in group["params"])


def test_vectors_do_not_decay():
    with torch.device("meta"):
        model = HFGPTForCausalLM(HFGPTConfig())  # GPT-2 small

    decayed, kept = decay_groups(model, weight_decay=0.1)

    assert (decayed["weight_decay"], count(decayed)) == (0.1, 124_318_464)
    assert (kept["weight_decay"], count(kept)) == (0.0, 121_344)


def test_the_groups_are_those_of_trainer(tiny_config):
    from transformers.trainer_pt_utils import get_parameter_names

    model = HFGPTForCausalLM(tiny_config)
    by_name = dict(model.named_parameters())
    names = {*get_parameter_names(model, [torch.nn.LayerNorm], ["bias"])} & {*by_name}  # the tied head is in it twice

    decayed, kept = decay_groups(model, weight_decay=0.1)

    assert {id(parameter) for parameter in decayed["params"]} == {id(by_name[name]) for name in names}
    assert len(decayed["params"]) + len(kept["params"]) == len(by_name)


def test_the_groups_of_another_model_decay_its_matrices_only(random_gpt2: GPT2LMHeadModel):
    decayed, kept = decay_groups(random_gpt2, weight_decay=0.1)

    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    assert {parameter.ndim for parameter in kept["params"]} == {1}


def test_frozen_parameters_are_left_out(tiny_config):
    model = HFGPTForCausalLM(tiny_config)
    model.model.layers[0].requires_grad_(False)

    groups = decay_groups(model, weight_decay=0.1)

    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(list(model.parameters())) - len(list(model.model.layers[0].parameters()))


def walk(model, optimizer, steps):
    """Take steps along gradients that are drawn: those of a key's bias are rounding alone, which Adam blows up."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_adamw_is_torchs_plain_adamw(tiny_config):
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.5)
    model, plain = HFGPTForCausalLM(tiny_config), HFGPTForCausalLM(tiny_config)
    plain.load_state_dict(model.state_dict())
    vectors = [parameter for name, parameter in plain.named_parameters() if "norm" in name or "bias" in name]
    matrices = [parameter for name, parameter in plain.named_parameters() if "norm" not in name and "bias" not in name]
    reference = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}],
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.5,
        fused=False,
        foreach=False,
    )

    walk(model, make_optimizer(model, config), steps=5)

    walk(plain, reference, steps=5)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # fused, torch multiplies in another order


def rates(schedule, total_steps, warmup_steps=10, peak=0.5, **options):
    """The learning rate of every step, and the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    config = OptimConfig(learning_rate=peak, schedule=schedule, warmup_steps=warmup_steps, **options)
    scheduler = make_schedule(optimizer, config, total_steps)
    result = []
    for _ in range(total_steps):
        result += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return [*result, *scheduler.get_last_lr()]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_schedule_starts_at_zero_and_rises_linearly_to_its_peak(schedule):
    found = rates(schedule, total_steps=50)

    assert found[:11] == pytest.approx([0.5 * step / 10 for step in range(11)])
    assert max(found) == found[10] == 0.5


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_schedule_without_warmup_starts_at_its_peak(schedule):
    assert rates(schedule, total_steps=50, warmup_steps=0)[0] == 0.5


def test_cosine_falls_along_half_a_wave_to_zero():
    found = rates("cosine", total_steps=50)

    assert found[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 40)) for step in range(41)])
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_linear_falls_along_a_line_to_zero():
    assert rates("linear", total_steps=50)[10:] == pytest.approx([0.5 * (1 - step / 40) for step in range(41)])


def test_wsd_stays_at_its_peak_and_falls_along_a_line_over_its_share_of_the_run_to_zero():
    peak, fall = [0.5] * 20, [0.5 * (1 - step / 20) for step in range(21)]  # a share of 0.4

    assert rates("wsd", total_steps=50, decay_share=0.4)[10:] == pytest.approx(peak + fall)
    assert rates("wsd", total_steps=50, decay_share=1.0) == pytest.approx(rates("linear", total_steps=50))


def test_constant_stays_at_its_peak():
    assert set(rates("constant", total_steps=50)[10:]) == {0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=adam", f"`optim.name` must be one of {sorted(OPTIMIZERS)}, got 'adam'."),
        ("optim.schedule=cosin", f"`optim.schedule` must be one of {sorted(SCHEDULES)}, got 'cosin'."),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(override, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config("demo", [override])

    assert str(caught.value) == message


def test_every_name_that_is_offered_is_accepted():
    for name in OPTIMIZERS:
        for schedule in SCHEDULES:
            load_config("demo", [f"optim.name={name}", f"optim.schedule={schedule}"])
