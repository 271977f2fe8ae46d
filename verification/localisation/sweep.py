"""Goes through every place of a model and plants every fault there.

A place's faults are sequences of one step: all with the same prompt, each with a fault of its own
in the same tap. Twice: known inputs (every operator fed transformers' values; the fault is in what
one gave) and running free (the damaged value goes on through the real engine). Each sequence is
graded as a prompt of that name by the suite's own layer grader; named first is a fault whose first
finding, in the suite's own order, is at its operator, tap and layer. Layers before the fault are
not graded again: their bits are compared with those of the right engine, which is graded whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap
from engine.config import EngineConfig, ModelConfig
from verification import compare
from verification.expected import LayerTruth, RopeRows
from verification.layer_grader import LayerGrader
from verification.localisation.faults import Place, faults_at
from verification.localise import Finding, Findings
from verification.oracle import Reference, Trace
from verification.passes import ACCUMULATED, LOCAL, PREFILL, Pass, Segment
from verification.rounding import same_bits
from verification.steps import LOGIT_TAPS, Runner, as_bf16, num_blocks_for
from verification.taps import POINT, TapKey, all_keys, forward_index, operation_of, source_key

BLOCK_SIZE = 16
MAX_FAULTS = 6  # sequences of a step


@dataclass(frozen=True)
class Planted:
    """One fault and what the suite named first for it, per mode; None: nothing failed.

    Args:
        place: the tap, or write_kv_cache, and the layer.
        local, free: (operator, tap, layer).
        was_free: whether it was also planted running free.
    """

    fault: str
    place: TapKey
    local: tuple[str, str, int] | None
    free: tuple[str, str, int] | None
    was_free: bool = True

    @property
    def is_named(self) -> bool:
        """Whether every mode that was asked names it first."""
        return self.local == self.expected and (self.free == self.expected or not self.was_free)

    @property
    def expected(self) -> tuple[str, str, int]:
        """What must be named."""
        return (operation_of(self.place[0]).name, *self.place)


def room(num_tokens: int) -> EngineConfig:
    """An engine with room for a step of the sweep."""
    blocks = num_blocks_for(num_tokens, BLOCK_SIZE)
    return EngineConfig(
        device="cpu",
        num_threads=0,
        block_size=BLOCK_SIZE,
        num_blocks=MAX_FAULTS * blocks,
        max_seq_len=blocks * BLOCK_SIZE,
        max_num_tokens=MAX_FAULTS * num_tokens,
        max_num_seqs=MAX_FAULTS,
    )


class Sweep:
    """One model, one prompt.

    Args:
        runner: the right engine, with `room` for the prompt.
        reference: transformers in bfloat16.
        token_ids: at least four tokens, no two neighbours alike.
        logit_rows: rows whose logits are computed, the last one among them, at least two.
    """

    def __init__(
        self,
        runner: Runner,
        reference: Reference,
        token_ids: Sequence[int],
        logit_rows: Sequence[int],
    ) -> None:
        self._runner, self._reference = runner, reference
        self._config: ModelConfig = runner.config
        self._ids, self._logit_rows = list(token_ids), list(logit_rows)
        self._known = reference.run(self._ids, self._logit_rows)
        self._rope = RopeRows(torch.cat(reference.rope_table(range(len(self._ids))), 1), False)
        one = ["right"]
        self._local = self._step(one, self._known_times(1))
        self._free = self._step(one, {})

    def right_engine_fails(self) -> list[Finding]:
        """What the suite holds against the right engine, every layer of both modes: nothing."""
        findings = Findings(self._config, "cpu")
        for mode, outputs in ((LOCAL, self._local), (ACCUMULATED, self._free)):
            for layer in range(self._config.num_layers):
                for finding in self._graded(mode, ["right"], outputs, layer):
                    findings.add(finding)
        return findings.ordered()

    def places(self) -> list[TapKey]:
        """Every tap, and every layer's cache."""
        caches = [("write_kv_cache", layer) for layer in range(self._config.num_layers)]
        return [*all_keys(self._config.num_layers), *caches]

    def plant(self, place: TapKey, is_free: bool = True) -> Iterator[Planted]:
        """Every fault of a place, and what is named for it.

        Args:
            is_free: plant it running free too; that takes a run of the engine.
        """
        modes = [(LOCAL, self._local)] + [(ACCUMULATED, self._free)] * is_free
        if place[0] == "write_kv_cache":
            yield self._stale_slot(place[1], modes)
            return
        faults = faults_at(place[0])
        names = list(faults)
        named: dict[str, dict[str, tuple[str, str, int] | None]] = {ACCUMULATED: {}}
        for mode, right in modes:
            damaged = torch.cat(
                [
                    damage(right[place].clone(), self._place(mode, place))
                    for damage in faults.values()
                ]
            )
            outputs = self._outputs(mode, names, place, damaged)
            outputs[place] = damaged
            self._check_upstream(right, outputs, place, len(names))
            named[mode] = self._first(mode, names, outputs, self._layer_of(place))
        for name in names:
            free = named[ACCUMULATED].get(name)
            yield Planted(name, place, named[LOCAL][name], free, is_free)

    def _outputs(self, mode: str, names: list[str], place: TapKey, damaged: Tensor) -> Trace:
        """What all operators give where one is wrong."""
        if mode == LOCAL:  # the others are fed as ever, so they give what they gave
            return {key: torch.cat([value] * len(names)) for key, value in self._local.items()}
        return self._step(names, {} if place[0] == "logits" else {place: damaged})

    def _stale_slot(self, layer: int, modes: Sequence[tuple[str, Trace]]) -> Planted:
        """The cache keeps another token's key in one slot of a layer."""
        first: dict[str, tuple[str, str, int] | None] = {}
        key, stale = ("k_rope", layer), len(self._ids) - 2
        for mode, right in modes:
            inputs = self._known if mode == LOCAL else right
            kept = inputs[key].clone()
            kept[stale] = kept[0]
            force = {**self._known_times(1), key: kept} if mode == LOCAL else {key: kept}
            outputs = self._step(["stale key"], force)
            run = self._pass(mode, ["stale key"], outputs)
            found = self._graded(mode, ["stale key"], outputs, layer)
            k, v = self._runner.read_kv(layer, np.arange(len(self._ids), dtype=np.int32))
            cached = as_bf16(np.concatenate([x.reshape(len(x), -1) for x in (k, v)], 1))
            wanted = torch.cat(run.keys(layer, 0), 1)
            differing = int((~same_bits(cached, wanted)).sum())
            verdict = compare.judge_bits(differing, wanted.numel(), "k_rope and v, cached")
            if not verdict.passed:
                at = ("stale key", layer, "write_kv_cache", "exact")
                found.append(Finding(mode, PREFILL, *at, verdict))
            first[mode] = self._nearest(found, "stale key")
        place, is_free = ("write_kv_cache", layer), len(modes) == 2
        return Planted("stale key", place, first[LOCAL], first.get(ACCUMULATED), is_free)

    def _place(self, mode: str, key: TapKey) -> Place:
        tap, layer = key
        inputs = self._known if mode == LOCAL else self._free
        point, num_layers = POINT[tap], self._config.num_layers
        read = [inputs[source_key(name, layer, num_layers, tap)] for name in point.inputs]
        weight = self._reference.weight(point.weight(layer)) if point.hf_weight else None
        return Place(key, self._config, tuple(read), weight)

    def _layer_of(self, place: TapKey) -> int:
        is_last = place[0] in LOGIT_TAPS
        return self._config.num_layers - 1 if is_last else place[1]

    def _known_times(self, count: int) -> Trace:
        return {key: torch.cat([value] * count) for key, value in self._known.items()}

    def _step(self, names: Sequence[str], force: Mapping[TapKey, Tensor]) -> Trace:
        """One step of as many sequences; every tap of it."""
        blocks = num_blocks_for(len(self._ids), BLOCK_SIZE)
        slices = [
            SequenceSlice(self._ids, 0, list(range(i * blocks, (i + 1) * blocks)))
            for i in range(len(names))
        ]
        batch = build_batch(slices, BLOCK_SIZE, "none")
        rows = [i * len(self._ids) + row for i in range(len(names)) for row in self._logit_rows]
        batch = replace(batch, logits_indices=np.array(rows, np.int32))
        taps, buffers = [], {}
        for key in all_keys(self._config.num_layers):
            name, layer = key
            if name == "logits":
                continue
            count = len(rows) if name in LOGIT_TAPS else len(batch.input_ids)
            out = buffers[key] = np.empty((count, POINT[name].width(self._config)), np.uint16)
            value = force.get(key)
            bits = None if value is None else value.contiguous().view(torch.uint16).numpy()
            taps.append(Tap(POINT[name].tap_point, layer, out, bits))
        step = self._runner.forward(batch, taps)
        trace = {key: as_bf16(bits) for key, bits in buffers.items()}
        return {**trace, ("logits", 0): torch.from_numpy(step.logits.copy())}

    def _pass(self, mode: str, names: Sequence[str], outputs: Trace) -> Pass:
        count, length, logits = len(names), len(self._ids), len(self._logit_rows)
        inputs = self._known_times(count) if mode == LOCAL else outputs
        segments = tuple(
            Segment(
                name,
                slice(i * length, (i + 1) * length),
                slice(i * logits, (i + 1) * logits),
                0,
            )
            for i, name in enumerate(names)
        )

        def keys(layer: int, index: int) -> tuple[Tensor, Tensor]:
            rows = segments[index].rows
            return inputs["k_rope", layer][rows], inputs["v", layer][rows]

        return Pass(
            mode=mode,
            phase=PREFILL,
            segments=segments,
            token_ids=torch.tensor(self._ids * count),
            positions=torch.arange(length).repeat(count),
            logit_rows=torch.tensor(
                [i * length + row for i in range(count) for row in self._logit_rows]
            ),
            inputs=inputs,
            outputs=outputs,
            keys=keys,
            reference=inputs if mode == LOCAL else None,
        )

    def _graded(self, mode: str, names: Sequence[str], outputs: Trace, layer: int) -> list[Finding]:
        truth = LayerTruth(self._reference, self._config, layer, self._rope)
        grader = LayerGrader(self._reference, self._config, truth, layer, lambda tap, layer: True)
        grader.grade([self._pass(mode, names, outputs)])
        return grader.findings

    def _first(
        self, mode: str, names: Sequence[str], outputs: Trace, layer: int
    ) -> dict[str, tuple[str, str, int] | None]:
        found = self._graded(mode, names, outputs, layer)
        return {name: self._nearest(found, name) for name in names}

    def _nearest(self, found: Sequence[Finding], name: str) -> tuple[str, str, int] | None:
        findings = Findings(self._config, "cpu", [f for f in found if f.prompt == name])
        first = findings.first()
        return None if first is None else (first.operator, first.tap, first.layer)

    def _check_upstream(self, right: Trace, outputs: Trace, place: TapKey, count: int) -> None:
        """Everything before the fault has the right engine's bits."""
        limit = forward_index(*place, self._config.num_layers)
        for key, value in right.items():
            if forward_index(*key, self._config.num_layers) < limit:
                assert same_bits(outputs[key], torch.cat([value] * count)).all(), key
