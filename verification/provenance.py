"""Where results come from: versions, processor, and a hash of the weights."""

import platform
from importlib.metadata import version
from pathlib import Path

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig


def weights_sha256(model_dir: Path, config: ModelConfig) -> str:
    """One hash of all weights, as the checkpoint reader computes it."""
    with open_checkpoint(Path(model_dir), config) as checkpoint:
        return checkpoint.sha256()


def software_versions() -> dict[str, str]:
    """What computed the reference values."""
    return {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor as the system names it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
