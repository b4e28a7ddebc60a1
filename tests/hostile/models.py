"""Models that are not what they claim: small sound models, and a table of what can be wrong with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

ROWS = 8
"""Rows of the data that every base takes: `x`, float32 [rows, 3, 8, 8], and `labels`."""

LONG = "n" * 65536


@dataclass(frozen=True)
class Hostile:
    """A hostile input: `write` puts it into an empty folder and returns the model's path.

    Attributes:
        harmless: it may be taken, and must only crash nothing.
    """

    name: str
    write: Callable[[Path], Path]
    harmless: bool = False


def plain() -> ModelProto:
    """Conv, Relu, an average and a product: 4 classes."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "m"], ["y"], "product"),
    ]
    weights = {
        "w": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "b": np.zeros(8, np.float32),
        "m": random.normal(size=(8, 4)).astype(np.float32),
    }
    return _model(nodes, weights)


def quantized() -> ModelProto:
    """`plain` as another tool quantizes it: Q/DQ around the convolution."""
    model = plain()
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], "wdq", axis=0),
        *model.graph.node,
    ]
    nodes[3].input[0] = "xd"
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name != "w"}
    weights |= {"s": np.float32(0.05), "z": np.int8(0), "ws": np.full(8, 0.02, np.float32)}
    weights |= {"wz": np.zeros(8, np.int8), "wq": np.arange(8 * 27, dtype=np.int8).reshape(8, 3, 3, 3)}
    return _model(nodes, weights)


def branching() -> ModelProto:
    """`plain` with an If in front of its product."""
    model = plain()
    bodies = []
    for name in ("then", "else"):
        made = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)]
        node = helper.make_node("Neg", ["f"], [f"{name}_out"], f"{name}_neg")
        bodies.append(helper.make_graph([node], name, [], made))
    branch = helper.make_node("If", ["flag"], ["g"], "branch", then_branch=bodies[0], else_branch=bodies[1])
    nodes = [*model.graph.node[:4], branch, model.graph.node[4]]
    nodes[5].input[0] = "g"
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return _model(nodes, weights | {"flag": np.array(True)})


def calling() -> ModelProto:
    """`plain` whose Relu is a function of its own."""
    model = plain()
    body = [helper.make_node("Relu", ["a"], ["b"], "inner")]
    model.functions.append(
        helper.make_function("own", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    )
    model.graph.node[1].op_type, model.graph.node[1].domain = "Act", "own"
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def old() -> ModelProto:
    """`plain` at an opset that has to be upgraded."""
    model = plain()
    model.opset_import[0].version = 11
    return model


BASES: dict[str, Callable[[], ModelProto]] = {
    "plain": plain,
    "quantized": quantized,
    "branching": branching,
    "calling": calling,
    "old": old,
}


def write_data(folder: Path) -> Path:
    """Rows that every base takes."""
    random = np.random.default_rng(1)
    values = {"x": random.normal(size=(ROWS, 3, 8, 8)).astype(np.float32), "labels": np.arange(ROWS) % 4}
    np.savez(folder / "data.npz", **values)
    return folder / "data.npz"


def _model(nodes: list[NodeProto], weights: dict[str, np.ndarray]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


# --- what can be wrong with a model -----------------------------------------------------------------------

Mutation = Callable[[ModelProto], None]


def _weight(model: ModelProto) -> TensorProto:
    """The largest initializer."""
    return max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))


def _node(model: ModelProto, operator: str = "Conv") -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def _short(model: ModelProto) -> None:
    _weight(model).raw_data = _weight(model).raw_data[:-4]


def _long(model: ModelProto) -> None:
    _weight(model).raw_data += b"\0\0\0\0"


def _without_values(model: ModelProto) -> None:
    _weight(model).ClearField("raw_data")


def _values_twice(model: ModelProto) -> None:
    _weight(model).float_data.append(1.0)


def _dims(*dims: int) -> Mutation:
    def change(model: ModelProto) -> None:
        del _weight(model).dims[:]
        _weight(model).dims.extend(dims)

    return change


def _no_channels(model: ModelProto) -> None:
    _dims(0, 3, 3, 3)(model)
    _weight(model).raw_data = b""


def _dtype(code: int) -> Mutation:
    def change(model: ModelProto) -> None:
        _weight(model).data_type = code

    return change


