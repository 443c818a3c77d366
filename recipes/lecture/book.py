"""The book's model, freshly initialised, as an hfgpt model; and GPT-2's initialisation beside it.

The book leaves its weights as torch draws them: embeddings from N(0, 1), linear layers from U(-1/√in, 1/√in). GPT-2
draws all of them from N(0, 0.02²). The book's output layer is a matrix of its own, and its attention has no biases.
"""

import torch
from torch import Tensor, nn

from hfgpt import HFGPTConfig, HFGPTForCausalLM
from hfgpt.config.schema import DROPOUT_FIELDS, RunConfig
from hfgpt.weights.formats import llms_from_scratch
from hfgpt.weights.model_parts import Unsaid, build

INITIALISATIONS = ("book", "gpt2")


def make_model(config: RunConfig, vocab_size: int, init: str = "book") -> HFGPTForCausalLM:
    """Draw a model's weights with the run's seed.

    Args:
        config: its `model` section is the shape, its `seed` fixes the weights.
        vocab_size: of the tokenizer.
        init: one of `INITIALISATIONS`.

    Returns:
        The model in eval mode; torch's random numbers go on where the drawing of the weights left them.
    """
    shape = HFGPTConfig(**config.model, vocab_size=vocab_size)
    torch.manual_seed(config.seed)
    if init == "gpt2":
        shape.tie_word_embeddings = True
        return prepare(HFGPTForCausalLM(shape).eval())
    told = Unsaid(heads=shape.num_attention_heads, activation=shape.activation_function)
    checkpoint = llms_from_scratch.read({**book_state_dict(shape)}, {}, told)
    for name in set(DROPOUT_FIELDS) & set(HFGPTConfig.__annotations__):
        setattr(checkpoint.config, name, getattr(shape, name))
    model, _ = build(checkpoint)
    return prepare(model)


def book_state_dict(shape: HFGPTConfig) -> dict[str, Tensor]:
    """The state dict of the book's `GPTModel` of this shape, as torch's defaults draw it.

    The layers are made in the order of the book's classes, so that one seed gives the book's own numbers.
    """
    width, inner = shape.hidden_size, 4 * shape.hidden_size
    layers: dict[str, nn.Module] = {
        "tok_emb": nn.Embedding(shape.vocab_size, width),
        "pos_emb": nn.Embedding(shape.max_position_embeddings, width),
    }
    blocks = [f"trf_blocks.{number}" for number in range(shape.num_hidden_layers)]
    for block in blocks:
        for name in ("W_query", "W_key", "W_value"):
            layers[f"{block}.att.{name}"] = nn.Linear(width, width, bias=False)
        layers[f"{block}.att.out_proj"] = nn.Linear(width, width)
        layers[f"{block}.ff.layers.0"] = nn.Linear(width, inner)
        layers[f"{block}.ff.layers.2"] = nn.Linear(inner, width)
    layers["out_head"] = nn.Linear(width, shape.vocab_size, bias=False)
    state = {
        f"{name}.{kind}": weight.detach() for name, layer in layers.items() for kind, weight in layer.named_parameters()
    }
    for norm in [f"{block}.{name}" for block in blocks for name in ("norm1", "norm2")] + ["final_norm"]:
        state |= {f"{norm}.scale": torch.ones(width), f"{norm}.shift": torch.zeros(width)}
    return state


def prepare(model: HFGPTForCausalLM) -> HFGPTForCausalLM:
    """Make attention draw its dropout as the book's does, and leave out the biases that the book has not.

    Whether it has them is told by the output layer: the book's is untied.
    """
    model.set_attn_implementation("eager")
    if not model.config.tie_word_embeddings:
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                parameter.requires_grad_(False)  # they are zeros, and stay so
    return model
