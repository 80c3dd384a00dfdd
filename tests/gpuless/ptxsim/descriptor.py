"""Where an operand of wgmma or tcgen05.mma lies in shared memory, as its 64-bit matrix descriptor says it.

All is made of chunks of 16 bytes, 8 neighbours of a row or, transposed, of a column. 8 lines of one, two, four or eight
chunks each (no swizzle, or one of 32, 64 or 128 bytes) follow one another; two strides lead from such a block to the next.
"""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.values import Array, PtxError

Layout = tuple[Array, Array, Array, Array]  # start, leading and stride offset in bytes, chunks of a line


def _layout(descriptor: Array, constant: int, swizzle: int, widths: dict[int, int]) -> Layout:
    """The fields, if all bits but those of offsets and, from bit ``swizzle`` on, of the swizzle are those of ``constant``."""
    rest = descriptor & np.uint64(~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32) & ((1 << swizzle) - 1))
    mode = (descriptor >> np.uint64(swizzle)).astype(np.int64)
    if (rest != constant).any() or not np.isin(mode, list(widths)).all():
        raise PtxError(f"matrix descriptor {int(descriptor[0]):#x}: a base offset or an unknown bit, not simulated")
    start, leading, stride = (descriptor >> np.uint64(shift) & np.uint64(0x3FFF) for shift in (0, 16, 32))
    width = np.array([widths[int(m)] for m in mode])
    return start.astype(np.int64) * 16, leading.astype(np.int64) * 16, stride.astype(np.int64) * 16, width


def of_wgmma(descriptor: Array) -> Layout:
    """Of uint64 [matrices], as sm_90 has them."""
    return _layout(descriptor, 0, 62, {0: 1, 1: 8, 2: 4, 3: 2})


def of_tcgen05(descriptor: Array) -> Layout:
    """Of uint64 [matrices], as sm_100 has them."""
    return _layout(descriptor, 1 << 46, 61, {0: 1, 2: 8, 4: 4, 6: 2})


def chunks(start: Array, leading: Array, stride: Array, width: Array, rows: int, transposed: bool) -> Array:
    """Offsets in shared memory of the chunks of matrices of ``rows`` times 16 elements of 16 bits.

    ``transposed``: neighbours in memory are of one column. Gives [matrices, rows, 2] or, transposed, [matrices, 16, rows / 8].
    """
    start, leading, stride, width = (x[:, None, None] for x in (start, leading, stride, width))
    line, chunk = np.arange(16 if transposed else rows)[:, None], np.arange(rows // 8 if transposed else 2)
    plain = width == 1
    if transposed:
        down, across = np.where(plain, leading, stride), np.where(plain, stride, leading)
    else:
        down, across = stride, np.where(plain, leading, 0)
    offset = start + line % 8 * 16 * width + line // 8 * down + chunk % width * 16 + chunk // width * across
    return offset ^ (offset >> 3 & (width - 1) << 4)
