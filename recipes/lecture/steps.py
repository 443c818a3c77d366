"""The lecture, step by step. Each step prints what the book prints, and returns the figures that it measured.

Shape letters: B texts, T tokens, V vocabulary.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hfgpt import HFGPTForCausalLM
from hfgpt.config.schema import RunConfig
from hfgpt.data.prepare import Rows, load_rows
from hfgpt.data.text import Documents, load_documents
from hfgpt.data.tokenizer import encode_ids, tokenizer_hash
from hfgpt.generation import decoding
from hfgpt.generation.params import SamplingParams
from hfgpt.loss import linear_cross_entropy
from hfgpt.system.machine import environment
from hfgpt.system.storage import write_json
from hfgpt.training.checkpoint import Manifest, TrainState, checkpoints, load_states, save_checkpoint, verify_checkpoint
from hfgpt.weights import load

from .book import make_model, prepare
from .story import GPT2, find_story, find_tokenizer
from .training import Loaders, describe_overfitting, make_loaders, make_optimizer, mean_loss, plot, save, train

FIGURES = "lecture.json"

EXAMPLES = ("every effort moves you", "I really like chocolate")

WORDS = ("closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you")
WORD_LOGITS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])
"""The book's nine-word vocabulary, and its logits for what follows "every effort moves you"."""
TEMPERATURES = (1.0, 0.1, 5.0)


class Lecture:
    """What the steps share; each part is made when a step first asks for it.

    Args:
        config: the recipe.
        weights: folder or Hub id of GPT-2's weights; None tries the Hub.
        init: the initialisation to train from, see `book.INITIALISATIONS`.
        fetches: whether the story is to be fetched to `data.files` if it is not there.
        language: of the steps' headings, `en` or `ko`.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: str | None = None,
        init: str = "book",
        fetches: bool = False,
        language: str = "en",
    ) -> None:
        self.config, self.weights, self.init, self.language = config, weights, init, language
        self.folder = Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        if fetches:
            self.config = find_story(config)

    @cached_property
    def documents(self) -> Documents:
        return load_documents(self.config.data, self.config.seed)

    @cached_property
    def training_text(self) -> str:
        return "\n\n".join(self.documents.train["text"][:])

    @cached_property
    def validation_text(self) -> str:
        return "\n\n".join(self.documents.validation["text"][:])

    @cached_property
    def text(self) -> str:
        return self.training_text + self.validation_text

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return find_tokenizer(self.config, self.documents)

    @cached_property
    def rows(self) -> Rows:
        return load_rows(self.documents, self.tokenizer, self.config.data)

    @cached_property
    def loaders(self) -> Loaders:
        return make_loaders(self.rows, self.config.train.batch_size)

    @cached_property
    def random_model(self) -> HFGPTForCausalLM:
        return make_model(self.config, len(self.tokenizer))

    @cached_property
    def tokens_per_epoch(self) -> int:
        return len(self.loaders.train) * self.config.train.batch_size * self.config.data.block_size

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common to be the same, in types of JSON."""
        config = self.config
        optim, train = config.optim, config.train
        parts = (self.training_text, self.validation_text)
        return {
            "text": [hashlib.sha256(part.encode()).hexdigest() for part in parts],
            "tokenizer": tokenizer_hash(self.tokenizer),
            "rows": [config.data.block_size, config.data.stride, config.data.packing],
            "model": [self.init, config.seed, config.model],
            "optim": [optim.learning_rate, list(optim.betas), optim.weight_decay],
            "train": [train.epochs, train.batch_size, train.eval_every, train.eval_rows],
        }

    def encode(self, text: str) -> Tensor:
        """(1, T) token ids of a text."""
        return torch.tensor(encode_ids(self.tokenizer, [text]))

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)

    def write_on(self, model: HFGPTForCausalLM, max_new_tokens: int, **settings: Any) -> str:
        """The prompt and what the model writes after it; the likeliest token each time, unless `settings` differ."""
        params = SamplingParams(max_new_tokens, **{"temperature": 0.0, "top_k": 0, **settings})
        return self.decode(decoding.generate(model, self.encode(self.config.sample.prompt), params))

    def figures(self) -> dict[str, Any]:
        """All that was measured in this folder so far, by step."""
        path = self.folder / FIGURES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def keep(self, name: str, measured: dict[str, Any]) -> None:
        """Write down what a step measured, and on what."""
        about = {"identity": self.identity(), "environment": environment()}
        write_json(self.folder / FIGURES, {**self.figures(), name: measured, **about})

    def refuse_another_run(self) -> None:
        """Refuse to mix this run's figures with those of another recipe or text.

        Raises:
            ValueError: the folder holds such.
        """
        identity = self.identity()
        if self.figures().get("identity", identity) != identity:
            raise ValueError(
                f"{self.folder} holds figures of another recipe or text. Name another `output_dir`, or remove it."
            )

    def newest(self) -> tuple[Path, Manifest]:
        """The newest checkpoint.

        Raises:
            ValueError: there is none, it is damaged, or it is of another recipe or text.
        """
        if not checkpoints(self.folder):
            raise ValueError(f"{self.folder} holds no trained model. Run the step `training` first.")
        path = checkpoints(self.folder)[0]
        manifest = verify_checkpoint(path)
        if manifest.identity != self.identity():
            raise ValueError(f"{path} was trained by another recipe or on another text. Name another `output_dir`.")
        return path, manifest


