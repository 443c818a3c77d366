"""The lecture from the command line: whole, or some of its steps, with values that differ from lecture.yaml."""

import argparse
import sys
from pathlib import Path

from hfgpt.config.keys import as_override, check_keys
from hfgpt.config.loading import load_config, parse_override
from hfgpt.config.schema import RunConfig
from hfgpt.system.suggest import did_you_mean

from .book import INITIALISATIONS
from .korean import HEADINGS
from .steps import STEPS, Lecture

RECIPE = Path(__file__).with_name("lecture.yaml")

OPTIONS = (
    *("output_dir", "seed", "model", "tokenizer", "sample.prompt", "sample.max_new_tokens"),
    *("data.source", "data.name", "data.files", "data.validation_files", "data.text_column", "data.split"),
    *("data.validation_split", "data.validation_fraction", "data.shuffle_documents", "data.block_size", "data.stride"),
    *("optim.learning_rate", "optim.betas", "optim.weight_decay"),
    *("train.epochs", "train.batch_size", "train.eval_every", "train.eval_rows"),
)
"""The keys of a recipe, or their sections, that have an effect here."""


def main(arguments: list[str] | None = None) -> int:
    """Run steps; returns the exit code."""
    shown = "\n".join(f"  {name:12}{(step.__doc__ or '').splitlines()[0]}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m hfgpt.config.recipes.lecture",
        description="The lecture on pretraining a GPT, whole or step by step.",
        epilog=f"steps, in their order:\n{shown}\n\n"
        f"keys: weights, init, language, and of lecture.yaml {', '.join(OPTIONS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="STEP | KEY=VALUE", help="no step means all of them")
    words = parser.parse_args(arguments).words
    try:
        run([word for word in words if "=" not in word], [word for word in words if "=" in word])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(names: list[str], overrides: list[str]) -> None:
    """Run the named steps, or all, in the lecture's order; what they measure is kept in `output_dir`.

    Raises:
        ValueError: an unknown step, a key without effect here, or what a step refuses.
    """
    for name in names:
        if name not in STEPS:
            raise ValueError(f"there is no step {name!r}.{did_you_mean(name, STEPS)} There are {', '.join(STEPS)}.")
    lecture = make_lecture(overrides)
    lecture.refuse_another_run()
    for name, step in STEPS.items():
        if names and name not in names:
            continue
        print(f"\n--- {name}: {HEADINGS[name] if lecture.language == 'ko' else step.__doc__}", flush=True)
        lecture.keep(name, step(lecture))


def make_lecture(overrides: list[str]) -> Lecture:
    """Read lecture.yaml and what differs from it.

    Raises:
        ValueError: a key that is unknown or has no effect here, or a value that does not fit.
    """
    own = {"weights": None, "init": "book", "language": "en"}
    others = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in own:
            own[key] = value
        else:
            others.append(override)
            check_keys(parse_override(override), as_override)
            if not any(key == option or key.startswith(f"{option}.") for option in OPTIONS):
                keys = ", ".join([*own, *OPTIONS])
                raise ValueError(f"`{key}` has no effect in the lecture. These keys have: {keys}.")
    if own["init"] not in INITIALISATIONS:
        raise ValueError(f"`init` must be one of {list(INITIALISATIONS)}, got {own['init']!r}.")
    if own["language"] not in ("en", "ko"):
        raise ValueError(f"`language` must be one of ['en', 'ko'], got {own['language']!r}.")
    if any(override.startswith("data.source=") for override in others):
        others.append("data.files=null")  # one of the two, and the recipe names files
    config = load_config(RECIPE, others)
    if not isinstance(config.train.eval_every, int):
        raise ValueError(f"`train.eval_every` must be a number of steps here, got {config.train.eval_every!r}.")
    default: RunConfig = load_config(RECIPE)
    return Lecture(
        config, own["weights"], str(own["init"]), config.data.files == default.data.files, str(own["language"])
    )


if __name__ == "__main__":
    sys.exit(main())
