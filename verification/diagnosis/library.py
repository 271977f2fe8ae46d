"""The known wrong variants by operation, and the one question asked of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from verification.diagnosis import attentions, elementwise, linears, norms, rotations
from verification.diagnosis.fit import diagnose
from verification.diagnosis.scene import Guess, Scene
from verification.expected import Bounded
from verification.passes import Pass
from verification.replay import Replayed
from verification.taps import POINT

VARIANTS: Mapping[str, Callable[[Scene], Iterator[Guess]]] = {
    "embedding": elementwise.embedding,
    "rms_norm": norms.guesses,
    "linear": linears.linear,
    "linear_f32": linears.linear_f32,
    "rotary_embedding": rotations.rotary_embedding,
    "attention": attentions.guesses,
    "residual_add": elementwise.residual_add,
    "silu_and_mul": elementwise.silu_and_mul,
}


MAX_LOGIT_ROWS = 64  # a vocabulary is wide, and a wrong lm_head shows in every row


def few_logits(run: Pass) -> Pass:
    """The first rows of final_norm and logits alone."""
    few = slice(0, MAX_LOGIT_ROWS)
    keys = (("final_norm", 0), ("logits", 0))
    inputs, outputs = (
        {key: value[few] if key in keys else value for key, value in trace.items()}
        for trace in (run.inputs, run.outputs)
    )
    return replace(run, logit_rows=run.logit_rows[few], inputs=inputs, outputs=outputs)


def diagnosis_of(scene: Scene, right: Replayed | Bounded) -> str | None:
    """What the tap's output is instead of what is right, in words; None if nothing known fits."""
    got: Tensor = scene.run.outputs[scene.tap, scene.layer]
    return diagnose(VARIANTS[POINT[scene.tap].operation](scene), got, right)
