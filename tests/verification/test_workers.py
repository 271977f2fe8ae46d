import threading

import pytest
import torch

from verification.workers import in_order


def test_results_come_in_the_order_of_the_items():
    assert list(in_order(lambda x: x * x, range(50))) == [x * x for x in range(50)]


def test_the_longest_are_begun_first_and_come_in_their_place():
    both = threading.Barrier(2)  # two threads, so nothing else is begun before both are here
    is_met = threading.Event()

    def work(item: int) -> int:
        if item >= 48:
            both.wait(timeout=60)
            is_met.set()
        assert is_met.is_set()
        return item * item

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = list(in_order(work, range(50), longest=range(48, 50)))
    finally:
        torch.set_num_threads(threads)

    assert results == [x * x for x in range(50)]


def test_each_piece_runs_on_one_thread_and_torch_has_its_own_back_afterwards():
    before = torch.get_num_threads()
    inside = list(in_order(lambda _: torch.get_num_threads(), range(4)))

    assert inside == [1] * 4
    assert torch.get_num_threads() == before


def test_a_failure_reaches_the_caller_and_torch_has_its_threads_back():
    before = torch.get_num_threads()

    def fails(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(in_order(fails, range(3)))
    assert torch.get_num_threads() == before
