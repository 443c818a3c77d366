"""The model card: README.md of a model folder, rendered from its results.json alone.

Every number in it was measured, and none was typed again: the template refuses what is missing, and `compare_card`
finds what was changed afterwards. Nothing is measured here.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined, UndefinedError

from hfgpt.config.recipes import package_file
from hfgpt.results.records import PLOT_FILE, RESULTS_FILE, fenced, read_results
from hfgpt.system.storage import write_atomically, write_json

TEMPLATE = "cards/model_card.md"
CARD_FILE, EVALUATION_FILE = "README.md", ".eval_results/perplexity.yaml"
MARKER = "<!-- Written by `hfgpt card` from results.json. What is changed here is overwritten. -->"
"""The line that tells a card from a README.md that someone wrote."""

STREAMED = ("train_tokens", "bigram_perplexity", "unigram_perplexity")
"""What cannot be measured of a text that is read as it comes, and not kept."""

WORDS = {
    "license": (r"[a-z0-9][a-z0-9.-]*", "the Hub's name of a license, such as apache-2.0, mit or cc-by-4.0"),
    "language": (r"[a-z]{2,3}|code|multilingual", "a code of ISO 639, such as en or ko"),
    "repo_id": (r"[\w.-]+/[\w.-]+", "the name of a repository on the Hub, such as user/model"),
}
"""What a card says that cannot be measured: how it must look, and what it is."""


def render_card(template: str, results: Mapping[str, Any], picture: str = PLOT_FILE) -> str:
    """Render a card.

    Args:
        template: text of a Jinja template, such as cards/model_card.md.
        results: what results.json holds.
        picture: of the losses, relative to the card.

    Raises:
        ValueError: the template shows something that `results` do not have, or a number that is none.
    """
    environment = Environment(
        loader=FileSystemLoader(package_file("cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": count,
        "decimal": decimal,
        "duration": duration,
        "fenced": fenced,
        "one_line": lambda text: text.strip().replace("\n", " "),
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),  # JSON's escapes are Python's too
        "scientific": lambda value: f"{number(value):.2e}",
        "short": short,
        "upper_first": lambda text: text[:1].upper() + text[1:],
    }
    try:
        run, sample = results["run"], results["run"]["sample"]
        return environment.from_string(template).render(
            **{**(dict.fromkeys(STREAMED) if run["data"]["streaming"] else {}), **results},
            metadata=metadata(results).to_yaml().strip(),
            marker=MARKER,
            architecture=architecture_in(results),
            # Without code beside the weights there is nothing to trust.
            trust="" if architecture_in(results) == "nanochat" else ", trust_remote_code=True",
            picture=picture,
            model_class=run.get("model_class"),  # a class of its author's own
            place=results["card"]["repo_id"] or ".",
            prompt=sample["prompt"] or "The",
            decoding=(
                f"do_sample=True, temperature={sample['temperature']}, top_k={sample['top_k']}"
                if sample["temperature"]
                else "do_sample=False"
            ),
            new_tokens=sample["max_new_tokens"] or min(40, run["model"]["max_position_embeddings"] // 2),
            text=describe_text(results),
            scored_part=scored_part(results),
            base=hub_link(run["base_model"], "a model that is not named here"),
            tokenizer_base=hub_link(run["tokenizer"]["name"], "one that was trained before"),
        )
    except (KeyError, UndefinedError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else error.message
        raise ValueError(
            f"results.json does not hold all that the card shows ({missing}): it is not of this version of hfgpt."
        ) from error


def architecture_in(results: Mapping[str, Any]) -> str:
    """What was trained, `gpt2` or `nanochat`; results from before there were two do not say it."""
    return results["run"]["model"].get("architecture", "gpt2")


def metadata(results: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads of a card."""
    run, words = results["run"], results["card"]
    dataset, name = run["data"]["hub_id"], words["repo_id"]
    on: dict[str, Any] = {
        "dataset_type": dataset or run["data"]["source"] or "text",
        "dataset_name": dataset or "Held-out text",
    }
    if dataset:
        on |= {"dataset_config": run["data"]["name"], "dataset_split": validation_split(run["data"])}
    measured = [("perplexity", "Perplexity per token", "val_perplexity"), ("loss", "Loss, nats per token", "val_loss")]
    return ModelCardData(
        license=words["license"],
        language=words["language"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfgpt"] if run.get("model_class") else ["hfgpt", architecture_in(results)],
        datasets=[dataset] if dataset else None,
        base_model=run["base_model"],
        model_name=name.partition("/")[2] if name else "hfgpt",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                metric_type=kind,
                metric_name=title,
                metric_value=round(number(results[key]), 4),
                **on,
            )
            for kind, title, key in measured
        ],
    )


