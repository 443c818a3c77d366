"""A part of `make faults`, which see: a run that is killed, however and however often, loses nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import datasets, torch
import faults
torch.set_num_threads(1)
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2]) / "cache"
datasets.disable_progress_bars()
recipe, whole = faults.whole_run(sys.argv[1], Path(sys.argv[2]))
print(faults.random_kills(recipe, whole, recipe.parent, 3))
print(faults.enumerated_kills(recipe, whole, recipe.parent, every=17))
print(faults.scripted_kills(recipe, whole, recipe.parent, ((2, 5, 6), (1,))))
print(faults.damages(whole, recipe.parent, 2, 20))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks")
@pytest.mark.parametrize("loop", ["accelerate", "trainer"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, loop):
    # In a process of its own: a child must not inherit the threads of this one.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, loop, tmp_path],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    kills, moments, scripted, damages = done.stdout.splitlines()
    assert kills.startswith("3 of 3 went on")
    assert moments.endswith("bit-equal")
    assert scripted == "2 of 2 bit-equal"
    assert damages.endswith("found, the one before taken")
