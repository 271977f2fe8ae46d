import argparse
import io
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engine.models import resolve
from tests.verification.test_goldens import MANIFEST, TAPS, golden_prompt
from verification import goldens, record
from verification.record import RecordRefused


def git(repository: Path, *words: str) -> None:
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    environment = {**os.environ, **identity, "GIT_COMMITTER_EMAIL": "a@b"}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(repository), *words]
    subprocess.run(command, check=True, capture_output=True, env=environment)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "engine.c").write_text("int one;\n")
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "prompts.jsonl").write_text("{}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def changed_bits(prompt: goldens.GoldenPrompt, *keys) -> goldens.GoldenPrompt:
    return replace(prompt, bits={**prompt.bits, **dict.fromkeys(keys, "0" * 64)})


@pytest.fixture
def old(tmp_path: Path) -> goldens.Golden:
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0)})
    return goldens.load(tmp_path / "toy")


def test_a_clean_tree_gives_its_commit(repository: Path):
    assert len(record.require_clean_tree(repository)) == 40


def test_a_changed_file_is_refused_by_name(repository: Path):
    (repository / "engine.c").write_text("int two;\n")

    with pytest.raises(RecordRefused, match=r"dirty \(engine.c\).*--dirty-because"):
        record.require_clean_tree(repository)


def test_an_untracked_file_is_refused_by_name(repository: Path):
    (repository / "new.c").write_text("int new;\n")

    with pytest.raises(RecordRefused, match="new.c"):
        record.require_clean_tree(repository)


def test_a_staged_file_is_refused_by_name(repository: Path):
    (repository / "engine.c").write_text("int two;\n")
    git(repository, "add", "engine.c")

    with pytest.raises(RecordRefused, match="engine.c"):
        record.require_clean_tree(repository)


def test_golden_itself_may_be_changed(repository: Path):
    (repository / "golden" / "prompts.jsonl").write_text("{} \n")
    (repository / "golden" / "new.json").write_text("{}\n")

    record.require_clean_tree(repository)


def test_a_tree_without_a_commit_is_refused(tmp_path: Path):
    git(tmp_path, "init", "-q")

    with pytest.raises(RecordRefused, match="no commit"):
        record.require_clean_tree(tmp_path)


def test_bits_that_change_under_the_same_version_are_refused_by_first_tap(old: goldens.Golden):
    prompts = {"a": changed_bits(golden_prompt(0), ("mlp_residual", 0), ("q", 1))}

    with pytest.raises(RecordRefused, match="first at mlp_residual, layer 0, prompt a.*still n.1"):
        record.compare(old, MANIFEST, prompts)


@pytest.mark.parametrize("fact", ["numerics_version", "weights_sha256"])
def test_bits_may_change_with_the_version_or_the_weights_and_the_change_is_shown(
    old: goldens.Golden, fact: str
):
    prompts = {"a": changed_bits(golden_prompt(0), ("mlp_residual", 0), ("q", 0), ("q", 1))}

    change = record.compare(old, {**MANIFEST, fact: "new"}, prompts)

    assert change.taps == {"q": 2, "mlp_residual": 1}
    assert change.lines()[0] == f"  because {fact} {MANIFEST[fact]} -> new"
    assert any("q " in line and " 2 " in line for line in change.lines())


def test_bits_of_a_prompt_that_changed_itself_may_change(old: goldens.Golden):
    prompts = {"a": replace(changed_bits(golden_prompt(0), ("q", 0)), prompt_sha256="other")}

    assert record.compare(old, MANIFEST, prompts).taps == {}


def test_the_same_bits_are_no_change(old: goldens.Golden):
    change = record.compare(old, MANIFEST, {"a": golden_prompt(0), "new": golden_prompt(3)})

    assert (change.taps, change.reasons) == ({}, ())


def test_a_new_record_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path):
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0)})
    (tmp_path / "toy" / "stray.json").write_text("{}")

    record.write(tmp_path / "toy", {**MANIFEST, "numerics_version": "n.2"}, {"b": golden_prompt(1)})

    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == sorted(
        [*goldens.FILES, "manifest.json"]
    )
    assert list(goldens.load(tmp_path / "toy").prompts) == ["b"]


def test_a_record_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch):
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0)})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(record, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write(tmp_path / "toy", dict(MANIFEST), {"b": golden_prompt(1)})

    assert list(goldens.load(tmp_path / "toy").prompts) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


def test_a_record_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch):
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0)})
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError("read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)

    with pytest.raises(OSError, match="read-only"):
        record.write(tmp_path / "toy", dict(MANIFEST), {"b": golden_prompt(1)})
    assert set(goldens.load(tmp_path / "toy").prompts) == {"a"}
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_directory_that_is_no_record_is_never_replaced(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")

    with pytest.raises(RecordRefused, match="no golden set"):
        record.write(tmp_path / "model", dict(MANIFEST), {"a": golden_prompt(0)})

    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch):
    """Records a model with made-up measurements, roots and all in tmp_path."""
    monkeypatch.setattr(goldens, "GOLDEN_ROOT", tmp_path / "in_git")
    monkeypatch.setattr(record, "cache_root", lambda: tmp_path / "cache")
    facts = {"numerics_version": "n.1", "weights_sha256": "w"}
    monkeypatch.setattr(record, "measure", lambda *_: (facts, {"a": golden_prompt(0)}))
    options = argparse.Namespace(prompts=None, why="a test", dirty_because="a test")
    return lambda model: record.record(str(model), options, Console(file=io.StringIO()))


def test_the_record_of_a_directory_lies_in_the_cache_under_its_last_name(recorded, tmp_path: Path):
    model = tmp_path / "models" / "mine"
    shutil.copytree(resolve("toy"), model)
    files = sorted(model.iterdir())

    assert recorded(model) == tmp_path / "cache" / "golden" / "mine"
    assert goldens.load(tmp_path / "cache" / "golden" / "mine").manifest["model"] == "mine"
    assert sorted(model.iterdir()) == files


def test_a_directory_with_the_name_of_one_of_our_models_has_no_record(recorded, tmp_path: Path):
    shutil.copytree(resolve("toy"), tmp_path / "toy-wide")

    with pytest.raises(RecordRefused, match="toy-wide"):
        recorded(tmp_path / "toy-wide")


def test_our_own_models_lie_in_git(recorded, tmp_path: Path):
    assert recorded("toy") == tmp_path / "in_git" / "toy"


def test_the_same_record_is_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        record.write(tmp_path / name, dict(MANIFEST), {"a": golden_prompt(0)})

    for file in (*goldens.FILES, "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_manifest_lists_every_tap_in_forward_order(old: goldens.Golden):
    assert [tuple(tap) for tap in old.manifest["taps"]] == TAPS


def test_bits_show_one_line_per_tap_so_that_git_shows_what_changed(tmp_path: Path):
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0)})

    lines = (tmp_path / "toy" / "bits.json").read_text().splitlines()

    assert sum(line.startswith('  "q"') for line in lines) == 1
    assert json.loads("\n".join(lines)).keys() == {"a"}
