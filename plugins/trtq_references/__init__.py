"""NumPy references of TensorRT's plugins: what they compute, so that models that hold them run anywhere.

One module for each kind of operator, with functions that are named like the operators. Their inputs are the
node's, their keywords its attributes; float16 is simulated, so they see float32.
"""

from __future__ import annotations

MODULES = {
    "BatchedNMS_TRT": "batched_nms",
    "BatchedNMSDynamic_TRT": "batched_nms",
    "EfficientNMS_TRT": "efficient_nms",
    "EfficientNMS_ONNX_TRT": "efficient_nms",
    "GridSample": "grid_sample",
    "GroupNorm": "group_norm",
    "grid_sampler": "grid_sample",
    "InstanceNormalization_TRT": "instance_normalization",
    "MultiscaleDeformableAttnPlugin_TRT": "deformable_attention",
    "ROIAlign_TRT": "roi_align",
}
"""Operator -> the module that has a function of that name."""