def _input_type(code: int) -> Mutation:
    def change(model: ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = code

    return change


def _input_dim(size: int) -> Mutation:
    def change(model: ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = size

    return change


def _opset(version: int) -> Mutation:
    def change(model: ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _opset_twice(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("", 13))


def _no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def _cycle(model: ModelProto) -> None:
    _node(model).input[0] = "p"


def _own_tail(model: ModelProto) -> None:
    _node(model).input[0] = _node(model).output[0]


def _without_inputs(operator: str) -> Mutation:
    def change(model: ModelProto) -> None:
        del _node(model, operator).input[:]

    return change


def _without_outputs(model: ModelProto) -> None:
    del _node(model).output[:]


def _blank_input(model: ModelProto) -> None:
    _node(model).input[0] = ""


def _too_many_inputs(model: ModelProto) -> None:
    _node(model).input.extend(["b"] * 3)


def _unknown_tensor(model: ModelProto) -> None:
    _node(model, "MatMul").input[1] = "nothing makes this"


def _unknown_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nothing makes this"


def _node_twice(model: ModelProto) -> None:
    model.graph.node.add().CopyFrom(_node(model))


def _all_nodes_twice(model: ModelProto) -> None:
    model.graph.node.extend([*model.graph.node])


def _weight_twice(model: ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(_weight(model))


def _input_twice(model: ModelProto) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])


def _output_twice(model: ModelProto) -> None:
    model.graph.output.add().CopyFrom(model.graph.output[0])


def _weight_made_too(model: ModelProto) -> None:
    _node(model).output[0] = _weight(model).name


def _renamed(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _tensor_name(name: str) -> Mutation:
    return lambda model: _renamed(model, "p", name)


def _node_name(name: str) -> Mutation:
    def change(model: ModelProto) -> None:
        _node(model).name = name

    return change


def _input_name(name: str) -> Mutation:
    def change(model: ModelProto) -> None:
        _renamed(model, "x", name)
        model.graph.input[0].name = name

    return change


def _operator(name: str) -> Mutation:
    def change(model: ModelProto) -> None:
        _node(model).op_type = name

    return change


def _attribute(name: str, value: object) -> Mutation:
    def change(model: ModelProto) -> None:
        node = _node(model)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _attribute_twice(model: ModelProto) -> None:
    _node(model).attribute.add().CopyFrom(_node(model).attribute[0])


def _attribute_kind(kind: int) -> Mutation:
    def change(model: ModelProto) -> None:
        _node(model).attribute[0].type = kind

    return change


def _sparse(indices: list[int], dims: list[int], values: int = 2) -> Mutation:
    """The product's weight becomes sparse."""

    def change(model: ModelProto) -> None:
        (old_weight,) = (t for t in model.graph.initializer if t.name == "m")
        model.graph.initializer.remove(old_weight)
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(values, np.float32), "m"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64), "m_indices"))
        sparse.dims.extend(dims)

    return change


def _recursive(model: ModelProto) -> None:
    body = [helper.make_node("Again", ["a"], ["b"], "inner", domain="own")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "Again", ["a"], ["b"], body, opsets))
    if not any(opset.domain == "own" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Again", ["r"], ["again"], "call", domain="own"))


def _mutually_recursive(model: ModelProto) -> None:
    opsets = [helper.make_opsetid("own", 1)]
    for here, there in (("Ping", "Pong"), ("Pong", "Ping")):
        body = [helper.make_node(there, ["a"], ["b"], "inner", domain="own")]
        model.functions.append(helper.make_function("own", here, ["a"], ["b"], body, opsets))
    if not any(opset.domain == "own" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Ping", ["r"], ["again"], "call", domain="own"))


def _doubling_functions(model: ModelProto) -> None:
    """Forty functions, each of which calls the next twice: 2⁴⁰ nodes written out."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(40):
        op, domain = (f"F{level + 1}", "own") if level < 39 else ("Neg", "")
        body = [helper.make_node(op, [i], [o], domain=domain) for i, o in (("a", "h"), ("h", "b"))]
        model.functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], body, opsets))
    if not any(opset.domain == "own" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("F0", ["r"], ["again"], "call", domain="own"))


def _deep_bodies(model: ModelProto) -> None:
    """An If within an If, 28 deep: near protobuf's own limit."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["r"], ["d"], "deepest")],
        "deepest",
        [],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, None)],
    )
    for level in range(28):
        node = (
            helper.make_node("If", ["no such"], ["d"], f"if{level}", then_branch=body, else_branch=body)
            if level < 0
            else helper.make_node("If", ["no such"], ["d"], f"if{level}", then_branch=body)
        )
        body = helper.make_graph(
            [node], f"body{level}", [], [helper.make_tensor_value_info("d", TensorProto.FLOAT, None)]
        )
    model.graph.node.append(helper.make_node("If", ["no such"], ["deep"], "deep", then_branch=body))


def _info(name: str, kind: int) -> onnx.ValueInfoProto:
    """Of a body's input or output: a float tensor of any shape, or one number of another type."""
    return helper.make_tensor_value_info(name, kind, None if kind == TensorProto.FLOAT else [])


def _body(nodes: list[NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> onnx.GraphProto:
    """A body with inputs and outputs of element types."""
    ends = ([_info(name, kind) for name, kind in each.items()] for each in (inputs, outputs))
    return helper.make_graph(nodes, "body", *ends)


def _inserted(*nodes: NodeProto, **weights: Any) -> Mutation:
    """Nodes in front of the product, which reads `new` in place of its tensor; they read that as `old`."""

    def change(model: ModelProto) -> None:
        product = _node(model, "MatMul")
        old, place = product.input[0], len(model.graph.node) - 1
        product.input[0] = "new"
        for node in reversed(nodes):
            own = NodeProto()
            own.CopyFrom(node)
            for index, name in enumerate(own.input):
                own.input[index] = old if name == "old" else name
            own.name = f"{own.op_type} {place}"
            model.graph.node.insert(place, own)
        if any("old" in node.input for a in nodes for b in a.attribute for node in b.g.node) or not any(
            "old" in node.input for node in nodes
        ):
            model.graph.node.insert(place, helper.make_node("Identity", [old], ["old"], "alias"))
        for name, value in weights.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))

    return change


