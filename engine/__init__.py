"""Touchstone's engine: Llama-architecture models in C and CUDA, driven from Python."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from engine.errors import (
    CheckpointError,
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    InvalidArgument,
    OutOfMemory,
    QueueFull,
)
from engine.interrupts import tell_in_one_line

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.llm_engine import LLMEngine
    from engine.outputs import RequestOutput
    from engine.sampling_params import SamplingParams

# Imported when first asked for: importing the package loads neither numpy nor the library.
_LAZY = {
    "LLM": "engine.llm",
    "LLMEngine": "engine.llm_engine",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "DeviceFailed",
    "DeviceUnavailable",
    "EngineError",
    "InvalidArgument",
    "LLMEngine",
    "OutOfMemory",
    "QueueFull",
    "RequestOutput",
    "SamplingParams",
]


if sys.argv[:1] == ["-m"]:  # a command is about to be imported, which takes seconds
    tell_in_one_line()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
