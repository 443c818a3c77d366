import pytest
from commands import assert_refused, hfgpt


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sleep", ["`bench`", "'sleep'", "train"]),
        ("train --size huge", ["`size`", "'huge'", "124M"]),
        ("train --against keras", ["'keras'", "transformers, nanogpt, llms-from-scratch, hfgpt-train, trainer"]),
        ("train --against litgpt=.", ["'litgpt'", "There are transformers"]),
        ("train --against transformers,transformers", ["names transformers twice"]),
        ("train --against transformers=.", ["takes no path", "'.'"]),
        ("train --against nanogpt", ["nanogpt=PATH", "model.py"]),
        ("train --against nanogpt=nowhere", ["nanogpt=PATH", "'nanogpt=nowhere'"]),
        ("train --against=", ["`--against` is empty"]),
        ("data --against nanogpt=.", ["'nanogpt'", "There are transformers."]),
        ("train --against transformers-static", ["'transformers-static'"]),
        ("train --precision fp8", ["`precision`", "'fp8'"]),
        ("train --batch-size 0", ["`batch_size`", "at least 1", "0"]),
        ("train --rounds 1", ["`rounds`", "at least 2", "1"]),
        ("train --steps 0", ["`steps`", "at least 1"]),
        ("train --new-tokens 3", ["`--new-tokens` has no effect on `bench train`"]),
        ("data --compile", ["`--compile` has no effect on `bench data`"]),
        ("generate --compile", ["`--compile` has no effect on `bench generate`"]),
        ("train --top-k 5", ["`--top-k` has no effect on `bench train`"]),
        ("generate --top-k 0", ["`top_k` must be at least 1, got 0"]),
        ("load --precision bf16", ["`--precision` has no effect on `bench load`"]),
        ("data --megabytes 0", ["`megabytes`", "0.001"]),
        ("train --allocator mine", ["`allocator`", "'mine'", "keep"]),
        ("train --device tpu", ["`device`", "'tpu'"]),
        ("data --device cuda", ["`--device cuda` has no effect"]),
        ("train --device cpu --values 1,2", ["`--values` has no effect without `--grow`"]),
        ("train --device cpu --picture x.png", ["`--picture` has no effect without `--grow`"]),
        ("train --device cpu --grow width", ["`--grow`", "'width'", "layers"]),
        ("data --grow block", ["`--grow block` has no effect on `bench data`"]),
        ("load --device cpu --grow batch", ["`--grow batch` has no effect on `bench load`"]),
        ("train --device cpu --grow block --values 1,x", ["`--values`", "'1,x'"]),
        ("train --device cpu --grow block --values 0", ["`--values`", "'0'"]),
        ("train --device cpu --grow block --picture x.jpg", ["x.jpg", ".png"]),
        ("train --device cpu --grow block --picture none/x.png", ["none"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)

    printed = hfgpt("bench", *words.split(" "))

    assert_refused(printed, *said)
    assert [*tmp_path.iterdir()] == []
