import pytest
import torch

from verification.workers import in_order


def test_results_come_in_the_order_of_the_items():
    assert list(in_order(lambda x: x * x, range(50))) == [x * x for x in range(50)]


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
