"""Transformers as a peer: as it comes, and with a static cache under torch.compile.

Both attend through SDPA, transformers' default, and choose by arg-max.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from tests.benchmarks.points import Point

MAX_STEPS = 8  # of one timed call: it takes ten times as long as the others


class Transformers:
    """Transformers, eager; a Contestant.

    Args:
        directory: the model in Hugging Face form.
        device, dtype: where and in what it computes.
        model: one that is loaded already.
    """

    name = "transformers, eager"

    def __init__(
        self,
        directory: Path,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        model: torch.nn.Module | None = None,
    ) -> None:
        self.device = device
        self.model = model or AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model = self.model.to(device).eval()
        self._ids: list[Tensor] = []

    @torch.inference_mode()
    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """Fills the cache; see Contestant."""
        self._tokens = torch.from_numpy(prompts).long().to(self.device)
        self._point = point
        self.steps = min(point.steps, MAX_STEPS)
        self._cache = None
        if point.kind == "decode" and point.context > 1:
            self._cache = self._filled(self._tokens[:, :-1])

    def _filled(self, tokens: Tensor) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def run(self) -> None:
        """The timed call; afterwards the cache is cut back to where it began."""
        if self._point.kind == "prefill":
            logits = self.model(self._tokens, use_cache=True, logits_to_keep=1).logits
            self._ids = [logits[:, -1].argmax(-1)]
            return
        tokens, self._ids = self._tokens[:, -1:], []
        for _ in range(self.steps):
            logits = self.model(tokens, past_key_values=self._cache, use_cache=True).logits
            self._ids.append(logits[:, -1].argmax(-1))
            tokens = self._ids[-1][:, None]
        self._cache.crop(-self.steps)

    def token_ids(self) -> np.ndarray:
        """See Contestant."""
        return torch.stack(self._ids).cpu().numpy()

    def close(self) -> None:
        """Give the point's memory back."""
        self._cache = None


class CompiledTransformers(Transformers):
    """Transformers with StaticCache under torch.compile(mode="reduce-overhead").

    Args:
        compiled: torch.compile, or what stands for it where there is no compiler to wait for.
    """

    name = "transformers, StaticCache, torch.compile"

    def __init__(
        self,
        *arguments: object,
        compiled: Callable[..., Callable] = torch.compile,
        **named: object,
    ) -> None:
        super().__init__(*arguments, **named)
        self._compiled = compiled

    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """Fills the cache; the first run compiles for this point's shapes alone.

        What is compiled names this cache by its address, and torch's compiler is not reset: that
        would unload kernels that others of the process have captured. So one point, one process.
        """
        self._step = self._compiled(self._one_step, mode="reduce-overhead", dynamic=False)
        super().prepare(point, prompts)
        if point.kind == "prefill":
            with torch.inference_mode():
                self._cache = self._filled(self._tokens)  # allocates; every run writes it anew
        torch.cuda.empty_cache()  # what filling took: processes of other points need it now

    def _filled(self, tokens: Tensor) -> StaticCache:
        room = self._point.context + (MAX_STEPS if self._point.kind == "decode" else 0)
        cache = StaticCache(config=self.model.config, max_cache_len=room)
        self.model(tokens, past_key_values=cache, logits_to_keep=1)
        return cache

    def _one_step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            tokens, past_key_values=self._cache, position_ids=positions, logits_to_keep=1
        )
        return output.logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def run(self) -> None:
        """The timed call; every one writes the same slots."""
        is_decode = self._point.kind == "decode"
        start = self._point.context - 1 if is_decode else 0
        for layer in self._cache.layers:  # the cache counts what it was given: begin again
            layer.cumulative_length.fill_(start)
        tokens, self._ids = self._tokens[:, start:], []
        for step in range(self.steps):
            first = torch.arange(start + step, start + step + tokens.shape[1], device=self.device)
            torch.compiler.cudagraph_mark_step_begin()
            self._ids.append(self._step(tokens, first.expand(len(tokens), -1)).clone())
            tokens = self._ids[-1][:, None]
