"""What an engine refuses to be: each field of its two structs, one step past either end."""

import pytest

from engine.bindings import Library
from engine.errors import DeviceUnavailable, InvalidArgument, OutOfMemory

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": 1,
    "rms_norm_eps": 1e-5,
    "rope_type": 1,
    "rope_theta": 10000.0,
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 64,
}
OPTIONS = {
    "device": 0,
    "num_threads": 1,
    "block_size": 16,
    "num_blocks": 4,
    "max_seq_len": 64,
    "max_num_tokens": 16,
    "max_num_seqs": 2,
}
NAN, INF = float("nan"), float("inf")


def create(library: Library, config: dict | None = None, options: dict | None = None) -> None:
    """engine_create and, if it should succeed, engine_destroy."""
    ffi, lib = library.ffi, library.lib
    handle = ffi.new("Engine **")
    handle[0] = ffi.cast("Engine *", 1)
    status = lib.engine_create(
        ffi.new("EngineModelConfig *", CONFIG | (config or {})),
        ffi.new("EngineOptions *", OPTIONS | (options or {})),
        handle,
    )
    if status:
        assert handle[0] == ffi.NULL, "a failed create must not leave a handle"
    library.check(status)
    library.check(lib.engine_destroy(handle[0]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0, must be 1"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("vocab_size", 2**31 - 1, "vocab_size is 2147483647"),
        ("hidden_size", 0, "hidden_size is 0, must be 64"),
        ("hidden_size", 63, "hidden_size is 63.*multiple of 64"),
        ("hidden_size", 96, "hidden_size is 96.*multiple of 64"),
        ("hidden_size", -64, "hidden_size is -64"),
        ("intermediate_size", 0, "intermediate_size is 0"),
        ("intermediate_size", 100, "intermediate_size is 100.*multiple of 64"),
        ("num_layers", 0, "num_layers is 0"),
        ("num_layers", -1, "num_layers is -1"),
        ("num_heads", 0, "num_heads is 0"),
        ("num_heads", 3, r"num_heads is 3, must be .*num_kv_heads \(2\)"),
        ("num_heads", 1, r"num_heads is 1"),
        ("num_kv_heads", 0, "num_kv_heads is 0"),
        ("num_kv_heads", -2, "num_kv_heads is -2"),
        ("head_dim", 128, "head_dim is 128, must be 64"),
        ("head_dim", 32, "head_dim is 32"),
        ("head_dim", 0, "head_dim is 0"),
        ("tie_word_embeddings", 2, "tie_word_embeddings is 2, must be 0 .. 1"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps is -1e-06"),
        ("rms_norm_eps", NAN, "rms_norm_eps is -?nan"),
        ("rms_norm_eps", INF, "rms_norm_eps is inf"),
        ("rope_type", 2, "rope_type is 2"),
        ("rope_type", -1, "rope_type is -1"),
        ("rope_theta", 0.0, "rope_theta is 0"),
        ("rope_theta", -1.0, "rope_theta is -1"),
        ("rope_theta", NAN, "rope_theta is -?nan"),
        ("rope_theta", INF, "rope_theta is inf"),
        ("rope_factor", 0.5, "factor 0.5 must be >= 1"),
        ("rope_factor", NAN, "factor -?nan"),
        ("rope_low_freq_factor", 0.0, "low_freq_factor 0"),
        ("rope_high_freq_factor", 1.0, "high_freq_factor 1"),
        ("rope_original_max_position_embeddings", 0, "original_max_position_embeddings 0"),
    ],
)
def test_an_impossible_model_is_refused_by_field_limit_and_value(
    library: Library, field: str, value: float, message: str
):
    with pytest.raises(InvalidArgument, match=message):
        create(library, {field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device", 2, "device is 2, must be 0 .. 1"),
        ("device", -1, "device is -1"),
        ("num_threads", -1, "num_threads is -1, must be 0"),
        ("num_threads", 10**6, "num_threads is 1000000"),
        ("block_size", 0, "block_size is 0, must be 16"),
        ("block_size", 8, "block_size is 8"),
        ("block_size", 48, "block_size is 48"),
        ("block_size", 256, "block_size is 256"),
        ("num_blocks", 0, "num_blocks is 0, must be 1"),
        ("num_blocks", -1, "num_blocks is -1"),
        ("num_blocks", 2**31 - 1, "num_blocks is 2147483647"),
        ("max_seq_len", 0, "max_seq_len is 0"),
        ("max_seq_len", -1, "max_seq_len is -1"),
        ("max_seq_len", 2**31 - 1, "max_seq_len is 2147483647"),
        ("max_num_tokens", 0, "max_num_tokens is 0"),
        ("max_num_tokens", 2**31 - 1, "max_num_tokens is 2147483647"),
        ("max_num_seqs", 0, "max_num_seqs is 0"),
        ("max_num_seqs", 2**31 - 1, "max_num_seqs is 2147483647"),
        ("enforce_eager", 2, "enforce_eager is 2, must be 0 .. 1"),
        ("enforce_eager", -1, "enforce_eager is -1"),
    ],
)
def test_impossible_room_is_refused_by_field_limit_and_value(
    library: Library, field: str, value: int, message: str
):
    with pytest.raises(InvalidArgument, match=message):
        create(library, options={field: value})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        (
            {"num_layers": 1, "vocab_size": 1},
            {"num_blocks": 1, "max_seq_len": 1, "max_num_tokens": 1, "max_num_seqs": 1},
        ),
        ({"num_heads": 32, "num_kv_heads": 1}, {}),
        ({"rope_type": 0, "rope_factor": NAN}, {}),  # scaling is not looked at without its type
        ({"rms_norm_eps": 0.0, "tie_word_embeddings": 0}, {"block_size": 128}),
        ({}, {"max_seq_len": 10_000}),  # longer than the pool: the pool is what then runs out
    ],
)
def test_the_corners_of_what_is_possible_are_accepted(
    library: Library, config: dict, options: dict
):
    create(library, config, options)


def test_more_memory_than_there_is_is_refused_with_the_number(library: Library):
    # 4.2 PB of KV cache: an address space that no machine grants
    with pytest.raises(OutOfMemory, match=r"\d{13,} bytes"):
        create(
            library,
            {"num_layers": 1000, "num_heads": 1024, "num_kv_heads": 1024},
            {"num_blocks": 2**24 - 1, "block_size": 128},
        )

    create(library)


@pytest.mark.parametrize("null", range(3))
def test_null_pointers_are_refused(library: Library, null: int):
    ffi, lib = library.ffi, library.lib
    arguments = [
        ffi.new("EngineModelConfig *", CONFIG),
        ffi.new("EngineOptions *", OPTIONS),
        ffi.new("Engine **"),
    ]
    arguments[null] = ffi.NULL

    with pytest.raises(InvalidArgument, match="null"):
        library.check(lib.engine_create(*arguments))


def test_destroying_nothing_is_allowed(library: Library):
    library.check(library.lib.engine_destroy(library.ffi.NULL))
    library.check(library.lib.op_context_destroy(library.ffi.NULL))


def test_cuda_is_refused_cleanly_where_there_is_none(library: Library):
    try:
        create(library, options={"device": 1})
    except DeviceUnavailable as error:
        assert str(error)
        create(library)
        return
    pytest.skip("requires a machine without a CUDA device")
