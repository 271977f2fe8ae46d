"""Weights in and out: names, shapes, duplicates, what is missing; what works before and after."""

from dataclasses import replace

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidArgument
from engine.models import resolve
from tests.twin.bits import assert_same_bits

ROOM = EngineConfig(
    "cpu", num_blocks=2, max_seq_len=32, max_num_tokens=16, max_num_seqs=1, block_size=16
)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_directory(resolve("toy"))


@pytest.fixture
def engine(library: Library, config: ModelConfig):
    with Engine(library, config, ROOM) as engine:
        yield engine


def zeros(config: ModelConfig, name: str) -> np.ndarray:
    return np.zeros(config.weight_shapes()[name], np.uint16)


def load_all(engine: Engine, config: ModelConfig, but: str | None = None) -> None:
    for name in config.weight_shapes():
        if name != but:
            engine.load_weight(name, zeros(config, name))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lm_head.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj",
        "model.norm.weight ",
        "é" * 300,
        "%s%n%d",
    ],
)
def test_an_unknown_name_is_refused_by_name(engine: Engine, name: str):
    with pytest.raises(InvalidArgument, match="is not a tensor of this model") as error:
        engine.load_weight(name, np.zeros((64, 64), np.uint16))

    assert len(str(error.value)) < 512
    assert str(error.value).startswith(name[:90].split("é")[0])


def test_a_duplicate_is_refused_and_the_first_stays(engine: Engine, config: ModelConfig):
    name = "model.layers.1.self_attn.k_proj.weight"
    first = np.arange(zeros(config, name).size, dtype=np.uint16).reshape(zeros(config, name).shape)
    engine.load_weight(name, first)

    with pytest.raises(InvalidArgument, match=f"{name} was loaded before"):
        engine.load_weight(name, np.zeros_like(first))

    assert_same_bits(engine.read_weight(name), first)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("change", [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_another_shape_is_refused_with_both_shapes(
    engine: Engine, config: ModelConfig, name: str, change: tuple[int, int]
):
    shape = config.weight_shapes()[name]
    rows, cols = shape if len(shape) == 2 else (1, *shape)
    wrong = np.zeros((rows + change[0], cols + change[1]), np.uint16)

    with pytest.raises(InvalidArgument, match=name) as error:
        engine.load_weight(name, wrong)

    assert f"[{wrong.shape[0]}, {wrong.shape[1]}], must be [{rows}, {cols}]" in str(error.value)
    engine.load_weight(name, zeros(config, name))


def test_a_transposed_matrix_is_refused(engine: Engine, config: ModelConfig):
    name = "model.layers.0.mlp.down_proj.weight"

    with pytest.raises(InvalidArgument, match=r"is \[320, 128\], must be \[128, 320\]"):
        engine.load_weight(name, np.ascontiguousarray(zeros(config, name).T))


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float16])
def test_another_dtype_is_refused_before_c_sees_it(engine: Engine, dtype: type):
    with pytest.raises(InvalidArgument, match=f"model.norm.weight .*{np.dtype(dtype).name}"):
        engine.load_weight("model.norm.weight", np.zeros(128, dtype))


def test_a_strided_array_is_refused_before_c_sees_it(engine: Engine):
    with pytest.raises(InvalidArgument, match="not contiguous"):
        engine.load_weight("model.norm.weight", np.zeros(256, np.uint16)[::2])


def test_every_missing_tensor_is_named_at_the_end(library: Library, config: ModelConfig):
    for missing in config.weight_shapes():
        with Engine(library, config, ROOM) as engine:
            load_all(engine, config, but=missing)

            with pytest.raises(InvalidArgument, match=f"^{missing} was not loaded"):
                engine.finish_loading()

            engine.load_weight(missing, zeros(config, missing))
            engine.finish_loading()


