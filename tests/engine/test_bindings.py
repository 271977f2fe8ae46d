"""The door to C: which libraries are refused, what happens after close, how errors arrive."""

import gc
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import numpy as np
import pytest

from engine import bindings
from engine.batch import SequenceSlice, build_batch
from engine.bindings import ABI_VERSION, Engine, Library, TapPoint
from engine.config import EngineConfig, ModelConfig
from engine.errors import (
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    InvalidArgument,
    OutOfMemory,
)
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.source_stamp import source_stamp
from tests.twin.bits import assert_same_bits

ROOM = EngineConfig(
    "cpu", num_blocks=2, max_seq_len=32, max_num_tokens=16, max_num_seqs=1, block_size=16
)


def test_a_missing_library_says_what_to_do(tmp_path: Path):
    with pytest.raises(EngineError, match="nowhere.so is not built: run make"):
        Library(tmp_path / "nowhere.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path):
    path = tmp_path / "libengine.so"
    path.write_bytes(b"no library")

    with pytest.raises(EngineError, match="libengine.so cannot be loaded"):
        Library(path)


def test_a_library_of_other_sources_is_refused_with_both_stamps():
    with pytest.raises(EngineError, match=r"other sources .*csrc/ has feedfacefeed\): run make"):
        Library(expected_stamp="feedface" * 8)


def test_the_stamp_is_that_of_this_checkout(library: Library):
    assert library.source_stamp == source_stamp(bindings.CSRC)


def fake_library(tmp_path: Path, **fields: str) -> Path:
    """A library that answers engine_build_info and nothing else."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("requires a C compiler")
    values = {
        "abi_version": str(ABI_VERSION),
        "model_config_size": "sizeof(EngineModelConfig)",
        "engine_options_size": "sizeof(EngineOptions)",
        "engine_batch_size": "sizeof(EngineBatch)",
        "engine_tap_size": "sizeof(EngineTap)",
        "engine_sampling_size": "sizeof(EngineSampling)",
        "engine_sampling_row_size": "sizeof(EngineSamplingRow)",
        "engine_logit_edit_size": "sizeof(EngineLogitEdit)",
    } | fields
    source = tmp_path / "fake.c"
    source.write_text(
        f'#include "{bindings.CSRC}/include/engine.h"\n#include <string.h>\n'
        "Status engine_build_info(EngineBuildInfo *info) {\n"
        + "".join(f"    info->{name} = {value};\n" for name, value in values.items())
        + f'    strcpy(info->source_stamp, "{source_stamp(bindings.CSRC)}");\n'
        "    return STATUS_OK;\n}\n"
    )
    path = tmp_path / "libfake.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def test_a_fake_that_tells_the_truth_is_accepted(tmp_path: Path):
    assert Library(fake_library(tmp_path)).source_stamp == source_stamp(bindings.CSRC)


def test_another_abi_version_is_refused_with_both_numbers(tmp_path: Path):
    path = fake_library(tmp_path, abi_version=str(ABI_VERSION + 1))

    with pytest.raises(
        EngineError, match=f"ABI version {ABI_VERSION + 1}.* needs {ABI_VERSION}: run make"
    ):
        Library(path)


@pytest.mark.parametrize(
    ("field", "struct"),
    [
        ("model_config_size", "EngineModelConfig"),
        ("engine_options_size", "EngineOptions"),
        ("engine_batch_size", "EngineBatch"),
        ("engine_tap_size", "EngineTap"),
        ("engine_sampling_size", "EngineSampling"),
        ("engine_sampling_row_size", "EngineSamplingRow"),
        ("engine_logit_edit_size", "EngineLogitEdit"),
    ],
)
def test_another_struct_size_is_refused_by_name(tmp_path: Path, field: str, struct: str):
    path = fake_library(tmp_path, **{field: "7"})

    with pytest.raises(EngineError, match=rf"{struct} has 7 bytes in libfake.so, \d+ here"):
        Library(path)


def test_the_library_exports_exactly_what_the_headers_declare(library: Library):
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("requires nm")
    listing = subprocess.run(
        [tool, "-D", "--defined-only", library.path], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines() if " T " in line}

    declared: set[str] = set()
    for name in ("engine.h", "ops.h"):
        text = (bindings.CSRC / "include" / name).read_text(encoding="utf-8")
        declared |= set(re.findall(r"^Status (\w+)\(", text, re.M))

    assert {name for name in exported if name.startswith(("engine_", "op_"))} == declared
    if not library.has_cuda:  # the CUDA runtime brings symbols of its own
        assert exported == declared


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (1, InvalidArgument),
        (2, OutOfMemory),
        (3, DeviceUnavailable),
        (4, DeviceFailed),
        (9, EngineError),
    ],
)
def test_each_status_has_its_exception(library: Library, status: int, kind: type[EngineError]):
    with pytest.raises(EngineError) as error:
        library.check(status)

    assert type(error.value) is kind


def test_success_raises_nothing(library: Library):
    library.check(0)


@pytest.fixture
def engine(library: Library):
    config = ModelConfig.from_directory(resolve("toy"))
    with Engine(library, config, ROOM) as engine:
        yield engine


def test_a_closed_engine_refuses_every_call(library: Library, engine: Engine):
    engine.close()
    calls = [
        lambda: engine.load_weight("model.norm.weight", np.zeros(128, np.uint16)),
        lambda: engine.read_weight("model.norm.weight"),
        lambda: engine.finish_loading(),
        lambda: engine.tap_shape(TapPoint.q),
        lambda: engine.forward(build_batch([SequenceSlice([1], 0, [0])], 16)),
        lambda: engine.read_kv(0, np.zeros(1, np.int32)),
        lambda: engine.fill_blocks([0], 0),
        lambda: engine.memory(),
    ]

    for call in calls:
        with pytest.raises(InvalidArgument, match="this engine is closed"):
            call()


def test_closing_twice_is_allowed(engine: Engine):
    engine.close()
    engine.close()


def test_leaving_the_with_statement_closes_even_after_an_error(library: Library):
    config = ModelConfig.from_directory(resolve("toy"))
    with pytest.raises(RuntimeError), Engine(library, config, ROOM) as engine:
        raise RuntimeError

    with pytest.raises(InvalidArgument, match="closed"):
        engine.memory()


@pytest.mark.parametrize(
    ("logits", "next_ids", "message"),
    [
        (np.empty((2, 320), np.float32), None, r"logits has shape \(2, 320\), must be \(1, 320\)"),
        (np.empty((1, 319), np.float32), None, r"logits has shape \(1, 319\)"),
        (np.empty((1, 320), np.float64), None, "logits must be a contiguous float32 array"),
        (np.empty((1, 640), np.float32)[:, ::2], None, "not contiguous"),
        (None, np.empty(2, np.int32), r"next_ids has shape \(2,\), must be \(1,\)"),
        (None, np.empty(1, np.int64), "next_ids must be a contiguous int32 array"),
    ],
)
def test_an_output_that_does_not_fit_is_refused_before_c_writes(
    make_runner, logits, next_ids, message: str
):
    batch = build_batch([SequenceSlice([1, 2], 0, [0])], 16)

    with pytest.raises(InvalidArgument, match=message):
        make_runner().engine.forward(batch, logits=logits, next_ids=next_ids)


@pytest.mark.parametrize("field", ["input_ids", "slot_mapping", "block_tables"])
@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float32])
def test_index_arrays_of_another_dtype_are_refused_by_name(make_runner, field: str, dtype: type):
    batch = build_batch([SequenceSlice([1, 2], 0, [0])], 16)
    wrong = type(batch)(**{**vars(batch), field: getattr(batch, field).astype(dtype)})

    with pytest.raises(InvalidArgument, match=f"{field} must be a contiguous int32 array, got"):
        make_runner().engine.forward(wrong)


@pytest.mark.parametrize("field", ["positions", "slot_mapping", "cu_seqlens_q", "block_tables"])
def test_an_index_array_that_is_too_short_is_refused_before_c_reads_past_it(
    make_runner, field: str
):
    # C sees only pointers; the short array is the beginning of a longer one whose next value is
    # right, so only a check of lengths can notice
    runner: ModelRunner = make_runner()
    batch = build_batch([SequenceSlice([1, 2, 3], 0, [0]), SequenceSlice([4], 0, [1])], 16)
    short = type(batch)(**{**vars(batch), field: getattr(batch, field)[:-1]})

    with pytest.raises(InvalidArgument, match=field):
        runner.engine.forward(short)


def test_temporary_arrays_live_as_long_as_the_call(make_runner):
    # nothing but the batch refers to the arrays; a collection in between must not matter
    runner = make_runner()
    expected = runner.forward(build_batch([SequenceSlice(list(range(30)), 0, [0, 1])], 16)).logits
    for _ in range(3):
        batch = build_batch([SequenceSlice(list(range(30)), 0, [0, 1])], 16)
        gc.collect()
        assert_same_bits(runner.forward(batch).logits, expected)


def test_engines_are_not_kept_alive_by_the_library(library: Library):
    engine = Engine(library, ModelConfig.from_directory(resolve("toy")), ROOM)
    reference = weakref.ref(engine)
    engine.close()

    del engine
    gc.collect()

    assert reference() is None
