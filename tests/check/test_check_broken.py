import pytest
from broken import BROKEN, make_subject

from hfgpt import HFGPTForCausalLM
from hfgpt.check import check
from hfgpt.check.run import choose_promises

TRIED = [
    each.name
    for each in choose_promises(["loading", "masks", "cache", "generation", "attention"])
    if not each.name.startswith("code-beside-the-weights")  # it would run the code of the class that is not broken
]


@pytest.mark.parametrize("model_class", BROKEN)
def test_a_trap_is_caught_by_the_promise_meant_for_it(model_class):
    meant = BROKEN[model_class][0]

    broken, whole = (check(make_subject(each), only=[meant]) for each in (model_class, HFGPTForCausalLM))

    assert broken.failed() == [meant]
    assert whole.is_passed


@pytest.mark.slow
@pytest.mark.parametrize("model_class", BROKEN)
def test_a_trap_breaks_no_promise_but_those_that_follow(model_class):
    assert set(check(make_subject(model_class), only=TRIED).failed()) == set(BROKEN[model_class])


def test_a_model_that_raises_breaks_its_promise_with_the_error_in_one_line():
    class Raises(HFGPTForCausalLM):
        def forward(self, *args, **kwargs):
            raise KeyError("no such thing\nand more")

    (result,) = check(make_subject(Raises), only=["the-same-input-gives-the-same-bits"]).results

    assert result.is_failed
    assert result.finding.measured == "KeyError"
    assert "no such thing" in result.finding.detail
    assert "\n" not in result.finding.detail
