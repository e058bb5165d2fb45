"""Pickles of bytes, flags and arrays of them, read without running anything that they name."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .base import DataError


class _Recorded:
    """Stands where a pickle asks for an object to be built: keeps what it would be built from."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Recorded):
    """numpy.dtype(code, align, copy); state: version, byte order, ..."""

    def plain(self) -> np.dtype:
        code = _text(self.arguments[0])
        if code not in ("O8", "b1", "u1", "i1", "i4", "i8") or (self.state and _text(self.state[1]) == ">"):
            raise ValueError(f"it holds an array of {code}")
        return np.dtype(code)


class _Array(_Recorded):
    """An ndarray by __setstate__: version, shape, dtype, column-major, values."""

    def plain(self) -> bytes | list[Any]:
        _, _, dtype, _, values = self.state
        return _values(values, dtype)


class _Buffer(_Recorded):
    """An ndarray as protocol 5 writes it: buffer, dtype, shape, order."""

    def plain(self) -> bytes | list[Any]:
        return _values(*self.arguments[:2])


class _Scalar(_Recorded):
    """One number of numpy's: dtype, value."""

    def plain(self) -> Any:
        dtype, value = self.arguments
        return np.frombuffer(_plain(value), dtype.plain())[0].item()


class _Encoded(_Recorded):
    """Bytes as Python 3 writes them for Python 2: their Latin-1 text, encoded; without arguments empty."""

    def plain(self) -> bytes:
        if not self.arguments:
            return b""
        text, codec = self.arguments
        if codec != "latin1":
            raise ValueError(f"it holds text to be encoded as {codec!r}")
        return text.encode(codec)


# All that a pickle of bytes, flags and arrays may name, under numpy's names before 2.0 and since.
STAND_INS = {
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
    ("builtins", "bytes"): _Encoded,
    ("__builtin__", "bytes"): _Encoded,
    **{
        (f"numpy.{package}.{module}", name): stand_in
        for package, (module, name, stand_in) in product(
            ("core", "_core"),
            (
                ("multiarray", "_reconstruct", _Array),
                ("multiarray", "scalar", _Scalar),
                ("numeric", "_frombuffer", _Buffer),
            ),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Recorded]:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file does not need")
        return STAND_INS[module, name]


def load_plain(path: Path) -> Any:
    """What a pickle holds; tuples and arrays become lists, arrays of uint8 bytes, all in one dimension.

    A pickle can name any function for the reader to call. This reader knows a few names, gives each
    a class of its own that keeps the arguments, and makes the values from these afterwards.

    Raises:
        DataError: the file is damaged, or holds anything but bytes, text, flags, integers, lists,
            tuples and arrays.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _plain(_Unpickler(file, encoding="bytes").load())
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises almost anything
            raise DataError(f"cannot read {path}: {error or type(error).__name__}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | str | int):
        return value
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, _Array | _Buffer | _Scalar | _Encoded):
        return value.plain()
    raise ValueError(f"it holds a {type(value).__name__.lstrip('_').lower()}")


def _values(values: Any, dtype: _Dtype) -> bytes | list[Any]:
    plain = dtype.plain()
    if plain == object:
        return list(map(_plain, values))
    array = np.frombuffer(_plain(values), plain)
    return array.tobytes() if plain == np.uint8 else array.tolist()


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin1")  # Python 2 writes bytes
