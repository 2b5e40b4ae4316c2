"""What torch.save wrote, read without torch and without running anything that is in the file. numpy only.

The format is a zip archive of `data.pkl`, a pickle that names storages, and the storages' bytes as `data/0`, `data/1`,
... A pickle is a program. Here it may call what puts tensors and numpy arrays together, all of it below; every other
name in it stands for `Unreadable`, which ignores what it is called with.
"""

import math
import pickle
import pickletools
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError, first_line

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that files of torch before 1.6 begin with
MAX_EXPANDED = 1 << 20  # elements of an expanded tensor, which may be more than its storage has
MAX_DIMENSIONS = 32
ELEMENTS = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2", "int64": "i8", "int32": "i4", "int16": "i2",
    "int8": "i1", "uint8": "u1", "bool": "?", "uint16": "u2", "uint32": "u4", "uint64": "u8",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip


NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")


class Element(NamedTuple):
    """A torch dtype by its name in torch, or the dtype of a class of storages."""

    name: str


class Unreadable:
    """Stands for every object of a class that is not known here; does nothing and keeps nothing."""

    def __init__(self, *args: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """What a pickle does to a list."""

    def extend(self, values: object) -> None:
        """What a pickle does to a list."""


class NumpyDtype:
    """The dtype of a numpy array in a pickle, of plain numbers alone."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code if code in NUMPY_CODES else "V")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """A numpy array in a pickle, where it is made empty and filled by its state."""

    array: NDArray[Any] | None = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, of, is_fortran, data = state
        if isinstance(of, NumpyDtype) and isinstance(data, bytes) and of.dtype.kind != "V":
            self.array = np.frombuffer(data, of.dtype).reshape(shape, order="F" if is_fortran else "C")


class Storage(NamedTuple):
    """The elements of one storage, flat, and what they are in torch."""

    values: NDArray[Any]
    element: str


def is_torch_file(path: Path) -> bool:
    """Whether a file is what torch.save or torch.jit.save wrote, in the zip format or the one before."""
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start == LEGACY:
        return True
    if start[:2] != b"PK":
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except (BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_torch(path: Path) -> Any:
    """The object in a file of torch.save: dicts, lists and plain values, with numpy arrays for tensors.

    bfloat16 becomes float32. numpy arrays are read where they are the object itself or in its dict, as null where they
    hold other than numbers. Objects of other classes become `Unreadable`; nothing in the file is run. Raises InputError
    for files of torch before 1.6, TorchScript, damaged files, and tensors that reach outside their storage.
    """
    with path.open("rb") as file:
        if file.read(len(LEGACY)) == LEGACY:
            raise InputError(f"{path.name} is in the format of torch before 1.6; load and save it with a newer torch")
    try:
        with ZipFile(path) as archive:
            return _read_archive(path.name, archive)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may raise anything at all
        raise InputError(f"{path.name} is a damaged file of torch.save: {first_line(error)}") from None


def _read_archive(name: str, archive: ZipFile) -> Any:
    pickles = [entry for entry in archive.namelist() if entry.rpartition("/")[2] == "data.pkl"]
    folder = pickles[0].removesuffix("data.pkl")
    if len(pickles) != 1 or f"{folder}constants.pkl" in archive.namelist():
        raise InputError(f"{name} is a TorchScript archive, expected what torch.save wrote of tensors and plain values")
    if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
        raise InputError(f"{name} is compressed inside, as torch.save never does")  # small files could become huge
    order = ">" if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") == b"big" else "<"
    program = archive.read(pickles[0])
    _check_program(name, program)
    found = _Unpickler(name, program, archive, f"{folder}data/", order).load()
    if not isinstance(found, dict):
        return found.array if isinstance(found, NumpyArray) else found
    return {key: value.array if isinstance(value, NumpyArray) else value for key, value in found.items()}


def _check_program(name: str, program: bytes) -> None:
    """InputError where a pickle would make room for more objects than it has bytes, or take a class by its number in
    this process, past `find_class`."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name in ("PUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(program):
            raise InputError(f"{name} is a damaged file of torch.save: it numbers an object {argument}")
        if operation.name in ("EXT1", "EXT2", "EXT4"):
            raise InputError(f"{name} names a class by a number, as torch.save never does")


class _Unpickler(pickle.Unpickler):
    def __init__(self, name: str, program: bytes, archive: ZipFile, folder: str, order: str) -> None:
        super().__init__(BytesIO(program))
        self.name, self.archive, self.folder, self.order = name, archive, folder, order
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for: never anything imported by that name."""

        def tensor(*arguments: Any) -> object:  # a new one each time, because a pickle may put attributes on it
            return self.tensor(*arguments)

        if module == "torch._utils":
            if name == "_rebuild_parameter":
                return lambda data, *_: data
            return tensor if name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3") else Unreadable
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Element(STORAGES[name])
        if module == "torch" and name in ELEMENTS:
            return Element(name)
        if module in MULTIARRAY and name == "_reconstruct":
            return NumpyArray
        if (module, name) == ("_codecs", "encode"):  # how old pickles write bytes
            return lambda text, _: text.encode("latin1")
        known = {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): tuple, ("numpy", "dtype"): NumpyDtype}
        return known.get((module, name), Unreadable)

    def persistent_load(self, pid: Any) -> Storage | Unreadable:
        """The storage that a pickle refers to as ("storage", class, key, device, number of elements)."""
        _, element, key, _, n_elements = pid
        if not isinstance(element, Element):
            return Unreadable()
        if key not in self.storages:
            values = np.frombuffer(self.archive.read(f"{self.folder}{key}"), self.order + ELEMENTS[element.name])
            if not 0 <= n_elements <= len(values):
                raise InputError(f"{self.name}: storage {key} has {len(values)} elements, the file says {n_elements}")
            self.storages[key] = Storage(values, element.name)
        return self.storages[key]

    def tensor(
        self,
        storage: Storage | Unreadable,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: object = None,
        hooks: object = None,
        element: object = None,
        metadata: object = None,
    ) -> NDArray[Any] | Unreadable:
        """The array of a tensor; `element` is given where the storage is one of bytes."""
        if not isinstance(storage, Storage) or isinstance(element, Unreadable | type):
            return Unreadable()  # elements that numpy does not have, such as fp8
        values, name = storage
        if isinstance(element, Element) and element.name != name:
            values, name = values.view(self.order + ELEMENTS[element.name]), element.name
        whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride))
        if not whole or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise InputError(f"{self.name} has a tensor of size {size!r:.40} and stride {stride!r:.40}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        n_elements = math.prod(size)
        if n_elements and (last >= len(values) or n_elements > max(len(values), MAX_EXPANDED)):
            raise InputError(f"{self.name} has a tensor that reaches outside its storage of {len(values)} elements")
        if not n_elements:
            return np.empty(size, values.dtype)
        steps = tuple(step * values.itemsize for step in stride)
        view = np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)
        if name == "bfloat16":  # the upper half of a float32
            return np.asarray((view.astype(np.uint32) << 16).view(np.float32))
        return view.astype(view.dtype.newbyteorder("="), copy=False)
