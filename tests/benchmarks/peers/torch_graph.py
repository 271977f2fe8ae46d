"""A Llama in torch as fast as torch allows: cuBLAS, SDPA, fused elementwise code, one CUDA graph.

A peer for benchmarks, not a part of the engine. Matrices that share an input are one product, the
residual is added inside the product that makes it, RoPE with the write to the cache and SiLU·up are
one compiled kernel each, and all steps of a timed call are captured in one graph, arg-max and
embedding included. Positions are fixed at capture, so attention needs no mask and takes torch's
flash kernel with split keys. It rounds at fewer points than transformers does, which is its right.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- the name the whole field uses
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.benchmarks.points import Point


class TorchGraph:
    """The engine; a Contestant.

    Args:
        directory: the model in Hugging Face form.
        device: "cuda" captures graphs, "cpu" runs the same code step by step.
        dtype: of weights and activations.
    """

    name = "torch, cuBLAS, SDPA, one CUDA graph"

    def __init__(
        self, directory: Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.config = AutoConfig.from_pretrained(directory)
        self.device, self.dtype = device, dtype
        self._load(directory)
        self._rotary = LlamaRotaryEmbedding(self.config).to(device)
        is_cuda = device == "cuda"
        fuse = torch.compile(dynamic=True) if is_cuda else lambda function: function
        self._rope_and_store, self._silu_and_mul = fuse(_rope_and_store), fuse(_silu_and_mul)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture: Callable[[], None] = lambda: None
        self._ids: Tensor | None = None

    def _load(self, directory: Path) -> None:
        config = self.config
        weights = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            weights |= load_file(path)
        weights = {k: v.to(self.device, self.dtype) for k, v in weights.items()}
        self.embed = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embed)
        self.norm = weights["model.norm.weight"]
        self.layers = []
        for i in range(config.num_hidden_layers):

            def of(name: str, prefix: str = f"model.layers.{i}.") -> Tensor:
                return weights.pop(f"{prefix}{name}.weight")

            attention = [of(f"self_attn.{x}_proj") for x in "qkv"]
            self.layers.append(
                {
                    "attn_norm": of("input_layernorm"),
                    "qkv": torch.cat(attention),
                    "o": of("self_attn.o_proj").T,
                    "mlp_norm": of("post_attention_layernorm"),
                    "gate_up": torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")]),
                    "down": of("mlp.down_proj").T,
                }
            )

    @torch.inference_mode()
    def prepare(self, point: Point, prompts: np.ndarray) -> None:
        """Fills the cache, then captures the timed call; see Contestant."""
        self._graph = None
        config, (batch, context) = self.config, prompts.shape
        room = context + point.steps
        shape = (batch, config.num_key_value_heads, room, config.head_dim)
        make = lambda: torch.zeros(shape, device=self.device, dtype=self.dtype)  # noqa: E731
        self._cache = [(make(), make()) for _ in self.layers]
        positions = torch.arange(room, device=self.device)[None]
        probe = torch.empty(1, device=self.device, dtype=self.dtype)
        self._cos, self._sin = (x[0] for x in self._rotary(probe, positions))
        tokens = torch.from_numpy(prompts).long().to(self.device)
        if point.kind == "prefill":
            self._ids = torch.empty(1, batch, dtype=torch.long, device=self.device)
            self._capture = lambda: self._ids.copy_(self._forward(tokens, 0)[None])
        else:
            for rows in range(0, batch, per := max(1, 16384 // context)):
                self._fill(tokens[rows : rows + per, :-1], rows)
            self._ids = torch.empty(point.steps, batch, dtype=torch.long, device=self.device)
            last = tokens[:, -1:].clone()
            self._capture = lambda: self._decode(last, context - 1, point.steps)
        if self.device == "cuda":
            self._record()

    def _record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._capture()  # compiles, and lets cuBLAS take its workspace
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._capture()

    @torch.inference_mode()
    def run(self) -> None:
        """The timed call."""
        if self._graph is None:
            self._capture()
        else:
            self._graph.replay()

    def token_ids(self) -> np.ndarray:
        """See Contestant."""
        return self._ids.cpu().numpy()

    def close(self) -> None:
        """Give the point's memory back."""
        self._graph, self._cache = None, []

    def _decode(self, tokens: Tensor, position: int, steps: int) -> None:
        for step in range(steps):
            tokens = self._forward(tokens, position + step)[:, None]
            self._ids[step].copy_(tokens[:, 0])

    def _fill(self, tokens: Tensor, first_row: int) -> None:
        if tokens.shape[1]:
            self._forward(tokens, 0, first_row)

    def _forward(self, tokens: Tensor, start: int, first_row: int = 0) -> Tensor:
        """New tokens [batch, count] at positions from `start`; the arg-max of each last row."""
        config, (batch, count) = self.config, tokens.shape
        end, eps, heads = start + count, config.rms_norm_eps, config.num_attention_heads
        x = self.embed[tokens].view(batch * count, -1)
        cos, sin = self._cos[start:end], self._sin[start:end]
        for layer, (k_cache, v_cache) in zip(self.layers, self._cache, strict=True):
            k_cache, v_cache = (c[first_row : first_row + batch] for c in (k_cache, v_cache))
            h = F.rms_norm(x, x.shape[-1:], layer["attn_norm"], eps)
            qkv = F.linear(h, layer["qkv"]).view(batch, count, -1, config.head_dim)
            q = self._rope_and_store(
                qkv, cos, sin, k_cache[:, :, start:end], v_cache[:, :, start:end], heads
            )
            attn = F.scaled_dot_product_attention(
                q,
                k_cache[:, :, :end],
                v_cache[:, :, :end],
                is_causal=count > 1,
                enable_gqa=True,
            )
            x.addmm_(attn.transpose(1, 2).reshape(batch * count, -1), layer["o"])
            h = F.rms_norm(x, x.shape[-1:], layer["mlp_norm"], eps)
            x.addmm_(self._silu_and_mul(F.linear(h, layer["gate_up"])), layer["down"])
        last = x.view(batch, count, -1)[:, -1]
        return F.linear(F.rms_norm(last, last.shape[-1:], self.norm, eps), self.head).argmax(-1)


def _rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_slots: Tensor, v_slots: Tensor, num_heads: int
) -> Tensor:
    """Rotates q and k, writes k and v to their slots [batch, kv heads, count, head_dim]; q."""
    num_kv_heads = k_slots.shape[1]
    rotated = qkv[:, :, : num_heads + num_kv_heads]
    first, second = rotated.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    rotated = (rotated * cos[:, None] + turned * sin[:, None]).transpose(1, 2)
    k_slots.copy_(rotated[:, num_heads:])
    v_slots.copy_(qkv[:, :, num_heads + num_kv_heads :].transpose(1, 2))
    return rotated[:, :num_heads].contiguous()


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
