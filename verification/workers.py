"""Runs independent pieces of tensor work side by side, each on one thread.

Grading is many small operations: torch's own threads would meet at a barrier after each of them,
which costs more than it gains, and far more on a machine that is busy. Results do not depend on the
number of workers: every piece is computed by one thread and handed back in order.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_WORKERS = 8  # each holds a layer's weights in float64

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    work: Callable[[T], R], items: Sequence[T], longest: Collection[T] = ()
) -> Iterator[R]:
    """The result of each item, in order, computed on as many threads as torch would use.

    Args:
        longest: items to begin with, so that none of them runs alone at the end.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(min(threads, MAX_WORKERS), initializer=_one_thread) as pool:
            begun = sorted(range(len(items)), key=lambda place: items[place] not in longest)
            futures = {place: pool.submit(work, items[place]) for place in begun}
            try:
                for place in range(len(items)):
                    yield futures.pop(place).result()
            finally:
                for future in futures.values():
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


def _one_thread() -> None:
    torch.set_num_threads(1)
