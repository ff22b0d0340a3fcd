"""Lists of tensors that lie in memory as far as there is room, and beyond that in a temporary file."""

from __future__ import annotations

import errno
import math
import tempfile
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from typing import Any, overload
from weakref import WeakSet, finalize

import torch
from torch import nn

from .offload import bytes_in_memory


class Shelf:
    """How many bytes of the tensors of all its lists may lie in memory."""

    def __init__(self, room: float = math.inf) -> None:
        self.room = room
        self._lists: WeakSet[Shelved] = WeakSet()

    @classmethod
    def beside(cls, model: nn.Module) -> Shelf:
        """As much room as the weights of a model that lie in memory take, and at least as its largest weight."""
        largest = max((p.numel() * p.element_size() for p in model.parameters()), default=0)
        return cls(max(bytes_in_memory(model), largest))

    def list(self, tensors: Iterable[torch.Tensor] = ()) -> Shelved:
        """A list of tensors; what it holds is let go with it."""
        made = Shelved(self)
        self._lists.add(made)
        made.extend(tensors)
        return made

    def has_room(self, size: int) -> bool:
        return sum(each.in_memory for each in self._lists) + size <= self.room


@dataclass(frozen=True)
class _Filed:
    """Where a tensor lies in a file, and what it was."""

    offset: int
    size: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Shelved(MutableSequence[torch.Tensor]):
    """Tensors, each in memory or in this list's file, which has no name and goes with the list.

    Raises:
        OSError: the disk of the temporary directory is full.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.slots: list[torch.Tensor | _Filed] = []
        self.in_memory = 0  # bytes
        self._file: Any = None
        self._end = 0

    def __len__(self) -> int:
        return len(self.slots)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Shelved: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | Shelved:
        if isinstance(index, slice):
            return self.shelf.list(self[i] for i in range(len(self))[index])
        slot = self.slots[index]
        return slot if isinstance(slot, torch.Tensor) else self._read(slot)

    def __setitem__(self, index: Any, value: Any) -> None:
        before = self.slots[index]
        self.in_memory -= _bytes(before)
        self.slots[index] = self._put(value, before)

    def __delitem__(self, index: Any) -> None:
        self.in_memory -= _bytes(self.slots[index])
        del self.slots[index]

    def insert(self, index: int, value: torch.Tensor) -> None:
        self.slots.insert(index, self._put(value))

    def _put(self, tensor: torch.Tensor, before: Any = None) -> torch.Tensor | _Filed:
        size = tensor.numel() * tensor.element_size()
        if self.shelf.has_room(size):
            self.in_memory += size
            return tensor
        again = isinstance(before, _Filed) and before.size >= size  # the place is free
        filed = _Filed(before.offset if again else self._end, size, tensor.shape, tensor.dtype, tensor.device)
        self._write(filed, tensor)
        self._end = max(self._end, filed.offset + size)
        return filed

    def _write(self, filed: _Filed, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the list is there)
                finalize(self, self._file.close)
            self._file.seek(filed.offset)
            rest = memoryview(flat.numpy())  # type: ignore[arg-type]
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                error.errno,
                f"No room for {filed.size / 2**20:.0f} MiB in {tempfile.gettempdir()}, where calibration states and "
                "old weights wait. Set TMPDIR to a directory with more, or give fewer calibration samples.",
            ) from error

    def _read(self, filed: _Filed) -> torch.Tensor:
        buffer = bytearray(filed.size)
        self._file.seek(filed.offset)
        rest = memoryview(buffer)
        while rest:
            rest = rest[self._file.readinto(rest) :]
        return torch.frombuffer(buffer, dtype=filed.dtype).view(filed.shape).to(filed.device)


def _bytes(slot: Any) -> int:
    return slot.numel() * slot.element_size() if isinstance(slot, torch.Tensor) else 0
