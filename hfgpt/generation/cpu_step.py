"""One token at a time through an `HFGPTForCausalLM` on a CPU: the mathematics of gpt.py, without calls of modules.

What is saved is what a token costs beside its matrix products: hooks, wrappers, masks, and a cache that is copied to
grow. It reads the model's own parameters, of which no copy is made, so it follows them when they are trained.
`is_plain` says which models may take it; every other one goes through its own forward pass.

Shape letters: B batch, S tokens so far, C model width, H heads, D head width, V vocabulary, L layers, F outputs of a
matrix, P of a part of it, N parts or, in `select_rows`, rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfgpt.gpt import MLP, CausalSelfAttention, eager_attention
from hfgpt.modeling_hfgpt import HFGPTBlock, HFGPTForCausalLM, HFGPTModel

PLAIN_MODULES = (
    *(HFGPTForCausalLM, HFGPTModel, HFGPTBlock, CausalSelfAttention, MLP),
    *(nn.ModuleList, nn.Linear, nn.LayerNorm, nn.Embedding),
)
"""The classes that a plain model consists of, themselves and none that derives from them."""
FORWARDS: dict[type[nn.Module], Callable] = {each: each.forward for each in PLAIN_MODULES}
"""What they run, if nobody put something else in its place."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""Of parameters, on each kind of device."""

SKINNY_ROWS = range(4, 17)
"""Rows for which MKL's product with a large matrix reads it at a third of the memory's speed."""
LARGE_MATRIX = 1_000_000
"""Numbers in it."""
PART = 32
"""Rows of a large matrix that are multiplied by themselves: MKL then reads it up to twice as fast."""


def sdpa(layer: CausalSelfAttention, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention of one query a row, which sees all keys but padding: (B, H, T, D)."""
    return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, scale=layer.scaling)


def eager(layer: CausalSelfAttention, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None) -> Tensor:
    """The same by gpt.py's formula."""
    return eager_attention(layer, q_BHTD, k_BHSD, v_BHSD, mask, scaling=layer.scaling)[0].transpose(1, 2)


ATTENTIONS = {sdpa_attention_forward: sdpa, eager_attention: eager}
"""The attention function that a model calls -> the same, called for one token."""


def attention_of(model: HFGPTForCausalLM) -> Callable:
    """The attention function that a model calls, under whatever name."""
    function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager_attention)
    return function


