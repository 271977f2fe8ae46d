import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from verification.prompts import (
    PROMPTS_PATH,
    PromptSpec,
    default_selection,
    load_specs,
    names_prompts,
    prompts_for,
    select,
    to_prompt,
)

TILE_EDGES = (1, 2, 15, 16, 17, 127, 128, 129, 511, 512, 513)


def encode_bytes(text: str, with_special: bool) -> list[int]:
    return [256] * with_special + list(text.encode())


def write_prompts(path: Path, *lines: dict | str) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_every_tile_edge_has_a_prompt_of_exactly_that_length():
    specs = {spec.id: spec for spec in load_specs()}

    for length in TILE_EDGES:
        prompt = to_prompt(specs[f"len-{length}"], encode_bytes, vocab_size=320)

        assert len(prompt.token_ids) == length


def test_the_golden_prompts_are_at_least_24_and_each_says_why():
    specs = load_specs()

    assert len([spec for spec in specs if not spec.models]) >= 24
    assert all(len(spec.why) > 10 for spec in specs)


def test_the_toy_set_crosses_a_segment_and_other_models_do_not_carry_its_cost(tmp_path: Path):
    toy = prompts_for("toy-gqa3", tmp_path, 320, "quick")
    other = prompts_for("smollm2-135m", tmp_path, 49152, "all")

    assert max(len(prompt.token_ids) for prompt in toy) > 1024
    assert max(len(prompt.token_ids) for prompt in other) < 1024


def test_without_a_tokenizer_a_prompt_is_its_bytes(tmp_path: Path):
    (prompt,) = prompts_for("toy", tmp_path, 256, "capital")

    assert bytes(prompt.token_ids) == b"The capital of France is"


def test_special_tokens_open_a_prompt_once_even_where_its_text_repeats():
    spec = PromptSpec("p", "why", text="ab", num_tokens=6)

    prompt = to_prompt(spec, encode_bytes, vocab_size=320)

    assert prompt.token_ids == (256, 97, 98, 97, 98, 97)


@given(
    ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30),
    vocab_size=st.integers(1, 200_000),
    num_tokens=st.none() | st.integers(1, 100),
)
def test_token_ids_are_legal_in_every_vocabulary(ids, vocab_size, num_tokens):
    spec = PromptSpec("p", "why", token_ids=tuple(ids), num_tokens=num_tokens)

    prompt = to_prompt(spec, encode_bytes, vocab_size)

    assert all(0 <= token < vocab_size for token in prompt.token_ids)
    assert len(prompt.token_ids) == (num_tokens or len(ids))


def test_prompts_of_other_ids_have_another_hash():
    one = to_prompt(PromptSpec("p", "why", token_ids=(1, 2)), encode_bytes, 320)
    two = to_prompt(PromptSpec("p", "why", token_ids=(2, 1)), encode_bytes, 320)

    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ({"id": "b", "text": "x"}, "'why' is missing"),
        ({"id": "b", "why": "w", "txt": "x"}, "'txt'"),
        ({"id": "b", "why": "w"}, "exactly one of"),
        ({"id": "b", "why": "w", "text": "x", "token_ids": [1]}, "exactly one of"),
        ({"id": "b", "why": "w", "text": ""}, "at least one token"),
        ({"id": "b", "why": "w", "token_ids": []}, "at least one token"),
        ({"id": "b", "why": "w", "repeat": {"text": "", "times": 2}}, "at least one token"),
        ({"id": "b", "why": "w", "repeat": {"text": "x", "times": 0}}, "at least one token"),
        ({"id": "b", "why": "w", "text": "x", "num_tokens": 0}, "num_tokens"),
        ({"id": "a", "why": "w", "text": "x"}, "used twice"),
    ],
)
def test_a_bad_line_is_refused_by_number_and_field(tmp_path: Path, line, named: str):
    path = write_prompts(tmp_path / "prompts.jsonl", {"id": "a", "why": "w", "text": "x"}, line)

    with pytest.raises(InvalidArgument, match="line 2") as caught:
        load_specs(path)

    assert named in str(caught.value)


def test_an_unknown_prompt_is_refused_with_the_legal_ids():
    with pytest.raises(InvalidArgument, match="'nonsense'; legal: all, quick.*len-17"):
        select(load_specs(), "len-1,nonsense")


def test_a_selection_keeps_the_order_of_the_file():
    chosen = select(load_specs(), "len-17, len-1")

    assert [spec.id for spec in chosen] == ["len-1", "len-17"]


def test_the_prompt_file_ends_in_one_newline_and_is_utf_8():
    text = PROMPTS_PATH.read_bytes().decode("utf-8")

    assert text.endswith("}\n")
    assert not text.endswith("\n\n")


def test_a_run_that_names_no_prompts_takes_all_but_of_a_toy_the_short_set():
    assert default_selection("smollm2-135m") == "all"
    assert default_selection("toy-gqa3") == "quick"
    assert default_selection("toyota-1b") == "all"  # somebody's own


@pytest.mark.parametrize(
    ("selection", "names_them"),
    [(None, False), ("all", False), ("quick", False), ("len-1", True), ("len-1,len-17", True)],
)
def test_a_set_of_prompts_names_none_of_them(selection: str | None, names_them: bool):
    assert names_prompts(selection) is names_them
