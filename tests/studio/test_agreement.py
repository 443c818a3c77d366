import math

import pytest
import torch

from hfgpt.studio.agreement import LOOSE, TIGHT, check_same, difference

GRADIENTS = {"loss": torch.tensor(2.0), "a": torch.full((100,), 3.0), "b": torch.full((4,), 1e-9)}


def changed(**tensors):
    return {**GRADIENTS, **tensors}


def test_equal_results_do_not_differ():
    assert difference(changed(), GRADIENTS) == (0.0, "loss")


def test_rounding_of_a_gradient_that_is_zero_counts_for_nothing():
    found, _ = difference(changed(b=-GRADIENTS["b"]), GRADIENTS)

    assert found < TIGHT


@pytest.mark.parametrize(
    ("tensors", "where"),
    [
        ({"loss": torch.tensor(2.1)}, "loss"),
        ({"a": torch.full((100,), 3.1)}, "a"),
        ({"b": torch.full((4,), 0.1)}, "b"),
        ({"a": torch.full((50,), 3.0)}, "a"),
        ({"a": torch.full((100,), math.nan)}, "a"),
        ({"loss": torch.tensor(math.inf)}, "loss"),
    ],
)
def test_another_result_is_found_and_named(tensors, where):
    with pytest.raises(ValueError, match=f"A and B do not compute the same: {where} differs"):
        check_same(changed(**tensors), GRADIENTS, ("A", "B"), TIGHT)


def test_gradients_of_zero_are_never_taken_for_rounding():
    zeros = {name: torch.zeros_like(each) for name, each in GRADIENTS.items()}

    with pytest.raises(ValueError, match="do not compute the same"):
        check_same({**zeros, "loss": GRADIENTS["loss"]}, GRADIENTS, ("compiled", "eager"), LOOSE)


def test_a_result_that_lacks_something_is_another():
    found, where = difference({"loss": torch.tensor(2.0), "b": torch.zeros(4)}, GRADIENTS)

    assert (found, where) == (math.inf, "a")


@pytest.mark.parametrize("allowed", [0.0, TIGHT, LOOSE])
def test_ids_are_equal_or_they_are_not(allowed):
    ids = torch.arange(10)

    assert check_same({"ids": ids.int()}, {"ids": ids}, ("A", "B"), allowed) == 0
    with pytest.raises(ValueError, match="ids differs"):
        check_same({"ids": ids.roll(1)}, {"ids": ids}, ("A", "B"), allowed)
