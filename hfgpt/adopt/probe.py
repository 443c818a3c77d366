"""What a module does, measured: how it is called, where its logits are, what it sees, how long a text it takes.

Nothing is believed of a name: a mask is right if no position sees a later one, an output is the logits if it has a row
for every token.

Shape letters: B batch, T positions, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hfgpt.adopt.constructor import describe
from hfgpt.adopt.gpt_call import Call

TARGETS = ("target", "targets", "label", "labels", "y", "tgt", "trg")
MASKS = (
    *("true where seen", "true where hidden", "minus infinity where hidden", "ones for every token"),
    *("true where seen, for all heads", "one where seen"),
)
"""What a parameter that is no target may be given, see `GIVEN`."""
LIMITS = (
    *("block_size", "context_length", "max_position_embeddings", "n_positions", "n_ctx", "ctx_len", "max_seq_len"),
    *("max_seq_length", "max_len", "max_length", "seq_len", "sequence_length", "context_size", "context_len"),
    *("sequence_len", "ctx_length", "max_context", "window", "max_block_size", "n_context", "block_len", "seq_length"),
)
"""What GPTs call the longest text they take."""
LONGEST_TRIED = 8192
MOST_WORK = 4e11
"""Multiplications that one try of a long text may cost, about ten seconds of a CPU."""
NOISE = 0.05
"""Spread of what is added to every parameter before measuring: many layers begin with zeros, and would hide a fault."""


class Unfit(ValueError):
    """A way to call a module that gives no logits of a causal language model."""


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        call: how it is called.
        vocab_size: width of its logits.
        embedding: name of the layer that takes the ids, if one does.
        head: name of the linear layer whose output the logits are, if one is.
        limit: the longest text in tokens; None if none was found.
        blocks: class names of the repeated layers.
        notes: for the user.
    """

    call: Call
    vocab_size: int
    embedding: str | None
    head: str | None
    limit: int | None
    blocks: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def probe(module: nn.Module, sizes: Mapping[str, Any]) -> Findings:
    """Measure a module; its parameters are changed.

    Args:
        module: whose parameters may be anything.
        sizes: its constructor's arguments, among which the limit of its length may be.

    Raises:
        ValueError: it is no causal language model, or cannot be called; said with what was seen.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=NOISE)
    module.eval()
    rows, embedding = find_embedding(module)
    ids = draw_ids(rows)
    call = find_call(module, ids, rows)
    logits = call.logits(module, ids)
    head = find_head(module, call, ids)
    limit, notes = find_limit(module, call, sizes, rows)
    return Findings(call, logits.shape[-1], embedding, head, limit, find_blocks(module), notes)


def draw_ids(rows: int, length: int = 6) -> Tensor:
    """Two rows of ids, all neighbours different."""
    return (torch.arange(2 * length).view(2, length) * 3 + 1) % max(2, min(rows, 50))


def find_embedding(module: nn.Module) -> tuple[int, str | None]:
    """How many ids it knows, and the name of the layer that takes them: the first embedding that is called."""
    called: list[str] = []
    handles = [
        each.register_forward_pre_hook(lambda _, given, name=name: called.append(name) if is_ids(given) else None)
        for name, each in module.named_modules()
        if isinstance(each, nn.Embedding)
    ]
    names = list(inspect.signature(module.forward).parameters)
    ids = torch.zeros(2, 4, dtype=torch.long)
    try:
        for count in range(1, 3):
            try:
                module(*([ids] * min(count, len(names))))
            except Exception:  # a call that it does not take; how it is called is found out elsewhere
                continue
            break
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(module.named_modules())
    tables = {name: each.num_embeddings for name, each in modules.items() if isinstance(each, nn.Embedding)}
    name = next(iter(called), None)
    return max([tables[name]] if name is not None else tables.values(), default=2), name


def is_ids(given: tuple[Any, ...]) -> bool:
    """Whether what a layer is given are the ids that `find_embedding` gave the module."""
    if not given or not isinstance(given[0], Tensor) or given[0].is_floating_point():
        return False
    return tuple(given[0].shape) in ((2, 4), (4, 2)) and not given[0].any()


def find_call(module: nn.Module, ids: Tensor, rows: int) -> Call:
    """The first way of calling it that gives logits for every position, none of which sees a later token.

    Raises:
        ValueError: there is none.
    """
    reasons: list[str] = []
    good: list[Call] = []
    for given in ways_to_call(module):
        if good and set(given) != set(good[0].arguments):
            break
        for time_first in (False, True):
            try:
                call = find_output(module, ids, Call(time_first, given), rows)
                check_causal(module, call, ids, rows)
            except Unfit as error:
                reasons.append(str(error))
                continue
            good.append(call)
            break
    if not good:
        raise ValueError(f"{type(module).__name__} cannot be used as a causal language model: {reasons[0]}")
    first = good[0].logits(module, ids)
    for other in good[1:]:
        if not close(other.logits(module, ids), first):
            raise ValueError(
                f"{type(module).__name__}'s forward takes {', '.join(good[0].arguments)}, and both "
                f"{tuple(good[0].arguments.values())} and {tuple(other.arguments.values())} make it causal, with other "
                "logits. Give the parameter the right default in the file."
            )
    return good[0]


def ways_to_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """What the parameters beside the ids may be given: as little as possible first."""
    signature = inspect.signature(module.forward)
    parameters = [
        each for each in signature.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if not parameters:
        raise ValueError(f"{type(module).__name__}'s forward takes no ids.")
    required = [each.name for each in parameters[1:] if each.default is each.empty]
    optional = [each for each in parameters[1:] if each.default is not each.empty]
    # 0 is where a text begins, for those that take their place in a cache of their own.
    kinds: list[list[Any]] = [["ids"] if is_target(name) else [None, 0, *MASKS] for name in required]
    for chosen in product(*kinds):
        yield dict(zip(required, chosen, strict=True))
    if required:
        kinds = [["ids", None, *MASKS] for _ in required]
    base = dict(zip(required, next(product(*kinds)), strict=True))
    empty = sorted((each.name for each in optional if each.default is None), key=lambda name: not is_target(name))
    for name in empty:
        yield {**base, name: "ids"}
    for each in optional:
        if isinstance(each.default, bool):
            yield {**base, each.name: not each.default}
    for name in empty:
        for kind in MASKS:
            yield {**base, name: kind}


def is_target(name: str) -> bool:
    return name.lower() in TARGETS or any(part in TARGETS for part in name.lower().split("_"))


def attempt(function: Callable[..., Any], module: nn.Module, ids: Tensor) -> Any:
    """What the module gives for these ids.

    Raises:
        Unfit: it raises something.
    """
    try:
        return function(module, ids)
    except Exception as error:
        raise Unfit(f"its forward fails: {describe(error)}") from error


def find_output(module: nn.Module, ids: Tensor, call: Call, rows: int) -> Call:
    """The same with the way to the logits in what is returned.

    Raises:
        Unfit: the call fails, or there are none for every position.
    """
    returned = attempt(call.run, module, ids)
    B, T = ids.shape
    tensors = list(tensors_in(returned))
    fitting = [
        (path, each) for path, each in tensors
        if each.is_floating_point() and each.ndim in (2, 3) and each.shape[-1] > 1
        and ((each.ndim == 3 and tuple(each.shape[:2]) == ((T, B) if call.time_first else (B, T))) or (each.ndim == 2
             and each.shape[0] == B * T))
    ]  # fmt: skip
    if not fitting:
        shapes = ", ".join(str(tuple(each.shape)) for _, each in tensors) or type(returned).__name__
        raise Unfit(
            f"its forward returns {shapes} for ids of {tuple(ids.shape)}; logits for every position would be "
            f"({B}, {T}, vocabulary)."
        )
    named = [(path, each) for path, each in fitting if "logits" in path] or [
        (path, each) for path, each in fitting if each.shape[-1] == rows
    ]
    path, logits = (named or fitting)[0]
    total = logits.float().sum(-1)
    if logits.min() >= 0 and close(total, torch.ones_like(total)):
        raise Unfit(
            "its forward returns probabilities; a loss needs what goes into the softmax. Return that from forward."
        )
    return Call(call.time_first, call.arguments, path)


def tensors_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Every tensor in what a forward returned, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from tensors_in(each, (*path, name))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_in(each, (*path, index))
    elif hasattr(value, "__dict__"):
        for name, each in vars(value).items():
            if isinstance(each, Tensor):
                yield (*path, name), each


def check_causal(module: nn.Module, call: Call, ids: Tensor, rows: int) -> None:
    """Change a token, and see which logits change.

    Raises:
        Unfit: those of an earlier position or another row do, or none of a later one.
    """
    place = ids.shape[1] // 2
    changed = ids.clone()
    changed[0, place] = (changed[0, place] + 1) % max(2, min(rows, 50))
    before, after, again = (attempt(call.logits, module, each) for each in (ids, changed, ids))
    if before.shape[:2] != ids.shape:
        raise Unfit(f"its logits are {tuple(before.shape)} for ids of {tuple(ids.shape)}.")
    if not before.isfinite().all():
        raise Unfit("its logits are not finite.")
    if not close(before, again):
        raise Unfit("the same ids give other logits the second time: its forward keeps something, or is random.")
    if not close(before[1], after[1]):
        raise Unfit("changing a token of one row changes the logits of another.")
    if not close(before[0, :place], after[0, :place]):
        raise Unfit("changing a token changes the logits of earlier positions: its attention is not causal.")
    if close(before[0, place:], after[0, place:]):
        raise Unfit("changing a token changes no logits.")
    short = attempt(call.logits, module, ids[:, :place])
    if not close(before[:, :place], short):
        raise Unfit("the logits of a prefix are others when more tokens follow.")


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for the order of sums."""
    if a.shape != b.shape:
        return False
    bound = 1e-4 * max(1.0, float(b.abs().max())) if b.numel() else 0.0
    return bool(torch.allclose(a.double(), b.double(), rtol=0, atol=bound, equal_nan=True))


