"""Decoding by a CUDA graph writes what the general way writes; `pytest -m gpu`."""

import pytest
import torch

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.arguments import CACHE
from hfgpt.generation import cuda_graph
from hfgpt.generation.decoding import generate_stream, process_logits
from hfgpt.generation.params import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["gelu_new", "relu"])
def model(request):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_head": 3, "n_layer": 2}
    model = HFGPTForCausalLM(HFGPTConfig(**sizes, activation_function=request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # so that biases and gains count, and texts differ
    return model.cuda()


@pytest.fixture
def prompts():
    """Ids and mask of three prompts of different lengths, on the GPU."""
    ids = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :1] = 0
    return ids.cuda(), mask.cuda()


def continue_rows(model, ids, params, **inputs):
    return torch.stack(list(generate_stream(model, ids, params, **inputs)), dim=1)


def by_the_general_way(monkeypatch, *args, **inputs):
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "can_capture", lambda *_: False)
        return continue_rows(*args, **inputs)


def graph_of(model):
    return cuda_graph.graphs[model][1].graph


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3}])
def test_the_graph_writes_the_greedy_text_of_the_general_way(monkeypatch, model, prompts, rows, rules):
    ids, mask = prompts[0][-rows:], prompts[1][-rows:]
    params = SamplingParams(temperature=0, max_new_tokens=40, **rules)

    written = continue_rows(model, ids, params, attention_mask=mask)

    assert graph_of(model) is not None
    assert torch.equal(written, by_the_general_way(monkeypatch, model, ids, params, attention_mask=mask))


@pytest.mark.parametrize("stops", ["ids", "callback", "both"])
def test_a_row_ends_where_it_ends_the_general_way(monkeypatch, model, prompts, stops):
    ids, mask = prompts
    params = SamplingParams(temperature=0, max_new_tokens=40)
    free = continue_rows(model, ids, params, attention_mask=mask)
    ends = {"eos_token_id": [int(free[0, 3]), int(free[1, 20])], "pad_token_id": 5} if stops != "callback" else {}
    if stops != "ids":
        ends["is_stopped"] = lambda next_B: [token % 10 == 7 for token in next_B.tolist()]

    written = continue_rows(model, ids, params, attention_mask=mask, **ends)

    assert torch.equal(written, by_the_general_way(monkeypatch, model, ids, params, attention_mask=mask, **ends))


def test_ids_without_a_text_are_never_written(model, prompts):
    suppress = torch.arange(97).cuda() % 2 == 0

    written = continue_rows(
        model, prompts[0], SamplingParams(max_new_tokens=40, seed=1), attention_mask=prompts[1], suppress_mask=suppress
    )

    assert (written % 2 == 1).all()


@torch.no_grad()
def test_samples_follow_the_distribution_of_the_rules(model, prompts):
    params = SamplingParams(temperature=0.7, top_k=8, max_new_tokens=16, seed=3)
    rows = 4096
    ids = prompts[0][:1].repeat(rows, 1)
    probabilities = process_logits(model(ids[:1]).logits[:, -1], params).softmax(-1)[0].cpu()

    first = continue_rows(model, ids, params)[:, 0].cpu()

    counts = torch.bincount(first, minlength=97)
    drawn = probabilities > 0
    expected = rows * probabilities[drawn]
    assert counts[~drawn].sum() == 0
    assert ((counts[drawn] - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_a_sample_depends_on_its_seed_alone(model, prompts):
    ids, mask = prompts
    params = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=40)

    def sample(rows, seeds):
        generators = [torch.Generator("cuda").manual_seed(seed) for seed in seeds]
        return continue_rows(model, ids[rows], params, attention_mask=mask[rows], generator=generators)

    three = sample([0, 1, 2], [1, 2, 3])

    assert torch.equal(sample([2, 0], [3, 1]), three[[2, 0]])
    assert torch.equal(sample([0, 1, 2], [1, 2, 3]), three)
    assert not torch.equal(sample([0, 1, 2], [4, 2, 3])[0], three[0])


def test_a_model_that_was_trained_further_writes_by_its_new_weights(monkeypatch, model, prompts):
    params = SamplingParams(temperature=0, max_new_tokens=40)
    before = continue_rows(model, prompts[0], params)
    graph = graph_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    after = continue_rows(model, prompts[0], params)

    assert graph_of(model) is graph
    assert not torch.equal(after, before)
    assert torch.equal(after, by_the_general_way(monkeypatch, model, prompts[0], params))


def test_two_texts_of_one_model_may_be_written_in_turns(model, prompts):
    params = SamplingParams(temperature=0, max_new_tokens=40)
    expected = [continue_rows(model, ids, params) for ids in prompts[0][:, None]]

    streams = [generate_stream(model, ids, params) for ids in prompts[0][:, None]]
    written = torch.stack([torch.cat(tokens) for tokens in zip(*streams, strict=True)], dim=1)

    assert torch.equal(written, torch.cat(expected))


def test_a_hooked_or_half_cast_model_goes_the_general_way(model, prompts):
    params = SamplingParams(temperature=0, max_new_tokens=16)
    assert cuda_graph.can_capture(model, params)

    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not cuda_graph.can_capture(model, params)
    handle.remove()
    model.model.norm.bfloat16()
    assert not cuda_graph.can_capture(model, params)


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_in_bf16_the_graph_rounds_no_worse_than_the_general_way(model, prompts, rows):
    ids = prompts[0][:rows]
    params = SamplingParams(temperature=0, max_new_tokens=16)
    exact = model(ids).logits[:, -1]
    model.bfloat16()
    general = (model(ids).logits[:, -1].float() - exact).abs().max()
    continue_rows(model, ids, params)
    graph = cuda_graph.graphs[model][1]
    seen = []
    graph.write = seen.append  # of a step that is not captured

    # One token less is read beforehand, and the last one by the graph's step.
    output = model(ids[:, :-1], use_cache=True)
    mask = torch.ones_like(ids)
    graph.begin(ids[:, :-1], mask[:, :-1], graph.seeds_B, output.logits[:, -1], output[CACHE])
    graph.ids_BP[:, ids.shape[1] - 1] = ids[:, -1]
    graph.step()

    assert (seen[-1].float() - exact).abs().max() < 2 * general
