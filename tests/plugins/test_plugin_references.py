"""The references of TensorRT's plugins, against ONNX's and PyTorch's operators and values worked by hand."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import onnx
import pytest
import torch
import trtq_references
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from trtq_references.batched_nms import BatchedNMS_TRT, BatchedNMSDynamic_TRT
from trtq_references.deformable_attention import MultiscaleDeformableAttnPlugin_TRT
from trtq_references.efficient_nms import EfficientNMS_ONNX_TRT, EfficientNMS_TRT
from trtq_references.grid_sample import GridSample, grid_sampler
from trtq_references.instance_normalization import InstanceNormalization_TRT
from trtq_references.roi_align import ROIAlign_TRT

F = np.float32


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_boxes(*shape: int, seed: int = 0) -> NDArray:
    corner = rng(seed).uniform(0, 0.7, (*shape, 2))
    return np.concatenate([corner, corner + rng(seed + 1).uniform(0.1, 0.3, (*shape, 2))], -1).astype(F)


def onnx_operator(op: str, inputs: dict[str, NDArray], opset: int, **attributes: object) -> NDArray:
    """ONNX's own operator, by the reference evaluator."""
    node = onnx.helper.make_node(op, list(inputs), ["y"], **attributes)
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    graph = onnx.helper.make_graph([node], "g", values, [onnx.ValueInfoProto(name="y")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, inputs)[0]


def onnx_nms(boxes: NDArray, scores: NDArray, most: int, iou: float, score: float, center: int) -> set:
    """Image, class and box of each detection by ONNX's NonMaxSuppression; scores (batch, boxes, classes)."""
    inputs = {
        "boxes": boxes,
        "scores": scores.transpose(0, 2, 1).copy(),
        "most": np.array([most], np.int64),
        "iou": np.array([iou], F),
        "score": np.array([score], F),
    }
    found = onnx_operator("NonMaxSuppression", inputs, 11, center_point_box=center)
    return {tuple(int(v) for v in row) for row in found}


def test_every_listed_operator_has_its_function() -> None:
    for operator, module in trtq_references.MODULES.items():
        function = getattr(importlib.import_module(f"trtq_references.{module}"), operator)
        assert callable(function)
        assert inspect.getmodule(function).__doc__  # type: ignore[union-attr]


# -- EfficientNMS_TRT


def test_efficient_nms_by_hand() -> None:
    """Of class 0 the second box overlaps the first by 1/2 and goes; class 1 is on its own."""
    boxes = np.array([[[0, 0, 2, 2], [0, 1, 2, 2], [3, 3, 4, 4]]], F)
    scores = np.array([[[0.9, 0.3], [0.8, 0.7], [0.2, 0.6]]], F)
    numbers, found, values, labels = EfficientNMS_TRT(
        boxes, scores, score_threshold=0.25, iou_threshold=0.5, max_output_boxes=5
    )
    assert numbers.tolist() == [[3]]
    assert labels.tolist() == [[0, 1, 1, 0, 0]]
    assert values.tolist() == [[F(0.9), F(0.7), F(0.6), 0, 0]]
    assert found.tolist() == [[[0, 0, 2, 2], [0, 1, 2, 2], [3, 3, 4, 4], [0] * 4, [0] * 4]]
    assert [a.dtype for a in (numbers, found, values, labels)] == [np.int32, F, F, np.int32]


def test_efficient_nms_across_classes_keeps_the_best_of_an_overlap() -> None:
    boxes, scores = np.array([[[0, 0, 1, 1], [0, 0, 1, 1]]], F), np.array([[[0.5, 0.1], [0.1, 0.9]]], F)
    arguments = {"score_threshold": 0.3, "iou_threshold": 0.5, "max_output_boxes": 2}
    numbers, _, values, labels = EfficientNMS_TRT(boxes, scores, class_agnostic=1, **arguments)
    assert (numbers.tolist(), values[0, 0], labels[0, 0]) == ([[1]], F(0.9), 1)
    assert EfficientNMS_TRT(boxes, scores, **arguments)[0].tolist() == [[2]]
    assert EfficientNMS_TRT(boxes, scores, background_class=1, **arguments)[3].tolist() == [[0, 0]]


def test_efficient_nms_takes_logits_and_centers() -> None:
    """A box of center (1, 1) and size (2, 4) reaches from (0, -1) to (2, 3); the sigmoid of 0 is 1/2."""
    boxes, scores = np.array([[[1, 1, 2, 4]]], F), np.zeros((1, 1, 1), F)
    _, found, values, _ = EfficientNMS_TRT(
        boxes, scores, score_threshold=0.4, score_activation=1, box_coding=1, max_output_boxes=1
    )
    assert (found.tolist(), values.tolist()) == ([[[0, -1, 2, 3]]], [[0.5]])


def test_efficient_nms_decodes_with_anchors() -> None:
    """The center moves by 0.5 of the anchor's size, (2, 2) -> (3, 3); the size grows by e^0 = 1 and by 2."""
    raw, anchors = np.array([[[0.5, 0.5, 0, np.log(2)]]], F), np.array([[[2, 2, 2, 2]]], F)
    _, found, _, _ = EfficientNMS_TRT(raw, np.ones((1, 1, 1), F), anchors, box_coding=1, max_output_boxes=1)
    np.testing.assert_allclose(found, [[[2, 1, 4, 5]]], rtol=1e-6)
    corners, anchors = np.array([[[0.1, 0.2, 0.3, 0.4]]], F), np.array([[[1, 2, 3, 4]]], F)
    _, found, _, _ = EfficientNMS_TRT(corners, np.ones((1, 1, 1), F), anchors, max_output_boxes=1)
    np.testing.assert_allclose(found, [[[1.1, 2.2, 3.3, 4.4]]], rtol=1e-6)


@pytest.mark.parametrize("center", [0, 1])
def test_efficient_nms_keeps_what_onnx_keeps(center: int) -> None:
    boxes, scores = random_boxes(2, 40), rng(2).uniform(0, 1, (2, 40, 3)).astype(F)
    expected = onnx_nms(boxes, scores, 100, 0.4, 0.3, center)
    rows = EfficientNMS_ONNX_TRT(
        boxes,
        scores,
        max_output_boxes_per_class=100,
        iou_threshold=0.4,
        score_threshold=0.3,
        center_point_box=center,
    )
    assert rows.shape == (200, 3)
    assert rows.dtype == np.int32
    assert {tuple(row) for row in rows.tolist()} == expected
    numbers, _, values, _ = EfficientNMS_TRT(
        boxes, scores, iou_threshold=0.4, score_threshold=0.3, max_output_boxes=120, box_coding=center
    )
    for image in range(2):
        kept = sorted((float(scores[i, b, c]) for i, c, b in expected if i == image), reverse=True)
        assert numbers[image] == len(kept)
        np.testing.assert_array_equal(values[image, : len(kept)], np.array(kept, F))


def test_efficient_nms_without_boxes() -> None:
    empty, scores = np.zeros((2, 0, 4), F), np.zeros((2, 0, 3), F)
    numbers, found, _, _ = EfficientNMS_TRT(empty, scores, max_output_boxes=2)
    assert numbers.tolist() == [[0], [0]]
    assert found.shape == (2, 2, 4)


def test_efficient_nms_onnx_without_detections() -> None:
    rows = EfficientNMS_ONNX_TRT(random_boxes(1, 3), np.zeros((1, 3, 2), F), max_output_boxes_per_class=2)
    assert rows.tolist() == [[-1, -1, -1]] * 2


# -- BatchedNMS_TRT

LIMITS = {"numClasses": 2, "topK": 10, "keepTopK": 3, "scoreThreshold": 0.25, "iouThreshold": 0.5}


def test_batched_nms_by_hand() -> None:
    """The second box overlaps the first by 1/2, which is not more than the threshold."""
    boxes = np.array([[[[0, 0, 0.5, 0.5]], [[0, 0.25, 0.5, 0.5]], [[0.3, 0.3, 0.4, 1.4]]]], F)
    scores = np.array([[[0.9, 0.1], [0.8, 0.2], [0.2, 0.6]]], F)
    numbers, found, values, labels = BatchedNMSDynamic_TRT(boxes, scores, **LIMITS)
    assert numbers.tolist() == [[3]]
    np.testing.assert_array_equal(values, np.array([[0.9, 0.8, 0.6]], F))
    assert labels.tolist() == [[0, 0, 1]]
    np.testing.assert_array_equal(found[0, 2], np.array([0.3, 0.3, 0.4, 1.0], F))
    assert BatchedNMSDynamic_TRT(boxes, scores, **LIMITS, clipBoxes=0)[1][0, -1].max() == F(1.4)
    tight = LIMITS | {"iouThreshold": 0.45}
    numbers, found, values, labels = BatchedNMSDynamic_TRT(boxes, scores, **tight)
    assert (numbers.tolist(), labels.tolist(), values[0, 2]) == ([[2]], [[0, 1, -1]], 0)
    assert [a.dtype for a in (numbers, found, values, labels)] == [np.int32, F, F, F]


def test_batched_nms_of_pixels_counts_the_last_one() -> None:
    """3 x 1 and 3 x 3 pixels share 3 x 1: 1/3; without the last pixels it would be nothing."""
    boxes = np.array([[[[0, 0, 2, 2]], [[0, 1, 2, 1]]]], F)
    scores = np.array([[[0.9], [0.8]]], F)
    one = {"numClasses": 1, "topK": 2, "keepTopK": 2, "scoreThreshold": 0.1, "iouThreshold": 0.3}
    numbers = [
        int(BatchedNMS_TRT(boxes, scores, **one, isNormalized=normalized)[0][0, 0]) for normalized in (0, 1)
    ]
    assert numbers == [1, 2]


@pytest.mark.parametrize("shared", [0, 1])
def test_batched_nms_keeps_what_onnx_keeps(shared: int) -> None:
    boxes, scores = random_boxes(2, 30, 1 if shared else 2), rng(3).uniform(0, 1, (2, 30, 2)).astype(F)
    numbers, _, values, labels = BatchedNMSDynamic_TRT(
        boxes,
        scores,
        shareLocation=shared,
        numClasses=2,
        topK=30,
        keepTopK=60,
        scoreThreshold=0.2,
        iouThreshold=0.35,
    )
    for label in range(2):
        own = np.ascontiguousarray(boxes[:, :, 0 if shared else label])
        expected = onnx_nms(own, scores[:, :, label : label + 1].copy(), 30, 0.35, 0.2, 0)
        for image in range(2):
            counted = (labels[image] == label) & (np.arange(60) < numbers[image])
            kept = {float(scores[i, b, label]) for i, _, b in expected if i == image}
            assert set(values[image][counted].tolist()) == kept


# -- ROIAlign_TRT


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_onnx_roi_align(shift: int, ratio: int) -> None:
    features = rng().normal(0, 1, (2, 3, 12, 10)).astype(F)
    regions = np.array([[0, 0, 14, 15], [3.3, 4.1, 9.9, 19], [-4, -4, 30, 30], [5, 5, 5.2, 5.4]], F)
    images = np.array([0, 1, 1, 0], np.int64)
    words = {1: "half_pixel", 0: "output_half_pixel"}
    sizes = {"output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.5}
    expected = onnx_operator(
        "RoiAlign",
        {"x": features, "rois": regions, "of": images},
        16,
        coordinate_transformation_mode=words[shift],
        mode="avg",
        **sizes,
    )
    found = ROIAlign_TRT(features, regions, images, coordinate_transformation_mode=shift, **sizes)
    assert found.dtype == F
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_roi_align_takes_the_largest_weighted_pixel() -> None:
    """One point between 1, 2, 3 and 4, each a quarter: 4 / 4."""
    features = np.array([[[[1, 2], [3, 4]]]], F)
    region = np.array([[0, 0, 2, 2]], F)
    found = ROIAlign_TRT(features, region, np.zeros(1, np.int32), mode=0, sampling_ratio=1)
    assert found.tolist() == [[[[1.0]]]]


# -- MultiscaleDeformableAttnPlugin_TRT


def test_deformable_attention_is_the_sum_of_sampled_maps() -> None:
    """As its authors define it: `grid_sample` of each map, weighted and summed."""
    batch, queries, heads, channels, points = 2, 5, 3, 4, 2
    shapes = np.array([[6, 4], [3, 2]], np.int32)
    sizes = shapes.prod(axis=1)
    value = rng().normal(0, 1, (batch, sizes.sum(), heads, channels)).astype(F)
    places = rng(1).uniform(-0.2, 1.2, (batch, queries, heads, 2, points, 2)).astype(F)
    weights = rng(2).uniform(0, 1, (batch, queries, heads, 2, points)).astype(F)
    starts = np.array([0, sizes[0]], np.int32)
    sampled = []
    for level, (part, (height, width)) in enumerate(zip(np.split(value, [sizes[0]], 1), shapes, strict=True)):
        maps = part.transpose(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = (2 * places[:, :, :, level] - 1).transpose(0, 2, 1, 3, 4).reshape(-1, queries, points, 2)
        sampled.append(
            torch.nn.functional.grid_sample(
                torch.from_numpy(maps.copy()), torch.from_numpy(grid.copy()), align_corners=False
            ).numpy()
        )
    shares = weights.transpose(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, 2, points)
    expected = (np.stack(sampled, -2) * shares).sum(axis=(-1, -2))
    expected = expected.reshape(batch, heads, channels, queries).transpose(0, 3, 1, 2)
    found = MultiscaleDeformableAttnPlugin_TRT(value, shapes, starts, places, weights)
    assert found.dtype == F
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# -- InstanceNormalization_TRT


@pytest.mark.parametrize("as_inputs", [False, True])
@pytest.mark.parametrize("spatial", [(5, 4), (2, 3, 4)])
def test_instance_normalization_is_pytorchs(as_inputs: bool, spatial: tuple[int, ...]) -> None:
    values = rng().normal(3, 2, (2, 3, *spatial)).astype(F)
    scale, bias = rng(1).normal(1, 0.2, (2, 3)).astype(F)
    expected = torch.nn.functional.instance_norm(
        torch.from_numpy(values), weight=torch.from_numpy(scale), bias=torch.from_numpy(bias), eps=1e-3
    )
    given = {} if as_inputs else {"scales": scale.tolist(), "bias": bias.tolist()}
    inputs = (scale, bias) if as_inputs else ()
    found = InstanceNormalization_TRT(values, *inputs, epsilon=1e-3, **given)
    assert found.dtype == F
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    leaky = InstanceNormalization_TRT(values, *inputs, epsilon=1e-3, relu=1, alpha=0.1, **given)
    expected = torch.nn.functional.leaky_relu(expected, 0.1)
    np.testing.assert_allclose(leaky, expected.numpy(), rtol=1e-4, atol=1e-5)


# -- GridSample


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [0, 1])
def test_grid_sample_is_pytorchs(mode: str, padding: str, align: int) -> None:
    values = rng().normal(0, 1, (2, 3, 5, 7)).astype(F)
    grid = rng(1).uniform(-1.8, 1.8, (2, 4, 6, 2)).astype(F)
    expected = torch.nn.functional.grid_sample(
        torch.from_numpy(values),
        torch.from_numpy(grid),
        mode=mode,
        padding_mode=padding,
        align_corners=bool(align),
    ).numpy()
    found = GridSample(values, grid, mode=mode, padding_mode=padding, align_corners=align)
    assert found.dtype == F
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    numbers = {"bilinear": 0, "nearest": 1, "zeros": 0, "border": 1, "reflection": 2}
    by_number = grid_sampler(
        values,
        grid,
        interpolation_mode=numbers[mode],
        padding_mode=numbers[padding],
        align_corners=align,
    )
    np.testing.assert_array_equal(found, by_number)


def test_grid_sample_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="bicubic is not supported"):
        GridSample(np.ones((1, 1, 2, 2), F), np.zeros((1, 1, 1, 2), F), mode="bicubic")
