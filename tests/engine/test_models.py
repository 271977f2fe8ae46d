from pathlib import Path

import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.models import cache_root, model_names, name_of, resolve
from engine.sources import hub, shape, smollm2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOUCHSTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_environment_says(cache: Path):
    assert cache_root() == cache


def test_the_cache_is_in_the_users_home_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TOUCHSTONE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_root() == tmp_path / ".cache" / "touchstone"


def test_the_names_are_those_of_every_source():
    assert model_names()[0] == "toy"
    assert {"toy-wide", "smollm2-135m", "llama-3.2-1b-shape"} < set(model_names())


def test_a_toy_is_a_sound_model_directory_in_the_cache(cache: Path):
    directory = resolve("toy")

    assert directory.parent == cache
    config = ModelConfig.from_directory(directory)
    with open_checkpoint(directory, config) as checkpoint:
        assert checkpoint.names() == tuple(config.weight_shapes())


def test_a_path_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "config.json").touch()

    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_a_directory_without_a_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: no model .* no config.json"):
        resolve(tmp_path)


def test_a_local_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)

    assert resolve("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("name", "source", "function"),
    [
        (smollm2.NAME, smollm2, "resolve_smollm2"),
        (shape.NAME, shape, "resolve_shape"),
        ("org/name", hub, "resolve_hub"),
    ],
)
def test_each_name_goes_to_its_source(monkeypatch, tmp_path, name, source, function):
    monkeypatch.setattr(source, function, lambda *arguments: tmp_path / "found")

    assert resolve(name) == tmp_path / "found"


@pytest.mark.parametrize("name", ["toys", "no-such-model", "a/b/c", "../nowhere", "Toy"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(CheckpointError) as refusal:
        resolve(name)

    assert repr(name) in str(refusal.value)
    assert "smollm2-135m" in str(refusal.value)


def test_a_file_is_no_model(tmp_path: Path):
    (tmp_path / "model.gguf").touch()

    with pytest.raises(CheckpointError, match="a model is a directory, this is a file"):
        resolve(tmp_path / "model.gguf")


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(CheckpointError, match="got an empty one"):
        resolve("")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("toy-wide", "toy-wide"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("/models/mine/", "mine"),
        ("models/../mine", "mine"),
    ],
)
def test_a_model_is_called_by_its_name_or_the_last_part_of_its_path(model: str, name: str):
    assert name_of(model) == name


def test_a_home_that_nobody_has_is_an_error_in_words():
    with pytest.raises(CheckpointError, match="~nobody-here/model"):
        resolve("~nobody-here/model")


def test_without_a_home_the_message_names_the_variable_for_the_cache(
    monkeypatch: pytest.MonkeyPatch,
):
    def homeless(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TOUCHSTONE_CACHE")
    monkeypatch.setattr(Path, "home", homeless)

    with pytest.raises(CheckpointError, match="TOUCHSTONE_CACHE"):
        cache_root()
