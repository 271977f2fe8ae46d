"""Every limit of the table, on both sides, by field, limit and value."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.sampling_params import SamplingParams

# Field -> what it must refuse, with what the message must say beside the field's name.
REFUSED = {
    "n": [(0, "from 1 to 128, got 0"), (129, "got 129"), (True, "integer"), (1.0, "integer")],
    "temperature": [
        (-0.1, "0 or from 1e-05 to 100.0, got -0.1"),
        (1e-6, "got 1e-06"),
        (100.1, "got 100.1"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (-math.inf, "got -inf"),
        ("1", "number.*got '1'"),
        (True, "number"),
        (None, "number"),
    ],
    "top_k": [
        (-1, "from 0 to 16777216, got -1"),
        (2**24 + 1, "got 16777217"),
        (10**60, r"got 1000\d*\.\.\.$"),
        (3.0, "integer"),
        (None, "integer"),
    ],
    "top_p": [
        (0, "from 1e-06 to 1.0, got 0"),
        (-0.5, "got -0.5"),
        (1.0000001, "got 1"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        ([0.5], "number"),
    ],
    "min_p": [(-1e-9, "from 0.0 to 1.0"), (1.5, "got 1.5"), (math.nan, "got nan"), ("x", "number")],
    "repetition_penalty": [
        (0, "from 0.01 to 100.0, got 0"),
        (-1.0, "got -1"),
        (101, "got 101"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
    ],
    "presence_penalty": [
        (-2.01, "from -2.0 to 2.0, got -2.01"),
        (2.01, "got 2.01"),
        (math.nan, "got nan"),
        (1j, "number"),
    ],
    "frequency_penalty": [
        (-2.01, "from -2.0 to 2.0, got -2.01"),
        (2.01, "got 2.01"),
        (-math.inf, "got -inf"),
        (None, "number"),
    ],
    "logit_bias": [
        ({5: 100.5}, "of 5 must be from -100.0 to 100.0, got 100.5"),
        ({5: math.nan}, "of 5.*got nan"),
        ({5: -math.inf}, "got -inf"),
        ({-1: 1.0}, "'s token id must be from 0 to 16777215, got -1"),
        ({2**24: 1.0}, "got 16777216"),
        ({"5": 1.0}, "token id must be an integer.*got '5'"),
        ({5: "x"}, "number"),
        ([(5, 1.0)], "must map token ids to numbers"),
        ({i: 0.0 for i in range(1025)}, "at most 1024 entries, got 1025"),
    ],
    "seed": [
        (-1, "from 0 to 18446744073709551615, got -1"),
        (2**64, "got 18446744073709551616"),
        (1.5, "integer"),
        (False, "integer"),
    ],
    "logprobs": [(-1, "from 0 to 20, got -1"), (21, "got 21"), (True, "integer"), (2.0, "integer")],
    "prompt_logprobs": [(-1, "from 0 to 20, got -1"), (21, "got 21"), ("1", "integer")],
    "stop": [
        ("", "strings of 1 to 256 characters, got one of 0"),
        (["a", ""], "got one of 0"),
        ("x" * 257, "got one of 257"),
        (["a", 3], "got 3"),
        (["a"] * 17, "at most 16 strings, got 17"),
        (5, "list of strings, got 5"),
        (b"bytes", "list of strings"),
        ({"a": 1}, "list of strings"),
    ],
    "stop_token_ids": [
        ([-1], "from 0 to 16777215, got -1"),
        ([2**24], "got 16777216"),
        ([1.0], "integer"),
        ([True], "integer"),
        (7, "list of token ids, got 7"),
        (np.array(7), "list of token ids"),
        ("7", "list of token ids"),
        (range(257), "at most 256 token ids, got 257"),
    ],
    "min_tokens": [(-1, "from 0 to 2147483647, got -1"), (17, "at most max_tokens 16, got 17")],
    "max_tokens": [(0, "from 1 to 2147483647, got 0"), (-5, "got -5"), (2**31, "got 2147483648")],
    "ignore_eos": [(1, "True or False, got 1"), (None, "got None")],
    "include_stop_str_in_output": [("no", "True or False, got 'no'")],
}

# Field -> legal values, the ends of its range among them.
ACCEPTED = {
    "n": [1, 2, 128, np.int64(3)],
    "temperature": [0, 0.0, 1e-5, 0.7, 1, 100, np.float32(0.5)],
    "top_k": [0, 1, 2**24],
    "top_p": [1e-6, 0.5, 1],
    "min_p": [0, 0.05, 1],
    "repetition_penalty": [0.01, 1, 1.3, 100],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
    "logit_bias": [None, {}, {0: -100}, {2**24 - 1: 100.0, 3: 0.5}, dict.fromkeys(range(1024), 1)],
    "seed": [None, 0, 2**64 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "stop": [None, (), "x", ["a", "b"], ("x" * 256,), ["s"] * 16],
    "stop_token_ids": [None, (), [0, 2**24 - 1], range(256), np.array([4, 5])],
    "min_tokens": [0, 16],
    "max_tokens": [1, 2**31 - 1, None],
    "ignore_eos": [False, True],
    "include_stop_str_in_output": [False, True],
}


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, *(value if isinstance(value, tuple) and table is REFUSED else (value,)))
        for name, values in table.items()
        for value in values
    ]


def test_every_field_is_tested_on_both_sides():
    names = {field.name for field in dataclasses.fields(SamplingParams)}

    assert set(REFUSED) == names
    assert set(ACCEPTED) == names


@pytest.mark.parametrize(("name", "value", "message"), cases(REFUSED))
def test_an_illegal_value_is_refused_by_field_limit_and_value(name: str, value, message: str):
    with pytest.raises(InvalidArgument, match=rf"^{name}.*{message}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_a_legal_value_is_kept(name: str, value):
    kept = getattr(SamplingParams(**{name: value}), name)

    if name in ("stop", "stop_token_ids"):
        expected = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        assert kept == expected
    else:
        assert kept == value


@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty"])
def test_numbers_become_plain_floats(name: str):
    assert type(getattr(SamplingParams(**{name: np.float32(1)}), name)) is float


def test_the_defaults_are_vllms():
    params = SamplingParams()

    assert (params.n, params.temperature, params.top_k, params.top_p) == (1, 1.0, 0, 1.0)
    assert (params.min_p, params.repetition_penalty, params.seed) == (0.0, 1.0, None)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0, 0, None)
    assert (params.logprobs, params.prompt_logprobs) == (None, None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert (params.min_tokens, params.max_tokens) == (0, 16)
    assert not params.ignore_eos and not params.include_stop_str_in_output


def test_greedy_has_one_answer():
    with pytest.raises(InvalidArgument, match=r"^n must be 1 when temperature is 0.*got 2"):
        SamplingParams(n=2, temperature=0)


def test_min_tokens_has_no_bound_but_its_own_without_max_tokens():
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_parameters_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 2.0


def test_changing_the_callers_containers_changes_nothing():
    bias, ids = {3: 1.0}, [4]
    params = SamplingParams(logit_bias=bias, stop_token_ids=ids)
    bias[5], ids[0] = 2.0, 9

    assert params.logit_bias == {3: 1.0}
    assert params.stop_token_ids == (4,)


def test_a_dictionary_gives_the_same_parameters():
    values = {"temperature": 0.5, "stop": "x", "n": 2}

    assert SamplingParams.from_dict(values) == SamplingParams(**values)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InvalidArgument, match=r"^temprature is no sampling parameter.*temperature"):
        SamplingParams.from_dict({"temprature": 0.5})


@pytest.mark.parametrize("values", [None, [], "temperature", 3])
def test_what_is_no_object_is_refused(values):
    with pytest.raises(InvalidArgument, match="must be an object"):
        SamplingParams.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logit_bias": {320: 1.0}}, "logit_bias must name ids under vocab_size 320, got 320"),
        ({"stop_token_ids": [5, 400]}, "stop_token_ids must name ids under.* 320, got 400"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(values: dict, message: str):
    params = SamplingParams(**values)
    params.check_vocabulary(401)

    with pytest.raises(InvalidArgument, match=message):
        params.check_vocabulary(320)


def test_top_k_may_exceed_the_vocabulary():
    SamplingParams(top_k=2**24).check_vocabulary(320)


HOSTILE = [
    math.nan, math.inf, -math.inf, -1, 10**60, -(10**60), 1e308, 2**63, 2**64, "x", "", b"x",
    True, None, [], {}, object(), 1j, [math.nan], {1: math.nan}, {"x": 1}, (None,), type,
]  # fmt: skip
TAKEN = {  # of these, what a field may be
    "presence_penalty": [-1],
    "frequency_penalty": [-1],
    "seed": [2**63, None],
    "logit_bias": [{}, None],
    "logprobs": [None],
    "prompt_logprobs": [None],
    "max_tokens": [None],
    "stop": ["x", [], None],
    "stop_token_ids": [[], None],
    "ignore_eos": [True],
    "include_stop_str_in_output": [True],
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_no_hostile_value_gets_past_a_field(name: str):
    taken = []
    for value in HOSTILE:
        try:
            SamplingParams(**{name: value})
        except InvalidArgument as error:
            assert str(error).startswith(name), (value, error)
        else:
            taken.append(value)

    assert sorted(map(repr, taken)) == sorted(map(repr, TAKEN.get(name, [])))


@given(
    st.dictionaries(
        st.sampled_from(sorted(REFUSED)),
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(),
            st.lists(st.integers(-2, 2), max_size=3), st.dictionaries(st.integers(), st.floats()),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_anything_is_taken_or_refused_by_name(values: dict):
    try:
        params = SamplingParams.from_dict(values)
    except InvalidArgument as error:
        assert any(str(error).startswith(name) for name in values)
    else:
        assert math.isfinite(params.temperature) and 0 < params.top_p <= 1
