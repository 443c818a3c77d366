"""The keys of a recipe, and the nearest of them to a word that is none, also to a word of another program.

Imports no library: the shell's completion reads the keys, and a wrong one is answered before torch is imported.
"""

import ast
import difflib
import functools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hfgpt.config.schema import DROPOUT_FIELDS, NANOCHAT_FIELDS, TOKENIZER_FIELDS, RunConfig

Spelling = Callable[[str, Any], str]
"""How a key and its value are written: `as_override`, `as_item` or `as_yaml`."""

ELSEWHERE = {
    **dict.fromkeys("lr max_lr peak_lr lrate step_size".split(), "optim.learning_rate"),
    **dict.fromkeys("max_iters iters num_iters num_iterations iterations steps num_steps".split(), "train.max_steps"),
    **dict.fromkeys("n_steps train_steps num_training_steps total_steps".split(), "train.max_steps"),
    **dict.fromkeys("num_train_epochs num_epochs n_epochs max_epochs epoch".split(), "train.epochs"),
    **dict.fromkeys("per_device_train_batch_size micro_batch_size bs batch".split(), "train.batch_size"),
    **dict.fromkeys("train_batch_size mini_batch_size device_batch_size".split(), "train.batch_size"),
    **dict.fromkeys(
        "grad_accum grad_accum_steps accumulate_grad_batches accumulation_steps gradient_accumulation".split(),
        "train.gradient_accumulation_steps",
    ),
    **dict.fromkeys(
        "context_length context_size ctx_len context seq_len max_seq_length max_seq_len sequence_length".split(),
        "data.block_size model.n_positions",
    ),
    **dict.fromkeys("n_layers num_layers layers depth num_blocks".split(), "model.n_layer"),
    **dict.fromkeys("n_heads num_heads heads".split(), "model.n_head"),
    **dict.fromkeys("emb_dim embed_dim d_model width dim n_embed emb_size embedding_dim".split(), "model.n_embd"),
    **dict.fromkeys("d_ff ffn_dim intermediate_dim".split(), "model.intermediate_size"),
    **dict.fromkeys("tie_weights tie_embeddings weight_tying".split(), "model.tie_word_embeddings"),
    **dict.fromkeys("max_position positions".split(), "model.n_positions"),
    **dict.fromkeys("model_type arch model_architecture".split(), "model.architecture"),
    **dict.fromkeys("n_kv_head n_kv_heads n_kv_groups n_query_groups".split(), "model.num_key_value_heads"),
    **dict.fromkeys("softcap logit_softcap softcapping".split(), "model.final_logit_softcapping"),
    **dict.fromkeys("rope_base rotary_base theta".split(), "model.rope_theta"),
    **dict.fromkeys("activation hidden_act act".split(), "model.activation_function"),
    **dict.fromkeys("muon_lr matrix_lr".split(), "optim.muon_learning_rate"),
    **dict.fromkeys("wd decay".split(), "optim.weight_decay"),
    **dict.fromkeys("grad_clip clip clip_grad grad_norm max_norm gradient_clip_val".split(), "optim.max_grad_norm"),
    **dict.fromkeys("warmup warmup_iters lr_warmup_steps num_warmup_steps".split(), "optim.warmup_steps"),
    **dict.fromkeys("lr_scheduler_type lr_scheduler lr_schedule scheduler".split(), "optim.schedule"),
    **dict.fromkeys("optim optimizer optimizer_name".split(), "optim.name"),
    **dict.fromkeys("eval_interval eval_steps val_interval eval_freq interval".split(), "train.eval_every"),
    **dict.fromkeys("eval_iters eval_batches eval_iter max_eval_samples".split(), "train.eval_rows"),
    **dict.fromkeys("log_interval logging_steps log_steps".split(), "train.log_every"),
    **dict.fromkeys("save_interval save_steps checkpoint_interval".split(), "train.save_every"),
    **dict.fromkeys("save_total_limit keep keep_checkpoints".split(), "train.keep_last"),
    **dict.fromkeys("early_stopping_patience early_stopping".split(), "train.patience"),
    **dict.fromkeys("dtype mixed_precision amp".split(), "train.precision"),
    **dict.fromkeys("torch_compile compile_model".split(), "train.compile"),
    **dict.fromkeys("fsdp fsdp2 sharding".split(), "train.shard"),
    **dict.fromkeys("out_dir out output output_path save_dir logging_dir run_name".split(), "output_dir"),
    **dict.fromkeys("random_seed manual_seed data_seed".split(), "seed"),
    **dict.fromkeys(
        "model_name model_name_or_path checkpoint_dir initial_checkpoint_dir pretrained base_model".split(), "init_from"
    ),
    **dict.fromkeys("train_file train_files file path text data_dir data_path input".split(), "data.files"),
    **dict.fromkeys("validation_file val_file val_files eval_file".split(), "data.validation_files"),
    **dict.fromkeys("dataset dataset_name dataset_path hub_id".split(), "data.source"),
    **dict.fromkeys("dataset_config_name dataset_config".split(), "data.name"),
    **dict.fromkeys("dataset_text_field text_field column".split(), "data.text_column"),
    **dict.fromkeys("val_split val_fraction val_split_fraction test_size".split(), "data.validation_fraction"),
    **dict.fromkeys("preprocessing_num_workers".split(), "data.num_proc"),
    **dict.fromkeys("dataloader_num_workers workers".split(), "data.num_workers"),
    **dict.fromkeys("tokenizer_name tokenizer_dir tokenizer_name_or_path".split(), "tokenizer.name"),
    **dict.fromkeys("vocab vocabulary_size n_vocab".split(), "tokenizer.vocab_size"),
    **dict.fromkeys("start start_context".split(), "sample.prompt"),
    **dict.fromkeys("max_tokens max_new_token num_tokens".split(), "sample.max_new_tokens"),
    "temp": "sample.temperature",
}
"""What keys are called in nanoGPT, in the book of LLMs-from-scratch, in litgpt, and in transformers' Trainer."""

