"""What `hfgpt check` asks of any causal language model, asked of hfgpt's, with and without tied embeddings."""

import pytest

import hfgpt
from hfgpt.check.resolve import resolve
from hfgpt.check.run import choose_promises, try_promise
from hfgpt.check.subject import Subject

GROUPS = ["loading", "masks", "cache", "generation", "attention"]
SLOW = "code-beside-the-weights-runs-alone-and-only-if-trusted"  # test_remote_code.py has a process for all classes
NEEDS_A_FOLDER = "the-folders-own-weights-are-loaded-whole"


@pytest.fixture(scope="module")
def subjects():
    tied = resolve("hfgpt:HFGPTForCausalLM")
    values = {**tied.config.to_dict(), "tie_word_embeddings": False}
    return {True: tied, False: Subject("untied", tied.model_class, hfgpt.HFGPTConfig.from_dict(values))}


@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(each, marks=[pytest.mark.slow] if each.name == SLOW else [], id=each.name)
        for each in choose_promises(GROUPS)
        if each.name != NEEDS_A_FOLDER
    ],
)
def test_hfgpt_keeps_the_promise(subjects, promise):
    finding = try_promise(promise, subjects[True]).finding

    assert finding.status == "pass", finding


@pytest.mark.parametrize(
    "promise",
    [each for each in choose_promises(["loading"]) if each.name != SLOW],
    ids=lambda promise: promise.name,
)
def test_hfgpt_keeps_the_promise_without_tied_embeddings(subjects, promise):
    assert try_promise(promise, subjects[False]).finding.status in ("pass", "n/a")
