"""`RunConfig`: every option of a run, its default, its range and its unit, on one screen.

Imports no library, because the shell's completion imports it. What options mean together is in validation.py.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from hfgpt.config.ranges import at_least, one_of, steps_or_epoch, switch_or

ARCHITECTURES = ("gpt2", "nanochat")
"""What `model.architecture` may be: hfgpt/gpt.py or hfgpt/nanochat.py."""
NANOCHAT_FIELDS = (
    *("num_key_value_heads", "final_logit_softcapping", "rope_theta", "rms_norm_eps", "attention_dropout"),
)
"""Fields of `model` that nanochat has, and GPT-2 has not, or means otherwise."""
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")
"""Of all architectures."""
TOKENIZER_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
LARGEST_SEED = 2**32 - 2**16
"""NumPy takes seeds below 2**32; each process adds its number to the run's."""
BETAS = {"two numbers in [0, 1)": lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas)}


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: one that exists, or a byte-level BPE trained on the training split."""

    name: str | None = None
    """Hub id or folder of a tokenizer; null trains one."""
    vocab_size: int = field(default=4096, metadata=at_least(257))
    """Token ids of a trained tokenizer, `<|endoftext|>` included."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes rows of tokens."""

    source: str | None = None
    """`pydoc` (Python's own documentation) or the Hub id of a data set. Give this or `files`."""
    name: str | None = None
    """Configuration of a Hub data set, such as `wikitext-2-raw-v1`."""
    files: Any = None
    """Path, or list of paths, of .txt, .md, .jsonl, .json, .parquet or .csv files, or folders of them; see
    hfgpt/data/README.md.
    """
    validation_files: Any = None
    """Like `files`; the validation text. null takes it from the training text, see `validation_fraction`."""
    text_column: str = "text"
    """Column that holds the text of a document; a .txt file is one document."""
    split: str = "train"
    """Split of a Hub data set to train on."""
    validation_split: str | None = None
    """Split of a Hub data set to validate on; null takes `validation_fraction` of the training split."""
    validation_fraction: float = field(default=0.1, metadata={"between 0 and 1": lambda share: 0 < share < 1})
    """Share of the documents (of the characters, if there is only one), taken from the end, in (0, 1)."""
    shuffle_documents: bool = True
    """Whether documents are shuffled by `seed` before they are split and joined."""
    block_size: int = field(default=128, metadata=at_least(1))
    """Targets in one row, in tokens."""
    stride: int | None = field(default=None, metadata=at_least(1))
    """Tokens from the start of one row to the next, 1 to `block_size`; null means `block_size`."""
    separator: str | None = field(default="eos", metadata={"'eos' or null": lambda mark: mark in ("eos", None)})
    """What stands between documents: `eos`, the tokenizer's end-of-text token; null puts nothing there, as nanoGPT does
    for characters, and a tokenizer then needs no such token.
    """
    packing: str = field(default="contiguous", metadata=one_of("contiguous", "isolated", "padded"))
    """`contiguous`: rows are cut from one stream with `separator` between documents; `isolated`: the same rows, but
    no token sees another document; `padded`: a document never shares a row, and short rows are filled up.
    """
    streaming: bool = False
    """Whether the training text is read as it comes and never stored, for sets larger than the disk."""
    shuffle_buffer: int = field(default=1000, metadata=at_least(1))
    """With `streaming`: documents in memory, among which the next one is drawn."""
    validation_documents: int = field(default=1000, metadata=at_least(1))
    """With `streaming`: the validation text is so many documents from the beginning, unless it is named."""
    num_proc: int = field(default=1, metadata=at_least(1))
    """Processes that tokenize."""
    num_workers: int = field(default=0, metadata=at_least(0))
    """Processes that load rows; 0 loads them in the training process, fast enough for what is memory-mapped."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; read by hfgpt/training/optim.py."""

    name: str = field(default="adamw", metadata=one_of("adamw", "muon"))
    """A key of `hfgpt.training.optim.OPTIMIZERS`: `muon` is for the matrices of the blocks, with AdamW for the rest."""
    learning_rate: float = field(default=1.0e-3, metadata={"finite and above 0": lambda rate: 0 < rate < math.inf})
    """Peak of the schedule; with `muon` AdamW's."""
    muon_learning_rate: float = field(default=0.02, metadata={"finite and above 0": lambda rate: 0 < rate < math.inf})
    """Peak for the matrices that `muon` optimizes, whose steps have a size of their own."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata=BETAS)
    """AdamW's averaging of gradients and of their squares, each in [0, 1)."""
    weight_decay: float = field(default=0.1, metadata=at_least(0))
    """Decay of matrices and embeddings; norms and biases never decay."""
    max_grad_norm: float = field(default=1.0, metadata=at_least(0))
    """Gradients are scaled down to this norm; 0 never scales."""
    schedule: str = field(default="cosine", metadata=one_of("constant", "cosine", "linear", "wsd"))
    """A key of `hfgpt.training.optim.SCHEDULES`."""
    decay_share: float = field(default=0.5, metadata={"above 0 and at most 1": lambda share: 0 < share <= 1})
    """With `wsd`: share of the run, at its end, over which the rate falls to 0 in a line; until then it is constant."""
    warmup_steps: int = field(default=50, metadata=at_least(0))
    """Steps over which the learning rate rises from 0 to its peak; a tenth of a run that is shorter than them."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many rows at a time, how often to look."""

    max_steps: int | None = field(default=None, metadata=at_least(1))
    """Optimizer steps. Give this or `epochs`."""
    epochs: int | None = field(default=None, metadata=at_least(1))
    """Passes over the training rows."""
    batch_size: int = field(default=16, metadata=at_least(1))
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = field(default=1, metadata=at_least(1))
    """Micro-batches per optimizer step."""
    precision: str = field(default="fp32", metadata=one_of("fp32", "bf16", "fp16"))
    """fp32, bf16 or fp16 (autocast)."""
    shard: bool = False
    """Whether weights, gradients and optimizer state are split over the processes (FSDP2), on CPUs too; else each
    process holds them whole (DDP).
    """
    compile: Any = field(default=False, metadata=switch_or("auto"))
    """Whether the model runs through torch.compile; its first micro-batch is compared with eager code before step 1.
    `auto` compiles on a CUDA GPU, where the run is so long that this saves more time than it takes.
    """
    log_every: int = field(default=1, metadata=at_least(1))
    """Steps between two training lines in metrics.jsonl."""
    eval_every: Any = field(default=100, metadata=steps_or_epoch(1))
    """Steps between two evaluations, or `epoch`."""
    eval_rows: int = field(default=128, metadata=at_least(0))
    """At most this many rows of each split are scored at an evaluation during training; 0 scores all."""
    final_eval_rows: int = field(default=0, metadata=at_least(0))
    """At most this many rows of each split are scored at the end, for the losses in results.json; 0 scores all
    validation rows, and as many to train on. Not fewer than `eval_rows`.
    """
    save_every: Any = field(default=200, metadata=steps_or_epoch(0))
    """Steps between two checkpoints, or `epoch`; 0 keeps none."""
    keep_last: int = field(default=2, metadata=at_least(1))
    """Checkpoints that are kept."""
    patience: int | None = field(default=None, metadata=at_least(1))
    """Training ends when so many evaluations in a row have not lowered the validation loss, and the folder then holds
    the best weights instead of the last; null trains to the end and keeps the last.
    """
    on_nonfinite: str = field(default="stop", metadata=one_of("stop", "skip"))
    """What a step whose loss or gradient is NaN or infinite does: `stop` ends the run before its weights are spoilt,
    `skip` skips the step, ten times in a row at most.
    """
    trackers: list[str] = field(default_factory=list)
    """Where the lines of metrics.jsonl go besides, some of `TRACKERS`."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is written at every evaluation."""

    prompt: str = "The"
    max_new_tokens: int = field(default=80, metadata=at_least(0))
    """Tokens to write; 0 writes no samples."""
    temperature: float = field(default=0.8, metadata=at_least(0))
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = field(default=50, metadata=at_least(0))
    """Likeliest tokens to draw from; 0 draws from all."""


@dataclass(frozen=True)
class RunConfig:
    """One run. `hfgpt config RECIPE` prints it with every value filled in."""

    output_dir: str = "out/run"
    """Folder that the run leaves; it becomes the Hub repository."""
    loop: str = field(default="accelerate", metadata=one_of("accelerate", "trainer"))
    """`accelerate` (hfgpt/training/loop.py) or `trainer` (transformers' Trainer): the same run, step for step."""
    seed: int = field(default=0, metadata=at_least(0, LARGEST_SEED))
    """Fixes weights, dropout, the order of the data and the samples."""
    init_from: str | None = None
    """Hub id or folder of a model to go on from (hfgpt, GPT-2 or nanochat); `model` may then set only dropouts."""
    model_class: str | None = None
    """`package.module:Class` of a model of your own, see docs/wrap-your-own-gpt.md; null is one of hfgpt's."""
    model: dict[str, Any] = field(default_factory=dict)
    """`architecture`, `gpt2` (the default) or `nanochat`, and its fields, those of `HFGPTConfig` or `NanoChatConfig`,
    under GPT-2's names too; or fields of your own model's config. `vocab_size` comes from the tokenizer.
    """
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
