import re
from html.parser import HTMLParser

import pytest

from tests.verification import samples
from tests.verification.test_evidence import record
from verification.evidence import Score, Table
from verification.evidence_page import load_all
from verification.report_html import heat_map, render, residual_growth, token_ribbon
from verification.report_html.markup import escape

VOID = {"meta", "br"}
WIDE = "div.wide"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.loose: list[str] = []  # tables and figures outside a box that scrolls
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("table", "svg") and WIDE not in self.open:
            self.loose.append(tag)
        if tag not in VOID:
            self.open.append(WIDE if ("class", "wide") in attrs else tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        opened = self.open.pop()
        assert opened == tag or (opened, tag) == (WIDE, "div")

    def handle_data(self, data):
        self.words.append(data)


RUNS = {
    "pass": samples.passing_run,
    "fail": samples.failing_run,
    "not run": samples.not_run,
}


@pytest.mark.parametrize("name", RUNS)
def test_what_may_be_wider_than_the_screen_scrolls_in_its_own_box(name: str):
    page = render(RUNS[name](), load_all())

    assert Page(page).loose == []
    assert Page("<section><table></table></section>").loose == ["table"]
    assert ".wide { overflow-x: auto; }" in page


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(name: str):
    page = render(RUNS[name]())

    parsed = Page(page)

    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(parsed.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {key for key, _ in parsed.attributes}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert not [key for key, _ in parsed.attributes if key.startswith("on")]


def test_text_from_prompts_and_messages_is_shown_and_not_obeyed():
    run = samples.failing_run()
    attack = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    for text in (run["model"], run["first_failure"], run["summary"][0], run["logits"][0]):
        for key, value in text.items():
            if isinstance(value, str) and key not in ("status", "mode", "phase"):
                text[key] = attack
    run["tokens"][0]["prompt"] = attack
    run["tokens"][0]["tokens"][0].update(oracle_text=attack, engine_text=attack, status="tie")
    run["goldens"].update(reason=attack, details=[attack])
    run["cells"][0].update(prompt=attack)
    run["machine"]["cpu"] = run["versions"]["torch"] = attack
    run["engine"]["device"] = run["started"] = attack

    parsed = Page(render(run))

    assert not {"script", "img"} & set(parsed.tags)
    assert "".join(parsed.words).count("alert(1)") > 8


def test_pass_fail_and_not_run_look_different():
    pages = {name: render(make()) for name, make in RUNS.items()}

    assert "class='stamp ok'>pass" in pages["pass"]
    assert "class='stamp bad'>fail" in pages["fail"]
    assert "badge bad" not in pages["pass"]
    assert "First failure: rotary_embedding" in pages["fail"]
    assert "your output equals transformers with adjacent-pair RoPE" in pages["fail"]
    assert "First failure" not in pages["pass"]
    assert "transformers is not installed" in pages["not run"]
    assert "badge ok" not in pages["not run"]
    assert pages["not run"].count("No tap was compared") == 1


def test_a_run_that_fails_by_its_goldens_alone_says_so_at_the_top():
    run = samples.passing_run()
    run.update(verdict="fail", goldens=samples.failing_run()["goldens"])

    page = render(run)

    assert page.index("Failed: goldens") < page.index("Every tap, every layer")
    assert "bits differ first at layer 7, q_rope" in page


def test_both_colour_schemes_and_print_are_served():
    page = render(samples.passing_run())

    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_failing_square_is_crossed_and_says_its_value_and_prompt():
    figure = heat_map.heat_map(samples.failing_run())

    assert figure.count("heat-fail") > 1
    assert "q_rope, layer 7, local prefill: error ÷ budget 412.0" in figure
    assert 'class="cross"' in figure


def test_a_passing_map_has_no_crossed_square():
    figure = heat_map.heat_map(samples.passing_run())

    squares = figure[: figure.index("legend")]

    assert "heat-fail" not in squares
    assert "cross" not in squares


def test_every_tap_and_layer_has_its_square_in_both_maps():
    figure = heat_map.heat_map(samples.passing_run())

    squares = figure[: figure.index("legend")].count("<rect")

    assert squares == 2 * (len(samples.LAYER_TAPS) * samples.NUM_LAYERS + 3)


def cell(**changes) -> dict:
    base = samples.passing_run()["cells"][0]
    return {**base, "status": "pass", "ratio": 0.5, **changes}


def test_a_failed_cell_wins_its_square_over_a_larger_ratio_that_passed():
    square = heat_map.worst([cell(ratio=0.9), cell(ratio=0.2, status="fail"), cell(ratio=None)])

    assert square.status == "fail"
    assert square.cell["ratio"] == 0.2


def test_a_nan_wins_its_square():
    square = heat_map.worst(
        [cell(status="fail", ratio=9e9), cell(status="fail", ratio=float("nan"))]
    )

    assert square.cell["ratio"] != square.cell["ratio"]


def test_a_square_that_was_not_run_is_not_shaded_as_a_pass():
    square = heat_map.worst([cell(status="not run", ratio=None)])

    assert heat_map.shade(square) == "heat-none"


@pytest.mark.parametrize("num_layers", [1, 2, 16, 80])
def test_the_map_stays_inside_its_frame_for_any_depth(num_layers: int):
    run = samples.passing_run()
    run["cells"] = [c for c in run["cells"] if c["layer"] == 0]
    run["cells"] += [{**c, "layer": num_layers - 1} for c in run["cells"] if c["tap"] == "q"]

    figure = heat_map.heat_map(run)

    rects = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', figure)
    assert max(float(x) + float(width) for x, width in rects) <= heat_map.WIDTH


@pytest.mark.parametrize(
    "values", [[0.001], [0.0, 0.0], [0.001, 0.0, float("nan"), 0.002], [1e-9, 1e9], [None, 0.5]]
)
def test_growth_is_drawn_or_declined_for_any_values(values: list):
    run = samples.passing_run()
    run["residual_growth"] = {
        "layers": list(range(len(values))),
        "engine": values,
        "yardstick": values,
    }

    figure = residual_growth.residual_growth(run)

    assert "nan" not in re.sub(r"<title>.*?</title>", "", figure).lower()
    assert ("<svg" in figure) == any(v and v > 0 for v in values if v == v)


def test_a_tie_shows_both_texts_and_a_wrong_token_is_marked():
    ribbon = token_ribbon.token_ribbon(samples.failing_run())

    assert "·was<i>≈</i><bdi>·a</bdi>" in ribbon
    assert "token wrong" in ribbon
    assert "<i>✕</i><bdi>&lt;script&gt;" in ribbon
    assert "15 of 16 equal, 1 tie" in ribbon


def test_blanks_in_tokens_are_visible():
    assert token_ribbon.visible(" \n\t", 5) == "·⏎⇥"


@pytest.mark.parametrize("text", ["", "�", "a�"])
def test_a_token_that_is_no_text_by_itself_shows_its_id(text: str):
    assert token_ribbon.visible(text, 321) == "#321"


def test_control_characters_do_not_reach_the_page():
    assert escape("a\x00b\x1b\u202ec") == "a�b��c"


def test_a_token_without_a_measured_lead_has_no_bar_and_claims_none():
    run = samples.passing_run()
    for token in run["tokens"][0]["tokens"]:
        del token["lead"]

    ribbon = token_ribbon.token_ribbon({**run, "tokens": run["tokens"][:1]})

    assert set(re.findall(r"width:(\d+)%", ribbon)) == {"0"}
    assert "sigma" not in ribbon


def test_a_lead_of_half_the_strict_margin_is_half_a_bar():
    token = {**samples.passing_run()["tokens"][0]["tokens"][0], "sigma": 0.5, "lead": 3.0}

    ribbon = token_ribbon.token_ribbon({"tokens": [{"prompt": "p", "tokens": [token]}]})

    assert "width:50%" in ribbon
    assert "lead 6.0 sigma" in ribbon


class TestEvidence:
    def test_its_scores_and_tables_join_the_page(self):
        scores = (Score("killed", 2, 2, at_least=1.0), Score("false", 1, 9, at_most=0.0))
        table = Table(
            "matrix", ("fault", "operator", "s"), (("a<b", "killed", 1.5), ("c", None, 2))
        )
        page = render(samples.passing_run(), [record(scores=scores, tables=(table,))])

        Page(page)
        for part in ("2 of 2", ">reached<", "1 of 9", ">missed<", "a&lt;b", "mark killed", ">1.5<"):
            assert part in page, part

    def test_without_a_record_the_page_says_so(self):
        assert "Nothing was recorded." in render(samples.passing_run())

    def test_what_is_recorded_in_git_can_be_shown(self):
        Page(render(samples.passing_run(), load_all()))
