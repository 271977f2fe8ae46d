"""The bits that a GPU left in git, computed again by the twin on whatever CPU this is.

Held whether or not the record is of today's source: the bits of a numerics version do not change.
Only the reports say "not run for this source" (tests/verification/test_gpu_record.py).
"""

import pytest

from engine.bindings import Library
from engine.models import cache_root, resolve
from engine.sources import shape, smollm2, toy
from tests.benchmarks import table
from tests.benchmarks.compare import OURS
from tests.benchmarks.points import POINTS
from verification import goldens
from verification.gpu_bits import (
    DECODED_OF_SMOLLM2,
    MODELS,
    TRAINED_PROMPT,
    differences,
    is_decoded,
    model_bits,
    num_taps,
    recorded_prompts,
    short,
)
from verification.gpu_record import FILES, MAX_BYTES, RECORD_DIRECTORY, GpuRecord, load
from verification.prompts import prompts_sha256
from verification.sanitizers.lanes import LANES

TOYS = tuple(toy.CONFIGS)
SHORT = 129  # tokens


@pytest.fixture(scope="module")
def record() -> GpuRecord:
    return load()


@pytest.fixture
def current(record: GpuRecord) -> GpuRecord:
    """The record, if it is of this source: an older one may lack what was asked for since."""
    if record.differs_from_today:
        pytest.skip(f"GPU: {record.differs_from_today}")
    return record


def compare(record: GpuRecord, name: str, library: Library, prompt_ids: set[str]) -> None:
    assert record.facts["numerics_version"] == library.numerics_version
    of_model = record.bits[name]
    wanted = [p for p in recorded_prompts(name, resolve(name)) if p.id in prompt_ids]
    prompts = [p for p in wanted if p.id in of_model or not record.differs_from_today]
    recorded = {p.id: of_model[p.id] for p in prompts}

    found = model_bits(name, resolve(name), prompts, "cpu", library)

    assert prompts and differences(found, recorded) == []


def prompt_ids(name: str, is_long: bool) -> set[str]:
    prompts = recorded_prompts(name, resolve(name))
    return {p.id for p in prompts if (len(p.token_ids) > SHORT) == is_long}


@pytest.mark.parametrize("name", TOYS)
def test_the_twin_computes_the_gpus_bits_of_the_short_prompts(record, library: Library, name: str):
    compare(record, name, library, prompt_ids(name, is_long=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_twin_computes_the_gpus_bits_of_the_long_prompts(record, library: Library, name: str):
    compare(record, name, library, prompt_ids(name, is_long=True))


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        (smollm2.NAME, set(DECODED_OF_SMOLLM2) - {TRAINED_PROMPT.id}),
        (smollm2.NAME, {TRAINED_PROMPT.id}),
        (shape.NAME, {"len-1", "len-17"}),  # seconds; the longer ones are minutes of two cores
    ],
    ids=["trained", "trained-long", "real-shape"],
)
def test_the_twin_computes_the_gpus_bits_of_the_large_models(
    record, library: Library, name: str, chosen: set[str]
):
    recorded = record.bits.get(name, {}).keys() & chosen
    if not recorded:
        pytest.skip(f"requires a record of {name}, {sorted(chosen)[0]}: this one has none")
    if not any(cache_root().glob(f"{name}-*/model.safetensors")):
        pytest.skip(f"requires {name} in the model cache: make verify MODEL={name} puts it there")

    compare(record, name, library, chosen)


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


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recorded_with_every_prompt_and_phase(current: GpuRecord, name: str):
    facts = current.facts["bits"]["models"][name]
    if facts["status"] == "not run":
        pytest.skip(f"requires a record of {name}: this one says not run")
    found = current.bits[name]
    if name in TOYS:
        assert found.keys() == {p.id for p in recorded_prompts(name, resolve(name))}
    assert (facts["num_prompts"], facts["num_taps"]) == (len(found), num_taps(found))
    for prompt_id, phases in found.items():
        decoded = ["decode", "greedy"] if is_decoded(name, prompt_id) else []
        assert list(phases) == ["prefill", *decoded]


def test_it_says_what_it_was_made_on(record: GpuRecord, library: Library):
    facts = record.facts

    assert all(facts["card"].values()) and facts["software"]["toolkit"]
    assert facts["recorded"] and len(facts["source_stamp"]) == 64
    assert facts["prompts_sha256"] == prompts_sha256()


def test_its_kernel_tests_passed_none_of_them_skipped(record: GpuRecord):
    tests = record.facts["kernel_tests"]

    assert (tests["status"], tests["failed"], tests["skipped"]) == ("pass", 0, 0)
    assert tests["num_tests"] == tests["passed"] > 400


def test_every_file_of_kernel_tests_was_run(current: GpuRecord):
    files = current.facts["kernel_tests"]["files"]
    folder = goldens.GOLDEN_ROOT.parent / "tests" / "kernels"
    marked = {path.stem for path in folder.glob("test_*.py") if "mark.gpu" in path.read_text()}

    assert {f"tests/kernels/{stem}" for stem in marked} <= files.keys()
    assert sum(files.values()) == current.facts["kernel_tests"]["num_tests"]


def test_every_sanitizer_is_there_with_its_findings_or_the_reason_why_not(record: GpuRecord):
    sanitizers = record.facts["sanitizers"]
    if sanitizers["status"] == "not run":
        assert sanitizers["reason"]
        return
    lanes = sanitizers["lanes"]
    assert lanes.keys() == {lane.tool for lane in LANES}
    for lane in lanes.values():
        assert lane["cases"] > 0 and lane["seconds"] > 0
        assert bool(lane["problems"]) == (lane["status"] == "fail")
        assert set(lane["findings"]) <= {
            problem.partition(" x ")[2] for problem in lane["problems"]
        }
    is_clean = all(lane["status"] == "pass" for lane in lanes.values())
    assert (sanitizers["status"] == "pass") == is_clean


def test_every_point_was_timed_checked_and_is_in_the_table(record: GpuRecord):
    run = record.facts["benchmarks"]
    if run["status"] == "not run":
        assert run["reason"]
        return
    assert [point["name"] for point in run["points"]] == [point.name for point in POINTS]
    for point in run["points"]:
        assert point["checked"]["equal"] and point["clocks"]["clocks.sm"]
        assert 0 < point["floor"] < point["contestants"][OURS]["median"]
        ours = point["contestants"][OURS]["median"]
        assert point["share_of_limit"] == pytest.approx(point["floor"] / ours, abs=1e-4)
        assert all("median" in of or of["not run"] for of in point["contestants"].values())
    assert all(run["limits"].values()) and run["memory"]["beyond"] > 0
    assert run["first_token"]["total"] >= run["first_token"]["load"] > 0
    lines = table.markdown(run).splitlines()
    assert all(any(line.startswith(f"| {point.name} |") for line in lines) for point in POINTS)


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
