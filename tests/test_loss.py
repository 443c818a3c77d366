import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hfgpt import loss
from hfgpt.loss import IGNORE_INDEX, linear_cross_entropy, shift_left
from hfgpt.loss_triton import is_available

TOKENS, WIDTH, VOCABULARY = 20, 6, 31


@pytest.fixture(params=[7, 20, 1024], ids=lambda chunk: f"chunks of {chunk}")
def chunked(request, monkeypatch):
    """Chunks that do not divide the tokens, that are all tokens, and that are more than there are."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", request.param)


@pytest.fixture
def problem():
    """Hidden states (4, 5, C), the output matrix (V, C) and targets (4, 5), of which four are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (4, 5), generator=generator)
    targets[0, :3] = targets[3, 4] = IGNORE_INDEX
    return hidden, weight, targets


def plain_cross_entropy(hidden, weight, targets, reduction="mean"):
    logits = (hidden @ weight.T).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)


def loss_and_gradients(function, hidden, weight, *arguments):
    value = function(hidden, weight, *arguments)
    return value, *torch.autograd.grad(value, (hidden, weight))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_shift_left_makes_each_target_the_next_token():
    labels = torch.tensor([[1, 2, 3], [4, IGNORE_INDEX, 6]])

    targets = shift_left(labels)

    assert targets.tolist() == [[2, 3, IGNORE_INDEX], [IGNORE_INDEX, 6, IGNORE_INDEX]]


@pytest.mark.usefixtures("chunked")
def test_loss_and_gradients_equal_torchs(problem):
    torch.testing.assert_close(
        loss_and_gradients(linear_cross_entropy, *problem),
        loss_and_gradients(plain_cross_entropy, *problem),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("items", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_the_sum_is_divided_by_num_items_in_batch(problem, items):
    torch.testing.assert_close(
        loss_and_gradients(linear_cross_entropy, *problem, items),
        loss_and_gradients(lambda *arguments: plain_cross_entropy(*arguments, reduction="sum") / 3, *problem),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.usefixtures("chunked")
def test_an_ignored_token_counts_for_nothing(problem):
    hidden, weight, targets = problem
    elsewhere = hidden.detach().clone()
    elsewhere[0, :3] += 5
    elsewhere.requires_grad_()

    value, gradient, _ = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)

    assert torch.equal(gradient[0, :3], torch.zeros(3, WIDTH))
    assert torch.equal(value, linear_cross_entropy(elsewhere, weight, targets))


def test_no_target_is_nan_as_in_torch_and_zero_of_a_larger_batch(problem):
    hidden, weight, targets = problem
    nothing = torch.full_like(targets, IGNORE_INDEX)

    assert linear_cross_entropy(hidden, weight, nothing).isnan()
    assert plain_cross_entropy(hidden, weight, nothing).isnan()
    value, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, nothing, 8)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(problem, frozen):
    hidden, weight, targets = problem
    expected = dict(zip(("hidden", "weight"), loss_and_gradients(plain_cross_entropy, *problem)[1:], strict=True))
    tensors = {"hidden": hidden, "weight": weight}
    for name, tensor in tensors.items():
        tensor.requires_grad_(frozen not in (name, "both"))

    value = linear_cross_entropy(hidden, weight, targets)

    torch.testing.assert_close(value, plain_cross_entropy(hidden, weight, targets))
    assert value.requires_grad == (frozen != "both")
    if value.requires_grad:
        value.backward()
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor.grad is None


def test_a_loss_scaled_before_backward_scales_its_gradients(problem):
    hidden, weight, _ = problem
    once = loss_and_gradients(linear_cross_entropy, *problem)[1:]

    thrice = torch.autograd.grad(linear_cross_entropy(*problem) * 3, (hidden, weight))

    torch.testing.assert_close(thrice, tuple(gradient * 3 for gradient in once))


def test_large_logits_do_not_overflow(problem):
    hidden, weight, targets = problem

    value, *gradients = loss_and_gradients(
        linear_cross_entropy, hidden.detach().mul(1e4).requires_grad_(), weight, targets
    )

    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("chunked")
def test_a_target_less_likely_than_fp32_can_tell_has_its_loss_and_gradients_too(problem):
    """From 87 nats on: there the probability itself is 0."""
    hidden, weight, targets = problem
    hidden = hidden.detach().mul(60).requires_grad_()

    mine = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    theirs = loss_and_gradients(plain_cross_entropy, hidden, weight, targets)

    assert theirs[0] > 87
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-5)  # gradients are up to 60


