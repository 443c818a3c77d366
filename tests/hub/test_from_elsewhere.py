"""transformers' own ways to the Hub and from there: `from_pretrained`, `push_to_hub`, Trainer."""

import os
import subprocess
import sys

import pytest
import torch
from hub_client import OTHER_TOKEN, TOKEN, environment
from hub_models import SENT, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hfgpt import HFGPTForCausalLM
from hfgpt.hub.pull import pull
from hfgpt.hub.push import push
from hfgpt.hub.trainer_mixin import PushByList

# Trainer turns the client's progress bars off while it pushes and then on, though the environment says off.
pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
ROWS = [{"input_ids": list(range(start, start + 20)), "labels": list(range(start, start + 20))} for start in range(8)]

PROGRAM = """
import sys

class NoHFGPT:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfgpt":
            raise ImportError(name)

sys.meta_path.insert(0, NoHFGPT())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

said = {}
for revision in ("v1", "wide"):
    model = AutoModelForCausalLM.from_pretrained("anna/demo", trust_remote_code=True, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained("anna/demo", revision=revision)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    said[revision] = {"ids": ids, "logits": model(ids).logits.detach(), "state": model.state_dict()}
    said[revision]["text"] = model.generate(ids, max_new_tokens=8, do_sample=False)
torch.save(said, sys.argv[1])
"""


def test_a_process_without_hfgpt_loads_each_revision_bit_for_bit(hub, run, tmp_path):
    push(run, "anna/demo", private=True, tag="v1")
    wide = tmp_path / "wide"
    save_model(wide, seed=1)
    push(wide, "anna/demo", revision="wide")

    done = subprocess.run(
        [sys.executable, "-I", "-W", "error::UserWarning", "-c", PROGRAM, tmp_path / "said.pt"],
        env=os.environ | environment(hub, tmp_path / "fresh home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = torch.load(tmp_path / "said.pt")

    for revision, folder in (("v1", run), ("wide", wide)):
        model, there = HFGPTForCausalLM.from_pretrained(folder), said[revision]
        assert all(torch.equal(tensor, there["state"][name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(there["ids"]).logits, there["logits"])
        assert torch.equal(model.generate(there["ids"], max_new_tokens=8, do_sample=False), there["text"])
    assert not torch.equal(said["v1"]["logits"], said["wide"]["logits"])


def test_where_hfgpt_is_installed_no_code_is_trusted(hub, run):
    push(run, "anna/demo")

    model = AutoModelForCausalLM.from_pretrained("anna/demo")

    assert type(model) is HFGPTForCausalLM
    assert AutoTokenizer.from_pretrained("anna/demo")("the fox").input_ids
    assert not [seen for seen in hub.seen if seen.method != "POST" and seen.path.endswith(".py")]


def test_a_private_model_is_seen_by_its_owner_only(hub, run):
    push(run, "anna/demo", private=True)

    assert AutoModelForCausalLM.from_pretrained("anna/demo", token=TOKEN)
    with pytest.raises(OSError, match="anna/demo"):
        AutoModelForCausalLM.from_pretrained("anna/demo", token=OTHER_TOKEN, cache_dir=run / "other cache")


@pytest.mark.parametrize("options", [{}, {"revision": "wide"}, {"create_pr": True}, {"private": True}])
def test_a_model_and_its_tokenizer_push_themselves(hub, run, tmp_path, options):
    model, tokenizer = HFGPTForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    hub.put("anna/demo", "initial commit", {})

    model.push_to_hub("anna/demo", tags=["from-scratch"], **options)
    if "create_pr" not in options:
        tokenizer.push_to_hub("anna/demo", **options)

    revision = "refs/pr/1" if "create_pr" in options else options.get("revision", "main")
    pull("anna/demo", tmp_path / "copy", revision=revision)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "copy").iterdir()} - SENT <= {".gitattributes", ".pulled.json"}
    if "revision" not in options:  # transformers writes the tokenizer's card by that of main, which has none
        assert "from-scratch" in (tmp_path / "copy" / "README.md").read_text()
    if "create_pr" not in options:
        copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
        assert copy("the quick fox").input_ids == tokenizer("the quick fox").input_ids


class ListedTrainer(PushByList, Trainer):
    """As the README says it."""


def make_trainer(trainer_class, run, folder, **options):
    model, tokenizer = HFGPTForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    arguments = TrainingArguments(
        output_dir=str(folder),
        push_to_hub=True,
        hub_model_id="anna/trained",
        hub_token=TOKEN,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return trainer_class(
        model, arguments, train_dataset=ROWS, processing_class=tokenizer, data_collator=default_data_collator
    )


def test_trainer_itself_sends_the_token(hub, run, tmp_path):
    """Why there is `PushByList`. Should this fail one day, that may go."""
    make_trainer(Trainer, run, tmp_path / "trained", hub_strategy="end").push_to_hub()

    assert TOKEN.encode() in hub.files("anna/trained")["training_args.bin"]


def test_trainer_pushes_by_the_list_while_it_trains_and_when_it_is_done(hub, run, tmp_path):
    hub.fail("commit", "status", 1, value=503)
    hub.fail("create", "drop", 1)
    trainer = make_trainer(ListedTrainer, run, tmp_path / "trained", hub_strategy="every_save", hub_private_repo=True)

    trainer.train()
    pushed = trainer.push_to_hub(commit_message="Done")

    assert hub.titles("anna/trained") == [
        "Done",
        "Training in progress, step 2",
        "Training in progress, step 1",
        "initial commit",
    ]
    assert pushed.is_new
    assert hub.repos["anna/trained"].private
    assert (tmp_path / "trained" / "training_args.bin").is_file()
    assert (tmp_path / "trained" / "checkpoint-2" / "optimizer.pt").is_file()
    for commit in hub.repos["anna/trained"].commits():
        assert commit.files.keys() <= SENT | {".gitattributes"}
    assert (
        b"anna/trained" in hub.files("anna/trained")["README.md"]
        or b"trained" in hub.files("anna/trained")["README.md"]
    )
    loaded = HFGPTForCausalLM.from_pretrained("anna/trained")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_trainer_may_push_in_the_background(hub, run, tmp_path):
    trainer = make_trainer(ListedTrainer, run, tmp_path / "trained", hub_strategy="end", hub_revision="next")

    pushed = trainer.push_to_hub(blocking=False).result(timeout=60)

    assert hub.repos["anna/trained"].find("next").oid == pushed.commit


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_strategy_that_sends_optimizer_states_is_refused_at_once(hub, run, tmp_path, strategy):
    with pytest.raises(ValueError, match="sends checkpoints with optimizer states, which never leave"):
        make_trainer(ListedTrainer, run, tmp_path / "trained", hub_strategy=strategy)

    assert hub.seen == []


@pytest.mark.hub
def test_the_real_hub_takes_and_gives_it_back(run, tmp_path):
    """Needs HF_TOKEN, of a token that may write, and HFGPT_TEST_REPO, a repository to push to; HF_HUB_OFFLINE=0."""
    repo_id = os.environ["HFGPT_TEST_REPO"]

    pushed = push(run, repo_id, private=True)
    pull(repo_id, tmp_path / "copy", revision=pushed.commit)

    for name in SENT:
        assert (tmp_path / "copy" / name).read_bytes() == (run / name).read_bytes()
