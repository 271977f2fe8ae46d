"""The record that a GPU left in git: what it is of, its bits, and what it says of today's source.

Reads golden/<card>/record.json and bits.json and judges them; knows nothing of how a record is made
(record_gpu) or how bits are computed (gpu_bits). CI has no GPU: the twin computes the recorded bits
again there, and a record of another source is "not run", never a pass.
Invariant: bits.json is used only if its SHA-256 is the one in record.json.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engine.bindings import CSRC
from engine.errors import EngineError
from engine.source_stamp import CPU_ALONE, source_stamp
from verification import goldens
from verification.goldens import Golden, GoldenVerdict
from verification.gpu_bits import HASH_DIGITS, PromptBits, short

SCHEMA = 1
CARD = "h200"
RECORD_DIRECTORY = goldens.GOLDEN_ROOT / CARD
FILES = ("record.json", "bits.json")
MAX_BYTES = 350_000  # of both files: they live in git
PARTS = ("bits", "kernel_tests", "sanitizers", "benchmarks")


class GpuRecordError(EngineError):
    """A record is damaged, incomplete or of another schema; the message names the file."""


def gpu_source_stamp(csrc: Path = CSRC) -> str:
    """SHA-256 of what decides the GPU's bits: csrc/ without the twin."""
    return source_stamp(csrc, CPU_ALONE)


@dataclass(frozen=True)
class GpuRecord:
    """One record.

    Args:
        facts: record.json: schema, gpu_source, numerics_version, card, software and the parts; a
            part that was not run is {"status": "not run", "reason": ...}.
        bits: model -> prompt id -> phase -> tap -> a hash per layer.
    """

    facts: Mapping
    bits: Mapping[str, Mapping[str, PromptBits]]

    @cached_property
    def differs_from_today(self) -> str | None:
        """Why it says nothing of today's source; None if it is of this very source."""
        recorded, today = self.facts["gpu_source"], gpu_source_stamp()
        if recorded == today:
            return None
        return f"not run for this source (record of {recorded[:12]}, csrc/ is {today[:12]})"

    def failures(self) -> list[str]:
        """What failed on the GPU, as the record itself says."""
        tests = self.facts["kernel_tests"]
        found = []
        if tests["status"] == "fail":
            found.append(f"{tests['failed']} of {tests['num_tests']} kernel tests failed")
        return found

    def remarks(self) -> list[str]:
        """What to say beside the bits: sanitizers that found something, and what was not run."""
        lanes = self.facts["sanitizers"].get("lanes", {})
        said = [
            f"{lane} failed: {'; '.join(of['problems'])}"
            for lane, of in lanes.items()
            if of["problems"]
        ]
        parts = {part: self.facts[part] for part in PARTS} | self.facts["bits"].get("models", {})
        return said + [
            f"not in its record: {name} ({of['reason']})"
            for name, of in parts.items()
            if of["status"] == "not run"
        ]


def load(directory: Path = RECORD_DIRECTORY) -> GpuRecord:
    """Reads one record after checking its files.

    Raises:
        GpuRecordError: a file is missing, changed, or of another schema.
    """
    try:
        facts = json.loads((directory / "record.json").read_text(encoding="utf-8"))
        content = (directory / "bits.json").read_bytes()
    except (OSError, ValueError) as error:
        raise GpuRecordError(f"{directory} holds no GPU record: {error}") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise GpuRecordError(f"{directory}/record.json: this program reads schema {SCHEMA}")
    if missing := [k for k in ("gpu_source", "numerics_version", *PARTS) if k not in facts]:
        raise GpuRecordError(f"{directory}/record.json: {missing[0]} is missing")
    if hashlib.sha256(content).hexdigest() != facts["bits"].get("sha256"):
        raise GpuRecordError(f"{directory}/bits.json is not the file that was recorded")
    return GpuRecord(facts, bits_from_text(content.decode("utf-8")))


