"""Promises about weights: drawn, saved, loaded, tied, resized."""

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hfgpt.check.alone import load_alone
from hfgpt.check.batches import can_generate, input_embeddings, logits
from hfgpt.check.network import watch_network
from hfgpt.check.promise import Finding, NotDone, at_most, close, holds, max_difference, not_applicable, promise
from hfgpt.check.subject import Subject

WEIGHTS = "model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
MAX_FOLDER_BYTES = 1_500_000_000
"""Weights above it are not loaded to be compared with their file."""


def unaccounted(model: Any, info: dict[str, Any]) -> list[str]:
    """What `from_pretrained` says of tensors that did not go from the file into the model as they are."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    found = [f"missing {name}" for name in sorted(set(info["missing_keys"]) - tied)]
    found += [f"left over {name}" for name in sorted(info["unexpected_keys"])]
    found += [f"other shape {entry[0]}" for entry in sorted(info["mismatched_keys"])]
    return found + [str(each) for each in info.get("error_msgs") or []]


def tensors(model: nn.Module, unsaved: bool) -> dict[str, Tensor]:
    """Every parameter and every buffer that is saved, or all buffers."""
    return {**model.state_dict(), **(dict(model.named_buffers()) if unsaved else {})}


def changed_tensors(first: nn.Module, second: nn.Module, unsaved: bool = False) -> list[str]:
    """Names of the tensors that differ in a bit, or that only one of the two has."""
    here, there = tensors(first, unsaved), tensors(second, unsaved)
    both = here.keys() & there.keys()
    differing = {name for name in both if not torch.equal(here[name].nan_to_num(), there[name].nan_to_num())}
    return sorted(differing | (here.keys() ^ there.keys()))


def names(found: list[str], detail: str) -> Finding:
    """Nothing is to be in a list; the first of it is named."""
    first = f": {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "") if found else ""
    return holds(not found, detail + first, float(len(found)), 0.0)


@promise(
    "loading",
    meaning="Part of the weights is lost on the way: what is loaded is another model, with a warning at most.",
    usual_causes="Parameters are made after `post_init`, renamed when saved, or `_keys_to_ignore_on_*` hides them.",
)
def loading_accounts_for_every_tensor(subject: Subject) -> Finding:
    """The loading info of a model that was saved."""
    with TemporaryDirectory() as folder:
        subject.make().save_pretrained(folder)
        model, info = subject.load(Path(folder), output_loading_info=True)
        return names(unaccounted(model, info), "tensors that are not in the model as they are in the file")


@promise(
    "loading",
    meaning="The model that was saved is not the model that is loaded.",
    usual_causes="A buffer is computed in the constructor, which `from_pretrained` runs without memory (on meta), or "
    "the config does not hold everything that the model was made of.",
)
def saved_and_loaded_is_the_same_to_the_bit(subject: Subject) -> Finding:
    """Every parameter, every buffer and the logits after saving and loading."""
    model = subject.make()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = subject.load(Path(folder))
    changed = changed_tensors(model, loaded, unsaved=True)
    if changed:
        return names(changed, "tensors that are others after saving and loading")
    ids = subject.ids(2, 12)
    return at_most(max_difference(logits(loaded, ids), logits(model, ids)), 0.0, "logits after saving and loading")


@promise(
    "loading",
    meaning="Weights that were loaded are drawn anew, without a word, where any other tensor is not in the file.",
    usual_causes="`_init_weights` writes to `.data` or by `torch.nn.init`: use `transformers.initialization`.",
)
def loading_overwrites_no_weight(subject: Subject) -> Finding:
    """Load with a tensor of each kind in turn left out of the file: all others must come from the file."""
    model = subject.make()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="100GB")
        path = Path(folder, WEIGHTS)
        whole = load_file(path)
        # Of the layers, which are alike, the last: names differ in their numbers only.
        kinds = {re.sub(r"\d+", "*", name): name for name in sorted(whole)}.values()
        overwritten = set()
        for missing in kinds:
            save_file({name: value for name, value in whole.items() if name != missing}, path, {"format": "pt"})
            try:
                loaded, _ = subject.load(Path(folder), output_loading_info=True)
            except (ValueError, RuntimeError):
                continue  # refused, and so not drawn anew
            there = dict(loaded.named_parameters())
            for name, value in model.named_parameters():
                if name in whole and name != missing and not torch.equal(value, there[name]):
                    overwritten.add(name)
            if overwritten:
                return names(sorted(overwritten), f"weights of the file that were drawn anew without {missing}")
    return names([], "weights of the file that were drawn anew")


@promise(
    "loading",
    meaning="A model of more than one file is loaded with weights missing.",
    usual_causes="`state_dict` or `save_pretrained` is overridden, or tensors that share memory are not declared tied.",
)
def weights_in_several_files_are_the_same(subject: Subject) -> Finding:
    """Saved with a small `max_shard_size`."""
    model = subject.make()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="20KB")
        files = len(list(Path(folder).glob("*.safetensors")))
        loaded = subject.load(Path(folder))
    if files < 2:
        return not_applicable("the model is too small for two files")
    return names(changed_tensors(model, loaded), f"tensors that are others after saving in {files} files")


@promise(
    "loading",
    meaning="Embedding and output layer go apart, or the output layer is drawn anew when the model is loaded.",
    usual_causes="`_tied_weights_keys` does not name the output layer, or the tie is made by hand in the constructor.",
)
def tied_weights_stay_tied(subject: Subject) -> Finding:
    """Whether output layer and embedding are one tensor, as `tie_word_embeddings` says, after loading too."""
    asked = getattr(subject.config.get_text_config(), "tie_word_embeddings", None)
    model = subject.make()
    if model.get_output_embeddings() is None or input_embeddings(model) is None:
        return not_applicable("the class names no output layer, or no embedding")
    if asked is None:
        return not_applicable("the config has no `tie_word_embeddings`")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, info = subject.load(Path(folder), output_loading_info=True)
    for when, each in (("made", model), ("loaded", loaded)):
        if is_tied(each) != asked:
            return holds(False, f"`tie_word_embeddings` of the model that was {when}", str(is_tied(each)), str(asked))
    return names(unaccounted(loaded, info) if asked else [], "tensors that are not in the model as in the file")


def is_tied(model: Any) -> bool:
    """Whether output layer and embedding are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@promise(
    "loading",
    meaning="Weights saved in bf16 are loaded as something else.",
    usual_causes="A dtype is written into the constructor.",
)
def dtype_of_the_file_is_kept(subject: Subject) -> Finding:
    """Saved in bf16, loaded with `dtype="auto"`."""
    model = subject.make(dtype=torch.bfloat16)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = subject.load(Path(folder), dtype="auto")
    here, there = dict(model.named_parameters()), dict(loaded.named_parameters())
    changed = [name for name in here if name not in there or not same_bits(here[name], there[name])]
    return names(changed, "bf16 tensors that are others after saving and loading")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype and the same values."""
    return first.dtype == second.dtype and torch.equal(first, second)


@promise(
    "loading",
    meaning="Training starts from other weights than the config says: a large loss, or a run that diverges.",
    usual_causes="`_init_weights` is missing or leaves a module out; or `post_init()` is not called.",
)
def initial_weights_are_as_declared(subject: Subject) -> Finding:
    """The standard deviation of every matrix in units of `initializer_range`.

    A matrix may be drawn smaller, as GPT-2 does with those that write to the residual stream, or be all zeros.
    """
    declared = getattr(subject.config.get_text_config(), "initializer_range", None)
    if not declared:
        return not_applicable("the config has no `initializer_range`")
    torch.manual_seed(0)
    model = subject.model_class._from_config(subject.config, dtype=torch.float32)
    ratios = {
        name: parameter.std().item() / declared
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.numel() >= 500 and not is_constant(parameter)
    }
    if not ratios:
        return not_applicable("no matrix is large enough to be measured")
    largest = max(ratios, key=ratios.__getitem__)
    embedding = ratios.get(embedding_name(model), 1.0)
    if not embedding > 0.85:
        return holds(False, "embedding's std in units of `initializer_range`", embedding, 0.85)
    return at_most(ratios[largest], 1.15, f"std in units of `initializer_range` of {largest}, the largest")


def is_constant(parameter: Tensor) -> bool:
    """Whether all values are the same."""
    return bool((parameter == parameter.flatten()[0]).all())


def embedding_name(model: Any) -> str:
    """Name of the token embedding's matrix."""
    weight = getattr(input_embeddings(model), "weight", None)
    return next((name for name, parameter in model.named_parameters() if parameter is weight), "")


