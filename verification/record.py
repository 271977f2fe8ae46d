"""Records goldens: the only writer of golden/<model>/ (`make golden`).

Decides whether a record may be made (a clean tree, and bits that change only with the numerics
version, the weights or the prompts), shows what changed, and writes all of it or nothing. Knows
neither how the oracle nor how the engine computes: `measure` asks both and `goldens` says what is
kept of the answers.
Invariant: a directory of goldens is always one whole record; the old one stays until the new one is
complete.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import transformers
from rich.console import Console
from safetensors.numpy import save_file

from engine.config import ModelConfig
from engine.errors import EngineError
from engine.interrupts import Uninterrupted
from engine.models import cache_root, model_names, name_of, resolve
from verification import goldens
from verification.golden_measure import measure
from verification.goldens import Golden, GoldenPrompt
from verification.interrupts import ends_in_one_line
from verification.prompts import default_selection, prompts_for, prompts_sha256
from verification.taps import TapKey
from verification.terminal import ProgressReport, standard_console

REPOSITORY = goldens.GOLDEN_ROOT.parent
# Small enough for git; others go to the cache.
IN_GIT = ("toy", "toy-wide", "toy-gqa3", "smollm2-135m")
MAX_BYTES_IN_GIT = 6_000_000  # of all of them


class RecordRefused(EngineError):
    """The record may not be made; the message says why and what would help."""


@dataclass(frozen=True)
class Change:
    """What a new record would change in an old one."""

    taps: Mapping[str, int]  # tap -> prompts and layers whose bits changed
    reasons: tuple[str, ...]  # manifest facts that allow bits to change, old -> new

    def lines(self) -> list[str]:
        """What to show before writing."""
        shown = [f"  because {reason}" for reason in self.reasons]
        shown += [f"  {tap:<14} {n} bit hashes changed" for tap, n in self.taps.items()]
        return shown or ["  nothing that is compared bit for bit changed"]


def require_clean_tree(repository: Path) -> str:
    """The commit that a record belongs to.

    Raises:
        RecordRefused: there is no commit, or a file outside golden/ differs from it.
    """
    commit = _git(repository, "rev-parse", "--verify", "HEAD")
    if commit is None:
        raise RecordRefused("the tree has no commit yet, so a record could not say what made it")
    status = _git(
        repository, "status", "--porcelain", "--untracked-files=all", "--", ".", ":!golden"
    )
    if status is None:
        raise RecordRefused(f"git status fails in {repository}")
    if status:
        files = [line[3:] for line in status.splitlines()]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise RecordRefused(
            f"the tree is dirty ({', '.join(files[:3])}{more}): commit first, "
            "or say why not with --dirty-because TEXT"
        )
    return commit


def compare(old: Golden, manifest: Mapping, prompts: Mapping[str, GoldenPrompt]) -> Change:
    """What a record of these prompts would change in the old one.

    Raises:
        RecordRefused: bits changed though numerics version, weights and the prompt itself did not.
    """
    reasons = tuple(
        f"{name} {old.manifest.get(name)} -> {manifest[name]}"
        for name in ("numerics_version", "weights_sha256")
        if old.manifest.get(name) != manifest[name]
    )
    taps: dict[str, int] = {}
    for key, prompt in _changed(old, prompts):
        del prompt
        taps[key[0]] = taps.get(key[0], 0) + 1
    if taps and not reasons:
        key, prompt = _changed(old, prompts)[0]
        raise RecordRefused(
            f"the engine's bits changed, first at {key[0]}, layer {key[1]}, prompt {prompt}, but "
            f"numerics_version is still {manifest['numerics_version']}: "
            "raise it in csrc/common/numerics.h if this is meant"
        )
    return Change(taps, reasons)


def _changed(old: Golden, prompts: Mapping[str, GoldenPrompt]) -> list[tuple[TapKey, str]]:
    """Taps in forward order whose bits differ for a prompt that itself did not change."""
    return [
        (key, name)
        for key in (tuple(tap) for tap in old.manifest["taps"])
        for name, prompt in prompts.items()
        if name in old.prompts
        and old.prompts[name].prompt_sha256 == prompt.prompt_sha256
        and old.prompts[name].bits.get(key) != prompt.bits.get(key)
    ]


def write(directory: Path, manifest: dict, prompts: Mapping[str, GoldenPrompt]) -> None:
    """Writes one record in place of the old one; complete or not at all.

    Args:
        directory: golden/<model>; replaced as a whole, if it is a golden set.
        manifest: without `schema`, `taps` and `files`, which are added here.
        prompts: every prompt with the same taps.

    Raises:
        RecordRefused: there is something else in its place.
    """
    if directory.exists() and not (directory / "manifest.json").exists():
        raise RecordRefused(f"{directory} is no golden set: it will not be replaced")
    directory.parent.mkdir(parents=True, exist_ok=True)
    taps: list[TapKey] = list(next(iter(prompts.values())).bits)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        _write_files(new, taps, prompts)
        whole = {
            "schema": goldens.SCHEMA,
            **manifest,
            "projection_seed": goldens.PROJECTION_SEED,
            "files": {name: goldens.file_sha256(new / name) for name in goldens.FILES},
            "taps": taps,
        }
        (new / "manifest.json").write_text(_manifest_text(whole), encoding="utf-8")
        goldens.load(new)  # what cannot be read back is not put in place
        with Uninterrupted():
            _exchange(directory, new, Path(scratch) / "old")


def _exchange(directory: Path, new: Path, old: Path) -> None:
    """Puts the new record in place; the one it replaces goes to `old`, or back where it was."""
    if not directory.exists():
        os.rename(new, directory)
        return
    os.rename(directory, old)
    try:
        os.rename(new, directory)
    except OSError:
        os.rename(old, directory)
        raise


def _write_files(
    directory: Path, taps: Sequence[TapKey], prompts: Mapping[str, GoldenPrompt]
) -> None:
    tokens, bits, arrays = {}, {}, {}
    for name, prompt in prompts.items():
        tokens[name] = {
            "prompt_sha256": prompt.prompt_sha256,
            "tokens": list(prompt.tokens),
            "gaps": [round(gap, 6) for gap in prompt.gaps],
        }
        layers: dict[str, list[str]] = {}
        for tap, layer in sorted(taps, key=lambda key: key[1]):
            layers.setdefault(tap, []).append(prompt.bits[(tap, layer)])
        bits[name] = layers
        prints = [prompt.fingerprints[key] for key in taps]
        arrays[f"{name}.projections"] = np.stack([p.projections for p in prints])
        arrays[f"{name}.rms"] = np.array([p.rms for p in prints], np.float32)
        errors = [prompt.yardstick_error[key] for key in taps]
        arrays[f"{name}.yardstick_error"] = np.array(errors, np.float32)
    _write_json(directory / "tokens.json", tokens)
    _write_json(directory / "bits.json", bits)
    path = directory / "fingerprints.safetensors"
    save_file(arrays, path)
    path.chmod(0o644)  # safetensors makes files that only their owner may read


def _write_json(path: Path, prompts: Mapping[str, Mapping[str, object]]) -> None:
    """One line per prompt and field: a change shows in git where it is."""
    blocks = []
    for name, fields in prompts.items():
        inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items())
        blocks.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def _manifest_text(manifest: Mapping[str, object]) -> str:
    """Indented, but with the list of taps on one line."""
    taps = json.dumps(manifest["taps"])
    rest = {key: value for key, value in manifest.items() if key != "taps"}
    text = json.dumps(rest, indent=2)
    return f'{text[:-2]},\n  "taps": {taps}\n}}\n'


def record(model: str, options: argparse.Namespace, console: Console) -> Path:
    """Measures one model, shows what changed and writes it.

    Args:
        model: a name, a directory or a hub id; the models of IN_GIT are written to golden/, others
            to the cache under the last part of the path or id.
        options: the command line: prompts, dirty_because, why.
        console: where the difference is shown.

    Raises:
        RecordRefused: see require_clean_tree and compare; or a directory has the name of one of
            our own models.
    """
    provenance = _provenance(options)
    directory, name = resolve(model), name_of(model)
    if model != name and name in model_names():
        raise RecordRefused(f"{model} is not our {name}: give the directory another name")
    config = ModelConfig.from_directory(directory)
    selection = options.prompts or default_selection(name)
    prompts = prompts_for(name, directory, config.vocab_size, selection)
    with ProgressReport(console) as progress:
        facts, measured = measure(directory, prompts, progress)
    manifest = {"model": name, **facts, "prompts_sha256": prompts_sha256(), **provenance}
    root = goldens.GOLDEN_ROOT if name in IN_GIT else cache_root() / "golden"
    console.print(f"{name}: {len(measured)} prompts, {facts['numerics_version']}", markup=False)
    if (root / name / "manifest.json").exists():
        change = compare(goldens.load(root / name), manifest, measured)
        for line in change.lines():
            console.print(line, markup=False)
    else:
        console.print("  the first record", markup=False)
    write(root / name, manifest, measured)
    return root / name


def _provenance(options: argparse.Namespace) -> dict[str, object]:
    """Who made the record, from what, when and why."""
    try:
        commit, dirty_because = require_clean_tree(REPOSITORY), None
    except RecordRefused:
        if not options.dirty_because:
            raise
        commit, dirty_because = _git(REPOSITORY, "rev-parse", "HEAD"), options.dirty_because
    return {
        "git_commit": commit,
        "dirty_because": dirty_because,
        "why": options.why,
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@ends_in_one_line("a model that was under way keeps its old record")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 recorded, 1 refused or failed, 2 wrong use, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m verification.record", description=__doc__)
    parser.add_argument("--model", action="append", help=f"default: {', '.join(IN_GIT)}")
    parser.add_argument(
        "--prompts", help="all, quick or ids with commas; default: all, for toys quick"
    )
    parser.add_argument("--why", help="why the goldens change; kept in the manifest")
    parser.add_argument("--dirty-because", help="record from a dirty tree; the reason is kept too")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # the progress shown is our own
    console = standard_console()
    try:
        for name in options.model or IN_GIT:
            record(name, options, console)
    except (EngineError, OSError) as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    size = sum(f.stat().st_size for name in IN_GIT for f in (goldens.GOLDEN_ROOT / name).glob("*"))
    console.print(f"golden/ holds {size:,} bytes of at most {MAX_BYTES_IN_GIT:,}", markup=False)
    return 0 if size <= MAX_BYTES_IN_GIT else 1


def _git(repository: Path, *words: str) -> str | None:
    """What git prints, or None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip("\n")


if __name__ == "__main__":
    sys.exit(main())
