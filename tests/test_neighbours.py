"""hfgpt in other people's libraries: what they make of it is what they make of transformers' GPT-2."""

import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline
from transformers.data.data_collator import DataCollatorForLanguageModeling

import hfgpt

pytestmark = [
    # PEFT 0.21 and TRL 1.16 still use transformers' old names.
    pytest.mark.filterwarnings(r"ignore:.(is_)?gradient_checkpointing\w*. is deprecated:FutureWarning"),
    # What PEFT says of its own LNTuning, whose layers are LayerNorms, and of `generate` with its prompt tuning.
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient:UserWarning"),
]

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture
def ids():
    return torch.randint(1, 320, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_twins):
    return make_twins(**NO_DROPOUT)[1]


@pytest.fixture
def twins(make_twins):
    """GPT-2 and hfgpt with the same weights."""
    gpt2, model = make_twins(**NO_DROPOUT)
    # Trainer counts targets right only where it finds this; GPT2LMHeadModel has None, and here a loss 4 % too small.
    gpt2.loss_type = "ForCausalLM"
    return gpt2, model


@pytest.fixture
def padding_tokenizer(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    yield tokenizer
    tokenizer.pad_token = None


def settings(folder, **changes):
    """What a `TrainingArguments` of any trainer needs for three quiet steps on the CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,  # TRL's default is otherwise
        "seed": 0,
        **changes,
    }


def losses(trainer):
    """The loss of each step."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def learn(model, ids, labels=None, steps=3):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_finds_its_layers_by_itself_and_trains_nothing_else(model, ids):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    learn(adapted, ids)

    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "v_proj"}
    assert len(trained) == 2 * 2 * 2  # blocks, layers, factors
    restored = adapted.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "method", ["IA3Config", "LoHaConfig", "LoKrConfig", "LNTuningConfig", "VeraConfig", "AdaLoraConfig", "OFTConfig"]
)
def test_other_ways_to_adapt_find_their_layers_too(model, ids, method):
    needed = {"AdaLoraConfig": {"total_step": 10}, "OFTConfig": {"oft_block_size": 8, "r": 0}}
    expected = model(ids).logits

    adapted = get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **needed.get(method, {}))).eval()

    assert 0 < sum(each.numel() for each in adapted.parameters() if each.requires_grad) < model.num_parameters() / 4
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)  # an adapter starts as no change


def test_a_lora_adapter_is_saved_loaded_and_merged(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "base")
    model = hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path / "base")
    plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    expected = adapted(ids).logits

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()

    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(loaded(ids).logits, expected)
    assert type(merged) is hfgpt.HFGPTForCausalLM
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_lora_learns_what_it_learns_in_gpt2(twins, ids):
    """GPT-2 holds q, k and v in one matrix, so only layers that both have alike are adapted."""
    gpt2, model = twins
    for each, layers in ((gpt2, ["mlp.c_fc"]), (model, ["up_proj"])):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=layers, fan_in_fan_out=each is gpt2)
        learn(get_peft_model(each, config), ids)

    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=0, atol=1e-4)


def test_a_tied_embedding_is_adapted_at_both_its_places(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "base")
    model = hfgpt.HFGPTForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted = get_peft_model(model, config)
    learn(adapted, ids)
    expected = adapted.eval()(ids).logits

    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    assert torch.equal(loaded(ids).logits, expected)


def test_prompt_tuning_learns_a_prefix(model, ids):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapted = get_peft_model(model, config)
    before = adapted(input_ids=ids, labels=ids).loss

    learn(adapted, ids, steps=20)

    assert adapted(input_ids=ids, labels=ids).loss < before
    assert adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (3, 24)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "TOKEN_CLS"])
