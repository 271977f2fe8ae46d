"""The page's tables: verdict by tap, logits by prompt, what was not run, the first failure.

Knows rows of the results; every cell is escaped here.
"""

from verification.report_html.markup import escape
from verification.report_text import count, forward_order, full, merged, ratio, rerun_command

RECORDS = (("goldens", "goldens"), ("GPU record", "gpu_record"))  # what to call them, and their key


def verdict_table(results: dict) -> str:
    """One row per tap in forward order; the two modes side by side."""
    summary = results["summary"]
    head = (
        "<tr><th></th><th></th>"
        "<th colspan='7'>one operator, reference input <small>local</small></th>"
        "<th colspan='3' class='split'>whole model <small>accumulated</small></th></tr>"
        "<tr><th>tap</th><th>operator</th><th>grade</th><th class='n'>values</th>"
        "<th class='n'>differing</th><th class='n'>ULP</th><th class='n'>error ÷ budget</th>"
        "<th class='n'>z</th><th>verdict</th>"
        "<th class='n split'>values</th><th class='n'>error ÷ budget</th><th>verdict</th></tr>"
    )
    rows = []
    for tap in forward_order(summary):
        mine = [row for row in summary if row["tap"] == tap]
        local = merged([row for row in mine if row["mode"] == "local"])
        whole = merged([row for row in mine if row["mode"] == "accumulated"])
        rows.append(
            f"<tr><th>{escape(tap)}</th><td class='dim'>{escape(mine[0]['operator'])}</td>"
            + _cells(local, ("grade", "values", "differing", "max_ulp", "max_ratio", "max_z"))
            + _cells(whole, ("values", "max_ratio"), split=True)
            + "</tr>"
        )
    return f"<table class='verdicts'><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def logits_table(results: dict) -> str:
    """One row per prompt; each number is the engine's error divided by the yardstick's."""
    if not results["logits"]:
        return "<p class='empty'>The logits were not compared.</p>"
    rows = "".join(
        f"<tr><th>{escape(row['prompt'])}</th><td class='n'>{ratio(row['centred_ratio'])}</td>"
        f"<td class='n'>{ratio(row['kl_mean_ratio'])}</td>"
        f"<td class='n'>{ratio(row['kl_max_ratio'])}</td>"
        f"<td class='n'>{_percent(row['top1_agree'])}</td><td>{badge(row['status'])}</td></tr>"
        for row in results["logits"]
    )
    return (
        "<table><thead><tr><th>prompt</th><th class='n'>centred error</th>"
        "<th class='n'>KL, mean</th><th class='n'>KL, worst position</th>"
        "<th class='n'>same first choice</th><th>verdict</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
    )


def record(found: dict) -> str:
    """The verdict of one record, the goldens' or the GPU's, and its details."""
    reason = f" {escape(found['reason'])}" if found["reason"] else ""
    details = "".join(f"<li>{escape(detail)}</li>" for detail in found["details"])
    return f"<p>{badge(found['status'])}{reason}</p>" + (f"<ul>{details}</ul>" if details else "")


def not_run(results: dict) -> str:
    """Every check that did not run, with its reason; never an empty promise."""
    rows = [
        f"<tr><th>{escape(row['tap'])}</th><td>{escape(row['mode'])}, {escape(row['phase'])}</td>"
        f"<td>{escape(row['reason'] or 'no reason given')}</td></tr>"
        for row in results["summary"]
        if row["status"] == "not run"
    ]
    rows += [
        f"<tr><th>{escape(row['prompt'])}</th><td>prompt</td><td>{escape(row['reason'])}</td></tr>"
        for row in results["prompts_not_run"]
    ]
    for title, part in RECORDS:
        if results[part]["status"] == "not run":
            reason = escape(results[part]["reason"] or "no reason given")
            rows.append(f"<tr><th>{title}</th><td></td><td>{reason}</td></tr>")
    if not rows:
        return "<p class='empty'>Nothing was left out.</p>"
    return (
        "<table><thead><tr><th>check</th><th>where</th><th>what was missing</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def first_failure(results: dict) -> str:
    """The first failing tap in full and the command that runs it alone, or a record's failure."""
    found = results["first_failure"]
    if not found:
        return "".join(
            f"<section class='failure'><h2>Failed: {title}</h2>"
            f"<p>{escape(results[part]['reason'] or '')}</p></section>"
            for title, part in RECORDS
            if results[part]["status"] == "fail"
        )
    layer = "" if found.get("layer") is None else f", layer {found['layer']}"
    place = ", ".join(
        f"{name} {found[name]}"
        for name in ("token", "head", "channel")
        if found.get(name) is not None
    )
    rows = (
        ("tap", f"{found['tap']}{layer} · {found['mode']}, {found['phase']}, {found['grade']}"),
        ("reference", found.get("hf_module")),
        ("engine", " in ".join(str(found[k]) for k in ("c_function", "file") if found.get(k))),
        ("prompt", found["prompt"] or "all, pooled"),
        ("place", place),
        ("apart", None if found.get("ulps") is None else f"{found['ulps']} ULP"),
        ("got", full(found.get("got"))),
        ("expected", full(found.get("expected"))),
        ("budget", None if found.get("budget") is None else f"{found['budget']:.6g}"),
        ("diagnosis", found.get("diagnosis")),
    )
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(content)}</dd></div>" for name, content in rows if content
    )
    return (
        f"<section class='failure'><h2>First failure: {escape(found['operator'])}</h2>"
        f"<p>{escape(found.get('message') or '')}</p><dl>{items}</dl>"
        f"<pre>{escape(rerun_command(results))}</pre></section>"
    )


def badge(status: str) -> str:
    """A verdict as a coloured word."""
    css = {"pass": "ok", "fail": "bad"}.get(status, "open")
    return f"<span class='badge {css}'>{escape(status)}</span>"


def _cells(row: dict | None, keys: tuple[str, ...], split: bool = False) -> str:
    show = {
        "grade": str,
        "values": count,
        "differing": count,
        "max_ulp": count,
        "max_ratio": ratio,
        "max_z": lambda z: "–" if z is None else f"{z:.1f}",
    }
    cells = []
    for index, key in enumerate(keys):
        css = "" if key == "grade" else "n"
        css += " split" if split and index == 0 else ""
        shown = show[key](row[key]) if row and key in row else "–"
        cells.append(f"<td class='{css}'>{escape(shown)}</td>")
    star = "<sup>*</sup>" if row and row.get("partial") else ""
    return "".join(cells) + f"<td>{badge(row['status']) + star if row else '–'}</td>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"
