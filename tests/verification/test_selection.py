import pytest

from engine.errors import InvalidArgument
from verification.selection import Selection
from verification.taps import RESULT_ORDER


def test_nothing_left_out_wants_everything():
    assert Selection().is_everything
    assert all(Selection().wants(tap, 3) for tap in RESULT_ORDER)
    assert Selection().has_grade("tokens")


@pytest.mark.parametrize(
    ("selection", "tap", "layer", "wanted"),
    [
        (Selection(taps=frozenset({"q"})), "q", 9, True),
        (Selection(taps=frozenset({"q"})), "k", 9, False),
        (Selection(layers=frozenset({2})), "q", 2, True),
        (Selection(layers=frozenset({2})), "q", 3, False),
        (Selection(layers=frozenset({0})), "embed", 0, False),
        (Selection(operations=frozenset({"linear"})), "down", 0, True),
        (Selection(operations=frozenset({"linear"})), "logits", 0, False),
        (Selection(operations=frozenset({"write_kv_cache"})), "write_kv_cache", 0, True),
        (Selection(grades=frozenset({"exact"})), "attn", 0, False),
        (Selection(grades=frozenset({"exact"})), "act", 0, True),
        (Selection(grades=frozenset({"bits"})), "attn", 0, True),
        (Selection(grades=frozenset({"tokens"})), "attn", 0, False),
    ],
)
def test_a_filter_keeps_what_it_names(selection, tap, layer, wanted):
    assert selection.wants(tap, layer) == wanted


@pytest.mark.parametrize(
    "selection",
    [{"taps": {"qq"}}, {"operations": {"gelu"}}, {"grades": {"allclose"}}],
    ids=str,
)
def test_a_name_that_nothing_has_is_refused_with_those_there_are(selection):
    with pytest.raises(InvalidArgument, match="there are"):
        Selection(**{key: frozenset(value) for key, value in selection.items()})


@pytest.mark.parametrize(
    ("selection", "is_empty"),
    [
        (Selection(), False),
        (Selection(grades=frozenset({"tokens"})), False),
        (Selection(taps=frozenset({"q"}), layers=frozenset({1})), False),
        (Selection(taps=frozenset({"argmax"}), layers=frozenset({1})), True),
        (Selection(taps=frozenset({"q"}), grades=frozenset({"tokens"})), True),
        (Selection(taps=frozenset({"q"}), operations=frozenset({"attention"})), True),
    ],
)
def test_filters_that_leave_nothing_are_told(selection, is_empty):
    assert selection.is_empty(num_layers=2) == is_empty


def test_tokens_need_the_whole_model():
    assert not Selection(layers=frozenset({1})).has_grade("tokens")
    assert Selection(grades=frozenset({"tokens"})).has_grade("tokens")
    assert not Selection(grades=frozenset({"exact"})).has_grade("tokens")
