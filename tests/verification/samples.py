"""Made-up results in the form of verify.json, for the tests of the reports.

The numbers are drawn from a seeded generator and mean nothing; the shape is the real one.
"""

import random

LAYER_TAPS = (
    ("attn_norm", "rms_norm", "exact"),
    ("q", "linear", "bounded"),
    ("k", "linear", "bounded"),
    ("v", "linear", "bounded"),
    ("q_rope", "rotary_embedding", "exact"),
    ("k_rope", "rotary_embedding", "exact"),
    ("attn", "attention", "bounded"),
    ("o", "linear", "bounded"),
    ("attn_residual", "residual_add", "exact"),
    ("mlp_norm", "rms_norm", "exact"),
    ("gate", "linear", "bounded"),
    ("up", "linear", "bounded"),
    ("act", "silu_and_mul", "exact"),
    ("down", "linear", "bounded"),
    ("mlp_residual", "residual_add", "exact"),
)
TAPS = (
    ("embed", "embedding", "exact"),
    *LAYER_TAPS,
    ("final_norm", "rms_norm", "exact"),
    ("logits", "linear_f32", "bounded"),
)
PROMPTS = ("len-17", "len-129", "markup")
MARKUP = '<script>alert("x")</script>'
NUM_LAYERS = 30


def passing_run() -> dict:
    """A run of smollm2-135m on the CPU in which all is well and one thing was not run."""
    random.seed(20)
    cells = [
        _cell(mode, prompt, layer, tap, grade)
        for mode in ("local", "accumulated")
        for prompt in PROMPTS
        for tap, _, grade in TAPS
        for layer in (range(NUM_LAYERS) if (tap, _, grade) in LAYER_TAPS else (0,))
    ]
    return {
        "schema": 2,
        "model": {
            "name": "smollm2-135m",
            "weights_sha256": "9f2c" * 16,
            "config": {"hidden_size": 576, "num_layers": NUM_LAYERS, "vocab_size": 49152},
        },
        "engine": {
            "device": "cpu",
            "numerics_version": "hopper.k512.t128.g8.1",
            "source_stamp": "41d0" * 16,
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "machine": {"cpu": "a processor", "cores": 2},
        "started": "2025-03-01T09:30:00+00:00",
        "seconds": 93.4,
        "verdict": "pass",
        "summary": [_row(mode, *tap, cells) for mode in ("local", "accumulated") for tap in TAPS]
        + [
            {
                **_row("local", "logits", "linear_f32", "bounded", []),
                "phase": "decode",
                "status": "not run",
                "reason": "decode of the longest prompt needs 4 GiB",
            }
        ],
        "cells": cells,
        "ulp_histogram": {
            tap: [210_000, random.choice((0, 40, 900)), random.choice((0, 3)), 0, 0]
            for tap, _, _ in TAPS
        },
        "residual_growth": {
            "layers": list(range(NUM_LAYERS)),
            "engine": [0.0018 * 1.09**layer for layer in range(NUM_LAYERS)],
            "yardstick": [0.002 * 1.09**layer for layer in range(NUM_LAYERS)],
        },
        "logits": [
            {
                "prompt": prompt,
                "centred_ratio": 0.93,
                "kl_mean_ratio": 0.88,
                "kl_max_ratio": 1.4,
                "top1_agree": 0.99,
                "status": "pass",
            }
            for prompt in PROMPTS
        ],
        "tokens": [
            {"prompt": prompt, "tokens": [_token(position) for position in range(16)]}
            for prompt in PROMPTS
        ],
        "goldens": {"status": "pass", "reason": None, "details": ["453 taps, bits equal"]},
        "gpu_record": {
            "status": "pass",
            "reason": None,
            "details": ["h200, source equal, 453 taps equal"],
        },
        "prompts_not_run": [],
        "first_failure": None,
        "failed_checks": {},
    }


def failing_run() -> dict:
    """The same run with a wrong rotary embedding in layer 7, a lost token and damaged goldens."""
    run = passing_run()
    run["verdict"] = "fail"
    for cell in run["cells"]:
        later = cell["layer"] > 7 or (cell["layer"] == 7 and cell["tap"] in ("attn", "o", "down"))
        if cell["tap"] == "q_rope" and cell["layer"] == 7:
            cell.update(status="fail", ratio=412.0, differing=cell["values"] // 2, max_ulp=29_000)
        elif cell["mode"] == "accumulated" and later and cell["tap"] not in ("embed",):
            cell.update(status="fail", ratio=3.0 + 0.2 * cell["layer"])
    run["summary"] = [
        _row(row["mode"], row["tap"], row["operator"], row["grade"], run["cells"])
        for row in run["summary"][:-1]
    ] + run["summary"][-1:]
    run["logits"][1].update(centred_ratio=9.7, status="fail")
    run["tokens"][2]["tokens"][5].update(engine_id=77, engine_text=MARKUP, gap=4.0, status="fail")
    run["failed_checks"] = {"local": 3, "accumulated": 40, "tokens": 1}
    run["residual_growth"]["engine"] = [
        value * (1 if layer < 7 else 6)
        for layer, value in enumerate(run["residual_growth"]["engine"])
    ]
    run["goldens"] = {
        "status": "fail",
        "reason": "bits differ first at layer 7, q_rope (rotary_embedding), prompt len-17",
        "details": [],
    }
    run["first_failure"] = {
        "operator": "rotary_embedding",
        "tap": "q_rope",
        "layer": 7,
        "mode": "local",
        "phase": "prefill",
        "prompt": "markup",
        "hf_module": "model.layers.7.self_attn",
        "c_function": "twin_rotary_embedding",
        "file": "csrc/twin/rotary_embedding.c",
        "token": 3,
        "head": 2,
        "channel": 33,
        "got": -1.2578125,
        "expected": 1.2578125,
        "ulps": 29_000,
        "budget": 0.0078125,
        "grade": "exact",
        "message": "29 % of the values differ; the halves of each head look exchanged " + MARKUP,
        "diagnosis": "your output equals transformers with adjacent-pair RoPE (to the bit)",
    }
    return run


def not_run() -> dict:
    """A run whose every comparison was impossible: the oracle was missing."""
    run = passing_run()
    run.update(cells=[], logits=[], tokens=[], ulp_histogram={}, verdict="fail")
    run["residual_growth"] = {"layers": [], "engine": [], "yardstick": []}
    for row in run["summary"]:
        row.update(status="not run", reason="transformers is not installed")
        row.update(values=0, cells=0, differing=None, max_ulp=None, max_ratio=None, max_z=None)
    run["goldens"] = {"status": "not run", "reason": "no goldens for this model", "details": []}
    run["gpu_record"] = {"status": "not run", "reason": "not run for this source", "details": []}
    return run


def _cell(mode: str, prompt: str, layer: int, tap: str, grade: str) -> dict:
    exact = grade == "exact" and mode == "local"
    return {
        "mode": mode,
        "phase": "prefill",
        "prompt": prompt,
        "layer": layer,
        "tap": tap,
        "grade": grade if mode == "local" else "bounded",
        "status": "pass",
        "ratio": None if exact else random.uniform(0.05, 0.95),
        "differing": 0 if exact else random.randrange(200),
        "values": 9792,
        "z": None if exact else random.gauss(0, 1),
        "max_ulp": 0 if exact else 1,
    }


def _row(mode: str, tap: str, operator: str, grade: str, cells: list[dict]) -> dict:
    mine = [cell for cell in cells if cell["mode"] == mode and cell["tap"] == tap]
    return {
        "mode": mode,
        "phase": "prefill",
        "tap": tap,
        "operator": operator,
        "grade": grade if mode == "local" else "bounded",
        "cells": len(mine),
        "values": sum(cell["values"] for cell in mine),
        "differing": sum(cell["differing"] for cell in mine) if mine else None,
        "max_ulp": max((cell["max_ulp"] for cell in mine), default=None),
        "max_ratio": max((c["ratio"] for c in mine if c["ratio"] is not None), default=None),
        "max_z": max((abs(c["z"]) for c in mine if c["z"] is not None), default=None),
        "status": "fail" if any(cell["status"] == "fail" for cell in mine) else "pass",
        "reason": None,
    }


def _token(position: int) -> dict:
    tie = position == 11
    text = (" the", " lamp", "\n", " was", "é", MARKUP, " שלום", " lit")[position % 8]
    return {
        "position": position,
        "oracle_id": 100 + position,
        "oracle_text": text,
        "engine_id": 900 if tie else 100 + position,
        "engine_text": " a" if tie else text,
        "gap": 0.02 if tie else 0.0,
        "lead": 0.02 if tie else 0.3 + position * 0.4,
        "sigma": 0.06,
        "status": "tie" if tie else "equal",
    }
