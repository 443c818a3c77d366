"""The whole GPT, from token ids to logits, in one file of plain PyTorch; exactly GPT-2.

Read it from top to bottom. It knows nothing of transformers: the attention function, the mask and the cache of keys and
values come in as arguments, so that modeling_hfgpt.py can hand in transformers' own. `config` is any object with the
fields of `HFGPTConfig`.

Shape letters: B batch, T query positions, S key positions (cached + T), C model width, H heads, D head width
(C = H * D), F width inside the MLP, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

tanh_gelu = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": tanh_gelu,  # GPT-2's own; transformers spells the same formula out in eight elementwise operations
    "gelu_pytorch_tanh": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as the formula says it: softmax(Q Kᵀ · scaling + mask) V.

    Args:
        module: the attention layer; only its `training` flag is read.
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        attention_mask: added to the scores, 0 where a query may look and -inf (or the lowest number) where it may not;
            broadcast to (B, H, T, S). None lets every query see every key.
        dropout: share of the attention probabilities to drop, in [0, 1].
        scaling: factor on the scores, 1/√D in GPT-2.
        **kwargs: what other attention functions of transformers' interface take; not used here.

    Returns:
        The attended values (B, T, H, D) and the probabilities (B, H, T, S).

    Source:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    scores_BHTS = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = F.softmax(scores_BHTS, dim=-1).to(value.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value).transpose(1, 2), weights_BHTS


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention. Query, key and value are three plain `nn.Linear`s.

    Args:
        config: shape and dropout.
        layer_idx: number of the block, from 0; a cache keeps keys and values by it.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"`hidden_size` ({width}) is not divisible by `num_attention_heads` ({heads}).")
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        x_BTC: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        attend: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Let every position look at those the mask allows.

        Args:
            x_BTC: normed hidden states, (B, T, C).
            attention_mask: in the form that `attend` takes.
            past_key_values: None, or an object whose `update(key, value, layer_idx, kwargs=kwargs)` appends tensors
                (B, H, T, D) and returns all keys and values so far, (B, H, S, D). It may change what `attend` gets.
            attend: an attention function with `eager_attention`'s signature; None is that one. (torch.fx, by which vLLM
                finds the three projections to make them one, takes no function as a default.)
            **kwargs: handed on to `attend`.

        Returns:
            (B, T, C) to be added to the residual stream, and the probabilities (B, H, T, S) if `attend` gives them.
        """
        q_BTC, k_BTC, v_BTC = self.q_proj(x_BTC), self.k_proj(x_BTC), self.v_proj(x_BTC)
        q_BHTD, k_BHTD, v_BHTD = (
            # -1, not H: under tensor parallelism each device holds only some of the heads.
            each_BTC.view(*x_BTC.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for each_BTC in (q_BTC, k_BTC, v_BTC)
        )
        k_BHSD, v_BHSD = k_BHTD, v_BHTD
        if past_key_values is not None:
            k_BHSD, v_BHSD = past_key_values.update(k_BHTD, v_BHTD, self.layer_idx, kwargs=kwargs)
        attended_BTHD, weights_BHTS = (attend or eager_attention)(
            self,
            q_BHTD,
            k_BHSD,
            v_BHSD,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # Not flatten(-2): the attention functions of vLLM and others return (B * T, H * D).
        out_BTC = self.o_proj(attended_BTHD.reshape(*x_BTC.shape[:-1], -1))
        return F.dropout(out_BTC, p=self.config.resid_pdrop, training=self.training), weights_BHTS


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each position by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"`activation_function` must be one of {list(ACTIVATIONS)}, got {config.activation_function!r}."
            )
        inner = config.intermediate_size or 4 * config.hidden_size
        self.config = config
        self.up_proj = nn.Linear(config.hidden_size, inner)
        self.act = ACTIVATIONS[config.activation_function]
        self.down_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Map (B, T, C) through (B, T, F) to (B, T, C)."""
        out_BTC = self.down_proj(self.act(self.up_proj(x_BTC)))
        return F.dropout(out_BTC, p=self.config.resid_pdrop, training=self.training)


class Block(nn.Module):
    """One layer: normalise and attend, normalise and think, each added to the residual stream."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = CausalSelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        attend: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map the residual stream (B, T, C) to itself; the arguments are `CausalSelfAttention`'s."""
        attended_BTC, _ = self.self_attn(
            self.input_layernorm(x_BTC), attention_mask, past_key_values=past_key_values, attend=attend, **kwargs
        )
        x_BTC = x_BTC + attended_BTC
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))


class GPT(nn.Module):
    """A GPT-2: embeddings, blocks, a last LayerNorm, and the output layer.

    Works without transformers: `GPT(config)(input_ids)`. Its parameters have the names of `HFGPTForCausalLM`, without
    the `model.` prefix, and one seed gives both the same weights.

    Args:
        config: any object with the fields of `HFGPTConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.init_weights()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=init_std("lm_head", config))

    def init_weights(self) -> None:
        """Draw every matrix so far by `init_std`; biases start at 0 and gains at 1, as nn.LayerNorm sets them."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std(name, self.config))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every next token.

        Args:
            input_ids: (B, T) token ids below `vocab_size`, T at most `max_position_embeddings`.

        Returns:
            (B, T, V) logits: row t scores the token at t + 1.

        Raises:
            ValueError: the sequence is longer than there are positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"the input has {length} tokens, the model `max_position_embeddings` "
                f"({self.config.max_position_embeddings}). Shorten the input."
            )
        positions_T = torch.arange(length, device=input_ids.device)
        x_BTC = self.embed_tokens(input_ids) + self.embed_positions(positions_T)
        x_BTC = F.dropout(x_BTC, p=self.config.embd_pdrop, training=self.training)
        mask_TT = causal_mask(length, x_BTC.dtype, x_BTC.device)
        for block in self.layers:
            x_BTC = block(x_BTC, mask_TT)
        return self.lm_head(self.norm(x_BTC))


def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T) to add to attention scores: 0 on and below the diagonal, -inf above it, where the future lies."""
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu(diagonal=1)


def init_std(name: str, config: Any) -> float:
    """Standard deviation of the initial weights of the module called `name`.

    `initializer_range` (0.02 in GPT-2); the two projections back into the residual stream, `o_proj` and `down_proj`,
    start smaller by √(2 · layers), the number of additions to the stream. Positions are drawn as tokens are, as in
    transformers' GPT-2 (OpenAI's code drew them with 0.01).

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """
    if name.endswith(("o_proj", "down_proj")):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range
