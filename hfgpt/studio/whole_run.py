"""A whole run of ours on random rows, through `hfgpt.train`: what the loop costs beside its step.

The rows are words `w0 w1 …` in a text, each of which is one id, so that the run is one that a user could have started.
"""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfgpt.config.schema import DataConfig, OptimConfig, RunConfig, SampleConfig, TrainConfig
from hfgpt.data.loaders import train_loader
from hfgpt.data.prepare import load_text
from hfgpt.data.tokenizer import END_OF_TEXT
from hfgpt.studio.agreement import check_same
from hfgpt.studio.job import Job
from hfgpt.studio.pacer import Pacer
from hfgpt.studio.sides import HFGPT, eager_loss, write_weights
from hfgpt.training.recorder import METRICS_FILE
from hfgpt.training.train import train

STEPS_OF_TEXT = 40
"""Steps in an epoch."""
NEVER = 10**9
"""Steps; further than any benchmark goes."""
MODEL, TEXT = "run-model", "words.txt"
ALLOWED = 0.02
"""Relative difference of the first loss: what bf16 or a compiler change."""


def write_random_text(job: Job) -> None:
    """Write a text of random words, and a model with the tokenizer that reads them."""
    vocab_size = job.shape["vocab_size"]
    write_weights(job, job.place(MODEL), HFGPT.format, HFGPT.activation, vocab_size)
    words = [f"w{number}" for number in range(vocab_size - 1)]
    ids = {word: number for number, word in enumerate([*words, END_OF_TEXT])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(job.place(MODEL))
    generator = torch.Generator().manual_seed(2)
    count = STEPS_OF_TEXT * job.rows * job.row_tokens * 10 // 9 + 2 * job.row_tokens  # a tenth validates
    drawn = torch.randint(len(words), (count,), generator=generator).tolist()
    job.place(TEXT).write_text(" ".join(words[number] for number in drawn))


def run_training(job: Job, loop: str, pace: Pacer) -> None:
    """A whole run on random rows, through `hfgpt.train`; its first loss must be that of its first rows.

    Raises:
        ValueError: it is not.
    """
    config = RunConfig(
        output_dir=str(job.place(f"run-{loop}")),
        loop=loop,
        init_from=str(job.place(MODEL)),
        data=DataConfig(files=str(job.place(TEXT)), block_size=job.row_tokens),
        optim=OptimConfig(),
        train=TrainConfig(
            max_steps=NEVER,
            batch_size=job.rows,
            precision=job.precision,
            compile=job.compile,
            eval_every=NEVER,
            eval_rows=1,
            save_every=0,
        ),
        sample=SampleConfig(max_new_tokens=0),
    )
    _, rows = load_text(config, None)
    batch = next(iter(train_loader(rows.train, job.rows, config.seed)))
    side = HFGPT()
    model = side.load(job.place(MODEL), job.shape["vocab_size"]).to(job.device)
    with torch.no_grad():
        inputs_BT, targets_BT = (batch[name].to(job.device) for name in ("input_ids", "shift_labels"))
        expected = eager_loss(side, model, inputs_BT, targets_BT)
    del model

    def on_step(step: int) -> None:
        if step == 1:
            lines = map(json.loads, (job.place(f"run-{loop}") / METRICS_FILE).read_text().splitlines())
            found = next(torch.tensor(line["loss"]) for line in lines if "loss" in line)
            check_same({"loss": found}, {"loss": expected.cpu()}, (f"the run ({loop})", "hfgpt's step"), ALLOWED)
        pace()

    train(config, on_step=on_step)
