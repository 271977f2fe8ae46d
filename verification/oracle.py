"""transformers with every tap readable: in float32 the oracle, in bfloat16 the yardstick.

Knows transformers' module tree and torch; knows nothing of the engine or of verdicts. Attention is
`eager`, code from the model directory is never run, and nothing is fetched. Invariant: a trace
holds every tap of every layer, or the run raises: a version of transformers whose forward pass went
another way is noticed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama

from engine.errors import EngineError
from verification.taps import TapKey, all_keys

Trace = dict[TapKey, Tensor]  # [rows, width]; final_norm and logits have the chosen rows only

_OUTPUT_TAPS = {  # submodule of a decoder layer -> the tap that its output is
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_INPUT_TAPS = {  # submodule -> the tap that its input is
    "self_attn.o_proj": "attn",
    "post_attention_layernorm": "attn_residual",
    "mlp.down_proj": "act",
}


class OracleError(EngineError):
    """transformers did not go the way this module reads it, or is no Llama."""


@dataclass(frozen=True)
class Continuation:
    """A greedy text and the logits that chose each token, [num_tokens, vocab_size]."""

    token_ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Past:
    """A sequence that a model has read, and the choice after it. One text only may follow it."""

    cache: DynamicCache
    logits: Tensor  # [1, vocab_size], of its last token


class Reference:
    """One transformers model of a local directory, in one precision."""

    def __init__(self, directory: str | Path, dtype: torch.dtype) -> None:
        """Loads the model.

        Args:
            directory: config.json and safetensors weights.
            dtype: torch.float32 (oracle) or torch.bfloat16 (yardstick).

        Raises:
            OracleError: the directory holds another architecture.
        """
        self.model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        if not isinstance(self.model, modeling_llama.LlamaForCausalLM):
            raise OracleError(f"{type(self.model).__name__} is not LlamaForCausalLM")
        self.num_layers = len(self.model.model.layers)

    def run(self, token_ids: Sequence[int], logit_rows: Sequence[int]) -> Trace:
        """One forward pass over a whole sequence.

        Args:
            token_ids: the sequence.
            logit_rows: rows whose final_norm and logits are wanted, ascending.

        Returns:
            Every tap, [len(token_ids), width] in this model's precision, heads flattened.
        """
        return self.run_and_keep(token_ids, logit_rows)[0]

    @torch.inference_mode()
    def run_and_keep(
        self, token_ids: Sequence[int], logit_rows: Sequence[int]
    ) -> tuple[Trace, Past]:
        """The same, and what a text after the sequence needs."""
        trace: Trace = {}
        rows = torch.tensor(list(logit_rows), dtype=torch.int64)
        with _tapped(self.model, trace, self.num_layers):
            past, hidden = self._read(token_ids)
            trace["final_norm", 0] = hidden[rows]
            trace["logits", 0] = self.model.lm_head(hidden[rows])
        missing = [key for key in all_keys(self.num_layers) if key not in trace]
        if missing:
            raise OracleError(f"transformers gave no value for tap {missing[0]}")
        return {key: trace[key] for key in all_keys(self.num_layers)}, past

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> Past:
        """Reads a sequence, at least one token, for a text after it."""
        return self._read(token_ids)[0]

    def _read(self, token_ids: Sequence[int]) -> tuple[Past, Tensor]:
        step = self.model.model(input_ids=torch.tensor([list(token_ids)]), use_cache=True)
        hidden = step.last_hidden_state[0]
        past = Past(step.past_key_values, self.model.lm_head(hidden[-1:]))
        return past, hidden

    @torch.inference_mode()
    def along(self, past: Past, text: Sequence[int]) -> Tensor:
        """Logits before each token of a text and after its last; uses `past` up.

        Returns:
            [len(text) + 1, vocab_size] in this model's precision.
        """
        if not len(text):
            return past.logits
        step = self.model.model(
            input_ids=torch.tensor([list(text)]), past_key_values=past.cache, use_cache=True
        )
        return torch.cat((past.logits, self.model.lm_head(step.last_hidden_state[0])))

    @torch.inference_mode()
    def greedy(self, past: Past, num_tokens: int, draft: Sequence[int] = ()) -> Continuation:
        """The greedy text after a sequence; a tie goes to the lowest id, nothing ends it early.

        Args:
            past: of the sequence; used up.
            draft: a guess of the text: as much of it as is right is had from one forward pass. It
                enters no choice, only the time.
        """
        guesses = list(draft[: num_tokens - 1])
        rows = self.along(past, guesses)
        choices = rows.argmax(-1).tolist()
        right = next((i for i, guess in enumerate(guesses) if choices[i] != guess), len(guesses))
        text, logits = choices[: right + 1], [rows[: right + 1]]
        if right < len(guesses):  # what was read of a wrong guess is forgotten
            past.cache.crop(right - len(guesses))
        while len(text) < num_tokens:
            step = self.model.model(
                input_ids=torch.tensor([text[-1:]]), past_key_values=past.cache, use_cache=True
            )
            logits.append(self.model.lm_head(step.last_hidden_state[0]))
            text.append(int(logits[-1].argmax()))
        return Continuation(tuple(text), torch.cat(logits))

    def weight(self, name: str) -> Tensor:
        """A weight as loaded; a tied lm_head is the embedding table."""
        module, _, field = name.rpartition(".")
        return getattr(self.model.get_submodule(module), field).detach()

    @torch.inference_mode()
    def rope_table(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Transformers' own cos and sin in this precision, each [len(positions), head_dim / 2]."""
        like = self.model.model.embed_tokens.weight[:1]
        cos, sin = self.model.model.rotary_emb(like, torch.tensor([list(positions)]))
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]

    def inv_freq(self) -> Tensor:
        """The rotary frequencies, float32 [head_dim / 2], radians per position."""
        return self.model.model.rotary_emb.inv_freq.detach().to(torch.float32)