@pytest.mark.parametrize("how", ["in bf16", "under autocast"])
def test_half_precision_stays_near_full_precision(problem, how, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    expected = loss_and_gradients(plain_cross_entropy, *problem)
    hidden, weight, targets = problem
    if how == "in bf16":
        hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "under autocast"):
        value = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(value, (hidden, weight))

    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-2)  # bf16 has eight bits: 0.4 % a number
    for gradient, of, wanted in zip(gradients, (hidden, weight), expected[1:], strict=True):
        assert gradient.dtype == of.dtype
        assert F.cosine_similarity(gradient.float().flatten(), wanted.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("items", [None, torch.tensor(3)], ids=["mean", "items"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 2**-7)])  # two roundings of bf16
def test_compiled_it_has_the_gradients_that_it_has_eagerly(problem, monkeypatch, backend, items, precision, bound):
    """With torch 2.11 they were all 0, under either backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)

    def compute(hidden, weight, targets, items):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return linear_cross_entropy(hidden, weight, targets, items)

    eager = loss_and_gradients(compute, *problem, items)
    compiled = loss_and_gradients(torch.compile(compute, backend=backend, fullgraph=True), *problem, items)

    assert compiled[0].item() == pytest.approx(eager[0].item(), rel=1e-6)  # sums of fp32
    for mine, theirs in zip(compiled[1:], eager[1:], strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_compiled_what_is_frozen_gets_no_gradient(problem, frozen):
    torch._dynamo.reset()
    hidden, weight, targets = problem
    tensors = {"hidden": hidden, "weight": weight}
    moving = tensors["weight" if frozen == "hidden" else "hidden"]
    expected = torch.autograd.grad(linear_cross_entropy(*problem), moving)
    tensors[frozen].requires_grad_(False)

    torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(hidden, weight, targets).backward()

    assert tensors[frozen].grad is None
    torch.testing.assert_close(moving.grad, *expected, rtol=1e-6, atol=1e-6)


def test_the_weight_is_not_copied(problem):
    hidden, weight, targets = problem
    weight.requires_grad_(False)
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[:1] == weight.shape[:1]:
                copies.extend([func] * (result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()))
            return result

    with Copies():
        linear_cross_entropy(hidden, weight, targets).backward()

    assert not copies


def test_compiled_it_never_makes_all_logits_either(problem):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(linear_cross_entropy, backend=keep, fullgraph=True)(*problem)

    made = [node.meta["example_value"] for node in graphs[0].graph.nodes if "example_value" in node.meta]
    sizes = [each.numel() for value in made for each in (value if isinstance(value, tuple) else (value,))]
    assert max(sizes) < TOKENS * VOCABULARY


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [31, 4096, 5000, 50257])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 2e-3), (torch.bfloat16, 2**-7), (torch.float16, 2**-7)],  # TF32's roundings; two of the dtype's
)
def test_on_a_gpu_one_kernel_gives_the_loss_and_gradients_of_torch(monkeypatch, vocabulary, dtype, bound):
    assert is_available(torch.device("cuda:0"))
    monkeypatch.setattr(loss, "CHUNK_TOKENS_ON_GPU", 48)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 64, generator=generator).cuda().to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 64, generator=generator) / 8).cuda().requires_grad_()
    targets = torch.randint(vocabulary, (100,), generator=generator).cuda()
    targets[::7] = IGNORE_INDEX

    mine = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    theirs = loss_and_gradients(plain_cross_entropy, hidden.double(), weight.to(dtype).double(), targets)

    assert mine[0].item() == pytest.approx(theirs[0].item(), rel=2e-3)
    for gradient, of, wanted in zip(mine[1:], (hidden, weight), theirs[1:], strict=True):
        assert gradient.dtype == of.dtype
        assert (gradient - wanted).norm() <= bound * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("target", [-5, 31])
def test_on_a_gpu_a_target_outside_of_the_vocabulary_makes_the_loss_nan(problem, target):
    hidden, weight, targets = (tensor.detach().cuda() for tensor in problem)
    targets[1, 1] = target

    assert linear_cross_entropy(hidden, weight, targets).isnan()


def test_all_logits_never_exist_at_once(problem, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    with LargestTensor() as fused:
        loss_and_gradients(linear_cross_entropy, *problem)
    with LargestTensor() as plain:
        loss_and_gradients(plain_cross_entropy, *problem)

    assert fused.elements == 7 * 64  # rows have room for a multiple of 64 elements
    assert plain.elements == TOKENS * VOCABULARY
