from dataclasses import replace
from pathlib import Path

import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.models import cache_root
from engine.sources.shape import CONFIG, NAME, random_directory, resolve_random

SMALL = replace(
    CONFIG,
    vocab_size=128011,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
)


def test_the_shape_has_the_size_of_llama_3_2_1b():
    num_values = 0
    for shape in CONFIG.weight_shapes().values():
        num_values += shape[0] * (shape[1] if len(shape) == 2 else 1)

    assert num_values == 1_235_814_400  # the parameter count on the model's page
    assert len(CONFIG.weight_shapes()) == 146


def test_a_model_is_generated_with_progress_and_the_same_way_each_time(tmp_path: Path):
    reports: list[tuple[str, int, int]] = []

    first = resolve_random("small", SMALL, tmp_path / "a", lambda *report: reports.append(report))
    second = resolve_random("small", SMALL, tmp_path / "b", lambda *report: None)

    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert ModelConfig.from_directory(first) == SMALL
    with open_checkpoint(first, SMALL) as checkpoint:
        assert reports[-1] == ("generating small", checkpoint.num_bytes(), checkpoint.num_bytes())
    done = [report[1] for report in reports]
    assert done == sorted(done)
    assert max(after - before for before, after in zip([0, *done], done, strict=False)) <= 2 << 20


@pytest.mark.weights
@pytest.mark.slow
def test_the_whole_shape_has_its_pinned_hash():
    directory = random_directory(NAME, CONFIG, cache_root())
    if not directory.is_dir():
        pytest.skip(f"needs {NAME} in the cache, {directory} is not there")

    with open_checkpoint(directory, ModelConfig.from_directory(directory)) as checkpoint:
        expected = "a7076df52bd27286fd1cf035f9db8cf290e3313b11a53c76efccb6ec41e5c4ad"
        assert checkpoint.sha256() == expected
