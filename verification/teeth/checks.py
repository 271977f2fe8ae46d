"""Which checks a fault meets, in level order: the operator first, the whole system last.

Knows which tests belong to which source and what a test folder proves; knows nothing of faults.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from verification.mutants.catalogue import DEFAULT_MODEL, DEFAULT_PROMPTS
from verification.mutants.faults import CPU, GPU

# Where a fault can die, lowest first.
LEVELS = ("operator", "layer", "residual stream", "logits", "tokens", "system")

# The levels of verification.localise in these words; both of its operator levels are one here.
LEVEL_OF_FINDING = {
    "local": "operator",
    "accumulated": "operator",
    "layers": "layer",
    "residual": "residual stream",
    "logits": "logits",
    "tokens": "tokens",
    "system": "system",
}

LEVEL_OF_TESTS = {
    "tests/twin": "operator",
    "tests/common": "operator",
    "tests/kernels": "operator",
    "tests/model": "layer",
}

VERIFY, BITS, TESTS, PROPERTIES = "verify", "bits", "tests", "properties"
GPU_MARK = "gpu and not slow"  # tests that need a device, and no others


@dataclass(frozen=True)
class Check:
    """One thing that is asked of a planted tree.

    Args:
        kind: VERIFY, BITS, TESTS or PROPERTIES.
        label: its column of the matrix.
        arguments: those of verification.teeth.fork_server.
    """

    kind: str
    label: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def request(self) -> dict[str, Any]:
        """As the fork server reads it."""
        return {"kind": self.kind} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in self.arguments
        }

    @property
    def level(self) -> str:
        """The level at which it finds; verify tells its own, this is its lowest."""
        if self.kind == TESTS:
            return LEVEL_OF_TESTS.get("/".join(self.label.split("/")[:2]), "system")
        return "operator" if self.kind == VERIFY else "system"


def verify(model: str = DEFAULT_MODEL, prompts: str = DEFAULT_PROMPTS) -> Check:
    """The suite against transformers."""
    return Check(VERIFY, "verify", (("model", model), ("prompts", prompts)))


def bits(model: str = DEFAULT_MODEL, prompts: str = DEFAULT_PROMPTS) -> Check:
    """Every tap's bits against those without the fault."""
    return Check(BITS, "bits", (("model", model), ("prompts", prompts)))


def tests(path: str, device: str = CPU) -> Check:
    """A test file of the tree, or one of its tests, up to the first that fails."""
    marks = GPU_MARK if device == GPU else "not slow"
    return Check(TESTS, path, (("tests", (path,)), ("marks", marks)))


# Where a source is tested, when not in the file of its name under tests/.
OTHER_TESTS = {
    "csrc/twin/exp2": "tests/twin/test_exp2.py",
    "csrc/twin/packed_matrix": "tests/twin/test_linear.py",
    "csrc/twin/tensor_core_lanes": "tests/twin/test_tensor_core_routes.py",
    "csrc/twin/threads": "tests/twin/test_threads.py",
    "csrc/twin/twin_kernels": "tests/twin/test_tensor_core.py",
    "csrc/model/model": "tests/model/test_forward.py",
    "csrc/model/decode": "tests/system/test_fused_decode.py",
    "csrc/model/prefill": "tests/system/test_fused_prefill.py",
    "csrc/model/sample": "tests/twin/test_sample.py",
    "csrc/model/uniform": "tests/twin/test_sample.py",
    "csrc/twin/weight": "tests/twin/test_sample.py",
    "engine/outputs": "tests/engine/test_llm_engine.py",
    "engine/request": "tests/engine/test_llm_engine.py",
    "engine/request_checks": "tests/engine/test_llm_engine.py",
    "engine/sampling_struct": "tests/engine/test_sampling.py",
    "engine/sequence": "tests/engine/test_scheduler.py",
}
# What runs no C: no fault of the library can show there.
WITHOUT_LIBRARY = (
    "tests/system/test_llama3_tokenizer.py",
    "tests/system/test_small_scope.py",
    "tests/system/test_trace.py",
)
KERNEL_TESTS = {
    "argmax": ("tests/kernels/test_bits_argmax.py",),
    "attention": ("tests/kernels/test_bits_attention.py",),
    "embedding": ("tests/kernels/test_bits_copies.py",),
    "gather_rows": ("tests/kernels/test_bits_gather_rows.py",),
    "kv_cache": ("tests/kernels/test_bits_kv_cache.py", "tests/kernels/test_bits_attention.py"),
    "linear": ("tests/kernels/test_bits_linear.py", "tests/kernels/test_bits_fused_linear.py"),
    "gated_linear": ("tests/kernels/test_bits_fused_linear.py",),
    "qkv_linear": ("tests/system/test_fused_prefill.py",),
    "pack_weight": ("tests/kernels/test_bits_linear.py",),
    "decode": ("tests/kernels/test_bits_decode_step.py",),
    "decode_batch": ("tests/kernels/test_bits_decode_batch.py",),
    "device": ("tests/kernels/test_device_memory.py",),
    "edit_logits": ("tests/kernels/test_bits_sample.py",),
    "sample": ("tests/kernels/test_bits_sample.py",),
    "score_tokens": ("tests/kernels/test_bits_sample.py",),
    "weight": ("tests/kernels/test_bits_sample.py",),
    "residual_add": ("tests/kernels/test_bits_elementwise.py",),
    "silu": ("tests/kernels/test_bits_elementwise.py",),
    "exp2": ("tests/kernels/test_bits_elementwise.py",),
    "rms_norm": ("tests/kernels/test_bits_rms_norm.py",),
    "rotary_embedding": ("tests/kernels/test_bits_rotary_embedding.py",),
    "tensor_core_step": ("tests/kernels/test_bits_tensor_core_step.py",),
}


