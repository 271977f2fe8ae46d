from engine.config import ModelConfig
from engine.models import resolve
from verification.compare import failed
from verification.localise import Finding, Findings
from verification.results import Cell
from verification.summary import summarise


def cell(tap: str = "q", mode: str = "local", phase: str = "prefill", **values: object) -> Cell:
    fields = {"status": "pass", "ratio": 0.5, "differing": 3, "values": 100, "z": 1.0, "max_ulp": 1}
    return Cell(mode, phase, "a", 0, tap, "bounded", **(fields | values))


def findings(*failed_ones: Finding) -> Findings:
    return Findings(ModelConfig.from_directory(resolve("toy")), "cpu", list(failed_ones))


def test_cells_of_a_tap_are_one_row():
    rows = summarise([cell(), cell(ratio=0.9, differing=4, z=None, max_ulp=2)], findings(), {})

    assert len(rows) == 1
    row = rows[0]
    assert (row.cells, row.values, row.differing, row.max_ulp) == (2, 200, 7, 2)
    assert (row.max_ratio, row.max_z, row.status, row.operator) == (0.9, 1.0, "pass", "linear")


def test_one_failed_cell_fails_its_row_alone():
    rows = summarise([cell(), cell(status="fail"), cell("k")], findings(), {})

    assert [row.status for row in rows] == ["fail", "pass"]


def test_what_is_pooled_fails_its_row_though_every_cell_passed():
    bad = Finding("local", "prefill", None, 3, "q", "exact", failed("too many differ"))
    rows = summarise([cell(), cell(phase="decode")], findings(bad), {})

    assert [(row.phase, row.status, row.reason) for row in rows] == [
        ("prefill", "fail", "too many differ"),
        ("decode", "pass", None),
    ]


def test_a_finding_without_cells_has_a_row():
    bad = Finding("local", "prefill", None, 0, "write_kv_cache", "exact", failed("spare slot"))
    rows = summarise([], findings(bad), {})

    assert [(row.tap, row.status, row.cells) for row in rows] == [("write_kv_cache", "fail", 0)]


def test_rows_follow_the_forward_pass_and_local_comes_first():
    cells = [
        cell("logits", "accumulated"),
        cell("down"),
        cell("write_kv_cache"),
        cell("embed", phase="decode"),
        cell("embed"),
        cell("k_rope"),
    ]
    rows = summarise(cells, findings(), {})

    assert [(row.mode, row.tap, row.phase) for row in rows] == [
        ("local", "embed", "prefill"),
        ("local", "embed", "decode"),
        ("local", "k_rope", "prefill"),
        ("local", "write_kv_cache", "prefill"),
        ("local", "down", "prefill"),
        ("accumulated", "logits", "prefill"),
    ]


def test_what_was_not_run_says_why_and_is_no_pass():
    (row,) = summarise([], findings(), {"rope_table": "no table"})

    assert (row.status, row.reason, row.values) == ("not run", "no table", 0)
