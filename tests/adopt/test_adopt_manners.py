"""Manners of writing a GPT that need no file of their own."""

import sys

import pytest
import torch
from torch import nn

from hfgpt.adopt.constructor import find_constructor
from hfgpt.adopt.probe import probe


class Hyper:
    rows = 20
    width = 8
    longest = 12


class Sums(nn.Module):
    """Each position has the mean of what was before; sizes come in a class that is the default."""

    def __init__(self, hp=Hyper):
        super().__init__()
        self.table = nn.Embedding(hp.rows, hp.width)
        self.places = nn.Embedding(hp.longest, hp.width)
        self.head = nn.Linear(hp.width, hp.rows)

    def forward(self, ids):
        length = ids.shape[1]
        return self.head(torch.tanh(self.table(ids) + self.places(torch.arange(length))).cumsum(1))


class Begins(Sums):
    """In the manner of llama: the place of the first token is asked for."""

    def forward(self, ids, start_pos: int):
        places = self.places(torch.arange(start_pos, start_pos + ids.shape[1]))
        return self.head(torch.tanh(self.table(ids) + places).cumsum(1))


class Plain(Sums):
    def __init__(self, width=8):
        super().__init__()


def test_a_class_that_is_the_default_holds_what_the_config_does_not_say():
    constructor = find_constructor(Sums, sys.modules[__name__], {"width": 6})

    module = constructor.build(Sums)

    assert module.table.weight.shape == (20, 6)
    assert module.places.weight.shape == (12, 6)
    assert constructor.imports == ("Hyper",)
    assert Hyper.width == 8


def test_a_text_begins_at_0_where_its_place_is_asked_for():
    found = probe(Begins(), {})

    assert found.call.arguments == {"start_pos": 0}
    assert found.limit == 12


def test_a_misspelt_keyword_is_not_taken_for_a_config():
    with pytest.raises(ValueError, match=r"Plain takes no 'widht'\. Did you mean `width`"):
        find_constructor(Plain, sys.modules[__name__], {"widht": 5})