def test_prefix_tuning_learns_keys_and_values_to_go_before_the_text(model, ids, task_type):
    if task_type == "TOKEN_CLS":
        model, labels = hfgpt.HFGPTForTokenClassification(model.config), ids % 2
    else:
        labels = ids
    adapted = get_peft_model(model, peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=4))
    before = adapted(input_ids=ids, labels=labels).loss

    learn(adapted, ids, labels, steps=20)

    assert adapted(input_ids=ids, labels=labels).loss < before


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns_what_it_learns_in_gpt2(twins, padding_tokenizer, lines, tmp_path, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trained = []
    for each in twins:
        config = SFTConfig(**settings(tmp_path), max_length=32, packing=packing, packing_strategy="wrapped")
        dataset = Dataset.from_dict({"text": lines[:40]})
        trainer = SFTTrainer(each, config, train_dataset=dataset, processing_class=padding_tokenizer)
        trained.append(losses(trainer))

    assert len(trained[1]) == 3
    assert trained[1] == pytest.approx(trained[0], rel=1e-5)


def test_documents_that_trl_packs_into_one_row_do_not_see_each_other(model, padding_tokenizer, lines, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [line for line in lines if len(line) > 20][:6]
    changes = {"max_steps": 1, "per_device_train_batch_size": 64}
    config = SFTConfig(**settings(tmp_path, **changes), max_length=64, packing=True, packing_strategy="bfd")
    dataset = Dataset.from_dict({"text": texts})
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=padding_tokenizer)
    documents = [torch.tensor([padding_tokenizer(text + "<|endoftext|>")["input_ids"]]) for text in texts]
    targets = [document.shape[1] - 1 for document in documents]
    alone = [model(document, labels=document).loss.item() for document in documents]

    [packed] = losses(trainer)

    assert len(trainer.train_dataset) < len(texts)
    mean = sum(loss * count for loss, count in zip(alone, targets, strict=True)) / sum(targets)
    assert packed == pytest.approx(mean, rel=1e-6)


def test_dpo_trainer_learns_what_it_learns_in_gpt2(twins, padding_tokenizer, lines, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = {"prompt": lines[:8], "chosen": lines[8:16], "rejected": lines[16:24]}
    trained = []
    for each in twins:
        each.save_pretrained(tmp_path / type(each).__name__)  # the reference model is read from here
        each = type(each).from_pretrained(tmp_path / type(each).__name__)
        config = DPOConfig(**settings(tmp_path), max_length=48)
        trainer = DPOTrainer(
            each, args=config, train_dataset=Dataset.from_dict(rows), processing_class=padding_tokenizer
        )
        trained.append(losses(trainer))

    assert len(trained[1]) == 3
    assert trained[1] == pytest.approx(trained[0], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_label_smoothing_learns_what_it_learns_in_gpt2(
    twins, padding_tokenizer, lines, tmp_path, smoothing
):
    rows = [padding_tokenizer(line, truncation=True, max_length=32) for line in lines[:12]]
    trained = []
    for each in twins:
        arguments = TrainingArguments(**settings(tmp_path), label_smoothing_factor=smoothing)
        collate = DataCollatorForLanguageModeling(padding_tokenizer, mlm=False)
        trained.append(losses(Trainer(each, arguments, train_dataset=rows, data_collator=collate)))

    assert len(trained[1]) == 3
    assert trained[1] == pytest.approx(trained[0], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_text_generation_pipeline_writes_what_generate_does(model, padding_tokenizer, lines, tmp_path, batch_size):
    model.save_pretrained(tmp_path)
    padding_tokenizer.save_pretrained(tmp_path)
    prompts = [lines[0], lines[3], lines[2][:20]]

    write = pipeline("text-generation", model=str(tmp_path), batch_size=batch_size)
    write.tokenizer.padding_side = "left"
    texts = write(prompts, max_new_tokens=8, do_sample=False)

    for prompt, [text] in zip(prompts, texts, strict=True):
        written = model.generate(**padding_tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert text["generated_text"] == padding_tokenizer.decode(written[0], skip_special_tokens=True)


def test_lm_eval_harness_scores_a_local_task_as_by_hand(model, padding_tokenizer, lines, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    texts = [line for line in lines if len(line) > 40][:4]
    rows = [{"question": line[:15], "choices": [line[15:25], line[25:35]], "answer": 0, "text": line} for line in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    for name, task in {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }.items():
        settings = {"task": name, **common, "test_split": "test", **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML

    evaluated = simple_evaluate(
        HFLM(pretrained=model, tokenizer=padding_tokenizer, batch_size=2, device="cpu"),
        tasks=["choose", "read"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=False,
        bootstrap_iters=0,
    )["results"]

    def score(prefix, text):
        """Sum of the log-probabilities of the tokens of `text` after `prefix`."""
        ids = torch.tensor([prefix + text])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
        return log_probabilities[-len(text) :].sum().item()

    def encode(text):
        return padding_tokenizer(text)["input_ids"]

    right = 0
    for row in rows:
        scores = [
            score(encode(row["question"]), encode(row["question"] + choice)[len(encode(row["question"])) :])
            for choice in row["choices"]
        ]
        right += scores[0] > scores[1]
    assert evaluated["choose"]["acc,none"] == right / len(rows)
    nats = -sum(score([padding_tokenizer.eos_token_id], encode(text)) for text in texts)
    per_byte = nats / sum(len(text.encode()) for text in texts)
    assert evaluated["read"]["byte_perplexity,none"] == pytest.approx(torch.tensor(per_byte).exp().item(), rel=1e-5)
