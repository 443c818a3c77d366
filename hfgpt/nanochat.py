"""The network of nanochat, from token ids to logits, in one file of plain PyTorch: a GPT as it is built today.

Read gpt.py first, from which it differs so: positions are rotations of queries and keys (RoPE), which are normalised
(QK-norm); norms have no parameters (RMSNorm), layers no biases; ReLU² in place of GELU; the output layer is a matrix of
its own, and its logits are capped softly. `config` is transformers' `NanoChatConfig`, or any object with its fields,
and the parameters have the names that transformers gives them.

Shape letters: B batch, T query positions, S key positions (cached + T), C model width, H heads, G heads of keys and
values (each for H / G heads of queries), D head width, F width inside the MLP, V vocabulary.

Source:
    Karpathy 2025, nanochat, https://github.com/karpathy/nanochat/blob/3a5e0bc/nanochat/gpt.py, its first version.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpt import causal_mask, eager_attention


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """gpt.py's `eager_attention` where keys and values (B, G, S, D) are each shared by several heads of queries."""
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    return eager_attention(module, query, key, value, attention_mask, **kwargs)


def rotations(position_ids: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The angles by which each position turns the D / 2 planes of a head: RoPE.

    Args:
        position_ids: (B, T), from 0.
        config: plane i turns by theta^(-2i / D) radians a position; its `rope_theta` is 10,000 in nanochat.
        dtype: of the result; the angles themselves are computed in fp32.

    Returns:
        Cosine and sine, each (B, 1, T, D / 2).

    Source: Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864
    """
    head_dim, theta = config.hidden_size // config.num_attention_heads, config.rope_parameters["rope_theta"]
    planes = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, None, :, None].float() * (1.0 / theta ** (planes / head_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head clockwise, as nanochat does; the two numbers of plane i stand at i and i + D / 2."""
    first, second = x_BHTD.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def cap_softly(logits: Tensor, cap: float | None) -> Tensor:
    """Keep logits between -cap and cap, as they are near 0; None leaves them. As in https://arxiv.org/abs/2408.00118."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class RMSNorm(nn.Module):
    """Divide (..., C) by its root mean square, in fp32, and keep its dtype; there is nothing to learn."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention on rotated, then normalised queries and keys; the arguments are gpt.py's."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        shared = config.num_key_value_heads or heads
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // heads
        self.num_key_value_groups = heads // shared
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, shared * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = RMSNorm(config.rms_norm_eps)

    def forward(
        self,
        x_BTC: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        attend: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As gpt.py's, with the `rotations` of the T positions; a cache keeps keys turned and normalised."""
        q_BHTD, k_BGTD, v_BGTD = (
            # -1, not H: under tensor parallelism each device holds only some of the heads.
            project(x_BTC).view(*x_BTC.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTD, k_BGSD, v_BGSD = self.norm(rotate(q_BHTD, *rotation)), self.norm(rotate(k_BGTD, *rotation)), v_BGTD
        if past_key_values is not None:
            k_BGSD, v_BGSD = past_key_values.update(k_BGSD, v_BGSD, self.layer_idx, kwargs=kwargs)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended_BTHD, weights_BHTS = (attend or grouped_attention)(
            self, q_BHTD, k_BGSD, v_BGSD, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attended_BTHD.reshape(*x_BTC.shape[:-1], -1)), weights_BHTS


class MLP(nn.Module):
    """Two linear layers with the square of ReLU between them, applied to each position by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Map (B, T, C) through (B, T, F) to (B, T, C)."""
        return self.fc2(F.relu(self.fc1(x_BTC)).square())


class Block(nn.Module):
    """One layer, as in gpt.py."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.norm = RMSNorm(config.rms_norm_eps)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
        """Map the residual stream (B, T, C) to itself; the arguments are `CausalSelfAttention`'s."""
        x_BTC = x_BTC + self.self_attn(self.norm(x_BTC), rotation, **kwargs)[0]
        return x_BTC + self.mlp(self.norm(x_BTC))


class NanoChat(nn.Module):
    """The whole network: `NanoChat(config)(input_ids)`, without transformers; else as gpt.py's `GPT`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.rms_norm_eps)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                init_weight(name, module.weight, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weight("lm_head", self.lm_head.weight, config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every next token: ids (B, T) to logits (B, T, V), of which row t scores the token at t + 1."""
        x_BTC = self.norm(self.embed_tokens(input_ids))
        positions_1T = torch.arange(input_ids.shape[1], device=x_BTC.device)[None]
        rotation = rotations(positions_1T, self.config, x_BTC.dtype)
        mask_TT = causal_mask(input_ids.shape[1], x_BTC.dtype, x_BTC.device)
        for block in self.layers:
            x_BTC = block(x_BTC, rotation, attention_mask=mask_TT)
        return cap_softly(self.lm_head(self.norm(x_BTC)), self.config.final_logit_softcapping)


def init_weight(name: str, weight: Tensor, config: Any) -> None:
    """Draw the first weights of the module called `name`.

    As nanochat does, and not as transformers' class, which is there to load weights: each layer adds nothing at first,
    and every token is as likely as any other. Only the embedding has another size, `initializer_range` in place of 1:
    the norm after it takes the size away again, except from what a step changes. nanochat learns embeddings at a rate
    of 0.2, 10 to 50 times that of the rest; here one rate of about 0.003 is for all.

    Source:
        `GPT.init_weights` in https://github.com/karpathy/nanochat/blob/48abd7d/nanochat/gpt.py
    """
    if name.endswith(("o_proj", "fc2")):
        nn.init.zeros_(weight)
    elif name.endswith(("embed_tokens", "lm_head")):
        nn.init.normal_(weight, mean=0.0, std=0.001 if name.endswith("lm_head") else config.initializer_range)
    else:
        bound = math.sqrt(3 / config.hidden_size)  # a standard deviation of 1/√C, without outliers
        nn.init.uniform_(weight, -bound, bound)
