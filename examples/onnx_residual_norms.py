"""Is ONNX Runtime's SkipLayerNormalization still slower on a CPU than the operators it stands for?

    python examples/onnx_residual_norms.py

hf_prune.export.kernels takes it apart for that reason alone: where this prints ratios below 1, that can go.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from hf_prune.report.table import markdown

HIDDEN = 384
NORM = {"epsilon": 1e-12}
FUSED = [
    helper.make_node(
        "SkipLayerNormalization", ["x", "r", "scale", "shift", "bias"], ["y"], domain="com.microsoft", **NORM
    )
]
APART = [
    helper.make_node("Add", ["x", "bias"], ["biased"]),
    helper.make_node("Sum", ["biased", "r"], ["total"]),
    helper.make_node("LayerNormalization", ["total", "scale", "shift"], ["y"], axis=-1, **NORM),
]


def session(nodes: list[onnx.NodeProto], threads: int) -> onnxruntime.InferenceSession:
    shape = ["batch", "length", HIDDEN]
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.standard_normal(HIDDEN).astype(np.float32), name)
        for name in ("scale", "shift", "bias")
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "r")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "norm", inputs, [output], constants)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(sessions: dict[str, onnxruntime.InferenceSession], batch: int, length: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((batch, length, HIDDEN)).astype(np.float32) for name in ("x", "r")}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(220):
        for name, opened in sessions.items():
            started = time.perf_counter()
            opened.run(None, inputs)
            if run >= 20:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    rows = []
    for threads in (1, 2):
        sessions = {"fused": session(FUSED, threads), "apart": session(APART, threads)}
        for batch in (1, 32):
            found = seconds(sessions, batch, 64)
            rows.append(
                {"threads": str(threads), "shape": f"{batch} × 64 × {HIDDEN}"}
                | {f"{name}, µs": f"{1e6 * median:.0f}" for name, median in found.items()}
                | {"fused / apart": f"{found['fused'] / found['apart']:.2f}"}
            )
    print(f"onnxruntime {onnxruntime.__version__}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
