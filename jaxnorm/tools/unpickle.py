"""torch's .pth files without torch, and without running what they say.

A pickle is a program: it may name any function and call it. Here it may name the few things that a state_dict is made
of, and gets stand-ins of ours for them. The stand-ins are strings and objects without attributes, so that the program
cannot change them either. Any other name is refused, and nothing is called.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxnorm.errors import ArgumentError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6
MOST = 10**6  # a few lists that hold one another many times are more than a machine can hold
# So are tensors that repeat few numbers: what all of them may be in bytes, and how many times the file.
ROOM, TIMES = 2**30, 16
DTYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
    # these have no storage of their own: untyped bytes, and the dtype beside them
    "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "float8_e4m3fn": "float8_e4m3fn",
    "float8_e4m3fnuz": "float8_e4m3fnuz", "float8_e5m2": "float8_e5m2", "float8_e5m2fnuz": "float8_e5m2fnuz",
}  # fmt: skip


def torch_file(path: Path) -> Any:
    """What torch.save wrote: dicts and lists of NumPy arrays (read-only), numbers and text."""
    room = ROOM + TIMES * path.stat().st_size
    if not zipfile.is_zipfile(path):
        return _plain(_legacy(path), room)
    with zipfile.ZipFile(path) as archive:
        return _plain(_zipped(archive), room)


def _zipped(archive: zipfile.ZipFile) -> Any:
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ArgumentError("it is a zip file without torch's data.pkl.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ArgumentError("its zip file is compressed: torch.save does not do that.")  # it might unpack to any size
    if f"{roots[0]}byteorder" in archive.namelist():
        _need_little(archive.read(f"{roots[0]}byteorder") == b"little")
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, count: int, itemsize: int) -> np.ndarray:
        if key not in storages:
            storages[key] = np.frombuffer(archive.read(f"{roots[0]}data/{key}"), np.uint8)
        return storages[key]

    return _Unpickler(io.BytesIO(archive.read(f"{roots[0]}data.pkl")), storage).load()


def _legacy(path: Path) -> Any:
    """Five pickles, then the bytes of all storages. The tensors of the fourth are views of what is filled at last."""
    storages: dict[str, tuple[np.ndarray, int]] = {}
    limit = path.stat().st_size

    def storage(key: str, count: int, itemsize: int) -> np.ndarray:
        if count * itemsize > limit:
            raise ArgumentError(f"storage {key!r} is larger than the file.")
        return storages.setdefault(key, (np.zeros(count * itemsize, np.uint8), count))[0]

    with path.open("rb") as file:
        if MAGIC.to_bytes(10, "little") not in file.read(32):
            raise ArgumentError("it is not a torch file, or its end is missing.")
        file.seek(0)
        _, _, system, result, keys = (_Unpickler(file, storage).load() for _ in range(5))
        _need_little(system["little_endian"])
        for key in keys:
            buffer, count = storages[key]
            if int.from_bytes(file.read(8), "little") != count or file.readinto(buffer.data) != buffer.size:
                raise ArgumentError(f"storage {key!r} is cut off, or not of the size that its tensors have.")
        if storages.keys() - set(keys):
            raise ArgumentError("it names storages that it does not hold.")
    return result


def _need_little(little: bool) -> None:
    if not little:
        raise ArgumentError("its numbers have the high byte first. Save it again on an ordinary machine.")


class _Tensor:
    """torch._utils._rebuild_tensor and its kin: a view of a storage, inside its bounds."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> np.ndarray:
        if not isinstance(storage, np.ndarray):
            raise ArgumentError("a tensor without a storage.")
        if len(rest) > 2 and isinstance(rest[2], str):  # _v3: requires_grad, hooks, dtype
            storage = _viewed(storage, rest[2])
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise ArgumentError(f"a tensor of size {size} and stride {stride} at {offset}.")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= storage.size:
            raise ArgumentError(f"a tensor of size {size} and stride {stride} at {offset} leaves its storage.")
        steps = [step * storage.itemsize for step in stride]
        start = storage[offset:] if math.prod(size) else storage[:0]
        return np.lib.stride_tricks.as_strided(start, tuple(size), steps, writeable=False)


class _First:
    """torch._utils._rebuild_parameter: the tensor that it holds."""

    __slots__ = ()

    def __call__(self, tensor: Any, *rest: Any) -> Any:
        return tensor


class _Tuple:
    """torch.Size."""

    __slots__ = ()

    def __call__(self, sizes: Any = ()) -> tuple:
        return tuple(sizes)


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": _Tuple(),
    "torch._utils._rebuild_tensor": _Tensor(),
    "torch._utils._rebuild_tensor_v2": _Tensor(),
    "torch._utils._rebuild_tensor_v3": _Tensor(),
    "torch._utils._rebuild_parameter": _First(),
    "torch._utils._rebuild_parameter_with_state": _First(),
    "torch.storage.UntypedStorage": "UntypedStorage",
    **{f"torch.{name}": name for name in DTYPES},
}


class _Unpickler(pickle._Unpickler):  # Python's own, not C's, whose memo a file can make as large as it likes
    def __init__(self, file: Any, storage: Callable[[str, int, int], np.ndarray]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in KNOWN:
            raise ArgumentError(
                f"it asks for {module}.{name}, which no state_dict needs: not called. "
                "Save model.state_dict(), or load it with torch where you trust it."
            )
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, name, key, _, count, *view = pid
        if kind != "storage" or name not in DTYPES or type(count) is not int or count < 0:
            raise ArgumentError(f"a storage {pid!r}.")
        itemsize = _dtype(name).itemsize
        buffer = _viewed(self._storage(str(key), count, itemsize), name)
        if view and view[0] is not None:  # a part of another storage, in files before torch 0.4
            _, start, count = view[0]
            buffer = buffer[start : start + count]
        if buffer.size < count:
            raise ArgumentError(f"storage {key!r} is cut off: {buffer.size} of {count} numbers.")
        return buffer


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, DTYPES[name], DTYPES[name]))


def _viewed(buffer: np.ndarray, name: str) -> np.ndarray:
    return buffer[: buffer.size // _dtype(name).itemsize * _dtype(name).itemsize].view(_dtype(name))


def _plain(value: Any, room: int) -> Any:
    """Containers of ours: an OrderedDict may carry attributes that the file gave it."""
    count = size = 0

    def copy(value: Any) -> Any:
        nonlocal count, size
        count += 1
        size += value.nbytes if isinstance(value, np.ndarray) else 0
        if count > MOST:
            raise ArgumentError(f"it holds more than {MOST} things.")
        if size > room:
            raise ArgumentError(f"its tensors repeat its numbers to more than {room} bytes.")
        if isinstance(value, dict):
            return {key: copy(part) for key, part in dict.items(value)}
        return type(value)([copy(part) for part in value]) if type(value) in (list, tuple) else value

    return copy(value)