def text(lecture: Lecture) -> dict[str, Any]:
    """The text: a short story, from its first line to its last."""
    (ids,) = encode_ids(lecture.tokenizer, [lecture.text])
    print(lecture.text[:99])
    print(lecture.text[-99:])
    print("Characters:", len(lecture.text))
    print("Tokens:", len(ids))
    return {"characters": len(lecture.text), "tokens": len(ids)}


def tokens(lecture: Lecture) -> dict[str, Any]:
    """Text to token ids, and back."""
    ids = lecture.encode(lecture.config.sample.prompt)
    print("Text:", lecture.config.sample.prompt)
    print("Token IDs:", ids.tolist()[0])
    print("Tokens:", [lecture.decode(token_id) for token_id in ids[0]])
    print("Back to text:", lecture.decode(ids))
    return {"ids": ids.tolist()[0]}


def gibberish(lecture: Lecture) -> dict[str, Any]:
    """A model with random weights writes."""
    written = lecture.write_on(lecture.random_model, max_new_tokens=10)
    print("Output text:\n", written)
    return {"text": written}


def loss(lecture: Lecture) -> dict[str, Any]:
    """The loss by hand: softmax, the targets' probabilities, log, mean, negative; then by `cross_entropy`."""
    model, (inputs_BT, targets_BT) = lecture.random_model, examples(lecture)
    with torch.no_grad():
        logits_BTV = model(inputs_BT, use_cache=False).logits
        hidden_BTC = model.model(inputs_BT, use_cache=False).last_hidden_state
    probas_BTV = torch.softmax(logits_BTV, dim=-1)
    print("Probabilities:", probas_BTV.shape)
    likeliest_BT = probas_BTV.argmax(dim=-1)
    print("Token IDs:\n", likeliest_BT)
    print("Targets batch 1:", lecture.decode(targets_BT[0]))
    print("Outputs batch 1:", lecture.decode(likeliest_BT[0]))

    target_probas_BT = probas_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
    print("Text 1:", target_probas_BT[0])
    print("Text 2:", target_probas_BT[1])
    log_probas = torch.log(target_probas_BT.flatten())
    print("Log probabilities:", log_probas)
    print("Mean:", log_probas.mean())
    by_hand = -log_probas.mean()
    print("Negative mean, the loss by hand:", by_hand)

    print("Flattened logits:", logits_BTV.flatten(0, 1).shape)
    print("Flattened targets:", targets_BT.flatten().shape)
    by_torch = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    print("cross_entropy:", by_torch)
    by_hfgpt = linear_cross_entropy(hidden_BTC, model.lm_head.weight, targets_BT)
    print("hfgpt.loss, which never holds all logits:", by_hfgpt.detach())
    return {
        "likeliest": likeliest_BT.tolist(),
        "target_probabilities": target_probas_BT.tolist(),
        "by_hand": by_hand.item(),
        "cross_entropy": by_torch.item(),
        "hfgpt": by_hfgpt.item(),
    }


def perplexity(lecture: Lecture) -> dict[str, Any]:
    """Perplexity: e to the loss, as many tokens as the model hesitates between."""
    inputs_BT, targets_BT = examples(lecture)
    with torch.no_grad():
        example_loss = lecture.random_model(
            inputs_BT, labels=inputs_BT, shift_labels=targets_BT, skip_logits=True, use_cache=False
        ).loss
    result = torch.exp(example_loss)
    print("Perplexity:", result)
    print(f"Of a model that knows nothing at all: {len(lecture.tokenizer)}, the size of the vocabulary")
    return {"perplexity": result.item()}


