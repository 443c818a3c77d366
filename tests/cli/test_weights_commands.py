"""Verify by command: what is printed and refused."""

import json

import pytest
from commands import hfgpt


def test_verify_passes_a_trained_model(world):
    printed, as_json = hfgpt("verify", "out/accelerate"), hfgpt("verify", "out/accelerate", "--json")

    assert (printed.code, printed.err, as_json.code, as_json.err) == (0, "", 0, "")
    assert printed.out.endswith("passed: the same model\n")
    assert "max |Δlogit|" in printed.out
    result = json.loads(as_json.out)
    assert set(result) >= {
        "max_abs_diff",
        "max_rel_diff",
        "argmax_agreement",
        "loss_diff",
        "greedy_equal",
        "passed",
    }
    assert result["passed"] is True


def test_verify_exits_with_1_when_the_models_differ(world, monkeypatch):
    from hfgpt.evaluation import verify_gpt2

    right = verify_gpt2.to_gpt2

    def disturbed(model):
        gpt2 = right(model)
        gpt2.transformer.ln_f.bias.data += 1e-3
        return gpt2

    monkeypatch.setattr(verify_gpt2, "to_gpt2", disturbed)

    printed, as_json = hfgpt("verify", "out/accelerate"), hfgpt("verify", "out/accelerate", "--json")

    assert (printed.code, as_json.code) == (1, 1)
    assert printed.out.endswith("FAILED: outside the bounds\n")
    assert json.loads(as_json.out)["passed"] is False


BAD_INPUT = [
    ("verify notes", "notes is no model folder", "config.json"),
    ("verify", "give a model or `--random SIZE`"),
    ("verify small --random small", "give a model or `--random SIZE`"),
    ("verify small --layers 1", "`--layers` has no effect", "`--random`"),
    ("verify --random tiny", "`--random`", "'tiny'", "one of ['small', 'medium', 'large', 'xl']"),
    ("verify --random small --layers 13", "`--layers`", "13", "between 1 and 12"),
]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: ascii(case[0]))
def test_bad_input_gets_one_clear_line_and_leaves_everything_as_it_was(refuse, case):
    refuse(*case)
