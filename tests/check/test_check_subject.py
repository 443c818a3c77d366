import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.check import check
from hfgpt.check.known_faults import KNOWN_FAULTS
from hfgpt.check.promise import PROMISES
from hfgpt.check.resolve import resolve
from hfgpt.check.subject import Subject, shrink
from hfgpt.cli import app

OWN_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

print("the code ran")

class MineConfig(PreTrainedConfig):
    model_type = "mine_of_a_test"

    def __init__(self, d_model=64, n_vocab=500, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.n_vocab, self.vocab_size = d_model, n_vocab, n_vocab

class Mine(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.n_vocab, config.d_model)
        self.head = nn.Linear(config.d_model, config.n_vocab)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))
"""
AUTO_MAP = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}


@pytest.fixture
def folder(tmp_path):
    """A folder with code of its own, of a model type that transformers does not know."""
    (tmp_path / "mine.py").write_text(OWN_CODE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine_of_a_test", "auto_map": AUTO_MAP}))
    return tmp_path


@pytest.mark.parametrize(
    ("what", "size"),
    [("transformers:GPT2LMHeadModel", 12), ("transformers:Qwen3ForCausalLM", 32), ("hfgpt:HFGPTForCausalLM", 12)],
)
def test_a_class_is_built_small(what, size):
    subject = resolve(what)

    assert subject.is_small
    assert subject.make().num_parameters() < 50_000
    assert subject.model_class.config_class().num_hidden_layers >= size


def test_heads_that_share_their_keys_go_on_doing_so():
    shared, own = (
        shrink(LlamaForCausalLM, LlamaConfig(num_attention_heads=32, num_key_value_heads=heads))[0] for heads in (8, 32)
    )

    assert (shared.num_attention_heads, shared.num_key_value_heads) == (4, 2)
    assert (own.num_attention_heads, own.num_key_value_heads) == (4, 4)


def test_no_parameter_of_a_made_model_is_constant():
    for parameter in resolve("transformers:GPT2LMHeadModel").make().parameters():
        assert parameter.std() > 0.05


def test_a_seed_makes_the_same_model_and_leaves_the_random_state_alone():
    subject = resolve("hfgpt:HFGPTForCausalLM")
    before = torch.get_rng_state()

    first, second, other = subject.make(), subject.make(), subject.make(seed=1)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_folder_is_checked_with_its_own_weights(tmp_path):
    HFGPTForCausalLM(HFGPTConfig(n_embd=16, n_head=2, n_layer=1, vocab_size=50)).save_pretrained(tmp_path)
    name = "the-folders-own-weights-are-loaded-whole"

    (result,) = check(str(tmp_path), only=[name]).results

    assert result.finding.status == "pass"
    assert "of 20 tensors" in result.finding.detail


def test_weights_that_do_not_belong_to_their_config_are_found(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=50)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 1}))

    report = check(str(tmp_path), only=["the-folders-own-weights-are-loaded-whole"])

    assert not report.is_passed
    assert "left over transformer.h.1" in report.results[0].finding.detail


def hfgpt_check(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)])


def test_code_in_a_folder_is_not_run_unless_it_is_trusted(folder, capfd):
    done = hfgpt_check(folder)

    assert isinstance(done.exception, ValueError)
    assert str(done.exception).endswith("Add --trust-remote-code if you trust it.")
    assert "the code ran" not in done.output + capfd.readouterr().out


def test_trusted_code_is_checked_and_a_broken_promise_is_explained(folder, tmp_path):
    words = ["--trust-remote-code", "--only", "the-class-can-generate,changing-a-token-leaves-earlier-logits"]

    done = hfgpt_check(folder, *words, "--markdown", tmp_path / "report.md")
    found = json.loads(hfgpt_check(folder, *words, "--json").stdout)

    assert done.exit_code == 1
    assert "usual causes: The class does not inherit from transformers'" in done.stdout
    assert "| the-class-can-generate | ✘ fail |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert [each["status"] for each in found["promises"]] == ["pass", "fail"]
    assert found["parameters"] < 20_000


def test_a_model_that_keeps_what_was_asked_ends_with_exit_code_0():
    assert hfgpt_check("hfgpt:HFGPTForCausalLM", "--only", "the-class-can-generate").exit_code == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no/such/folder.py", "is no folder of a model"),
        ("no_such_module:GPT", "there is no module 'no_such_module'"),
        ("transformers:NoSuchModel", "has no class NoSuchModel"),
        ("transformers:GPT2Tokenizer", "derived from PreTrainedModel"),
        ("transformers:BertModel", "no logits"),
    ],
)
def test_what_is_no_language_model_is_refused_in_one_line(what, message):
    with pytest.raises(ValueError, match=message):
        resolve(what)


def test_a_misspelt_promise_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean `left-padding-changes-nothing`"):
        check("hfgpt:HFGPTForCausalLM", only=["left-padding-changes-noting"])


def test_every_known_fault_names_a_promise_and_links_to_where_it_is_discussed():
    for (_, name), fault in KNOWN_FAULTS.items():
        assert name in PROMISES
        assert fault.link.startswith("https://github.com/")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "NanoChatForCausalLM", "OPTForCausalLM"]
)
def test_transformers_own_models_break_a_promise_only_where_a_fault_is_known(name):
    report = check(f"transformers:{name}", only=["loading", "masks", "cache", "generation", "attention"])

    assert [each.promise.name for each in report.results if each.is_failed and each.known_fault is None] == []


@pytest.fixture
def no_time(monkeypatch):
    """A machine so slow that the time is over before the first promise."""
    monkeypatch.setattr("hfgpt.check.run.TIME_LIMIT_SECONDS", -1)


def test_a_slow_machine_is_not_told_that_its_model_is_broken(no_time, tmp_path):
    names = "the-class-can-generate,the-same-input-gives-the-same-bits"

    done = hfgpt_check("hfgpt:HFGPTForCausalLM", "--only", names, "--markdown", tmp_path / "report.md")

    assert done.exit_code == 0
    assert "0 promises kept, 0 broken, 0 not applicable, 2 not tried" in done.stdout
    assert done.stdout.rstrip().endswith(f"To try them: --only {names}")
    assert f"--only {names}" in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[-1]


def test_a_process_that_does_not_end_in_time_is_no_broken_promise(monkeypatch, folder):
    monkeypatch.setattr("hfgpt.check.alone.LIMIT_SECONDS", 0.01)
    name = "code-beside-the-weights-runs-alone-and-only-if-trusted"

    report = check(str(folder), only=[name], trust_remote_code=True)

    assert (report.failed(), report.not_tried()) == ([], [name])
    assert report.is_passed
    assert "not done after" in report.results[0].finding.detail


def test_nothing_is_said_during_a_check_but_its_report(capfd, folder):
    (folder / "mine.py").write_text(OWN_CODE.replace("self.post_init()", "self.post_init(); print('I am built')"))
    names = ["trainer-is-a-plain-loop", "blocks-stay-on-one-device", "loading-accounts-for-every-tensor"]

    check("hfgpt:HFGPTForCausalLM", only=names)
    check(str(folder), only=names, trust_remote_code=True)

    assert capfd.readouterr() == ("", "")


class AnotherClass(HFGPTForCausalLM):
    """It has the config of a class that AutoModelForCausalLM knows."""


def test_a_class_that_the_auto_class_takes_for_another_is_found():
    subject = Subject("another", AnotherClass, resolve("hfgpt:HFGPTForCausalLM").config, auto_model=True)

    (result,) = check(subject, only=["the-auto-class-loads-what-was-saved"]).results

    assert (result.finding.measured, result.finding.bound) == ("HFGPTForCausalLM", "AnotherClass")
