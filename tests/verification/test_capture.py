from pathlib import Path

import numpy as np
import pytest

from engine.model_runner import ModelRunner
from engine.models import resolve
from verification.capture import capture, capture_bit_hashes, engine_config_for
from verification.prompts import Prompt
from verification.taps import all_keys


@pytest.fixture(scope="module")
def toy() -> Path:
    return resolve("toy")


def prompt(name: str, *token_ids: int) -> Prompt:
    return Prompt(name, "for this test", token_ids)


def run(toy: Path, prompts: list[Prompt], **config) -> dict:
    with ModelRunner(toy, engine_config_for(prompts, "cpu", **config)) as runner:
        return capture_bit_hashes(runner, prompts)


def test_every_tap_of_every_layer_is_captured_with_one_row_per_token(toy: Path):
    one = prompt("one", *range(20))

    with ModelRunner(toy, engine_config_for([one], "cpu")) as runner:
        values = capture(runner, one)

    assert list(values) == list(all_keys(2))
    rows = {key: len(value) for key, value in values.items()}
    assert {rows.pop(("final_norm", 0)), rows.pop(("logits", 0))} == {1}
    assert set(rows.values()) == {20}


def test_hashes_do_not_depend_on_what_ran_before_threads_or_block_size(toy: Path):
    one, two = prompt("one", *range(140)), prompt("two", *range(100, 90, -1))

    alone = run(toy, [one])["one"]

    assert run(toy, [two, one])["one"] == alone
    assert run(toy, [one], num_threads=1)["one"] == alone
    assert run(toy, [one], block_size=16)["one"] == alone


def test_another_last_token_changes_every_tap(toy: Path):
    hashes = run(toy, [prompt("a", 1, 2, 3), prompt("b", 1, 2, 4)])

    assert all(hashes["a"][key] != hashes["b"][key] for key in all_keys(2))


def test_values_are_those_of_the_logits_the_engine_returns(toy: Path):
    from engine.batch import SequenceSlice, build_batch

    one = prompt("one", 5, 6, 7)
    with ModelRunner(toy, engine_config_for([one], "cpu")) as runner:
        values = capture(runner, one)
        step = runner.forward(build_batch([SequenceSlice((5, 6, 7), 0, [0])], 128))

    assert np.array_equal(values[("logits", 0)], step.logits)


def test_room_is_made_for_the_longest_prompt():
    config = engine_config_for([prompt("a", 1), prompt("b", *range(129))], "cpu")

    assert (config.max_num_tokens, config.num_blocks) == (129, 2)
