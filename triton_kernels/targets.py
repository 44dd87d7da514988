"""A row's targets: one, or a block of ROW.targets >= K elements, K being `num_targets`."""

import triton
import triton.language as tl

CHUNK = tl.constexpr(16)  # targets to look for duplicates in at a time


@triton.jit
def row_targets(token, row, num_targets, ROW: tl.constexpr):
    if ROW.single:
        return tl.load(token.targets + row).to(tl.int64)
    else:
        TARGETS: tl.constexpr = ROW.targets
        k = tl.arange(0, TARGETS)
        target = tl.load(token.targets + row * num_targets + k, mask=k < num_targets, other=-1)  # -1 is nowhere
        return target.to(tl.int64)


@triton.jit
def given_targets(target, num_targets, ignore_index, ROW: tl.constexpr):
    """Which of a row's targets are not ignored."""
    given = target != ignore_index
    if not ROW.single:
        TARGETS: tl.constexpr = ROW.targets
        given = given & (tl.arange(0, TARGETS) < num_targets)
    return given


@triton.jit
def any_given(token, row, inside, num_targets, ignore_index):
    """Of a block of tokens: whether any of a token's targets is not ignored."""
    given = row < 0
    for k in range(0, num_targets):
        target = tl.load(token.targets + row * num_targets + k, mask=inside, other=0).to(tl.int64)
        given = given | (target != ignore_index)
    return given


@triton.jit
def row_shares(token, row, num_targets, ROW: tl.constexpr):
    """0 where a target does not count."""
    if token.shares is None:
        return 1.0
    elif ROW.single:
        return tl.load(token.shares + row)
    else:
        TARGETS: tl.constexpr = ROW.targets
        k = tl.arange(0, TARGETS)
        return tl.load(token.shares + row * num_targets + k, mask=k < num_targets, other=0.0)


@triton.jit
def is_any(flags, ROW: tl.constexpr):
    if ROW.single:
        return flags
    else:
        return tl.max(flags.to(tl.int32), 0) != 0


@triton.jit
def over_targets(values, ROW: tl.constexpr):
    """The sum of a row's values per target."""
    if ROW.single:
        return values
    else:
        return tl.sum(values, 0)


@triton.jit
def merged_shares(token, row, target, share, num_targets, ROW: tl.constexpr):
    """For each target the shares of all that are equal to it: whichever is stored last, the element is the same."""
    if ROW.single:
        return share
    else:
        merged = tl.zeros_like(share)
        for start in range(0, num_targets, CHUNK):
            other = start + tl.arange(0, CHUNK)
            exists = other < num_targets
            other_target = tl.load(token.targets + row * num_targets + other, mask=exists, other=0).to(tl.int64)
            other_share = tl.load(token.shares + row * num_targets + other, mask=exists, other=0.0)
            same = target[:, None] == other_target[None, :]
            merged += tl.sum(tl.where(same, other_share[None, :], 0.0), 1)
        return merged


@triton.jit
def target_logits(stats, row, n, num_targets, ROW: tl.constexpr):
    """Those that stage 1 kept."""
    if ROW.single:
        return tl.load(stats + 2 * n + row)
    else:
        TARGETS: tl.constexpr = ROW.targets
        k = tl.arange(0, TARGETS)
        return tl.load(stats + (2 + k) * n + row, mask=k < num_targets)


@triton.jit
def store_per_target(table, row, n, values, num_targets, ROW: tl.constexpr):
    """Into a (K, N) table."""
    if ROW.single:
        tl.store(table + row, values)
    else:
        TARGETS: tl.constexpr = ROW.targets
        k = tl.arange(0, TARGETS)
        tl.store(table + k * n + row, values, mask=k < num_targets)
