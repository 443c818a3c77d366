"""What a benchmark measures: the command, the shape of the model, the amount of work, and whom it is measured against.

Imports no library, so that a mistake is answered at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hfgpt.config.ranges import at_least, check_choice, check_ranges, one_of
from hfgpt.system.allocator import ALLOCATORS
from hfgpt.system.storage import check_new_file

COMMANDS = ("train", "generate", "evaluate", "data", "load")

PEERS = {
    "transformers": COMMANDS,
    "transformers-static": ("generate",),
    "nanogpt": ("train", "evaluate", "generate", "load"),
    "llms-from-scratch": ("train", "evaluate", "generate", "load"),
    "hfgpt-train": ("train",),
    "trainer": ("train",),
}
"""Whom hfgpt can be measured against -> the commands in which.

`transformers-static` is transformers' `generate` with its static cache. `hfgpt-train` and `trainer` are whole runs of
our own, through `hfgpt.train` with either loop, so that one sees what a loop costs beside its step.
"""

FROM_CHECKOUT = {"nanogpt": "model.py", "llms-from-scratch": "pkg/llms_from_scratch/ch04.py"}
"""Peers whose code is imported from a checkout, given as NAME=PATH -> a file that is there."""

SHOWS_PROBABILITIES = ("transformers", "transformers-static")
"""Peers whose `generate` returns what it samples from, so that it can be compared."""

WHOLE_RUNS = {"hfgpt-train": "accelerate", "trainer": "trainer"}
"""Peers that are whole runs of our own -> their loop."""

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Two libraries draw different masks, so without this they could not be compared."""


@dataclass(frozen=True)
class Size:
    """A model by name: fields of `HFGPTConfig`, and the work of one step on a CPU and on a GPU, in rows and tokens."""

    model: dict[str, int]
    cpu: tuple[int, int]
    gpu: tuple[int, int]