def find_head(module: nn.Module, call: Call, ids: Tensor) -> str | None:
    """The linear layer whose output the logits are, number for number."""
    outputs: dict[str, Tensor] = {}
    handles = [
        each.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
        for name, each in module.named_modules()
        if type(each) is nn.Linear
    ]
    try:
        logits = call.logits(module, ids)
    finally:
        for handle in handles:
            handle.remove()
    for name, each in reversed(outputs.items()):
        found = each.transpose(0, 1) if call.time_first and each.ndim == 3 else each
        if found.numel() == logits.numel() and torch.equal(found.reshape(logits.shape), logits):
            return name
    return None


def find_limit(module: nn.Module, call: Call, sizes: Mapping[str, Any], rows: int) -> tuple[int | None, list[str]]:
    """The longest text it takes: a size at which it works, while it fails with a token more.

    Sizes are what the config names, and those of its tables and masks.
    """
    named = [value for name, value in flat(sizes) if name in LIMITS and isinstance(value, int) and value > 0]
    shaped = {
        size
        for name, each in (*module.named_parameters(), *module.named_buffers())
        for size in each.shape
        if 4 < size <= LONGEST_TRIED
    } | {value for _, value in flat(sizes) if type(value) is int and 1 < value <= LONGEST_TRIED}
    weights = sum(each.numel() for each in module.parameters())
    longest = int(min(LONGEST_TRIED, MOST_WORK / max(1, weights)))
    for size in [*dict.fromkeys(named), *sorted(shaped - set(named))]:
        if size <= longest and works(module, call, size, rows) and not works(module, call, size + 1, rows):
            return size, []
    if named and max(named) > longest:
        return max(named), [f"a text of {max(named)} tokens, which the config names, was too long to be tried"]
    if named and works(module, call, max(named), rows):
        return max(named), [f"it was built for {max(named)} tokens, and does not refuse more; the folder does"]
    return None, [f"no limit of its length was found, up to {max([*shaped, 0]) + 1} tokens"]


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value)
        else:
            yield name, value


