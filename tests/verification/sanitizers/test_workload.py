import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.bindings import CSRC, LIBRARY_PATH
from engine.errors import EngineError
from engine.model_runner import ModelRunner
from engine.ops import Ops
from tests.kernels.operations import operator_names
from verification.sanitizers import workload

NUMERICS_CHUNK = 512
KERNELS = Path(__file__).parents[3] / "csrc" / "kernels"


def cases_of(ops: Ops) -> list[workload.Case]:
    return [case for cases in workload.OPERATIONS.values() for case in cases(ops)]


def test_every_operation_is_a_case(twin: Ops):
    assert {re.match(r"\w+", what)[0] for what, _ in cases_of(twin)} == operator_names()


@pytest.mark.parametrize("part", [part for part in workload.OPERATIONS if part != "fused linear"])
def test_every_case_of_the_operations_runs(twin: Ops, part: str, capsys):
    count = workload.run_cases(workload.OPERATIONS[part](twin))

    assert capsys.readouterr().out.count("case ") == count > 1


def test_a_models_steps_run_prefill_decode_and_more_sequences_than_one_launch_takes(make_runner):
    room = {k: v for k, v in vars(workload.ROOM).items() if k != "device"}

    names = []
    for what, call in workload.model_cases("toy", make_runner("toy", **room)):
        call()
        names.append(what)

    one_launch = int(
        re.search(r"kStepTokens = (\d+)", (KERNELS / "decode_step.cuh").read_text())[1]
    )
    assert any("prefill" in name for name in names) and any("a tap" in name for name in names)
    assert one_launch < min(workload.MANY)
    for count in workload.MANY:
        assert f"toy: 2 greedy steps of {count} sequences" in names


def test_both_kinds_of_prefill_are_run():
    few = int(re.search(r"kFewTokens = (\d+)", (KERNELS / "linear.cuh").read_text())[1])
    counts = [sum(lengths) for lengths in workload.PROMPTS]

    assert min(counts) <= few < max(counts) <= workload.ROOM.max_num_tokens


def test_a_models_long_sums_are_run_in_a_step_of_many_sequences(library):
    chunks = set()
    for name, config in workload.LONG_SUMS.items():
        widths = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
        chunks |= {-(-width // NUMERICS_CHUNK) for width in widths}
        room = replace(workload.ROOM, device="cpu")
        with ModelRunner(workload.long_sums_directory(name), room, library) as runner:
            assert workload.run_cases(workload.many_cases(name, runner, workload.STEPS[name])) > 0

    assert {3, 4, 6, 8} <= chunks


def test_a_library_of_another_checkout_is_held_to_that_checkouts_sources(tmp_path: Path):
    library = tmp_path / "engine" / "libengine.so"
    library.parent.mkdir()
    shutil.copy2(LIBRARY_PATH, library)
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "csrc" / "kernels" / "exp2.cu").write_text("// another\n")

    with pytest.raises(EngineError, match="stamp"):
        workload.main(["--library", str(library), "elementwise"])
