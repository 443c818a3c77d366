"""vLLM, SGLang and TGI run a model of transformers with an attention of their own.

They hand over one row with the tokens of several requests, and give their attention, as arguments of its own, what
keeps the requests apart. What is imitated here was read in vllm/model_executor/models/transformers/base.py,
sglang/srt/models/transformers.py and text_generation_server/models/transformers_flash_causal_lm.py.
"""

import pytest
import torch
import torch.nn.functional as F
from contract import SUM_ORDER, random_ids
from torch import nn
from transformers import AttentionInterface, AutoModel

import hfgpt

LENGTHS = [9, 4, 7]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


class OwnBooks:
    """One layer of an engine: it knows which tokens belong together, and keeps their keys and values."""

    def __init__(self, heads):
        self.heads = heads
        self.lengths = LENGTHS
        self.kept = {}

    def forward(self, query, key, value):
        """Map (tokens, H * D) of all requests to the same, each request attended by itself."""
        attended = []
        parts = zip(*(each.split(self.lengths) for each in (query, key, value)), strict=True)
        for request, (q, k, v) in enumerate(parts):
            is_first = request not in self.kept
            before = self.kept.get(request, (k[:0], v[:0]))
            k, v = self.kept[request] = torch.cat([before[0], k]), torch.cat([before[1], v])
            q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for each in (q, k, v))
            attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_first)[0].transpose(0, 1).flatten(-2))
        return torch.cat(attended)


def vllm_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    tokens = query.shape[-2]
    query, key, value = (each.transpose(1, 2).reshape(tokens, -1) for each in (query, key, value))
    return attention_instances[module.layer_idx].forward(query, key, value), None


def tgi_attention(module, query, key, value, attention_mask, kv_cache, slots, seqlen, max_s, **kwargs):
    query, key, value = (each.transpose(1, 2).squeeze(dim=0).flatten(-2) for each in (query, key, value))
    return kv_cache[module.layer_idx].forward(query, key, value), None


AttentionInterface.register("like vllm's", vllm_attention)
AttentionInterface.register("like tgi's", tgi_attention)


def own_arguments(engine, books):
    """What each engine gives a model besides ids and positions."""
    return {
        "vllm": {"attention_instances": books, "return_dict": False},
        "sglang": {"attention_instances": books, "return_dict": False, "forward_batch": object()},
        "tgi": {"kv_cache": books, "slots": torch.arange(20), "seqlen": object(), "max_s": 9, "return_dict": True},
    }[engine]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def ids():
    return random_ids(1, 20)


@pytest.fixture
def expected(make, ids):
    model = make(hfgpt.HFGPTModel)
    return torch.cat([model(part).last_hidden_state for part in ids.split(LENGTHS, dim=1)], dim=1)


def books_of(model):
    return {layer: OwnBooks(model.config.num_attention_heads) for layer in range(model.config.num_hidden_layers)}


def attention_of(engine):
    return "like tgi's" if engine == "tgi" else "like vllm's"


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi"])
def test_requests_in_one_row_of_an_engine_are_as_if_alone(make, ids, expected, engine, given):
    model = make(hfgpt.HFGPTModel, attention_of(engine))
    inputs = {given: ids if given == "input_ids" else model.get_input_embeddings()(ids)}

    out = model(**inputs, position_ids=POSITIONS, use_cache=False, **own_arguments(engine, books_of(model)))[0]

    torch.testing.assert_close(out, expected, **SUM_ORDER)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tgi"])