def works(module: nn.Module, call: Call, length: int, rows: int) -> bool:
    """Whether it gives logits for so many tokens."""
    ids = draw_ids(rows, length)[:1]
    try:
        return tuple(call.logits(module, ids).shape[:2]) == (1, length)
    except Exception:  # whatever it raises at a length that it does not take is the answer
        return False


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """The classes of its own that stand in a list two or more times: its blocks."""
    found: dict[str, None] = {}
    for each in module.modules():
        if isinstance(each, nn.ModuleList | nn.Sequential):
            kinds = [type(one) for one in each]
            found |= {
                kind.__name__: None
                for kind in kinds
                if kinds.count(kind) > 1 and not kind.__module__.startswith("torch")
            }
    return tuple(found)


def constant_buffers(first: nn.Module, second: nn.Module, trained: Mapping[str, Tensor]) -> list[str]:
    """Names of saved buffers that the constructor always makes the same, and the weights hold the same."""
    saved = [name for name, _ in first.named_buffers(remove_duplicate=False) if name in first.state_dict()]
    here, there = dict(first.named_buffers(remove_duplicate=False)), dict(second.named_buffers(remove_duplicate=False))
    return [
        name for name in saved
        if torch.equal(here[name], there[name]) and name in trained and same(here[name], trained[name])
    ]  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def drop_changing(module: nn.Module, call: Call, ids: Tensor, names: list[str]) -> list[str]:
    """Of these buffers, those that a forward pass in training leaves as they are."""
    before = {name: module.get_buffer(name).clone() for name in names}
    module.train()
    try:
        call.run(module, ids)
    finally:
        module.eval()
    return [name for name in names if torch.equal(before[name], module.get_buffer(name))]
