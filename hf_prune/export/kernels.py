"""An ONNX graph in the operators that ONNX Runtime's CPU kernels run fastest. Needs the onnx extra.

Two fused operators are taken apart again. `SkipLayerNormalization` (a residual sum and a layer norm): its kernel is
slower than the operators it stands for (`examples/onnx_residual_norms.py` says whether it still is). ONNX Runtime fuses
an `Add` and a `LayerNormalization` again when it opens a graph, but not a `Sum`. `Attention` with its projections
inside: dynamic quantisation skips it; taken out, the projections are a `MatMul` that is quantised like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from transformers.exporters import ExportFormat, ExportQuantizer

Parts = dict[int, ir.Value]  # what stands for an output, by its index


class CpuKernels(ExportQuantizer):
    """The exporter's hook between a graph and its quantisation: rewrites the graph, then quantises it with `then`."""

    supported_formats = (ExportFormat.ONNX,)

    def __init__(self, then: ExportQuantizer | None = None) -> None:
        super().__init__()
        self.then = then

    def quantize(self, model: ir.Model, sample_inputs: dict[str, Any], export_format: ExportFormat) -> ir.Model:
        take_apart(model, "SkipLayerNormalization", residual_norm)
        if self.then:
            take_apart(model, "Attention", projected_attention)
        ClearMetadataAndDocStringPass()(model)  # holds paths of the machine that exported
        return self.then.quantize(model, sample_inputs, export_format) if self.then else model


def take_apart(model: ir.Model, fused: str, parts: Callable[[ir.tape.Tape, ir.Node], Parts]) -> None:
    """Replace each `fused` operator of ONNX Runtime's own domain by what `parts` builds; without parts it stays."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("com.microsoft", fused):
            continue
        tape = ir.tape.Tape(model.graph)
        built = parts(tape, node)
        pairs = [(old, built[index]) for index, old in enumerate(node.outputs) if index in built]
        if not pairs:
            continue
        for old, new in pairs:
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, *zip(*pairs, strict=True))
    RemoveUnusedNodesPass()(model)


def residual_norm(tape: ir.tape.Tape, node: ir.Node) -> Parts:
    """SkipLayerNormalization(x, residual, scale, shift[, bias]) -> (normalized, _, _[, total])."""
    x, residual, scale, shift, bias = (*node.inputs, None)[:5]
    biased = x if bias is None else tape.op("Add", [x, bias])
    total = tape.op("Sum", [biased, residual])
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    normalized = tape.op("LayerNormalization", [total, scale, shift], {"axis": -1, "epsilon": epsilon})
    return {0: normalized, 3: total}


def projected_attention(tape: ir.tape.Tape, node: ir.Node) -> Parts:
    """Attention(x, weights, bias, mask, past, scores' bias) -> (attended); not where it has a mask or a past.

    weights: (hidden, q + k + v), a constant or a Concat of three.
    """
    x, weights, bias, mask, past, added = (*node.inputs, None, None, None)[:6]
    packed = _constant(weights)
    if packed is None or mask is not None or past is not None or len(node.outputs) > 1:
        return {}
    sizes = node.attributes.get_ints("qkv_hidden_sizes", [packed.shape[1] // 3] * 3)
    name = node.outputs[0].name
    projected = tape.op("MatMul", [x, tape.initializer(ir.tensor(packed), f"{name}_projections")])
    if bias is not None:
        projected = tape.op("Add", [projected, bias])
    lengths = tape.initializer(ir.tensor(np.array(sizes, np.int64)), f"{name}_sizes")
    parts = tape.op_multi_out("Split", [projected, lengths], {"axis": -1}, num_outputs=3)
    attributes = {key: node.attributes[key] for key in ("num_heads", "scale") if key in node.attributes}
    inputs = [*parts, None, None, added]
    return {0: tape.op("MultiHeadAttention", inputs, attributes, domain="com.microsoft")}


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of a constant, or of a Concat of constants; None for what only a run of the graph gives."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Concat":
        return None
    parts = [_constant(part) for part in node.inputs]
    known = [part for part in parts if part is not None]
    return np.concatenate(known, axis=node.attributes.get_int("axis")) if len(known) == len(parts) else None
