"""Grades the free-running engine as a whole: taps, logits and tokens against the oracle.

Keeps what is pooled over prompts and turns verdicts of `composition` into results and findings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification import composition
from verification.compare import Verdict, failed
from verification.composition import LogitErrors, TapErrors, TokenVerdict
from verification.engine_runs import GroupPrompt
from verification.localise import Finding, Findings
from verification.oracle import Continuation, Trace
from verification.passes import ACCUMULATED, PREFILL, Pass
from verification.results import Cell, LogitsResult, PromptTokens, ResidualGrowth, TokenResult
from verification.selection import Selection
from verification.taps import TapKey, all_keys
from verification.workers import in_order

_ALL = "all prompts"


@dataclass
class WholeModelGrader:
    """Holds the whole-model verdicts of a run."""

    config: ModelConfig
    findings: Findings
    selection: Selection
    decode_text: Callable[[Sequence[int]], str] | None
    logits: list[LogitsResult] = field(default_factory=list)
    tokens: list[PromptTokens] = field(default_factory=list)
    _ratios: dict[tuple[str, int, str], tuple[float, Verdict]] = field(default_factory=dict)
    # layer -> engine, yardstick, rows
    _squares: dict[int, list[float]] = field(default_factory=dict)
    _logit_errors: list[LogitErrors] = field(default_factory=list)
    _token_verdicts: list[TokenVerdict] = field(default_factory=list)

    def grade(self, run: Pass, yardstick: Trace, oracle: Trace) -> None:
        """The free-running prefill of a group."""
        wanted = [
            (tap, layer)
            for tap, layer in all_keys(self.config.num_layers)
            if tap != "logits" and self.selection.wants(tap, layer)
        ]

        def errors_of(key: TapKey) -> TapErrors:
            return composition.tap_errors(run.outputs[key], yardstick[key], oracle[key])

        for (tap, layer), errors in zip(wanted, in_order(errors_of, wanted), strict=True):
            for segment in run.segments:
                part = errors.rows(segment.rows_of(tap))
                if len(part.engine) == 0:
                    continue
                verdict, share = composition.judge_tap(part)
                self._ratios[segment.prompt, layer, tap] = (share, verdict)
                if not verdict.passed:
                    self._report(segment.prompt, layer, tap, "layers", verdict)
            if tap == "mlp_residual":
                self._pool(layer, errors)
        if self.selection.wants("logits", 0):
            self._grade_logits(run, yardstick["logits", 0], oracle["logits", 0])

    def _pool(self, layer: int, errors: TapErrors) -> None:
        sums = self._squares.setdefault(layer, [0.0, 0.0, 0.0])
        sums[0] += float(errors.engine.square().sum())
        sums[1] += float(errors.yardstick.square().sum())
        sums[2] += len(errors.engine)

    def _grade_logits(self, run: Pass, yardstick: Tensor, oracle: Tensor) -> None:
        for segment in run.segments:
            rows = segment.logit_rows
            errors = composition.logit_errors(
                run.outputs["logits", 0][rows], yardstick[rows].float(), oracle[rows]
            )
            self._logit_errors.append(errors)
            self._add_logits(segment.prompt, errors)

    def _add_logits(self, prompt: str, errors: LogitErrors) -> None:
        result = composition.judge_logits(errors)
        self.logits.append(
            LogitsResult(
                prompt,
                result.centred_ratio,
                result.kl_mean_ratio,
                result.kl_max_ratio,
                result.top1_agree,
                result.verdict.status,
            )
        )
        if not result.verdict.passed:
            self._report(prompt, 0, "logits", "logits", result.verdict)

    def grade_tokens(
        self,
        group: Sequence[GroupPrompt],
        texts: Sequence[Continuation],
        choices: Sequence[Sequence[int]],
        yardstick: Sequence[Tensor],
    ) -> None:
        """The engine's greedy choices along the oracle's texts.

        Args:
            yardstick: its logits along each text, [tokens, vocab_size].
        """
        for prompt, text, chosen, theirs in zip(group, texts, choices, yardstick, strict=True):
            verdicts = composition.judge_tokens(chosen, theirs.float(), text.logits)
            self._token_verdicts += verdicts
            results = []
            for index, token in enumerate(verdicts):
                position = prompt.num_tokens + index
                results.append(
                    TokenResult(
                        position,
                        token.oracle_id,
                        self._text(token.oracle_id),
                        token.engine_id,
                        self._text(token.engine_id),
                        token.gap,
                        token.sigma,
                        token.lead,
                        token.status,
                    )
                )
                if token.status == "fail":
                    self._report_token(prompt.id, position, token)
            self.tokens.append(PromptTokens(prompt.id, tuple(results)))

    def finish(self) -> None:
        """Judges what is pooled over all prompts."""
        growth = self.growth()
        if growth.layers and self._squares[growth.layers[0]][2] >= composition.MIN_TOKENS:
            for index, verdict in composition.judge_growth(growth.engine, growth.yardstick):
                self._report(None, growth.layers[index], "mlp_residual", "layers", verdict)
        if len(self._logit_errors) > 1:
            fields = ("engine", "yardstick", "engine_kl", "yardstick_kl", "agree")
            pooled = {
                name: torch.cat([getattr(e, name) for e in self._logit_errors]) for name in fields
            }
            self._add_logits(_ALL, LogitErrors(**pooled))
        if self._token_verdicts:
            verdict = composition.judge_ties(self._token_verdicts)
            if not verdict.passed:
                self._report(None, 0, "logits", "tokens", verdict)

    def growth(self) -> ResidualGrowth:
        """Error of the residual stream after each layer, all prompts together."""
        layers = tuple(sorted(self._squares))

        def rms(index: int) -> tuple[float, ...]:
            sums = [self._squares[layer] for layer in layers]
            return tuple(math.sqrt(each[index] / each[2]) for each in sums)

        return ResidualGrowth(layers, rms(0), rms(1))

    def merged(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells with the errors against the oracle in those of the free-running prefill."""
        result = []
        for cell in cells:
            entry = None
            if cell.mode == ACCUMULATED and cell.phase == PREFILL:
                entry = self._ratios.get((cell.prompt, cell.layer, cell.tap))
            if entry is not None:
                share, verdict = entry
                status = cell.status if verdict.passed else verdict.status
                cell = replace(cell, ratio=max(share, cell.ratio or 0.0), status=status)
            result.append(cell)
        return result

    def _report(
        self, prompt: str | None, layer: int, tap: str, level: str, verdict: Verdict
    ) -> None:
        self.findings.add(
            Finding(ACCUMULATED, PREFILL, prompt, layer, tap, "bounded", verdict, level=level)
        )

    def _report_token(self, prompt: str, position: int, token: TokenVerdict) -> None:
        verdict = failed(
            f"token {token.engine_id} instead of {token.oracle_id}: the oracle has it "
            f"{token.gap:.4g} lower, and the error there is {token.sigma:.4g}"
        )
        self.findings.add(
            Finding(
                ACCUMULATED,
                "decode",
                prompt,
                0,
                "logits",
                "tokens",
                verdict,
                position=position,
                level="tokens",
            )
        )

    def _text(self, token_id: int) -> str:
        return f"<{token_id}>" if self.decode_text is None else self.decode_text([token_id])
