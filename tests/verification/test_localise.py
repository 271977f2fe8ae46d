import pytest

from engine.config import ModelConfig
from engine.models import resolve
from verification.compare import failed
from verification.localise import Finding, Findings
from verification.measure import Element

BAD = failed("it is wrong")


@pytest.fixture
def findings() -> Findings:
    return Findings(ModelConfig.from_directory(resolve("toy")), "cpu")


def finding(
    tap: str = "q",
    layer: int = 0,
    mode: str = "local",
    phase: str = "prefill",
    prompt: str | None = "a",
    **rest: object,
) -> Finding:
    return Finding(mode, phase, prompt, layer, tap, "bounded", BAD, **rest)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (finding("down", 1), finding("q", 0, mode="accumulated")),
        (
            finding("q", 0, mode="accumulated"),
            finding("embed", 0, mode="accumulated", level="layers"),
        ),
        (finding("logits", level="logits"), finding("logits", level="tokens")),
        (finding("down", 0), finding("attn_norm", 1)),
        (finding("k_rope", 1), finding("write_kv_cache", 1)),
        (finding("write_kv_cache", 1), finding("attn", 1)),
        (finding("rope_table", 0), finding("embed", 0)),
        (finding("mlp_residual", 1), finding("final_norm", 0)),
        (finding("logits", 0), finding("argmax", 0)),
        (finding("q", phase="prefill", prompt="b"), finding("q", phase="decode", prompt="a")),
        (finding("q", prompt="a"), finding("q", prompt=None)),
    ],
    ids=lambda f: f"{f.level or f.mode}-{f.tap}-{f.layer}-{f.phase}-{f.prompt}",
)
def test_the_cause_comes_before_what_it_causes(findings, first, second):
    for order in ((first, second), (second, first)):
        findings.failed = list(order)
        assert findings.ordered()[0] is first


def test_prompts_keep_the_order_they_were_run_in(findings):
    for prompt in ("z", "a", "m"):
        findings.add(finding(prompt=prompt))

    assert findings.first().prompt == "z"


def test_nothing_failed_means_no_first_failure(findings):
    assert findings.first() is None


def test_a_pass_is_no_finding(findings):
    from verification.compare import PASSED

    with pytest.raises(AssertionError):
        findings.add(Finding("local", "prefill", "a", 0, "q", "bounded", PASSED))


def test_a_failure_says_where_in_both_code_bases(findings):
    element = Element(3, 2 * 64 + 33, -1.25, 1.25, 29000, 0.0078)
    findings.add(finding("q_rope", 1, element=element, position=9))
    failure = findings.first()

    assert (failure.operator, failure.c_function) == ("rotary_embedding", "twin_rotary_embedding")
    assert failure.file == "csrc/twin/rotary_embedding.c"
    assert failure.hf_module == "model.layers.1.self_attn"
    assert (failure.token, failure.head, failure.channel) == (9, 2, 33)
    assert (failure.got, failure.expected, failure.ulps, failure.budget) == (
        -1.25,
        1.25,
        29000,
        0.0078,
    )
    assert failure.message == "it is wrong"


def test_a_tap_without_heads_has_a_channel_alone(findings):
    findings.add(finding("mlp_norm", element=Element(0, 70, 0.0, 1.0, 5, None), position=0))

    assert (findings.first().head, findings.first().channel) == (None, 70)


def test_on_a_gpu_the_cuda_function_is_named(findings):
    findings.device = "cuda"
    findings.add(finding("act"))

    assert findings.first().c_function == "cuda_silu_and_mul"
    assert findings.first().file == "csrc/kernels/silu_and_mul.cu"


def test_failures_are_counted_by_level_lowest_first_and_the_residual_stream_apart(findings):
    for each in (
        finding("logits", mode="accumulated", level="tokens"),
        finding("mlp_residual", mode="accumulated", level="layers"),
        finding("q", mode="accumulated", level="layers"),
        finding("q", 1),
        finding("q", 0),
        finding("mlp_residual", mode="accumulated"),
    ):
        findings.add(each)

    assert list(findings.count_by_level().items()) == [
        ("local", 2),
        ("accumulated", 1),
        ("layers", 1),
        ("residual", 1),
        ("tokens", 1),
    ]
