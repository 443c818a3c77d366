"""ONNX: the whole forward pass as a graph, for runtimes without PyTorch. Written by torch's exporter; not read.

Inputs `input_ids` and `attention_mask`, both (B, T) int64, any batch and length; output `logits` (B, T, V). The axes B
and T are called `batch` and `sequence`. There is no cache: each call is a whole pass.
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.system.extras import needs
from hfgpt.weights.model_parts import ModelParts, join_model
from hfgpt.weights.table import Change

LARGEST_FILE = 2**31
"""Bytes that a protocol buffer, which an .onnx file is, can have."""


class LogitsOnly(nn.Module):
    """The model without its cache and its output class, which a graph has no place for."""

    def __init__(self, model: HFGPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every next token: (B, T, V)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write(parts: ModelParts, file: Path) -> list[Change]:
    """Export a model.

    Raises:
        ValueError: the packages for it are not installed, or the model is too large for one file or in bf16.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(needs("ONNX", "onnx", "onnxscript")) from error
    if parts.dtype == torch.bfloat16:
        raise ValueError("onnxruntime has no bf16 on CPUs. Give `--dtype fp32` or `--dtype fp16`.")
    size = sum(tensor.nbytes for tensor in parts.tensors.values())
    if size > 0.95 * LARGEST_FILE:
        raise ValueError(f"the weights take {size / 1e9:.1f} GB, an .onnx file at most 2. Try `--dtype fp16`.")
    # It warns that torchvision is not installed, which is not needed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    changes = [Change(name, tuple(tensor.shape), "copied into the graph") for name, tensor in parts.tensors.items()]
    model = join_model(parts)
    ids = torch.zeros(2, min(7, model.config.max_position_embeddings), dtype=torch.long)
    axes = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch 2.13 copies its own tree
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # that one name stands for equal axes
        torch.onnx.export(
            LogitsOnly(model).eval(),
            (ids, torch.ones_like(ids)),
            str(file),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
            external_data=False,
            verbose=False,
        )
    return changes


def run(file: Path, ids: Tensor) -> Tensor:
    """The logits that onnxruntime gives, in fp32.

    Raises:
        ValueError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(needs("`--verify` of ONNX", "onnxruntime")) from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    return torch.from_numpy(session.run(None, inputs)[0]).float()
