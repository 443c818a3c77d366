"""What `hfgpt check` finds of losses, training and tools: nothing in a model that is right, one thing in each broken one."""

import pytest
from broken_training import BROKEN, ForgetfulConfig

import hfgpt
from hfgpt.check import check
from hfgpt.check.promises import adapters, export, loss, processes, tools, trainer, training
from hfgpt.check.subject import Subject

MINE = (adapters, export, loss, processes, tools, trainer, training)
SLOW = {
    "tensor-parallel-is-one-process",
    "fsdp-is-one-process",
    "onnx-takes-any-size",
    "export-takes-any-size",
    "compiled-step-is-one-graph",
    "compiled-gradients-are-eager",
}
