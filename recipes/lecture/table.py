"""The lecture's figures beside the book's: `python -m hfgpt.config.recipes.lecture.table [--korean] [FILE]`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .training import evaluations

HERE = Path(__file__).parent
PROMPT = "Every effort moves you"

HEADS = {"english": ("", "the book", "measured"), "korean": ("", "책", "측정")}


def quote(text: str) -> str:
    """What was written after the prompt, cut short."""
    written = " ".join(text.removeprefix(PROMPT).split())
    return f"…{written[:48]}…" if len(written) > 48 else f"…{written}"


def losses(record: dict[str, Any], digits: int = 3) -> str:
    return f"{record['train_loss']:.{digits}f}, {record['val_loss']:.{digits}f}"


def at_step(step: int) -> Callable[[dict[str, Any]], str]:
    def cell(figures: dict[str, Any]) -> str:
        return losses(next(each for each in evaluations(figures["training"]["records"]) if each["step"] == step))

    return cell


def counts(temperature: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: " ".join(map(str, figures["temperature"]["counts"][temperature]))


ROWS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    (
        "characters / tokens of the story",
        "이야기의 글자 수 / 토큰 수",
        lambda figures: f"{figures['text']['characters']:,} / {figures['text']['tokens']:,}",
    ),
    (
        "an untrained model goes on",
        "훈련하지 않은 모델이 이어 쓴 글",
        lambda figures: quote(figures["gibberish"]["text"]),
    ),
    (
        "loss of the two examples",
        "두 예문의 손실(교차 엔트로피)",
        lambda figures: f"{figures['loss']['cross_entropy']:.4f}",
    ),
    (
        "their perplexity",
        "두 예문의 퍼플렉서티(혼란도)",
        lambda figures: f"{figures['perplexity']['perplexity']:,.2f}",
    ),
    (
        "tokens in windows: training / validation",
        "창에 담긴 토큰: 훈련 / 검증",
        lambda figures: f"{figures['windows']['training_tokens']:,} / {figures['windows']['validation_tokens']:,}",
    ),
    (
        "losses before training, the book's initialisation",
        "훈련 전 손실, 책의 초기화",
        lambda figures: losses(figures["before"]["book"], 4),
    ),
    (
        "losses before training, GPT-2's initialisation",
        "훈련 전 손실, GPT-2의 초기화",
        lambda figures: losses(figures["before"]["gpt2"], 4),
    ),
    ("losses after step 0, epoch 1", "0번째 스텝 뒤의 손실, 에포크 1", at_step(0)),
    ("losses after step 20, epoch 3", "20번째 스텝 뒤의 손실, 에포크 3", at_step(20)),
    ("losses after step 40, epoch 5", "40번째 스텝 뒤의 손실, 에포크 5", at_step(40)),
    ("losses after step 60, epoch 7", "60번째 스텝 뒤의 손실, 에포크 7", at_step(60)),
    ("losses after step 85, epoch 10", "85번째 스텝 뒤의 손실, 에포크 10", at_step(85)),
    ("nine words, temperature 1", "아홉 단어, 온도 1", counts("1")),
    ("nine words, temperature 0.1", "아홉 단어, 온도 0.1", counts("0.1")),
    ("nine words, temperature 5", "아홉 단어, 온도 5", counts("5")),
    (
        "the trained model, greedy",
        "훈련한 모델, 탐욕적 디코딩",
        lambda figures: quote(figures["top_k"]["greedy"]),
    ),
    (
        "the trained model, top-k 25, temperature 1.4",
        "훈련한 모델, top-k 25, 온도 1.4",
        lambda figures: quote(figures["top_k"]["text"]),
    ),
    (
        "resumed, first losses of the eleventh epoch",
        "이어서 훈련, 열한 번째 에포크의 첫 손실",
        lambda figures: losses(evaluations(figures["resume"]["records"])[0]),
    ),
    (
        "GPT-2's weights, losses",
        "GPT-2 가중치의 손실",
        lambda figures: losses(figures["gpt2"], 4),
    ),
]
"""What a row is called in each language, and how it is read from the figures. Losses: training, validation."""


def render(measured: dict[str, Any], language: str = "english") -> str:
    """The table; what was not measured is a dash."""
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    lines = [f"| {' | '.join(HEADS[language])} |", "|---|---|---|"]
    for english, korean, read in ROWS:
        label = korean if language == "korean" else english
        lines.append(f"| {label} | {cell(read, published)} | {cell(read, measured)} |")
    return "\n".join(lines)


def largest_difference(measured: dict[str, Any]) -> float:
    """How far the losses of the training lie from the published ones at the most, in nats per token."""
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    pairs = zip(*(evaluations(figures["training"]["records"]) for figures in (measured, published)), strict=True)
    return max(abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in ("train_loss", "val_loss"))


def cell(read: Callable[[dict[str, Any]], str], figures: dict[str, Any]) -> str:
    try:
        return read(figures)
    except (KeyError, StopIteration):
        return "-"


def main() -> None:
    """Print the table of a lecture.json, or of the one that the repository holds."""
    parser = argparse.ArgumentParser(prog="python -m hfgpt.config.recipes.lecture.table", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "measured.json")
    parser.add_argument("--korean", action="store_true")
    arguments = parser.parse_args()
    figures = json.loads(arguments.file.read_text(encoding="utf-8"))
    print(render(figures, "korean" if arguments.korean else "english"))


if __name__ == "__main__":
    main()