_FLOAT, _INT, _BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def _if(then: onnx.GraphProto, other: onnx.GraphProto | None = None, outputs: int = 1) -> NodeProto:
    bodies = {"then_branch": then} | ({"else_branch": other} if other is not None else {})
    return helper.make_node("If", ["yes"], ["new", "more"][:outputs], **bodies)


def _loop(body: onnx.GraphProto, trips: str = "many") -> NodeProto:
    return helper.make_node("Loop", [trips, "yes", "old"], ["new"], body=body)


def _step(*more: NodeProto, out: str = "n", done: str = "c") -> onnx.GraphProto:
    nodes = [helper.make_node("Neg", ["v"], ["n"], "neg"), *more]
    return _body(nodes, {"i": _INT, "c": _BOOL, "v": _FLOAT}, {done: _BOOL, out: _FLOAT})


_NEG = helper.make_node("Neg", ["old"], ["n"], "neg")

_STRUCTURED: dict[str, Mutation] = {
    "an If with one branch": _inserted(_if(_body([_NEG], {}, {"n": _FLOAT})), yes=True),
    "an If whose branches give other numbers": _inserted(
        _if(_body([_NEG], {}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT, "old": _FLOAT})), yes=True
    ),
    "an If with more outputs than its branches": _inserted(
        _if(_body([_NEG], {}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT}), outputs=2), yes=True
    ),
    "an If whose branch has inputs": _inserted(
        _if(_body([_NEG], {"old": _FLOAT}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT})), yes=True
    ),
    "an If on a number": _inserted(
        _if(_body([_NEG], {}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT})), yes=1.5
    ),
    "an If on no value": _inserted(
        _if(_body([_NEG], {}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT})), yes=np.zeros(0, bool)
    ),
    "an If on many values": _inserted(
        _if(_body([_NEG], {}, {"n": _FLOAT}), _body([_NEG], {}, {"n": _FLOAT})), yes=np.ones(3, bool)
    ),
    "an If whose branches make nothing": _inserted(_if(_body([], {}, {}), _body([], {}, {})), yes=True),
    "a branch that reads what follows from it": _inserted(
        _if(
            _body([helper.make_node("Neg", ["y"], ["n"])], {}, {"n": _FLOAT}),
            _body([_NEG], {}, {"n": _FLOAT}),
        ),
        yes=True,
    ),
    "a branch that reads what another makes": _inserted(
        _if(
            _body([_NEG], {}, {"n": _FLOAT}),
            _body([helper.make_node("Neg", ["n"], ["e"])], {}, {"e": _FLOAT}),
        ),
        yes=True,
    ),
    "a branch that makes a name of the model": _inserted(
        _if(
            _body([helper.make_node("Neg", ["old"], ["c"])], {}, {"c": _FLOAT}),
            _body([_NEG], {}, {"n": _FLOAT}),
        ),
        yes=True,
    ),
    "a Loop without an end": _inserted(_loop(_step()), many=np.array(2**62), yes=True),
    "a Loop without an end or a count": _inserted(_loop(_step(), trips=""), yes=True),
    "a Loop of -1 turns": _inserted(_loop(_step()), many=np.array(-1), yes=True),
    "a Loop of half a turn": _inserted(_loop(_step()), many=np.array(0.5), yes=True),
    "a Loop whose body takes too little": _inserted(
        _loop(_body([helper.make_node("Neg", ["i"], ["n"])], {"i": _INT}, {"n": _FLOAT})),
        many=np.array(2),
        yes=True,
    ),
    "a Loop whose body gives too little": _inserted(
        _loop(_body([], {"i": _INT, "c": _BOOL, "v": _FLOAT}, {"c": _BOOL})), many=np.array(2), yes=True
    ),
    "a Loop whose body grows what it carries": _inserted(
        _loop(_step(helper.make_node("Concat", ["v", "v"], ["g"], axis=0), out="g")),
        many=np.array(2),
        yes=True,
    ),
    "a Scan over nothing": _inserted(
        helper.make_node(
            "Scan",
            ["old"],
            ["new"],
            body=_body([_NEG], {"v": _FLOAT}, {"n": _FLOAT}),
            num_scan_inputs=0,
        )
    ),
    "a Scan over more than it has": _inserted(
        helper.make_node(
            "Scan",
            ["old"],
            ["new"],
            body=_body([helper.make_node("Neg", ["v"], ["n"])], {"v": _FLOAT}, {"n": _FLOAT}),
            num_scan_inputs=2**40,
        )
    ),
    "a sequence that nothing takes from": _inserted(helper.make_node("SequenceConstruct", ["old"], ["new"])),
    "a sequence that is read behind its end": _inserted(
        helper.make_node("SequenceConstruct", ["old"], ["s"]),
        helper.make_node("SequenceAt", ["s", "far"], ["new"]),
        far=np.array(2**62),
    ),
    "an optional of nothing": _inserted(
        helper.make_node("Optional", [], ["o"], type=helper.make_tensor_type_proto(_FLOAT, None)),
        helper.make_node("OptionalGetElement", ["o"], ["new"]),
    ),
    "text in the middle": _inserted(
        helper.make_node("Cast", ["old"], ["t"], to=TensorProto.STRING),
        helper.make_node("Cast", ["t"], ["new"], to=_FLOAT),
    ),
    "text that is no number": _inserted(
        helper.make_node("Cast", ["text"], ["t"], to=_FLOAT),
        helper.make_node("Add", ["old", "t"], ["new"]),
        text=np.array(["a\0b\x1b[31m"], object),
    ),
    "a Constant without a value": _inserted(
        helper.make_node("Constant", [], ["k"]), helper.make_node("Add", ["old", "k"], ["new"])
    ),
    "a Constant of two values": _inserted(
        helper.make_node("Constant", [], ["k"], value_float=1.0, value_int=1),
        helper.make_node("Add", ["old", "k"], ["new"]),
    ),
    "a Constant of text": _inserted(
        helper.make_node("Constant", [], ["k"], value_strings=["a", "b"]),
        helper.make_node("Add", ["old", "k"], ["new"]),
    ),
    "an integer divided by what gives no quotient": _inserted(
        helper.make_node("Div", ["low", "minus"], ["q"]),
        helper.make_node("Cast", ["q"], ["q2"], to=_FLOAT),
        helper.make_node("Add", ["old", "q2"], ["new"]),
        low=np.array([-(2**63)]),
        minus=np.array([-1]),
    ),
    "an integer divided by 0": _inserted(
        helper.make_node("Div", ["low", "none"], ["q"]),
        helper.make_node("Cast", ["q"], ["q2"], to=_FLOAT),
        helper.make_node("Add", ["old", "q2"], ["new"]),
        low=np.array([5]),
        none=np.array([0]),
    ),
    "a remainder of 0": _inserted(
        helper.make_node("Mod", ["low", "none"], ["q"]),
        helper.make_node("Cast", ["q"], ["q2"], to=_FLOAT),
        helper.make_node("Add", ["old", "q2"], ["new"]),
        low=np.array([-(2**63)]),
        none=np.array([0]),
    ),
    "a Range of 2^62": _inserted(
        helper.make_node("Range", ["a", "z", "one"], ["q1"]),
        helper.make_node("ReduceSum", ["q1"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["q2"], to=_FLOAT),
        helper.make_node("Add", ["old", "q2"], ["new"]),
        a=np.array(0),
        z=np.array(2**62),
        one=np.array(1),
    ),
    "a ConstantOfShape of 2^62": _inserted(
        helper.make_node("ConstantOfShape", ["sizes"], ["q1"]),
        helper.make_node("ReduceSum", ["q1"], ["s"], keepdims=0),
        helper.make_node("Add", ["old", "s"], ["new"]),
        sizes=np.array([2**31, 2**31]),
    ),
    "a OneHot of 2^40": _inserted(
        helper.make_node("OneHot", ["at", "depth", "values"], ["q1"]),
        helper.make_node("ReduceSum", ["q1"], ["s"], keepdims=0),
        helper.make_node("Add", ["old", "s"], ["new"]),
        at=np.array([0]),
        depth=np.array(2**40),
        values=np.array([0, 1], np.float32),
    ),
}


