"""The one table of taps: where a value is found in the engine and in transformers.

Holds names, places and the order of the forward pass; knows nothing of values or verdicts.
Invariant: POINTS is in the order in which a layer reaches its points, and every input of a point
precedes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.bindings import TapPoint
from engine.config import ModelConfig

RESIDUAL_IN = (
    "residual_in"  # stands for embed in layer 0 and for the mlp_residual before in any other
)

TapKey = tuple[str, int]  # (tap name, layer); layer 0 for embed, final_norm and logits


@dataclass(frozen=True)
class Operation:
    """One operation of the engine and where its code is."""

    name: str
    twin_file: str
    cuda_file: str
    has_prefix: bool = True  # its C function is twin_<name> and cuda_<name>

    def c_function(self, device: str) -> str:
        """The function that a device runs."""
        if not self.has_prefix:
            return self.name
        return f"{'cuda' if device == 'cuda' else 'twin'}_{self.name}"

    def file(self, device: str) -> str:
        """The file of that function, from the root of the repository."""
        return self.cuda_file if device == "cuda" else self.twin_file


def _operation(name: str, file: str | None = None) -> Operation:
    stem = file or name
    return Operation(name, f"csrc/twin/{stem}.c", f"csrc/kernels/{stem}.cu")


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("rope_table", "csrc/model/rope_table.c", "csrc/model/rope_table.c", False),
        _operation("embedding"),
        _operation("rms_norm"),
        _operation("linear"),
        _operation("linear_f32", "linear"),
        _operation("rotary_embedding"),
        _operation("write_kv_cache", "kv_cache"),
        _operation("attention"),
        _operation("residual_add"),
        _operation("silu_and_mul"),
        _operation("argmax"),
    )
}


@dataclass(frozen=True)
class Point:
    """One tap."""

    name: str
    operation: str  # key of OPERATIONS
    inputs: tuple[str, ...]  # taps it is computed from, or RESIDUAL_IN
    grade: str  # exact or bounded, when fed known input
    hf_module: str  # the transformers module whose value it is; {layer} to be filled in
    hf_weight: str | None = None  # the weight it uses
    in_layer: bool = True  # one per layer, else one per model
    heads: str | None = None  # the field of ModelConfig that counts its heads of head_dim

    @property
    def tap_point(self) -> TapPoint:
        """Its number in engine.h."""
        return TapPoint[self.name]

    def width(self, config: ModelConfig) -> int:
        """Values per row."""
        if self.heads is not None:
            return getattr(config, self.heads) * config.head_dim
        if self.name in ("gate", "up", "act"):
            return config.intermediate_size
        return config.vocab_size if self.name == "logits" else config.hidden_size

    def module(self, layer: int) -> str:
        """The transformers module of one layer."""
        return self.hf_module.format(layer=layer)

    def weight(self, layer: int) -> str:
        """The checkpoint's name of its weight; only where hf_weight is given."""
        assert self.hf_weight is not None
        return self.hf_weight.format(layer=layer)


_ATTN = "model.layers.{layer}.self_attn"
_MLP = "model.layers.{layer}.mlp"
_LAYER = "model.layers.{layer}"


def _linear(name: str, source: str, module: str, heads: str | None = None) -> Point:
    return Point(name, "linear", (source,), "bounded", module, f"{module}.weight", heads=heads)


def _norm(name: str, source: str, module: str, in_layer: bool = True) -> Point:
    return Point(name, "rms_norm", (source,), "exact", module, f"{module}.weight", in_layer)


POINTS: tuple[Point, ...] = (
    Point(
        "embed", "embedding", (), "exact", "model.embed_tokens", "model.embed_tokens.weight", False
    ),
    _norm("attn_norm", RESIDUAL_IN, f"{_LAYER}.input_layernorm"),
    _linear("q", "attn_norm", f"{_ATTN}.q_proj", "num_heads"),
    _linear("k", "attn_norm", f"{_ATTN}.k_proj", "num_kv_heads"),
    _linear("v", "attn_norm", f"{_ATTN}.v_proj", "num_kv_heads"),
    Point("q_rope", "rotary_embedding", ("q",), "exact", _ATTN, heads="num_heads"),
    Point("k_rope", "rotary_embedding", ("k",), "exact", _ATTN, heads="num_kv_heads"),
    Point("attn", "attention", ("q_rope", "k_rope", "v"), "bounded", _ATTN, heads="num_heads"),
    _linear("o", "attn", f"{_ATTN}.o_proj"),
    Point("attn_residual", "residual_add", (RESIDUAL_IN, "o"), "exact", _LAYER),
    _norm("mlp_norm", "attn_residual", f"{_LAYER}.post_attention_layernorm"),
    _linear("gate", "mlp_norm", f"{_MLP}.gate_proj"),
    _linear("up", "mlp_norm", f"{_MLP}.up_proj"),
    Point("act", "silu_and_mul", ("gate", "up"), "exact", _MLP),
    _linear("down", "act", f"{_MLP}.down_proj"),
    Point("mlp_residual", "residual_add", ("attn_residual", "down"), "exact", _LAYER),
    _norm("final_norm", "mlp_residual", "model.norm", in_layer=False),
    Point("logits", "linear_f32", ("final_norm",), "bounded", "lm_head", "lm_head.weight", False),
)
POINT: dict[str, Point] = {point.name: point for point in POINTS}
LAYER_POINTS: tuple[Point, ...] = tuple(point for point in POINTS if point.in_layer)

# What is checked beside the taps has a name in reports too; all in the order of the forward pass.
RESULT_ORDER: tuple[str, ...] = (
    "rope_table",
    *(p.name for p in POINTS[:7]),
    "write_kv_cache",
    *(p.name for p in POINTS[7:]),
    "argmax",
)


def operation_of(name: str) -> Operation:
    """The operation behind a tap, or behind rope_table, write_kv_cache or argmax."""
    return OPERATIONS[POINT[name].operation if name in POINT else name]


def hf_module_of(name: str, layer: int) -> str:
    """The transformers module to read beside a failing tap or check."""
    if name in POINT:
        return POINT[name].module(layer)
    return {
        "rope_table": "model.rotary_emb",
        "write_kv_cache": f"model.layers.{layer}.self_attn",
        "argmax": "lm_head",
    }[name]


def all_keys(num_layers: int) -> Iterator[TapKey]:
    """Every tap of a model in the order of the forward pass."""
    yield ("embed", 0)
    for layer in range(num_layers):
        for point in LAYER_POINTS:
            yield (point.name, layer)
    yield ("final_norm", 0)
    yield ("logits", 0)


def source_key(source: str, layer: int, num_layers: int, reader: str) -> TapKey:
    """The tap that a point reads.

    Args:
        source: a name of Point.inputs.
        layer: of the reading point.
        reader: the reading point's name; final_norm reads the last layer.
    """
    if source == RESIDUAL_IN:
        return ("embed", 0) if layer == 0 else ("mlp_residual", layer - 1)
    if reader == "final_norm":
        return (source, num_layers - 1)
    return (source, layer)


def forward_index(name: str, layer: int, num_layers: int) -> tuple[int, int]:
    """A sort key: earlier in the forward pass is smaller."""
    if name in ("rope_table", "embed"):
        return (-1, RESULT_ORDER.index(name))
    if name in ("final_norm", "logits", "argmax"):
        return (num_layers, RESULT_ORDER.index(name))
    return (layer, RESULT_ORDER.index(name))