SIZES = {
    "tiny": Size(
        {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, cpu=(2, 32), gpu=(2, 32)
    ),
    # The demo's, of recipes/demo.yaml.
    "small": Size(
        {"vocab_size": 4096, "n_positions": 128, "n_embd": 128, "n_layer": 3, "n_head": 4}, cpu=(16, 128), gpu=(64, 128)
    ),
    "30M": Size(
        {"vocab_size": 50257, "n_positions": 256, "n_embd": 384, "n_layer": 6, "n_head": 6}, cpu=(4, 256), gpu=(32, 256)
    ),
    # GPT-2's.
    "124M": Size(
        {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
        cpu=(1, 512),
        gpu=(32, 1024),
    ),
}

GROWTH = {
    "block": ("128", "256", "512", "1024"),
    "batch": ("1", "2", "4", "8", "16"),
    "vocabulary": ("8000", "16000", "32000", "50257"),
    "layers": ("6", "12", "18", "24"),
}
"""What may grow, and the values that it takes."""
MORE_ON_GPU = {"batch": ("32", "64")}


@dataclass(frozen=True)
class Job:
    """One benchmark. Every worker process gets all of it."""

    command: str = field(metadata=one_of(*COMMANDS))
    size: str = field(default="small", metadata=one_of(*SIZES))
    against: dict[str, str] = field(default_factory=lambda: {"transformers": ""})
    """Peers, and where each one's checkout is."""
    device: str = field(default="cpu", metadata=one_of("cpu", "cuda"))
    precision: str = field(default="fp32", metadata=one_of("fp32", "bf16"))
    """Of training: autocast on both sides; otherwise of the weights."""
    compile: bool = False
    """Whether each side's model runs through torch.compile."""
    batch_size: int | None = field(default=None, metadata=at_least(1))
    """Rows of a step."""
    block_size: int | None = field(default=None, metadata=at_least(2))
    """Tokens of a row; of `generate` those of the prompt."""
    new_tokens: int | None = field(default=None, metadata=at_least(1))
    """Of `generate`."""
    top_k: int | None = field(default=None, metadata=at_least(1))
    """Of `generate`: sample at temperature 1 among so many tokens; None takes the likeliest."""
    stride: int | None = field(default=None, metadata=at_least(1))
    """Of `evaluate`: only the last so many tokens of a row are scored, as in a window that slides by so many."""
    megabytes: float | None = field(default=None, metadata=at_least(0.001))
    """Of text, of `data`."""
    processes: int = field(default=1, metadata=at_least(1))
    """Of `data`: that tokenize, on both sides."""
    tokenizer: str | None = None
    """Of `data`: a folder or Hub id; None trains one on the text."""
    rounds: int = field(default=5, metadata=at_least(2))
    """How often each side has its turn."""
    steps: int = field(default=3, metadata=at_least(1))
    """Steps in a turn, after those that warm up."""
    allocator: str = field(default="default", metadata=one_of(*ALLOCATORS))
    """Of our side; if it is not the default, each peer runs with it as well, for a second ratio."""
    model: dict[str, int] = field(default_factory=dict)
    """What of the size's model differs, by fields of `HFGPTConfig`."""
    folder: str = ""
    """Where the weights and texts of both sides lie."""

    @property
    def rows(self) -> int:
        """Rows of a step."""
        rows = SIZES[self.size].gpu[0] if self.device == "cuda" else SIZES[self.size].cpu[0]
        return self.batch_size or (1 if self.command == "generate" else rows)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        tokens = SIZES[self.size].gpu[1] if self.device == "cuda" else SIZES[self.size].cpu[1]
        return self.block_size or (min(32, tokens // 2) if self.command == "generate" else tokens)

    @property
    def written_tokens(self) -> int:
        """Tokens that `generate` writes."""
        return self.new_tokens or min(64, SIZES[self.size].model["n_positions"] - self.row_tokens)

    @property
    def shape(self) -> dict[str, Any]:
        """The model, as fields of `HFGPTConfig`; as many positions as the work needs, if the size has fewer."""
        positions = self.row_tokens + (self.written_tokens if self.command == "generate" else 0)
        shape = {**SIZES[self.size].model, **self.model}
        return {**shape, **NO_DROPOUT, "n_positions": max(shape["n_positions"], positions)}

    def place(self, name: str) -> Path:
        """Where something that the workers share lies."""
        return Path(self.folder) / name


ONLY_OF = {
    "compile": ("train",),
    "precision": ("train", "evaluate", "generate"),
    "batch_size": ("train", "evaluate", "generate"),
    "block_size": ("train", "evaluate", "generate"),
    "new_tokens": ("generate",),
    "top_k": ("generate",),
    "stride": ("evaluate",),
    "megabytes": ("data",),
    "processes": ("data",),
    "tokenizer": ("data",),
}
"""Options that mean something to some commands only."""


def make_job(command: str, against: str, **options: Any) -> Job:
    """Check the words of a user.

    Args:
        command: one of `COMMANDS`.
        against: names of `PEERS`, with commas between them, some as NAME=PATH.
        **options: fields of `Job`; None stands for the default.

    Raises:
        ValueError: naming the option, its value, and what it must be.
    """
    check_choice("bench", command, COMMANDS)
    given = {name: value for name, value in options.items() if value is not None}
    job = Job(command, **given)
    for name in given:
        if command not in ONLY_OF.get(name, COMMANDS) and given[name] != getattr(Job, name):
            raise ValueError(f"`--{name.replace('_', '-')}` has no effect on `bench {command}`.")
    check_ranges(job)
    peers = parse_peers(command, against)
    hidden = [name for name in peers if name not in SHOWS_PROBABILITIES]
    if job.top_k and hidden:
        raise ValueError(f"`--top-k`: {hidden[0]} does not show what it samples from. Leave it out of `--against`.")
    job = replace(job, against=peers, device=choose_device(command, given.get("device")))
    if job.stride is not None and job.stride > job.row_tokens:
        raise ValueError(f"`--stride` ({job.stride}) is longer than a row (`--block-size`, {job.row_tokens}).")
    return job


def choose_device(command: str, asked: str | None) -> str:
    """The device of a job: the one asked for, or a GPU, if there is one and the work is a model's.

    Raises:
        ValueError: a GPU is asked for, and there is none, or nothing for it to do.
    """
    if command == "data":
        if asked == "cuda":
            raise ValueError("`--device cuda` has no effect on `bench data`: text is tokenized on CPUs.")
        return "cpu"
    import torch  # takes seconds, so not before all else is checked

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` is cuda, and torch finds no GPU here.")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Growth:
    """What grows from one measurement to the next, a key of `GROWTH`, its values, and where to draw it."""

    axis: str
    values: tuple[int, ...]
    picture: Path

    def job(self, job: Job, value: int) -> Job:
        """The job with so much of it."""
        if self.axis == "block":
            return replace(job, block_size=value)
        if self.axis == "batch":
            return replace(job, batch_size=value)
        return replace(job, model={"vocab_size" if self.axis == "vocabulary" else "n_layer": value})


def make_growth(job: Job, axis: str | None, values: str | None, picture: Path | None, overwrite: bool) -> Growth | None:
    """Check what a user wants to grow; None if nothing.

    Raises:
        ValueError: there is nothing of that name, the values are no numbers, or the picture is there already.
    """
    if axis is None:
        for name, given in {"values": values, "picture": picture, "overwrite": overwrite or None}.items():
            if given is not None:
                raise ValueError(f"`--{name}` has no effect without `--grow`.")
        return None
    check_choice("--grow", axis, GROWTH)
    if job.command == "data" or (job.command == "load" and axis in ("block", "batch")):
        raise ValueError(f"`--grow {axis}` has no effect on `bench {job.command}`.")
    words = (
        values.split(",") if values else [*GROWTH[axis], *(MORE_ON_GPU.get(axis, ()) if job.device == "cuda" else ())]
    )
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"`--values` must be whole numbers above 0, with commas between, got {values!r}.")
    picture = picture or Path(f"bench-{job.command}-{axis}.png")
    check_new_file(picture, ".png", overwrite)
    return Growth(axis, tuple(map(int, words)), picture)


def parse_peers(command: str, against: str) -> dict[str, str]:
    """Peers and the paths of their checkouts, of words such as `transformers,nanogpt=PATH`.

    Raises:
        ValueError: there is no such peer in this command, it is named twice, or a path is missing or leads elsewhere.
    """
    known = [name for name, commands in PEERS.items() if command in commands]
    peers: dict[str, str] = {}
    for word in against.split(","):
        name, has_path, path = word.strip().partition("=")
        if name not in known:
            raise ValueError(f"`bench {command}` knows no {name!r} to run `--against`. There are {', '.join(known)}.")
        if name in peers:
            raise ValueError(f"`--against` names {name} twice.")
        marker = FROM_CHECKOUT.get(name)
        if marker is None and has_path:
            raise ValueError(f"`--against`: {name} is installed, and takes no path, got {path!r}.")
        if marker is not None and not (Path(path) / marker if path else Path()).is_file():
            raise ValueError(
                f"`--against`: {name} is measured from a checkout: {name}=PATH, with {marker} in it, got {word!r}."
            )
        peers[name] = str(Path(path).resolve()) if path else ""
    return peers
