"""Kernels of strangers in plain C: each wrong in one way, or right in a way of its own."""

from dataclasses import dataclass
from pathlib import Path

RIGHT_NORM = (Path(__file__).parent / "examples" / "right_rms_norm.c").read_text()
PREAMBLE = RIGHT_NORM[: RIGHT_NORM.index("// x, out")]


@dataclass(frozen=True)
class StrangersKernel:
    """One kernel; `says` is a part of what must be said of it, None if it is right."""

    name: str
    operation: str
    source: str
    says: str | None


def _norm(name: str, before: str, after: str, says: str | None) -> StrangersKernel:
    assert RIGHT_NORM.count(before) == 1, name
    return StrangersKernel(name, "rms_norm", RIGHT_NORM.replace(before, after), says)


RESIDUAL = """
int op_residual_add(void *c, uint16_t *out, const uint16_t *x, const uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = round_to_bf16(widen(x[i]) + widen(y[i]));
    return 0;
}
"""
ROTARY = """
int op_rotary_embedding(void *c, uint16_t *out, const uint16_t *x, const uint16_t *table,
                        const int32_t *positions, int32_t num_tokens, int32_t num_heads,
                        int32_t head_dim, int32_t max_positions) {
    for (int t = 0; t < num_tokens; t++)
        for (int h = 0; h < num_heads; h++)
            for (int i = 0; i < head_dim / 2; i++) {
                const uint16_t *row = table + (size_t)positions[t] * head_dim;
                float cos = widen(row[i]), sin = widen(row[head_dim / 2 + i]);
                size_t at = ((size_t)t * num_heads + h) * head_dim;
                size_t first = at + FIRST, second = at + SECOND;
                float a = widen(x[first]), b = widen(x[second]);
                float ac = widen(round_to_bf16(a * cos)), bs = widen(round_to_bf16(b * sin));
                float bc = widen(round_to_bf16(b * cos)), as = widen(round_to_bf16(a * sin));
                out[first] = round_to_bf16(ac - bs);
                out[second] = round_to_bf16(bc + as);
            }
    return 0;
}
"""
HALVES = ROTARY.replace("FIRST", "i").replace("SECOND", "head_dim / 2 + i")
PAIRS = ROTARY.replace("FIRST", "2 * i").replace("SECOND", "2 * i + 1")
ARGMAX = """
int op_argmax(void *c, int32_t *ids, const float *logits, int32_t rows, int32_t width) {
    for (int r = 0; r < rows; r++) {
        const float *row = logits + (size_t)r * width;
        int best = 0;
        for (int i = 1; i < width; i++)
            if (row[i] > row[best] || (isnan(row[i]) && !isnan(row[best]))) best = i;
        ids[r] = best;
    }
    return 0;
}
"""


def _plain(name: str, operation: str, source: str, says: str | None) -> StrangersKernel:
    return StrangersKernel(name, operation, PREAMBLE + source, says)


KERNELS = (
    _norm("crashes", "double sum = 0;", "double sum = *(volatile int *)0;", "SIGSEGV"),
    _norm("hangs", "double sum = 0;", "double sum = 0; for (;;) sum *= 1;", "did not return in"),
    _norm("exits", "return 0;\n}\n", "_Exit(3);\n}\n", "ended the process with status 3"),
    _norm("refuses", "return 0;\n}\n", "return 7;\n}\n", "returned status 7"),
    _norm(
        "eps_outside",
        "sqrt(sum / hidden_size + eps)",
        "(sqrt(sum / hidden_size) + eps)",
        "eps outside",
    ),
    _norm(
        "writes_past",
        "return 0;\n}\n",
        "out[(size_t)num_tokens * hidden_size] = 1; return 0;\n}\n",
        "it wrote after out",
    ),
    _norm("writes_before", "(void)context;", "out[-1] = 1;", "it wrote before out"),
    _norm(
        "changes_its_input", "(void)context;", "((uint16_t *)x)[0] ^= 1;", "it changed its input x"
    ),
    _norm(
        "reads_past",
        "h < hidden_size; h++) {\n            sum",
        "h <= hidden_size; h++) {\n            sum",
        "differ",
    ),
    _norm(
        "last_row_unwritten",
        "token < num_tokens",
        "token < (num_tokens > 8 ? num_tokens - 1 : num_tokens)",
        "other bits with infinity",
    ),
    _norm(
        "row_depends_on_batch",
        "/ hidden_size + eps",
        "/ (hidden_size - (num_tokens > 1)) + eps",
        "alone has other bits",
    ),
    _norm("wrong_name", "int op_rms_norm", "int my_rms_norm", "does not export op_rms_norm"),
    _plain("right_residual", "residual_add", RESIDUAL, None),
    _plain(
        "missing_residual",
        "residual_add",
        RESIDUAL.replace("widen(x[i]) +", ""),
        "the residual is missing",
    ),
    _plain("right_rotary", "rotary_embedding", HALVES, None),
    _plain(
        "adjacent_pairs",
        "rotary_embedding",
        PAIRS,
        "your output equals transformers with adjacent-pair RoPE",
    ),
    _plain("right_argmax", "argmax", ARGMAX, None),
    _plain(
        "last_of_a_tie",
        "argmax",
        ARGMAX.replace("row[i] > row[best]", "row[i] >= row[best]"),
        "ties among",
    ),
)
