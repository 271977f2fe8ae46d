"""The engine's exceptions: one base, six kinds; a message says field, limit and value."""


class EngineError(Exception):
    """Anything the engine refuses or fails at."""


class InvalidArgument(EngineError, ValueError):
    """The caller's data is out of range; nothing was changed, the engine stays usable."""


class QueueFull(EngineError):
    """As many sequences wait as the engine was told to let wait; try again later."""


class CheckpointError(EngineError, ValueError):
    """A model directory is missing, damaged, or needs something this engine does not implement."""


class OutOfMemory(EngineError, MemoryError):
    """Host or device memory ran out; the message says what was asked and what was free."""


class DeviceUnavailable(EngineError):
    """The device asked for is not here: no GPU, no driver, or a build without CUDA."""


class DeviceFailed(EngineError):
    """The device failed in the middle of work: this engine is dead, the process lives."""
