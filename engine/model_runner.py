"""Own the C engine: load a model directory into it, run batches, give results back.

Knows checkpoints and arrays; which sequences run and which token comes next is decided elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.batch import Batch
from engine.bindings import Engine, Library, Tap, TapPoint
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.sampling import Logprobs, SamplingBatch

# Told after each tensor: how many are loaded, of how many, and the last one's name.
LoadProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class StepOutput:
    """What a step gives back, one row per row of logits that was asked for."""

    logits: np.ndarray | None  # [num_logits, vocab_size] float32, unmodified; None: not wanted
    next_ids: np.ndarray  # [num_logits] int32: each row's arg-max, or the token drawn
    logprobs: Logprobs | None = None  # None: no row asked


class ModelRunner:
    """A model, loaded and ready. Close it, or use it in a with statement.

    Args:
        directory: the model in Hugging Face form.
        engine_config: device and room.
        library: a loaded library; by default the one that make builds.
        progress: told after each loaded tensor.

    Raises:
        CheckpointError: the directory is damaged or needs what this engine does not implement.
        InvalidArgument, OutOfMemory, DeviceUnavailable: the engine's own refusal.
    """

    def __init__(
        self,
        directory: Path,
        engine_config: EngineConfig,
        library: Library | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.config = ModelConfig.from_directory(self.directory)
        self.engine_config = engine_config
        self.library = library or Library()
        self._begun: StepOutput | None = None  # of the step between begin and end
        self.not_finite: dict[str, int] = {}  # tensors with NaN or infinite weights, and how many
        with (
            open_checkpoint(self.directory, self.config) as checkpoint,
            checkpoint.read_ahead() as tensors,
        ):
            self.engine = Engine(self.library, self.config, engine_config)
            try:
                num_tensors = len(checkpoint.names())
                for done, (name, values) in enumerate(tensors, start=1):
                    count = self.engine.load_weight(name, values)
                    if count:
                        self.not_finite[name] = count
                    if progress is not None:
                        progress(done, num_tensors, name)
                self.engine.finish_loading()
            except BaseException:
                self.engine.close()
                raise

    def forward(
        self,
        batch: Batch,
        taps: Sequence[Tap] = (),
        sampling: SamplingBatch | None = None,
        wants_logits: bool = True,
    ) -> StepOutput:
        """Run one step; see engine.bindings.Engine.forward.

        Args:
            batch: the step's sequences.
            taps: values to copy out or to replace.
            sampling: how each row's token is chosen and scored; None: the arg-max.
            wants_logits: whether the logits come back; they are most of what a step copies.
        """
        output = self._output(batch, sampling, wants_logits)
        self.engine.forward(batch, taps, output.logits, output.next_ids, sampling, output.logprobs)
        return output

    def begin(
        self, batch: Batch, sampling: SamplingBatch | None = None, wants_logits: bool = True
    ) -> None:
        """Start a step; the batch's arrays may change from here on. `end` must follow."""
        output = self._output(batch, sampling, wants_logits)
        self.engine.forward_begin(batch, output.logits, output.next_ids, sampling, output.logprobs)
        self._begun = output

    def end(self) -> StepOutput:
        """Wait for the step that was begun; what it gave."""
        self.engine.forward_end()
        return self._begun

    def _output(
        self, batch: Batch, sampling: SamplingBatch | None, wants_logits: bool
    ) -> StepOutput:
        """Arrays for a step to fill."""
        num_logits = len(batch.logits_indices)
        logits, logprobs = None, None
        if wants_logits:
            logits = np.empty((num_logits, self.config.vocab_size), np.float32)
        if sampling is not None and sampling.max_logprobs is not None:
            logprobs = Logprobs.empty(num_logits, sampling.max_logprobs)
        return StepOutput(logits, np.empty(num_logits, np.int32), logprobs)

    def tap_buffer(self, point: TapPoint, batch: Batch) -> np.ndarray:
        """An array of the right shape and dtype for a tap of this batch."""
        width, dtype = self.engine.tap_shape(point)
        is_output = point in (TapPoint.final_norm, TapPoint.logits)
        return np.empty((len(batch.logits_indices if is_output else batch.input_ids), width), dtype)

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V of some cache slots; see engine.bindings.Engine.read_kv."""
        return self.engine.read_kv(layer, slots)

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        """Set KV blocks to one bf16 pattern; see engine.bindings.Engine.fill_blocks."""
        self.engine.fill_blocks(block_ids, value)

    def close(self) -> None:
        """Give everything back; closing twice is allowed."""
        self.engine.close()

    def __enter__(self) -> "ModelRunner":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
