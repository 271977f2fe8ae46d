"""Inputs as bf16 bits, and the one comparison of these tests: every bit, or the differences."""

import numpy as np

MAX_SHOWN = 5


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite values rounded to bfloat16 bits, nearest even."""
    word = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal values as bf16 bits."""
    return to_bf16(np.random.default_rng(seed).standard_normal(shape) * scale)


def wide(seed: int, *shape: int, spread: int = 12) -> np.ndarray:
    """Normal values times 2^-spread .. 2^spread as bf16 bits."""
    rng = np.random.default_rng(seed)
    return to_bf16(np.ldexp(rng.standard_normal(shape), rng.integers(-spread, spread + 1, shape)))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail, showing the first differing places, unless both arrays agree in every bit."""
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtypes {actual.dtype} and {expected.dtype}"
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    left, right = (np.ascontiguousarray(x).view(unsigned) for x in (actual, expected))
    different = left != right
    digits = 2 * actual.dtype.itemsize
    shown = [
        f"{tuple(map(int, at))}: {left[*at]:0{digits}x}, expected {right[*at]:0{digits}x}"
        for at in np.argwhere(different)[:MAX_SHOWN]
    ]
    assert not shown, f"{different.sum()} of {different.size} differ: {'; '.join(shown)}"