def test_an_engine_goes_on_with_one_token_of_each_request(make, ids, engine):
    model = make(hfgpt.HFGPTForCausalLM, attention_of(engine))
    books = books_of(model)
    model(input_ids=ids, position_ids=POSITIONS, use_cache=False, **own_arguments(engine, books))
    for each in books.values():
        each.lengths = [1, 1, 1]
    new = random_ids(1, 3, seed=1)

    out = model(input_ids=new, position_ids=torch.tensor([LENGTHS]), use_cache=False, **own_arguments(engine, books))

    logits = out.logits if engine == "tgi" else out[0]
    plain = make(hfgpt.HFGPTForCausalLM)
    for request, part in enumerate(ids.split(LENGTHS, dim=1)):
        whole = plain(torch.cat([part, new[:, [request]]], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[0, request], whole, **SUM_ORDER)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("model_class", [hfgpt.HFGPTModel, hfgpt.HFGPTForCausalLM])
def test_an_engine_may_compile_the_whole_model(make, ids, engine, model_class):
    model = make(model_class, attention_of(engine))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    arguments = own_arguments(engine, books_of(model)) | {"position_ids": POSITIONS, "use_cache": False}

    out = compiled(input_ids=ids, **arguments)[0]

    plain = make(model_class)
    alone = torch.cat([plain(part, return_dict=False)[0] for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(out, alone, **SUM_ORDER)


def test_an_engine_may_make_the_model_without_memory_and_put_its_own_layers_into_it(make, ids, expected):
    source = make(hfgpt.HFGPTModel)
    config = hfgpt.HFGPTConfig(**{**source.config.to_diff_dict(), "dtype": torch.float32})
    config.get_text_config()._attn_implementation = "like vllm's"
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()

    def replace_linears(module):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, OwnLinear(child.in_features, child.out_features, bias=child.bias is not None))
            else:
                replace_linears(child)

    replace_linears(model)
    model.set_input_embeddings(OwnEmbedding(config.vocab_size, config.hidden_size))
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    out = model(
        input_ids=ids,
        inputs_embeds=None,
        position_ids=POSITIONS,
        use_cache=False,
        attention_instances=books_of(model),
        return_dict=False,
    )[0][0, ...]

    torch.testing.assert_close(out, expected[0], **SUM_ORDER)


class OwnLinear(nn.Linear):
    """A layer of an engine in place of torch's."""


class OwnEmbedding(nn.Embedding):
    """As above."""


class MissingLayer(nn.Identity):
    """What an engine puts where another stage of the pipeline has a layer."""

    def forward(self, *args, **kwargs):
        return args[0] if args else next(iter(kwargs.values()))


@pytest.mark.parametrize("cut", [1, 2])
def test_an_engine_may_cut_the_model_into_stages(make, ids, cut):
    whole = make(hfgpt.HFGPTModel, num_hidden_layers=3)
    stages = [make(hfgpt.HFGPTModel, "like vllm's", num_hidden_layers=3) for _ in range(2)]
    plan = list(stages[0].pp_plan)
    layers = plan.index("layers")
    for stage, model in enumerate(stages):
        for name in plan[:layers] if stage == 1 else plan[layers + 1 :]:
            model.set_submodule(name, MissingLayer())
        for layer in range(3):
            if (layer < cut) != (stage == 0):
                model.layers[layer] = MissingLayer()
    first, second = (
        {"position_ids": POSITIONS, "use_cache": False, **own_arguments("vllm", books_of(model))} for model in stages
    )

    hidden = stages[0](input_ids=ids, inputs_embeds=None, **first)[0]
    out = stages[1](input_ids=None, inputs_embeds=hidden, **second)[0]

    alone = torch.cat([whole(part).last_hidden_state for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(out, alone, **SUM_ORDER)


def test_what_an_engine_asks_of_a_model_is_there(make):
    model = make(hfgpt.HFGPTModel)

    assert model.is_backend_compatible()
    assert model.config.get_text_config() is model.config
    assert model.config.num_key_value_heads == model.config.num_attention_heads  # TGI reads it
    assert model.tp_plan["layers.*.self_attn.q_proj"] == "colwise"
    assert {type(each.layer_idx) for each in model.modules() if hasattr(each, "is_causal")} == {int}
    with pytest.raises(ValueError, match="`num_key_value_heads` \\(2\\) are the same field"):
        hfgpt.HFGPTConfig(n_head=4, num_key_value_heads=2)


@pytest.mark.parametrize("positions", [POSITIONS, torch.arange(20)[None]], ids=["restart", "go on"])
def test_a_traced_model_refuses_mixed_documents_when_it_runs(make, ids, positions):
    """`like vllm's`, called without anything of its own, would let them see each other."""
    AttentionInterface.register("blind", blind_attention)
    model = make(hfgpt.HFGPTForCausalLM, "blind")
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    if positions is POSITIONS:
        with pytest.raises(RuntimeError, match="'blind' would let those documents see each other"):
            compiled(ids, position_ids=positions)
    else:
        torch.testing.assert_close(
            compiled(ids, position_ids=positions).logits, make(hfgpt.HFGPTForCausalLM)(ids).logits, **SUM_ORDER
        )


def blind_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    attended = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    return attended.transpose(1, 2), None
