"""Judges the whole model, running free: residual stream and taps, logits, tokens.

Truth is transformers in float32 (the oracle), the measure is transformers in bfloat16 (the
yardstick): an engine may be as wrong as what the field accepts, times a published factor. Knows
tensors of all three; knows nothing of how they were made. Constants below are the published ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verification.compare import PASSED, Verdict, failed, first_failure
from verification.measure import VALUES_AT_ONCE
from verification.rounding import power_below

# error(engine) <= factor * error(yardstick) + one output rounding
MAX_TAP_RATIO = 3.0  # RMS over the tokens of a prompt, MIN_TOKENS of them
# The worst token of a prompt against the yardstick's worst. Token by token they cannot be paired:
# where one channel is massive, both errors are a random number times the same vector, and of two
# such numbers the one is more than 6 times the other in one case of ten.
MAX_WORST_RATIO = 6.0
MIN_TOKENS = 16  # with fewer, the yardstick's own error is a matter of luck: the worst alone counts
MAX_JUMP = 2.0  # growth of error(engine) / error(yardstick) of the residual stream over one layer

# RMS of centred logits; MAX_WORST_RATIO for fewer positions than MIN_TOKENS.
MAX_CENTRED_RATIO = 2.0
MAX_KL_MEAN_RATIO = 4.0
MAX_KL_GEOMETRIC_RATIO = 2.5
MAX_KL_MAX_RATIO = 8.0

MAX_GAP = 6.0  # sigma: a token within it of the best is a tie
SIGMA_CANDIDATES = 20  # top logits over which the yardstick's error is taken
_TIE_CHANCE = 1e-3


@dataclass(frozen=True)
class TapErrors:
    """RMS errors of one tap against the oracle, channels scaled to one size, each [rows]."""

    engine: Tensor
    yardstick: Tensor
    rounding: Tensor  # that of the value rounded once

    def rows(self, rows: slice) -> "TapErrors":
        """The errors of some rows."""
        return TapErrors(self.engine[rows], self.yardstick[rows], self.rounding[rows])


def tap_errors(engine: Tensor, yardstick: Tensor, oracle: Tensor) -> TapErrors:
    """Errors per token.

    A channel's scale is its RMS over the tokens, and not below the median channel's: so neither a
    massive channel nor a silent one owns the sum.

    Args:
        engine, yardstick: bfloat16 [rows, width].
        oracle: float32 [rows, width].
    """
    power = oracle.square().mean(0)
    scale = (power + power.median()).clamp_min_(1e-30).rsqrt_()

    engine_rms, yardstick_rms, rounding_rms = (torch.empty(len(oracle)) for _ in range(3))
    at_once = max(1, VALUES_AT_ONCE // oracle.shape[1])
    for start in range(0, len(oracle), at_once):
        at = slice(start, start + at_once)
        truth = oracle[at]

        def rms(error: Tensor) -> Tensor:
            return error.mul_(scale).square_().mean(1).sqrt_()

        engine_rms[at] = rms(engine[at].float().sub_(truth))
        yardstick_rms[at] = rms(yardstick[at].float().sub_(truth))
        rounding_rms[at] = rms(power_below(truth).mul_(2.0**-7 / math.sqrt(12.0)))
    return TapErrors(engine_rms, yardstick_rms, rounding_rms)


def judge_tap(errors: TapErrors) -> tuple[Verdict, float]:
    """Whether one prompt's tap is as near to the oracle as the yardstick.

    Returns:
        The verdict, and the largest error as a share of what is allowed.
    """
    engine, yardstick, rounding = errors.engine, errors.yardstick, errors.rounding
    whole = _ratio(_rms(engine), MAX_TAP_RATIO * _rms(yardstick) + _rms(rounding))
    allowed = MAX_WORST_RATIO * float(yardstick.max()) + float(rounding.max())
    worst = _ratio(float(engine.max()), allowed)
    if len(engine) < MIN_TOKENS:
        whole = worst
    if whole > worst and whole > 1:
        verdict = failed(
            f"error against the oracle is {whole:.3g} times what is allowed: "
            f"{MAX_TAP_RATIO:g} times the yardstick's and one rounding"
        )
    elif worst > 1:
        verdict = failed(
            f"the worst token's error against the oracle is {worst:.3g} times what is allowed: "
            f"{MAX_WORST_RATIO:g} times that of the yardstick's worst and one rounding"
        )
    else:
        verdict = PASSED
    return verdict, max(whole, worst)


def judge_growth(engine: Sequence[float], yardstick: Sequence[float]) -> list[tuple[int, Verdict]]:
    """The layers at whose end the engine's error has jumped against the yardstick's.

    Args:
        engine, yardstick: RMS error of the residual stream after each layer.
    """
    jumps, before = [], 1.0
    for layer, (ours, theirs) in enumerate(zip(engine, yardstick, strict=True)):
        ratio = ours / theirs if theirs > 0 else (0.0 if ours == 0 else math.inf)
        if not ratio <= MAX_JUMP * max(before, 1.0 / MAX_JUMP):
            reason = (
                f"error over the yardstick's jumps from {before:.3g} to {ratio:.3g} in this layer"
            )
            jumps.append((layer, failed(reason)))
        before = ratio
    return jumps


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@dataclass(frozen=True)
class LogitErrors:
    """Logits of some rows against the oracle, engine and yardstick, each [rows].

    Args:
        engine, yardstick: mean square of the centred error.
        engine_kl, yardstick_kl: KL(oracle || ..).
        agree: whether the engine's best id is the oracle's.
    """

    engine: Tensor
    yardstick: Tensor
    engine_kl: Tensor
    yardstick_kl: Tensor
    agree: Tensor


def logit_errors(engine: Tensor, yardstick: Tensor, oracle: Tensor) -> LogitErrors:
    """All float32 [rows, vocab_size]. Softmax ignores a common shift, so each row is centred."""
    truth = oracle.double()
    p = torch.log_softmax(truth, -1)
    centred = truth - truth.mean(-1, keepdim=True)

    def against(logits: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.double()
        square = (wide - wide.mean(-1, keepdim=True) - centred).square_().mean(-1)
        divergence = (p.exp() * (p - torch.log_softmax(wide, -1))).sum(-1)
        return square, divergence.clamp_min_(0.0)

    (ours, our_kl), (theirs, their_kl) = against(engine), against(yardstick)
    agree = engine.argmax(-1) == oracle.argmax(-1)
    return LogitErrors(ours, theirs, our_kl, their_kl, agree)


@dataclass(frozen=True)
class LogitVerdict:
    """The numbers of the logit rules and what they say."""

    centred_ratio: float
    kl_mean_ratio: float | None
    kl_max_ratio: float | None
    top1_agree: float
    verdict: Verdict


def judge_logits(errors: LogitErrors) -> LogitVerdict:
    """The rules over some rows; those on KL need MIN_TOKENS of them."""
    centred = _ratio(float(errors.engine.mean().sqrt()), float(errors.yardstick.mean().sqrt()))
    mean = largest = None
    is_long = len(errors.engine) >= MIN_TOKENS
    limit = MAX_CENTRED_RATIO if is_long else MAX_WORST_RATIO
    verdicts = [_limit("centred RMS error", centred, limit)]
    if is_long:
        ours, theirs = errors.engine_kl, errors.yardstick_kl
        mean = _ratio(float(ours.mean()), float(theirs.mean()))
        geometric = _ratio(_geometric_mean(ours), _geometric_mean(theirs))
        largest = _ratio(float(ours.max()), float(theirs.max()))
        verdicts += [
            _limit("mean KL", mean, MAX_KL_MEAN_RATIO),
            _limit("geometric mean of KL", geometric, MAX_KL_GEOMETRIC_RATIO),
            _limit("largest KL", largest, MAX_KL_MAX_RATIO),
        ]
    agree = float(errors.agree.double().mean())
    return LogitVerdict(centred, mean, largest, agree, first_failure(*verdicts))


def _limit(what: str, ratio: float, limit: float) -> Verdict:
    if ratio <= limit:
        return PASSED
    return failed(
        f"{what} of the logits is {ratio:.3g} times the yardstick's, {limit:g} is allowed"
    )


def _ratio(ours: float, theirs: float) -> float:
    if math.isnan(ours) or math.isnan(theirs):
        return math.inf
    return ours / theirs if theirs > 0 else (0.0 if ours == 0 else math.inf)


def _geometric_mean(values: Tensor) -> float:
    return float(values.clamp_min(1e-12).log().mean().exp())


@dataclass(frozen=True)
class TokenVerdict:
    """One position: the engine's choice against the oracle's."""

    oracle_id: int
    engine_id: int
    gap: float
    sigma: float
    lead: float  # of the oracle's best over its second
    status: str  # equal, tie or fail


def judge_tokens(
    engine_ids: Sequence[int], yardstick: Tensor, oracle: Tensor
) -> list[TokenVerdict]:
    """Greedy choices along the oracle's own text.

    Args:
        engine_ids: the engine's choice at each position.
        yardstick, oracle: float32 logits [positions, vocab_size].
    """
    error = yardstick.double() - oracle.double()
    error -= error.mean(-1, keepdim=True)
    top = oracle.topk(min(SIGMA_CANDIDATES, oracle.shape[1]), -1)
    sigma = error.gather(1, top.indices).square().mean(-1).sqrt()
    sigma = torch.maximum(sigma, sigma.median())
    best = oracle.argmax(-1)
    verdicts = []
    for row, chosen in enumerate(engine_ids):
        gap = float(oracle[row, best[row]] - oracle[row, chosen])
        lead = float(top.values[row, 0] - top.values[row, 1])
        noise = float(sigma[row])
        status = (
            "equal" if chosen == int(best[row]) else "tie" if gap <= MAX_GAP * noise else "fail"
        )
        verdicts.append(TokenVerdict(int(best[row]), int(chosen), gap, noise, lead, status))
    return verdicts


def judge_ties(tokens: Sequence[TokenVerdict]) -> Verdict:
    """Whether there are no more ties than chance allows.

    Where the best leads by `lead` and each candidate is off by 2 sigma (twice the yardstick's error
    is what the logits rule allows), the order turns with probability Phi(-lead / (2 sigma sqrt 2)).
    The number of turns over all positions may not be above what such chances exceed once in a
    thousand runs.
    """
    chances = [
        0.5 * math.erfc(token.lead / (4.0 * token.sigma)) if token.sigma > 0 else 0.0
        for token in tokens
    ]
    distribution = [1.0]
    for chance in chances:
        distribution = [
            (distribution[i] if i < len(distribution) else 0.0) * (1 - chance)
            + (distribution[i - 1] * chance if i else 0.0)
            for i in range(len(distribution) + 1)
        ]
    ties = sum(token.status == "tie" for token in tokens)
    beyond = sum(distribution[ties:]) if ties else 1.0
    if beyond < _TIE_CHANCE:
        return failed(f"{ties} of {len(tokens)} tokens are ties, more than chance gives")
    return PASSED
