"""Who may know whom: import directions in Python, include directions in C, and the catalogue.

Each rule is a function over paths or text, and each is shown a file that breaks it.
"""

import ast
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC, ENGINE, TESTS = ROOT / "csrc", ROOT / "engine", ROOT / "tests"

MAX_LINES = 400
MAX_FORWARD_LINES = 150
SOURCES = (".py", ".c", ".h", ".cu", ".cuh")

# Modules that decide with plain data: testable without a library, so they must not load one.
PURE = (
    "errors",
    "config",
    "config_fields",
    "json_file",
    "source_stamp",
    "batch",
    "sampling",
    "sampling_params",
    "checkpoint",
    "safetensors_file",
    "tokenizer",
    "models",
    "sources",
    "sequence",
    "block_manager",
    "running_batch",
    "scheduler",
    "outputs",
    "answer_text",
    "request",
    "request_checks",
    "llm_engine",
    "room",
    "bench",
)


def python_imports(source: str) -> set[str]:
    """Every module that a file names in an import, at any depth, in full."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.add("." * node.level + (node.module or ""))
            elif node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(source: str, package: str) -> bool:
    return any(n == package or n.startswith(f"{package}.") for n in python_imports(source))


def files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())


def relative(paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


class TestPython:
    @pytest.mark.parametrize("package", ["torch", "transformers", "verification", "tests"])
    def test_the_engine_never_imports(self, package: str):
        guilty = [p for p in files(ENGINE, ".py") if imports_of(p.read_text(), package)]

        assert relative(guilty) == []

    def test_only_bindings_knows_cffi(self):
        guilty = [p for p in files(ENGINE, ".py") if imports_of(p.read_text(), "cffi")]

        assert relative(guilty) == ["engine/bindings.py"]

    def test_only_engine_knows_cffi(self):
        guilty = [
            p for p in files(ROOT / "verification", ".py") if imports_of(p.read_text(), "cffi")
        ]

        assert relative(guilty) == []

    def test_modules_of_plain_data_do_not_load_the_library(self):
        reached = {name: set() for name in PURE}
        for path in files(ENGINE, ".py"):
            name = path.relative_to(ENGINE).parts[0].removesuffix(".py")
            if name in reached:
                reached[name] |= python_imports(path.read_text())

        forbidden = ("engine.bindings", "engine.ops", "engine.model_runner")
        guilty = {n: f for n, found in reached.items() for f in forbidden if f in found}

        assert guilty == {}

    def test_the_pure_modules_exist(self):
        assert [
            n for n in PURE if not (ENGINE / n).is_dir() and not (ENGINE / f"{n}.py").exists()
        ] == []

    @pytest.mark.parametrize("folder", ["engine", "verification"])
    def test_nothing_imports_the_tests(self, folder: str):
        guilty = [p for p in files(ROOT / folder, ".py") if imports_of(p.read_text(), "tests")]

        assert relative(guilty) == []

    def test_imports_are_absolute(self):
        folders = (ENGINE, ROOT / "verification", TESTS)
        guilty = [
            path
            for folder in folders
            for path in files(folder, ".py")
            if any(name.startswith(".") for name in python_imports(path.read_text()))
        ]

        assert relative(guilty) == []

    def test_importing_the_engine_does_not_load_torch(self):
        import sys

        modules = [f"engine.{p.stem}" for p in sorted(ENGINE.glob("*.py")) if p.stem != "__main__"]
        program = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"

        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )

        assert done.stdout.strip() == "False"

    @pytest.mark.parametrize(
        ("source", "package", "expected"),
        [
            ("import torch", "torch", True),
            ("import torch.nn as nn", "torch", True),
            ("from torch import nn", "torch", True),
            ("def f():\n    from torch.nn import Linear", "torch", True),
            ("import torchvision", "torch", False),
            ("# import torch\n'import torch'", "torch", False),
        ],
    )
    def test_the_search_finds_an_import_wherever_it_hides(self, source, package, expected):
        assert imports_of(source, package) is expected


def quoted_includes(source: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', source, re.M)


def angle_includes(source: str) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+<([^>]+)>", source, re.M)


# Which folders a folder of csrc/ may include from; kernels.h is the one thing below model and twin.
MAY_INCLUDE = {
    "include": {"include"},
    "common": {"include", "common"},
    "kernels": {"common", "kernels"},
    "twin": {"common", "twin", "kernels/kernels.h"},
    "model": {"common", "model", "kernels/kernels.h"},
    "runtime": {"include", "common", "model", "runtime"},
}


def forbidden_includes(path: Path, source: str) -> list[str]:
    """The quoted includes of a file of csrc/ that its folder may not have."""
    folder = path.relative_to(CSRC).parts[0]
    guilty = []
    for include in quoted_includes(source):
        target = (path.parent / include).resolve()
        if not target.is_relative_to(CSRC):
            guilty.append(include)
            continue
        inside = target.relative_to(CSRC)
        if (
            inside.parts[0] not in MAY_INCLUDE[folder]
            and inside.as_posix() not in MAY_INCLUDE[folder]
        ):
            guilty.append(include)
    return guilty


def c_sources() -> list[Path]:
    return files(CSRC, ".c", ".h", ".cu", ".cuh")


class TestC:
    def test_every_folder_has_a_rule(self):
        assert {path.relative_to(CSRC).parts[0] for path in c_sources()} == set(MAY_INCLUDE)

    @pytest.mark.parametrize("path", c_sources(), ids=lambda p: p.relative_to(CSRC).as_posix())
    def test_includes_point_only_downwards(self, path: Path):
        assert forbidden_includes(path, path.read_text()) == []

    @pytest.mark.parametrize("path", c_sources(), ids=lambda p: p.relative_to(CSRC).as_posix())
    def test_every_quoted_include_exists(self, path: Path):
        missing = [i for i in quoted_includes(path.read_text()) if not (path.parent / i).exists()]

        assert missing == []

    @pytest.mark.parametrize(
        ("path", "source", "guilty"),
        [
            ("twin/a.c", '#include "../model/model.h"', ["../model/model.h"]),
            ("twin/a.c", '#include "../kernels/kernels.h"', []),
            ("twin/a.c", '#include "../kernels/linear.cuh"', ["../kernels/linear.cuh"]),
            ("common/a.h", '#include "../twin/exp2.h"', ["../twin/exp2.h"]),
            ("kernels/a.cu", '  # include "../twin/exp2.h"', ["../twin/exp2.h"]),
            ("model/a.c", '#include "../runtime/batch.h"', ["../runtime/batch.h"]),
            ("runtime/a.c", '#include "../../engine/x.h"', ["../../engine/x.h"]),
        ],
    )
    def test_the_rule_notices_an_include_that_points_upwards(self, path, source, guilty):
        assert forbidden_includes(CSRC / path, source) == guilty

    def test_no_twin_operation_includes_another(self):
        # a header serves several operations; a .c file is one
        operations = {path.stem for path in (CSRC / "twin").glob("*.c")}
        shared = {"exp2", "kv_cache", "packed_matrix", "threads", "weight"}
        shared |= {"tensor_core", "tensor_core_lanes"}
        for path in files(CSRC / "twin", ".c", ".h"):
            for include in quoted_includes(path.read_text()):
                name = Path(include)
                assert name.suffix == ".h", f"{path.name} includes {include}"
                if (path.parent / include).resolve().parent == CSRC / "twin":
                    assert name.stem in shared, f"{path.name} includes {include}"
        assert operations - shared >= {"linear", "attention", "rms_norm"}

    def test_cuda_sources_are_only_in_kernels(self):
        guilty = [
            path
            for path in c_sources()
            if path.suffix == ".cu" and path.relative_to(CSRC).parts[0] != "kernels"
        ]

        assert relative(guilty) == []

    def test_cuda_headers_are_known_only_to_kernels_and_what_only_they_include(self):
        guilty = [
            path
            for path in c_sources()
            if any(
                i.startswith(("cuda", "cooperative", "mma"))
                for i in angle_includes(path.read_text())
            )
            and path.relative_to(CSRC).parts[0] != "kernels"
            and path.relative_to(CSRC).as_posix() != "common/cuda_status.h"
            and path.suffix != ".cuh"
        ]

        assert relative(guilty) == []

    def test_what_is_not_cuda_never_includes_cuda_headers_of_ours(self):
        cuda = {"cuda_status.h"} | {p.name for p in c_sources() if p.suffix == ".cuh"}
        guilty = [
            path
            for path in c_sources()
            if path.suffix in (".c", ".h")
            and path.name not in cuda
            and cuda & {Path(i).name for i in quoted_includes(path.read_text())}
        ]

        assert relative(guilty) == []

    @pytest.mark.parametrize(
        "word", ["abort", "exit", "_exit", "printf", "puts", "perror", "assert"]
    )
    def test_the_library_never_ends_the_process_and_never_prints(self, word: str):
        call = re.compile(rf"(?<![\w.>]){word}\s*\(")
        guilty = [path for path in c_sources() if call.search(without_comments(path.read_text()))]

        assert relative(guilty) == []

    def test_the_public_headers_hold_nothing_for_a_preprocessor(self):
        allowed = ("#pragma once", "#pragma GCC visibility", "#include <std", '#include "engine.h"')
        for path in files(CSRC / "include", ".h"):
            for line in path.read_text().splitlines():
                assert not line.startswith("#") or line.startswith(allowed), f"{path.name}: {line}"


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.S)


def catalogue() -> str:
    return (CSRC / "kernels" / "kernels.h").read_text()


# What fuses others, and where: null in the twin's table, whose operations it must equal to the bit.
FUSED = {
    "decode_workspace_bytes": "kernels/test_bits_decode_step.py",
    "open_decode_graphs": "kernels/test_bits_decode_batch.py",
    "close_decode_graphs": "kernels/test_bits_decode_batch.py",
    "decode_max_seqs": "kernels/test_bits_decode_step.py",
    "decode_step": "kernels/test_bits_decode_step.py",
    "linear_add": "kernels/test_bits_fused_linear.py",
    "gated_linear": "kernels/test_bits_fused_linear.py",
    "qkv_linear": "system/test_fused_prefill.py",
    "fused_min_tokens": "system/test_fused_prefill.py",
}


def operations() -> list[str]:
    """The operations of kernels.h: members of the table that compute something."""
    table = re.search(r"typedef struct Kernels \{(.*?)\} Kernels;", catalogue(), re.S)
    assert table is not None
    members = re.findall(r"^\s+\w+ \*(\w+);", table[1], re.M)
    plumbing = {
        "open_stream",
        "close_stream",
        "alloc",
        "free",
        "copy_in",
        "copy_out",
        "synchronize",
        "free_memory",
        "packed_bytes",
        "name",
    }
    return [name for name in members if name not in plumbing | FUSED.keys()]


# Where an operation is tested, when not in tests/twin/test_<operation>.py.
TESTED_IN = {
    "pack_weight": "system/test_weight_properties.py",  # load and read back
    "unpack_weight": "system/test_weight_properties.py",
    "gather_rows": "system/test_schedule_invariance.py",  # the wanted rows of the logits
    "linear_f32": "twin/test_linear.py",
    "write_kv_cache": "twin/test_kv_cache.py",
    "read_kv_cache": "twin/test_kv_cache.py",
    "fill_block": "twin/test_kv_cache.py",
    "tensor_core_step": "twin/test_tensor_core.py",
    "restore_logits": "twin/test_score_tokens.py",  # scores are those of unedited logits
}


class TestTheCatalogue:
    def test_it_is_not_empty(self):
        assert len(operations()) >= 17

    @pytest.mark.parametrize("operation", operations())
    @pytest.mark.parametrize("backend", ["twin", "cuda"])
    def test_each_backend_declares_each_operation(self, operation: str, backend: str):
        assert re.search(rf"\b{backend}_{operation}\b", catalogue())

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_a_twin_and_is_in_its_table(self, operation: str):
        table = (CSRC / "twin" / "twin_kernels.c").read_text()
        definition = re.compile(rf"^Status twin_{operation}\(", re.M)

        assert re.search(rf"\.{operation} = twin_{operation},", table)
        assert any(definition.search(path.read_text()) for path in files(CSRC / "twin", ".c"))

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_a_kernel_and_is_in_its_table(self, operation: str):
        table = (CSRC / "kernels" / "cuda_kernels.c").read_text()
        definition = re.compile(rf"Status cuda_{operation}\(")

        assert re.search(rf"\.{operation} = cuda_{operation},", table)
        assert any(definition.search(p.read_text()) for p in files(CSRC / "kernels", ".cu", ".c"))

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_its_tests(self, operation: str):
        place = TESTS / TESTED_IN.get(operation, f"twin/test_{operation}.py")

        assert place.exists(), f"{operation} has no test file"
        assert re.search(r"^\s*def test_", place.read_text(), re.M)

    @pytest.mark.parametrize("operation", sorted(FUSED))
    def test_a_fused_operation_is_the_gpus_alone_and_is_held_to_the_bits(self, operation: str):
        gpu_table = (CSRC / "kernels" / "cuda_kernels.c").read_text()
        twin_table = (CSRC / "twin" / "twin_kernels.c").read_text()

        assert f".{operation} = cuda_{operation}," in gpu_table
        assert operation not in twin_table
        assert (TESTS / FUSED[operation]).exists()

    def test_each_source_has_every_test_that_it_refers_to(self):
        for path in c_sources():
            for reference in re.findall(r"tests/[\w/]+\.py", path.read_text()):
                assert (ROOT / reference).exists(), f"{path.name} refers to {reference}"


class TestSizes:
    def test_the_decoder_fits_one_page(self):
        assert len((CSRC / "model" / "forward.c").read_text().splitlines()) <= MAX_FORWARD_LINES

    @pytest.mark.parametrize("folder", ["csrc", "engine", "verification"])
    def test_no_source_is_longer_than_one_can_keep_in_mind(self, folder: str):
        long = {
            path.relative_to(ROOT).as_posix(): count
            for path in files(ROOT / folder, *SOURCES)
            if (count := len(path.read_text().splitlines())) > MAX_LINES
        }

        assert long == {}

    def test_every_module_says_what_it_is(self):
        for folder in (ENGINE, ROOT / "verification"):
            for path in files(folder, ".py"):
                assert ast.get_docstring(ast.parse(path.read_text())), path
        for path in c_sources():
            assert path.read_text().startswith(f"// {path.name} -- "), path


def tracked_files() -> list[Path]:
    """What git tracks, or, in a copy without git, every file of the tree's own folders."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        return [
            path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()
        ]
    folders = ("csrc", "engine", "verification", "tests", "docs")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return [path for path in paths if path.is_file() and path.suffix in SOURCES]


