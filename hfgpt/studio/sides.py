"""The sides of a benchmark: how each library loads the same weights and does the same work, as its users do it.

A worker process uses one of them. `as_hfgpt` brings tensors named as the side names its parameters, weights or
gradients, through the weight maps of `hfgpt.weights` to our names, so that two sides can be compared.

Shape letters: B rows, T tokens in each.
"""

import importlib
import importlib.util
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from hfgpt.config.schema import DataConfig, OptimConfig
from hfgpt.configuration_hfgpt import HFGPTConfig
from hfgpt.data.prepare import tokenize
from hfgpt.data.rows import TokenArray
from hfgpt.evaluation.loss import score_batches
from hfgpt.generation.decoding import generate, next_logits, process_logits
from hfgpt.generation.params import SamplingParams
from hfgpt.loss import IGNORE_INDEX
from hfgpt.modeling_hfgpt import HFGPTForCausalLM
from hfgpt.studio.job import FROM_CHECKOUT, Job
from hfgpt.training.optim import make_optimizer
from hfgpt.weights import load, save

OPTIM = OptimConfig()
EAGER_ROWS = 4
"""Rows at a time where a whole step is computed once more in fp32."""


class HFGPT:
    """hfgpt, called as its own commands call it. The other sides have the same methods.

    Attributes:
        format: of `hfgpt.weights.save`, which writes what the side loads.
        activation: GPT-2's, or the only one that the side has.
    """

    format, activation = "hfgpt", "gelu_new"

    def load(self, place: Path, vocab_size: int) -> HFGPTForCausalLM:
        """Load weights; a side that pads its vocabulary adds rows of zeros up to `vocab_size`."""
        return HFGPTForCausalLM.from_pretrained(place)

    def loss(self, model: HFGPTForCausalLM, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean over the targets in training, nats per token."""
        # As in training/loop.py: the number of targets is a tensor, on the device; made without waiting for that.
        count = targets_BT.new_full((), targets_BT.numel())
        batch = {"input_ids": inputs_BT, "labels": inputs_BT, "shift_labels": targets_BT}
        return model(**batch, num_items_in_batch=count, skip_logits=True).loss

    def optimizer(self, model: HFGPTForCausalLM) -> Optimizer:
        """What it trains with."""
        return make_optimizer(model, OPTIM)

    def score(self, model: HFGPTForCausalLM, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean over the targets in evaluation, nats per token."""
        # As `hfgpt evaluate` gives windows: without the targets in front that another one scores.
        first = int((targets_BT[0] == IGNORE_INDEX).sum())
        batch = {"input_ids": inputs_BT, "shift_labels": targets_BT[:, first:]}
        return torch.tensor(score_batches(model, [batch], each_token=True).loss)

    def generate(self, model: HFGPTForCausalLM, prompt_BT: Tensor, new_tokens: int, top_k: int | None = None) -> Tensor:
        """Continue prompts by the likeliest tokens, or by samples among the `top_k` likeliest; the ids of both."""
        rules: dict[str, Any] = {"temperature": 0} if top_k is None else {"temperature": 1, "top_k": top_k}
        return generate(model, prompt_BT, SamplingParams(max_new_tokens=new_tokens, **rules))

    def next_probabilities(self, model: HFGPTForCausalLM, prompt_BT: Tensor, top_k: int) -> Tensor:
        """What `generate` samples the first token from, (B, V)."""
        logits_BV, _ = next_logits(model, prompt_BT, torch.ones_like(prompt_BT), {})
        return process_logits(logits_BV, SamplingParams(temperature=1, top_k=top_k)).softmax(-1)

    def encode(self, documents: Dataset, tokenizer: PreTrainedTokenizerFast, processes: int) -> TokenArray:
        """Documents as ids, stored as this library stores them."""
        documents.cleanup_cache_files()
        return tokenize(documents, tokenizer, DataConfig(num_proc=processes), "training")

    def ids_of(self, encoded: TokenArray) -> Tensor:
        """All ids of what `encode` made, (N,), without what stands between documents."""
        is_text = torch.ones(len(encoded), dtype=torch.bool)
        is_text[torch.from_numpy(encoded.document_starts)] = False  # the end-of-text before each document
        return torch.cat([torch.from_numpy(part.copy()) for part in encoded.parts])[is_text]

    def as_hfgpt(self, model: HFGPTForCausalLM, tensors: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        """Tensors by the names of this model's parameters, as those of hfgpt's; `place` is free for a file."""
        return tensors


class Transformers:
    """transformers' GPT-2, and `datasets.map` with the tokenizer, as in its examples."""

    format, activation = "gpt2", "gelu_new"
    cache: str | None = None

    def load(self, place: Path, vocab_size: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(place)

    def loss(self, model: GPT2LMHeadModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # Trainer gives the number of targets, too, and keeps no cache. `labels` only ask for a loss.
        count = targets_BT.new_full((), targets_BT.numel())
        batch = {"input_ids": inputs_BT, "labels": inputs_BT, "shift_labels": targets_BT}
        return model(**batch, num_items_in_batch=count, use_cache=False).loss

    def optimizer(self, model: GPT2LMHeadModel) -> Optimizer:
        return make_optimizer(model, OPTIM)  # torch's fused AdamW, Trainer's default

    def score(self, model: GPT2LMHeadModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return model(input_ids=inputs_BT, labels=inputs_BT, shift_labels=targets_BT, use_cache=False).loss

    def generate(
        self, model: GPT2LMHeadModel, prompt_BT: Tensor, new_tokens: int, top_k: int | None = None, **options: Any
    ) -> Any:
        rules = {"do_sample": False} if top_k is None else {"do_sample": True, "top_k": top_k}
        cache = {} if self.cache is None else {"cache_implementation": self.cache}
        sizes = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        mask = torch.ones_like(prompt_BT)
        return model.generate(prompt_BT, attention_mask=mask, **sizes, **rules, **cache, **options)

    def next_probabilities(self, model: GPT2LMHeadModel, prompt_BT: Tensor, top_k: int) -> Tensor:
        output = self.generate(model, prompt_BT, 1, top_k, output_scores=True, return_dict_in_generate=True)
        return output.scores[0].softmax(-1)

    def encode(self, documents: Dataset, tokenizer: PreTrainedTokenizerFast, processes: int) -> Dataset:
        documents.cleanup_cache_files()
        return documents.map(
            lambda batch: tokenizer(batch["text"], add_special_tokens=False, verbose=False),
            batched=True,
            remove_columns=["text"],
            num_proc=None if processes == 1 else processes,
        )

    def ids_of(self, encoded: Dataset) -> Tensor:
        return torch.tensor(list(chain.from_iterable(encoded["input_ids"])), dtype=torch.int32)

    def as_hfgpt(self, model: GPT2LMHeadModel, tensors: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        model.load_state_dict(tensors, strict=False)  # the head is the embedding
        model.save_pretrained(place)
        return parameters_of(load(place))


class TransformersStatic(Transformers):
    """The same, decoding with its static cache, for which it compiles the model by itself on a GPU."""

    cache = "static"


class NanoGPT:
    """nanoGPT's model.py, from a checkout.

    It has the exact GELU, and its train.py makes a vocabulary of GPT-2's size 50,304 for speed on a GPU.
    """

    format, activation = "nanogpt", "gelu"

    def __init__(self, checkout: str) -> None:
        self.code = import_file(Path(checkout) / "model.py")
        for name in ("GPT", "GPTConfig"):
            if not hasattr(self.code, name):
                raise ValueError(f"{checkout}/model.py has no `{name}`: this is not nanoGPT.")

    def load(self, place: Path, vocab_size: int) -> nn.Module:
        content = torch.load(place, weights_only=True)
        weights, settings = content["model"], content["model_args"]
        model = self.code.GPT(self.code.GPTConfig(**{**settings, "vocab_size": vocab_size}))
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = nn.functional.pad(weights[name], (0, 0, 0, vocab_size - len(weights[name])))
        model.load_state_dict(weights)
        return model

    def loss(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return model(inputs_BT, targets_BT)[1]

    def score(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.loss(model, inputs_BT, targets_BT.masked_fill(targets_BT == IGNORE_INDEX, -1))

    def optimizer(self, model: Any) -> Optimizer:
        kind = next(model.parameters()).device.type
        first, second = OPTIM.betas
        return model.configure_optimizers(OPTIM.weight_decay, OPTIM.learning_rate, (first, second), kind)

    def generate(self, model: Any, prompt_BT: Tensor, new_tokens: int, top_k: int | None = None) -> Tensor:
        return model.generate(prompt_BT, new_tokens, top_k=top_k or 1)  # a sample of one token is the likeliest

    def as_hfgpt(self, model: Any, tensors: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        tensors = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
        names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        settings = {name: getattr(model.config, name) for name in names}
        torch.save({"model": tensors, "model_args": settings}, place)
        return parameters_of(load(place))


class LLMsFromScratch:
    """The `GPTModelFast` of "Build a Large Language Model (From Scratch)", from a checkout.

    It has an output layer of its own; here that is the embedding, as in GPT-2 and in all other sides.
    """

    format, activation = "llms-from-scratch", "gelu_new"

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, str(Path(checkout) / "pkg"))
        self.code = importlib.import_module("llms_from_scratch.ch04")
        for name in ("GPTModelFast", "generate_text_simple"):
            if not hasattr(self.code, name):
                raise ValueError(f"{checkout}/pkg/llms_from_scratch/ch04.py has no `{name}`: this is another version.")

    def load(self, place: Path, vocab_size: int) -> nn.Module:
        config = HFGPTConfig.from_pretrained(place.with_suffix(".config"))
        sizes = {
            "vocab_size": vocab_size,
            "context_length": config.max_position_embeddings,
            "emb_dim": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "n_layers": config.num_hidden_layers,
        }
        model = self.code.GPTModelFast({**sizes, "drop_rate": 0.0, "qkv_bias": True})
        model.load_state_dict(as_fast(torch.load(place, weights_only=True)))
        model.out_head.weight = model.tok_emb.weight
        return model

    def loss(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())

    def optimizer(self, model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, weight_decay=OPTIM.weight_decay)

    score = loss

    def generate(self, model: Any, prompt_BT: Tensor, new_tokens: int, top_k: int | None = None) -> Tensor:
        assert top_k is None  # SHOWS_PROBABILITIES: it takes the likeliest token
        length = len(model.pos_emb.weight)
        return self.code.generate_text_simple(model, prompt_BT, new_tokens, length)

    def as_hfgpt(self, model: Any, tensors: dict[str, Tensor], place: Path) -> dict[str, Tensor]:
        tensors = {**tensors, "out_head.weight": tensors["tok_emb.weight"]}
        torch.save(tensors, place)
        return parameters_of(load(place, heads=model.trf_blocks[0].att.num_heads))


def as_fast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `GPTModel` as a `GPTModelFast`'s: q, k and v in one, torch's names in norms, no mask."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        front, query, kind = name.partition("att.W_query.")
        if query:
            parts = [tensors[f"{front}att.W_{part}.{kind}"] for part in ("query", "key", "value")]
            result[f"{front}att.qkv.{kind}"] = torch.cat(parts)
        elif not name.endswith("att.mask") and "att.W_" not in name:
            for theirs, fast in ((".scale", ".weight"), (".shift", ".bias"), ("att.out_proj.", "att.proj.")):
                name = name.replace(theirs, fast)
            result[name] = tensor
    return result


Side = HFGPT | Transformers | NanoGPT | LLMsFromScratch

SIDES: dict[str, type[HFGPT] | type[Transformers] | type[NanoGPT] | type[LLMsFromScratch]] = {
    "hfgpt": HFGPT,
    "transformers": Transformers,
    "transformers-static": TransformersStatic,
    "nanogpt": NanoGPT,
    "llms-from-scratch": LLMsFromScratch,
}


def make_side(name: str, job: Job) -> Side:
    """The side of a name in `--against`, or hfgpt's own; call it in a worker only: it may import a checkout."""
    return SIDES[name](job.against[name]) if name in FROM_CHECKOUT else SIDES[name]()  # type: ignore[call-arg]


def eager_loss(side: Side, model: Any, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """The loss of a batch, a few rows at a time, and, where gradients are wanted, their gradients."""
    total = torch.zeros((), device=inputs_BT.device)
    for start in range(0, len(inputs_BT), EAGER_ROWS):
        rows = slice(start, start + EAGER_ROWS)
        loss = side.loss(model, inputs_BT[rows], targets_BT[rows]) * len(inputs_BT[rows]) / len(inputs_BT)
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
    return total


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter once, by its first name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def import_file(path: Path) -> ModuleType:
    """Import a module from a file, under a name of its own."""
    name = f"hfgpt_bench_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for it
    spec.loader.exec_module(module)
    return module


def write_weights(job: Job, place: Path, format: str, activation: str, vocab_size: int) -> None:
    """Draw a model of the job's shape and write it; what differs in format only has equal weights.

    Biases and gains are drawn as well: with their zeros and ones, exchanged norms or biases would go unseen. Matrices
    are drawn so large that what goes into an activation is about 1, where two kinds of GELU differ.
    """
    torch.manual_seed(0)
    shape = {**job.shape, "vocab_size": vocab_size, "activation_function": activation}
    shape["initializer_range"] = shape["n_embd"] ** -0.5
    model = HFGPTForCausalLM(HFGPTConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.02 * torch.randn(parameter.shape)
    save(model, place, format)
    if format == LLMsFromScratch.format:  # a file of tensors alone
        model.config.save_pretrained(place.with_suffix(".config"))
