"""The page: heading, figures and tables in reading order, and the style sheet.

Knows the order of the parts and their captions; each part draws itself in its own file.
"""

from collections.abc import Callable, Sequence

from verification.evidence import Evidence
from verification.report_html import tables
from verification.report_html.evidence_section import evidence_section
from verification.report_html.heat_map import heat_map
from verification.report_html.markup import escape
from verification.report_html.residual_growth import residual_growth
from verification.report_html.style import STYLE
from verification.report_html.token_ribbon import token_ribbon
from verification.report_html.ulp_histogram import ulp_histogram
from verification.report_text import count, statuses

# Title, caption and what draws it, in reading order; after them come the suite's own record and
# the provenance.
_SECTIONS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    (
        "Every tap, every layer",
        "The worst error of each operator in each layer, as a share of what it may be. The local "
        "run feeds each operator with the reference's own input, so a fault stays in its row; the "
        "accumulated run lets the model run free. A linear layer is near 1 when all is well: the "
        "rounding of its result takes nearly the whole budget.",
        heat_map,
    ),
    (
        "Verdict by tap",
        "Differing: values that are not the bits of transformers (exact taps), of the float64 "
        "truth rounded once (bounded taps) or, in decode, of prefill. ULP: the largest distance at "
        "the rounding that is open. Error ÷ budget: the largest error as a share of what a correct "
        "operation can reach, computed value by value; over 1 fails. z: the largest signed "
        "statistic, which finds errors within their budgets that lean one way.",
        tables.verdict_table,
    ),
    (
        "Distance in ULP",
        "How far the local run's values are from the reference, in units in the last place of "
        "bfloat16. Bars are logarithmic. Bounded taps are not judged by it: where terms cancel, a "
        "small error is many ULPs of a small result.",
        ulp_histogram,
    ),
    (
        "Growth of the error through the layers",
        "Error of the residual stream against transformers in float32, relative to its size. "
        "Transformers in bfloat16 is what the field takes as correct: the lines should run "
        "together.",
        residual_growth,
    ),
    (
        "Greedy tokens",
        "The reference's choices, teacher-forced. ≈ is a tie within the measured error, ✕ is "
        "wrong. A bar under a token is its lead over the second choice, full from 12 sigma, where "
        "no rounding turns it. # is the id of a token that is no text by itself.",
        token_ribbon,
    ),
    (
        "Logits",
        "The engine's error divided by that of transformers in bfloat16, both against float32.",
        tables.logits_table,
    ),
    ("Goldens", "", lambda results: tables.record(results["goldens"])),
    ("GPU record", "", lambda results: tables.record(results["gpu_record"])),
    ("Not run", "", tables.not_run),
)


def render(results: dict, evidence: Sequence[Evidence] = ()) -> str:
    """The whole page of one run.

    Args:
        results: verify.json as a dict.
        evidence: what is recorded of the suite itself.
    """
    name = escape(results["model"]["name"])
    parts = [
        _heading(results),
        "<main>",
        tables.first_failure(results),
        *(_section(title, caption, draw(results)) for title, caption, draw in _SECTIONS),
        _section(
            "The suite, tested",
            "Faults planted in this code, one at a time: how many the suite finds, at which level, "
            "and whether its first failure names the culprit. Recorded runs, not this one's.",
            evidence_section(evidence),
        ),
        _provenance(results),
        "</main>",
    ]
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(results['verdict'].upper())}: {name}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _heading(results: dict) -> str:
    engine, versions = results["engine"], results["versions"]
    passed = results["verdict"] == "pass"
    status = statuses(results)
    tokens = [token["status"] for prompt in results["tokens"] for token in prompt["tokens"]]
    cores = results["machine"]["cores"]
    tiles = (
        (count(sum(row["values"] for row in results["summary"])), "values compared"),
        (str(status.count("pass")), "checks passed"),
        (str(status.count("fail")), "failed"),
        (str(status.count("not run")), "not run"),
        (f"{tokens.count('equal')}/{len(tokens)}" if tokens else "–", "tokens equal"),
        (str(tokens.count("tie")) if tokens else "–", "ties"),
        (f"{results['seconds']:.0f} s", f"on {cores} core{'' if cores == 1 else 's'}"),
    )
    row = "".join(f"<div><b>{escape(n)}</b><span>{escape(what)}</span></div>" for n, what in tiles)
    return (
        "<header><div class='inner'><div class='top'><div><p class='brand'>Touchstone</p>"
        f"<h1>{escape(results['model']['name'])}<small> on {escape(engine['device'])}</small></h1>"
        f"<p class='against'>against transformers {escape(versions['transformers'])}, "
        f"torch {escape(versions['torch'])}<br>"
        f"numerics {escape(engine['numerics_version'])}</p></div>"
        f"<p class='stamp {'ok' if passed else 'bad'}'>{'pass' if passed else 'fail'}</p></div>"
        f"<div class='tiles'>{row}</div></div></header>"
    )


def _section(title: str, caption: str, body: str) -> str:
    words = f"<p class='caption'>{caption}</p>" if caption else ""
    # What is wider than the screen scrolls in a box of its own; the heading stays.
    return f"<section><h2>{title}</h2>{words}<div class='wide'>{body}</div></section>"


def _provenance(results: dict) -> str:
    model, engine = results["model"], results["engine"]
    rows = {
        "started": results["started"],
        "weights": model["weights_sha256"],
        "source": engine["source_stamp"],
        "processor": f"{results['machine']['cpu']}, {results['machine']['cores']} cores",
        "python": results["versions"]["python"],
        "config": ", ".join(f"{key} {value}" for key, value in model["config"].items()),
    }
    items = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items())
    return f"<section class='provenance'><h2>Provenance</h2><dl>{items}</dl></section>"