def _no_input(model: ModelProto) -> None:
    del model.graph.input[:]


def _no_output(model: ModelProto) -> None:
    del model.graph.output[:]


def _no_rank(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _ir(version: int) -> Mutation:
    def change(model: ModelProto) -> None:
        model.ir_version = version

    return change


def _bad(operator: str, *given: Any, behind: bool, **attributes: Any) -> Mutation:
    """A node that cannot run, in front of the product or behind it, where nothing is quantized.

    Args:
        given: what it reads behind its tensor; None: nothing there.
    """

    def change(model: ModelProto) -> None:
        product = _node(model, "MatMul")
        names = [f"bad{place}" if value is not None else "" for place, value in enumerate(given)]
        for name, value in zip(names, given, strict=True):
            if value is not None:
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        read, made = ("h", product.output[0]) if behind else (product.input[0], "h")
        bad = helper.make_node(operator, [read, *names], [made], "bad", **attributes)
        if behind:
            product.output[0] = "h"
            model.graph.node.append(bad)
        else:
            product.input[0] = "h"
            model.graph.node.insert(len(model.graph.node) - 1, bad)

    return change


_BAD_NODES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a Transpose of too many axes": (("Transpose",), {"perm": [0, 1, 2, 3, 4, 5]}),
    "a Transpose of one axis twice": (("Transpose",), {"perm": [1, 1]}),
    "a Reshape to other sizes": (("Reshape", np.array([0, 7])), {}),
    "a Reshape with two sizes left open": (("Reshape", np.array([-1, -1])), {}),
    "a Reshape to 2^40 rows": (("Reshape", np.array([2**40, -1])), {}),
    "a Reshape to a size that is a fraction": (("Reshape", np.array([0.0, 4.0], np.float32)), {}),
    "a Slice with steps of 0": (("Slice", *map(np.array, ([0], [3], [1], [0]))), {}),
    "a Slice with starts and no ends": (("Slice", *map(np.array, ([0, 1], [3], [1]))), {}),
    "a Slice of an axis that is not there": (("Slice", *map(np.array, ([0], [3], [2**62]))), {}),
    "a Concat of other ranks": (("Concat", np.ones((2, 2, 2), np.float32)), {"axis": 1}),
    "a Concat of other dtypes": (("Concat", np.ones((8, 4), np.int64)), {"axis": 1}),
    "a Concat along axis 2^40": (("Concat",), {"axis": 2**40}),
    "a Squeeze of what is not 1": (("Squeeze", np.array([1])), {}),
    "an Unsqueeze far outside": (("Unsqueeze", np.array([99])), {}),
    "a Gather outside": (("Gather", np.array([99])), {"axis": 1}),
    "a Gather outside of 2^62": (("Gather", np.array([2**62])), {"axis": 1}),
    "a GatherND of batch_dims below 0": (("GatherND", np.array([[0]])), {"batch_dims": -1}),
    "a Split into more than there is": (("Split", np.array([1, 99])), {"axis": 1}),
    "a Pad of too few sides": (("Pad", np.array([1, 1, 1])), {}),
    "a Pad of 2^62": (("Pad", np.array([2**62] * 4)), {}),
    "an Add of other shapes": (("Add", np.ones((3, 3, 7), np.float32)), {}),
    "an Add of other dtypes": (("Add", np.ones(1, np.int64)), {}),
    "a Flatten at axis 17": (("Flatten",), {"axis": 17}),
    "a Cast to dtype 99": (("Cast",), {"to": 99}),
    "an Expand to other sizes": (("Expand", np.array([3, 3, 3])), {}),
    "a Tile of too few axes": (("Tile", np.array([1])), {}),
    "a Resize of too few axes": (("Resize", None, np.ones(7, np.float32)), {}),
    "a Resize in no known way": (("Resize", None, np.ones(2, np.float32)), {"mode": "cubical"}),
    "a Softmax at axis 17": (("Softmax",), {"axis": 17}),
    "a Clip between doubles": (("Clip", np.float64(0), np.float64(1)), {}),
    "a MatMul of other sizes": (("MatMul", np.ones((3, 3), np.float32)), {}),
    "an Einsum of no equation": (("Einsum",), {"equation": "ijk->x"}),
    "a DepthToSpace of blocks of 3": (("DepthToSpace",), {"blocksize": 3}),
    "an integer Mod of floats": (("Mod", np.ones(1, np.float32)), {"fmod": 0}),
}


