"""Strangers' kernels, right and wrong, in plain C; the two of the README among them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.verification.verify_op.kernels import KERNELS
from verification.verify_op import __main__ as command
from verification.verify_op import trial
from verification.verify_op.process import Kernel, KernelError
from verification.verify_op.trial import Check, checks

EXAMPLES = Path(__file__).parent / "examples"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Compiles C to a shared object."""
    folder = tmp_path_factory.mktemp("kernels")

    def compile_c(name: str, source: str) -> Path:
        (folder / f"{name}.c").write_text(source)
        target = folder / f"{name}.so"
        if not target.exists():
            command = [
                "cc",
                "-O2",
                "-shared",
                "-fPIC",
                "-Wall",
                "-Werror",
                "-Wno-unused-function",
                "-o",
                str(target),
            ]
            subprocess.run([*command, str(folder / f"{name}.c"), "-lm"], check=True)
        return target

    return compile_c


@pytest.fixture
def tried(compiled: Callable[[str, str], Path]) -> Callable[..., dict[str, Check]]:
    """The checks of a kernel on the smallest toy, by name."""

    def run(operation: str, name: str, source: str) -> dict[str, Check]:
        with Kernel(compiled(name, source), operation, timeout=5.0) as kernel:
            found = checks(kernel, lambda model: True, ("toy",))
            return {check.name: check for check in found}

    return run


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if not check.verdict.passed]


def example(name: str) -> str:
    return (EXAMPLES / f"{name}.c").read_text()


def test_the_right_rms_norm_passes_every_check(tried):
    found = tried("rms_norm", "right_rms_norm", example("right_rms_norm"))

    assert failed(found) == []
    assert len(found) == 5
    assert all(check.values > 0 for check in found.values())


def test_the_wrong_rms_norm_fails_and_is_told_what_it_is(tried):
    found = tried("rms_norm", "wrong_rms_norm", example("wrong_rms_norm"))

    check = found["toy, transformers' inputs"]
    assert not check.verdict.passed
    assert check.failure is not None
    assert (check.failure.operator, check.failure.tap) == ("rms_norm", "attn_norm")
    words = "your output equals RMSNorm without the rounding before the weight (to the bit"
    assert check.failure.diagnosis is not None and check.failure.diagnosis.startswith(words)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_stranger_is_judged(tried, kernel):
    found = tried(kernel.operation, kernel.name, kernel.source)

    if kernel.says is None:
        assert failed(found) == []
    else:
        words = " ".join(str(found[name].verdict.reason) for name in failed(found))
        diagnoses = " ".join(
            check.failure.diagnosis or "" for check in found.values() if check.failure
        )
        assert kernel.says in words + diagnoses, words + diagnoses


@pytest.mark.slow
@pytest.mark.parametrize("operation", trial.OPERATIONS)
def test_the_twin_passes_as_a_stranger(operation, library):
    with Kernel(library.path, operation) as kernel:
        found = list(checks(kernel, lambda model: True, ("toy", "toy-gqa3")))

    assert [check.name for check in found if not check.verdict.passed] == []
    assert found


def test_the_command_prints_each_check_and_the_diagnosis(compiled, monkeypatch):
    monkeypatch.setattr(trial, "TOYS", ("toy",))
    monkeypatch.setattr(command, "_has_model", lambda name: name == "toy")
    path = compiled("wrong_rms_norm", example("wrong_rms_norm"))
    console = Console(width=120, record=True)

    status = command.main(["rms_norm", str(path)], console)

    text = console.export_text()
    assert status == 1
    assert "toy, transformers' inputs" in text
    assert "your output equals RMSNorm without the rounding before the weight" in text
    assert text.rstrip().endswith("3 failed, 4 not run")
    assert "smollm2-135m, transformers' inputs: not in the model cache" in text
    assert {len(line) for line in text.splitlines() if set(line) == {"─"}} == {command.TABLE}
    assert command.TABLE < 80


def test_the_readme_shows_what_the_examples_do():
    readme = (EXAMPLES.parents[3] / "README.md").read_text()

    for name in ("wrong_rms_norm", "right_rms_norm"):
        assert f"tests/verification/verify_op/examples/{name}.c" in readme
    assert "your output equals RMSNorm without the rounding before the weight (to the bit" in readme
    assert ", ".join(sorted(trial.OPERATIONS)) == ", ".join(
        sorted(" ".join(readme.split("OP is one of ")[1].split(".")[0].split()).split(", "))
    )


def test_a_model_that_is_not_here_is_not_run_and_no_pass(compiled):
    path = compiled("right_rms_norm", example("right_rms_norm"))
    with Kernel(path, "rms_norm") as kernel:
        first = next(checks(kernel, lambda model: False, ("smollm2-135m",)))

    assert first.verdict.status == "not run"
    assert first.verdict.reason.startswith("not in the model cache")


def test_a_file_that_is_no_shared_object_is_refused_by_name(tmp_path):
    (tmp_path / "text.so").write_text("no object")
    console = Console(width=200, record=True)

    assert command.main(["rms_norm", str(tmp_path / "text.so")], console) == 1

    assert "text.so cannot be loaded" in console.export_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["rms_norm", "missing.so"], "'missing.so' is no file"),
        (["conv", "missing.so"], "'conv' is none of embedding, rms_norm"),
    ],
)
def test_a_wrong_word_exits_2_before_anything_is_printed(words, named: str, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(words)

    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert named in shown.err
    assert shown.out == ""


def test_a_kernel_that_ends_its_process_after_it_returned_has_not_ended_the_suite(compiled):
    with Kernel(compiled("right_rms_norm", example("right_rms_norm")), "rms_norm") as kernel:
        kernel._child.kill()  # as a damaged heap or a timer of the stranger's would
        kernel._child.wait()
        x = np.zeros((1, 64), np.uint16)

        with pytest.raises(KernelError, match="SIGKILL"):
            kernel(x, x[0], 1e-5)

        assert kernel(x, x[0], 1e-5).shape == x.shape  # a fresh process