def bits_to_text(bits: Mapping[str, Mapping[str, PromptBits]]) -> str:
    """bits.json: a line per prompt and phase; taps in forward order, each tap's layers joined."""
    taps: dict[str, list[str]] = {}
    blocks = []
    for name, prompts in bits.items():
        lines = []
        for prompt_id, phases in prompts.items():
            for phase, hashes in phases.items():
                if taps.setdefault(phase, list(hashes)) != list(hashes):
                    raise GpuRecordError(f"{name}, {prompt_id}, {phase}: other taps than elsewhere")
                words = " ".join("".join(layers) for layers in hashes.values())
                lines.append(f"  {json.dumps(f'{prompt_id} {phase}')}: {json.dumps(words)}")
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{\n"taps": {json.dumps(taps)},\n' + ",\n".join(blocks) + "\n}\n"


def bits_from_text(text: str) -> dict[str, dict[str, PromptBits]]:
    """What bits_to_text wrote."""
    models = json.loads(text)
    taps = models.pop("taps")
    bits: dict[str, dict[str, PromptBits]] = {}
    for name, lines in models.items():
        prompts = bits.setdefault(name, {})
        for key, words in lines.items():
            prompt_id, phase = key.rsplit(" ", 1)
            layers = [_cut(word) for word in words.split(" ")]
            hashes = dict(zip(taps[phase], layers, strict=True))
            prompts.setdefault(prompt_id, {})[phase] = hashes
    return bits


def _cut(word: str) -> list[str]:
    return [word[at : at + HASH_DIGITS] for at in range(0, len(word), HASH_DIGITS)]


def check_gpu_record(
    name: str,
    weights_sha256: str,
    prompt_ids: Iterable[str],
    held: GoldenVerdict,
    golden: Golden | None,
    directory: Path = RECORD_DIRECTORY,
) -> GoldenVerdict:
    """What the record says of the run that was just verified.

    The run's bits were held to the goldens; here the goldens are held to the GPU's bits of the same
    prompts. Both equal: the GPU and this run agree, tap by tap.

    Args:
        name: of the model.
        weights_sha256: of the model's weights.
        prompt_ids: the prompts that were verified.
        held: the goldens' verdict on this run.
        golden: the goldens themselves, if there are any.
        directory: where the record is.

    Returns:
        "pass" only for a record of today's source that agrees; "fail" for one that is damaged, that
        disagrees or that says itself that something failed; else "not run" with the reason.
    """
    if not (directory / "record.json").exists():
        return GoldenVerdict("not run", f"no GPU record in {directory.parent.name}/{CARD}")
    try:
        record = load(directory)
    except GpuRecordError as error:
        return GoldenVerdict("fail", str(error))
    if record.differs_from_today:
        return GoldenVerdict("not run", record.differs_from_today)
    if failures := record.failures():
        return GoldenVerdict("fail", f"{CARD}: {failures[0]}", tuple(failures[1:]))
    subject = record.facts["bits"].get("models", {}).get(name, {"status": "not run"})
    if subject["status"] == "not run":
        reason = subject.get("reason", "this model is not in the record")
        return GoldenVerdict("not run", f"{CARD}: {reason}")
    if subject["weights_sha256"] != weights_sha256:
        return GoldenVerdict("not run", f"{CARD}: the record is of other weights")
    if held.status != "pass" or golden is None:
        return GoldenVerdict("not run", f"{CARD}: only a run that the goldens passed can be held")
    return _compare(record, name, golden, list(prompt_ids))


def _compare(record: GpuRecord, name: str, golden: Golden, prompt_ids: list[str]) -> GoldenVerdict:
    recorded = record.bits[name]
    places, num_equal = [], 0
    for prompt_id in prompt_ids:
        if prompt_id not in recorded or prompt_id not in golden.prompts:
            return GoldenVerdict("not run", f"{CARD}: prompt {prompt_id} is not in the record")
        prefill = recorded[prompt_id]["prefill"]
        for (tap, layer), digest in golden.prompts[prompt_id].bits.items():
            if prefill[tap][layer] == short(digest):
                num_equal += 1
            else:
                places.append(f"prompt {prompt_id}, {tap}, layer {layer}")
    if places:
        total = num_equal + len(places)
        what = f"{CARD}: bits differ first at {places[0]}; {len(places)} of {total} taps differ"
        return GoldenVerdict("fail", what)
    if not num_equal:
        return GoldenVerdict("not run", f"{CARD}: nothing that was recorded was verified")
    remarks = tuple(f"{CARD}, {what}" for what in record.remarks())
    return GoldenVerdict("pass", None, (f"{CARD}, source equal, {num_equal} taps equal", *remarks))