# Spelled in pieces, so that this file does not match itself.
PRIVATE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"home/\w",
            r"(?<![\w.])/" + r"root/",
            r"(?<![\w.])/" + r"tmp/\w",
            r"(?<![\w.])/" + r"work/",
            r"(?<![\w.])/" + r"Users/\w",
            "pypi" + r"\.org",
            "files\\." + "pythonhosted",
            r"index-url\s*=?\s*http",
            "proxy\\." + "golang",
            "registry\\." + "npmjs",
        ]
    )
)
TEXT = (*SOURCES, ".md", ".toml", ".txt", ".json", ".jsonl", ".yml", ".yaml", ".html", "")


class TestWhatIsPublished:
    def test_no_file_names_this_machine_or_a_registry(self):
        found = {}
        for path in tracked_files():
            if path.suffix not in TEXT or path.stat().st_size > 4_000_000:
                continue
            match = PRIVATE.search(path.read_text(encoding="utf-8", errors="replace"))
            if match:
                found[path.relative_to(ROOT).as_posix()] = match[0]

        assert found == {}

    @pytest.mark.parametrize(
        "text",
        [
            "cd /" + "home/me",
            "see /" + "tmp/x.log",
            "https://" + "pypi" + ".org/simple",
            "/" + "root/.cache",
        ],
    )
    def test_the_search_finds_what_it_looks_for(self, text: str):
        assert PRIVATE.search(text)

    def test_nothing_is_left_to_be_done(self):
        mark = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
        guilty = [
            path
            for folder in ("csrc", "engine", "verification", "tests")
            for path in files(ROOT / folder, *SOURCES)
            if mark.search(path.read_text())
        ]

        assert relative(guilty) == []

    def test_no_test_of_a_mirrored_source_has_lost_it(self):
        missing = [
            path
            for path in (TESTS / "engine").glob("test_*.py")
            if not (ENGINE / f"{path.stem.removeprefix('test_')}.py").exists()
            and path.stem != "test_main"  # of __main__.py
        ]

        assert relative(missing) == []