def examples(lecture: Lecture) -> tuple[Tensor, Tensor]:
    """The book's two example texts as inputs and targets, each (2, T): the targets are one token further on."""
    ids = encode_ids(lecture.tokenizer, list(EXAMPLES))
    length = min(map(len, ids))  # 4 of GPT-2's tokens each; other tokenizers may make unequal ones
    both = torch.tensor([each[:length] for each in ids])
    return both[:, :-1], both[:, 1:]


def windows(lecture: Lecture) -> dict[str, Any]:
    """The text split 90 to 10, and cut into windows whose targets are one token further on."""
    loaders = lecture.loaders
    counted = []
    for name, loader in (("Train", loaders.train), ("Validation", loaders.validation)):
        print(f"{name} loader:")
        shapes = [(batch["input_ids"].shape, batch["shift_labels"].shape) for batch in loader]
        for inputs, targets in shapes:
            print(inputs, targets)
        counted.append(sum(inputs.numel() for inputs, _ in shapes))
    print("Training tokens:", counted[0])
    print("Validation tokens:", counted[1])
    print("All tokens:", sum(counted))
    return {"training_tokens": counted[0], "validation_tokens": counted[1]}


def before(lecture: Lecture) -> dict[str, Any]:
    """Both losses before any training, from the book's initialisation and from GPT-2's."""
    figures: dict[str, Any] = {}
    for name, init in (("the book's", "book"), ("GPT-2's", "gpt2")):
        model = lecture.random_model if init == "book" else make_model(lecture.config, len(lecture.tokenizer), init)
        torch.manual_seed(lecture.config.seed)  # the loader shuffles
        train_loss, val_loss = (
            mean_loss(model, loader) for loader in (lecture.loaders.train, lecture.loaders.validation)
        )
        print(f"From {name} initialisation:")
        print("Training loss:", train_loss)
        print("Validation loss:", val_loss)
        figures[init] = {"train_loss": train_loss, "val_loss": val_loss}
    print(f"Of a model that knows nothing at all: {torch.tensor(len(lecture.tokenizer)).log():.3f}")
    return figures


def training(lecture: Lecture) -> dict[str, Any]:
    """Training: both losses every few steps, a sample after each epoch, the plot, and what it shows."""
    config = lecture.config
    if checkpoints(lecture.folder):
        lecture.newest()  # refuses another run's
        figures = lecture.figures()["training"]
        print(f"{lecture.folder} holds this run already; remove it to train again.")
    else:
        started_at = perf_counter()
        model = make_model(config, len(lecture.tokenizer), lecture.init)
        optimizer = make_optimizer(model, config.optim)
        records, position = train(
            model,
            optimizer,
            lecture.loaders,
            config.train,
            lambda: lecture.write_on(model, config.sample.max_new_tokens),
            TrainState(),
            config.train.epochs or 1,
        )
        figures = {"records": records, "elapsed_seconds": perf_counter() - started_at}
        print(f"Training completed in {figures['elapsed_seconds'] / 60:.2f} minutes.")
        lecture.keep("training", figures)  # before the checkpoint, by which a run that is done is known
        manifest = Manifest(position, lecture.identity())
        save_checkpoint(
            lecture.folder, manifest, model.save_pretrained, {"optimizer": optimizer}, config.train.keep_last
        )
    plot({f"{lecture.init} initialisation": figures["records"]}, lecture.folder / "loss.png", lecture.tokens_per_epoch)
    figures["overfitting"] = describe_overfitting(figures["records"], lecture.training_text, config.sample.prompt)
    print(figures["overfitting"])
    print(f"The two curves are in {lecture.folder / 'loss.png'}.")
    return figures


def temperature(lecture: Lecture) -> dict[str, Any]:
    """Temperature: nine words, drawn a thousand times at each of three temperatures."""
    counts = {}
    for value in TEMPERATURES:
        generator = torch.Generator().manual_seed(123)
        drawn = [
            decoding.sample_next_token(WORD_LOGITS, SamplingParams(temperature=value, top_k=0), generator).item()
            for _ in range(1000)
        ]
        counts[value] = torch.tensor(drawn).bincount(minlength=len(WORDS)).tolist()
        print(f"\nTemperature: {value:g}")
        for count, word in zip(counts[value], WORDS, strict=True):
            print(f"{count} x {word}")
    plot_temperatures(lecture.folder / "temperature.png")
    print(f"\nThe probabilities themselves are in {lecture.folder / 'temperature.png'}.")
    return {"counts": {f"{value:g}": each for value, each in counts.items()}}


