import inspect
import re
from pathlib import Path

from engine.ops import Ops
from verification.sanitizers import workload

DECODE_STEP = Path(__file__).parents[3] / "csrc" / "kernels" / "decode_step.cuh"


def operator_names() -> set[str]:
    hidden = {"close", "rope_table"}  # the table is made on the host
    members = inspect.getmembers(Ops, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")} - hidden


def test_every_operation_is_a_case(twin: Ops):
    cases = [*workload.operator_cases(twin), *workload.fused_cases(twin)]
    named = {re.match(r"\w+", what)[0] for what, _ in cases}

    assert named == operator_names()


def test_every_case_of_the_operations_runs(twin: Ops, capsys):
    count = workload.run_cases(workload.operator_cases(twin))

    assert capsys.readouterr().out.count("case ") == count > 30


def test_a_models_steps_run_prefill_decode_and_more_sequences_than_one_launch_takes(make_runner):
    room = {k: v for k, v in vars(workload.ROOM).items() if k != "device"}

    names = []
    for what, call in workload.model_cases("toy", make_runner("toy", **room)):
        call()
        names.append(what)

    one_launch = int(re.search(r"kStepTokens = (\d+)", DECODE_STEP.read_text())[1])
    assert any("prefill" in name for name in names) and any("a tap" in name for name in names)
    assert one_launch < min(workload.MANY)
    for count in workload.MANY:
        assert f"toy: 2 greedy steps of {count} sequences" in names
