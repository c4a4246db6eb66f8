"""Arrays in .npy form out of bytes in memory; a header is not believed before its array is seen to be there."""

from __future__ import annotations

import io
import math
import re

import numpy as np

_PLAIN = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n", re.DOTALL
)


def decode_array(data: bytes) -> np.ndarray:
    """The array, read only. Raises ValueError, also if there are more or fewer bytes than the header says.

    numpy compiles the header as Python, 50 us for each document; one that `prepare` has written is matched instead. And
    numpy takes the memory that a header asks for before it reads, or nothing if the product of the shape overflows.
    """
    header = _PLAIN.match(data)
    if header is not None:
        count, size, begin = int(header[3]), int(header[2]), header.end()
        if begin == 10 + int.from_bytes(header[1], "little") and len(data) == begin + count * size:
            return np.frombuffer(data, dtype=f"<u{size}", offset=begin)
    stream = io.BytesIO(data)
    try:
        newer = np.lib.format.read_magic(stream) > (1, 0)
        read = np.lib.format.read_array_header_2_0 if newer else np.lib.format.read_array_header_1_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # whatever numpy's reading of Python makes of bad bytes
        raise ValueError("no array in .npy form") from error
    if dtype.hasobject or dtype.itemsize == 0 or any(length < 0 for length in shape):
        raise ValueError(f"an array {shape} of {dtype}, which is no array of numbers")
    here = len(data) - stream.tell()
    if math.prod(shape) * dtype.itemsize != here:
        raise ValueError(f"an array {shape} of {dtype} does not have {here} bytes")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
