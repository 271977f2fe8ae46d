import os
import subprocess
import sys

import pytest

COUNT = """
import os
os.sched_setaffinity(0, {cores})
from engine.bindings import Library
from engine.ops import Ops
library = Library()
before = len(os.listdir("/proc/self/task"))
with Ops(library, "cpu", {num_threads}):
    print(len(os.listdir("/proc/self/task")) - before)
"""


def num_started(cores: set[int], num_threads: int) -> int:
    code = COUNT.format(cores=cores, num_threads=num_threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("count", [1, 2])
def test_without_a_number_there_is_a_thread_for_each_core_that_may_be_used(count: int):
    cores = sorted(os.sched_getaffinity(0))[:count]
    if len(cores) < count:
        pytest.skip(f"requires {count} cores")

    assert num_started(set(cores), 0) == count - 1


def test_a_number_holds_whatever_the_cores():
    one = {min(os.sched_getaffinity(0))}

    assert num_started(one, 1) == 0
    assert num_started(one, 4) == 3
