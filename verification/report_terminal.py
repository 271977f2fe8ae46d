"""Shows a verification on a terminal or in a plain log: a table, and one verdict line.

Knows verify.json and two widths; knows nothing of models or tolerances, and decides no verdict.
Invariant: everything said in colour is also said in words, so a log without colour loses nothing.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from verification.report_text import (
    count,
    counted,
    forward_order,
    full,
    largest,
    merged,
    plain,
    ratio,
    rerun_command,
    statuses,
    tokens_status,
)
from verification.terminal import WIDTH

NARROW = 78  # on a terminal of fewer than WIDTH: without grade, z and the second count of values
VERDICT = 7  # the last column
STYLES = {"pass": "green", "fail": "bold red", "not run": "yellow", "tie": "yellow"}


def print_report(results: dict, console: Console) -> None:
    """Prints one run: heading, table, what else was compared, the first failure, the verdict.

    Args:
        results: verify.json as a dict.
        console: made by the caller; its width decides between WIDTH and NARROW.
    """
    width = WIDTH if console.width >= WIDTH else NARROW
    lines = [*_heading(results), Text(), *_table(results["summary"], width), Text()]
    lines += _wholes(results, width)
    lines += _not_run(results)
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    if results["first_failure"]:
        console.print()
        console.print(_failure(results), width=width)
    console.print()
    console.print(_verdict(results), soft_wrap=True)
    if results["first_failure"]:
        console.print(
            f"  again, this alone:  {rerun_command(results)}", markup=False, soft_wrap=True
        )


def _heading(results: dict) -> list[Text]:
    model, engine, versions = results["model"], results["engine"], results["versions"]
    config = model["config"]
    shape = f"{config.get('num_layers', '?')} layers, width {config.get('hidden_size', '?')}"
    against = f"transformers {versions['transformers']}, torch {versions['torch']}"
    title = Text()
    title.append("Touchstone", style="bold")
    title.append(f"  {plain(model['name'])} on {engine['device']}", style="bold cyan")
    title.append(f"  against {against}")
    detail = (
        f"{shape}, weights {model['weights_sha256'][:12]}, numerics {engine['numerics_version']}"
    )
    return [title, Text(plain(detail), style="dim")]


def _table(summary: list[dict], width: int) -> list[Text]:
    """The two halves side by side: operator by operator, and the whole model running free."""
    is_wide = width == WIDTH
    head = Text()
    middle = 54 if is_wide else 40
    head.append(f"{'':14}  {'one operator, reference input (local)':^{middle}}", style="bold")
    whole = "whole model (accumulated)" if is_wide else "whole model"
    head.append(f"  {whole:>{width - middle - 20}}", style="bold")
    columns = (  # name, and whether a narrow table has it
        (f"{'tap':<14} ", True),
        (f" {'grade':<7}", is_wide),
        (f" {'values':>7} {'differing':>9} {'ulp':>4} {'err÷budget':>10}", True),
        (f" {'z':>5}", is_wide),
        (f"  {'verdict':<{VERDICT}}", True),
        (f" {'values':>7}", is_wide),
        (f" {'err÷budget':>10}  {'verdict':<{VERDICT}}", True),
    )
    names = "".join(name for name, is_shown in columns if is_shown)
    rule = Text("─" * width, style="dim")
    lines = [head, Text(names, style="dim"), rule]
    for tap in forward_order(summary):
        rows = {
            mode: merged([r for r in summary if r["tap"] == tap and r["mode"] == mode])
            for mode in ("local", "accumulated")
        }
        lines.append(_table_line(tap, rows["local"], rows["accumulated"], is_wide))
    return [*lines, rule]


def _table_line(tap: str, local: dict | None, whole: dict | None, is_wide: bool) -> Text:
    def cell(row: dict | None, key: str, show: Callable[[Any], str], width: int) -> str:
        return f" {show(row[key]) if row and key in row else '–':>{width}}"

    line = Text(f"{plain(tap):<14.14} ")
    if is_wide:
        line.append(f" {(local or {}).get('grade', '–'):<7.7}")
    line.append(cell(local, "values", count, 7) + cell(local, "differing", count, 9))
    line.append(cell(local, "max_ulp", _ulp, 4) + cell(local, "max_ratio", ratio, 10))
    if is_wide:
        line.append(cell(local, "max_z", _z, 5))
    line.append("  ")
    _append_status(line, local)
    if is_wide:
        line.append(cell(whole, "values", count, 7))
    line.append(cell(whole, "max_ratio", ratio, 10) + "  ")
    _append_status(line, whole)
    return line


def _append_status(line: Text, row: dict | None) -> None:
    """The verdict; a star tells that a part was not run and is listed below."""
    status = row["status"] if row else "–"
    star = "*" if row and row.get("partial") else ""
    line.append(f"{_word(status) + star:<{VERDICT}}", style=STYLES.get(status, "dim"))


def _word(status: str) -> str:
    """The one word that must not be overlooked is in capitals."""
    return "FAIL" if status == "fail" else status


def _wholes(results: dict, width: int) -> list[Text]:
    """What is compared beyond single taps, each with its verdict."""
    rows: list[tuple[str, str, str]] = []  # name, text, status
    growth = results["residual_growth"]
    steps = [
        (math.inf if ours is None else ours / theirs, layer)  # JSON has no NaN
        for layer, ours, theirs in zip(
            growth["layers"], growth["engine"], growth["yardstick"], strict=True
        )
        if theirs
    ]
    if steps:
        worst, layer = max(steps)
        mine = [r for r in results["summary"] if r["tap"] == "mlp_residual"]
        row = merged([r for r in mine if r["mode"] == "accumulated"])
        text = f"{len(steps)} compared; error at most {ratio(worst)} × yardstick, layer {layer}"
        rows.append(("layers", text, row["status"] if row else "not run"))
    if results["logits"]:
        num_prompts = sum(row["prompt"] != "all prompts" for row in results["logits"])
        worst_of = {
            key: ratio(largest(row[key] for row in results["logits"]))
            for key in ("centred_ratio", "kl_mean_ratio", "kl_max_ratio")
        }
        text = (
            f"{counted(num_prompts, 'prompt')}; error at most {worst_of['centred_ratio']} × "
            f"yardstick, KL mean {worst_of['kl_mean_ratio']}, KL max {worst_of['kl_max_ratio']}"
        )
        rows.append(("logits", text, _all(row["status"] for row in results["logits"])))
    tokens = [token for prompt in results["tokens"] for token in prompt["tokens"]]
    if tokens:
        of = {s: sum(token["status"] == s for token in tokens) for s in ("equal", "tie", "fail")}
        sums = f"{of['equal']} equal, {of['tie']} ties, {of['fail']} wrong"
        text = f"{counted(len(tokens), 'greedy token')}: {sums}"
        status = tokens_status(results)
        if status == "fail" and not of["fail"]:
            text += "; more ties than chance gives"
        rows.append(("tokens", text, status))
    for title, part in (("goldens", "goldens"), ("GPU record", "gpu_record")):
        found = results[part]
        first, *more = [found["reason"], *found["details"]] if found["reason"] else found["details"]
        rows.append((title, first, found["status"]))
        rows += [("", detail, "") for detail in more[:3]]
    return [line for row in rows for line in _lines(*row, width)]


def _lines(name: str, text: str, status: str, width: int) -> list[Text]:
    """The text beside its name, as many lines as it takes, and the verdict after the first."""
    room = width - 16 - 3 - VERDICT
    first, *more = textwrap.wrap(plain(text), room)
    line = Text(f"{name:<14}  {first:<{room}}  ")
    line.append(_word(status), style=STYLES.get(status, ""))
    return [line, *(Text(f"{'':<14}  {rest}") for rest in more)]


def _not_run(results: dict) -> list[Text]:
    """Each reason once, with what it kept from running."""
    reasons: dict[str, list[str]] = {}
    for row in results["summary"]:
        if row["status"] == "not run":
            what = f"{row['tap']} ({row['mode']}, {row['phase']})"
            reasons.setdefault(row["reason"] or "no reason given", []).append(what)
    for row in results["prompts_not_run"]:
        reasons.setdefault(row["reason"], []).append(f"prompt {row['prompt']}")
    lines = []
    for reason, what in reasons.items():
        shown = ", ".join(what[:3]) + (f" and {len(what) - 3} more" if len(what) > 3 else "")
        lines.append(Text(f"{'not run *':<14}  {plain(reason)}: {plain(shown)}", style="yellow"))
    return lines


def _failure(results: dict) -> Panel:
    f = results["first_failure"]
    where = ", ".join(
        f"{name} {f[name]}" for name in ("token", "head", "channel") if f.get(name) is not None
    )
    ulps = "" if f.get("ulps") is None else f"{count(f['ulps'])} ULP apart"
    budget = "" if f.get("budget") is None else f"budget {f['budget']:.6g}"
    layer = "" if f.get("layer") is None else f", layer {f['layer']}"
    rows = (
        ("operator", f["operator"]),
        ("tap", f"{f['tap']}{layer}  ({f['mode']}, {f['phase']}, grade {f['grade']})"),
        ("reference", f.get("hf_module")),
        ("engine", " in ".join(str(f[k]) for k in ("c_function", "file") if f.get(k))),
        ("prompt", f"{f['prompt'] or 'all, pooled'}   {where}"),
        ("got", f"{full(f.get('got'))}   expected {full(f.get('expected'))}"),
        ("error", "   ".join(part for part in (ulps, budget) if part)),
        ("", f.get("message")),
        ("diagnosis", f.get("diagnosis")),
    )
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            style = "bold red" if name == "operator" else ""
            grid.add_row(Text(name, style="dim"), Text(plain(value), style=style))
    return Panel(grid, title="first failure", title_align="left", border_style="red")


def _verdict(results: dict) -> Text:
    status = statuses(results)
    values = sum(row["values"] for row in results["summary"])
    word = "PASS" if results["verdict"] == "pass" else "FAIL"
    line = Text(f" {word} ", style="bold white on green" if word == "PASS" else "bold white on red")
    line.append(
        f"  {status.count('pass')} checks passed, {status.count('fail')} failed, "
        f"{status.count('not run')} not run; {count(values)} values in {results['seconds']:.1f} s"
    )
    return line


def _ulp(value: int | None) -> str:
    if value is None or value < 10_000:
        return "–" if value is None else str(value)
    return f"{value:.0e}".replace("e+0", "e")


def _z(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0e}"


def _all(statuses: Iterable[str]) -> str:
    present = set(statuses)
    return "fail" if "fail" in present else "pass" if "pass" in present else "not run"
