"""Models of the book's later chapters: a classifier for an output layer (6), LoRA around layers (appendix E)."""

import pytest
import torch
from foreign import from_scratch, save_in

from hfgpt.cli import app
from hfgpt.weights import load
from hfgpt.weights.convert import convert


@pytest.fixture
def ids():
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def with_lora(tensors, layers, rank):
    """The same with `LinearWithLoRA` for some layers, drawn at random; and what it adds to each weight for alpha 1."""
    draws = torch.Generator().manual_seed(0)
    result, added = {}, {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not layer.endswith(layers):
            result[name] = tensor
            continue
        result[f"{layer}.linear.{kind}"] = tensor
        if kind == "weight":
            A, B = (torch.randn(shape, generator=draws) / 5 for shape in ((tensor.shape[1], rank), (rank, len(tensor))))
            result |= {f"{layer}.lora.A": A, f"{layer}.lora.B": B}
            added[name] = (A @ B).T / rank
    return result, added


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_head_of_a_classifier_is_dropped_and_said(make_gpt2, tmp_path, ids, capsys, fast, classes, has_bias):
    gpt2 = make_gpt2()
    head = {"out_head.weight": torch.ones(classes, 32)} | ({"out_head.bias": torch.ones(classes)} if has_bias else {})
    torch.save(from_scratch(gpt2, fast) | head, tmp_path / "review_classifier.pth")
    words = ["convert", str(tmp_path / "review_classifier.pth"), str(tmp_path / "out"), "--to", "hfgpt", "--heads", "4"]

    app([*words, "--verify"], standalone_mode=False)

    written = capsys.readouterr().out
    assert f"note: out_head scored {classes} classes of a text and is dropped" in written
    assert "(verified: " in written
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, gpt2(ids).logits, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"--strict: out_head\.weight would be dropped: a classifier's"):
        convert(words[1], tmp_path / "strict", "hfgpt", heads=4, strict=True)


LORA_KINDS = {
    "everywhere": ("query", "key", "value", "out_proj", "layers.0", "layers.2", "out_head"),
    "attention": ("query", "value"),
    "the output layer": ("out_head",),
}


@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("alpha", [4, 16.0, 0.5])
def test_lora_is_merged_by_the_alpha_that_is_told(make_gpt2, tmp_path, ids, kind, alpha):
    gpt2 = make_gpt2(tie_word_embeddings=False)
    plain = from_scratch(gpt2)
    tensors, added = with_lora(plain, LORA_KINDS[kind], rank=4)
    torch.save(tensors, tmp_path / "lora.pth")
    torch.save(plain | {name: plain[name] + alpha * each for name, each in added.items()}, tmp_path / "merged.pth")

    with pytest.raises(ValueError, match=r"LoRA, of an alpha that the file does not say\. Give `--lora-alpha`"):
        convert(tmp_path / "lora.pth", tmp_path / "out", "hfgpt", heads=4)
    assert not (tmp_path / "out").exists()
    result = convert(tmp_path / "lora.pth", tmp_path / "out", "hfgpt", heads=4, lora_alpha=alpha, verify=True)

    expected = load(tmp_path / "merged.pth", heads=4)(ids).logits
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, expected, rtol=1e-5, atol=2e-5)
    assert result.comparison.max_abs_diff < 1e-4  # merged, the sum is rounded to fp32
    assert sum(step.action.startswith("merged into") for step in result.lossy) == 2 * len(added)


def test_a_classifier_with_lora_is_read_too(make_gpt2, tmp_path, ids):
    plain = from_scratch(make_gpt2()) | {"out_head.weight": torch.ones(2, 32), "out_head.bias": torch.ones(2)}
    tensors, added = with_lora(plain, LORA_KINDS["everywhere"], rank=4)
    torch.save(tensors, tmp_path / "lora.pth")
    added.pop("out_head.weight")
    torch.save(plain | {name: plain[name] + 2 * each for name, each in added.items()}, tmp_path / "merged.pth")

    model = load(tmp_path / "lora.pth", heads=4, lora_alpha=2)

    torch.testing.assert_close(model(ids).logits, load(tmp_path / "merged.pth", heads=4)(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_head.lora.B": None}, "out_head: LoRA without one of"),
        ({"out_head.linear.weight": None}, "out_head: LoRA without one of"),
        ({"out_head.lora.A": torch.ones(31, 4)}, "out_head: the shapes of weight, A and B"),
        ({"out_head.lora.m": torch.ones(3)}, r"out_head\.lora\.m: left over"),
    ],
)
def test_lora_that_does_not_fit_is_refused_by_name(make_gpt2, tmp_path, change, message):
    tensors, _ = with_lora(from_scratch(make_gpt2()), ("out_head",), rank=4)
    kept = {name: each for name, each in (tensors | change).items() if each is not None}
    torch.save(kept, tmp_path / "lora.pth")

    with pytest.raises(ValueError, match=rf"lora\.pth: {message}"):
        load(tmp_path / "lora.pth", heads=4, lora_alpha=4)


@pytest.mark.parametrize("kind", ["llms-from-scratch", "nanogpt", "gpt2"])
def test_an_alpha_without_lora_is_refused(make_gpt2, tmp_path, kind):
    if kind == "gpt2":
        make_gpt2().save_pretrained(tmp_path / "gpt2")
    source = tmp_path / "gpt2" if kind == "gpt2" else save_in(kind, make_gpt2(), tmp_path)

    with pytest.raises(ValueError, match="`--lora-alpha` is"):
        load(source, heads=4 if kind == "llms-from-scratch" else None, lora_alpha=4)