def _input_dims(*dims: int) -> Mutation:
    def change(model: ModelProto) -> None:
        shape = model.graph.input[0].type.tensor_type.shape
        for dim, size in zip(shape.dim[1:], dims, strict=False):
            dim.dim_value = size

    return change


def _end(kind: str, make: Callable[..., onnx.TypeProto], *, output: bool = False) -> Mutation:
    """An input or output more that is no tensor."""

    def change(model: ModelProto) -> None:
        ends = model.graph.output if output else model.graph.input
        ends.add(name=kind).type.CopyFrom(make(helper.make_tensor_type_proto(TensorProto.FLOAT, [1])))
        if output:
            model.graph.node.append(helper.make_node("SequenceConstruct", ["p"], [kind], "made"))

    return change


def _claims(name: str, kind: int, shape: list[Any] | None) -> Mutation:
    """What the model says of a tensor is not so."""
    value = helper.make_tensor_value_info(name, kind, shape)
    return lambda model: model.graph.value_info.append(value)


def _domain(name: str, version: int) -> Mutation:
    return lambda model: model.opset_import.append(helper.make_opsetid(name, version))


def _scale(values: Any, axis: int | None = None, zero: Any = None) -> Mutation:
    """A quantizer of the weight of `quantized` becomes another one."""

    def change(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "ws":
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, np.float32), "ws"))
            if tensor.name == "wz" and zero is not None:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(zero), "wz"))
        node = next((n for n in model.graph.node if n.name == "wdq"), None)
        if axis is not None and node is not None:
            node.attribute[0].i = axis

    return change


def _filled(value: float) -> Mutation:
    """All of the largest weight is one value."""

    def change(model: ModelProto) -> None:
        weight = _weight(model)
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32:
            weight.raw_data = np.full_like(array, value).tobytes()

    return change


