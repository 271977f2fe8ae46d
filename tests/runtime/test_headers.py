"""The public headers compile alone, as C11 and as C++17, and their structs are what cffi thinks."""

import shutil
import subprocess
from pathlib import Path

import pytest

from engine.bindings import Library

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
STRUCTS = (
    "EngineBuildInfo",
    "EngineModelConfig",
    "EngineOptions",
    "EngineBatch",
    "EngineTap",
    "EngineSampling",
    "EngineSamplingRow",
    "EngineLogitEdit",
)
LANGUAGES = {"C11": ("cc", "c", "-std=c11"), "C++17": ("c++", "c++", "-std=c++17")}


def compile_source(
    language: str, source: str, tmp_path: Path, *extra: str
) -> subprocess.CompletedProcess:
    name, kind, standard = LANGUAGES[language]
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"requires a {language} compiler")
    path = tmp_path / "source.txt"
    path.write_text(source)
    return subprocess.run(
        [
            compiler,
            "-x",
            kind,
            standard,
            "-Wall",
            "-Wextra",
            "-pedantic",
            "-Werror",
            f"-I{INCLUDE}",
            *(extra or ("-fsyntax-only",)),
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("header", ["engine.h", "ops.h"])
def test_a_header_compiles_alone_and_twice(language: str, header: str, tmp_path: Path):
    source = f'#include "{header}"\n#include "{header}"\nint used;\n'
    if language == "C++17":
        source = f'extern "C" {{\n{source}}}\n'

    done = compile_source(language, source, tmp_path)

    assert done.returncode == 0, done.stderr


def test_a_warning_would_be_an_error(tmp_path: Path):
    done = compile_source("C11", '#include "engine.h"\nint none[0];\n', tmp_path)

    assert done.returncode != 0


def test_sizes_and_offsets_are_those_that_cffi_computed(library: Library, tmp_path: Path):
    ffi = library.ffi
    checks = []
    for struct in STRUCTS:
        kind = ffi.typeof(struct)
        checks.append(f'_Static_assert(sizeof({struct}) == {ffi.sizeof(struct)}, "{struct}");')
        for name, field in kind.fields:
            checks.append(
                f'_Static_assert(offsetof({struct}, {name}) == {field.offset}, "{struct}.{name}");'
            )

    done = compile_source("C11", '#include "ops.h"\n' + "\n".join(checks) + "\n", tmp_path)

    assert done.returncode == 0, done.stderr
    assert len(checks) > 50


def test_the_header_is_used_from_cxx_as_from_c(library: Library, tmp_path: Path):
    # links against the library: the functions are there under their C names
    source = (
        'extern "C" {\n#include "ops.h"\n}\n'
        "int main() {\n    EngineBuildInfo info;\n"
        "    return engine_build_info(&info) == STATUS_OK ? 0 : 1;\n}\n"
    )
    object_file, program = tmp_path / "object.o", tmp_path / "program"
    done = compile_source("C++17", source, tmp_path, "-c", "-o", str(object_file))
    assert done.returncode == 0, done.stderr

    path = library.path.resolve()
    link = [shutil.which("c++"), object_file, path, "-o", program, f"-Wl,-rpath,{path.parent}"]
    subprocess.run(link, check=True)

    assert subprocess.run([program], check=False).returncode == 0
