"""The code that lies beside saved weights: compared with this hfgpt's, and replaced by it.

transformers calls it remote code. Here it is read and compared, never run.
"""

import json
import logging
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from hfgpt import __version__
from hfgpt.system.storage import MANIFEST, amended_manifest, check_files, new_path, sync, write_atomically

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
MODEL_TYPE = "hfgpt"


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error or 'nested too deeply'}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it must hold an object.")
    return config


def named_modules(folder: Path, config: dict[str, Any]) -> list[str]:
    """The modules of a folder that config.json's `auto_map` names; those of other repositories are none of it.

    Raises:
        ValueError: `auto_map` is damaged.
    """
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"{folder / 'config.json'}: `auto_map` must hold an object, got {auto_map!r}.")
    references = [one for value in auto_map.values() for one in (value if isinstance(value, list) else [value])]
    return [str(one).partition(".")[0] for one in references if one and "--" not in str(one)]


def code_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """The Python files that config.json's `auto_map` names, and those that they import from beside them.

    Raises:
        ValueError: one is not there.
    """
    waiting = named_modules(folder, config)
    found: list[str] = []
    while waiting:
        module = waiting.pop()
        path = folder / f"{module}.py"
        if path.name in found:
            continue
        if not re.fullmatch(r"\w+", module) or not path.is_file():
            raise ValueError(f"{path} is missing: config.json and its code name it. Save the model again.")
        found.append(path.name)
        text = path.read_text(encoding="utf-8", errors="replace")
        waiting += re.findall(r"^\s*from\s+\.(\w+)\s+import\b", text, flags=re.MULTILINE)
    return found


def own_code() -> dict[str, bytes]:
    """What this hfgpt puts beside the weights that it saves: name -> content."""
    names = code_files(PACKAGE, {"auto_map": own_auto_map()})
    return {name: (PACKAGE / name).read_bytes() for name in sorted(names)}


def own_auto_map() -> dict[str, str]:
    """What this hfgpt writes into config.json."""
    from hfgpt.modeling_hfgpt import AUTO_MAP  # torch and transformers, which a pull does not need

    return AUTO_MAP


def is_same(path: Path, content: bytes) -> bool:
    """Whether a file is there and has this content; git may have changed the line ends of either."""
    return path.is_file() and path.read_bytes().replace(b"\r\n", b"\n") == content.replace(b"\r\n", b"\n")


def describe_other_code(folder: Path) -> str | None:
    """What to say of the code in a folder that is not this hfgpt's; None if it is, or if there is none.

    Raises:
        ValueError: config.json is damaged.
    """
    config = read_config(folder)
    if config.get("model_type") != MODEL_TYPE or not named_modules(folder, config):
        return None
    differing = [name for name, content in own_code().items() if not is_same(folder / name, content)]
    if not differing:
        return None
    return (
        f"{folder}: its code ({', '.join(differing)}), which runs where hfgpt is not imported, is not that of this "
        f"hfgpt ({__version__}) but older, newer or changed by hand. "
        f"`hfgpt update-code {shlex.quote(str(folder))}` replaces it; the weights stay as they are."
    )


def warn_of_other_code(folder: Path) -> None:
    """Say on one line, of the first process, that a folder whose weights are read here holds other code than runs here.

    Raises:
        ValueError: config.json is damaged.
    """
    difference = describe_other_code(folder)
    if difference is not None and os.environ.get("RANK", "0") == "0":
        logger.warning(difference)


@dataclass(frozen=True)
class CodeUpdate:
    """What became of a folder's code.

    Attributes:
        replaced: names of the files that were written, in place of others or anew; none if all were this hfgpt's.
        kept_in: folder that holds the old ones; None if there were none.
    """

    replaced: list[str]
    kept_in: Path | None


def update_code(folder: str | Path) -> CodeUpdate:
    """Give a model folder this hfgpt's code; all else in it stays as it is, to the byte.

    What is replaced is kept in a folder beside it, since it may be newer than this hfgpt, or somebody's own. A kill
    leaves some files old and some new: the same again does the rest.

    Args:
        folder: of a run, a checkpoint, a converted or a pulled model. A checkpoint's manifest follows.

    Raises:
        ValueError: there is no hfgpt model, or its config.json or manifest is damaged. Nothing was changed.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds no hfgpt model: the `model_type` of its config.json is {config.get('model_type')!r}."
        )
    named_modules(folder, config)  # or `auto_map` is damaged
    code = own_code()
    new = {name: content for name, content in code.items() if not is_same(folder / name, content)}
    auto_map = {**(config.get("auto_map") or {}), **own_auto_map()}
    if auto_map != config.get("auto_map"):
        new["config.json"] = (json.dumps({**config, "auto_map": auto_map}, indent=2, sort_keys=True) + "\n").encode()
    if new and (folder / MANIFEST).is_file():
        unchanged = {name: (folder / name).read_bytes() for name in code.keys() - new.keys()}
        manifest = amended_manifest(folder, unchanged | new)
        if manifest != (folder / MANIFEST).read_bytes():
            check_files(folder, ["config.json"])
            # First of all: then what a kill leaves is told from a config.json that somebody edited.
            new = {MANIFEST: manifest, **new}
    kept_in = None
    replaced = [name for name in new if name != MANIFEST]
    old = [name for name in replaced if (folder / name).is_file()]
    if old:
        kept_in = next(path for number in count(1) if not (path := folder / f"replaced-code-{number}").exists())
        with new_path(kept_in) as staged:
            staged.mkdir()
            for name in old:
                shutil.copyfile(folder / name, staged / name)
    for name, content in new.items():
        write_atomically(folder / name, content)
    sync(folder)
    return CodeUpdate(replaced, kept_in)
