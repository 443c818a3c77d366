"""What `hfgpt check` finds of losses, training and tools: nothing in a right model, one thing in each broken one."""

import pytest
from broken_training import BROKEN, ForgetfulConfig

import hfgpt
from hfgpt.check import check
from hfgpt.check.promise import PROMISES
from hfgpt.check.promises import adapters, export, loss, processes, tools, trainer, training
from hfgpt.check.subject import Subject

FILES = {each.__name__ for each in (adapters, export, loss, processes, tools, trainer, training)}
ALL = [name for name, promise in PROMISES.items() if promise.find.__module__ in FILES]
SECONDS_LONG = {
    "tensor-parallel-is-one-process",
    "fsdp-is-one-process",
    "onnx-takes-any-size",
    "export-takes-any-size",
    "compiled-step-is-one-graph",
    "compiled-gradients-are-eager",
}
QUICK = [name for name in ALL if name not in SECONDS_LONG]
COPIES = [
    pytest.param(name, copy, marks=[pytest.mark.slow] if name in SECONDS_LONG else [])
    for name, copies in BROKEN.items()
    for copy in copies
]
TRANSFORMERS_OWN = ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "NanoChatForCausalLM"]

pytestmark = [
    # PEFT 0.21 and torch.compile read transformers' old names.
    pytest.mark.filterwarnings(r"ignore:.(is_)?gradient_checkpointing\w*. is deprecated:FutureWarning"),
]


@pytest.fixture
def config():
    return hfgpt.HFGPTConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )


@pytest.mark.parametrize(("broken", "copy"), COPIES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_copy_is_caught_by_the_promise_that_it_breaks_and_no_other(config, broken, copy):
    report = check(Subject("a broken copy", copy, config), only=[*QUICK, broken])

    assert report.failed() == [broken]


def test_label_smoothing_on_unshifted_labels_is_caught(config, monkeypatch):
    from transformers import trainer

    monkeypatch.delitem(trainer.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "hfgpt")

    report = check(Subject("a class not in the table", hfgpt.HFGPTForCausalLM, config), only=QUICK)

    assert report.failed() == ["label-smoothing-scores-the-next-token"]


def test_a_config_that_loses_a_field_is_caught(config):
    forgetful = ForgetfulConfig(**{**config.to_dict(), "layer_norm_epsilon": 1e-3})

    report = check(Subject("a forgetful config", hfgpt.HFGPTForCausalLM, forgetful), only=["config-keeps-every-field"])

    assert report.failed() == ["config-keeps-every-field"]
    assert "layer_norm_epsilon" in report.results[0].finding.detail


def test_a_model_without_a_loss_is_told_so_once(config):
    class Silent(hfgpt.HFGPTForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids, attention_mask, use_cache=use_cache)

    names = ["loss-is-next-token", "loss-ignores-minus-100", "loss-honours-num-items", "accumulation-is-one-batch"]
    report = check(Subject("no loss", Silent, config), only=names)

    assert report.failed() == ["loss-is-next-token"]
    assert {result.finding.status for result in report.results} == {"fail", "n/a"}


@pytest.mark.parametrize("name", ["hfgpt:HFGPTForCausalLM", *(f"transformers:{each}" for each in TRANSFORMERS_OWN)])
def test_known_models_keep_what_they_promise_or_fail_by_a_named_fault(name):
    report = check(name, only=QUICK)

    assert [result.promise.name for result in report.results if result.is_failed and not result.known_fault] == []


def test_gpt2s_loss_in_trainer_is_a_known_fault():
    report = check("transformers:GPT2LMHeadModel", only=["trainer-is-a-plain-loop"])

    assert report.results[0].known_fault
    assert 0.9 < float(report.results[0].finding.detail.split(" times")[0].split()[-1]) < 1


def test_a_pipeline_writes_with_a_tokenizer_that_came_with_the_model(config, tokenizer):
    subject = Subject("with a tokenizer", hfgpt.HFGPTForCausalLM, config, tokenizer=tokenizer)

    report = check(subject, only=["a-pipeline-writes-what-generate-writes"])

    assert report.results[0].finding.status == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hfgpt:HFGPTForCausalLM", "transformers:GPT2LMHeadModel"])
def test_known_models_compile_export_and_run_on_two_processes_as_they_promise(name):
    report = check(name, only=sorted(SECONDS_LONG))

    assert [result.promise.name for result in report.results if result.is_failed and not result.known_fault] == []