# Sources whose warps share memory by barriers alone: racecheck is asked last of all, over the case
# of this name. Bits may be right for ever without a barrier. Sampling takes it half a minute and
# more: that is left to make sanitize.
RACES = "tests/verification/sanitizers/test_races.py"
RACE = f"{RACES}::test_racecheck_finds_nothing_where_rounds_share_memory"
RACED = {
    "linear_few": "linear",
    "attention_decode": "attention",
    "rms_norm": "rows",
    "argmax": "rows",
}
# What the PTX of every kernel keeps, whatever its bits; asked of each file that includes a source.
PTX_RULES = "tests/kernels/test_ptx_rules.py"
PTX_RULE = f"{PTX_RULES}::test_a_sources_kernels_keep_every_rule"
INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.M)  # of the same folder
# What a launcher does where CUDA refuses; asked last in the GPU's lane, over a made-up runtime.
CUDA_FAULTS = "tests/runtime/test_cuda_faults.py"
# What a kernel's arithmetic is held to without a device; asked first there.
HOST_TESTS = {"csrc/kernels/decode_batch_line.cuh": "tests/kernels/test_decode_batch_line.py"}


def own_tests(file: str, root: Path) -> tuple[str, ...]:
    """The tests that a source's faults are first held to; they mirror the tree.

    Args:
        file: from the root of the checkout.

    Returns:
        Their files; none where a source is tested by those of its users alone.
    """
    path = Path(file)
    folder = "/".join(path.parts[:-1])
    if folder == "csrc/kernels":
        names = [name for name in KERNEL_TESTS if path.stem.startswith(name)]
        return KERNEL_TESTS[max(names, key=len)] if names else ()
    mirrored = f"tests/{folder.removeprefix('csrc/')}/test_{path.stem}.py"
    own = OTHER_TESTS.get(f"{folder}/{path.stem}", mirrored)
    return (own,) if (root / own).exists() else ()


def for_generated(file: str, device: str, root: Path) -> tuple[Check, ...]:
    """Every check that a generated fault meets until one fails: its own tests, then all others."""
    path, own = Path(file), own_tests(file, root)
    if device == GPU:
        on_host = [tests(HOST_TESTS[file])] if file in HOST_TESTS else []
        found = dict.fromkeys([*own, *gpu_tests(root)])
        ruled = [tests(f"{PTX_RULE}[{name}]") for name in compiled_into(file, root)]
        case = RACED.get(path.stem)
        raced = [tests(f"{RACE}[{case}]", GPU)] if case else []
        on_device = [tests(each, GPU) for each in found]
        return (*on_host, *on_device, tests(CUDA_FAULTS), *ruled, *raced)
    of_c = file.startswith("csrc/")
    folders = ("twin", "model", "runtime", "system") if of_c else ("engine", "system")
    wide = [path for folder in folders for path in _test_files(f"tests/{folder}", root)]
    if of_c:
        wide = [path for path in wide if path not in WITHOUT_LIBRARY]
    asked = tuple(tests(path) for path in dict.fromkeys([*own, *wide]))
    return (verify(), *asked) if of_c else (*asked, verify())


@cache
def compiled_into(file: str, root: Path) -> tuple[str, ...]:
    """The .cu files that a source of the kernels is part of, without their suffix.

    Args:
        file: from the root of the checkout.
    """
    folder, wanted = root / "csrc" / "kernels", {Path(file).name}
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.cu*")}
    if file != f"csrc/kernels/{Path(file).name}":
        return ()
    while more := {n for n in texts if wanted & set(INCLUDE.findall(texts[n]))} - wanted:
        wanted |= more
    return tuple(sorted(Path(name).stem for name in wanted if name.endswith(".cu")))


@cache
def gpu_tests(root: Path) -> tuple[str, ...]:
    """Every test file with tests that need a device."""
    folders = ("tests/kernels", "tests/system", "tests/runtime")
    found = [path for folder in folders for path in _test_files(folder, root)]
    texts = {path: (root / path).read_text(encoding="utf-8") for path in found}
    return tuple(p for p, text in texts.items() if "mark.gpu" in text or "runner_of" in text)


@cache
def _test_files(folder: str, root: Path) -> tuple[str, ...]:
    paths = sorted((root / folder).rglob("test_*.py"))
    return tuple(path.relative_to(root).as_posix() for path in paths)
