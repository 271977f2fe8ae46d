"""Inputs for the bit tests, and the comparison: every bit equal, or the differences are shown.

Holds no expected values: the twin computes those.
"""

import ml_dtypes
import numpy as np

# Around fragments of 8, tiles of 16, 32, 64 and 128, and their multiples; then many.
NUM_TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 1000, 4096)
MAX_SHOWN = 5


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of values rounded to bfloat16, uint16, same shape."""
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal values as bf16 bits."""
    rng = np.random.default_rng(seed)
    return to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(scale))


def wide(seed: int, *shape: int, spread: int = 12) -> np.ndarray:
    """Normal values times 2^-spread .. 2^spread, as bf16 bits: the cuts of the k16 step bite."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-spread, spread + 1, shape)
    return to_bf16(np.ldexp(rng.standard_normal(shape), exponents))


def assert_same_bits(gpu: np.ndarray, twin: np.ndarray, *, any_nan: bool = False) -> None:
    """Fail with the first differing elements unless the arrays agree in every bit.

    Args:
        gpu, twin: the two results, same shape and dtype.
        any_nan: float32 only; a NaN on both sides counts as equal whatever its payload.
    """
    assert gpu.shape == twin.shape and gpu.dtype == twin.dtype
    unsigned = np.dtype(f"u{gpu.dtype.itemsize}")
    left, right = (np.ascontiguousarray(x).view(unsigned) for x in (gpu, twin))
    different = left != right
    if any_nan:
        different &= ~(np.isnan(gpu) & np.isnan(twin))
    count = int(different.sum())
    where = np.argwhere(different)[:MAX_SHOWN]
    digits = 2 * gpu.dtype.itemsize
    shown = [
        f"{tuple(int(i) for i in at)}: gpu {int(left[tuple(at)]):0{digits}x} "
        f"twin {int(right[tuple(at)]):0{digits}x}"
        for at in where
    ]
    assert count == 0, f"{count} of {different.size} differ: " + "; ".join(shown)
