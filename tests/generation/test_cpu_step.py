"""The step by one token on a CPU computes what the model's own forward pass does; models it is not for go that way.

The oracles are transformers' `generate`, which calls the model's forward pass for each token, and that pass itself.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import peft
import pytest
import torch
from torch import nn

from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.generation import beam_search as beam_search_module
from hfgpt.generation import cpu_step, decoding
from hfgpt.generation.beam_search import beam_search
from hfgpt.generation.cpu_step import OneTokenStep, is_plain
from hfgpt.generation.decoding import generate, generate_stream, next_logits
from hfgpt.generation.params import SamplingParams
from hfgpt.modeling_hfgpt import HFGPTForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
PROMPTS = torch.randint(61, (8, 7), generator=torch.Generator().manual_seed(1))
LEFT_PADDING = (torch.arange(7) >= torch.tensor([0, 2, 5, 1, 0, 6, 3, 4])[:, None]).long()


def make_model(**settings: Any) -> HFGPTForCausalLM:
    """A model whose greedy text is not one token over and over."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = HFGPTForCausalLM(HFGPTConfig(**{**SIZES, "tie_word_embeddings": False, **settings})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def model() -> HFGPTForCausalLM:
    return make_model()


@pytest.fixture
def every_product_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "LARGE_MATRIX", 0)


def generate_with_transformers(model: Any, ids: torch.Tensor, mask: torch.Tensor, **keywords: Any) -> torch.Tensor:
    length = {"max_new_tokens": GREEDY.max_new_tokens, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, do_sample=False, **{**length, **keywords})


