"""docs/numerics.md section 8 in numpy and Python's own integers, one row at a time.

Written from the page alone, with a sort where the engine searches: shares nothing with csrc/.
"""

import math

import numpy as np

from engine.sampling import EDIT, ROW, SamplingBatch
from tests.twin import contract

UNIT = 1 << 38
LOG2_E = 1.4426950408889634
U_MAX = 2**64 - 1

# At this temperature the scale is 1, so that integer logits have weights that are powers of two.
EXACT = 1.4426950216293335


def powers(*weights: int) -> np.ndarray:
    """Logits of these weights at temperature EXACT, each a sum of tokens of power-of-two weight."""
    exponents = [e for w in weights for e in range(w.bit_length() - 1, -1, -1) if w >> e & 1]
    return np.array(exponents, np.float32) - np.float32(max(exponents))


# The first token's mass is just what top_p = 0.5 asks for; half a unit short of 0.75 of all.
BORDERS_OF_TOP_P = (powers(UNIT, UNIT // 2, UNIT // 2), powers(UNIT, -(-UNIT // 3)))


def rows(count: int, **fields: object) -> np.ndarray:
    """Sampling rows with neutral values but for those given."""
    result = np.zeros(count, ROW)
    neutral = {
        "temperature": 1, "top_p": 1, "repetition_penalty": 1, "num_logprobs": -1, "scored_id": -1
    }  # fmt: skip
    for name, value in (neutral | fields).items():
        result[name] = value
    return result


def sampling(
    sampling_rows: np.ndarray, edits: np.ndarray | None = None, max_logprobs: int | None = None
) -> SamplingBatch:
    """The arrays of a step; edits lie row after row where no row says where its own begin."""
    if not sampling_rows["first_edit"].any():
        counts = sampling_rows["num_edits"]
        sampling_rows["first_edit"] = np.cumsum(counts) - counts  # the caller's may still change
    return SamplingBatch(sampling_rows, np.zeros(0, EDIT) if edits is None else edits, max_logprobs)


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Each token's p relative to the most likely one's, float32."""
    scale = np.float32(LOG2_E / float(np.float32(temperature)))
    with np.errstate(over="ignore"):
        return contract.exp2((logits - logits.max()).astype(np.float32) * scale)


def weights(logits: np.ndarray, temperature: float) -> list[int]:
    return [int(p * UNIT) for p in probabilities(logits, temperature).astype(np.float64)]


def kept(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> list[bool]:
    """Which tokens the filters leave."""
    values = [float(x) for x in logits]
    mass = weights(logits, temperature)
    keep = [True] * len(values)
    if 0 < top_k < len(values):
        least = sorted(values, reverse=True)[top_k - 1]
        keep = [value >= least for value in values]
    if top_p < 1:
        total = sum(w for w, k in zip(mass, keep, strict=True) if k)
        numerator = int(float(np.float32(top_p)) * 2**64)
        left = [(w, v) for w, v, k in zip(mass, values, keep, strict=True) if k]
        for i, value in enumerate(values):
            above = sum(w for w, v in left if v > value)
            keep[i] = keep[i] and (above << 64) < numerator * total
    p = probabilities(logits, temperature)
    return [k and bool(x >= np.float32(min_p)) for k, x in zip(keep, p, strict=True)]


def kept_masses(logits: np.ndarray, temperature: float, **filters: float) -> list[int]:
    keep = kept(logits, temperature, **filters)
    return [w if k else 0 for w, k in zip(weights(logits, temperature), keep, strict=True)]


def drawn(masses: list[int], uniform: int) -> int:
    """The inverse of the distribution function at uniform / 2^64."""
    point, upto = uniform * sum(masses) >> 64, 0
    for token, mass in enumerate(masses):
        upto += mass
        if upto > point:
            return token
    raise AssertionError("the point lies within the sum")


def borders(masses: list[int]) -> list[int]:
    """Both sides of every u at which the drawn token changes, and the ends."""
    total, upto, found = sum(masses), 0, {0, U_MAX}
    for mass in masses:
        upto += mass
        first = -(-(upto << 64) // total)  # the least u with u * total / 2^64 >= upto
        found |= {u for u in (first - 1, first) if 0 <= u <= U_MAX}
    return sorted(found)


def philox_rounds(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10: Salmon et al., SC 2011."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def philox(seed: int, position: int, choice: int) -> int:
    """The draw in units of 2^-64."""
    words = philox_rounds([position, choice, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
    return words[1] << 32 | words[0]


def edited(logits: np.ndarray, row: np.void, edits: np.ndarray) -> np.ndarray:
    """One row's logits after its edits, each operation rounded to float32."""
    with np.errstate(over="ignore"):
        return _edited(logits.copy(), row, edits)


def _edited(out: np.ndarray, row: np.void, edits: np.ndarray) -> np.ndarray:
    f32 = np.float32
    for edit in edits:
        x = f32(out[edit["token_id"]] + edit["bias"])
        if edit["flags"] & 1:
            penalty = row["repetition_penalty"]
            x = f32(x / penalty) if x > 0 else f32(x * penalty)
        x = f32(x - f32(f32(edit["count"]) * row["frequency_penalty"]))
        if edit["count"] > 0:
            x = f32(x - row["presence_penalty"])
        out[edit["token_id"]] = f32(-math.inf) if edit["flags"] & 2 else x
    return out
