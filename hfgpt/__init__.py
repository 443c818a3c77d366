"""A GPT written from scratch that is a full citizen of the Hugging Face ecosystem.

    import hfgpt  # lets AutoModel know the architecture
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("out/demo")

What is in it:

    GPT                             the model in plain PyTorch, exactly GPT-2; needs nothing but torch
    HFGPTConfig                     its shape, under transformers' names and under GPT-2's
    HFGPTModel, HFGPTForCausalLM    the same GPT as a transformers model, and with a language model's head
    HFGPTForSequenceClassification, HFGPTForTokenClassification, HFGPTForQuestionAnswering    other heads
    NanoChat, NanoChatForCausalLM   a second architecture, nanochat's: plain, and as transformers' own `nanochat`
    hfgpt.weights                   models of other formats, in and out: `load`, `save`, `to_gpt2`
    train, evaluate, compare        a run by its recipe, a model on texts, runs side by side; shown by a notebook
    hfgpt.config                    a recipe read: `load_config`
    hfgpt.generation.decoding       greedy, temperature, top-k and top-p, written from scratch
    hfgpt.cli                       the commands; `hfgpt --help` lists them

`import hfgpt` costs next to nothing: torch and transformers are imported when a name is first used, and the model
registers itself with transformers' Auto classes when those are first used.
"""

import importlib
import logging
import os

from hfgpt.system.after_import import AfterImport

__version__ = "0.1.0"

PUBLIC_NAMES = {
    "HFGPTConfig": "hfgpt.configuration_hfgpt:HFGPTConfig",
    "HFGPTModel": "hfgpt.modeling_hfgpt:HFGPTModel",
    "HFGPTForCausalLM": "hfgpt.modeling_hfgpt:HFGPTForCausalLM",
    "HFGPTForSequenceClassification": "hfgpt.modeling_hfgpt:HFGPTForSequenceClassification",
    "HFGPTForTokenClassification": "hfgpt.modeling_hfgpt:HFGPTForTokenClassification",
    "HFGPTForQuestionAnswering": "hfgpt.modeling_hfgpt:HFGPTForQuestionAnswering",
    "GPT": "hfgpt.gpt:GPT",
    "NanoChat": "hfgpt.nanochat:NanoChat",
    "NanoChatForCausalLM": "hfgpt.modeling_nanochat:NanoChatForCausalLM",
    "train": "hfgpt.training.train:train",
    "evaluate": "hfgpt.evaluation.report:measure",
    "compare": "hfgpt.results.compare:compare_runs",
}
"""Where each name is, imported when it is first used."""

__all__ = [
    "GPT",
    "HFGPTConfig",
    "HFGPTForCausalLM",
    "HFGPTForQuestionAnswering",
    "HFGPTForSequenceClassification",
    "HFGPTForTokenClassification",
    "HFGPTModel",
    "NanoChat",
    "NanoChatForCausalLM",
    "__version__",
    "compare",
    "evaluate",
    "train",
]

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # every Auto class imports it, AutoConfig nothing else

NEWEST_TRIED = (5, 24)
"""The newest minor version of transformers that hfgpt's tests were run with; a newer one is taken, with a warning."""


def __getattr__(name: str) -> object:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'hfgpt' has no attribute {name!r}")
    module, _, attribute = PUBLIC_NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC_NAMES]


def register_with_transformers() -> None:
    """Make the Auto classes know hfgpt, and hfgpt read GPT-2 files."""
    import transformers

    from hfgpt.configuration_hfgpt import HFGPTConfig
    from hfgpt.modeling_hfgpt import AUTO_CLASSES
    from hfgpt.weights.formats import gpt2

    transformers.AutoConfig.register(HFGPTConfig.model_type, HFGPTConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(HFGPTConfig, model_class, exist_ok=True)
    gpt2.register()
    warn_of_untried(transformers.__version__)


def warn_of_untried(version: str) -> None:
    """Warn, in the first process, if this transformers is newer than any that was tried."""
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) > NEWEST_TRIED and os.environ.get("RANK", "0") == "0":
        from hfgpt.system.extras import install_command  # not above: `import hfgpt` is to cost next to nothing

        tried = ".".join(map(str, NEWEST_TRIED))
        logging.getLogger("hfgpt").warning(
            f"transformers {version} is newer than any that hfgpt {__version__} was tried with, up to {tried}. "
            "`hfgpt verify --random small` says whether the model is still right. "
            f"If not: `{install_command([f'transformers<{major}.{minor}'])}`, or a newer hfgpt."
        )


# PEFT too: its tables get entries for hfgpt, and it may be what imports the Auto classes.
AfterImport(AUTO_CLASSES, ("transformers", "hfgpt", "peft"), register_with_transformers)