def count_forward_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of each forward pass of decoding."""
    calls: list[int] = []

    def counted(model: Any, ids_BT: torch.Tensor, *rest: Any) -> Any:
        calls.append(ids_BT.size(1))
        return next_logits(model, ids_BT, *rest)

    monkeypatch.setattr(decoding, "next_logits", counted)
    return calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"attn_implementation": "eager"},
        {"n_inner": 50, "activation_function": "relu"},
    ],
)
def test_greedy_texts_are_those_of_transformers_generate(settings, rows, padded, every_product_in_parts, monkeypatch):
    model, mask = make_model(**settings), LEFT_PADDING if padded else torch.ones_like(PROMPTS)
    calls = count_forward_passes(monkeypatch)

    ours = generate(model, PROMPTS[-rows:], GREEDY, attention_mask=mask[-rows:])

    assert calls == [7]  # the prompt; every other token went through the step
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS[-rows:], mask[-rows:]))


@pytest.mark.parametrize("vocab_size", [32_000, 35_017])
def test_a_large_head_is_multiplied_in_parts_to_the_same_logits(vocab_size):
    model = make_model(vocab_size=vocab_size)
    head = model.lm_head
    assert head.weight.numel() > cpu_step.LARGE_MATRIX
    for rows in (1, 3, 4, 8, 16, 17):
        hidden = torch.randn(rows, 32)
        # fp32 sums of 32 products in another order
        torch.testing.assert_close(cpu_step.multiply(hidden, head), head(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_of_every_step_are_those_of_one_forward_pass(dtype, implementation):
    model = make_model(attn_implementation=implementation).to(dtype)
    mask = torch.cat([LEFT_PADDING, torch.ones(8, 41, dtype=torch.long)], dim=1)  # up to the last position
    ids = torch.randint(61, (8, 48), generator=torch.Generator().manual_seed(3))
    _, cache = next_logits(model, ids[:, :7], mask[:, :7], {})
    step = OneTokenStep(model, *cache.values(), mask[:, :7], capacity=48)

    steps = torch.stack([step(ids[:, place]) for place in range(7, 48)], dim=1)

    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, 7:]
    # fp32 rounding; bf16 has 8 bits, and logits of some units pass through two layers
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(steps, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("own_generators", [False, True])
@pytest.mark.parametrize("rule", [{}, {"top_k": 5}, {"top_p": 0.8}, {"repetition_penalty": 1.5}, {"min_p": 0.05}])
def test_a_seed_draws_what_it_drew_through_the_forward_pass(model, rule, own_generators, monkeypatch):
    params = SamplingParams(max_new_tokens=30, **{"temperature": 1.0, "top_k": 0, **rule})

    def sample() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        generator = generators if own_generators else generators[0]
        return generate(model, PROMPTS, params, attention_mask=LEFT_PADDING, generator=generator)

    ours = sample()

    monkeypatch.setattr(decoding, "is_plain", lambda *_: False)
    assert torch.equal(ours, sample())


def test_rows_end_at_any_of_several_stop_ids(model):
    free = generate(model, PROMPTS[:4], GREEDY)[:, 7:].tolist()
    stops = [free[0][3], free[1][6]]

    ours = generate(model, PROMPTS[:4], GREEDY, eos_token_id=stops, pad_token_id=0)

    expected = generate_with_transformers(model, PROMPTS[:4], torch.ones_like(PROMPTS[:4]), eos_token_id=stops)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("mask", [torch.ones_like(PROMPTS), LEFT_PADDING], ids=["full", "left-padded"])
def test_beams_are_those_found_through_the_forward_pass(model, mask, every_product_in_parts, monkeypatch):
    params = SamplingParams(num_beams=3, max_new_tokens=20)
    found = beam_search(model, PROMPTS[:4], params, attention_mask=mask[:4], eos_token_id=5)

    monkeypatch.setattr(beam_search_module, "is_plain", lambda *_: False)
    expected = beam_search(model, PROMPTS[:4], params, attention_mask=mask[:4], eos_token_id=5)

    assert [[beam.ids for beam in row] for row in found] == [[beam.ids for beam in row] for row in expected]
    for ours, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-5)  # sums of up to 20 log-probabilities in fp32


def test_weights_that_change_count_from_the_next_token_on(model):
    mask = torch.ones_like(PROMPTS)
    generate(model, PROMPTS, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)

    assert torch.equal(generate(model, PROMPTS, GREEDY), generate_with_transformers(model, PROMPTS, mask))

    stream = generate_stream(model, PROMPTS, GREEDY)
    for _ in range(3):
        next(stream)
    other = {name: torch.zeros_like(each) for name, each in model.state_dict().items()}
    other["lm_head.weight"][9], other["model.norm.bias"][:] = 1, 1
    model.load_state_dict(other, assign=True)  # other tensors, not other numbers in the same ones
    assert next(stream).tolist() == [9] * 8


def test_a_model_in_training_writes_without_dropout_and_stays_in_training(model):
    expected = generate(model, PROMPTS, GREEDY)
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.5
    model.train()
    model.model.gradient_checkpointing = True  # `gradient_checkpointing_enable` has another name from 5.24 on
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    texts = [PROMPTS]

    for next_B in generate_stream(model, PROMPTS, GREEDY):
        assert [module.training for module in model.modules()] == modes
        texts.append(next_B[:, None])

    assert is_plain(model, "cpu")
    assert torch.equal(torch.cat(texts, dim=1), expected)


def test_two_texts_at_a_time_do_not_disturb_each_other(model):
    alone = [generate(model, PROMPTS[row : row + 1], GREEDY)[0, 7:].tolist() for row in range(2)]

    streams = [generate_stream(model, PROMPTS[row : row + 1], GREEDY) for row in range(2)]
    together = [[int(next_B) for next_B in pair] for pair in zip(*streams, strict=True)]

    assert together == [list(pair) for pair in zip(*alone, strict=True)]


def test_a_text_may_fill_every_position(model):
    params = SamplingParams(temperature=0, max_new_tokens=41)

    ours = generate(model, PROMPTS, params)

    mask = torch.ones_like(PROMPTS)
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, mask, max_new_tokens=41))


class Derived(HFGPTForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def add_hook(model: HFGPTForCausalLM) -> None:
    model.model.layers[1].register_forward_hook(lambda module, args, output: 1.5 * output)


def add_pre_hook(model: HFGPTForCausalLM) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def derive(model: HFGPTForCausalLM) -> None:
    model.__class__ = Derived


def replace_forward(model: HFGPTForCausalLM) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: 1.5 * forward(x)


def replace_linear(model: HFGPTForCausalLM) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = Louder


def parametrize(model: HFGPTForCausalLM) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def add_adapter(model: HFGPTForCausalLM) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)


def compile_block(model: HFGPTForCausalLM) -> None:
    model.model.layers[0].compile(backend="eager")


def record_attentions(model: HFGPTForCausalLM) -> None:
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


def use_doubles(model: HFGPTForCausalLM) -> None:
    model.double()


def mix_types(model: HFGPTForCausalLM) -> None:
    model.model.norm.double()


def bound_embeddings(model: HFGPTForCausalLM) -> None:
    model.model.embed_tokens.max_norm = 1.0


CHANGES: list[Callable[[HFGPTForCausalLM], None]] = [
    *(add_hook, add_pre_hook, derive, replace_forward, replace_linear, parametrize, add_adapter),
    *(compile_block, record_attentions, use_doubles, bound_embeddings),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_runs_code_of_others_goes_through_its_forward_pass(model, change, monkeypatch):
    assert is_plain(model, "cpu")
    calls = count_forward_passes(monkeypatch)
    change(model)

    ours = generate(model, PROMPTS, GREEDY)

    assert not is_plain(model, "cpu")
    assert calls == [7] + [1] * 19
    assert torch.equal(ours, generate_with_transformers(model, PROMPTS, torch.ones_like(PROMPTS)))


def test_what_holds_for_all_modules_of_a_process_is_not_passed_by(model, monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not is_plain(model, "cpu")
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(model, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x)
        assert not is_plain(model, "cpu")
    assert is_plain(model, "cpu")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_models_of_mixed_types_and_other_libraries_are_not_plain(model):
    assert not is_plain(peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])), "cpu")
    assert not is_plain(make_model().to("meta"), "cpu")
    mix_types(model)
    assert not is_plain(model, "cpu")
