"""Holds a verification, as it runs, against what is recorded of its model.

Knows which record belongs to a model and which rows of a step are a prompt's; what counts as equal
is decided in `goldens`. The engine's bits were recorded with each prompt alone, and are held
against prompts that share steps and blocks: they may not depend on company.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.models import cache_root, model_names
from verification import goldens
from verification.goldens import Golden, GoldenCheck, GoldenError, GoldenVerdict
from verification.oracle import Trace
from verification.passes import Pass
from verification.prompts import Prompt
from verification.taps import operation_of
from verification.workers import in_order


def golden_roots(model: str) -> tuple[Path, ...]:
    """Where a model's goldens are looked for: our own models' in git, then all in the cache.

    Args:
        model: as it was asked for: a directory is not one of ours, whatever its name is.
    """
    in_git = (goldens.GOLDEN_ROOT,) if model in model_names() else ()
    return (*in_git, cache_root() / "golden")


class GoldenRun:
    """One verification beside its model's record.

    Invariant: the verdict is "not run" until something was compared, and "fail" for a damaged
    record, other weights, other numerics or a prompt that was never recorded.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], roots: Iterable[Path]) -> None:
        """Finds the record.

        Args:
            name: of the model; its record is the directory of that name.
            prompts: all that are verified; each must have been recorded.
            roots: where records are looked for, see golden_roots.
        """
        self._check: GoldenCheck | None = None
        self._comparable: frozenset[str] = frozenset()
        found = goldens.find(name, roots)
        self._verdict = GoldenVerdict("not run", f"no goldens are recorded for {name}")
        if found is None:
            return
        try:
            self._check = check = GoldenCheck(goldens.load(found))
        except GoldenError as error:
            self._verdict = GoldenVerdict("fail", str(error))
            return
        self._comparable = frozenset(p.id for p in prompts if check.same_prompt(p.id, p.sha256))

    @property
    def golden(self) -> Golden | None:
        """The record, if there is one to compare with."""
        return self._check.golden if self._check is not None else None

    def begin(self, **facts: str) -> None:
        """Holds weights_sha256 and numerics_version to the record's; others end it."""
        if self._check is not None and not self._check.same_subject(**facts):
            self._comparable = frozenset()

    def add_group(self, free: Pass, oracle: Trace) -> None:
        """A group's free-running prefill, and the oracle's values of the same rows."""
        segments = [s for s in free.segments if s.prompt in self._comparable]
        work = [(segment, key) for segment in segments for key in oracle]

        def measured(item: tuple) -> tuple[str, goldens.Fingerprint]:
            segment, (tap, layer) = item
            rows = segment.rows_of(tap)
            values = free.outputs[tap, layer][rows]
            truth = oracle[tap, layer][rows]
            if tap in goldens.LAST_ROW_TAPS:
                truth = truth[-1:]
            return goldens.bit_hash(tap, _bits(values)), goldens.fingerprint(truth.numpy())

        for (segment, (tap, layer)), (bits, fingerprint) in zip(
            work, in_order(measured, work), strict=True
        ):
            self._check.add_engine_hash(segment.prompt, tap, layer, bits)
            self._check.add_fingerprint(segment.prompt, tap, layer, fingerprint)

    def add_text(self, prompt_id: str, token_ids: Sequence[int]) -> None:
        """The oracle's greedy text after a prompt."""
        if prompt_id in self._comparable:
            self._check.add_tokens(prompt_id, token_ids)

    def verdict(self) -> GoldenVerdict:
        """The outcome of everything added so far."""
        if self._check is None:
            return self._verdict
        return self._check.verdict(lambda tap: operation_of(tap).name)


def _bits(values: Tensor) -> np.ndarray:
    """A tap's values as capture gives them: bfloat16 as uint16, float32 as it is."""
    if values.dtype == torch.bfloat16:
        values = values.contiguous().view(torch.uint16)
    return values.numpy()
