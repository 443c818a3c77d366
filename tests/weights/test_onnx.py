import numpy as np
import onnxruntime
import pytest
import torch

from hfgpt.weights import load
from hfgpt.weights.convert import convert
from hfgpt.weights.formats import onnx


@pytest.fixture
def folder(make_gpt2, tmp_path):
    make_gpt2(tie_word_embeddings=False).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_onnxruntime_gives_the_logits_at_any_batch_and_length(folder, tmp_path):
    model = load(folder)

    result = convert(folder, tmp_path / "model.onnx", "onnx", verify=True)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    draws = torch.Generator().manual_seed(0)
    for rows, length in ((2, 7), (3, 20), (1, 1), (1, 64)):
        ids = torch.randint(320, (rows, length), generator=draws)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0  # left-padded
        [logits] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        expected = model(ids, attention_mask=mask).logits.detach().numpy()
        assert np.abs(logits - expected)[mask.numpy() == 1].max() <= 1e-5
    assert result.comparison.dest_by == "onnxruntime"
    assert result.comparison.max_abs_diff <= 1e-5
    assert {step.name for step in result.steps_out} == {name for name, _ in model.named_parameters()}


def test_the_axes_of_the_graph_have_names(folder, tmp_path):
    convert(folder, tmp_path / "model.onnx", "onnx")

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))

    shapes = {each.name: each.shape for each in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", 320],
    }


def test_a_model_too_large_for_one_file_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "LARGEST_FILE", 100_000)

    with pytest.raises(ValueError, match=r"the weights take 0\.0 GB, an \.onnx file at most 2\. Try `--dtype fp16`"):
        convert(folder, tmp_path / "model.onnx", "onnx")

    assert not (tmp_path / "model.onnx").exists()


def test_bf16_which_onnxruntime_does_not_know_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no bf16 on CPUs"):
        convert(folder, tmp_path / "model.onnx", "onnx", dtype="bf16")
