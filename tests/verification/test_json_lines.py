from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verification.json_lines import JsonLinesError, append_line, read_lines

# Nested, as answers are: a line that was cut off may end in a brace too.
ENTRIES = [{"key": "a", "content": {"by": "}"}}, {"key": "é\n", "content": {"levels": {}}}]


def test_what_was_written_is_read_in_order(tmp_path: Path):
    path = tmp_path / "new" / "lines.jsonl"
    assert read_lines(path) == []

    for entry in ENTRIES:
        append_line(path, entry)

    assert read_lines(path) == ENTRIES


@settings(derandomize=True)
@given(data=st.data())
def test_a_run_stopped_at_any_byte_keeps_the_whole_lines_and_the_next_goes_on(
    tmp_path_factory, data
):
    path = tmp_path_factory.mktemp("stopped") / "lines.jsonl"
    for entry in ENTRIES:
        append_line(path, entry)
    content = path.read_bytes()
    cut = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(cut)
    whole = ENTRIES[: cut.count(b"\n")]

    assert read_lines(path) == whole
    append_line(path, ENTRIES[0])
    assert read_lines(path) == [*whole, ENTRIES[0]]


@pytest.mark.parametrize("line", ['{"key": ', "3", "nonsense}"])
def test_a_line_that_nobody_here_wrote_is_named(tmp_path: Path, line: str):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"key": 1}}\n{line}\n')

    with pytest.raises(JsonLinesError, match="lines.jsonl line 2: "):
        read_lines(path)
