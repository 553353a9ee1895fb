"""A graph's matrices as 8-bit integers."""

from typing import Any

import numpy as np


def compress_weights(graph: Any) -> int:
    """
    Replace every constant float matrix that *graph* multiplies by with int8 and one scale an output channel.

    Symmetric, round to nearest: q = round(w / s), s = max|w| / 127 over the channel. The CPU runtime keeps such
    matrices as int8, and may quantise what they are multiplied with as it goes. Returns how many were replaced.
    """
    from openvino import opset13

    replaced = 0
    for node in graph.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input(1).get_source_output()
        constant = source.get_node()
        if constant.get_type_name() != "Constant" or len(constant.shape) != 2:
            continue
        weights = np.array(constant.data, dtype=np.float32)
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        scale = np.maximum(np.abs(weights).max(axis=axis, keepdims=True), 1e-12) / 127.0
        quantised = np.clip(np.rint(weights / scale), -127, 127).astype(np.int8)
        back = opset13.convert(opset13.constant(quantised), "f32")
        node.input(1).replace_source_output(opset13.multiply(back, opset13.constant(scale)).output(0))
        replaced += 1
    graph.validate_nodes_and_infer_types()
    return replaced
