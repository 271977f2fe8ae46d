"""The token ribbon: each greedy token of each prompt with the margin by which it was chosen.

Knows texts, ids, leads, gaps and sigmas as recorded; knows no tie rule. The bar under a token is
its margin in sigmas, full at STRICT or more.
"""

from verification.report_html.markup import escape

STRICT = 12.0  # sigmas; beyond this no rounding of a correct engine changes a choice
VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}


def token_ribbon(results: dict) -> str:
    """One ribbon per prompt; wrong tokens and ties show both texts."""
    if not results["tokens"]:
        return "<p class='empty'>No tokens were compared.</p>"
    return "".join(_ribbon(prompt) for prompt in results["tokens"])


def visible(token_text: str, token_id: int) -> str:
    """A token's text with blanks made visible, escaped; its id if it is no text by itself."""
    if not token_text or "�" in token_text:
        return f"#{int(token_id)}"
    return escape("".join(VISIBLE.get(char, char) for char in token_text))


def margin(token: dict) -> float | None:
    """How far the oracle's choice is ahead of its second, in sigmas; None if not measured."""
    lead = token.get("lead")
    return lead / token["sigma"] if lead is not None and token["sigma"] else None


def _ribbon(prompt: dict) -> str:
    tokens = prompt["tokens"]
    of = {status: sum(t["status"] == status for t in tokens) for status in ("equal", "tie", "fail")}
    counts = f"{of['equal']} of {len(tokens)} equal"
    counts += f", {of['tie']} tie{'s' if of['tie'] > 1 else ''}" if of["tie"] else ""
    counts += f", {of['fail']} wrong" if of["fail"] else ""
    head = f"<h3>{escape(prompt['prompt'])}<small>{counts}</small></h3>"
    return f"{head}<p class='ribbon'>{''.join(map(_token, tokens))}</p>"


def _token(token: dict) -> str:
    lead = margin(token)
    share = 0 if lead is None else max(0.0, min(1.0, lead / STRICT))
    both = visible(token["oracle_text"], token["oracle_id"])
    if token["status"] != "equal":
        other = visible(token["engine_text"], token["engine_id"])
        sign = "≈" if token["status"] == "tie" else "✕"
        both += f"<i>{sign}</i><bdi>{other}</bdi>"
    gap = "–" if token["gap"] is None else f"{token['gap']:.3g}"
    title = (
        f"position {token['position']}: oracle {token['oracle_id']}, engine {token['engine_id']}; "
        f"{'' if lead is None else f'lead {lead:.1f} sigma, '}gap {gap}; {token['status']}"
    )
    css = {"equal": "", "tie": " tie", "fail": " wrong"}[token["status"]]
    return (
        f"<span class='token{css}' title='{escape(title)}'><bdi>{both}</bdi>"
        f"<b style='width:{share * 100:.0f}%'></b></span>"
    )
