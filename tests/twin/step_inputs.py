"""What Hypothesis draws for the k16 step: every corner of the format more often than its middle."""

from hypothesis import strategies as st

EXPONENTS = st.one_of(
    st.integers(0, 254),
    st.integers(0, 3),  # denormals and their neighbours
    st.integers(115, 139),  # near 1, where the cuts bite
    st.integers(240, 254),
)
SIGNIFICANDS = st.one_of(st.integers(0, 127), st.sampled_from([0, 1, 126, 127]))
SIGNS = st.integers(0, 1)


def _operand(sign: int, exponent: int, significand: int) -> int:
    return sign << 15 | exponent << 7 | significand


OPERAND = st.builds(_operand, SIGNS, EXPONENTS, SIGNIFICANDS)
# One exponent for all, or each its own, or mostly zeros.
OPERANDS = st.one_of(
    st.lists(OPERAND, min_size=16, max_size=16),
    EXPONENTS.flatmap(
        lambda exponent: st.lists(
            st.builds(_operand, SIGNS, st.just(exponent), SIGNIFICANDS), min_size=16, max_size=16
        )
    ),
    st.lists(st.one_of(st.sampled_from([0, 0x8000]), OPERAND), min_size=16, max_size=16),
)
ACCUMULATOR = st.builds(
    lambda sign, exponent, low: sign << 31 | exponent << 23 | low,
    SIGNS,
    EXPONENTS,
    st.one_of(st.integers(0, 2**23 - 1), st.sampled_from([0, 1, 2**23 - 1])),
)
