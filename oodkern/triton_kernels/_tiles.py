"""What kernels share on the device: tiles of a product that is never stored, and the functions that consume them.

A matrix operand is a pointer to its first element, or a tensor descriptor of its tiles where DESCRIPTORS is set (see
`_host.operand`); the kernels are the same. Offsets inside a tile are 32 bits wide, the row that a tile starts at is
multiplied by the stride in 64 bits. Scores are computed in powers of two, exp(z / T) = 2^(z log2(e) / T): `scale` is
log2(e) / T.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    matrix,  # [rows, columns]
    stride,
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile [ROWS, COLUMNS] of a matrix at (row, column), zero outside of the matrix."""
    if DESCRIPTORS:
        return matrix.load([row, column])
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        first = matrix + tl.cast(row, tl.int64) * stride + column
        inside = (i[:, None] < rows - row) & (j[None, :] < columns - column)
        return tl.load(first + i[:, None] * stride + j[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    matrix,  # [rows, columns], contiguous
    tile,  # [ROWS, COLUMNS]
    row,
    column,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes a tile at (row, column) in the matrix's dtype, what lies inside of it."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    first = matrix + tl.cast(row, tl.int64) * columns + column
    inside = (i[:, None] < rows - row) & (j[None, :] < columns - column)
    tl.store(first + i[:, None] * columns + j[None, :], tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def product_tile(
    left,  # [left_rows, depth]
    left_stride,
    left_row,
    left_rows,
    right,  # [right_rows, depth]
    right_stride,
    right_row,
    right_rows,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile [ROWS, COLUMNS] of left @ right.T at (left_row, right_row), float32, zero outside of the product.

    "ieee", always: Triton's default for float32 operands is TF32, whose products have 10 bits.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for column in range(0, depth, DEPTH):
        a = load_tile(left, left_stride, left_row, column, left_rows, depth, ROWS, DEPTH, DESCRIPTORS)
        b = load_tile(right, right_stride, right_row, column, right_rows, depth, COLUMNS, DEPTH, DESCRIPTORS)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def logits_tile(
    features,  # [N, D]
    features_stride,
    row,
    N,
    weight,  # [K, D]
    weight_stride,
    bias,  # [K] or None
    first_class,
    K,
    D,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile [ROWS, CLASSES] of features @ weight.T + bias at (row, first_class), float32; -inf from class K on."""
    z = product_tile(
        *(features, features_stride, row, N, weight, weight_stride, first_class, K, D),
        *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    classes = first_class + tl.arange(0, CLASSES)
    if bias is not None:
        z += tl.load(bias + classes, mask=classes < K, other=0.0).to(tl.float32)[None, :]
    return tl.where(classes[None, :] < K, z, float("-inf"))


@triton.jit
def finite_pivot(maximum):
    """What is subtracted before exp2: the maximum, and 0 where that is infinite, since inf - inf is NaN."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def merge_exponents(
    maximum,  # [ROWS]
    total,  # [ROWS]
    other_maximum,  # [ROWS]
    other_total,  # [ROWS]
):
    """(maximum, total) of two parts of a row, each of which stands for total * 2^pivot(maximum)."""
    new = tl.maximum(maximum, other_maximum)
    pivot = finite_pivot(new)
    # The pivot of a part whose maximum is -inf is 0, and its total is 0 however it is scaled: exp2(-inf) is no NaN.
    total = total * tl.exp2(maximum - pivot) + other_total * tl.exp2(other_maximum - pivot)
    return new, total


@triton.jit
def add_exponents(
    maximum,  # [ROWS], of z * scale
    total,  # [ROWS]
    z,  # [ROWS, CLASSES]
    scale,
):
    """(maximum, total) with a tile of logits added: total * 2^pivot(maximum) = sum of 2^(z scale).

    A row starts as (-inf, 0). A NaN goes into the total; a row that holds +inf has maximum and total +inf.
    """
    new = tl.maximum(maximum, tl.max(z, 1) * scale)
    pivot = finite_pivot(new)
    # maximum is rounded once and then kept, so that the correction is exactly 1 where it does not change.
    total = total * tl.exp2(maximum - pivot) + tl.sum(tl.exp2(z * scale - pivot[:, None]), 1)
    return new, total


@triton.jit
def log_exponents(
    maximum,  # [ROWS]
    total,  # [ROWS]
):
    """log2 of total * 2^pivot(maximum); -inf where nothing was added but -inf."""
    return finite_pivot(maximum) + tl.log2(total)


@triton.jit
def softplus(z):
    """log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)); its relative error is 2 + |z| / 2 ulp where z is negative.

    |z| / 2 ulp are the rounding of z log2(e), of which exp2 is taken. log1p(e) = 2 atanh(s) for s = e / (2 + e), which
    is in [0, 1/3] for e in [0, 1]; the polynomial is atanh(s) / s in s^2, with a relative error of 4e-9 there.
    """
    e = tl.exp2(-tl.abs(z) * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    atanh = s * (1.0 + q * (0.33333158 + q * (0.20012455 + q * (0.13980301 + q * 0.14089167))))
    return tl.maximum(z, 0.0) + 2.0 * atanh


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), down to where exp(-z) overflows; its relative error is that of `softplus`."""
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))