@promise(
    "loading",
    meaning="A seed does not bring a run back: its first weights are others each time.",
    usual_causes="Weights are drawn from a generator of one's own, or left as the memory was (`torch.empty`).",
)
def a_seed_fixes_the_initial_weights(subject: Subject) -> Finding:
    """Two models of one seed, and one of another."""
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(subject.model_class._from_config(subject.config, dtype=torch.float32))
    if not changed_tensors(models[0], models[2]):
        return holds(False, "another seed gives the same weights")
    return names(changed_tensors(models[0], models[1]), "tensors that differ between two models of one seed")


@promise(
    "loading",
    meaning="`AutoModelForCausalLM.from_pretrained`, and with it most tools, cannot open what the class saves, or make "
    "another model of it.",
    usual_causes="The class and its config are not registered: `register_for_auto_class`, or `AutoConfig.register`; "
    "or a `model_type` that transformers already uses.",
)
def the_auto_class_loads_what_was_saved(subject: Subject) -> Finding:
    """AutoModelForCausalLM on a folder that the class saved gives the same class and logits."""
    if not subject.auto_model:
        return not_applicable("AutoModelForCausalLM was not told of the class")
    model, ids = subject.make(), subject.ids(2, 12)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=subject.trust_remote_code).eval()
    if type(loaded).__qualname__ != type(model).__qualname__:  # of code beside the weights it is another copy
        return holds(False, "the class that it loads", type(loaded).__qualname__, type(model).__qualname__)
    return at_most(max_difference(logits(loaded, ids), logits(model, ids)), 0.0, "logits of what the Auto class loads")


