"""Runs independent pieces of tensor work side by side, each on one thread.

Grading is many small operations: torch's own threads would meet at a barrier after each of them,
which costs more than it gains, and far more on a machine that is busy. Results do not depend on the
number of workers: every piece is computed by one thread and handed back in order.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_WORKERS = 8  # each holds a layer's weights in float64

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The result of each item, in order, computed on as many threads as torch would use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(min(threads, MAX_WORKERS), initializer=_one_thread) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(threads)


def _one_thread() -> None:
    torch.set_num_threads(1)
