"""`RunConfig`: every knob of a run, its default and its unit, on one screen."""

from dataclasses import dataclass, field
from typing import Any

from hfgpt.configuration_hfgpt import HFGPTConfig

DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
TOKENIZER_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
MODEL_FIELDS = {*HFGPTConfig.__annotations__, *HFGPTConfig.attribute_map}
LARGEST_SEED = 2**32 - 2**16
"""NumPy takes seeds below 2**32; each process adds its number to the run's."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: one that exists, or a byte-level BPE trained on the training split."""

    name: str | None = None
    """Hub id or folder of a tokenizer; null trains one."""
    vocab_size: int = 4096
    """Token ids of a trained tokenizer, `<|endoftext|>` included."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes rows of tokens."""

    source: str | None = None
    """`pydoc` (Python's own documentation) or the Hub id of a data set. Give this or `files`."""
    name: str | None = None
    """Configuration of a Hub data set, such as `wikitext-2-raw-v1`."""
    files: Any = None
    """Path, or list of paths, of .txt, .md, .jsonl, .json, .parquet or .csv files, or folders of them."""
    validation_files: Any = None
    """Like `files`; the validation text. null takes it from the training text, see `validation_fraction`."""
    text_column: str = "text"
    """Column that holds the text of a document; a .txt file is one document."""
    split: str = "train"
    """Split of a Hub data set to train on."""
    validation_split: str | None = None
    """Split of a Hub data set to validate on; null takes `validation_fraction` of the training split."""
    validation_fraction: float = 0.1
    """Share of the documents (of the characters, if there is only one), taken from the end, in (0, 1)."""
    shuffle_documents: bool = True
    """Whether documents are shuffled by `seed` before they are split and joined."""
    block_size: int = 128
    """Targets in one row, in tokens."""
    stride: int | None = None
    """Tokens from the start of one row to the next, 1 to `block_size`; null means `block_size`."""
    packing: str = "contiguous"
    """`contiguous`: rows are cut from one stream with `<|endoftext|>` between documents; `isolated`: the same rows, but no token sees another document; `padded`: a document never shares a row, and short rows are filled up."""  # noqa: E501
    streaming: bool = False
    """Whether the training text is read as it comes and never stored, for sets larger than the disk."""
    shuffle_buffer: int = 1000
    """With `streaming`: documents in memory, among which the next one is drawn."""
    validation_documents: int = 1000
    """With `streaming`: the validation text is so many documents from the beginning, unless it is named."""
    num_proc: int = 1
    """Processes that tokenize."""
    num_workers: int = 0
    """Processes that load rows; 0 loads them in the training process, fast enough for what is memory-mapped."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; read by hfgpt/training/optim.py."""

    name: str = "adamw"
    """A key of `hfgpt.training.optim.OPTIMIZERS`."""
    learning_rate: float = 1.0e-3
    """Peak of the schedule."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's averaging of gradients and of their squares, each in [0, 1)."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; norms and biases never decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 never scales."""
    schedule: str = "cosine"
    """A key of `hfgpt.training.optim.SCHEDULES`."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0 to its peak."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many rows at a time, how often to look."""

    max_steps: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: int | None = None
    """Passes over the training rows."""
    batch_size: int = 16
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    precision: str = "fp32"
    """fp32, bf16 or fp16 (autocast)."""
    shard: bool = False
    """Whether weights, gradients and optimizer state are split over the processes (FSDP2), on CPUs too; else each process holds them whole (DDP)."""  # noqa: E501
    compile: bool = False
    """Whether the model runs through torch.compile; its first micro-batch is compared with eager code before step 1."""
    log_every: int = 1
    """Steps between two training lines in metrics.jsonl."""
    eval_every: Any = 100
    """Steps between two evaluations, or `epoch`."""
    eval_rows: int = 128
    """At most this many rows of each split are scored at an evaluation during training; 0 scores all. The final one always scores all."""  # noqa: E501
    save_every: Any = 200
    """Steps between two checkpoints, or `epoch`; 0 keeps none."""
    keep_last: int = 2
    """Checkpoints that are kept."""
    patience: int | None = None
    """Training ends when so many evaluations in a row have not lowered the validation loss, and the folder then holds the best weights instead of the last; null trains to the end and keeps the last."""  # noqa: E501
    on_nonfinite: str = "stop"
    """What a step whose loss or gradient is NaN or infinite does: `stop` ends the run before its weights are spoilt, `skip` leaves the step out and goes on, ten times in a row at most."""  # noqa: E501
    trackers: list[str] = field(default_factory=list)
    """Where the lines of metrics.jsonl go besides: `tensorboard`, `trackio`, `wandb`, `mlflow`."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is written at every evaluation."""

    prompt: str = "The"
    max_new_tokens: int = 80
    """Tokens to write; 0 writes no samples."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Likeliest tokens to draw from; 0 draws from all."""


@dataclass(frozen=True)
class RunConfig:
    """One run. `hfgpt config RECIPE` prints it with every value filled in."""

    output_dir: str = "out/run"
    """Folder that the run leaves; it becomes the Hub repository."""
    loop: str = "accelerate"
    """`accelerate` (hfgpt/training/loop.py) or `trainer` (transformers' Trainer): the same run, step for step."""
    seed: int = 0
    """Fixes weights, dropout, the order of the data and the samples."""
    init_from: str | None = None
    """Hub id or folder of a model to go on from (hfgpt or GPT-2); `model` may then set only dropouts."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `HFGPTConfig`, GPT-2's names included. `vocab_size` comes from the tokenizer."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
