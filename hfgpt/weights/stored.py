"""Tensors that lie in files and are read one by one, so that no file is ever held in memory beside the model.

Not by memory maps: what was once looked at stays resident, and a converted model would take its size twice.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
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
class Stored:
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


def read(tensor: Stored | Tensor) -> Tensor:
    """A tensor, wherever it is."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def in_safetensors(file: Path) -> dict[str, Stored]:
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
        result[name] = Stored(file, begin, tuple(entry["shape"]), SAFETENSORS_TYPES[entry["dtype"]])
    return result


def in_pickle(file: Path, allowed_classes: list[Any]) -> Any:
    """What `torch.save` wrote, with nothing in it executed; tensors in dictionaries are `Stored`.

    Files from before PyTorch 1.6 are no archives, and their tensors are read at once.

    Args:
        file: to open.
        allowed_classes: what may be unpickled besides tensors and plain values, see `torch.serialization.safe_globals`.

    Raises:
        ValueError: it is damaged, or wants to run something.
    """
    records = records_of(file) if zipfile.is_zipfile(file) else None
    try:
        with torch.serialization.safe_globals(allowed_classes):
            if records is None:
                return torch.load(file, map_location="cpu", weights_only=True)
            with FakeTensorMode():  # reads no numbers, and notes where they lie
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {wanted.group(1)}" if wanted else "it is no file of torch.save's"
        raise ValueError(f"{file}: not opened, {reason}.") from error
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes lead the unpickler to
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise ValueError(f"{file}: damaged or no file of torch.save's: {reason}.") from error
    return place(content, file, records)


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


def place(content: Any, file: Path, records: dict[int, int]) -> Any:
    """Say of every tensor in nested dictionaries where in the file it lies.

    Raises:
        ValueError: a tensor is of a kind that has no plain numbers, or longer than its record.
    """
    if isinstance(content, dict):
        return {key: place(value, file, records) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    if content.layout is not torch.strided or content.is_quantized or content.is_neg() or content.is_conj():
        raise ValueError(f"{file}: holds a tensor that is sparse, quantized or a view, and hfgpt reads plain ones.")
    begin: Any = content.untyped_storage()._checkpoint_offset
    extent = 1 + sum((size - 1) * step for size, step in zip(content.shape, content.stride(), strict=True))
    end = (content.storage_offset() + (extent if content.numel() else 0)) * content.dtype.itemsize
    if end > records.get(begin, 0):
        raise ValueError(f"{file}: a tensor of {tuple(content.shape)} is longer than its record.")
    stride = None if content.is_contiguous() else tuple(content.stride())
    begin += content.storage_offset() * content.dtype.itemsize
    return Stored(file, begin, tuple(content.shape), content.dtype, stride)
