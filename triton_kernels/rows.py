"""Where a row of logits lies, and what a token holds: the addressing that every kernel shares.

The vocabulary axis of a row is cut into a body that starts on a 16-byte boundary and has a multiple of VECTOR elements,
and at most 2 * (VECTOR - 1) ragged elements around it. Triton then knows that body addresses and masks come in whole
vectors and emits 128-bit accesses for any vocabulary: 50257 as well as 50304. With one mask over the whole row,
`column < vocab`, an odd V or an odd row stride makes every access scalar.
"""

import inspect

import triton
import triton.language as tl
from triton.language import core

VECTOR = tl.constexpr(8)  # elements: 16 bytes of bfloat16; the tiles are multiples of it
FLOOR = tl.constexpr(-3.4028234663852886e38)  # -FLT_MAX: a finite floor for maxima, as -inf - -inf is NaN
LOWEST = tl.constexpr(-1000.0)  # of log2 e_j where it meets e_j, which is 0 there: 0 * -inf is NaN
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def kernel(*pointers):
    """triton.jit of a kernel that is specialised on types, on constexpr arguments and on the alignment of `pointers`.
    Any other value (N, strides, thresholds, the place of a column) may change from call to call without recompiling.

    What is in a tuple is always specialised on: floats by type alone, but integers by value and pointers by alignment.
    So tuples hold floats and pointers to 16-byte boundaries, and no strides: see `per_token`."""

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
def cut(offset, vocab, RAGGED: tl.constexpr):
    """(head, body): `head` ragged elements, then `body` elements in whole vectors, then the rest."""
    if RAGGED:
        head = tl.minimum((VECTOR - offset % VECTOR) % VECTOR, vocab).to(tl.int32)
        body = (vocab - head) // VECTOR * VECTOR
    else:
        head = 0
        body = vocab // VECTOR * VECTOR  # says so to the compiler
    return head, body


@triton.jit
def body_pointer(data, offset, head, ALIGNED: tl.constexpr):
    """ALIGNED: offset + head is a multiple of VECTOR. True of logits, and of a gradient laid out like them."""
    start = offset + head
    if ALIGNED:
        start = start // VECTOR * VECTOR  # says so to the compiler; tl.multiple_of gets lost when offset + 0 is folded
    return data + start


@triton.jit
def ragged_columns(head, body, vocab):
    """The columns outside the body, and which of them exist."""
    i = tl.arange(0, 2 * VECTOR)
    columns = tl.where(i < VECTOR, i, i - VECTOR + head + body)
    return columns, columns < tl.where(i < VECTOR, head, vocab)


@triton.jit
def tile_columns(DEPTH: tl.constexpr, LANES: tl.constexpr):
    """A [DEPTH, LANES] tile of consecutive columns. A lane stays in one thread: no barrier to reduce over DEPTH."""
    return tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def at(column, stride, row, mask=None):
    """A per-token float: a strided array (stride 0 broadcasts), or one number for all tokens."""
    column = core.to_tensor(column)  # a number stays Python's float in the interpreter
    if column.dtype.is_ptr():
        return tl.load(column + row * stride.to(tl.int64), mask=mask)
    else:
        return column


@triton.jit
def block(column, stride, row, inside):
    """A column for a block of tokens, numbers included: the interpreter fails at scalar & block."""
    return tl.broadcast_to(at(column, stride, row, inside), row.shape)


@triton.jit
def per_token(columns, vary, row, inside=None):
    """The values of a tuple of columns for a token, or for a block of them. A column is a number, an array with a value
    for each token (its bit in `vary` is set) or an array of one."""
    values = ()
    for i in tl.static_range(len(columns)):
        stride = (vary.to(tl.int64) >> i) & 1
        value = at(columns[i], stride, row) if inside is None else block(columns[i], stride, row, inside)
        values = values + (value,)  # noqa: RUF005  (Triton knows no star in a tuple)
    return values


@triton.jit
def number(x):
    """A float, given as such or as a tensor of one element."""
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


@triton.jit
def logprob(target_logit, maximum, total, unit):
    """NaN for a row that holds NaN or +inf, is all -inf, or has its target outside [0, V). A row that was not read
    (0, 1, 0) gives 0 whatever its temperature. `unit` is 1 / temperature, but for a softcap (softcap.py)."""
    distance = target_logit - maximum
    return tl.where(distance == 0, 0.0, distance * unit) - tl.log(total)
