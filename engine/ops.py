"""Each operation of the engine on its own: numpy in, numpy out, on either device.

For tests, benchmarks and the curious; models run through engine.model_runner. bf16 is uint16 bits.
"""

import numpy as np

from engine.batch import Batch
from engine.bindings import DEVICES, Library
from engine.config import ModelConfig
from engine.errors import InvalidArgument
from engine.model_struct import fill_model_config
from engine.sampling import Logprobs, SamplingBatch
from engine.sampling_struct import fill_sampling


class Ops:
    """The operations on one device. Close it, or use it in a with statement.

    Args:
        library: the loaded library.
        device: "cpu" (the twin) or "cuda".
        num_threads: CPU threads, 0 = every core; never enters a result.
    """

    def __init__(self, library: Library, device: str = "cpu", num_threads: int = 0) -> None:
        self.library = library
        context = library.ffi.new("OpContext **")
        library.check(library.lib.op_context_create(DEVICES[device], num_threads, context))
        self._context = context[0]

    def close(self) -> None:
        """Give the device's resources back; closing twice is allowed."""
        if self._context is not None:
            context, self._context = self._context, None
            self.library.check(self.library.lib.op_context_destroy(context))

    def __enter__(self) -> "Ops":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _call(self, function: str, *arguments: object) -> None:
        if self._context is None:
            raise InvalidArgument("these operations are closed")
        self.library.check(getattr(self.library.lib, function)(self._context, *arguments))

    def _bf16(self, array: np.ndarray, name: str) -> object:
        return self.library.array(array, "uint16_t", np.uint16, name)

    def _int32(self, array: np.ndarray, name: str) -> object:
        return self.library.array(array, "int32_t", np.int32, name)

    def _float(self, array: np.ndarray, name: str) -> object:
        return self.library.array(array, "float", np.float32, name)

    def embedding(self, table: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Rows of table [vocab_size, hidden_size] at ids [num_tokens]."""
        out = np.empty((len(ids), table.shape[1]), np.uint16)
        self._call(
            "op_embedding",
            self._bf16(out, "out"),
            self._bf16(table, "table"),
            self._int32(ids, "ids"),
            len(ids),
            *table.shape,
        )
        return out

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """RMSNorm of x [num_tokens, hidden_size] with weight [hidden_size]."""
        _same("weight", weight.shape, x.shape[1:])
        out = np.empty_like(x)
        self._call(
            "op_rms_norm",
            self._bf16(out, "out"),
            self._bf16(x, "x"),
            self._bf16(weight, "weight"),
            *x.shape,
            eps,
        )
        return out

    def linear(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The product of x [num_tokens, in_features] and weightᵀ, [out_features, in_features]."""
        out = np.empty((len(x), len(weight)), np.uint16)
        self._linear("op_linear", self._bf16(out, "out"), x, weight)
        return out

    def linear_f32(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The same without the last rounding: float32, as for logits."""
        out = np.empty((len(x), len(weight)), np.float32)
        self._linear("op_linear_f32", self._float(out, "out"), x, weight)
        return out

    def _linear(self, function: str, out: object, x: np.ndarray, weight: np.ndarray) -> None:
        _same("weight", weight.shape[1:], x.shape[1:])
        self._call(
            function,
            out,
            self._bf16(x, "x"),
            self._bf16(weight, "weight"),
            len(x),
            *weight.shape,
        )

    def linear_add(self, x: np.ndarray, weight: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """The sum of residual [num_tokens, out_features] and linear(x, weight); "cuda" only."""
        out = np.empty((len(x), len(weight)), np.uint16)
        _same("residual", residual.shape, out.shape)
        return self._fused("op_linear_add", out, x, weight, residual)

    def gated_linear(self, x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """The silu_and_mul of linear(x, gate) and linear(x, up); "cuda" only."""
        out = np.empty((len(x), len(gate)), np.uint16)
        _same("up", up.shape, gate.shape)
        return self._fused("op_gated_linear", out, x, gate, up)

    def _fused(
        self, function: str, out: np.ndarray, x: np.ndarray, weight: np.ndarray, other: np.ndarray
    ) -> np.ndarray:
        _same("weight", weight.shape[1:], x.shape[1:])
        self._call(
            function,
            self._bf16(out, "out"),
            self._bf16(x, "x"),
            self._bf16(weight, "weight"),
            self._bf16(other, "the last input"),
            len(x),
            *weight.shape,
        )
        return out

    def rope_table(self, config: ModelConfig, max_positions: int) -> np.ndarray:
        """The model's table of cos and sin, [max_positions, head_dim]: cos, then sin."""
        table = np.empty((max_positions, config.head_dim), np.uint16)
        struct = fill_model_config(self.library.ffi, config)
        self._call("op_rope_table", self._bf16(table, "table"), struct, max_positions)
        return table

    def rotary_embedding(
        self, x: np.ndarray, table: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """RoPE of x [num_tokens, num_heads, head_dim] at positions [num_tokens] of the table."""
        _same("positions", positions.shape, x.shape[:1])
        _same("table", table.shape[1:], x.shape[2:])
        out = np.empty_like(x)
        self._call(
            "op_rotary_embedding",
            self._bf16(out, "out"),
            self._bf16(x, "x"),
            self._bf16(table, "table"),
            self._int32(positions, "positions"),
            *x.shape,
            len(table),
        )
        return out

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        batch: Batch,
        block_size: int,
        num_blocks: int,
    ) -> np.ndarray:
        """Causal attention of q [num_tokens, num_heads, head_dim] over a paged cache.

        Args:
            q: queries, [num_tokens, num_heads, head_dim].
            k, v: the cache's content by slot, [num_blocks * block_size, num_kv_heads, head_dim].
            batch: which sequence owns which slots.
            block_size, num_blocks: the cache's shape.

        Returns:
            [num_tokens, num_heads, head_dim].
        """
        _same("k", k.shape[:1], (num_blocks * block_size,))
        _same("v", v.shape, k.shape)
        _same("q", q.shape[:1], batch.input_ids.shape)
        out = np.empty_like(q)
        self._call(
            "op_attention",
            self._bf16(out, "out"),
            self._bf16(q, "q"),
            self._bf16(k, "k"),
            self._bf16(v, "v"),
            self.library.batch(batch),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            block_size,
            num_blocks,
        )
        return out

    def silu_and_mul(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """SiLU(gate) * up, all [num_tokens, intermediate_size]."""
        _same("up", up.shape, gate.shape)
        out = np.empty_like(gate)
        self._call(
            "op_silu_and_mul",
            self._bf16(out, "out"),
            self._bf16(gate, "gate"),
            self._bf16(up, "up"),
            *gate.shape,
        )
        return out

    def residual_add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The bf16 sum of two arrays of one shape."""
        _same("y", y.shape, x.shape)
        out = np.empty_like(x)
        self._call(
            "op_residual_add",
            self._bf16(out, "out"),
            self._bf16(x, "x"),
            self._bf16(y, "y"),
            x.size,
        )
        return out

    def argmax(self, logits: np.ndarray) -> np.ndarray:
        """The lowest index of each row's largest value; logits float32 [num_rows, vocab_size]."""
        ids = np.empty(len(logits), np.int32)
        self._call(
            "op_argmax", self._int32(ids, "ids"), self._float(logits, "logits"), *logits.shape
        )
        return ids

    def sample(
        self,
        logits: np.ndarray,
        sampling: SamplingBatch,
        uniforms: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Logprobs | None]:
        """Choose and score each row's token.

        Args:
            logits: float32 [num_rows, vocab_size].
            sampling: how, row by row.
            uniforms: the draws in units of 2^-64, uint64 [num_rows]; None: the rows' own.

        Returns:
            Token ids int32 [num_rows], and the scores where a row asks for them.
        """
        ids = np.empty(len(logits), np.int32)
        logprobs = None
        if sampling.max_logprobs is not None:
            logprobs = Logprobs.empty(len(logits), sampling.max_logprobs)
        draws = self.library.ffi.NULL
        if uniforms is not None:
            _same("uniforms", uniforms.shape, ids.shape)
            draws = self.library.array(uniforms, "uint64_t", np.uint64, "uniforms")
        self._call(
            "op_sample",
            self._int32(ids, "ids"),
            self._float(logits, "logits"),
            fill_sampling(self.library, sampling, logprobs, len(logits)),
            draws,
            *logits.shape,
        )
        return ids, logprobs

    def edit_logits(self, logits: np.ndarray, sampling: SamplingBatch) -> np.ndarray:
        """The logits float32 [num_rows, vocab_size] after bias, penalties and bans."""
        out = np.empty_like(logits)
        self._call(
            "op_edit_logits",
            self._float(out, "out"),
            self._float(logits, "logits"),
            fill_sampling(self.library, sampling, None, len(logits)),
            *logits.shape,
        )
        return out

    def uniform(self, seeds: np.ndarray, positions: np.ndarray, choices: np.ndarray) -> np.ndarray:
        """The draws of n seeds (uint64), positions and choices (int32), in units of 2^-64."""
        _same("positions", positions.shape, seeds.shape)
        _same("choices", choices.shape, seeds.shape)
        out = np.empty(len(seeds), np.uint64)
        self._call(
            "op_uniform",
            self.library.array(out, "uint64_t", np.uint64, "out"),
            self.library.array(seeds, "uint64_t", np.uint64, "seeds"),
            self._int32(positions, "positions"),
            self._int32(choices, "choices"),
            len(seeds),
        )
        return out

    def tensor_core_step(self, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """One k16 step each for n outputs: c float32 [n], a and b bf16 [n, 16]; float32 [n]."""
        _same("a", a.shape, (len(c), 16))
        _same("b", b.shape, (len(c), 16))
        d = np.empty_like(c)
        self._call(
            "op_tensor_core_step",
            self._float(d, "d"),
            self._float(c, "c"),
            self._bf16(a, "a"),
            self._bf16(b, "b"),
            len(c),
        )
        return d

    def exp2(self, x: np.ndarray) -> np.ndarray:
        """The contract's exp2 of float32 values [n]."""
        out = np.empty_like(x)
        self._call("op_exp2", self._float(out, "out"), self._float(x, "x"), x.size)
        return out


def _same(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise InvalidArgument(f"{name}: dimensions {shape}, must be {expected}")
