"""Errors: one message per thread, nothing printed, no call that a null pointer can kill."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engine.bindings import Library
from engine.errors import InvalidArgument
from engine.ops import Ops

ROOT = Path(__file__).resolve().parents[2]


def fail_with(ops: Ops, value: int) -> str:
    """An embedding whose id is out of range: the message names it."""
    try:
        ops.embedding(np.zeros((2, 64), np.uint16), np.array([value], np.int32))
    except InvalidArgument as error:
        return str(error)
    raise AssertionError("must be refused")


def last_error(library: Library) -> str:
    message = library.ffi.new("char **")
    library.check(library.lib.engine_last_error(message))
    return library.ffi.string(message[0]).decode()


def test_each_thread_reads_its_own_last_error(library: Library):
    barrier = threading.Barrier(4)
    seen: dict[int, tuple[str, str]] = {}

    def work(value: int) -> None:
        with Ops(library, "cpu", 1) as ops:
            for _ in range(50):
                barrier.wait()
                raised = fail_with(ops, value)
                barrier.wait()  # all four have failed before any reads again
                seen[value] = raised, last_error(library)

    threads = [threading.Thread(target=work, args=(value,)) for value in (10, 11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen.keys() == {10, 11, 12, 13}
    for value, messages in seen.items():
        for message in messages:
            assert message == f"ids[0] is {value}, must be 0 .. 1"


def test_a_thread_that_never_failed_has_no_message(library: Library, twin: Ops):
    fail_with(twin, 99)
    messages: list[str] = []

    thread = threading.Thread(target=lambda: messages.append(last_error(library)))
    thread.start()
    thread.join()

    assert messages == [""]


def test_nothing_is_printed(library: Library, twin: Ops, capfd: pytest.CaptureFixture[str]):
    fail_with(twin, 99)
    with pytest.raises(InvalidArgument):
        Ops(library, "cpu", -1)

    captured = capfd.readouterr()

    assert captured.out == "" and captured.err == ""


def test_a_success_after_a_failure_is_a_success(twin: Ops):
    fail_with(twin, 99)

    assert twin.argmax(np.zeros((1, 3), np.float32)).tolist() == [0]


def test_every_message_fits_its_buffer_and_ends(library: Library, twin: Ops):
    with pytest.raises(InvalidArgument) as error:
        library.check(
            library.lib.op_context_create(-(2**31), 2**31 - 1, library.ffi.new("OpContext **"))
        )

    assert str(error.value) == "device is -2147483648, must be 0 (cpu) or 1 (cuda)"


OP_CALLS = {
    "op_embedding": "c, u, u, i, 1, 1, 64",
    "op_rms_norm": "c, u, u, u, 1, 64, 1e-5",
    "op_linear": "c, u, u, u, 1, 1, 64",
    "op_linear_f32": "c, f, u, u, 1, 1, 64",
    "op_rope_table": "c, u, m, 1",
    "op_rotary_embedding": "c, u, u, u, i, 1, 1, 64, 1",
    "op_attention": "c, u, u, u, u, b, 1, 1, 64, 16, 1",
    "op_linear_add": "c, u, u, u, u, 1, 8, 64",
    "op_gated_linear": "c, u, u, u, u, 1, 8, 64",
    "op_silu_and_mul": "c, u, u, u, 1, 64",
    "op_residual_add": "c, u, u, u, 64",
    "op_argmax": "c, i, f, 1, 64",
    "op_tensor_core_step": "c, f, f, u, u, 1",
    "op_exp2": "c, f, f, 64",
}


def arguments_of(library: Library, ops: Ops, call: str) -> list[object]:
    ffi = library.ffi
    named = {
        "c": ops._context,
        "u": ffi.new("uint16_t[1024]"),
        "i": ffi.new("int32_t[64]"),
        "f": ffi.new("float[64]"),
        "m": ffi.new("EngineModelConfig *", {"head_dim": 64, "rope_theta": 1e4}),
        "b": ffi.new("EngineBatch *"),
    }
    return [
        named[word] if word in named else float(word) if "." in word or "e" in word else int(word)
        for word in call.split(", ")
    ]


@pytest.mark.parametrize("function", OP_CALLS)
def test_a_null_pointer_is_refused_by_every_operation(library: Library, twin: Ops, function: str):
    words = OP_CALLS[function].split(", ")
    for place, word in enumerate(words):
        if not word.isalpha():
            continue
        arguments = arguments_of(library, twin, OP_CALLS[function])
        arguments[place] = library.ffi.NULL
        with pytest.raises(InvalidArgument, match="null"):
            library.check(getattr(library.lib, function)(*arguments))


@pytest.mark.parametrize("function", [f for f in OP_CALLS if f != "op_attention"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused_by_every_operation(
    library: Library, twin: Ops, function: str, size: int
):
    words = OP_CALLS[function].split(", ")
    for place, word in enumerate(words):
        if not word.isdigit():
            continue
        arguments = arguments_of(library, twin, OP_CALLS[function])
        arguments[place] = size
        with pytest.raises(InvalidArgument, match=rf"{size}|positions\[0\] is 0"):
            library.check(getattr(library.lib, function)(*arguments))


@pytest.mark.parametrize("in_features", [1, 8, 15, 17, 65])
def test_a_reduction_that_is_no_multiple_of_a_step_is_refused(twin: Ops, in_features: int):
    x = np.zeros((1, in_features), np.uint16)

    with pytest.raises(
        InvalidArgument, match=f"in_features is {in_features}, must be a multiple of 16"
    ):
        twin.linear(x, x)


@pytest.mark.parametrize("call", ["engine_last_error(ffi.NULL)", "engine_build_info(ffi.NULL)"])
def test_asking_for_an_answer_nowhere_does_not_kill_the_process(call: str):
    program = (
        "from engine.bindings import Library\n"
        "library = Library(); ffi = library.ffi\n"
        f"print(library.lib.{call})\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr  # 1: invalid argument
