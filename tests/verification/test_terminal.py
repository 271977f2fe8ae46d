import io
import sys

from rich.console import Console

from tests.verification import samples
from verification.report_terminal import print_report
from verification.terminal import WIDTH, ProgressReport, standard_console


def printed_in(encoding: str, monkeypatch) -> str:
    """What a run prints on a standard output of an encoding."""
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding=encoding))
    print_report(samples.failing_run(), standard_console())
    sys.stdout.flush()
    return bytes_out.getvalue().decode(encoding)


def test_a_terminal_without_unicode_has_every_line_in_ascii(monkeypatch):
    unicode, ascii_only = (printed_in(name, monkeypatch) for name in ("utf-8", "ascii"))

    assert "err/budget" in ascii_only and "-" * WIDTH in ascii_only
    assert "?" not in ascii_only.replace("�", "")
    assert len(ascii_only.splitlines()) == len(unicode.splitlines())


def test_progress_in_a_log_is_a_line_at_the_start_and_one_at_the_end():
    out = io.StringIO()
    console = Console(file=out, width=WIDTH)

    with ProgressReport(console) as progress:
        for done in range(1, 101):
            progress(done, 100, "layer [7]")

    assert out.getvalue().splitlines() == ["    1/100  layer [7]", "  100/100  layer [7]"]


def test_progress_on_a_terminal_is_a_bar_that_leaves_nothing_behind():
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=True, force_interactive=True)

    with ProgressReport(console) as progress:
        progress(3, 10, "len-17")

    assert "len-17" in out.getvalue()
    assert "3/10" in out.getvalue().replace(" ", "")


def test_work_of_unknown_length_has_no_share():
    out = io.StringIO()
    console = Console(file=out, width=WIDTH)

    with ProgressReport(console) as progress:
        progress(0, 0, "fetching a model")

    assert out.getvalue() == "  fetching a model\n"


def test_work_of_unknown_length_is_a_bar_without_an_end():
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=True, force_interactive=True)

    with ProgressReport(console) as progress:
        progress(0, 0, "fetching a model")

    assert "0/?" in out.getvalue().replace(" ", "")
