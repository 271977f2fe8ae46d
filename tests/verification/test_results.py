import json
import math

from verification.goldens import GoldenVerdict
from verification.results import (
    Cell,
    PromptTokens,
    ResidualGrowth,
    Results,
    TokenResult,
)


def results(**fields: object) -> Results:
    empty = {
        "model": {"name": "m", "weights_sha256": "0", "config": {}},
        "engine": {"device": "cpu", "numerics_version": "v", "source_stamp": "s"},
        "versions": {},
        "machine": {},
        "started": "2025-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "verdict": "fail",
        "summary": (),
        "cells": (),
        "ulp_histogram": {},
        "residual_growth": ResidualGrowth(),
        "logits": (),
        "tokens": (),
        "goldens": GoldenVerdict("not run", "none"),
        "first_failure": None,
    }
    return Results(**(empty | fields))


def test_the_json_has_the_fields_of_the_schema_and_no_others():
    assert list(results().to_json()) == [
        *("schema", "model", "engine", "versions", "machine", "started", "seconds", "verdict"),
        *("summary", "cells", "ulp_histogram", "residual_growth", "logits", "tokens"),
        *("goldens", "first_failure", "failed_checks"),
    ]


def test_what_json_cannot_say_is_said_otherwise():
    cell = Cell("local", "prefill", "a", 0, "q", "bounded", "fail", math.inf, 1, 2, math.nan, None)
    written = results(cells=(cell,)).to_json()

    json.dumps(written, allow_nan=False)
    assert written["cells"][0]["ratio"] == 1e308
    assert written["cells"][0]["z"] is None


def test_tokens_are_nested_by_prompt():
    token = TokenResult(3, 1, "a", 1, "a", 0.0, 0.1, 2.0, "equal")
    written = results(tokens=(PromptTokens("p", (token,)),)).to_json()

    assert written["tokens"] == [
        {
            "prompt": "p",
            "tokens": [
                {
                    "position": 3,
                    "oracle_id": 1,
                    "oracle_text": "a",
                    "engine_id": 1,
                    "engine_text": "a",
                    "gap": 0.0,
                    "sigma": 0.1,
                    "lead": 2.0,
                    "status": "equal",
                }
            ],
        }
    ]


def test_only_a_verdict_of_pass_is_a_pass():
    assert not results().passed
    assert results(verdict="pass").passed