MAIN_KEYS = {
    "tokenizer": "tokenizer.name",
    "data": "data.files",
    "optim": "optim.name",
    "model": "init_from",
    "sample": "sample.prompt",
}
"""What a section most likely means where it is given a value of its own."""

ANSWERS = {
    **dict.fromkeys(
        ("dropout", "drop_rate", "dropout_rate"),
        "There are several: " + ", ".join(f"`model.{name}`" for name in DROPOUT_FIELDS) + " (of nanochat).",
    ),
    **dict.fromkeys(
        ("beta1", "beta2", "adam_beta1", "adam_beta2", "beta"), "Give both, such as `'optim.betas=[0.9,0.95]'`."
    ),
    **dict.fromkeys(
        ("eps", "adam_epsilon", "epsilon", "min_lr", "min_learning_rate", "decay_lr", "lr_decay_iters"),
        "No option sets it: see hfgpt/training/optim.py.",
    ),
    **dict.fromkeys(("bias", "qkv_bias"), "Its layers have biases, as GPT-2's have."),
    **dict.fromkeys(
        ("bf16", "fp16", "tf32", "use_bf16"),
        "Write `train.precision=bf16`, `fp16` or `fp32`.",
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy"),
        "`train.eval_every`, `train.save_every` and `train.log_every` count steps; the first two take `epoch` as well.",
    ),
    **dict.fromkeys(("warmup_ratio", "warmup_fraction"), "Warm-up is counted in steps: `optim.warmup_steps`."),
    **dict.fromkeys(
        ("report_to", "wandb_log", "wandb_project", "wandb", "logger_name", "tensorboard", "use_wandb"),
        "Write `'train.trackers=[tensorboard]'`, or [wandb], [mlflow], [trackio].",
    ),
    **dict.fromkeys(
        ("device", "devices", "backend", "num_nodes", "n_gpu", "gpus", "use_cpu", "no_cuda", "accelerator"),
        "Whatever accelerator there is is taken; several processes are started by `accelerate launch`.",
    ),
    **dict.fromkeys(("deepspeed",), "DeepSpeed is turned on by `accelerate launch`: `hfgpt recipes deepspeed`."),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint", "resume_from", "resume_checkpoint"), "Write `--resume` or `--resume PATH`."
    ),
    **dict.fromkeys(
        ("load_best_model_at_end", "always_save_checkpoint", "metric_for_best_model", "save_best"),
        "The checkpoint with the lowest validation loss is always kept; with `train.patience` it is the result.",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_private_repo"), "When the run is done: `hfgpt push FOLDER USER/MODEL`."
    ),
    **dict.fromkeys(
        ("global_batch_size", "total_batch_size"),
        "It is `train.batch_size` times `train.gradient_accumulation_steps` times the processes.",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "eval_only", "do_predict"), "`hfgpt train` does both; `hfgpt evaluate` measures."
    ),
    **dict.fromkeys(("overwrite_output_dir", "overwrite"), "A run is never written over: name another `output_dir`."),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "val_batch_size"),
        "Evaluations take as many rows at a time as training: `train.batch_size`.",
    ),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "There is no such option."),
    "train.max_tokens": "Count steps, `train.max_steps`, or passes over the text, `train.epochs`.",
}
"""The same where no key of a recipe takes the value as it is."""