def _function(*nodes: NodeProto, inputs: list[str], outputs: list[str], opset: bool = True) -> Mutation:
    """A function of the model's own in place of its Relu."""

    def change(model: ModelProto) -> None:
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)] if opset else []
        del model.functions[:]
        model.functions.append(helper.make_function("own", "Act", inputs, outputs, list(nodes), opsets))
        model.graph.node[[n.name for n in model.graph.node].index("relu")].CopyFrom(
            helper.make_node("Act", ["c"], ["r"], "relu", domain="own")
        )
        if not any(item.domain == "own" for item in model.opset_import):
            model.opset_import.append(helper.make_opsetid("own", 1))

    return change


def _overriding(model: ModelProto) -> None:
    body = [helper.make_node("Neg", ["a"], ["b"], "inner")]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("", "Relu", ["a"], ["b"], body, opsets))


_RELU = helper.make_node("Relu", ["a"], ["b"], "inner")

_UNLIKELY: dict[str, Mutation] = {
    "an input of -5 channels": _input_dims(-5),
    "an input of -1 x -1": _input_dims(3, -1, -1),
    "an input of 2^31 - 1 rows and columns": _input_dims(3, 2**31 - 1, 2**31 - 1),
    "an input that is a sequence": _end("sequence", helper.make_sequence_type_proto),
    "an input that is optional": _end("optional", helper.make_optional_type_proto),
    "an input that is a map": _end("map", lambda kind: helper.make_map_type_proto(TensorProto.INT64, kind)),
    "an output that is a sequence": _end("sequence", helper.make_sequence_type_proto, output=True),
    "a tensor said to be of text": _claims("c", TensorProto.STRING, None),
    "a tensor said to be of integers": _claims("r", TensorProto.INT64, ["N", 8, 8, 8]),
    "a tensor said to be of other sizes": _claims("c", TensorProto.FLOAT, ["N", 5, 3, 1]),
    "a tensor said to be of 2^62 rows": _claims("p", TensorProto.FLOAT, [2**62, 8, 1, 1]),
    "a tensor said to be of -3 rows": _claims("p", TensorProto.FLOAT, [-3, 8, 1, 1]),
    "a tensor said to be of no dtype": _claims("p", 0, None),
    "a tensor that is not there said to be": _claims("nothing", TensorProto.FLOAT, [1]),
    "an opset of a domain that nobody knows": _domain("no.such.domain", 7),
    "an opset of ai.onnx.ml that is not there": _domain("ai.onnx.ml", 2**31 - 1),
    "a domain of 2 kB": _domain("d" * 2048, 1),
    "weights that are not numbers": _filled(np.nan),
    "weights that are infinite": _filled(np.inf),
    "weights near the largest number": _filled(3e38),
    "weights below the smallest normal number": _filled(1e-42),
    "weights of 0": _filled(0.0),
    "scales of 0": _scale(np.zeros(8)),
    "scales below 0": _scale(np.full(8, -0.02)),
    "scales that are not numbers": _scale(np.full(8, np.nan)),
    "infinite scales": _scale(np.full(8, np.inf)),
    "too few scales": _scale(np.full(3, 0.02)),
    "no scales": _scale(np.zeros(0)),
    "scales of two axes": _scale(np.full((8, 3), 0.02)),
    "scales along axis 9": _scale(np.full(8, 0.02), axis=9),
    "scales along axis -2^63": _scale(np.full(8, 0.02), axis=-(2**63)),
    "zero points that are not 0": _scale(np.full(8, 0.02), zero=np.arange(8, dtype=np.int8)),
    "zero points of another dtype": _scale(np.full(8, 0.02), zero=np.zeros(8, np.uint8)),
    "too few zero points": _scale(np.full(8, 0.02), zero=np.zeros(3, np.int8)),
    "a function without opsets": _function(_RELU, inputs=["a"], outputs=["b"], opset=False),
    "a function that makes nothing": _function(_RELU, inputs=["a"], outputs=["x y z"]),
    "a function with an input twice": _function(_RELU, inputs=["a", "a"], outputs=["b"]),
    "a function of more than it is given": _function(
        helper.make_node("Add", ["a", "z"], ["b"], "inner"), inputs=["a", "z"], outputs=["b"]
    ),
    "a function that reads the model": _function(
        helper.make_node("Add", ["a", "m"], ["b"], "inner"), inputs=["a"], outputs=["b"]
    ),
    "a function that takes ONNX's name": _overriding,
    **_STRUCTURED,
}
"""What TensorRT or ONNX Runtime may take or not: anything may come of it but a crash."""

