"""Every variant is told when it is what was done, and nothing is told of what is right."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.config import ModelConfig
from engine.models import resolve
from verification.diagnosis import caches, rotations
from verification.diagnosis.fit import diagnose
from verification.diagnosis.library import VARIANTS, diagnosis_of
from verification.diagnosis.scene import Guess, Scene
from verification.expected import Bounded, LayerTruth, RopeRows, expected_logits
from verification.oracle import Reference, concatenated
from verification.passes import LOCAL, PREFILL, Pass, Segment
from verification.replay import Replayed, rope_table
from verification.rounding import to_bf16
from verification.taps import POINT
from verification.truth import LinearTruth

LENGTHS = (133, 20)  # more than a tile; another sequence
TAPS = {  # an operation -> a tap and layer that it is tried at
    "embedding": ("embed", 0),
    "rms_norm": ("mlp_norm", 1),
    "linear": ("down", 1),
    "linear_f32": ("logits", 0),
    "rotary_embedding": ("q_rope", 0),
    "attention": ("attn", 1),
    "residual_add": ("mlp_residual", 1),
    "silu_and_mul": ("act", 0),
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(resolve("toy-untied"), torch.bfloat16)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_directory(resolve("toy-untied"))


@pytest.fixture(scope="module")
def right_run(reference: Reference) -> Pass:
    texts = [[(7 * i * i + 3 * i + n) % 256 for i in range(n)] for n in LENGTHS]
    trace = concatenated([reference.run(text, range(len(text))) for text in texts])
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    slices = [slice(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    segments = tuple(Segment(str(i), rows, rows, 0) for i, rows in enumerate(slices))

    def keys(layer: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return trace["k_rope", layer][slices[index]], trace["v", layer][slices[index]]

    return Pass(
        mode=LOCAL,
        phase=PREFILL,
        segments=segments,
        token_ids=torch.tensor([token for text in texts for token in text]),
        positions=torch.cat([torch.arange(n) for n in LENGTHS]),
        logit_rows=torch.arange(sum(LENGTHS)),
        inputs=trace,
        outputs=dict(trace),
        keys=keys,
        reference=trace,
    )


def scene_of(operation: str, run: Pass, config: ModelConfig, reference: Reference) -> Scene:
    table = torch.cat(reference.rope_table(range(max(LENGTHS))), 1)
    return Scene(config, *TAPS[operation], run, RopeRows(table, True), reference.weight)


def right_of(scene: Scene, reference: Reference) -> Replayed | Bounded:
    if scene.tap == "logits":
        return expected_logits(LinearTruth([scene.own_weight()]), *scene.inputs())
    truth = LayerTruth(reference, scene.config, scene.layer, scene.rope)
    return truth.expect(scene.tap, scene.run)


def value_of(guess: Guess, right: Replayed | Bounded, scene: Scene) -> torch.Tensor:
    """The guess as an output; rows where it is undefined are right."""
    dtype = torch.float32 if scene.tap == "logits" else torch.bfloat16

    def rounded(result: object) -> torch.Tensor:
        if isinstance(result, torch.Tensor):
            return result.to(dtype)
        return result.value.float() if dtype == torch.float32 else to_bf16(result.value)

    value = rounded(guess.result).clone()
    if guess.rows is not None:
        value[~guess.rows] = rounded(right)[~guess.rows]
    return value


def all_guesses(scene: Scene) -> Iterator[Guess]:
    return VARIANTS[POINT[scene.tap].operation](scene)


def test_every_operation_with_a_tap_has_variants():
    assert set(VARIANTS) == {point.operation for point in POINT.values()} == set(TAPS)


@pytest.mark.parametrize("operation", TAPS)
def test_each_variant_is_named_when_it_is_what_was_done(operation, right_run, config, reference):
    scene = scene_of(operation, right_run, config, reference)
    right = right_of(scene, reference)

    tried = 0
    for guess in all_guesses(scene):
        value = value_of(guess, right, scene)
        if torch.equal(value, value_of(Guess("", right), right, scene)):
            continue  # nothing wrong here: no further segment or chunk to lose
        if guess.rows is not None and 2 * int(guess.rows.sum()) < len(guess.rows):
            continue
        outputs = {**right_run.outputs, (scene.tap, scene.layer): value}
        told = diagnosis_of(replace(scene, run=replace(right_run, outputs=outputs)), right)
        assert told is not None and guess.words in told, (guess.words, told)
        tried += 1
    assert tried >= 4


@pytest.mark.parametrize("operation", TAPS)
def test_no_variant_is_told_of_what_is_right(operation, right_run, config, reference):
    scene = scene_of(operation, right_run, config, reference)
    right = right_of(scene, reference)
    of_truth = value_of(Guess("", right), right, scene)

    for value in (of_truth, right_run.reference[scene.tap, scene.layer]):
        outputs = {**right_run.outputs, (scene.tap, scene.layer): value.clone()}
        run = replace(right_run, outputs=outputs)
        assert diagnosis_of(replace(scene, run=run), right) is None


@pytest.mark.parametrize("operation", TAPS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t * 1.01,
        lambda t: t.roll(3, 1),
        lambda t: t.flip(0),
        lambda t: (
            t + t.abs().mean() * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
        ),
    ],
    ids=["scaled", "channels rolled", "tokens reversed", "noise"],
)
def test_damage_that_is_no_known_variant_is_not_explained(
    operation, damage, right_run, config, reference
):
    scene = scene_of(operation, right_run, config, reference)
    right = right_of(scene, reference)
    value = value_of(Guess("", right), right, scene)
    outputs = {**right_run.outputs, (scene.tap, scene.layer): damage(value.float()).to(value.dtype)}

    assert diagnosis_of(replace(scene, run=replace(right_run, outputs=outputs)), right) is None


def test_each_wrong_table_is_named_and_the_right_one_is_not(config, reference):
    positions = torch.tensor([*range(2048), 4095, 8191, 8192, 32767, 131071])
    cos, sin = reference.rope_table(positions.tolist())
    right = rope_table(cos, sin, positions, reference.inv_freq())

    for guess in rotations.rope_table(config, positions):
        value = guess.result if isinstance(guess.result, torch.Tensor) else guess.result.value
        told = diagnose(rotations.rope_table(config, positions), value, right)
        assert told is not None and guess.words in told, (guess.words, told)
    assert diagnose(rotations.rope_table(config, positions), right.value, right) is None


def test_each_wrong_cache_is_named_and_the_right_one_is_not(right_run):
    right = torch.cat(right_run.keys(1, 0), 1)

    def told(value: torch.Tensor) -> str | None:
        return diagnose(caches.write_kv_cache(right_run, 1, 0), value, right)

    for guess in caches.write_kv_cache(right_run, 1, 0):
        assert guess.words in (told(guess.result) or ""), guess.words
    assert told(right) is None
    assert told(right.flip(1)) is None


def test_each_wrong_choice_of_the_largest_is_named_and_the_right_one_is_not():
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(3))
    logits[::7, 20:23] = 9.0  # ties
    right = logits.argmax(-1)

    for guess in caches.argmax(logits):
        told = diagnose(caches.argmax(logits), guess.result, right)
        if not torch.equal(guess.result, right):
            assert guess.words in (told or ""), guess.words
    assert diagnose(caches.argmax(logits), right, right) is None
