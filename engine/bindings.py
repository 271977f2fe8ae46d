"""The one door to C: loads libengine.so, calls it, turns a failed status into an exception.

Knows pointers and layouts, decides nothing. bfloat16 crosses as numpy uint16 bits. Invariant: a
library whose ABI version, struct sizes or source stamp are not those of this checkout is refused.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from cffi import FFI

from engine.batch import Batch
from engine.config import EngineConfig, ModelConfig
from engine.errors import (
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    InvalidArgument,
    OutOfMemory,
)
from engine.model_struct import fill_model_config, fill_options
from engine.sampling import Logprobs, SamplingBatch
from engine.source_stamp import source_stamp
from engine.step_struct import StepStruct, fill_batch
from engine.tap import Tap, TapPoint

ABI_VERSION = 4
CSRC = Path(__file__).resolve().parent.parent / "csrc"
LIBRARY_PATH = Path(__file__).resolve().parent / "libengine.so"
DEVICES: Mapping[str, int] = MappingProxyType({"cpu": 0, "cuda": 1})

_ERRORS: Mapping[int, type[EngineError]] = MappingProxyType(
    {1: InvalidArgument, 2: OutOfMemory, 3: DeviceUnavailable, 4: DeviceFailed}
)
_STRUCTS: Mapping[str, str] = MappingProxyType(
    {
        "model_config_size": "EngineModelConfig",
        "engine_options_size": "EngineOptions",
        "engine_batch_size": "EngineBatch",
        "engine_tap_size": "EngineTap",
        "engine_sampling_size": "EngineSampling",
        "engine_sampling_row_size": "EngineSamplingRow",
        "engine_logit_edit_size": "EngineLogitEdit",
    }
)


def _declarations() -> str:
    """The two public headers as cffi reads them: without the lines meant for a preprocessor."""
    lines: list[str] = []
    for name in ("engine.h", "ops.h"):
        text = (CSRC / "include" / name).read_text(encoding="utf-8")
        lines += [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines)


class Library:
    """A loaded libengine.so that was checked to belong to this checkout.

    Args:
        path: the shared object; by default the one that make builds.
        expected_stamp: the source stamp it must carry; by default that of this checkout's csrc/.

    Raises:
        EngineError: the file is missing, cannot be loaded, or was built from other sources.
    """

    def __init__(self, path: Path | None = None, expected_stamp: str | None = None) -> None:
        self._load(Path(path or LIBRARY_PATH))
        info = self.ffi.new("EngineBuildInfo *")
        self.check(self.lib.engine_build_info(info))
        self.has_cuda = bool(info.has_cuda)
        self.source_stamp = self.ffi.string(info.source_stamp).decode()
        self.numerics_version = self.ffi.string(info.numerics_version).decode()
        self._check_belongs(info, expected_stamp or source_stamp(CSRC))

    def _load(self, path: Path) -> None:
        """Opens a shared object; what it has is looked up at the first call."""
        self.path = path
        self.ffi = FFI()
        self.ffi.cdef(_declarations())
        if not path.exists():
            raise EngineError(f"{path.name} is not built: run make")
        try:
            self.lib = self.ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            raise EngineError(f"{path.name} cannot be loaded: {error}") from error

    def _check_belongs(self, info: object, expected_stamp: str) -> None:
        if info.abi_version != ABI_VERSION:
            raise EngineError(
                f"{self.path.name} has ABI version {info.abi_version}, "
                f"this package needs {ABI_VERSION}: run make"
            )
        for field, struct in _STRUCTS.items():
            built, expected = getattr(info, field), self.ffi.sizeof(struct)
            if built != expected:
                raise EngineError(
                    f"{struct} has {built} bytes in {self.path.name}, {expected} here: run make"
                )
        if self.source_stamp != expected_stamp:
            raise EngineError(
                f"{self.path.name} was built from other sources "
                f"(stamp {self.source_stamp[:12]}, csrc/ has {expected_stamp[:12]}): run make"
            )

    def check(self, status: int) -> None:
        """Raise the exception of a failed status, in the library's own words."""
        if status == 0:
            return
        message = self.ffi.new("char **")
        self.lib.engine_last_error(message)
        text = self.ffi.string(message[0]).decode("utf-8", "replace")
        raise _ERRORS.get(status, EngineError)(text)

    def array(
        self,
        values: np.ndarray,
        c_type: str,
        dtype: type,
        name: str,
        shape: tuple[int, ...] | None = None,
    ) -> object:
        """A numpy array as a C array; the caller keeps it alive.

        Raises:
            InvalidArgument: the array has another dtype, not this shape, or is not contiguous.
        """
        if shape is not None and values.shape != shape:
            raise InvalidArgument(f"{name} has shape {values.shape}, must be {shape}")
        if values.dtype != dtype or not values.flags.c_contiguous:
            raise InvalidArgument(
                f"{name} must be a contiguous {np.dtype(dtype).name} array, "
                f"got {values.dtype}{'' if values.flags.c_contiguous else ', not contiguous'}"
            )
        return self.ffi.from_buffer(c_type + "[]", self._memory(values, name))

    def _memory(self, values: np.ndarray, name: str) -> np.ndarray:
        """The memory that C is given for a checked array: its own."""
        return values

    def batch(self, batch: Batch) -> object:
        """The C struct of a step's index arrays; `batch` must outlive it.

        Raises:
            InvalidArgument: an array's length is not what the others imply.
        """
        return fill_batch(self, batch)


