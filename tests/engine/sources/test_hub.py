from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.errors import CheckpointError
from engine.sources.hub import WANTED_FILES, is_hub_id, resolve_hub


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "a/b", "org_1/name.v2-3"])
def test_org_and_name_are_a_hub_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    ["", "name", "a/b/c", "/a", "a/", "../a", "a/..", "./a", "a b/c", "~/a", "a/b\n", "-a/b"],
)
def test_everything_else_is_not(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("file_name", "is_wanted"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.json", True),
        ("pytorch_model.bin", False),
        ("modeling_llama.py", False),
        ("original/consolidated.00.pth", False),
        ("README.md", False),
    ],
)
def test_only_weights_config_and_tokenizer_are_fetched(file_name, is_wanted):
    assert any(fnmatch(file_name, pattern) for pattern in WANTED_FILES) == is_wanted


def test_a_snapshot_is_asked_for_with_these_files_only(monkeypatch, tmp_path):
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    assert resolve_hub("org/name") == tmp_path
    assert asked == [("org/name", list(WANTED_FILES))]


def response(status_code: int) -> Any:
    """As much of an HTTP response as the client's errors look at."""
    return SimpleNamespace(status_code=status_code, headers={}, request=None)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            errors.GatedRepoError("no", response=response(403)),
            "access is gated: accept its licence",
        ),
        (
            errors.RepositoryNotFoundError("no", response=response(404)),
            "no such repository",
        ),
        (
            errors.HfHubHTTPError("busy\nmore", response=response(503)),
            "the hub refused: busy",
        ),
        (errors.LocalEntryNotFoundError("nothing cached"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline mode"), "the hub cannot be reached: offline mode"),
        (errors.LocalEntryNotFoundError("Got: no answer"), "cannot be reached: no answer"),
        (ConnectionError("no route"), "the hub cannot be reached: no route"),
        (errors.HFValidationError("Cannot have --"), "no hub id: Cannot have --"),
    ],
    ids=["gated", "missing", "http", "not-cached", "offline", "no-answer", "network", "name"],
)
def test_a_model_that_cannot_be_had_says_why(monkeypatch, failure, expected):
    def snapshot(*arguments: object, **kwargs: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    with pytest.raises(CheckpointError, match=f"org/name: .*{expected}"):
        resolve_hub("org/name")
