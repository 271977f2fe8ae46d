"""Records what this machine's GPU computes: the only writer of golden/<card>/ (`make record-gpu`).

Runs four parts, or takes the results that an earlier command left for this very source: the bits of
every model, the tests that need a GPU, the sanitizers, the benchmarks. Decides what is "not
run" and says why; judges nothing else. CI holds the record to the twin (tests/golden).
Invariant: a record is written whole; a result of another source is never taken.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from engine.bindings import Library
from engine.config import ModelConfig
from engine.errors import CheckpointError, EngineError
from engine.models import resolve
from verification import goldens
from verification.gpu_bits import MODELS, PromptBits, model_bits, num_taps, recorded_prompts
from verification.gpu_record import (
    FILES,
    MAX_BYTES,
    RECORD_DIRECTORY,
    SCHEMA,
    bits_to_text,
    gpu_source_stamp,
    load,
)
from verification.interrupts import INTERRUPTED
from verification.kernel_tests import KernelTests
from verification.prompts import prompts_sha256
from verification.provenance import software_versions, weights_sha256

ROOT = goldens.GOLDEN_ROOT.parent
BUILD = ROOT / "build"
# Results that other commands leave, and the command that makes each.
RESULTS = {
    "sanitizers": (BUILD / "sanitize.json", [sys.executable, "-m", "verification.sanitizers"]),
    "benchmarks": (BUILD / "bench.json", ["make", "VENV=system", "bench-gpu"]),
}
CARD_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory": "memory.total",
    "compute_capability": "compute_cap",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
}


def card_facts() -> dict[str, str]:
    """The GPU and its driver, as nvidia-smi names them.

    Raises:
        EngineError: there is no nvidia-smi, or it finds no GPU.
    """
    query = ",".join(CARD_FIELDS.values())
    line = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0")
    if line is None:
        raise EngineError("nvidia-smi finds no GPU: a GPU record is made on a machine that has one")
    return dict(zip(CARD_FIELDS, (word.strip() for word in line.split(",")), strict=True))


def toolkit_version() -> str | None:
    """The CUDA toolkit whose nvcc built the library (NVCC in the environment, as make sets it)."""
    text = _output(os.environ.get("NVCC") or "nvcc", "--version") or ""
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def record_bits(names: Sequence[str] = MODELS) -> tuple[dict, dict[str, dict[str, PromptBits]]]:
    """The bits of some models on the GPU.

    Returns:
        The part's facts, and the bits of each model that could be had.
    """
    library = Library()
    models, bits = {}, {}
    for name in names:
        try:
            directory = resolve(name)
        except CheckpointError as error:
            models[name] = {"status": "not run", "reason": str(error).removeprefix(f"{name}: ")}
            continue
        prompts = recorded_prompts(name, directory)
        bits[name] = model_bits(name, directory, prompts, "cuda", library)
        models[name] = {
            "status": "recorded",
            "weights_sha256": weights_sha256(directory, ModelConfig.from_directory(directory)),
            "num_prompts": len(prompts),
            "num_taps": num_taps(bits[name]),
        }
        print(f"  {name}: {len(prompts)} prompts, {num_taps(bits[name])} taps", flush=True)
    return {"status": "recorded", "models": models}, bits


def bits_of(source: str) -> tuple[dict, dict[str, dict[str, PromptBits]]]:
    """What record_bits gives, as an earlier record of this source left it if it had every model."""
    path = BUILD / "gpu_bits.json"
    found = _read(path, source)
    if found is None or any(of["status"] != "recorded" for of in found["facts"]["models"].values()):
        facts, bits = record_bits()
        found = {"gpu_source": source, "facts": facts, "bits": bits}
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found["facts"], found["bits"]


def kernel_tests(source: str, tests: KernelTests) -> dict:
    """The counts of the GPU's tests, as an earlier record of this source left them, or of a run."""
    path = BUILD / "kernel_tests.json"
    found = _read(path, source)
    if found is None or "num_tests" not in found:  # one that did not end has no counts
        found = {"gpu_source": source, **tests.run(BUILD)}
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def result_of(part: str, source: str) -> dict:
    """What the command of a part left for this source; the command is run if it left nothing."""
    path, command = RESULTS[part]
    found = _read(path, source)
    if found is None:
        print(f"  {part}: {' '.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout + done.stderr, end="", flush=True)
        found = _read(path, source)
    if found is None:
        return {"status": "not run", "reason": f"{path.name} was not made for this source"}
    return found


def _read(path: Path, source: str) -> dict | None:
    """A result file, if it is of this source."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("gpu_source") == source else None


def write(directory: Path, facts: Mapping, bits: Mapping[str, Mapping[str, PromptBits]]) -> None:
    """Writes one record in place of the old one; complete or not at all.

    Args:
        directory: golden/<card>; replaced as a whole.
        facts: as in record.json, without the hash of the bits, which is added here.
        bits: model -> prompt id -> phase -> tap -> a hash per layer.
    """
    text = bits_to_text(bits)
    digest = hashlib.sha256(text.encode()).hexdigest()
    whole = {**facts, "bits": {**facts["bits"], "sha256": digest}}
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / "record.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        (new / "bits.json").write_text(text, encoding="utf-8")
        load(new)  # what cannot be read back is not put in place
        size = sum((new / name).stat().st_size for name in FILES)
        if size > MAX_BYTES:
            raise EngineError(f"the record has {size} bytes, at most {MAX_BYTES} are kept in git")
        if directory.exists():
            os.rename(directory, Path(scratch) / "old")
        os.rename(new, directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 recorded and nothing failed, 1 otherwise, 2 wrong use, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m verification.record_gpu", description=__doc__)
    optional = ("kernel_tests", *RESULTS)
    parser.add_argument(
        "--without", default="", help=f"parts to leave out, with commas: {', '.join(optional)}"
    )
    parser.add_argument("--to", type=Path, default=RECORD_DIRECTORY, help="default: %(default)s")
    options = parser.parse_args(arguments)
    left_out = [word for word in options.without.split(",") if word]
    if unknown := [word for word in left_out if word not in optional]:
        parser.error(f"argument --without: {unknown[0]!r} is none of {', '.join(optional)}")
    try:
        facts = record(options.to, left_out)
    except EngineError as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print("interrupted: no record was written")
        return INTERRUPTED
    for part in ("bits", *optional):
        print(f"  {part:<13} {facts[part]['status']}  {facts[part].get('reason', '')}")
    return 1 if any(facts[part]["status"] == "fail" for part in optional) else 0


def record(directory: Path, left_out: Sequence[str]) -> dict:
    """Runs the parts and writes the record; its facts."""
    source, library = gpu_source_stamp(), Library()
    BUILD.mkdir(exist_ok=True)
    facts = {
        "schema": SCHEMA,
        "gpu_source": source,
        "source_stamp": library.source_stamp,
        "numerics_version": library.numerics_version,
        "prompts_sha256": prompts_sha256(),
        "git_commit": commit_of(ROOT),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": card_facts(),
        "software": {"toolkit": toolkit_version(), **software_versions()},
    }
    without = {"status": "not run", "reason": "left out on the command line"}

    def unless_left_out(part: str, run: Callable[[], dict]) -> dict:
        return without if part in left_out else run()

    tests = KernelTests()
    with ThreadPoolExecutor(1) as aside:  # neither disturbs a bit of the other
        tested = aside.submit(unless_left_out, "kernel_tests", lambda: kernel_tests(source, tests))
        try:
            facts["bits"], bits = bits_of(source)
            facts["kernel_tests"] = tested.result()
        except KeyboardInterrupt:
            tests.stop()
            raise
    # Alone on the machine: beside racecheck everything waits for the card, and speed is timed.
    for part in RESULTS:
        facts[part] = unless_left_out(part, functools.partial(result_of, part, source))
    if gpu_source_stamp() != source:
        raise EngineError("csrc/ changed while the record was made: nothing was written")
    write(directory, facts, bits)
    return facts


def commit_of(root: Path) -> str | None:
    """The commit that a checkout is, or None: a tree with changes is none, and has its hashes."""
    if _output("git", "-C", str(root), "status", "--porcelain", "-uno") != "":
        return None
    return _output("git", "-C", str(root), "rev-parse", "HEAD")


def _output(*command: str) -> str | None:
    """What a command prints, or None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