def plot_temperatures(path: Path) -> None:
    """Draw the probabilities of the nine words at each temperature, side by side."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(ylabel="probability")
    width = 0.8 / len(TEMPERATURES)
    for number, value in enumerate(TEMPERATURES):
        probas = decoding.apply_temperature(WORD_LOGITS, value).softmax(-1)[0]
        places = torch.arange(len(WORDS)) + (number - 1) * width
        axes.bar(places.tolist(), probas.tolist(), width, label=f"temperature {value:g}")
    axes.set_xticks(range(len(WORDS)), WORDS)
    axes.legend()
    save(figure, path)


def top_k(lecture: Lecture) -> dict[str, Any]:
    """Top-k: only the likeliest few words may be drawn; then both on the model that was trained."""
    likeliest = WORD_LOGITS[0].topk(3)
    print("Top logits:", likeliest.values)
    print("Top positions:", likeliest.indices)
    kept = decoding.filter_top_k(WORD_LOGITS, 3)
    print("The rest masked:", kept[0])
    probas = kept.softmax(-1)[0]
    print("Probabilities:", probas)

    model, _ = trained_model(lecture)
    likeliest_text = lecture.write_on(model, 25)
    print("Output text, the likeliest token each time:\n", likeliest_text)
    torch.manual_seed(lecture.config.seed)
    drawn = lecture.write_on(model, 15, top_k=25, temperature=1.4)
    print("Output text, top-k 25, temperature 1.4:\n", drawn)
    return {
        "kept": likeliest.values.tolist(),
        "probabilities": probas.tolist(),
        "greedy": likeliest_text,
        "text": drawn,
    }


def trained_model(lecture: Lecture) -> tuple[HFGPTForCausalLM, Path]:
    """The model of the newest checkpoint in eval mode, and the checkpoint's folder."""
    path, _ = lecture.newest()
    return prepare(load(path)), path


def resume(lecture: Lecture) -> dict[str, Any]:
    """Model and optimizer back from the disk, and one epoch more."""
    config = lecture.config
    checkpoint, manifest = lecture.newest()
    print(f"{checkpoint}: {', '.join(sorted(path.name for path in checkpoint.iterdir()))}")
    model, _ = trained_model(lecture)
    optimizer = make_optimizer(model, config.optim)
    load_states(checkpoint, {"optimizer": optimizer})
    # The book seeds anew. `restore_random_states(checkpoint, config.seed)` would go on as if it had never stopped.
    torch.manual_seed(config.seed)
    records, _ = train(
        model,
        optimizer,
        lecture.loaders,
        config.train,
        lambda: lecture.write_on(model, config.sample.max_new_tokens),
        manifest.state,
        epochs=1,
    )
    return {"records": records}


def gpt2(lecture: Lecture) -> dict[str, Any]:
    """OpenAI's weights in the same classes: the same prompt, and both losses on the same windows."""
    try:
        model = load(lecture.weights or GPT2)
    except ValueError as error:
        if lecture.weights is not None:
            raise
        return leave_out(f"{error} With a folder that holds them: `weights=FOLDER`.")
    if model.config.vocab_size != len(lecture.tokenizer):
        return leave_out(
            f"the tokenizer has {len(lecture.tokenizer)} ids and the model {model.config.vocab_size}: "
            "they do not belong together."
        )
    torch.manual_seed(lecture.config.seed)
    written = lecture.write_on(model, 25, top_k=50, temperature=1.5)
    print("Output text:\n", written)
    train_loss, val_loss = (mean_loss(model, loader) for loader in (lecture.loaders.train, lecture.loaders.validation))
    print("Training loss:", train_loss)
    print("Validation loss:", val_loss)
    return {"text": written, "train_loss": train_loss, "val_loss": val_loss}


def leave_out(reason: str) -> dict[str, Any]:
    """Say that a step was not done, and why; there are no figures then."""
    print(f"Left out: {reason}")
    return {}


STEPS = {
    "text": text,
    "tokens": tokens,
    "gibberish": gibberish,
    "loss": loss,
    "perplexity": perplexity,
    "windows": windows,
    "before": before,
    "training": training,
    "temperature": temperature,
    "top_k": top_k,
    "resume": resume,
    "gpt2": gpt2,
}