def is_plain(model: Any, device: str) -> bool:
    """Whether `OneTokenStep`, or on "cuda" a graph of cuda_graph.py, computes what the model's own forward pass would.

    It does if nothing but hfgpt's own code would run: the model's modules are hfgpt's and torch's, unchanged, without
    hooks (of adapters, of accelerate's offloading, of a user), not compiled, their parameters plain tensors on one
    device of that kind, in one of its `DTYPES`, and its attention torch's or hfgpt's own.
    """
    if type(model) is not HFGPTForCausalLM:
        return False
    config, modules, parameters = model.config, list(model.modules()), list(model.parameters())
    first = parameters[0]
    return (
        attention_of(model) in ATTENTIONS
        and getattr(config, "is_causal", True)
        and not (config.output_attentions or config.output_hidden_states)
        and all(map(is_untouched, modules))
        and not torch_module._has_any_global_hook()
        and first.device.type == device
        and first.dtype in DTYPES[device]
        and all(type(each) is nn.Parameter for each in parameters)
        and all(each.device == first.device and each.dtype == first.dtype for each in parameters)
        and not torch.is_autocast_enabled(device)
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs what hfgpt or torch wrote for it and nothing else."""
    return (
        type(module) in FORWARDS
        and type(module).forward is FORWARDS[type(module)]
        and not any(getattr(module, name) for name in HOOKS)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and getattr(module, "max_norm", None) is None  # of an embedding: looking up would change the weights
    )


class Layer(NamedTuple):
    """The parts of a block, looked up once: finding a module in a module takes as long as a small operation."""

    input_norm: nn.LayerNorm
    attention: CausalSelfAttention
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    middle_norm: nn.LayerNorm
    up_proj: nn.Linear
    act: Callable[[Tensor], Tensor]
    down_proj: nn.Linear

    @classmethod
    def of(cls, block: Any) -> Self:
        """The parts of an `HFGPTBlock`."""
        attention, mlp = block.self_attn, block.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        norms = block.input_layernorm, block.post_attention_layernorm
        return cls(norms[0], attention, *projections, norms[1], mlp.up_proj, mlp.act, mlp.down_proj)


class OneTokenStep:
    """What a plain model has read, and its step by one more token per row.

    The model's modules must stay as they are while it is in use; their weights may change. Keys and values lie in one
    tensor, with a place for every token to come.

    Args:
        model: for which `is_plain` holds.
        cache: its keys and values of the prompts; they are copied.
        mask_BS: 1 for a token of a prompt, 0 for padding, (B, S).
        capacity: tokens that a row may have in the end, padding and prompt included.
    """

    def __init__(self, model: HFGPTForCausalLM, cache: Cache, mask_BS: Tensor, capacity: int) -> None:
        self.model = model
        self.layers = [Layer.of(block) for block in model.model.layers]
        self.attend = ATTENTIONS[attention_of(model)]
        B, self.length = mask_BS.shape
        self.num_heads = model.config.num_attention_heads
        self.states_L2BSC = model.lm_head.weight.new_empty(
            len(self.layers), 2, B, capacity, model.config.hidden_size, requires_grad=False
        )
        for states_2BSC, layer in zip(self.states_L2BSC, self.layers, strict=True):
            read = cache.layers[layer.attention.layer_idx]
            states_2BSC[0, :, : self.length] = read.keys.transpose(1, 2).flatten(2)
            states_2BSC[1, :, : self.length] = read.values.transpose(1, 2).flatten(2)
        self.positions_B = mask_BS.sum(-1)
        self.padding_B11S: Tensor | None = None  # what is added to scores
        if (mask_BS == 0).any():
            is_padding_BS = F.pad(mask_BS == 0, (0, capacity - self.length))
            no_scores_BS = self.states_L2BSC.new_zeros(B, capacity)
            self.padding_B11S = no_scores_BS.masked_fill(is_padding_BS, -torch.inf)[:, None, None]

    @torch.no_grad()
    def __call__(self, ids_B: Tensor) -> Tensor:
        """Read one token of each row, (B,); returns the logits of the next one, (B, V)."""
        body = self.model.model
        places_2LBC = self.states_L2BSC.select(3, self.length).transpose(0, 1)
        self.length += 1
        states_2LBSC = self.states_L2BSC[:, :, :, : self.length].transpose(0, 1)
        states_2LBHSD = states_2LBSC.unflatten(-1, (self.num_heads, -1)).transpose(3, 4)
        padding_B11S = None if self.padding_B11S is None else self.padding_B11S[..., : self.length]

        x_BC = F.embedding(ids_B, body.embed_tokens.weight) + F.embedding(self.positions_B, body.embed_positions.weight)
        self.positions_B = self.positions_B + 1
        views = zip(self.layers, *(view.unbind() for view in (*places_2LBC, *states_2LBHSD)), strict=True)
        for layer, k_BC, v_BC, k_BHSD, v_BHSD in views:
            h_BC = normalize(x_BC, layer.input_norm)
            k_BC.copy_(multiply(h_BC, layer.k_proj))
            v_BC.copy_(multiply(h_BC, layer.v_proj))
            q_BH1D = multiply(h_BC, layer.q_proj).view(len(x_BC), self.num_heads, 1, -1)
            attended_BH1D = self.attend(layer.attention, q_BH1D, k_BHSD, v_BHSD, padding_B11S)
            x_BC = x_BC + multiply(attended_BH1D.reshape(x_BC.shape), layer.o_proj)
            inner_BF = layer.act(multiply(normalize(x_BC, layer.middle_norm), layer.up_proj))
            x_BC = x_BC + multiply(inner_BF, layer.down_proj)
        return multiply(normalize(x_BC, body.norm), self.model.lm_head)

    def select_rows(self, rows_N: Tensor) -> None:
        """Go on with these rows, (N,), some of them perhaps more than once."""
        kept_L2NSC = self.states_L2BSC[:, :, rows_N, : self.length]
        if len(rows_N) != self.states_L2BSC.size(2):
            L, _, _, capacity, C = self.states_L2BSC.shape
            self.states_L2BSC = kept_L2NSC.new_empty(L, 2, len(rows_N), capacity, C)
        self.states_L2BSC[:, :, :, : self.length] = kept_L2NSC
        self.positions_B = self.positions_B[rows_N]
        self.padding_B11S = None if self.padding_B11S is None else self.padding_B11S[rows_N]


def normalize(x_BC: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A LayerNorm of each row, (B, C)."""
    return torch.layer_norm(x_BC, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def multiply(x_BC: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer, (B, C) to (B, F); for a few rows and a large matrix in parts of the matrix."""
    weight_FC, bias_F = linear.weight, linear.bias
    if len(x_BC) not in SKINNY_ROWS or weight_FC.numel() < LARGE_MATRIX or weight_FC.dtype != torch.float32:
        return F.linear(x_BC, weight_FC, bias_F)
    (B, C), parts = x_BC.shape, len(weight_FC) // PART
    y_BF = x_BC.new_empty(B, len(weight_FC))
    weight_NCP = weight_FC[: parts * PART].view(parts, PART, C).transpose(1, 2)
    y_NBP = torch.bmm(x_BC.expand(parts, B, C), weight_NCP)
    y_BF[:, : parts * PART].view(B, parts, PART).copy_(y_NBP.transpose(0, 1))
    y_BF[:, parts * PART :] = F.linear(x_BC, weight_FC[parts * PART :])
    return y_BF if bias_F is None else y_BF.add_(bias_F)
