"""References of operators: where they come from, how they are called, and what they must give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign import reference_file
from numpy.typing import NDArray

from trtq.errors import InputError
from trtq.graph import references

X = np.arange(6, dtype=np.float32).reshape(2, 3)
FLOATS = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, ["N", 3])


@pytest.fixture(autouse=True)
def no_references() -> Iterator[None]:
    yield
    references.use([])


def use(folder: Path, text: str) -> None:
    references.use([str(reference_file(folder, "import numpy as np\n" + text))])


def computed(outputs: str = "y", *inputs: NDArray | None, **attributes: object) -> dict[str, NDArray]:
    node = onnx.helper.make_node("Op", [""] * len(inputs), outputs.split(), "n", domain="d", **attributes)
    return references.compute(node, inputs, {"y": FLOATS})


def test_functions_are_found_by_their_names_and_helpers_are_left_alone(tmp_path: Path) -> None:
    use(tmp_path, "from math import sqrt\ndef _helper(x): return x\ndef Op(x): return _helper(x)")
    np.testing.assert_array_equal(computed("y", X)["y"], X)
    assert references.find("_helper") is None
    assert references.find("sqrt") is None


def test_a_dictionary_may_name_domains(tmp_path: Path) -> None:
    use(tmp_path, "REFERENCES = {'d::Op': lambda x: -x, 'Op': lambda x: x}")
    np.testing.assert_array_equal(computed("y", X)["y"], -X)
    assert references.find("Op", "other") is not references.find("Op", "d")


def test_a_later_file_and_the_users_own_count(tmp_path: Path) -> None:
    packaged = references.find("ROIAlign_TRT", "TRT")
    assert packaged is not None
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        reference_file(tmp_path / name, f"def ROIAlign_TRT(x): return {name!r}")
    references.use([str(tmp_path / name / "references.py") for name in ("one", "two")])
    found = references.find("ROIAlign_TRT", "TRT")
    assert found is not None
    assert found.function(1) == "two"
    references.use([])
    assert references.find("ROIAlign_TRT") == packaged


def test_attributes_are_keywords_and_inputs_left_out_are_none(tmp_path: Path) -> None:
    use(tmp_path, "def Op(x, y, *, i, f, s, l, t): assert y is None; return x + i + f + len(s) + l[0] + t")
    tensor = onnx.numpy_helper.from_array(np.ones(3, np.float32))
    registry = {"plugin_version": "1", "plugin_namespace": ""}
    found = computed("y", X, None, i=1, f=0.5, s="ab", l=[3], t=tensor, **registry)
    np.testing.assert_array_equal(found["y"], X + np.float32(7.5))


def test_scalars_and_arrays_in_any_layout_are_results(tmp_path: Path) -> None:
    use(tmp_path, "def Op(x): return x.sum(), x.T")
    found = computed("s t", X)
    assert (found["s"].shape, found["t"].shape) == ((), (3, 2))
    assert found["t"].flags.c_contiguous


def test_outputs_that_are_left_out_are_dropped(tmp_path: Path) -> None:
    use(tmp_path, "def Op(x): return x, x")
    node = onnx.helper.make_node("Op", ["x"], ["y", ""], "n")
    assert references.compute(node, [X], {}).keys() == {"y"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return x, x", "gives 2 outputs, the node has 1"),
        ("return ()", "gives 0 outputs"),
        ("return x[0]", r"gives the shape \[3\], where the model says \[\?, 3\]"),
        ("return x[:, :2]", r"gives the shape \[2, 2\]"),
        ("return x.astype(np.int32)", "gives int32, where the model says float32"),
        ("return x.astype(np.float64)", "gives float64, where the model says float32"),
        ("return 'x'", "gives str, not an array"),
        ("return x / missing", "fails on node 'n'[\\s\\S]*NameError[\\s\\S]*float32\\[2, 3\\]"),
        ("raise SystemError('no')", "SystemError: no"),
        ("x *= 2; return x", "read-only"),
    ],
)
def test_a_wrong_result_is_one_message(body: str, message: str, tmp_path: Path) -> None:
    use(tmp_path, f"def Op(x): {body}")
    with pytest.raises(InputError, match=message) as caught:
        computed("y", X)
    assert "references.py" in str(caught.value)


def test_a_result_of_which_the_model_says_nothing_has_a_type_that_plugins_have(tmp_path: Path) -> None:
    use(tmp_path, "def Op(x): return x.astype(np.float64)")
    with pytest.raises(InputError, match="float64, which TensorRT's plugins do not have"):
        computed("other", X)


def test_without_a_reference_the_message_says_how_to_give_one() -> None:
    with pytest.raises(InputError, match=r"'Op' \(node 'n'\)[\s\S]*--op-reference"):
        computed("y", X)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("REFERENCES = {}", "has no operator reference"),
        ("REFERENCES = {'Op': 1}", "has no operator reference"),
        ("REFERENCES = [1]", "has no operator reference"),
        ("x = 1", "has no operator reference"),
        ("import nothing_of_this_name", "does not import"),
        ("def", "does not import"),
    ],
)
def test_a_file_without_references_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        use(tmp_path, text)


def test_a_missing_file_and_one_that_is_not_pythons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        references.use([str(tmp_path / "nothing.py")])
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(InputError, match="not Python's"):
        references.use([str(tmp_path / "file.txt")])


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    found = [references.fingerprint()]
    for body in ("return x", "return -x"):
        use(tmp_path, f"def Op(x): {body}")
        found.append(references.fingerprint())
    assert len(set(found)) == 3
    references.use([])
    assert references.fingerprint() == found[0]
