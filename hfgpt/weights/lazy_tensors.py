"""Tensors that stay in their files until they are read, one by one: no file is held in memory beside the model.

Memory maps would not do: their pages stay resident once read. `torch.load(mmap=True)` of 193 MB, copied tensor by
tensor, peaks at 389 MB instead of 249 MB; and it checks neither checksums nor that a tensor ends where its record does.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
        shape: of the tensor.
        dtype: of its numbers.
        read: gives the tensor, in memory of its own; raises a ValueError that names the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def read(tensor: LazyTensor | Tensor) -> Tensor:
    """A tensor, wherever it is."""
    return tensor.read() if isinstance(tensor, LazyTensor) else tensor


def in_file(
    file: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    stride: tuple[int, ...] | None = None,
    check: Callable[[np.ndarray], None] | None = None,
) -> LazyTensor:
    """A tensor whose numbers lie somewhere in a file, little-endian.

    Args:
        file: that holds it.
        offset: of its first number, in bytes.
        shape: of the tensor.
        dtype: of its numbers.
        stride: in numbers, where they do not lie row after row.
        check: called with its bytes when they are read; raises what is wrong with them.
    """

    def read() -> Tensor:
        count = prod(shape) if stride is None else extent(shape, stride)
        content = np.fromfile(file, dtype=np.uint8, count=count * dtype.itemsize, offset=offset)
        if content.size != count * dtype.itemsize:
            raise ValueError(f"{file}: ends too soon.")
        if check is not None:
            check(content)
        numbers = torch.from_numpy(content).view(dtype)
        return numbers.view(shape) if stride is None else numbers.as_strided(shape, stride)

    return LazyTensor(shape, dtype, read)


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many numbers lie from the first to the last one of a tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if prod(shape) else 0


def in_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged, or holds numbers of a type that torch does not have.
    """

    def read(name: str) -> Tensor:
        try:
            return opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}.") from error

    try:
        with safe_open(file, framework="pt") as mapped:  # no number of which is read
            shapes = {name: mapped.get_tensor(name) for name in mapped.keys()}
        opened = safe_open(file, framework="pt", backend="pread")
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}.") from error
    return {name: LazyTensor(tuple(each.shape), each.dtype, partial(read, name)) for name, each in shapes.items()}


def in_pickle(file: Path, allowed_classes: list[Any]) -> Any:
    """What `torch.save` wrote, with nothing in it executed; tensors in dictionaries are `LazyTensor`.

    Files from before PyTorch 1.6 are no archives, and their tensors are read at once. So are those of an archive that
    another program has packed again: torch reckons where its own packing would have put them.

    Args:
        file: to open.
        allowed_classes: what may be unpickled besides tensors and plain values, see `torch.serialization.safe_globals`.

    Raises:
        ValueError: it is damaged, wants to run something, or holds tensors that are no plain numbers.
    """
    if zipfile.is_zipfile(file):
        records = records_of(file)
        # Reads no number, and notes where they lie, as in PyTorch's tutorial on GPUDirect Storage:
        # https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html
        with FakeTensorMode():
            content = unpickled(file, allowed_classes)
        if all(lies_in(records, tensor) for tensor in plain_tensors(content, file)):
            return as_lazy(content, file)
    content = unpickled(file, allowed_classes)
    list(plain_tensors(content, file))
    return content


def unpickled(file: Path, allowed_classes: list[Any]) -> Any:
    """What `torch.load` makes of a file, in one line where it makes nothing of it."""
    try:
        with torch.serialization.safe_globals(allowed_classes):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {wanted.group(1)}" if wanted else "it is no file of torch.save's"
        raise ValueError(f"{file}: not opened, {reason}.") from error
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes lead the unpickler to
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise ValueError(f"{file}: damaged or no file of torch.save's: {reason}.") from error


def records_of(file: Path) -> dict[int, int]:
    """Where the data of each record of an archive begins, and how many bytes it has, once its checksum fits.

    Raises:
        ValueError: it is damaged, or something that `torch.save` does not write: compressed (a bomb, perhaps, and its
            tensors could not be read in place), longer inside than outside, encrypted or big-endian.
    """
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            records = archive.infolist()
            is_stored = all(each.compress_type == zipfile.ZIP_STORED for each in records)
            if not is_stored or sum(each.file_size for each in records) > file.stat().st_size:
                raise ValueError(f"{file}: a compressed archive; torch.save compresses nothing.")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{file}: {damaged} does not match its checksum.")
            for each in records:
                if each.filename.endswith("/byteorder") and archive.read(each) != b"little":
                    raise ValueError(f"{file}: big-endian; hfgpt reads little-endian files.")
            result = {}
            for each in records:
                stream.seek(each.header_offset + 26)
                lengths = int.from_bytes(stream.read(2), "little") + int.from_bytes(stream.read(2), "little")
                result[each.header_offset + 30 + lengths] = each.file_size
            return result
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{file}: {error}.") from error


def plain_tensors(content: Any, file: Path) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries.

    Raises:
        ValueError: one of them is not made of plain numbers.
    """
    if isinstance(content, dict):
        for value in content.values():
            yield from plain_tensors(value, file)
    elif isinstance(content, Tensor):
        if content.layout is not torch.strided or content.is_quantized or content.is_neg() or content.is_conj():
            raise ValueError(f"{file}: holds a tensor that is sparse, quantized or negated by a flag.")
        yield content


def lies_in(records: dict[int, int], tensor: Tensor) -> bool:
    """Whether a tensor without numbers lies, from its first to its last, in a record of an archive."""
    begin: Any = tensor.untyped_storage()._checkpoint_offset
    end: Any = tensor.storage_offset() + extent(tensor.shape, tensor.stride())
    return end * tensor.dtype.itemsize <= records.get(begin, -1)


def as_lazy(content: Any, file: Path) -> Any:
    """The same with a `LazyTensor` for every tensor without numbers, in nested dictionaries."""
    if isinstance(content, dict):
        return {key: as_lazy(value, file) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    begin: Any = content.untyped_storage()._checkpoint_offset
    begin += content.storage_offset() * content.dtype.itemsize
    stride = None if content.is_contiguous() else tuple(content.stride())
    return in_file(file, begin, tuple(content.shape), content.dtype, stride)
