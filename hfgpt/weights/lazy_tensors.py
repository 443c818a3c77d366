"""Tensors that lie in files and are read one by one, so that no file is ever held in memory beside the model.

Not by memory maps: what was once looked at stays resident, and a converted model would take its size twice.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# What safetensors calls the types of numbers that weights come in.
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, little-endian.

    Attributes:
        file: that holds it.
        offset: of its first number, in bytes.
        shape: of the tensor.
        dtype: of its numbers.
        stride: in numbers, where they do not lie row after row.
        check: called with its bytes when they are read; raises what is wrong with them.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    check: Callable[[np.ndarray], None] | None = None

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        count = prod(self.shape)
        if self.stride is not None and count:
            count = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        content = np.fromfile(self.file, dtype=np.uint8, count=count * self.dtype.itemsize, offset=self.offset)
        if content.size != count * self.dtype.itemsize:
            raise ValueError(f"{self.file}: ends too soon.")
        if self.check is not None:
            self.check(content)
        numbers = torch.from_numpy(content).view(self.dtype)
        return numbers.view(self.shape) if self.stride is None else numbers.as_strided(self.shape, self.stride)


def read(tensor: LazyTensor | Tensor) -> Tensor:
    """A tensor, wherever it is."""
    return tensor.read() if isinstance(tensor, LazyTensor) else tensor


def in_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged, or holds numbers of a type that no weights have.
    """
    try:
        with safe_open(file, framework="pt"):
            pass  # checks the header: sizes, order, no gaps
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}.") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"{file}: {name} is {entry['dtype']}; weights are {', '.join(SAFETENSORS_TYPES)}.")
        begin = 8 + size + entry["data_offsets"][0]
        result[name] = LazyTensor(file, begin, tuple(entry["shape"]), SAFETENSORS_TYPES[entry["dtype"]])
    return result


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
        with FakeTensorMode():  # reads no numbers, and notes where they lie
            content = unpickled(file, allowed_classes)
        if all(lies_in(records, tensor) for tensor in plain_tensors(content, file)):
            return place(content, file)
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
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end: Any = tensor.storage_offset() + (extent if tensor.numel() else 0)
    return end * tensor.dtype.itemsize <= records.get(begin, -1)


def place(content: Any, file: Path) -> Any:
    """Say of every tensor in nested dictionaries where in the file it lies."""
    if isinstance(content, dict):
        return {key: place(value, file) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    begin: Any = content.untyped_storage()._checkpoint_offset
    begin += content.storage_offset() * content.dtype.itemsize
    stride = None if content.is_contiguous() else tuple(content.stride())
    return LazyTensor(file, begin, tuple(content.shape), content.dtype, stride)
