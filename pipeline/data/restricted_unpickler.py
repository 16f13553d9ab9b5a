"""Pickled OC20 records read without torch_geometric, torch or trust.

A pickle may name any function of any module and call it. Here every allowed name stands for a small class of
this file, and any other name is refused before anything of it runs. Tensors inside are pickles too (torch's
format before zip files); they are taken apart by the same rule and become numpy arrays.
"""

import io
import math
import pickle
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.records import PARSER_ERRORS
from molkd.pipeline.errors import DataError

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_DAMAGE_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, struct.error)
_NUMPY_DTYPE = re.compile(r"b1|[iu][1248]|f[248]")


class _Sealed(type):
    """Class of classes that a pickle cannot write attributes to."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the pickle changes {cls.__name__}.{name}")


class _Bag(metaclass=_Sealed):
    """Stands for torch_geometric's Data and its storage: keeps the state, does nothing."""

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dtype(metaclass=_Sealed):
    """Stands for numpy.dtype: plain numbers only, since object arrays hold further pickles."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_flags: object) -> None:
        if not _NUMPY_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r} is not a plain number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order = state[1]
        if byte_order in {"<", ">"}:
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Scalar(metaclass=_Sealed):
    """Stands for numpy's scalar(dtype, bytes)."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.dtype, count=1)[0]


class _Array(metaclass=_Sealed):
    """Stands for numpy's ndarray and _reconstruct; its state carries shape, dtype and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_args: object) -> None:
        self.array: NDArray[np.generic] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if is_fortran else "C")


class _Latin1(metaclass=_Sealed):
    """Stands for _codecs.encode, by which old protocols write bytes."""

    def __new__(cls, text: str, encoding: str) -> Any:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
        return text.encode("latin1")


class _Storage(metaclass=_Sealed):
    """Stands for torch.storage._load_from_bytes: the numbers of one tensor as a flat array."""

    def __new__(cls, blob: bytes) -> Any:
        return _load_storage(blob)


class _Tensor(metaclass=_Sealed):
    """Stands for torch._utils._rebuild_tensor_v2: a view of a storage, checked against its bounds."""

    def __new__(
        cls,
        storage: Any,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *_gradient_and_hooks: object,
    ) -> Any:
        if not isinstance(storage, np.ndarray):
            raise pickle.UnpicklingError("a tensor without storage")
        valid = len(size) == len(stride) and all(n >= 0 for n in (offset, *size, *stride))
        n_values = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if valid else -1
        if not valid or n_values > len(storage) or (n_values and last >= len(storage)):
            raise pickle.UnpicklingError(
                f"a tensor of shape {size} reaches outside its {len(storage)} numbers"
            )
        if n_values == 0:
            return np.empty(size, storage.dtype)
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


# What a numpy scalar in a pickle names, of numpy 1 and 2; torch's own restricted reader takes these too.
NUMPY_SCALARS: dict[str, type] = {
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray.scalar": _Scalar,
}
_RECORD_NAMES: dict[tuple[str, str], type] = {
    ("torch_geometric.data.data", "Data"): _Bag,
    ("torch_geometric.data.data", "DataEdgeAttr"): _Bag,
    ("torch_geometric.data.data", "DataTensorAttr"): _Bag,
    ("torch_geometric.data.storage", "GlobalStorage"): _Bag,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("collections", "OrderedDict"): dict,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Latin1,
}
_STORAGE_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _RECORD_NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed") from None


class _StorageUnpickler(pickle.Unpickler):
    """The pickles of a torch storage: no names but the storage types, and these only as data types."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "torch" or name not in _STORAGE_DTYPES:
            raise pickle.UnpicklingError(f"a tensor in it names {module}.{name}, which is not allowed")
        return _STORAGE_DTYPES[name]

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, n_values, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("an unusual tensor storage")
        return dtype, key, n_values


def _load_storage(blob: bytes) -> NDArray[np.generic]:
    """Read what torch.save wrote for one storage: five pickles, then the count and the numbers."""
    file = io.BytesIO(blob)
    magic, protocol, machine, storage, keys = (_StorageUnpickler(file).load() for _ in range(5))
    dtype, key, n_values = storage
    if (magic, protocol, keys) != (_TORCH_MAGIC, _TORCH_PROTOCOL, [key]) or not machine["little_endian"]:
        raise pickle.UnpicklingError("a tensor in it is not in torch's storage format")
    (n_stored,) = struct.unpack("<q", file.read(8))
    if n_stored != n_values:
        raise pickle.UnpicklingError(f"a tensor storage of {n_values} numbers holds {n_stored}")
    return np.frombuffer(blob, dtype, count=n_values, offset=file.tell())


def load_record(data: bytes, where: str) -> Mapping[str, Any]:
    """Return the attributes of a pickled torch_geometric Data object (PyG 1 or 2), tensors as numpy arrays.

    Parameters
    ----------
    data : the pickle
    where : file and key, for messages

    Raises
    ------
    DataError
        If the pickle is damaged, or asks for anything that such a record does not need; nothing has run then.
    """
    record = _load(data, where)
    state = record.state if isinstance(record, _Bag) else record
    if isinstance(state, dict) and isinstance(state.get("_store"), _Bag):  # PyG 2
        state = state["_store"].state
        state = state.get("_mapping") if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise DataError(
            f"{where}: expected a torch_geometric Data object, found something else. Use S2EF LMDB files."
        )
    return {str(k): v.array if isinstance(v, _Array) else v for k, v in state.items()}


def load_count(data: bytes, where: str) -> int:
    """Return the pickled whole number that S2EF LMDBs keep under ``length``."""
    count = _load(data, where)
    if isinstance(count, np.ndarray | np.generic):
        count = count.item()
    if not isinstance(count, int) or count < 0:
        raise DataError(
            f"{where}: expected a number of systems, found {type(count).__name__}. Copy the file again."
        )
    return count


def _load(data: bytes, where: str) -> Any:
    try:
        return _RecordUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{where}: refused to unpickle, {error}. Nothing was run. Use files written by OCP's or "
            "fairchem's S2EF preprocessing, from a source you trust."
        ) from error
    except _DAMAGE_ERRORS as error:
        raise DataError(
            f"{where}: damaged pickle ({type(error).__name__}: {error}). Copy the file again."
        ) from error
