"""What can be computed of a graph with operators that ONNX does not define, and what stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign import attributes_of, chain, foreign_net, middle, reference_file
from nets import loaded, net, saved

from trtq.errors import InputError
from trtq.graph import references
from trtq.graph.fold import fold
from trtq.graph.foreign import View, import_domains, is_foreign, needs_reference
from trtq.graph.half import convert_to_half
from trtq.graph.model import export, load_model, save_model
from trtq.graph.place import place


@pytest.fixture(autouse=True)
def no_references() -> Iterator[None]:
    yield
    references.use([])


@pytest.mark.parametrize(
    ("op", "domain", "foreign"),
    [
        ("Conv", "", False),
        ("Conv", None, False),
        ("Conv", "ai.onnx", False),
        ("Conv", "custom", True),
        ("EfficientNMS_TRT", "", True),
        ("Attention", "com.microsoft", True),
        ("LabelEncoder", "ai.onnx.ml", False),
    ],
)
def test_what_onnx_does_not_define_is_foreign(op: str, domain: str | None, foreign: bool) -> None:
    assert is_foreign(op, domain) is foreign


def test_what_onnx_runtime_computes_needs_no_reference() -> None:
    node = onnx.helper.make_node
    assert not needs_reference(node("Attention", ["x"], ["y"], domain="com.microsoft"))
    assert not needs_reference(node("SimplifiedLayerNormalization", ["x"], ["y"]))
    assert needs_reference(node("GroupNorm", ["x"], ["y"], domain="com.microsoft"))
    assert needs_reference(node("EfficientNMS_TRT", ["x"], ["y"]))


def test_a_model_ends_in_front_of_what_cannot_be_computed() -> None:
    view = View.of(chain().graph)
    assert view.outputs == ("a",)
    assert [wall.name for wall in view.walls] == ["m"]
    assert view.hidden.keys() == {"m", "b", "p", "s", "q", "y"}
    assert "Scaled" in str(view.remark())


def test_with_references_all_of_it_is_computed(tmp_path: Path) -> None:
    references.use([str(reference_file(tmp_path))])
    view = View.of(chain().graph)
    assert (view.outputs, view.walls, view.hidden, view.remark()) == (("y", "s"), (), {}, None)


def test_all_that_goes_into_the_hidden_part_is_compared() -> None:
    """Not only what the wall reads: an error of b would show nowhere else."""
    model = foreign_net(
        "g (float[N,4] x) => (float[N,4] y) { a = Neg(x) b = Abs(x) k = Unknown(a) c = Unknown(z)"
        " d = Add(c, k) y = Add(b, d) }",
        z=np.ones(4, np.float32),
    )
    assert View.of(model.graph).outputs == ("a", "b")


def test_outputs_beside_a_wall_stay_outputs() -> None:
    model = foreign_net(
        "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { z = Relu(x) a = Neg(x) y = Unknown(a) }"
    )
    assert View.of(model.graph).outputs == ("z", "a")


def test_what_follows_from_shapes_or_constants_is_not_compared() -> None:
    """A folded model has such inputs of an operator as constants, and the original has them as tensors."""
    model = foreign_net(
        "g (float[2,4] x, int64[2,4] n) => (float[2,4] y) {"
        " s = Shape(x) t = Cast<to = 1>(s) c = Neg(k) a = Neg(x) i = Abs(n) y = Unknown(a, t, c, i, x) }",
        k=np.ones(3, np.float32),
    )
    assert View.of(onnx.shape_inference.infer_shapes(model).graph).outputs == ("a",)


@pytest.mark.parametrize("domain", ["custom", "TRT", "", "ai.onnx"])
def test_the_node_stays_as_it_is(domain: str, tmp_path: Path) -> None:
    model = middle("" if domain == "ai.onnx" else domain)
    model.graph.node[1].domain = domain
    model.graph.node[1].attribute.extend(
        onnx.helper.make_attribute(name, value)
        for name, value in (("ints", [1, 2]), ("floats", [0.5]), ("text", "a"), ("texts", ["a", "b"]))
    )
    model.graph.node[1].attribute.append(
        onnx.helper.make_attribute("tensor", onnx.numpy_helper.from_array(np.arange(3.0, dtype=np.float32)))
    )
    before = onnx.NodeProto.FromString(model.graph.node[1].SerializeToString())
    empty = onnx.AttributeProto(name="none", type=onnx.AttributeProto.INTS)
    model.graph.node[1].attribute.append(empty)  # which says nothing, and is left out
    given = loaded(model, tmp_path)
    fold(given.graph)
    save_model(given.graph, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    (after,) = (node for node in again.graph.node if node.op_type == "Scaled")
    assert (after.domain, list(after.input), list(after.output), after.name) == (domain, ["a"], ["m"], "m")
    assert attributes_of(after).keys() == attributes_of(before).keys()
    for name, value in attributes_of(before).items():
        if name == "tensor":
            array = onnx.numpy_helper.to_array(attributes_of(after)[name])  # type: ignore[arg-type]
            np.testing.assert_array_equal(array, np.arange(3.0))
        else:
            assert attributes_of(after)[name] == value
    assert {o.domain for o in again.opset_import} >= {domain}


def test_a_domain_that_is_not_imported_is(tmp_path: Path) -> None:
    model = middle()
    model.opset_import.pop()
    import_domains(model)
    assert {o.domain: o.version for o in model.opset_import} == {"": 17, "custom": 1}
    model = middle("")
    model.graph.node[1].domain = "ai.onnx"
    import_domains(model)
    assert {o.domain: o.version for o in model.opset_import} == {"": 17, "ai.onnx": 17}


@pytest.mark.parametrize("domain", ["custom", "", "ai.onnx"])
def test_an_old_opset_is_upgraded_around_the_node(domain: str, tmp_path: Path) -> None:
    model = middle("" if domain == "ai.onnx" else domain)
    model.opset_import[0].version = 11
    model.graph.node[1].domain = domain
    graph = loaded(model, tmp_path).graph
    assert graph.opset == 13
    assert [(node.op, node.domain or "") for node in graph.nodes] == [
        ("Conv", ""), ("Scaled", domain), ("Relu", ""), ("Conv", ""),
    ]  # fmt: skip
    standard = {o.domain: o.version for o in export(graph).opset_import if o.domain in ("", "ai.onnx")}
    assert set(standard.values()) == {13}
    assert {o.domain for o in export(graph).opset_import} == {"", domain}


def test_inside_a_body_it_is_refused(tmp_path: Path) -> None:
    model = net(
        "g (float[N,4] x, bool c) => (float[N,4] y) {"
        " y = If(c) <then_branch = t () => (float[N,4] a) { a = Relu(x) },"
        "           else_branch = e () => (float[N,4] b) { b = Relu(x) }> }"
    )
    model.graph.node[0].attribute[1].g.node[0].op_type = "Plugin_TRT"
    with pytest.raises(InputError, match=r"'Plugin_TRT' is in the body of an If[\s\S]*outside"):
        loaded(model, tmp_path)


def test_what_lies_behind_is_not_quantized_and_the_plan_says_why(tmp_path: Path) -> None:
    model = loaded(chain(), tmp_path)
    fold(model.graph)
    plan = place(model, input_shapes={"x": (1, 3, 8, 8)})
    assert [node.name for node in plan.nodes if node.int8] == ["a"]
    reasons = {node.name: node.reason for node in plan.nodes if not node.int8}
    assert reasons.keys() == {"b", "y"}
    assert "behind 'm' (Scaled), which has no reference" in reasons["b"]
    assert not {edge.tensor for edge in plan.edges} & View.of(model.graph).hidden.keys()


def test_a_reference_tells_types_and_shapes(tmp_path: Path) -> None:
    references.use([str(reference_file(tmp_path))])
    model = loaded(chain(), tmp_path)
    fold(model.graph)
    tensors = model.graph.tensors()
    assert (tensors["m"].dtype, len(tensors["m"].shape)) == (np.dtype(np.float32), 4)
    assert tensors["b"].dtype == np.dtype(np.float32)
    plan = place(model, input_shapes={"x": (1, 3, 8, 8)})
    assert [(node.name, node.macs) for node in plan.nodes] == [("a", 6912), ("b", 9216), ("y", 9216)]


def test_in_half_the_node_keeps_float32_under_the_same_names(tmp_path: Path) -> None:
    references.use([str(reference_file(tmp_path))])
    model = load_model(saved(middle(), tmp_path), opset=19)
    fold(model.graph)
    half = convert_to_half(model.graph)
    nodes = {node.name: node for node in half.nodes}
    (read,), (made,) = nodes["m"].inputs, nodes["m"].outputs
    assert (read.name, read.dtype, made.name, made.dtype) == ("a", np.float32, "m", np.float32)
    assert nodes["a"].outputs[0].dtype == nodes["y"].inputs[0].dtype == np.float16
    assert View.of(export(half).graph).outputs == ("y",)


def test_in_half_what_lies_behind_stays_float32(tmp_path: Path) -> None:
    model = load_model(saved(middle(), tmp_path), opset=19)
    fold(model.graph)
    half = convert_to_half(model.graph)
    nodes = {node.name: node for node in half.nodes}
    assert nodes["a"].outputs[0].dtype == np.float16
    assert (nodes["m"].inputs[0].name, nodes["m"].inputs[0].dtype) == ("a", np.float32)
    assert nodes["y"].inputs[1].dtype == np.float32


def test_in_half_what_goes_in_keeps_its_name_wherever_it_goes_in(tmp_path: Path) -> None:
    model = foreign_net(
        "g (float[N,3,8,8] x) => (float[N,4,8,8] y) { a = Conv<pads = [1,1,1,1]>(x, w1) b = Abs(x)"
        " m = Scaled(b) y = Add(a, m) }"
    )
    given = load_model(saved(model, tmp_path), opset=19)
    fold(given.graph)
    assert View.of(given.graph).outputs == ("b", "a")
    assert View.of(export(convert_to_half(given.graph)).graph).outputs == ("b", "a")
