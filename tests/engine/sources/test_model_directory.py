import threading
from pathlib import Path

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.sources.model_directory import build_once, write_safetensors
from tests.engine.checkpoint_samples import SHAPES, values_of


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "half").write_text("written")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match=f"^model cannot be made in {tmp_path}: disk full; "):
        build_once(tmp_path / "model", fail)

    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "cache").touch()

    with pytest.raises(CheckpointError, match=f"in {tmp_path}/cache: .*TOUCHSTONE_CACHE"):
        build_once(tmp_path / "cache" / "model", lambda directory: None)


def test_a_build_that_follows_a_failed_one_succeeds(tmp_path: Path):
    with pytest.raises(CheckpointError):
        build_once(tmp_path / "model", lambda directory: (directory / "no" / "such").write_text(""))

    build_once(tmp_path / "model", lambda directory: None)

    assert list((tmp_path / "model").iterdir()) == []


def test_what_exists_is_not_built_again(tmp_path: Path):
    (tmp_path / "model").mkdir()

    def never(directory: Path) -> None:
        raise AssertionError("built again")

    assert build_once(tmp_path / "model", never) == tmp_path / "model"


def test_two_builds_at_once_end_with_one_whole_directory(tmp_path: Path):
    both_are_building = threading.Barrier(2)
    results: list[Path] = []

    def build(name: str) -> None:
        def fill(directory: Path) -> None:
            (directory / "first").write_text(name)
            both_are_building.wait(timeout=30)
            (directory / "second").write_text(name)

        results.append(build_once(tmp_path / "cache" / "model", fill))

    threads = [threading.Thread(target=build, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    model = tmp_path / "cache" / "model"
    assert results == [model, model]
    assert (model / "first").read_text() == (model / "second").read_text()
    assert list((tmp_path / "cache").iterdir()) == [model]


def test_the_stream_writer_makes_what_the_official_reader_reads(tmp_path: Path):
    import ml_dtypes  # noqa: F401  numpy has no bfloat16 of its own
    from safetensors.numpy import load_file

    path = tmp_path / "model.safetensors"
    sizes: list[int] = []
    write_safetensors(
        path, SHAPES, lambda name: np.array_split(values_of(name), 3), on_bytes=sizes.append
    )

    official = load_file(path)

    assert list(SHAPES) == [name for name in SHAPES if name in official]
    for name in SHAPES:
        np.testing.assert_array_equal(official[name].view(np.uint16), values_of(name))
    assert sum(sizes) == sum(values_of(name).nbytes for name in SHAPES)


def test_the_data_of_a_written_file_starts_aligned(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, SHAPES, lambda name: [values_of(name)])

    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")

    assert (8 + header_bytes) % 8 == 0


def test_too_few_values_are_noticed_while_writing(tmp_path: Path):
    with pytest.raises(AssertionError, match="bytes written"):
        write_safetensors(
            tmp_path / "model.safetensors", SHAPES, lambda name: [values_of(name)[:-1]]
        )