@contextmanager
def _tapped(model: nn.Module, trace: Trace, num_layers: int) -> Iterator[None]:
    """Writes taps into `trace` while the block runs; no hook outlives it, come what may."""
    handles = [model.model.embed_tokens.register_forward_hook(_keep_output(trace, ("embed", 0)))]
    rotated = 0

    def rotate(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        nonlocal rotated
        q_rope, k_rope = original(q, k, *args, **kwargs)
        for name, value in (("q_rope", q_rope), ("k_rope", k_rope)):  # [1, heads, rows, head_dim]
            trace[name, rotated] = value[0].transpose(0, 1).flatten(1).contiguous()
        rotated += 1
        return q_rope, k_rope

    original = modeling_llama.apply_rotary_pos_emb
    try:
        for index, layer in enumerate(model.model.layers):
            for name, tap in _OUTPUT_TAPS.items():
                hook = _keep_output(trace, (tap, index))
                handles.append(layer.get_submodule(name).register_forward_hook(hook))
            for name, tap in _INPUT_TAPS.items():
                hook = _keep_input(trace, (tap, index))
                handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
            handles.append(
                layer.register_forward_hook(_keep_output(trace, ("mlp_residual", index)))
            )
        modeling_llama.apply_rotary_pos_emb = rotate
        yield
        if rotated != num_layers:
            raise OracleError(f"rotary embedding ran {rotated} times, expected {num_layers}")
    finally:
        modeling_llama.apply_rotary_pos_emb = original
        for handle in handles:
            handle.remove()


def _keep_output(trace: Trace, key: TapKey):
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        value = output[0] if isinstance(output, tuple) else output
        trace[key] = value.reshape(-1, value.shape[-1])

    return hook


def _keep_input(trace: Trace, key: TapKey):
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        trace[key] = args[0].reshape(-1, args[0].shape[-1])

    return hook


def concatenated(traces: Sequence[Trace]) -> Trace:
    """The traces of several sequences as one, rows one after another; empties the given ones.

    A tap at a time: two copies of a whole group would not fit everywhere.
    """
    return {key: torch.cat([trace.pop(key) for trace in traces]) for key in list(traces[0])}
