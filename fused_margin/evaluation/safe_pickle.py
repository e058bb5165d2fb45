"""Reads pickles of bytes, flags and arrays without executing code from them."""

from __future__ import annotations

import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError


class _Recorded:
    """Placeholder for an object of the pickle: records its constructor arguments and state."""

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
    """An ndarray in a protocol-5 pickle: buffer, dtype, shape, order."""

    def plain(self) -> bytes | list[Any]:
        return _values(*self.arguments[:2])


class _Scalar(_Recorded):
    """A NumPy scalar: dtype, value."""

    def plain(self) -> Any:
        dtype, value = self.arguments
        return np.frombuffer(_plain(value), dtype.plain())[0].item()


class _Encoded(_Recorded):
    """Bytes in a protocol-2 pickle of Python 3: Latin-1 text and its codec; no arguments for empty bytes."""

    def plain(self) -> bytes:
        if not self.arguments:
            return b""
        text, codec = self.arguments
        if codec != "latin1":
            raise ValueError(f"it holds text to be encoded as {codec!r}")
        return text.encode(codec)


# The only names that a pickle may refer to. NumPy 2.0 renamed numpy.core to numpy._core.
PLACEHOLDERS = {
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
    ("builtins", "bytes"): _Encoded,
    ("__builtin__", "bytes"): _Encoded,
    **{
        (f"numpy.{package}.{module}", name): placeholder
        for package, (module, name, placeholder) in product(
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
        if (module, name) not in PLACEHOLDERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file does not need")
        return PLACEHOLDERS[module, name]


def load_plain(path: Path) -> Any:
    """Contents of a pickle. Tuples and arrays become flat lists, arrays of uint8 become bytes.

    A pickle can make the reader call any function. This reader accepts the names in `PLACEHOLDERS` only, replaces each by
    a placeholder that records its arguments, and builds the values from the placeholders afterwards.

    Raises:
        DataError: the file is damaged, or has other objects than bytes, text, flags, integers, lists, tuples
            and arrays.
        OSError: the file cannot be opened.
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
