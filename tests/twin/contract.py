"""docs/numerics.md once more, in numpy and Python integers, as somebody else would read it.

Holds the expected bits of every operation. Written from the page alone: it shares no code, no
constant and no table with csrc/. Slow and plain on purpose. bf16 is uint16 bits, float32 is
np.float32; every function is elementwise over leading dimensions unless it says otherwise.
"""

import math
from fractions import Fraction

import numpy as np

CHUNK, TILE, SEGMENT = 512, 128, 8  # KC, T and G of the page
F32_NAN = 0x7FFFFFFF
NO_EXPONENT = -10_000  # of a product that is zero: below every exponent
# C0 .. C6 of section 3: the page names the place where their bits are written.
EXP2_BITS = (0x3F800000, 0x3F317218, 0x3E75FDEE, 0x3D6357BE, 0x3C1D96F0, 0x3AAF8417, 0x3920B5A9)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf(x: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, nearest even, by choosing the nearer of the two neighbours."""
    x = np.asarray(x, np.float32)
    word = x.view(np.uint32)
    down = (word >> 16).astype(np.uint32)  # toward zero
    rest = word & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (down & 1 == 1))
    return np.where(np.isnan(x), 0x7FFF, down + up).astype(np.uint16)


def _take_apart(x: np.ndarray, significand_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed integer significand m and exponent of its leading place: x = m * 2^(e - bits)."""
    word = x.astype(np.int64)
    magnitude_bits = significand_bits + 8
    field = (word >> significand_bits) & 0xFF
    m = (word & ((1 << significand_bits) - 1)) | np.where(field > 0, 1 << significand_bits, 0)
    m = np.where((word >> magnitude_bits) & 1 == 1, -m, m)
    return m, np.where(field == 0, -126, field - 127)


def _cut(m: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """m * 2^shift, toward zero, in int64; shift <= 11 and abs(m) < 2^24."""
    left = np.abs(m) << np.maximum(shift, 0)
    return np.sign(m) * (left >> np.minimum(np.maximum(-shift, 0), 62))


def step(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Section 1: c float32 [...], a and b bf16 [..., 16]; float32 [...]."""
    c = np.asarray(c, np.float32)
    mc, ec = _take_apart(c.view(np.uint32), 23)
    ma, ea = _take_apart(a, 7)
    mb, eb = _take_apart(b, 7)
    exponents = np.where(ma * mb == 0, NO_EXPONENT, ea + eb)
    e = np.maximum(exponents.max(-1), ec)
    # c = mc 2^(ec - 23), a product = ma mb 2^(ea + eb - 14); the unit is 2^(e - 25)
    total = _cut(ma * mb, exponents - e[..., None] + 11).sum(-1) + _cut(mc, ec - e + 2)
    return np.where(_is_finite(c, a, b), _cut_to_float32(total, e - 25), _not_finite(c, a, b))


def _is_finite(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isfinite(c) & np.isfinite(widen(a)).all(-1) & np.isfinite(widen(b)).all(-1)


def _not_finite(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Section 1, clause 7: what a step with a NaN or an infinite operand gives."""
    wide_a, wide_b = widen(a), widen(b)
    with np.errstate(invalid="ignore", over="ignore"):
        products = wide_a.astype(np.float64) * wide_b
        terms = np.concatenate([products, np.asarray(c, np.float64)[..., None]], -1)
    up, down = (terms == np.inf).any(-1), (terms == -np.inf).any(-1)
    is_nan = np.isnan(terms).any(-1) | (up & down)
    infinity = np.where(up, np.float32(np.inf), np.float32(-np.inf))
    return np.where(is_nan, np.uint32(F32_NAN).view(np.float32), infinity)


def _cut_to_float32(total: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """total * 2^unit toward zero to float32; abs(total) < 2^53."""
    magnitude = np.abs(total)
    width = np.frexp(magnitude.astype(np.float64))[1].astype(np.int64)  # bits in use
    lowest = np.maximum(width - 24, -149 - unit)  # the lowest bit that float32 can keep
    drop = np.minimum(np.maximum(lowest, 0), 62)
    kept = (magnitude >> drop) << drop
    with np.errstate(over="ignore"):
        return np.ldexp(np.sign(total) * kept.astype(np.float64), unit).astype(np.float32)


def step_by_fractions(c: np.float32, a: list[int], b: list[int]) -> np.float32:
    """Section 1 for one output in rational numbers, sentence by sentence."""

    def number(bits: int, significand_bits: int) -> tuple[Fraction, int]:
        sign = -1 if bits >> (significand_bits + 8) else 1
        field, low = (bits >> significand_bits) & 0xFF, bits & ((1 << significand_bits) - 1)
        exponent = field - 127 if field else -126
        significand = Fraction(low, 1 << significand_bits) + (1 if field else 0)
        return sign * significand * Fraction(2) ** exponent, exponent

    c_value, c_exponent = number(int(np.float32(c).view(np.uint32)), 23)
    factors = [(number(int(x), 7), number(int(y), 7)) for x, y in zip(a, b, strict=True)]
    exponents = [x[1] + y[1] for x, y in factors if x[0] and y[0]]
    e = max([*exponents, c_exponent])
    unit = Fraction(2) ** (e - 25)
    terms = [c_value] + [x[0] * y[0] for x, y in factors]
    total = sum(math.trunc(term / unit) for term in terms) * unit
    if total == 0:
        return np.float32(0.0)
    # the largest float32 not larger in magnitude
    exponent = -126
    while abs(total) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    last_place = Fraction(2) ** (exponent - 23)
    cut = math.trunc(total / last_place) * last_place
    if abs(cut) >= Fraction(2) ** 128:
        return np.float32(math.inf if cut > 0 else -math.inf)
    return np.float32(math.copysign(float(cut), total))


def chain(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Steps over the last dimension of a and b, ascending, from c."""
    for k in range(0, a.shape[-1], 16):
        c = step(c, a[..., k : k + 16], b[..., k : k + 16])
    return c


def linear_f32(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Section 2 without the last rounding: x [M, K], w [N, K]; float32 [M, N]."""
    result = None
    for k in range(0, x.shape[1], CHUNK):
        a, b = x[:, None, k : k + CHUNK], w[None, :, k : k + CHUNK]
        part = chain(np.zeros((len(x), len(w)), np.float32), a, b)
        result = part if result is None else result + part
    return result


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Section 2: bf16 [M, N]."""
    return bf(linear_f32(x, w))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """rn(a*b + c) of float32 values with a single rounding.

    The product is exact in float64; the sum is rounded to odd there, so that the second rounding,
    to float32, cannot be fooled by the first (Boldo and Melquiond, IEEE Trans. Computers 2008).
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    total = product + c
    with np.errstate(invalid="ignore"):
        back = total - product
        error = (product - (total - back)) + (c - back)
    word = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (word & 1 == 0)
    away = (error > 0) == (total > 0)
    word = np.where(inexact, word + np.where(away, 1, -1), word)
    with np.errstate(over="ignore"):
        return word.view(np.float64).astype(np.float32)


def exp2(x: np.ndarray) -> np.ndarray:
    """Section 3."""
    x = np.asarray(x, np.float32)
    inside = np.where((x >= -126) & (x < 128), x, np.float32(0))
    n = np.rint(inside)
    f = (inside - n).astype(np.float32)
    constants = [np.uint32(bits).view(np.float32) for bits in EXP2_BITS]
    p = np.full(x.shape, constants[6], np.float32)
    for constant in reversed(constants[:6]):
        p = fma(p, f, constant)
    result = np.ldexp(p.astype(np.float64), n.astype(np.int64)).astype(np.float32)
    result = np.where(x >= 128, np.float32(np.inf), result)
    result = np.where(x < -126, np.float32(0), result)
    return np.where(np.isnan(x), x, result).astype(np.float32)


def softmax_scale(head_dim: int) -> np.float32:
    """float32(log2(e) / sqrt(head_dim))."""
    return np.float32(1.4426950408889634 / math.sqrt(head_dim))


def _tile(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, num_keys: int
) -> tuple[np.float32, np.float32, np.ndarray]:
    """One tile of one row: q [D], k and v [TILE, D] (zero where no token is), keys allowed."""
    scale = softmax_scale(len(q))
    r = chain(np.zeros(num_keys, np.float32), np.broadcast_to(q, (num_keys, len(q))), k[:num_keys])
    m = np.float32(r.max() * scale)
    p = np.zeros(TILE, np.uint16)
    p[:num_keys] = bf(exp2(fma(r, scale, -m)))
    wide = widen(p)
    quads = []
    for quad in range(4):
        a = np.float32(0)
        for i in range(16):
            a = np.float32(a + np.float32(wide[8 * i + 2 * quad] + wide[8 * i + 2 * quad + 1]))
        quads.append(a)
    length = np.float32(np.float32(quads[0] + quads[1]) + np.float32(quads[2] + quads[3]))
    out = chain(
        np.zeros(len(q), np.float32), np.broadcast_to(p, (len(q), TILE)), np.ascontiguousarray(v.T)
    )
    return m, length, out


def _fold(left: tuple, right: tuple) -> tuple:
    m_0, l_0, o_0 = left
    m_1, l_1, o_1 = right
    m = max(m_0, m_1)
    a, b = exp2(np.float32(m_0 - m)), exp2(np.float32(m_1 - m))
    length = fma(l_1, b, np.float32(l_0 * a))[()]
    return m, length, fma(o_1, np.full_like(o_1, b), o_0 * a)


def attention_row(q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int) -> np.ndarray:
    """Section 4 for one row: q [D]; k, v [seq_len, D] of its kv head, in position order; bf16 [D].

    seq_len may exceed position + 1: then later tokens are in the cache already.
    """
    tiles = []
    for first in range(0, position + 1, TILE):
        keys, values = (np.zeros((TILE, len(q)), np.uint16) for _ in range(2))
        here = k[first : first + TILE]
        keys[: len(here)], values[: len(here)] = here, v[first : first + TILE]
        tiles.append(_tile(q, keys, values, min(position + 1 - first, TILE)))
    row = None
    for first in range(0, len(tiles), SEGMENT):
        segment = tiles[first]
        for tile in tiles[first + 1 : first + SEGMENT]:
            segment = _fold(segment, tile)
        row = segment if row is None else _fold(row, segment)
    inverse = np.float32(np.float32(1) / row[1])
    return bf((row[2] * inverse).astype(np.float32))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
    """Section 4 for one sequence: q [T, H, D] at positions start ..; k, v [seq_len, KV, D]."""
    group = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for token in range(len(q)):
        for head in range(q.shape[1]):
            kv = head // group
            out[token, head] = attention_row(q[token, head], k[:, kv], v[:, kv], start + token)
    return out


def sum_of_squares(x: np.ndarray) -> np.float32:
    """Section 5's tree over one row of float32."""
    lanes = [np.float32(0)] * 256
    for h, value in enumerate(x):
        lane = (h % 2048) // 8
        lanes[lane] = np.float32(lanes[lane] + value * value)
    lanes = np.array(lanes, np.float32)
    for offset in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[np.arange(256) ^ offset]
    heads = lanes[::32]
    for offset in (4, 2, 1):
        heads = heads + heads[np.arange(8) ^ offset]
    return heads[0]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Section 5: x [M, H], weight [H]; bf16 [M, H]."""
    rows = []
    for row in widen(x):
        mean = np.float32(sum_of_squares(row) / np.float32(len(row)))
        r = np.float32(1) / np.sqrt(np.float32(mean + np.float32(eps)))
        rows.append(bf(widen(weight) * widen(bf(row * r))))
    return np.stack(rows)


def rope_table(config, positions: list[int]) -> np.ndarray:
    """Section 6's table at some positions: bf16 [len(positions), head_dim], cos then sin."""
    f32, half, scaling = np.float32, config.head_dim // 2, config.rope_scaling
    table = np.empty((len(positions), config.head_dim), np.uint16)
    for i in range(half):
        exponent = f32(f32(2 * i) / f32(config.head_dim))
        f = f32(f32(1) / f32(math.pow(config.rope_theta, float(exponent))))
        if scaling is not None:
            original = scaling.original_max_position_embeddings
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            wavelen = f32(f32(f32(1) / f) * f32(2 * math.pi))
            if wavelen > original / low:
                f = f32(f / f32(scaling.factor))
            elif not wavelen < original / high:
                smooth = f32(f32(f32(f32(1) / wavelen) * f32(original)) - f32(low))
                smooth = f32(smooth / f32(f32(high) - f32(low)))
                scaled = f32(f32(f32(f32(1) - smooth) * f) / f32(scaling.factor))
                f = f32(scaled + f32(smooth * f))
        for row, position in enumerate(positions):
            angle = float(f32(f32(position) * f))
            table[row, i] = bf(f32(math.cos(angle)))
            table[row, half + i] = bf(f32(math.sin(angle)))
    return table


def rotary_embedding(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Section 6: x [T, H, D], rows [T, D] of the table."""
    half = x.shape[-1] // 2
    wide = widen(x)
    low, high = wide[..., :half], wide[..., half:]
    cos, sin = (widen(rows[:, None, part]) for part in (slice(0, half), slice(half, None)))
    first = widen(bf(low * cos)) - widen(bf(high * sin))
    second = widen(bf(high * cos)) + widen(bf(low * sin))
    return bf(np.concatenate([first, second], -1))


def silu_and_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Section 7."""
    g = widen(gate)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        e = exp2(-g * np.float32(math.log2(math.e)))
        s = bf(g / (np.float32(1) + e))
        return bf(widen(s) * widen(up))


def residual_add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Section 7."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bf(widen(x) + widen(y))
