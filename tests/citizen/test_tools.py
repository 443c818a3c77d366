"""Tools that hold a model by its conventions: each does with hfgpt what it does with GPT-2."""

import copy

import pytest
import torch
from accelerate import disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from contract import ALL_CLASSES, GPT2_CLASSES, SUM_ORDER, pad, random_ids
from transformers import AutoModelForCausalLM

import hfgpt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # torch.jit reads every property of a module, transformers' old ones too.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of lengths that are the same in every trace
]


@pytest.fixture
def ids():
    return random_ids(2, 10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_a_trace_of_torch_jit_is_the_model_at_any_length(make, ids, model_class, attention):
    model = make(model_class, attention, use_cache=False, pad_token_id=0)
    traced = torch.jit.trace(model, ids, strict=False)

    for other in (random_ids(2, 17, seed=1), random_ids(3, 5, seed=2), random_ids(1, 64, seed=3), random_ids(1, 1)):
        expected = model(other, return_dict=False)[0]
        torch.testing.assert_close(next(iter(traced(other).values())), expected, **SUM_ORDER)
    if model_class in GPT2_CLASSES:  # nanochat has an angle for every position
        with pytest.raises(RuntimeError, match="index out of range"):
            traced(random_ids(1, 65))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_trace_of_torch_jit_sees_the_padding_of_other_inputs(make, ids, attention, side):
    model = make(hfgpt.HFGPTForCausalLM, attention, use_cache=False)
    padded, mask = pad(ids, [10, 6], side)
    traced = torch.jit.trace(model, example_kwarg_inputs={"input_ids": padded, "attention_mask": mask}, strict=False)
    others, their_mask = pad(random_ids(3, 20, seed=1), [20, 13, 5], side)

    logits = traced(input_ids=others, attention_mask=their_mask)["logits"]

    expected = model(others, attention_mask=their_mask).logits
    torch.testing.assert_close(logits[their_mask == 1], expected[their_mask == 1], **SUM_ORDER)


def offloaded_to_disk(model, ids, folder):
    copied = copy.deepcopy(model)
    disk_offload(copied, folder, execution_device="cpu")
    return copied(ids).logits


def dispatched(model, ids, folder):
    model.save_pretrained(folder)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.tie_weights()
    layers = type(model)._no_split_modules
    return load_checkpoint_and_dispatch(empty, folder, {"": "cpu"}, no_split_module_classes=layers).eval()(ids).logits


def loaded_partly_from_disk(model, ids, folder):
    model.save_pretrained(folder / "model")
    blocks = next(name for name, child in model.base_model.named_children() if isinstance(child, torch.nn.ModuleList))
    places = {name: "cpu" for name, child in model.named_modules() if not list(child.children())}
    places = {name: place for name, place in places.items() if f".{blocks}." not in name}
    places |= {f"{model.base_model_prefix}.{blocks}.{block}": ("cpu", "disk")[block] for block in range(2)}
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "rest")
    return loaded(ids).logits


def called_functionally(model, ids, folder):
    return torch.func.functional_call(model, dict(model.named_parameters()), (ids,)).logits


def in_an_ensemble(model, ids, folder):
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    empty = copy.deepcopy(model).to("meta")
    empty.tie_weights()  # `to` unties what it takes off the device
    empty.set_attn_implementation("eager")  # torch has no batching rule for the other, and says so

    def call(parameters, buffers):
        return torch.func.functional_call(empty, (parameters, buffers), (ids,), {"use_cache": False}).logits

    return torch.vmap(call)(parameters, buffers)[1]


def exported(model, ids, folder):
    sizes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (), {"input_ids": ids[:, :5].clone()}, dynamic_shapes=sizes, strict=False)
    return program.module()(input_ids=ids).logits


def saved_whole(model, ids, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)(ids).logits


def in_another_process(model, ids, folder):
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run_model, (model, ids))


def run_model(model, ids):
    with torch.no_grad():
        return model(ids).logits


def with_a_prompt_of_its_own(model, ids, folder):
    embedded = model.get_input_embeddings()(ids)
    return model(inputs_embeds=embedded).logits


TOOLS = [
    offloaded_to_disk,
    dispatched,
    loaded_partly_from_disk,
    called_functionally,
    in_an_ensemble,
    exported,
    saved_whole,
    in_another_process,
    with_a_prompt_of_its_own,
]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_has_the_models_logits_as_it_has_gpt2s(make_pair, ids, tmp_path, tool):
    gpt2, model = make_pair(hfgpt.HFGPTForCausalLM)
    model.config.use_cache = gpt2.config.use_cache = False

    with torch.no_grad():
        theirs, mine = (tool(each, ids, make_folder(tmp_path / name)) for name, each in (("a", gpt2), ("b", model)))

        torch.testing.assert_close(mine, model(ids).logits, **SUM_ORDER)
    torch.testing.assert_close(mine, theirs, **SUM_ORDER)


def make_folder(folder):
    folder.mkdir()
    return folder