@promise(
    "loading",
    meaning="Others cannot load the model, or only who has its package; or its code runs before they agreed.",
    usual_causes="`register_for_auto_class` is not called, or the code imports what does not lie beside it.",
)
def code_beside_the_weights_runs_alone_and_only_if_trusted(subject: Subject) -> Finding:
    """A process that cannot import the class's package loads the folder by the code in it, and refuses it untrusted."""
    model, ids = subject.make(), subject.ids(2, 12)
    package = subject.model_class.__module__.partition(".")[0]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
            return not_applicable(f"the class saves no code: whoever loads it needs {package}")
        try:
            found = load_alone(Path(folder), package, ids)
        except subprocess.TimeoutExpired as error:
            raise NotDone(f"the process was not done after {error.timeout:.0f} s") from None
    if isinstance(found, str):
        return holds(False, found)
    return at_most(max_difference(found, logits(model, ids)), 0.0, f"logits in a process without {package}")


@promise(
    "loading",
    meaning="The weights are pickles, which run code when they are opened; or using the model needs the network.",
    usual_causes="`save_pretrained` is overridden, or a file is fetched in the constructor.",
)
def no_pickle_is_written_and_nothing_is_fetched(subject: Subject) -> Finding:
    """Save, load, run and generate while every connection is refused and written down."""
    with TemporaryDirectory() as folder, watch_network() as asked_for:
        subject.make().save_pretrained(folder)
        model, ids = subject.load(Path(folder)), subject.ids(1, 5)
        logits(model, ids)
        if can_generate(subject):
            model.generate(ids, max_new_tokens=2)
        pickles = sorted(path.name for path in Path(folder).rglob("*") if path.suffix in PICKLES)
    return names(pickles + [f"connection to {each}" for each in asked_for], "pickles and connections")


@promise(
    "loading",
    meaning="After tokens were added the model errs on all others, or cannot score the new ones.",
    usual_causes="`get_input_embeddings` or `get_output_embeddings` does not find the layer; or a size is kept besides "
    "the config's.",
)
def resizing_the_vocabulary_keeps_the_old_logits(subject: Subject) -> Finding:
    """Eight tokens more: old logits, ties, config; saved and loaded; and eight fewer again."""
    model, ids = subject.make(), subject.ids(2, 12)
    before, size = logits(model, ids), subject.vocab_size
    if input_embeddings(model) is None:
        return not_applicable("the class names no embedding")
    was_tied = model.get_output_embeddings() is not None and is_tied(model)
    model.resize_token_embeddings(size + 8, mean_resizing=False)
    after = logits(model, ids)
    if after.shape[-1] != size + 8 or model.config.get_text_config().vocab_size != size + 8:
        return holds(False, f"logits for {size + 8} tokens", float(after.shape[-1]), float(size + 8))
    if was_tied and not is_tied(model):
        return holds(False, "the output layer is no longer the embedding", "untied", "tied")
    logits(model, torch.full((1, 2), size + 7))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = subject.load(Path(folder))
    if changed := changed_tensors(model, loaded):
        return names(changed, "tensors that are others after resizing, saving and loading")
    model.resize_token_embeddings(size)
    if logits(model, ids).shape != before.shape:
        return holds(False, "logits after the eight tokens were taken away again", "another shape")
    return close(after[..., :size], before, "logits of the old tokens after eight were added")


@promise(
    "loading",
    meaning="The weights in this folder are not the weights of the model that comes out of it.",
    usual_causes="config.json, the code and the weights are of different versions.",
)
def the_folders_own_weights_are_loaded_whole(subject: Subject) -> Finding:
    """Every tensor of the folder's files against the model's of that name, at the folder's size, not small."""
    folder = subject.folder
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if folder is None or not files:
        return not_applicable("what was named is no folder with safetensors")
    size = sum(path.stat().st_size for path in files)
    if size > MAX_FOLDER_BYTES:
        return not_applicable(f"the weights have {size / 1e9:.1f} GB: too many to be loaded here")
    model, info = subject.load(folder, output_loading_info=True, dtype="auto")
    if found := unaccounted(model, info):
        return names(found, "tensors that are not in the model as they are in the file")
    here, changed, compared = model.state_dict(), [], 0
    for path in files:
        with safe_open(path, "pt") as stored:
            for name in stored.keys():
                if name in here and list(here[name].shape) == stored.get_slice(name).get_shape():
                    compared += 1
                    if not torch.equal(here[name], stored.get_tensor(name).to(here[name].dtype)):
                        changed.append(name)
    if not compared:
        return not_applicable("transformers converts the names of all tensors: none can be compared")
    return names(changed, f"of {compared} tensors compared, those that differ from the file")
