import json
from pathlib import Path

import pytest

from tests.verification import samples
from verification.report_files import ReportUnwritten, json_text, write_whole


@pytest.mark.parametrize("run", [samples.passing_run, samples.failing_run, samples.not_run])
def test_the_json_file_holds_the_results_one_row_per_line(run):
    text = json_text(run())

    written, results = json.loads(text), run()
    table, cells = written.pop("cells") or {"columns": [], "rows": []}, results.pop("cells")
    assert written == results
    for row, cell in zip(table["rows"], cells, strict=True):
        assert table["columns"] == list(cell)
        for found, value in zip(row, cell.values(), strict=True):
            assert found == (pytest.approx(value, 1e-5) if isinstance(value, float) else value)
    assert text.count("\n") > len(run()["cells"]) + len(run()["summary"])


def test_a_number_that_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({**samples.passing_run(), "seconds": float("nan")})


def test_a_file_is_written_whole_in_place_of_the_old_one(tmp_path: Path):
    path = tmp_path / "verify.html"
    path.write_text("old")

    write_whole(path, "naïve 日本")

    assert path.read_text(encoding="utf-8") == "naïve 日本"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "verify.html"
    path.write_text("old")

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)

    with pytest.raises(ReportUnwritten, match="verify.html was not written: No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