class Engine:
    """A C engine: one model on one device, with its KV cache. A context manager.

    Args:
        library: the loaded library.
        model_config: the model's dimensions.
        engine_config: device and room.

    Raises:
        InvalidArgument, OutOfMemory, DeviceUnavailable: in the library's words.
    """

    def __init__(
        self, library: Library, model_config: ModelConfig, engine_config: EngineConfig
    ) -> None:
        self.library = library
        self.config = model_config
        self.engine_config = engine_config
        ffi = library.ffi
        model = fill_model_config(ffi, model_config)
        options = fill_options(ffi, engine_config, DEVICES[engine_config.device])
        handle = ffi.new("Engine **")
        library.check(library.lib.engine_create(model, options, handle))
        self._handle = handle[0]
        self._step = StepStruct(library, model_config.vocab_size)
        self._owed: tuple[object, ...] = ()  # of the step that was begun: alive until it has ended

    def _call(self, function: str, *arguments: object) -> None:
        if self._handle is None:
            raise InvalidArgument("this engine is closed")
        self.library.check(getattr(self.library.lib, function)(self._handle, *arguments))

    def load_weight(self, name: str, array: np.ndarray) -> int:
        """Copy one tensor in.

        Args:
            name: the checkpoint's name.
            array: uint16 bf16 bits, [rows, cols] or [cols].

        Returns:
            How many of its values are NaN or infinite.
        """
        rows, cols = array.shape if array.ndim == 2 else (1, array.size)
        count = self.library.ffi.new("int64_t *")
        data = self.library.array(array, "uint16_t", np.uint16, name)
        self._call("engine_load_weight", name.encode(), data, rows, cols, count)
        return count[0]

    def read_weight(self, name: str) -> np.ndarray:
        """A loaded tensor, bit for bit as it was loaded: uint16, shape as in the checkpoint."""
        shape = self.config.weight_shapes().get(name, (1,))
        array = np.empty(shape, np.uint16)
        rows, cols = shape if len(shape) == 2 else (1, *shape)
        data = self.library.array(array, "uint16_t", np.uint16, name)
        self._call("engine_read_weight", name.encode(), data, rows, cols)
        return array

    def finish_loading(self) -> None:
        """Declare the model complete; a missing tensor is named."""
        self._call("engine_finish_loading")

    def tap_shape(self, point: TapPoint) -> tuple[int, np.dtype]:
        """Values per row of a tap, and their dtype (uint16 bf16 bits, or float32 for logits)."""
        width, size = self.library.ffi.new("int32_t *"), self.library.ffi.new("int32_t *")
        self._call("engine_tap_shape", int(point), width, size)
        return width[0], np.dtype(np.float32 if size[0] == 4 else np.uint16)

    def forward(
        self,
        batch: Batch,
        taps: Sequence[Tap] = (),
        logits: np.ndarray | None = None,
        next_ids: np.ndarray | None = None,
        sampling: SamplingBatch | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Run one step.

        Args:
            batch: the step's sequences.
            taps: values to copy out or to replace.
            logits: written, float32 [num_logits, vocab_size], or None.
            next_ids: written with each row's token, int32 [num_logits], or None.
            sampling: how each row's token is chosen; None: the arg-max.
            logprobs: written where rows ask for it, or None.

        Raises:
            InvalidArgument: a field of the batch or a tap, by name; nothing was computed.
            DeviceFailed: the device failed; this engine is dead.
        """
        struct, _owed = self._step.fill(batch, logits, next_ids, sampling, logprobs)
        structs = self.library.ffi.new("EngineTap[]", max(len(taps), 1))
        for struct_tap, tap in zip(structs, taps, strict=False):
            self._fill_tap(struct_tap, tap, len(batch.input_ids), len(batch.logits_indices))
        self._call("engine_forward", struct, structs, len(taps))

    def forward_begin(
        self,
        batch: Batch,
        logits: np.ndarray | None = None,
        next_ids: np.ndarray | None = None,
        sampling: SamplingBatch | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Start a step; arguments as `forward`'s. The batch's arrays may change from here on.

        Raises:
            InvalidArgument, DeviceFailed: as `forward`; or a step was begun before.
        """
        struct, owed = self._step.fill(batch, logits, next_ids, sampling, logprobs)
        self._call("engine_forward_begin", struct)
        self._owed = owed

    def forward_end(self) -> None:
        """Wait for the step that was begun; its outputs are written now.

        Raises:
            InvalidArgument: no step was begun.
            DeviceFailed: the device failed; this engine is dead.
        """
        self._call("engine_forward_end")
        self._owed = ()

    def decode(self, batch: Batch, num_steps: int, logits: np.ndarray | None = None) -> np.ndarray:
        """Run several greedy steps in a row, each taking the arg-max of the one before.

        Args:
            batch: the first step; one new token per sequence, every row's logits wanted.
            num_steps: at least 1; the block tables must reach num_steps - 1 tokens further.
            logits: written with the last step's, float32 [num_seqs, vocab_size], or None.

        Returns:
            Token ids, int32 [num_steps, num_seqs].
        """
        struct, _owed = self._step.fill(batch, logits, None, None, None)
        next_ids = np.empty((num_steps, len(batch.seq_lens)), np.int32)
        ids = self.library.array(next_ids, "int32_t", np.int32, "next_ids")
        self._call("engine_decode", struct, num_steps, ids)
        return next_ids

    def _fill_tap(self, struct: object, tap: Tap, num_tokens: int, num_logits: int) -> None:
        width, dtype = self.tap_shape(tap.point)
        rows = num_logits if tap.point in (TapPoint.final_norm, TapPoint.logits) else num_tokens
        struct.point, struct.layer = int(tap.point), tap.layer
        for field in ("out", "force"):
            array = getattr(tap, field)
            if array is None:
                continue
            name = f"tap {tap.point.name} of layer {tap.layer}, {field}"
            pointer = self.library.array(array, "uint8_t", dtype.type, name, (rows, width))
            setattr(struct, field, pointer)

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V of some cache slots, each uint16 [num_slots, num_kv_heads, head_dim]."""
        shape = (len(slots), self.config.num_kv_heads, self.config.head_dim)
        k, v = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
        array = self.library.array
        self._call(
            "engine_read_kv",
            layer,
            array(slots, "int32_t", np.int32, "slots"),
            len(slots),
            array(k, "uint16_t", np.uint16, "k"),
            array(v, "uint16_t", np.uint16, "v"),
        )
        return k, v

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        """Set every value of some KV blocks, in all layers, to one bf16 bit pattern."""
        ids = np.asarray(block_ids, np.int32)
        pointer = self.library.array(ids, "int32_t", np.int32, "block_ids")
        self._call("engine_fill_blocks", pointer, len(ids), value)

    def memory(self) -> dict[str, int]:
        """Bytes held: weights, kv_cache, workspace."""
        names = ("weights", "kv_cache", "workspace")
        counts = [self.library.ffi.new("int64_t *") for _ in names]
        self._call("engine_memory", *counts)
        return {name: count[0] for name, count in zip(names, counts, strict=True)}

    def free_memory(self) -> int:
        """Bytes that the device has left."""
        count = self.library.ffi.new("int64_t *")
        self._call("engine_free_memory", count)
        return count[0]

    def close(self) -> None:
        """Give everything back; closing twice is allowed."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self.library.check(self.library.lib.engine_destroy(handle))

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
