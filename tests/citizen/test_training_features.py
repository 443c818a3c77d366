import pytest
import torch
from contract import (
    ALL_CLASSES,
    SUM_ORDER,
    cache_of,
    draw_parameters,
    flex_mask_warning,
    make_labels,
    random_ids,
    scores,
)
from transformers import DynamicCache
from transformers.exporters import DynamoConfig, DynamoExporter

import hfgpt
from hfgpt.arguments import CACHE

EACH_CLASS_AND_BOTH_ATTENTIONS = [
    *((model_class, "sdpa") for model_class in ALL_CLASSES),
    (hfgpt.HFGPTForCausalLM, "eager"),
]
WITH_LOSS = [model_class for model_class in ALL_CLASSES if model_class is not hfgpt.HFGPTModel]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()  # it compiles one function a few times only, whatever model it belongs to


@pytest.fixture
def ids():
    return random_ids(3, 20)


def learn(model, ids, **arguments):
    """One forward and backward pass with the same dropout each time: the loss and every gradient."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(ids, **make_labels(type(getattr(model, "_orig_mod", model)), ids), **arguments).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_class", WITH_LOSS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activation_checkpointing_gives_the_very_same_gradients(make, ids, model_class, reentrant, attention):
    model = make(model_class, attention).train()
    loss, gradients = learn(model, ids)

    model.activation_checkpointing_enable({"use_reentrant": reentrant})

    again, recomputed = learn(model, ids)
    assert torch.equal(again, loss)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


def test_every_second_block_may_be_checkpointed(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, num_hidden_layers=4).train()
    _, gradients = learn(model, ids)

    model.activation_checkpointing_enable(every_n_layers=2)

    assert [block.gradient_checkpointing for block in model.model.layers].count(True) == 2
    assert all(torch.equal(each, gradients[name]) for name, each in learn(model, ids)[1].items())


def test_a_cache_asked_for_under_checkpointing_is_not_kept(make, ids):
    model = make(hfgpt.HFGPTForCausalLM).train()
    model.activation_checkpointing_enable()

    assert cache_of(model(ids, use_cache=True)) is None


@pytest.mark.parametrize(("model_class", "attention"), EACH_CLASS_AND_BOTH_ATTENTIONS)
def test_the_forward_pass_is_one_graph(make, ids, model_class, attention):
    model = make(model_class, attention, pad_token_id=0)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = torch.arange(20).remainder(8)[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)

    # This backend runs the captured graph as it is: a graph break is an error, and no C++ compiler is needed.
    for arguments in ({}, {"attention_mask": mask}, {"position_ids": positions}):
        torch.testing.assert_close(scores(compiled(ids, **arguments)), scores(model(ids, **arguments)), **SUM_ORDER)


@pytest.mark.parametrize("model_class", WITH_LOSS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_training_step_is_one_graph(make, ids, model_class, checkpointed):
    model = make(model_class).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    loss, gradients = learn(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)

    again, traced = learn(compiled, ids)

    torch.testing.assert_close(again, loss, rtol=0, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(traced[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_compiled_model_reads_no_mask_where_every_row_is_one_whole_document(make, ids):
    """torch 2.11 tells transformers that it exports, and a mask of the size of the scores was made and read."""
    calls = []

    def keep(graph, inputs):
        calls.extend(node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target))
        return graph.forward

    torch.compile(make(hfgpt.HFGPTForCausalLM), fullgraph=True, backend=keep, dynamic=False)(ids, use_cache=False)

    assert calls
    assert all(call.kwargs["attn_mask"] is None and call.kwargs["is_causal"] for call in calls)


def test_the_training_step_without_logits_is_one_graph(make, ids):
    model = make(hfgpt.HFGPTForCausalLM).train()
    loss, gradients = learn(model, ids, skip_logits=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)

    again, traced = learn(compiled, ids, skip_logits=True)

    torch.testing.assert_close(again, loss, rtol=0, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(traced[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_compiled_training_step_learns_the_same(make, ids, attention):
    model = make(hfgpt.HFGPTForCausalLM, attention).train()
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.0)  # compiled code draws other masks
    loss, gradients = learn(model, ids)

    again, compiled = learn(torch.compile(model, fullgraph=True), ids)

    torch.testing.assert_close(again, loss, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}"], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@flex_mask_warning
def test_compiled_flex_attention_says_what_eager_attention_says(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, "eager")
    positions = torch.arange(20).remainder(8)[None]

    with torch.no_grad():  # flex_attention has no backward on a CPU
        expected = [model(ids).logits, model(ids, position_ids=positions).logits]
        model.set_attn_implementation("flex_attention")
        logits = [model(ids).logits, model(ids, position_ids=positions).logits]

    torch.testing.assert_close(logits, expected, **SUM_ORDER)


@pytest.mark.parametrize("model_class", WITH_LOSS)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_autocast_learns_nearly_the_same_in_half_the_bits(make, ids, model_class, dtype, precision):
    model = make(model_class)
    loss, gradients = learn(model, ids)

    with torch.autocast("cpu", dtype=dtype):
        half_loss, half_gradients = learn(model, ids)

    assert half_loss.dtype == torch.float32
    # Some twenty roundings in a row, each of them half a unit in the last place of `dtype`.
    assert 0 < abs(half_loss - loss) / loss < 20 * precision
    assert all(gradient.dtype == torch.float32 for gradient in half_gradients.values())
    whole, half = (torch.cat([each.flatten() for each in them.values()]) for them in (gradients, half_gradients))
    assert (half - whole).norm() < 20 * precision * whole.norm()


def test_an_output_layer_may_be_untied_trained_and_saved(make, ids, tmp_path):
    model = make(hfgpt.HFGPTForCausalLM)
    before = model(ids).logits

    model.config.tie_word_embeddings = False
    model.set_output_embeddings(torch.nn.Linear(32, 320, bias=False))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)

    again = hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, before * 2)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_an_output_layer_may_be_tied_again(make, ids):
    model = make(hfgpt.HFGPTForCausalLM, tie_word_embeddings=False)
    tied = make(hfgpt.HFGPTForCausalLM)
    tied.model.load_state_dict(model.model.state_dict())

    model.config.tie_word_embeddings = True
    model.tie_weights(recompute_mapping=True)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, tied(ids).logits)


@pytest.mark.parametrize(("model_class", "attention"), EACH_CLASS_AND_BOTH_ATTENTIONS)
def test_torch_export_gives_a_program_for_any_batch_and_length(make, ids, model_class, attention):
    model = make(model_class, attention, use_cache=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}

    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    ).module()

    other, other_mask = random_ids(2, 31, seed=1), torch.ones(2, 31, dtype=torch.long)
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": other, "attention_mask": other_mask}):
        torch.testing.assert_close(scores(program(**inputs)), scores(model(**inputs)), **SUM_ORDER)


@torch.no_grad()
def test_transformers_exporter_exports_a_step_with_its_cache(make, ids):
    model = make(hfgpt.HFGPTForCausalLM)
    cache = cache_of(model(ids[:, :-1]))
    inputs = {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids), CACHE: cache}

    exported = DynamoExporter().export(model, inputs, config=DynamoConfig())

    fresh = {**inputs, CACHE: cache_of(model(ids[:, :-1]))}
    assert isinstance(fresh[CACHE], DynamicCache)
    logits = exported.program.module()(**fresh).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -1:], **SUM_ORDER)


def test_every_parameter_of_each_class_learns(make, ids):
    for model_class in WITH_LOSS:
        model = make(model_class).train()
        draw_parameters(model)

        _, gradients = learn(model, ids)

        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert gradient.abs().sum() > 0, name
