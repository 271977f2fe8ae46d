"""The bits that a GPU left in git, computed again by the twin on whatever CPU this is.

Held whether or not the record is of today's source: the bits of a numerics version do not change.
Only the reports say "not run for this source" (tests/verification/test_gpu_record.py).
"""

import pytest

from engine.bindings import Library
from engine.models import cache_root, resolve
from engine.sources import smollm2, toy
from verification import goldens
from verification.gpu_bits import (
    DECODED_OF_SMOLLM2,
    differences,
    is_decoded,
    model_bits,
    recorded_prompts,
    short,
)
from verification.gpu_record import FILES, MAX_BYTES, RECORD_DIRECTORY, GpuRecord, load

TOYS = tuple(toy.CONFIGS)


@pytest.fixture(scope="module")
def record() -> GpuRecord:
    return load()


def compare(record: GpuRecord, name: str, library: Library, prompt_ids: set[str]) -> None:
    assert record.facts["numerics_version"] == library.numerics_version
    prompts = [p for p in recorded_prompts(name, resolve(name)) if p.id in prompt_ids]
    recorded = {p.id: record.bits[name][p.id] for p in prompts}

    found = model_bits(name, resolve(name), prompts, "cpu", library)

    assert prompts and differences(found, recorded) == []


@pytest.mark.parametrize("name", TOYS)
def test_the_twin_computes_the_gpus_bits_of_the_short_prompts(record, library: Library, name: str):
    short_ids = {p.id for p in recorded_prompts(name, resolve(name)) if len(p.token_ids) <= 129}

    compare(record, name, library, short_ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_twin_computes_the_gpus_bits_of_the_long_prompts(record, library: Library, name: str):
    long_ids = {p.id for p in recorded_prompts(name, resolve(name)) if len(p.token_ids) > 129}

    compare(record, name, library, long_ids)


@pytest.mark.slow
@pytest.mark.weights
def test_the_twin_computes_the_gpus_bits_of_the_trained_model(record, library: Library):
    if record.facts["bits"]["models"][smollm2.NAME]["status"] == "not run":
        pytest.skip("requires a record of smollm2-135m: this one says not run")
    if not any(cache_root().glob(f"{smollm2.NAME}-*/model.safetensors")):
        pytest.skip("requires smollm2-135m in the model cache: make verify fetches it")

    compare(record, smollm2.NAME, library, set(DECODED_OF_SMOLLM2))


@pytest.mark.parametrize("name", ["toy", "toy-wide", "toy-gqa3", smollm2.NAME])
def test_the_gpus_prefill_is_the_goldens_at_every_tap_of_every_prompt(record, name: str):
    if record.facts["bits"]["models"][name]["status"] == "not run":
        pytest.skip(f"requires a record of {name}: this one says not run")
    golden = goldens.load(goldens.GOLDEN_ROOT / name)

    differing = [
        (prompt_id, tap, layer)
        for prompt_id, prompt in golden.prompts.items()
        for (tap, layer), digest in prompt.bits.items()
        if record.bits[name][prompt_id]["prefill"][tap][layer] != short(digest)
    ]

    assert golden.prompts and differing == []


def test_every_toy_is_recorded_with_every_prompt_and_phase(record: GpuRecord):
    for name in TOYS:
        prompts = {p.id for p in recorded_prompts(name, resolve(name))}
        assert record.bits[name].keys() == prompts
        for prompt_id, phases in record.bits[name].items():
            expected = ["prefill", "decode", "greedy"] if is_decoded(name, prompt_id) else []
            assert list(phases) == expected


def test_it_says_what_it_was_made_on(record: GpuRecord):
    assert all(record.facts["card"].values()) and record.facts["software"]["toolkit"]
    assert record.facts["recorded"]


def test_its_kernel_tests_passed_none_of_them_skipped(record: GpuRecord):
    tests = record.facts["kernel_tests"]

    assert (tests["status"], tests["failed"], tests["skipped"]) == ("pass", 0, 0)
    assert tests["num_tests"] == tests["passed"] > 400


def test_it_is_small():
    assert sum((RECORD_DIRECTORY / name).stat().st_size for name in FILES) <= MAX_BYTES


def test_a_changed_bit_of_the_record_would_be_noticed(record: GpuRecord, library: Library):
    changed = {"toy": {"len-17": {k: dict(v) for k, v in record.bits["toy"]["len-17"].items()}}}
    changed["toy"]["len-17"]["decode"]["attn"] = [
        "0" * 10,
        *record.bits["toy"]["len-17"]["decode"]["attn"][1:],
    ]

    with pytest.raises(AssertionError, match="len-17, decode, attn, layer 0"):
        compare(GpuRecord(record.facts, changed), "toy", library, {"len-17"})