def render_evaluation(results: Mapping[str, Any]) -> str | None:
    """The newer format of the same, `.eval_results/perplexity.yaml`, which speaks of data sets on the Hub only."""
    data = results["run"]["data"]
    if not data["hub_id"]:
        return None
    entry = EvalResultEntry(
        dataset_id=data["hub_id"],
        task_id=data["name"] or "default",
        value=round(number(results["val_perplexity"]), 4),
        notes=f"perplexity per token of the model's own tokenizer, {validation_split(data)}{scored_part(results)}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def validation_split(data: Mapping[str, Any]) -> str:
    return data["validation_split"] or f"{data['split']} (held-out part)"


def scored_part(results: Mapping[str, Any]) -> str:
    """Which rows of the validation text were scored at the end, in words; empty if all were."""
    there = results.get("validation_rows", 0)  # a run before this was counted scored all
    scored = results.get("scored_validation_rows", there)
    return "" if scored == there else f", the first {count(scored)} of {count(there)} rows"


def describe_text(results: Mapping[str, Any]) -> str:
    """What was trained on, in words; files of the user's are not named."""
    data = results["run"]["data"]
    if data["source"] == "pydoc":
        python = results["environment"]["python"]
        return f"the documentation of Python {python}, its manual and the docstrings of its standard library"
    if not data["hub_id"]:
        return "its author's own text, which is not named here"
    parts = [f"`{data[key]}`" for key in ("name", "split") if data[key]]
    return f"[{data['hub_id']}](https://huggingface.co/datasets/{data['hub_id']}) ({', '.join(parts)})"


def hub_link(name: str | None, otherwise: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if name else otherwise


def number(value: Any) -> float:
    """The value, if it is there and is a finite number; else an error."""
    if isinstance(value, Undefined):
        str(value)  # says which one
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"results.json holds {value!r} where the card shows a number.")
    return value


def count(value: Any) -> str:
    return f"{number(value):,.0f}"


def decimal(value: Any, digits: int) -> str:
    return f"{number(value):,.{digits}f}"


def short(value: Any) -> str:
    """1.1M of 1,135,744."""
    for size, letter in [(1e9, "B"), (1e6, "M"), (1e3, "k")]:
        if number(value) >= size:
            return f"{value / size:.1f}{letter}"
    return count(value)


def duration(value: Any) -> str:
    """4 min 4 s of 243.96 seconds."""
    minutes, seconds = divmod(round(number(value)), 60)
    hours, minutes = divmod(minutes, 60)
    units = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{amount} {unit}" for amount, unit in units if amount or unit == "s")


def card_paths(source: str | Path) -> tuple[Path, Path, str]:
    """Of a run's folder or a NAME.json: the results, the card that belongs to them, and the name of its picture.

    Raises:
        ValueError: there are no results.
    """
    source = Path(source)
    if source.suffix == ".json" and source.is_file():
        return source, source.with_suffix(".md"), f"{source.stem}.png"
    results = source / RESULTS_FILE
    if not results.is_file():
        raise ValueError(f"{source} holds no {RESULTS_FILE}: a card says what was measured. Train first.")
    return results, source / CARD_FILE, PLOT_FILE


def render_files(card: Path, results: Mapping[str, Any], picture: str) -> dict[Path, str]:
    """Path -> content of the card, and of what the Hub reads beside it."""
    files = {card: render_card(package_file(TEMPLATE).read_text(encoding="utf-8"), results, picture)}
    evaluation = render_evaluation(results)
    if evaluation is not None and card.name == CARD_FILE:
        files[card.parent / EVALUATION_FILE] = evaluation
    return files


def write_files(files: Mapping[Path, str]) -> None:
    for path, content in files.items():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.encode())


def is_foreign(card: Path) -> bool:
    """Whether someone wrote a README.md there that is no card of hfgpt's."""
    return card.is_file() and MARKER not in card.read_text(encoding="utf-8", errors="replace")


def leave_card(folder: Path, results: Mapping[str, Any]) -> bool:
    """Write the card of a run that ends, before its results.json; False, and nothing, if README.md is someone's own."""
    card = folder / CARD_FILE
    if is_foreign(card):
        return False
    write_files(render_files(card, results, PLOT_FILE))
    return True


def write_card(source: str | Path, words: Mapping[str, str] | None = None, verified: Any = None) -> Path:
    """Render README.md beside results.json.

    Args:
        source: a run's folder, or a NAME.json beside which NAME.md belongs.
        words: some of `WORDS`, to be said from now on; an empty one is said no more.
        verified: what `hfgpt.evaluation.verify_gpt2` found, to be shown from now on.

    Returns:
        The card's path.

    Raises:
        ValueError: there are no results, they do not hold all that the card shows, a word is none, or README.md is
            someone's own. Nothing has been written then.
    """
    results_path, card, picture = card_paths(source)
    results = read_results(results_path)
    for name, value in (words or {}).items():
        pattern, meaning = WORDS[name]
        if value and not re.fullmatch(pattern, value):
            raise ValueError(f"`--{name.replace('_', '-')}` must be {meaning}, got {value!r}.")
        results.setdefault("card", dict.fromkeys(WORDS))[name] = value or None
    if verified is not None:
        results["verified"] = verified
    files = render_files(card, results, picture)
    if is_foreign(card):
        raise ValueError(f"{card} was not written by `hfgpt card`. Move it away first.")
    if words or verified is not None:
        write_json(results_path, results)
    write_files(files)
    return card


def compare_card(source: str | Path) -> str | None:
    """What a card says otherwise than its results.json, or None if it says the same.

    Raises:
        ValueError: there are no results or no card, or the results do not hold all that the card shows.
    """
    results_path, card, picture = card_paths(source)
    for path, expected in render_files(card, read_results(results_path), picture).items():
        if not path.is_file():
            raise ValueError(f"there is no {path}. `hfgpt card {source}` writes it.")
        found = path.read_text(encoding="utf-8", errors="replace")
        if found != expected:
            return first_difference(path, found.splitlines(), expected.splitlines(), results_path.name)
    return None


def first_difference(path: Path, found: list[str], expected: list[str], results: str) -> str:
    """One line that names the first line in which they differ, and how."""
    same = 0
    while same < min(len(found), len(expected)) and found[same] == expected[same]:
        same += 1
    says, gives = ("".join(lines[same : same + 1]) for lines in (found, expected))
    begin = max(0, next((at for at, (a, b) in enumerate(zip(says, gives, strict=False)) if a != b), 0) - 30)
    says, gives = says[begin : begin + 80], gives[begin : begin + 80]
    return f"{path}, line {same + 1}: it says {says!r}, {results} gives {gives!r}."
