"""Words that typer does not understand: one line that says what is wrong with which, and what to type instead."""

import re
import sys
from typing import Any

from typer.exceptions import TyperException

from hfgpt.config.keys import as_override, suggest_key
from hfgpt.system.suggest import did_you_mean

COMMANDS_ELSEWHERE = {
    **dict.fromkeys(
        ("chat", "repl", "interactive", "talk", "shell"), "`hfgpt play MODEL` answers prompts line by line"
    ),
    **dict.fromkeys(
        ("serve", "server", "api"),
        "hfgpt has no server: `hfgpt convert MODEL NEW --to gguf` is for llama.cpp's, `--to gpt2` for others",
    ),
    **dict.fromkeys(
        ("finetune", "fine-tune", "fine_tune", "sft"), "`hfgpt train finetune data.files=my.txt` trains a GPT-2 further"
    ),
    **dict.fromkeys(("pretrain", "fit", "run", "start", "learn"), "Did you mean `hfgpt train RECIPE`?"),
    **dict.fromkeys(("resume", "continue"), "`hfgpt train RECIPE --resume` goes on with a run"),
    **dict.fromkeys(
        ("eval", "test", "perplexity", "ppl", "measure", "score", "benchmark", "validate"),
        "Did you mean `hfgpt evaluate MODEL --data FILE`?",
    ),
    **dict.fromkeys(("download", "fetch", "get", "clone"), "Did you mean `hfgpt pull USER/MODEL FOLDER`?"),
    **dict.fromkeys(("upload", "publish", "share"), "Did you mean `hfgpt push FOLDER USER/MODEL`?"),
    **dict.fromkeys(("login", "auth", "whoami", "logout"), "huggingface_hub has it: `hf auth login`"),
    **dict.fromkeys(
        ("sample", "infer", "inference", "predict", "complete", "write", "gen", "prompt", "text"),
        "Did you mean `hfgpt generate MODEL PROMPT`?",
    ),
    **dict.fromkeys(("prepare", "preprocess", "dataset"), "Did you mean `hfgpt data prepare RECIPE`?"),
    **dict.fromkeys(("tokenize", "train-tokenizer", "bpe"), "Did you mean `hfgpt tokenizer train FOLDER`?"),
    **dict.fromkeys(
        ("export", "import", "quantize", "gguf", "onnx"), "Did you mean `hfgpt convert FROM TO --to FORMAT`?"
    ),
    **dict.fromkeys(("plot", "diff", "visualize", "graph"), "Did you mean `hfgpt compare RUN RUN`?"),
    **dict.fromkeys(("list", "ls", "demo"), "`hfgpt recipes` lists what `hfgpt train` takes"),
    **dict.fromkeys(("init", "create", "scaffold"), "`hfgpt new` writes a project with a GPT of your own"),
    **dict.fromkeys(("info", "env", "status", "system"), "Did you mean `hfgpt doctor`?"),
    "version": "Did you mean `hfgpt --version`?",
    **dict.fromkeys(("install", "upgrade", "update"), "pip upgrades hfgpt, `hfgpt update-code FOLDER` a model's code"),
}
"""What people type who know another program, and what is done here."""

OPTIONS_ELSEWHERE = {
    **dict.fromkeys("max-length max-tokens length num-tokens n-tokens n-predict".split(), "max-new-tokens"),
    **dict.fromkeys("num-samples num-return-sequences n count".split(), "samples"),
    **dict.fromkeys("temp t".split(), "temperature"),
    **dict.fromkeys("k topk".split(), "top-k"),
    **dict.fromkeys("p topp nucleus".split(), "top-p"),
    **dict.fromkeys("beams beam beam-size".split(), "num-beams"),
    **dict.fromkeys("file files text input dataset data-file".split(), "data"),
    **dict.fromkeys("bs per-device-eval-batch-size".split(), "batch-size"),
    **dict.fromkeys("window max-seq-len block-size context-length".split(), "context"),
    "precision": "dtype",
    **dict.fromkeys("format output-format target".split(), "to"),
    **dict.fromkeys("out output o picture-file".split(), "picture"),
    **dict.fromkeys("branch tag".split(), "revision"),
    "msg": "commit-message",
    **dict.fromkeys(("V", "v", "ver"), "version"),
}
"""The same of options, without their dashes; taken where the command at hand has the option."""

KINDS = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a shorter number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""What pydantic, which reads typer's numbers, asked for."""


def describe_misuse(error: TyperException) -> str:
    """One line about words that typer does not understand: the nearest known ones, and the help to read."""
    message = error.format_message().strip()
    if not message:  # `hfgpt` alone: its help has been printed
        return ""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    where = context.command_path if context else "hfgpt"
    message = re.sub(r" \(Possible options: (.*)\)$", r". Did you mean \1?", message[0].lower() + message[1:])
    if command := re.match(r"no such command '([^']*)'", message):
        message = describe_command(command[0], command[1], message, where)
    elif hasattr(error, "option_name") and message.startswith("no such option"):
        message = describe_option(error.option_name, message, context)
    elif parameter is not None and error.__cause__ is not None and hasattr(error.__cause__, "errors"):
        message = describe_value(parameter, error.__cause__.errors()[0], message)
    elif message.startswith("missing argument") and context is not None:
        usage = " ".join([where, *context.command.collect_usage_pieces(context)[1:]])
        message = f"{message.rstrip('.')}. Write `{re.sub('[{}]', '', usage)}`"
    return f"{message}{'' if message[-1] in '.?' else '.'} See `{where} --help`."


def describe_command(unknown: str, name: str, message: str, where: str) -> str:
    """What a command that there is not may have meant; what typer itself finds near, if no other program knows it."""
    meant = COMMANDS_ELSEWHERE.get(name) if where == "hfgpt" else None
    return f"{unknown}. {meant}" if meant else message


def describe_option(option: str, message: str, context: Any) -> str:
    """What an option that there is not may have meant: an option of another name, or a key of a recipe."""
    parameters = context.command.params if context is not None else []
    options = [name for each in parameters for name in each.opts if name.startswith("--")]
    # typer reads `-lr` as `-l -r`; of `--lr=1` it names the part before the sign.
    typed = next((word for word in sys.argv[1:] if word.partition("=")[0] == option), None)
    typed = typed or next((word for word in sys.argv[1:] if word.startswith(option)), option)
    name, _, value = typed.lstrip("-").partition("=")
    message = f"no such option: {typed.partition('=')[0]}"
    if meant := OPTIONS_ELSEWHERE.get(name.replace("_", "-")):
        if f"--{meant}" in options:
            return f"{message}. Did you mean `--{meant}`?"
    if any(each.name in ("overrides", "words") for each in parameters):
        following = sys.argv[sys.argv.index(typed) + 1 :][:1] if typed in sys.argv and not value else []
        value = value or next((word for word in following if not word.startswith("-")), "VALUE")
        near = did_you_mean(f"--{name}", options, cutoff=0.8)
        if near:
            return f"{message}.{near}"
        return f"{message}. Values of a recipe have no dashes.{suggest_key(name, value, as_override)}"
    return f"{message}." + did_you_mean("--" + name.replace("_", "-"), options)


def describe_value(parameter: Any, found: dict[str, Any], message: str) -> str:
    """What the value of an option must be, and what it is."""
    kind = KINDS.get(found["type"])
    if kind is None:
        return message
    name = parameter.opts[-1] if parameter.opts else parameter.name
    return f"`{name}` must be {kind.format(**found.get('ctx', {}))}, got {found['input']!r}"
