"""One copy of the weights for the graphs of one model, which an exporter stores once for each.

A weight that a graph before has stored is read from that graph's file, and one that is another's transpose (the head of
a tied embedding) is made from it when ONNX Runtime opens the graph. Needs the onnx extra.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import onnx_ir as ir

from ..files import read_json

PAGE, LARGE = 4096, 2**20  # where a weight begins in its file, to be mapped into memory, and from which size
TURNED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # types of which a transpose is looked for
Stored = dict[tuple[str, str, str], ir.ExternalTensor]  # by type, shape and sha256 of what it holds


def share_weights(directory: Path) -> None:
    """Rewrite the graphs that `export.json` names, in their order, and the file of weights beside each."""
    stored: Stored = {}
    for entry in read_json(directory / "export.json")["components"].values():
        _rewrite(directory / entry["file"], stored)


def _rewrite(path: Path, stored: Stored) -> None:
    model = ir.load(path)
    data = path.with_name(f"{path.name}.data")
    fresh = data.with_name(f"{data.name}.tmp")
    with fresh.open("wb") as file:
        for value in list(model.graph.initializers.values()):
            if isinstance(value.const_value, ir.ExternalTensor):
                _place(model.graph, value, file, data, stored)
    os.replace(fresh, data)  # transformers opens this file also where no weight is left in it
    ir.save(model, path)


def _place(graph: ir.Graph, value: ir.Value, file: IO[bytes], data: Path, stored: Stored) -> None:
    """Let a weight be read from where it is stored, or store it here."""
    tensor = value.const_value
    assert tensor is not None
    held = tensor.tobytes()
    key = _key(tensor.dtype, tensor.shape.numpy(), held)
    turned = None if key in stored else _transpose_of(tensor, stored)
    if turned is not None:
        _turn(graph, value, turned)
        return
    if key not in stored:
        stored[key] = _append(file, data, tensor, held)
    value.const_value = _named(stored[key], value.name)


def _key(dtype: ir.DataType, shape: Sequence[int], held: bytes) -> tuple[str, str, str]:
    return dtype.name, str(tuple(shape)), hashlib.sha256(held).hexdigest()


def _transpose_of(tensor: ir.TensorProtocol, stored: Stored) -> ir.ExternalTensor | None:
    """The stored weight of which this one is the transpose."""
    shape = tensor.shape.numpy()
    if len(shape) != 2 or tensor.dtype not in TURNED:
        return None
    return stored.get(_key(tensor.dtype, shape[::-1], tensor.numpy().T.tobytes()))


def _append(file: IO[bytes], data: Path, tensor: ir.TensorProtocol, held: bytes) -> ir.ExternalTensor:
    file.write(b"\0" * (-file.tell() % (PAGE if len(held) >= LARGE else 64)))
    offset = file.tell()
    file.write(held)
    given = {"shape": tensor.shape, "name": tensor.name, "base_dir": data.parent}
    return ir.ExternalTensor(data.name, offset, len(held), tensor.dtype, **given)


def _named(tensor: ir.ExternalTensor, name: str | None) -> ir.ExternalTensor:
    """The same place under the name that this graph has for it."""
    given = {"shape": tensor.shape, "name": name, "base_dir": tensor.base_dir}
    return ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, **given)


def _turn(graph: ir.Graph, value: ir.Value, tensor: ir.ExternalTensor) -> None:
    """Let a weight be made from its stored transpose."""
    name = f"{value.name}_transposed"
    source = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=_named(tensor, name))
    node = ir.node("Transpose", [source], {"perm": [1, 0]})
    output = node.outputs[0]
    output.shape, output.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, output)
    del graph.initializers[str(value.name)]
    graph.register_initializer(source)
    output.name = value.name
    graph.insert_before(graph[0], node)