def test_no_step_runs_before_loading_is_finished(engine: Engine, config: ModelConfig):
    batch = build_batch([SequenceSlice([1], 0, [0])], 16)
    with pytest.raises(InvalidArgument, match="engine_finish_loading"):
        engine.forward(batch)
    load_all(engine, config)
    with pytest.raises(InvalidArgument, match="engine_finish_loading"):
        engine.forward(batch)

    engine.finish_loading()

    engine.forward(batch)


def test_a_weight_that_was_not_loaded_cannot_be_read(engine: Engine):
    with pytest.raises(InvalidArgument, match="model.norm.weight is not loaded"):
        engine.read_weight("model.norm.weight")


def test_an_unknown_weight_cannot_be_read(engine: Engine):
    with pytest.raises(InvalidArgument, match="nonsense is not a tensor"):
        engine.read_weight("nonsense")


def test_not_finite_values_are_counted(engine: Engine, config: ModelConfig):
    values = zeros(config, "model.norm.weight")
    values[:6] = [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 0x7F7F]  # the last is the largest number

    assert engine.load_weight("model.norm.weight", values) == 5


def test_every_value_of_a_large_tensor_may_be_not_finite(engine: Engine, config: ModelConfig):
    values = zeros(config, "model.embed_tokens.weight") + np.uint16(0x7FC0)
    values[-1, -1] = 0

    assert engine.load_weight("model.embed_tokens.weight", values) == values.size - 1


# Around blocks of 2^14 values that are counted together, 128 a row.
@pytest.mark.parametrize("num_rows", [383, 384, 385, 1000])
def test_not_finite_values_are_counted_wherever_they_are(
    library: Library, config: ModelConfig, num_rows: int
):
    large = replace(config, vocab_size=num_rows)
    random = np.random.default_rng(num_rows)
    values = random.integers(0, 2**16, (num_rows, config.hidden_size)).astype(np.uint16)
    values[[0, -1]] = 0x7F80

    with Engine(library, large, ROOM) as engine:
        counted = engine.load_weight("model.embed_tokens.weight", values)

    assert counted == np.count_nonzero((values & 0x7F80) == 0x7F80)


def test_null_pointers_are_refused(engine: Engine):
    ffi, name = engine.library.ffi, b"model.norm.weight"
    data, count = ffi.new("uint16_t[128]"), ffi.new("int64_t *")
    calls = [
        ("engine_load_weight", (ffi.NULL, data, 1, 128, count)),
        ("engine_load_weight", (name, ffi.NULL, 1, 128, count)),
        ("engine_load_weight", (name, data, 1, 128, ffi.NULL)),
        ("engine_read_weight", (ffi.NULL, data, 1, 128)),
        ("engine_read_weight", (name, ffi.NULL, 1, 128)),
    ]
    for function, arguments in calls:
        with pytest.raises(InvalidArgument, match="null"):
            engine._call(function, *arguments)
    with pytest.raises(InvalidArgument, match="null"):
        engine.library.check(engine.library.lib.engine_finish_loading(ffi.NULL))


@pytest.mark.parametrize(("rows", "cols"), [(-1, 128), (1, -128), (2**40, 128), (1, 2**33 + 128)])
def test_impossible_sizes_are_refused_before_anything_is_read(engine: Engine, rows: int, cols: int):
    data, count = engine.library.ffi.new("uint16_t[128]"), engine.library.ffi.new("int64_t *")

    with pytest.raises(InvalidArgument, match=r"must be \[1, 128\]"):
        engine._call("engine_load_weight", b"model.norm.weight", data, rows, cols, count)


def test_the_memory_in_use_is_reported(engine: Engine, config: ModelConfig):
    values = sum(int(np.prod(shape)) for shape in config.weight_shapes().values())

    memory = engine.memory()

    assert memory["weights"] >= 2 * values
    assert memory["weights"] <= 2 * values * 1.1  # packing pads rows, no more
    # K and V, two layers, two blocks of 16 slots, two heads of 64
    assert memory["kv_cache"] == 2 * 2 * 2 * 16 * 2 * 64 * 2
    assert memory["workspace"] > 0
