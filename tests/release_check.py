"""Is the package fit to be published? Builds it, looks into it, and tries it in a new environment with nothing else.

    python tests/release_check.py dist [REQUIREMENT...]

Needs nothing but Python, and PyPI. The requirements are installed before hfgpt, which otherwise takes the newest of
everything: `torch==2.13.0+cpu` with `PIP_FIND_LINKS` set, say. `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`
makes pip take torch without 5 GB of CUDA. What was built is left in the folder only if all is well; the exit code is 1
if anything is not.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SMALL = "train.max_steps=60 optim.warmup_steps=5 train.eval_every=60 train.eval_rows=64 train.save_every=0".split()

WRITE_ON = """
import json, sys
if sys.argv[2] == "hfgpt":
    import hfgpt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

trust = {"trust_remote_code": True} if sys.argv[2] == "remote" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)
inputs = AutoTokenizer.from_pretrained(sys.argv[1], **trust)("The file object", return_tensors="pt")
words = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
cached, plain = (model.generate(**inputs, **words, use_cache=use_cache) for use_cache in (True, False))
torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-3, atol=1e-3)
print(json.dumps([type(model).__module__, cached.sequences[0].tolist()]))
"""
"""With and without a cache the model says the same; what it writes is printed."""


class Unfit(Exception):
    """Something is not as it should be."""


def tracked_files(*folders: str) -> set[str]:
    """What git holds, or would if it were asked to add everything, by its path in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def check_contents(wheel: Path) -> None:
    """Refuse a wheel that lacks a file, or holds one more.

    Raises:
        Unfit: naming the files.
    """
    carried = tracked_files("recipes", "cards/model_card.md", "cards/sentences.jinja")
    expected = tracked_files("hfgpt") | {f"hfgpt/{name}" for name in carried}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        about = {name.partition("/")[2]: archive.read(name) for name in names if ".dist-info/" in name}
    compare(wheel.name, {name for name in names if ".dist-info/" not in name}, expected)
    compare("its metadata", {*about}, {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"})
    if (
        about["licenses/LICENSE"] != (ROOT / "LICENSE").read_bytes()
        or b"hfgpt = hfgpt.cli:main" not in about["entry_points.txt"]
    ):
        raise Unfit(f"{wheel.name}: its license or its command is another.")


def check_source(archive: Path) -> None:
    """Refuse a source distribution that holds anything but what git holds.

    Raises:
        Unfit: naming the files.
    """
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    compare(archive.name, names - {"PKG-INFO"}, tracked_files())


def compare(what: str, names: set[str], expected: set[str]) -> None:
    if names != expected:
        raise Unfit(f"{what} lacks {sorted(expected - names)} and has {sorted(names - expected)} too much.")


class Place:
    """A new environment, and a folder outside of the repository to work in.

    Args:
        folder: to make both in.
        requirements: to install first.
    """

    def __init__(self, folder: Path, *requirements: str) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        (folder / "work").mkdir(parents=True)
        private = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.environment = {**os.environ, **private}
        self.environment.pop("PYTHONPATH", None)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        if requirements:
            self.run("python -m pip install --quiet", *requirements)

    def run(self, command: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command there; `command` is split at its spaces.

        Raises:
            Unfit: it ends with another exit code.
        """
        line = [*shlex.split(command), *words]
        print("$", shlex.join(line) if len(shlex.join(line)) < 200 else f"{shlex.join(line)[:200]} ...", flush=True)
        done = subprocess.run(line, cwd=self.folder / "work", env=self.environment, capture_output=True, text=True)
        if done.returncode != code:
            raise Unfit(f"exit code {done.returncode}, expected {code}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done

    def json(self, command: str, *words: str) -> dict:
        """Run a command whose stdout is one JSON object in a line."""
        said = self.run(command, *words).stdout
        if said.count("\n") != 1:
            raise Unfit(f"stdout is not one line:\n{said[-2000:]}")
        return json.loads(said)


def try_it(place: Place) -> None:
    """Do what the README does, by an installed hfgpt.

    Raises:
        Unfit: at the first thing that goes wrong.
    """
    text = "\n\n".join(f"Line {number} of a text about file objects and lists." for number in range(400))
    (place.folder / "work" / "my.txt").write_text(text, encoding="utf-8")
    (place.folder / "work" / "license.txt").write_text(text[:2000], encoding="utf-8")
    print(place.run("hfgpt --version").stdout + place.run("hfgpt recipes").stdout, end="")
    found = place.run("hfgpt recipes cpus").stdout
    if str(place.folder / "venv") not in found:
        raise Unfit(f"recipes are found in {found}")
    trained = place.json("hfgpt train demo --json", *SMALL)
    print(f"validation perplexity {trained['val_perplexity']:.1f}")
    small = "init_from=out/demo data.files=my.txt data.block_size=32 train.epochs=1 optim.warmup_steps=1"
    place.run(f"hfgpt train finetune {small} sample.max_new_tokens=3")
    place.run("hfgpt lecture tokens data.files=my.txt output_dir=out/lecture")
    place.run("python -m hfgpt.config.recipes.lecture.table")
    place.json("hfgpt evaluate out/demo --data my.txt --json")
    place.run("hfgpt card out/demo --check")
    place.json("hfgpt convert out/demo out/gpt2 --to gpt2 --verify --json")
    print(place.run("hfgpt push out/demo user/demo --dry-run").stdout, end="")

    said = place.run("hfgpt evaluate out/demo --data my.txt --tasks license", code=2).stderr
    if said.count("\n") != 1 or "lm-eval" not in said:
        raise Unfit(f"nothing says how lm-eval is installed: {said}")
    refused = place.run("hfgpt convert out/demo out/demo.gguf --to gguf", code=2).stderr
    print(refused, end="")
    place.run(refused.split("`")[3] + " --quiet")  # as it says
    place.run("hfgpt convert out/demo out/demo.gguf --to gguf")

    greedy = place.run(
        "hfgpt generate out/demo", "The file object", *"--temperature 0 --max-new-tokens 40".split()
    ).stdout
    print(greedy, end="")
    written = {
        kind: json.loads(place.run("python -c", WRITE_ON, f"out/{folder}", kind).stdout)
        for kind, folder in [("hfgpt", "demo"), ("gpt2", "gpt2")]
    }
    place.run("python -m pip uninstall --quiet --yes hfgpt")
    written["remote"] = json.loads(place.run("python -c", WRITE_ON, "out/demo", "remote").stdout)
    modules = {kind: module.partition(".")[0] for kind, (module, _) in written.items()}
    if modules != {"hfgpt": "hfgpt", "gpt2": "transformers", "remote": "transformers_modules"}:
        raise Unfit(f"the models are of {modules}")
    if len({tuple(ids) for _, ids in written.values()}) != 1:
        raise Unfit(f"the same model writes differently: {written}")


def main() -> int:
    """Run all checks; returns the exit code."""
    dist, *requirements = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="hfgpt-release-") as name:
        folder = Path(name)
        try:
            tools = Place(folder / "tools", "build", "twine")
            tools.run("python -m build --quiet --outdir", str(folder / "dist"), str(ROOT))
            (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
            tools.run("python -m twine check --strict", str(source), str(wheel))
            check_source(source)
            check_contents(wheel)
            print(f"{source.name} and {wheel.name} ({wheel.stat().st_size:,} bytes) hold what they should", flush=True)
            trial = Place(folder / "trial", *requirements)
            trial.run("python -m pip install --quiet", str(wheel))
            trial.run("python -m pip check")
            names = {requirement.partition(">")[0].lower() for requirement in PROJECT["dependencies"]}
            listed = json.loads(trial.run("python -m pip list --format json").stdout)
            print(", ".join(f"{each['name']} {each['version']}" for each in listed if each["name"].lower() in names))
            try_it(trial)
        except Unfit as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        Path(dist).mkdir(exist_ok=True)
        for path in (source, wheel):
            shutil.copy(path, dist)
    print(f"fit to be published: {dist}/{source.name}, {dist}/{wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
