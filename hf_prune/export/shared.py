"""One copy of the weights for the graphs of one model, which an exporter stores once for each.

A weight that a graph before has stored is read from that graph's file. Needs the onnx extra.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import onnx_ir as ir

from ..files import read_json

LARGE, PAGE, LINE = 2**20, 4096, 64  # large weights begin at a page, so that they can be mapped; others at a cache line
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
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _place(value, file, data, stored)
    os.replace(fresh, data)  # transformers opens this file also where no weight is left in it
    ir.save(model, path)


def _place(value: ir.Value, file: IO[bytes], data: Path, stored: Stored) -> None:
    """Let a weight be read from where it is stored, or store it here."""
    tensor = value.const_value
    assert tensor is not None
    held = tensor.tobytes()
    key = _key(tensor.dtype, tensor.shape.numpy(), held)
    if key not in stored:
        stored[key] = _append(file, data, tensor, held)
    value.const_value = _named(stored[key], value.name)


def _key(dtype: ir.DataType, shape: Sequence[int], held: bytes) -> tuple[str, str, str]:
    return dtype.name, str(tuple(shape)), hashlib.sha256(held).hexdigest()


def _append(file: IO[bytes], data: Path, tensor: ir.TensorProtocol, held: bytes) -> ir.ExternalTensor:
    file.write(b"\0" * (-file.tell() % (PAGE if len(held) >= LARGE else LINE)))
    offset = file.tell()
    file.write(held)
    return _at(data, offset, len(held), tensor, tensor.name)


def _named(tensor: ir.ExternalTensor, name: str | None) -> ir.ExternalTensor:
    """The same place under the name that this graph has for it."""
    return _at(Path(tensor.path), tensor.offset or 0, tensor.length or 0, tensor, name)


def _at(data: Path, offset: int, length: int, like: ir.TensorProtocol, name: str | None) -> ir.ExternalTensor:
    shape = ir.Shape(like.shape.numpy())
    return ir.ExternalTensor(data.name, offset, length, like.dtype, shape=shape, name=name or "", base_dir=data.parent)
