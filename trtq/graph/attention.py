"""ONNX's Attention as the products, softmax and moves that TensorRT fuses, and quantizes.

ONNX's own definition serves every feature, but at a price: it adds a mask where there is none, looks for
queries without any key, repeats keys and values once, and computes at run time what is known. This one is for
what exporters write; the rest is left to ONNX's (see `trtq.graph.functions`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

_INPUTS = ("Q", "K", "V", "mask", "past_key", "past_value")
_OUTPUTS = ("Y", "present_key", "present_value")
_ATTRIBUTES = {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale"}
_NO_EFFECT = {"left_window_size": -1, "right_window_size": -1, "softcap": 0.0}
"""Values with which an attribute changes nothing."""


def attention_body(node: gs.Node) -> onnx.FunctionProto | None:
    """An Attention as a function; None for its rarer features, and where shapes are not known."""
    form = _Form.of(node)
    if form is None:
        return None
    inputs, outputs = ", ".join(_INPUTS[: len(node.inputs)]), ", ".join(_OUTPUTS[: len(node.outputs)])
    head = f'<opset_import: ["": 23], domain: "trtq"> attention ({inputs}) => ({outputs})'
    return onnx.parser.parse_function("\n".join([head, "{", *form.lines(), "}"]))


@dataclass(frozen=True)
class _Form:
    """What one Attention looks like.

    Attributes:
        inputs: those of `_INPUTS` that are there.
        outputs: those of `_OUTPUTS` that are wanted.
        heads, groups: how many heads the queries have, and the keys and values.
        size, value_size: of a key's and a value's head.
        split: heads are an axis of their own, second of four; else they lie in the last of three.
        kind: ONNX's number of the floating-point type.
    """

    inputs: Mapping[str, gs.Tensor]
    outputs: tuple[str, ...]
    heads: int
    groups: int
    size: int
    value_size: int
    split: bool
    kind: int
    scale: float
    causal: bool

    @classmethod
    def of(cls, node: gs.Node) -> _Form | None:
        inputs = {name: tensor for name, tensor in zip(_INPUTS, node.inputs, strict=False) if tensor.name}
        more = [t for t in (*node.inputs[len(_INPUTS) :], *node.outputs[len(_OUTPUTS) :]) if t.name]
        dtypes = {t.dtype for name, t in inputs.items() if name != "mask"}
        if more or dtypes not in ({np.dtype(np.float32)}, {np.dtype(np.float16)}):
            return None
        kind = onnx.helper.np_dtype_to_tensor_dtype(*dtypes)
        no_effect = {**_NO_EFFECT, "softmax_precision": kind}
        plain = all(name in _ATTRIBUTES or no_effect.get(name) == v for name, v in node.attrs.items())
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        ranks = {len(shape or ()) for name, shape in shapes.items() if name in "QKV"}
        if not plain or ranks not in ({3}, {4}) or not _covers(shapes, inputs.get("mask"), dtypes):
            return None
        split = ranks == {4}
        counts = [node.attrs.get(name) for name in ("q_num_heads", "kv_num_heads")]
        heads, groups = [shapes["Q"][1], shapes["K"][1]] if split else counts
        widths = [shapes["K"][-1], shapes["V"][-1]]
        if not all(isinstance(number, int) and number > 0 for number in (heads, groups, *widths)):
            return None
        size, value_size = (width if split else width // groups for width in widths)
        return cls(
            inputs=inputs,
            outputs=tuple(n for n, t in zip(_OUTPUTS, node.outputs, strict=False) if t.name),
            heads=heads,
            groups=groups,
            size=size,
            value_size=value_size,
            split=split,
            kind=kind,
            scale=float(node.attrs.get("scale", size**-0.5)),
            causal=bool(node.attrs.get("is_causal", 0)),
        )

    def lines(self) -> Iterator[str]:
        """The nodes, in ONNX's text form."""
        yield from self._separate("Q", "queries", self.heads, self.size)
        yield from self._separate("K", "new_keys", self.groups, self.size)
        yield from self._separate("V", "new_values", self.groups, self.value_size)
        yield from self._with_past("key", "keys", self.size)
        yield from self._with_past("value", "values", self.value_size)
        yield from self._number("scale", self.scale)
        yield "scaled = Mul (queries, scale)"
        yield "turned = Transpose <perm = [0, 1, 3, 2]> (keys)"
        yield "scores = MatMul (scaled, turned)"
        masked = self.causal or "mask" in self.inputs
        if masked:
            yield from self._bias()
            yield "masked = Add (scores, bias)"
        yield f"chances = Softmax <axis = -1> ({'masked' if masked else 'scores'})"
        yield "mixed = MatMul (chances, values)"
        emptied = "mask" in self.inputs and not self._sees_a_key()
        if emptied:
            yield from self._empty_rows()
        yield from self._joined("filled" if emptied else "mixed")

    def _separate(self, tensor: str, name: str, heads: int, size: int) -> Iterator[str]:
        """(batch, length, heads * size) as (batch, heads, length, size)."""
        if self.split:
            yield f"{name} = Identity ({tensor})"
            return
        yield f"{name}_shape = Constant <value = int64[4] {{0, 0, {heads}, {size}}}> ()"
        yield f"{name}_apart = Reshape ({tensor}, {name}_shape)"
        yield f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}_apart)"

    def _with_past(self, kind: str, name: str, size: int) -> Iterator[str]:
        """Keys or values behind those of the past, repeated for all queries that share them."""
        present = f"new_{name}"
        if f"past_{kind}" in self.inputs:
            present = f"present_{kind}"
            yield f"{present} = Concat <axis = 2> (past_{kind}, new_{name})"
        elif f"present_{kind}" in self.outputs:
            yield f"present_{kind} = Identity ({present})"
        if self.heads == self.groups:
            yield f"{name} = Identity ({present})"
            return
        repeats = self.heads // self.groups
        yield f"{name}_axis = Constant <value = int64[1] {{2}}> ()"
        yield f"{name}_one = Unsqueeze ({present}, {name}_axis)"
        yield f"{name}_repeats = Constant <value = int64[5] {{1, 1, {repeats}, 1, 1}}> ()"
        yield f"{name}_repeated = Expand ({name}_one, {name}_repeats)"
        yield f"{name}_shape = Constant <value = int64[4] {{0, {self.heads}, -1, {size}}}> ()"
        yield f"{name} = Reshape ({name}_repeated, {name}_shape)"

    def _bias(self) -> Iterator[str]:
        """`bias`: what is added to the scores; `allowed`: where a query sees a key.

        What is masked gets a finite number: -inf in a whole row makes NaN of it.
        """
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.kind)
        yield from self._number("zero", 0.0)
        yield from self._number("lowest", float(np.finfo(dtype).min) / 2)
        if self.causal:
            yield from self._earlier()
        if "mask" not in self.inputs:
            yield "bias = Where (earlier, zero, lowest)"
        elif self.inputs["mask"].dtype == np.bool_:
            yield f"allowed = {'And (mask, earlier)' if self.causal else 'Identity (mask)'}"
            yield "bias = Where (allowed, zero, lowest)"
        else:
            yield from self._number("minus_infinity", "-inf")
            yield "excluded = Equal (mask, minus_infinity)"
            yield "included = Not (excluded)"
            yield f"allowed = {'And (included, earlier)' if self.causal else 'Identity (included)'}"
            yield "bias = Where (allowed, mask, lowest)"

    def _earlier(self) -> Iterator[str]:
        """`earlier` (queries, keys): the keys up to a query's own position, the past among them."""
        yield "first = Constant <value = int64 {0}> ()"
        yield "step = Constant <value = int64 {1}> ()"
        yield "column = Constant <value = int64[1] {1}> ()"
        for name in ("queries", "keys"):
            yield f"{name}_length = Shape <start = 2, end = 3> ({name})"
            yield f"{name}_count = Squeeze ({name}_length)"
            yield f"{name}_steps = Range (first, {name}_count, step)"
        yield "rows = Unsqueeze (queries_steps, column)"
        if "past_key" in self.inputs:
            yield "past_length = Shape <start = 2, end = 3> (past_key)"
            yield "positions = Add (rows, past_length)"
        else:
            yield "positions = Identity (rows)"
        yield "earlier = GreaterOrEqual (positions, keys_steps)"

    def _sees_a_key(self) -> bool:
        """Whether a mask that is known leaves every query a key."""
        mask = self.inputs["mask"]
        if self.causal or not isinstance(mask, gs.Constant):
            return False
        allowed = mask.values if mask.dtype == np.bool_ else mask.values != -np.inf
        return bool(allowed.any(axis=-1).all())

    def _empty_rows(self) -> Iterator[str]:
        """`filled`: a query that sees no key gets zeros."""
        yield f"numbers = Cast <to = {self.kind}> (allowed)"
        yield "last = Constant <value = int64[1] {-1}> ()"
        yield "most = ReduceMax (numbers, last)"
        yield "empty = Equal (most, zero)"
        yield "filled = Where (empty, zero, mixed)"

    def _joined(self, name: str) -> Iterator[str]:
        if self.split:
            yield f"Y = Identity ({name})"
            return
        yield f"together = Transpose <perm = [0, 2, 1, 3]> ({name})"
        yield f"Y_shape = Constant <value = int64[3] {{0, 0, {self.heads * self.value_size}}}> ()"
        yield "Y = Reshape (together, Y_shape)"

    def _number(self, name: str, value: float | str) -> Iterator[str]:
        """A constant of the type of the queries."""
        yield f"{name}_float = Constant <value_float = {value}> ()"
        yield f"{name} = Cast <to = {self.kind}> ({name}_float)"


def _covers(shapes: Mapping[str, list], mask: gs.Tensor | None, dtypes: set[np.dtype]) -> bool:
    """Whether there is no mask, or one of all keys: a shorter one hides those behind it."""
    if mask is None:
        return True
    if mask.shape is None or not mask.shape or mask.dtype not in {np.dtype(np.bool_), *dtypes}:
        return False
    length, past = shapes["K"][-2], shapes.get("past_key")
    if past is not None:
        known = isinstance(length, int) and isinstance(past[-2], int)
        length = length + past[-2] if known else None
    return length is not None and mask.shape[-1] == length
