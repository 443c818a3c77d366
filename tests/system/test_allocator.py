"""What a process does with freed memory, in processes of their own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as glibc and Linux make them")

COUNT = """
import resource, sys
{begin}
def step(megabytes):
    memory = bytearray(b"x") * (megabytes << 20)  # written, so that every page is touched
    del memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in range(1, 101, 9):
    step(megabytes)
before = faults()
for megabytes in range(1, 101, 9):
    step(megabytes)
# Not getrusage's: that of a process begins with the memory of the one that started it.
most = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(faults() - before, most)
"""


def count_faults(begin):
    """Page faults of steps like those before them, and the most memory, in KB."""
    run = subprocess.run([sys.executable, "-c", COUNT.format(begin=begin)], check=True, capture_output=True, text=True)
    return map(int, run.stdout.split())


def test_kept_memory_is_used_again_without_a_fault_and_does_not_grow():
    faults, most = count_faults("from hfgpt.system.allocator import use_allocator; use_allocator('keep')")

    assert faults < 100
    assert most < 250_000  # the largest step has 100 MB


@pytest.mark.parametrize(
    "begin", ["import hfgpt, hfgpt.loss", "from hfgpt.system.allocator import *; use_allocator('default')"]
)
def test_a_library_that_is_imported_leaves_memory_to_the_system(begin):
    faults, _ = count_faults(begin)

    assert faults > 5_000