@functools.cache
def model_source() -> list[ast.stmt]:
    """The body of `HFGPTConfig`, parsed: importing it imports torch, and Tab is pressed often."""
    source = (Path(__file__).parents[1] / "configuration_hfgpt.py").read_text(encoding="utf-8")
    return next(
        node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "HFGPTConfig"
    )


def model_fields() -> list[str]:
    """The fields of `HFGPTConfig`."""
    return [ast.unparse(item.target) for item in model_source() if isinstance(item, ast.AnnAssign)]


def model_aliases() -> list[str]:
    """GPT-2's names of them."""
    assigned = {ast.unparse(item.targets[0]): item.value for item in model_source() if isinstance(item, ast.Assign)}
    return list(ast.literal_eval(assigned["attribute_map"]))


def sections() -> dict[str, list[str]]:
    """The keys of each section of a recipe, the model's aliases among them."""
    found = {name: kind for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind)}
    inner = {name: [each.name for each in fields(kind)] for name, kind in found.items()}
    return {each.name: inner.get(each.name, []) for each in fields(RunConfig)} | {
        "model": [*dict.fromkeys(["architecture", *model_fields(), *NANOCHAT_FIELDS, *model_aliases()])]
    }


def recipe_keys(with_aliases: bool = False) -> list[str]:
    """The key path of every option of a recipe, in its order."""
    hidden = () if with_aliases else {f"model.{name}" for name in {*model_aliases()} - {*NANOCHAT_FIELDS}}
    return [
        path
        for section, names in sections().items()
        for path in ([f"{section}.{name}" for name in names] or [section])
        if path not in hidden
    ]


def check_keys(layer: Mapping[str, Any], spell: Spelling, own_model: bool = False) -> None:
    """Refuse a key that a recipe does not have.

    Args:
        layer: values by key, nested as in a recipe.
        spell: how a key is written where the layer comes from.
        own_model: whether the model is a class of your own, whose fields are not known here.

    Raises:
        ValueError: naming the key, and what was meant, as it is to be written; or a section that holds a value.
    """
    known, inner = {*recipe_keys(with_aliases=True)}, sections()
    for names, value in leaves(layer):
        path = ".".join(names)
        if own_model and names[0] == "model" and len(names) == 2 and names[1].isidentifier():
            continue
        if any(".".join(names[:end]) in known for end in range(1, len(names))):
            continue  # lines where a value belongs: the types are checked later
        if inner.get(path) and value != {}:
            meant = MAIN_KEYS.get(path) if isinstance(value, str) else None
            hint = f" Did you mean `{spell(meant, value)}`?" if meant else f" Its keys are {', '.join(inner[path])}."
            raise ValueError(f"`{path}` must hold `key: value` lines, got {value!r}.{hint}")
        is_nested = not any("." in name for name in names)  # `optim.learning_rate: 1` is a key of no recipe
        if not inner.get(path) and not (path in known and is_nested):
            raise ValueError(f"unknown key `{path}`.{suggest_key(path, value, spell)}")


