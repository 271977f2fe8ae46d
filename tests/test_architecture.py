"""Who may know whom: import directions in Python, include directions in C.

Each rule is a function over paths or text, and each is shown a file that breaks it.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.tree import CSRC, ENGINE, ROOT, TESTS, VERIFICATION, c_sources, files, relative

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
    "edit_table",
    "scheduler",
    "outputs",
    "answer_text",
    "text_stream",
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


class TestPython:
    @pytest.mark.parametrize("package", ["torch", "transformers", "verification", "tests"])
    def test_the_engine_never_imports(self, package: str):
        guilty = [p for p in files(ENGINE, ".py") if imports_of(p.read_text(), package)]

        assert relative(guilty) == []

    def test_only_bindings_knows_cffi(self):
        guilty = [p for p in files(ENGINE, ".py") if imports_of(p.read_text(), "cffi")]

        assert relative(guilty) == ["engine/bindings.py"]

    def test_only_engine_knows_cffi(self):
        guilty = [p for p in files(VERIFICATION, ".py") if imports_of(p.read_text(), "cffi")]

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
        folders = (ENGINE, VERIFICATION, TESTS)
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
