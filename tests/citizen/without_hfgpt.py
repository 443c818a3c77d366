"""What a process without hfgpt does for test_remote_code.py: it knows the classes from the files beside the weights."""

import sys
import tempfile
from pathlib import Path


class NoHFGPT:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfgpt":
            raise ImportError(name)


sys.meta_path.insert(0, NoHFGPT())

import torch  # noqa: E402
import transformers  # noqa: E402
from peft.utils import constants as peft_tables  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments  # noqa: E402

AUTO_CLASSES = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
]


def load(folder, auto_class):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def scores(output):
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits if "logits" in output else output.last_hidden_state


torch.set_num_threads(1)
folder = Path(sys.argv[1])
given = torch.load(folder / "given.pt")
ids = given["ids"]
said = {}
for auto_class in AUTO_CLASSES:
    model = load(folder / auto_class, auto_class)
    said[auto_class] = scores(model(ids)).detach()
    model.save_pretrained(folder / f"{auto_class}_again")
    said[f"{auto_class}_again"] = scores(load(folder / f"{auto_class}_again", auto_class)(ids)).detach()

model = load(folder / "AutoModelForCausalLM", "AutoModelForCausalLM")
said["text"] = model.generate(ids, max_new_tokens=24, do_sample=False)
said["text without cache"] = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False)
model.set_attn_implementation("eager")
assert torch.allclose(model(ids).logits, said["AutoModelForCausalLM"], rtol=0, atol=1e-5)

said["arguments"] = {
    "output_dir": tempfile.mkdtemp(),
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}
for smoothing in (0.0, 0.1):
    model = load(folder / "AutoModelForCausalLM", "AutoModelForCausalLM")
    trainer = Trainer(
        model,
        TrainingArguments(**said["arguments"], label_smoothing_factor=smoothing),
        train_dataset=given["rows"],
    )
    if smoothing:
        batch = torch.tensor([row["input_ids"] for row in given["rows"][:2]])
        said["smoothed loss"] = trainer.compute_loss(model.eval(), {"input_ids": batch, "labels": batch}).detach()
    trainer.train()
    said[f"trained with {smoothing}"] = dict(model.state_dict())

assert peft_tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["hfgpt"] == ["q_proj", "v_proj"]

gpt2 = Path(tempfile.mkdtemp())
GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11)).save_pretrained(gpt2)
try:
    type(model).from_pretrained(gpt2)
except ValueError as error:
    said["refusal"] = str(error)
torch.save(said, folder / "said by its files.pt")
