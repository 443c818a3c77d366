"""`hfgpt new`: a project of one's own that starts where hfgpt is.

The model's files are hfgpt's own under other names, made when they are asked for, so that there is nothing to keep in
step. What else belongs to a project is in `templates/`.
"""

import ast
import importlib.metadata
import importlib.util
import json
import keyword
import re
import sys
from pathlib import Path

import transformers
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hfgpt import __version__
from hfgpt.system.storage import check_absent, new_path
from hfgpt.weights.formats import gpt2
from hfgpt.weights.remote_code import PACKAGE, code_files

TEMPLATES = Path(__file__).parent / "templates"
MODEL = "modeling_hfgpt"
"""The module from which everything is found that travels with the weights."""

PROJECT_FILES = {
    "pyproject.toml.jinja": "pyproject.toml",
    "Makefile.jinja": "Makefile",
    "README.md.jinja": "README.md",
    "recipe.yaml.jinja": "recipe.yaml",
    "gitignore.jinja": ".gitignore",
    "package.py.jinja": "{name}/__init__.py",
    "weights.py.jinja": "{name}/weights.py",
    "test_project.py.jinja": "tests/test_{name}.py",
}
"""Template -> what it becomes."""

# What names hfgpt for its own sake, and is said otherwise in a project.
OTHERWISE = {
    "Install hfgpt, and `import hfgpt`, to import them.": "`hfgpt.weights.from_gpt2` imports them.",
}


def new_project(name: str, parent: str | Path = ".") -> Path:
    """Write a project; all of it, or nothing.

    Args:
        name: of the project's folder and package, and the `model_type` of its models.
        parent: the folder to make it in.

    Returns:
        The project's folder.

    Raises:
        ValueError: the name is taken, or is none for a package.
        FileExistsError: there is such a folder.
    """
    folder = Path(parent) / name
    check_name(name)
    check_absent(folder)
    with new_path(folder) as staged:
        for path, content in project_files(name).items():
            place = staged / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
    return folder


def check_name(name: str) -> None:
    """Refuse a name that no package, or no kind of model, can have.

    Raises:
        ValueError: saying why not.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"NAME must be one for a Python package, of small letters, digits and _, such as my_gpt; got {name!r}."
        )
    if name in transformers.CONFIG_MAPPING:
        raise ValueError(f"{name!r} is a kind of model that transformers knows already. Take another name.")
    is_taken = name == "tests" or name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None
    if is_taken:
        raise ValueError(f"{name!r} is the name of another Python package here. Take another.")


def project_files(name: str) -> dict[str, str]:
    """The files of a project: path -> content."""
    values = {"name": name, "prefix": class_prefix(name), "version": __version__}
    installed = importlib.metadata.distribution("hfgpt")
    values["requirement"] = requirement(installed.read_text("direct_url.json"))
    values["tables"] = "\n\n".join(assignment(Path(gpt2.__file__), table) for table in ("WHOLE_MODEL", "EACH_BLOCK"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    files = {
        path.format(name=name): environment.get_template(template).render(values)
        for template, path in PROJECT_FILES.items()
    }
    for file in code_files(PACKAGE, {"auto_map": {"AutoModel": f"{MODEL}."}}):
        files[f"{name}/{file.replace('hfgpt', name)}"] = renamed(file, name)
    # It goes where the code goes.
    if (license_text := installed.read_text("licenses/LICENSE")) is not None:
        files["LICENSE"] = license_text
    return files


def renamed(file: str, name: str) -> str:
    """One of hfgpt's own files with the names of a project."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for here, there in OTHERWISE.items():
        text = text.replace(here, there)
    text = text.replace("HFGPT", class_prefix(name)).replace("hfgpt", name)
    return f"# Began as {file} of hfgpt {__version__}, Apache-2.0.\n{text}"


def class_prefix(name: str) -> str:
    """MyGPT of my_gpt."""
    return "".join("GPT" if part == "gpt" else part.capitalize() for part in name.split("_"))


def assignment(file: Path, variable: str) -> str:
    """The source of a module's assignment to a variable."""
    source = file.read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            return ast.get_source_segment(source, node) or ""
    raise AssertionError(f"{file} has no {variable}")


def requirement(noted: str | None) -> str:
    """What a project that needs hfgpt asks pip for: the place from which this one was installed.

    Args:
        noted: direct_url.json, where pip and uv note a folder, a repository or a file; None if it came from an index.
    """
    if noted is None:
        return f"hfgpt>={__version__}"
    direct = json.loads(noted)
    url = direct["url"]
    if (repository := direct.get("vcs_info")) is not None:
        url = f"{repository['vcs']}+{url}@{repository['commit_id']}"
    if (part := direct.get("subdirectory")) is not None:
        url += f"#subdirectory={part}"
    return f"hfgpt @ {url}"
