"""Which names of a config the code has, and what the command says of the others."""

import ast

import pytest

from hfgpt.adopt.names import unread

CODE = """
class GPT(nn.Module):
    def __init__(self, cfg, width=3):
        self.depth = cfg["depth"]
        self.dropout = getattr(cfg, "dropout", 0.0)
        self.heads = cfg.heads
        self.block = Block(mlp=cfg.mlp.size)
"""


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"depth": 1, "dropout": 0.1, "heads": 2, "width": 3, "mlp": {"size": 4}}, []),
        ({"depth": 1, "droput": 0.1}, ["droput"]),
        ({"mlp": {"sise": 4}}, ["mlp.sise"]),
        ({"optimizer": {"depth": 1}}, ["optimizer"]),
    ],
)
def test_a_name_that_stands_nowhere_in_the_code_is_found(values, names):
    assert unread(values, [ast.parse(CODE)]) == names