def leaves(section: Mapping[Any, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values of nested mappings, each after the names that lead to it; an empty mapping is a value."""
    for key, value in section.items():
        names = (*before, str(key))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, names)
        else:
            yield names, value


def suggest_key(path: str, value: Any, spell: Spelling) -> str:
    """The end of an error message: what a path that is no key may have meant; else the keys of its section, or "".

    What its last name means as a key, here or elsewhere, comes before what merely looks like it.
    """
    names = path.replace("-", "_").split(".")
    last = names[-1].lower()
    if answer := ANSWERS.get(path, ANSWERS.get(last)):
        return f" {answer}"
    own = [MAIN_KEYS[path]] if path in MAIN_KEYS else []
    meant = own or find_keys(names[0], last) or near_keys(".".join(names), last)
    if meant:
        return f" Did you mean {' or '.join(f'`{spell(key, value)}`' for key in meant)}?"
    if len(names) > 1 and (there := sections().get(names[0])):
        return f" `{names[0]}` has {', '.join(there)}."
    return f" A recipe has {', '.join(sections())}; `hfgpt config demo` prints every key."


def suggest_override(text: str) -> str:
    """The end of an error message about a word that should be `key.path=value` and has no `=`."""
    key, _, value = text.partition(":")
    if text and Path(text).exists():
        return f" Did you mean `{as_override('data.files', text)}`?"
    if re.fullmatch(r"[\w.-]+", key):
        names = key.strip("-").replace("-", "_").split(".")
        meant = find_keys(names[0], names[-1]) or near_keys(".".join(names), names[-1])
        if meant:
            return f" Did you mean {' or '.join(f'`{as_override(each, value.strip())}`' for each in meant)}?"
    return " Write `key.path=value`, without spaces, such as `train.max_steps=100`."


def find_keys(section: str, last: str) -> list[str]:
    """The keys whose last name is this one, or that other programs call so; of several that of the section asked for.

    None of the model's that the tokenizer sets, which a run would refuse.
    """
    settable = [key for key in recipe_keys(True) if key not in {f"model.{name}" for name in TOKENIZER_FIELDS}]
    same = [key for key in settable if key.rpartition(".")[2] == last]
    if not same and last in ELSEWHERE:
        return ELSEWHERE[last].split()
    return [key for key in same if key.startswith(f"{section}.")] or same


def near_keys(path: str, last: str) -> list[str]:
    """The keys that look most like a misspelt one: by their last name, else as a whole."""
    keys = recipe_keys(True)
    words = [*(key.rpartition(".")[2] for key in keys), *ELSEWHERE]
    for nearest in difflib.get_close_matches(last, words, n=1, cutoff=0.8):
        return find_keys(path.partition(".")[0], nearest)
    return difflib.get_close_matches(path, keys, n=1, cutoff=0.75)


def as_override(key: str, value: Any) -> str:
    """As it is typed on a command line."""
    return shlex.quote(f"{key}={shorten(value)}")


def as_item(key: str, value: Any) -> str:
    """As it stands among the overrides in Python."""
    return f"{key!r}: {shorten(repr(value))}"


def as_yaml(key: str, value: Any) -> str:
    """As it stands in a recipe, on one line."""
    nested: Any = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    text = yaml.safe_dump(nested, default_flow_style=True, allow_unicode=True, width=1_000_000).strip()
    return shorten(text.removeprefix("{").removesuffix("}"), 120)


def shorten(value: Any, most: int = 60) -> str:
    """A value as text; what is too long for a message, or says nothing, as the word VALUE."""
    text = str(value)
    return text if 0 < len(text) <= most and text.isprintable() else "VALUE"