MUTATIONS: dict[str, Mutation] = {
    **_UNLIKELY,
    **{
        f"{name}{' behind' if behind else ''}": _bad(*given, behind=behind, **attributes)
        for name, (given, attributes) in _BAD_NODES.items()
        for behind in (False, True)
    },
    "a weight shorter than its dims": _short,
    "a weight longer than its dims": _long,
    "a weight without values": _without_values,
    "a weight with values of two kinds": _values_twice,
    "a weight with huge dims": _dims(2**40, 2**40),
    "a weight with dims that overflow": _dims(2**32, 2**32, 3, 3),
    "a weight with negative dims": _dims(-8, 3, 3, 3),
    "a weight with two negative dims": _dims(-8, -3, 3, 3),
    "a weight of no channels": _no_channels,
    "a weight of no dtype": _dtype(0),
    "a weight of an unknown dtype": _dtype(99),
    "a weight of dtype 2^31-1": _dtype(2**31 - 1),
    "a weight that is text": _dtype(TensorProto.STRING),
    "a weight of doubles": _dtype(TensorProto.DOUBLE),
    "an input of no dtype": _input_type(0),
    "an input of an unknown dtype": _input_type(77),
    "an input of text": _input_type(TensorProto.STRING),
    "an input of complex numbers": _input_type(TensorProto.COMPLEX64),
    "an input of 2^62 channels": _input_dim(2**62),
    "an input of 0 channels": _input_dim(0),
    "an input of other channels": _input_dim(5),
    "an input without rank": _no_rank,
    "opset 2^40": _opset(2**40),
    "opset 99": _opset(99),
    "opset 0": _opset(0),
    "opset -1": _opset(-1),
    "two opsets": _opset_twice,
    "no opset": _no_opset,
    "IR version 2^40": _ir(2**40),
    "IR version -1": _ir(-1),
    "a cycle": _cycle,
    "a node that reads its own output": _own_tail,
    "Conv without inputs": _without_inputs("Conv"),
    "MatMul without inputs": _without_inputs("MatMul"),
    "Flatten without inputs": _without_inputs("Flatten"),
    "Conv without outputs": _without_outputs,
    "Conv without its first input": _blank_input,
    "Conv with six inputs": _too_many_inputs,
    "a tensor that nothing makes": _unknown_tensor,
    "an output that nothing makes": _unknown_output,
    "a node twice": _node_twice,
    "every node twice": _all_nodes_twice,
    "a weight twice": _weight_twice,
    "an input twice": _input_twice,
    "an output twice": _output_twice,
    "a weight that a node makes, too": _weight_made_too,
    "a tensor's name with NUL": _tensor_name("p\0q"),
    "a tensor's name of 64 kB": _tensor_name(LONG),
    "a node's name with NUL": _node_name("conv\0"),
    "a node's name of 64 kB": _node_name(LONG),
    "an input's name with NUL": _input_name("x\0"),
    "an input's name of 64 kB": _input_name(LONG),
    "an operator that does not exist": _operator("Convolve"),
    "an operator without a name": _operator(""),
    "an operator with NUL": _operator("Conv\0"),
    "an operator with an escape sequence": _operator("\x1b[31mConv"),
    "strides of 0": _attribute("strides", [0, 0]),
    "strides below 0": _attribute("strides", [-1, -1]),
    "strides of 2^62": _attribute("strides", [2**62, 2**62]),
    "pads of 2^62": _attribute("pads", [2**62] * 4),
    "three pads": _attribute("pads", [1, 1, 1]),
    "pads that are text": _attribute("pads", "SAME"),
    "0 groups": _attribute("group", 0),
    "5 groups": _attribute("group", 5),
    "a group that is a number with a fraction": _attribute("group", 1.5),
    "dilations of 0": _attribute("dilations", [0, 0]),
    "an unknown attribute": _attribute("no_such_attribute", 1),
    "an attribute twice": _attribute_twice,
    "an attribute of another kind": _attribute_kind(onnx.AttributeProto.GRAPH),
    "sparse indices outside": _sparse([0, 99], [8, 4]),
    "sparse indices below 0": _sparse([-1, 3], [8, 4]),
    "sparse indices and values of other lengths": _sparse([0, 1, 2], [8, 4]),
    "sparse indices of three axes": _sparse([[0, 1, 2], [0, 1, 3]], [8, 4]),
    "sparse values of huge dims": _sparse([0, 1], [2**40, 2**20]),
    "a recursive function": _recursive,
    "two functions that call each other": _mutually_recursive,
    "functions that double 40 times": _doubling_functions,
    "deep bodies": _deep_bodies,
    "no inputs": _no_input,
    "no outputs": _no_output,
}
"""What can be wrong -> the change to a model that makes it so."""

HARMLESS = frozenset({"a weight of doubles", "an input of other channels", *_UNLIKELY})


