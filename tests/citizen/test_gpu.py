"""What only a GPU can show; `pytest -m gpu`."""

import pytest
import torch
from contract import flex_mask_warning, pad, random_ids
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

import hfgpt

FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}

pytestmark = [
    pytest.mark.gpu,
    flex_mask_warning,
    # inductor, of models in fp32; and torch 2.11, when transformers warms a step up before it captures it
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    # dynamo of torch 2.11, when it compiles flex_attention's backward
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def need(attention):
    if not FLASH.get(attention, lambda: True)():
        pytest.skip(f"{attention}: its kernels are not installed")


def worst(logits, expected):
    """Largest difference, as a share of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def make_on_gpu(make):
    """A function that makes a model in bf16 on the GPU, and the same in fp32 for what it should say."""

    def make_on_gpu(attention):
        need(attention)
        exact = make(hfgpt.HFGPTForCausalLM, "eager", hidden_size=64).cuda()
        model = make(hfgpt.HFGPTForCausalLM, "eager", hidden_size=64).to("cuda", torch.bfloat16)
        roundings = worst(model(random_ids(3, 20).cuda()).logits.float(), exact(random_ids(3, 20).cuda()).logits)
        model.set_attn_implementation(attention)
        return model, exact, 2 * roundings  # what bf16 itself does to eager attention, and as much again

    return make_on_gpu


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", *FLASH])
@torch.no_grad()
def test_attention_in_bf16_says_what_eager_attention_says_in_fp32(make_on_gpu, attention):
    model, exact, bound = make_on_gpu(attention)
    ids = random_ids(3, 20).cuda()

    assert worst(model(ids).logits.float(), exact(ids).logits) < bound


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", *FLASH])
@torch.no_grad()
def test_padding_changes_nothing_on_a_gpu(make_on_gpu, attention, side):
    model, exact, bound = make_on_gpu(attention)
    ids, mask = (each.cuda() for each in pad(random_ids(3, 20), [20, 13, 5], side))

    logits = model(ids, attention_mask=mask).logits.float()

    assert worst(logits[mask == 1], exact(ids, attention_mask=mask).logits[mask == 1]) < bound


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", *FLASH])
@torch.no_grad()
def test_changing_one_document_changes_no_bit_of_another_on_a_gpu(make_on_gpu, attention):
    model, exact, bound = make_on_gpu(attention)
    ids = random_ids(1, 20).cuda()
    changed = ids.clone()
    changed[0, 3] = changed[0, 3] % 319 + 1
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None].cuda()

    before, after = (model(each, position_ids=positions).logits for each in (ids, changed))

    assert torch.equal(before[0, 9:], after[0, 9:])
    assert worst(before.float(), exact(ids, position_ids=positions).logits) < bound


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_compiled_decoding_with_a_static_cache_writes_the_same_text_on_a_gpu(make, attention):
    model = make(hfgpt.HFGPTForCausalLM, attention, tie_word_embeddings=False).cuda()
    ids = random_ids(3, 20).cuda()

    text = model.generate(ids, max_new_tokens=24, do_sample=False, cache_implementation="static", pad_token_id=0)

    assert torch.equal(text, model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", *FLASH])
def test_gradients_flow_through_every_attention_on_a_gpu(make_on_gpu, attention):
    model, exact, _ = make_on_gpu(attention)
    ids = random_ids(3, 20).cuda()

    for each in (model, exact):
        each(ids, labels=ids).loss.backward()

    for name, parameter in exact.named_parameters():
        if not name.endswith("k_proj.bias"):  # 0 but for rounding: softmax does not see it
            mine = model.get_parameter(name).grad.float()
            assert torch.cosine_similarity(mine.flatten(), parameter.grad.flatten(), dim=0) > 0.99, name
