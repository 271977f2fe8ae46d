"""Touchstone's engine: Llama-architecture models in C and CUDA, driven from Python."""

from engine.errors import (
    CheckpointError,
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    InvalidArgument,
    OutOfMemory,
    QueueFull,
)

__all__ = [
    "CheckpointError",
    "DeviceFailed",
    "DeviceUnavailable",
    "EngineError",
    "InvalidArgument",
    "OutOfMemory",
    "QueueFull",
]