def _text_bytes(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "an empty file": lambda content: b"",
    "half a file": lambda content: content[: len(content) // 2],
    "all but the last byte": lambda content: content[:-1],
    "a node's name that is not UTF-8": _text_bytes(b"relu", b"\xff\xfe\xfd\xfc"),
    "a tensor's name that is not UTF-8": _text_bytes(b"\x01p", b"\x01\xff"),
    "an operator that is not UTF-8": _text_bytes(b"Flatten", b"Flatte\xff"),
    "an attribute's name that is not UTF-8": _text_bytes(b"pads", b"pa\xff\xff"),
    "an attribute of kind 99": _text_bytes(b"\xa0\x01\x07", b"\xa0\x01\x63"),
    "a graph's name that is not UTF-8": _text_bytes(b"\x03net", b"\x03n\xff\xff"),
    "a dimension's name that is not UTF-8": _text_bytes(b"\x12\x01N", b"\x12\x01\xff"),
    "a PNG": lambda content: b"\x89PNG\r\n\x1a\n" + bytes(1000),
    "text": lambda content: b"hello\n" * 100,
}
"""What can be wrong with a file -> the change to its bytes."""


# --- external data ----------------------------------------------------------------------------------------


def _external(change: Callable[[Path, ModelProto], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        """`plain` whose largest weight is in a file of its own, then changed."""
        inner = folder / "model"
        inner.mkdir()
        model = plain()
        weight = _weight(model)
        (inner / "weights.bin").write_bytes(weight.raw_data)
        (folder / "outside.bin").write_bytes(weight.raw_data)
        size = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(size))):
            weight.external_data.add(key=key, value=value)
        change(inner, model)
        (inner / "model.onnx").write_bytes(model.SerializeToString())
        return inner / "model.onnx"

    return write


def _entry(key: str, value: str) -> Callable[[Path], Path]:
    def change(folder: Path, model: ModelProto) -> None:
        (entry,) = (entry for entry in _weight_outside(model).external_data if entry.key == key)
        entry.value = value

    return _external(change)


def _weight_outside(model: ModelProto) -> TensorProto:
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def _link(folder: Path, model: ModelProto) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").symlink_to("../outside.bin")


def _linked_folder(folder: Path, model: ModelProto) -> None:
    (folder / "link").symlink_to("..")
    _weight_outside(model).external_data[0].value = "link/outside.bin"


def _data_folder(folder: Path, model: ModelProto) -> None:
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()


def _empty_data(folder: Path, model: ModelProto) -> None:
    (folder / "weights.bin").write_bytes(b"")


def _nowhere(folder: Path, model: ModelProto) -> None:
    del _weight_outside(model).external_data[:]


def _values_in_both(folder: Path, model: ModelProto) -> None:
    _weight_outside(model).raw_data = b"\0" * 864


EXTERNAL: dict[str, Callable[[Path], Path]] = {
    "data outside the folder through ..": _entry("location", "../outside.bin"),
    "data outside the folder through a link": _external(_link),
    "data outside the folder through a linked folder": _external(_linked_folder),
    "data at an absolute path": _entry("location", "/etc/hostname"),
    "data on a device": _entry("location", "/dev/zero"),
    "data in a folder": _external(_data_folder),
    "data in the folder itself": _entry("location", "."),
    "data in a file without a name": _entry("location", ""),
    "data in a file whose name has NUL": _entry("location", "weights\0.bin"),
    "data in a file whose name is an escape sequence": _entry("location", "\x1b]0;owned\x07"),
    "data in a file whose name is 64 kB": _entry("location", LONG),
    "data in the model itself": _entry("location", "model.onnx"),
    "data that is missing": _entry("location", "other.bin"),
    "data that is empty": _external(_empty_data),
    "data without a location": _external(_nowhere),
    "data inside and outside": _external(_values_in_both),
    "an offset behind the end": _entry("offset", "4096"),
    "an offset of 2^62": _entry("offset", str(2**62)),
    "an offset of 2^70": _entry("offset", str(2**70)),
    "an offset below 0": _entry("offset", "-4"),
    "an offset that is text": _entry("offset", "zero"),
    "a length beyond the end": _entry("length", "4096"),
    "a length that is too short": _entry("length", "4"),
    "a length of 2^70": _entry("length", str(2**70)),
    "a length below 0": _entry("length", "-1"),
    "a length that is text": _entry("length", "all"),
}
"""What can be wrong with external data -> the function that writes such a model."""


# --- the whole table --------------------------------------------------------------------------------------


def hostile_models() -> Iterator[Hostile]:
    """Every mutation of every base that it changes, and every kind of external data."""
    for name, change in MUTATIONS.items():
        for base, made in BASES.items():
            yield Hostile(f"{name}, {base}", _mutated(made, change), name in HARMLESS)
    for name, damage in BYTES.items():
        for base, made in BASES.items():
            yield Hostile(f"{name}, {base}", _damaged(made, damage))
    for name, write in EXTERNAL.items():
        yield Hostile(name, write)


def flipped(seed: int) -> Hostile:
    """A base with some bytes changed at random: anything may come of it but a crash."""

    def write(folder: Path) -> Path:
        random = np.random.default_rng(seed)
        made = [*BASES.values()][seed % len(BASES)]
        content = bytearray(made().SerializeToString())
        places = random.integers(0, len(content), size=1 + seed % 7)
        if seed % 2:  # half of them where the names and numbers of nodes are, and not the weights
            places %= 600
        for place in places:
            content[place] = random.integers(0, 256)
        (folder / "model.onnx").write_bytes(content)
        return folder / "model.onnx"

    return Hostile(f"bytes changed, seed {seed}", write, harmless=True)


def _mutated(made: Callable[[], ModelProto], change: Mutation) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = made()
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder / "model.onnx"

    return write


def _damaged(made: Callable[[], ModelProto], damage: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        content = made().SerializeToString()
        (folder / "model.onnx").write_bytes(damage(content))
        return folder / "model.onnx"

    return write
