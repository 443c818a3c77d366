"""Decoding on a GPU: the step of one token per row as a CUDA graph, with no Python and no wait between its kernels.

`generate_stream` (decoding.py) comes here where the model is hfgpt's own and on a GPU; the rules are the same. The
graph reads the model's weights where they lie, so training may go on between two texts.

Shape letters: B rows, T prompt tokens, P places for tokens, N new tokens at a time, L layers, C model width, F width
inside the MLP, H heads, D head width, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hfgpt.generation import decode_triton
from hfgpt.generation.cpu_step import is_plain
from hfgpt.generation.decoding import Generators, apply_history, check_finite_logits, next_logits, process_logits
from hfgpt.generation.params import SamplingParams
from hfgpt.gpt import tanh_gelu
from hfgpt.loss_triton import is_available
from hfgpt.modeling_hfgpt import HFGPTBlock, HFGPTForCausalLM

LOOK_EVERY = 16
"""Tokens written before anybody looks whether the texts have ended; what was written after an end is dropped."""
PLACES = 256
"""A cache has a multiple of so many places, so that prompts of other lengths find the graph made."""
MIN_NEW_TOKENS = 16
"""Making a graph takes 58 ms, of which each token of a 124M model wins 4 back (on an H100)."""


def can_capture(model: Any, params: SamplingParams) -> bool:
    """Whether the graph does all that calls of the model would do, and is worth it.

    Not where the model is no plain one on a GPU, see `is_plain`; for rules that look at the last few tokens; or for a
    text so short that making a graph takes longer than it saves.
    """
    return (
        params.no_repeat_ngram_size == 0
        and params.max_new_tokens >= MIN_NEW_TOKENS
        and is_plain(model, "cuda")
        and is_available(model.device)
    )


class DecodingGraph:
    """Ids, keys and values of a batch on their way through a model, and the graph that adds a token to each row.

    Args:
        model: one for which `can_capture` holds.
        rows: B.
        places: P, for prompts and new tokens.
        params: how tokens are chosen.
        suppress_mask: (V,), True for ids never to be written, or None.
    """

    def __init__(
        self, model: HFGPTForCausalLM, rows: int, places: int, params: SamplingParams, suppress_mask: Tensor | None
    ) -> None:
        self.model = weakref.proxy(model)  # which keeps this graph
        self.params = params
        weight, heads = model.model.embed_tokens.weight, model.config.num_attention_heads
        self.suppress_mask = None if suppress_mask is None else suppress_mask.to(weight.device, copy=True)
        shape = (model.config.num_hidden_layers, rows, heads, places, model.config.hidden_size // heads)
        self.keys_LBHPD = weight.new_zeros(shape)
        self.values_LBHPD = weight.new_zeros(shape)
        self.ids_BP = torch.zeros(rows, places, dtype=torch.int64, device=weight.device)
        self.mask_BP = torch.zeros_like(self.ids_BP)
        self.place = torch.zeros(1, dtype=torch.int64, device=weight.device)  # of the token that is read next
        self.positions_B = torch.zeros_like(self.ids_BP[:, 0])  # its position in each row
        self.seeds_B = torch.zeros_like(self.positions_B)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_busy = False

    def begin(self, input_ids: Tensor, mask_BT: Tensor, seeds_B: Tensor, logits_BV: Tensor, cache: Any) -> None:
        """Take prompts that the model has read, and write the first token after them."""
        length = input_ids.shape[1]
        self.ids_BP[:, :length] = input_ids
        self.mask_BP.zero_()
        self.mask_BP[:, :length] = mask_BT
        for number, layer in enumerate(cache.layers):
            self.keys_LBHPD[number, :, :, :length] = layer.keys
            self.values_LBHPD[number, :, :, :length] = layer.values
        self.place.fill_(length)
        self.positions_B.copy_(mask_BT.sum(-1))
        self.seeds_B.copy_(seeds_B)
        self.write(logits_BV)

    def write(self, logits_BV: Tensor) -> None:
        """Choose the next token of each row, and put it where it is read from."""
        logits_BV = apply_history(logits_BV.float(), self.params, self.ids_BP, self.mask_BP, self.suppress_mask)
        if self.params.temperature == 0:
            next_B = logits_BV.argmax(-1)
        else:
            logits_BV = process_logits(logits_BV, self.params).contiguous()
            next_B = decode_triton.sample(logits_BV, self.seeds_B, self.positions_B)
        self.ids_BP.index_copy_(1, self.place, next_B[:, None])
        self.mask_BP.index_fill_(1, self.place, 1)

    def step(self) -> None:
        """Let the model read the last token of each row, and write the next one."""
        body, head = self.model.model, self.model.lm_head
        token_B = self.ids_BP.index_select(1, self.place)[:, 0]
        x_BC = body.embed_tokens(token_B) + body.embed_positions(self.positions_B)
        is_alone = len(token_B) == 1
        for number, block in enumerate(body.layers):
            x_BC = (self.run_block_of_one_row if is_alone else self.run_block)(number, block, x_BC)
        if is_alone:
            logits_BV = decode_triton.linear_(x_BC, [head], x_BC.new_empty(1, head.out_features), norm=body.norm)
        else:
            # Where rows of logits do not begin at multiples of 16 bytes, cuBLAS takes four times as long.
            padded_BV = x_BC.new_empty(len(x_BC), -(-head.out_features // 64) * 64)
            logits_BV = torch.mm(body.norm(x_BC), head.weight.t(), out=padded_BV[:, : head.out_features])
        self.place += 1
        self.positions_B += 1
        self.write(logits_BV)

    def run_block(self, number: int, block: HFGPTBlock, x_BC: Tensor) -> Tensor:
        """`Block.forward` of gpt.py, for one token per row."""
        attention, mlp = block.self_attn, block.mlp
        normed_BC = block.input_layernorm(x_BC)
        q_BC, k_BC, v_BC = attention.q_proj(normed_BC), attention.k_proj(normed_BC), attention.v_proj(normed_BC)
        x_BC = x_BC + attention.o_proj(self.attend(number, q_BC, k_BC, v_BC))
        return x_BC + mlp.down_proj(mlp.act(mlp.up_proj(block.post_attention_layernorm(x_BC))))

    def run_block_of_one_row(self, number: int, block: HFGPTBlock, x_1C: Tensor) -> Tensor:
        """The same in five kernels."""
        attention, mlp = block.self_attn, block.mlp
        is_gelu = mlp.act is tanh_gelu
        qkv_3C = decode_triton.linear_(
            x_1C,
            [attention.q_proj, attention.k_proj, attention.v_proj],
            x_1C.new_empty(3, x_1C.shape[1]),
            norm=block.input_layernorm,
        )
        decode_triton.linear_(self.attend(number, *qkv_3C.split(1)), [attention.o_proj], x_1C, add=True)
        inner_1F = x_1C.new_empty(1, mlp.up_proj.out_features)
        decode_triton.linear_(x_1C, [mlp.up_proj], inner_1F, norm=block.post_attention_layernorm, gelu=is_gelu)
        return decode_triton.linear_(inner_1F if is_gelu else mlp.act(inner_1F), [mlp.down_proj], x_1C, add=True)

    def attend(self, number: int, query_BC: Tensor, key_BC: Tensor, value_BC: Tensor) -> Tensor:
        """Attention of layer `number`; the new keys and values go into the cache."""
        keys_BHPD, values_BHPD = self.keys_LBHPD[number], self.values_LBHPD[number]
        scaling = keys_BHPD.shape[-1] ** -0.5
        return decode_triton.attend(
            query_BC, key_BC, value_BC, keys_BHPD, values_BHPD, self.mask_BP, self.place, scaling
        )

    def run(self, steps: int) -> None:
        """Write so many tokens in each row; nothing waits for them."""
        for _ in range(steps):
            if self.graph is None:
                self.step()  # which does what a capture must not: it compiles the kernels, and cuBLAS takes its memory
                self.graph = self.capture()
            else:
                self.graph.replay()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record a step; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        # Meanwhile other threads, such as that of a data loader, may allocate.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        return graph


graphs: weakref.WeakKeyDictionary[nn.Module, tuple[Any, DecodingGraph]] = weakref.WeakKeyDictionary()
"""The last graph of each model, and what it was made for."""


def take_graph(
    model: HFGPTForCausalLM, rows: int, length: int, params: SamplingParams, suppress_mask: Tensor | None
) -> DecodingGraph:
    """The graph that this model used last, if it fits and nobody is using it; otherwise a new one."""
    places = -(-length // PLACES) * PLACES
    rules = replace(params, max_new_tokens=1, seed=None, stop=())
    suppressed = None if suppress_mask is None else suppress_mask.nonzero()[:, 0].tolist()
    key = (rows, places, rules, suppressed, [each.data_ptr() for each in model.parameters()])
    last_key, graph = graphs.get(model, (None, None))
    if graph is None or graph.is_busy or last_key != key:
        graph = DecodingGraph(model, rows, places, rules, suppress_mask)
        graphs[model] = (key, graph)
    return graph


@torch.no_grad()
def generate_with_graph(
    model: HFGPTForCausalLM,
    input_ids: Tensor,
    params: SamplingParams,
    mask_BT: Tensor,
    *,
    stop_ids: Sequence[int],
    generator: Generators,
    pad_token_id: int,
    suppress_mask: Tensor | None,
    is_stopped: Callable[[Tensor], Sequence[bool]] | None,
) -> Iterator[Tensor]:
    """Yield what `generate_stream`, whose checks are done, yields; the arguments are its own.

    The parameters must stay where they are in memory until the end; their numbers may change.
    Rows do not hear of one another, so they are written on past their ends, and only what is yielded is cut there.
    """
    graph = take_graph(model, len(input_ids), input_ids.shape[1] + params.max_new_tokens, params, suppress_mask)
    graph.is_busy = True
    try:
        logits_BV, cache = next_logits(model, input_ids, mask_BT, {})
        check_finite_logits(logits_BV)
        graph.begin(input_ids, mask_BT, draw_seeds(generator, input_ids), logits_BV, *cache.values())
        del cache
        is_ended = [False] * len(input_ids)
        first, end = input_ids.shape[1], input_ids.shape[1] + params.max_new_tokens
        for start in range(first, end, LOOK_EVERY):
            new_tokens = min(LOOK_EVERY, end - start)
            graph.run(new_tokens - (start == first))  # `begin` has written one
            written_BN = graph.ids_BP[:, start : start + new_tokens].clone()
            for next_B, ids in zip(written_BN.T, written_BN.T.tolist(), strict=True):
                if any(is_ended):
                    next_B = next_B.masked_fill(torch.tensor(is_ended, device=next_B.device), pad_token_id)
                is_ended = [was or token in stop_ids for was, token in zip(is_ended, ids, strict=True)]
                if is_stopped is not None:
                    is_ended = [was or now for was, now in zip(is_ended, is_stopped(next_B), strict=True)]
                yield next_B
                if all(is_ended):
                    return
    finally:
        graph.is_busy = False


def draw_seeds(generator: Generators, input_ids: Tensor) -> Tensor:
    """A seed for each row, (B,) int64, from the rows' own generators or from that of all."""
    options: Any = {"dtype": torch.int64, "device": input_ids.device}
    if isinstance(generator, Sequence):
        return torch.cat([torch.randint(2**62, (1,), generator=own, **options) for own in generator])
    return torch.randint(2**62, (len(input_ids),), generator=generator, **options)
