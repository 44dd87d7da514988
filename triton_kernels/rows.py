"""Where a row of logits lies, and what a token holds: the addressing that every kernel shares.

The vocabulary axis of a row is cut into a body of whole vectors, PLAN.vector elements each, that starts on a 16-byte
boundary, and fewer than two vectors of ragged elements around it. Triton then knows that body addresses and masks come
in whole vectors and emits 128-bit accesses for any vocabulary: 50257 as well as 50304. With one mask over the whole
row, `column < vocab`, an odd V or an odd row stride makes every access scalar.
"""

import inspect

import triton
import triton.language as tl
from triton.language import core

from .records import TermColumns

FLOOR = tl.constexpr(-3.4028234663852886e38)  # -FLT_MAX: a finite floor for maxima, as -inf - -inf is NaN
LOWEST = tl.constexpr(-1000.0)  # of log2 e_j where it meets e_j, which is 0 there: 0 * -inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def kernel(*pointers):
    """triton.jit of a kernel that is specialised on types, on constexpr arguments and on the alignment of `pointers`.
    Any other value (N, strides, thresholds, the place of a column) may change from call to call without recompiling.

    What is in a tuple is always specialised on: see `Token` in records.py."""

    def jit(function):
        parameters = inspect.signature(function).parameters.values()
        runtime = [p.name for p in parameters if p.annotation is not tl.constexpr and p.name not in pointers]
        return triton.jit(function, do_not_specialize=runtime)

    return jit


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Elements from the first row to `row`; int64, as N * V passes 2^31."""
    inner = inner.to(tl.int64)
    return (row // inner) * outer_stride.to(tl.int64) + (row % inner) * inner_stride.to(tl.int64)


@triton.jit
def cut(offset, vocab, PLAN: tl.constexpr):
    """(head, body): `head` ragged elements, then `body` elements in whole vectors, then the rest."""
    VECTOR: tl.constexpr = PLAN.vector
    if PLAN.ragged:
        boundary = (offset + (VECTOR - 1)) // VECTOR * VECTOR
        head = tl.minimum(boundary - offset, vocab).to(tl.int32)
        body = (vocab - head) // VECTOR * VECTOR
    else:
        head = 0
        body = vocab // VECTOR * VECTOR  # says so to the compiler
    return head, body


@triton.jit
def body_pointer(data, offset, head, ALIGNED: tl.constexpr, PLAN: tl.constexpr):
    """ALIGNED: offset + head is a multiple of a vector. True of logits, and of a gradient laid out like them."""
    VECTOR: tl.constexpr = PLAN.vector
    start = offset + head
    if ALIGNED:
        start = start // VECTOR * VECTOR  # says so to the compiler; tl.multiple_of gets lost when offset + 0 is folded
    return data + start


@triton.jit
def hole_of(target, head, body, ROW: tl.constexpr, PLAN: tl.constexpr):
    """Where in the body the vector begins that holds the single target; `body` where none does."""
    VECTOR: tl.constexpr = PLAN.vector
    if ROW.single:
        place = target - head
        return tl.where((place >= 0) & (place < body), place // VECTOR * VECTOR, body).to(tl.int32)
    else:
        return body


@triton.jit
def ragged_columns(head, body, vocab, PLAN: tl.constexpr):
    """The columns outside the body, and which of them exist."""
    VECTOR: tl.constexpr = PLAN.vector
    i = tl.arange(0, 2 * VECTOR)
    columns = tl.where(i < VECTOR, i, i - VECTOR + head + body)
    return columns, columns < tl.where(i < VECTOR, head, vocab)


@triton.jit
def side_columns(head, body, hole, vocab, ROW: tl.constexpr, PLAN: tl.constexpr):
    """The columns that the sweep of a body leaves out, and which of them exist: those outside the body, and the vector
    that holds a single target. Masking this by whole vectors is what keeps 128-bit accesses."""
    VECTOR: tl.constexpr = PLAN.vector
    if not PLAN.ragged:
        place = hole + tl.arange(0, VECTOR)
        return place, place < body
    elif not ROW.single:
        return ragged_columns(head, body, vocab, PLAN)
    else:
        i = tl.arange(0, 4 * VECTOR)
        place = hole + i - 2 * VECTOR
        columns = tl.where(i < VECTOR, i, tl.where(i < 2 * VECTOR, i - VECTOR + head + body, head + place))
        in_hole = (i < 3 * VECTOR) & (place < body)
        exists = tl.where(i < VECTOR, columns < head, tl.where(i < 2 * VECTOR, columns < vocab, in_hole))
        return columns, exists != 0  # where of flags is no flag in the interpreter


@triton.jit
def tile_columns(PLAN: tl.constexpr):
    """A [depth, lanes] tile of consecutive columns. A lane stays in one thread: no barrier to reduce over depth."""
    DEPTH: tl.constexpr = PLAN.depth
    LANES: tl.constexpr = PLAN.lanes
    return tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def tile_mask(columns, start, length, hole, ROW: tl.constexpr, PLAN: tl.constexpr):
    """Which of a tile's columns, `start` being where it begins, are swept."""
    VECTOR: tl.constexpr = PLAN.vector
    inside = columns < length - start
    if ROW.single:
        inside = inside & (columns // VECTOR != (hole - start) // VECTOR)
    return inside


# The places of columns in `vary`, a bit each; the terms' follow the inputs'.
WEIGHTS = tl.constexpr(0)
TEMPERATURE = tl.constexpr(1)
UPSTREAM = tl.constexpr(2)
INPUTS = tl.constexpr(3)


@triton.jit
def at(column, vary, place, row, inside=None):
    """The value of a column for a token, or for a block of them. Its bit in `vary` is set if it has one for each."""
    column = core.to_tensor(column)  # a number stays Python's float in the interpreter
    if column.dtype.is_ptr():
        column = tl.load(column + row * ((vary.to(tl.int64) >> place) & 1), mask=inside)
    if inside is None:
        return column
    else:
        return tl.broadcast_to(column, row.shape)  # numbers, too: the interpreter fails at scalar & block


@triton.jit
def input_values(token, vary, row, inside=None):
    values = ()
    for i in tl.static_range(len(token.inputs)):
        values = values + (at(token.inputs[i], vary, INPUTS + i, row, inside),)  # noqa: RUF005  (no star in Triton)
    return values


@triton.jit
def term_values(token, vary, row, inside=None):
    values = ()
    for i in tl.static_range(len(token.terms)):
        place = INPUTS + len(token.inputs) + i
        values = values + (at(token.terms[i], vary, place, row, inside),)  # noqa: RUF005
    return TermColumns(*values)


@triton.jit
def number(x):
    """A float, given as such or as an array of one."""
    x = core.to_tensor(x)
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x


@triton.jit
def inverse_temperature(temperature):
    """A temperature that is not positive makes its row NaN instead of silently reversing it."""
    return tl.where(temperature > 0, tl.div_rn(1.0, temperature.to(tl.float32)), float("nan"))


@triton.jit
def in_vocab(target, vocab):
    return (target >= 0) & (target < vocab)
