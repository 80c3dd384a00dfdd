"""Where an operand of wgmma lies in shared memory, as its 64-bit matrix descriptor says it.

All is made of chunks of 16 bytes, 8 neighbours of a row or, transposed, of a column. 8 lines of one, two, four or eight
chunks each (no swizzle, or one of 32, 64 or 128 bytes) follow one another; two strides lead from such a block to the next.
"""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.values import Array, PtxError

# Start address, leading and stride offset (in 16 bytes), swizzle; base offset and what the manual says nothing of must be 0.
_FIELDS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62
_CHUNKS = np.array([1, 8, 4, 2])  # of a line, by the swizzle field


def chunks(descriptor: Array, rows: int, transposed: bool) -> Array:
    """Offsets in shared memory of the chunks of matrices of ``rows`` times 16 elements of 16 bits.

    Parameters
    ----------
    descriptor : uint64 [matrices]
    transposed : neighbours in memory are of one column

    Returns
    -------
    int64 [matrices, rows, 2] or, transposed, [matrices, 16, rows / 8]
    """
    if (descriptor & np.uint64(~_FIELDS & (2**64 - 1))).any():
        raise PtxError(f"matrix descriptor {int(descriptor[0]):#x}: a base offset or an unknown bit, not simulated")
    fields = (descriptor >> np.uint64(shift) & np.uint64(0x3FFF) for shift in (0, 16, 32))
    start, leading, stride = (field.astype(np.int64) * 16 for field in fields)
    width = _CHUNKS[(descriptor >> np.uint64(62)).astype(np.int64)]
    start, leading, stride, width = (x[:, None, None] for x in (start, leading, stride, width))
    line, chunk = np.arange(16 if transposed else rows)[:, None], np.arange(rows // 8 if transposed else 2)
    plain = width == 1
    if transposed:
        down, across = np.where(plain, leading, stride), np.where(plain, stride, leading)
    else:
        down, across = stride, np.where(plain, leading, 0)
    offset = start + line % 8 * 16 * width + line // 8 * down + chunk % width * 16 + chunk // width * across
    return offset ^ (offset >> 3 & (width - 1) << 4)
