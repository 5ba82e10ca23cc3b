"""The recursion in Triton, with one pair per lane and one warp per program, without barriers or shuffles.

W sequences of y are interleaved: column `j * W + lane` of `CELLS` is slice j of sequence `lane`. A cell beyond the
lengths of its lane cannot reach the result, so nothing is masked. All logarithms are to base 2. Cells have the dtype
of the features. log alpha, log beta and log K are float64, because large terms are summed and exponentiated.
"""

import triton
import triton.language as tl


# Below every sum of capped terms. The sum of two such values is finite in float32.
LOG_ZERO = tl.constexpr(-1e37)
CAP = tl.constexpr(1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# FAST uses one instruction. tl.log2 compiles to a polynomial, and tl.exp2 to a sequence that handles denormals.
@triton.jit
def _exp2(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _log_kappa(d2, scale, GAUSSIAN: tl.constexpr, FAST: tl.constexpr):
    r = tl.maximum(-d2 * scale, -CAP)
    if GAUSSIAN:
        r = r - _log2(2.0 - _exp2(r, FAST), FAST)
    return r


@triton.jit
def _log_sum_exp(a, b, c, FAST: tl.constexpr):
    """Sums in float64. With FAST, the differences from the largest term and their sum are in float32."""
    top = tl.maximum(tl.maximum(a, b), c)
    a, b, c = a - top, b - top, c - top
    if FAST:
        a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
    return top + _log2(_exp2(a, FAST) + _exp2(b, FAST) + _exp2(c, FAST), FAST)


@triton.jit
def _pair_scale(SCALE, n, m, PER_PAIR: tl.constexpr):
    """Returns log2(e) c of each lane, where u = c d^2."""
    scale = tl.load(SCALE)
    if PER_PAIR:
        scale = scale * 2.0 / (n + m)
    return tl.minimum(scale, CAP) * LOG2_E


@triton.jit
def forward_kernel(
    CELLS,  # (rows, columns): squared distances
    ALPHA,  # float64 log alpha: with KEEP (rows, columns), all rows, else (sequences, columns), the last row
    LOG_K,  # float64 (sequences, groups * W)
    OFFSETS,  # (sequences + 1,): rows of each sequence of x
    GROUPS,  # (groups + 1,): columns of each group
    LENGTHS,  # (groups * W,): lengths of the sequences of y
    SCALE,  # (1,)
    columns,
    W: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    PER_PAIR: tl.constexpr,
    KEEP: tl.constexpr,
    FAST: tl.constexpr,
):
    sequence, group = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, W)
    first = tl.load(OFFSETS + sequence)
    n = tl.load(OFFSETS + sequence + 1) - first
    start = tl.load(GROUPS + group)
    width = (tl.load(GROUPS + group + 1) - start) // W
    m = tl.load(LENGTHS + group * W + lane)
    scale = _pair_scale(SCALE, n, m, PER_PAIR)
    log_zero = tl.zeros([W], tl.float64) + LOG_ZERO
    answer = log_zero
    for i in range(n):
        cells = CELLS + (first + i).to(tl.int64) * columns + start + lane
        if KEEP:
            alpha = ALPHA + (first + i).to(tl.int64) * columns + start + lane
            above = alpha - columns
        else:
            alpha = ALPHA + sequence.to(tl.int64) * columns + start + lane
            above = alpha
        has_above = lane < tl.where(i > 0, W, 0)
        diagonal = tl.where(i == 0, log_zero * 0.0, log_zero)
        left = log_zero
        for j in range(width):
            up = tl.load(above + j * W, mask=has_above, other=LOG_ZERO)
            value = _log_kappa(tl.load(cells + j * W), scale, GAUSSIAN, FAST)
            left = value + _log_sum_exp(up, diagonal, left, FAST)
            left = tl.maximum(left, LOG_ZERO)
            diagonal = up
            tl.store(alpha + j * W, left)
            answer = tl.where((i == n - 1) & (j == m - 1), left, answer)
    tl.store(LOG_K + sequence * tl.num_programs(1) * W + group * W + lane, answer * LN_2)


@triton.jit
def backward_kernel(
    CELLS,  # (rows, columns): input squared distances, output dL/d(squared distance)
    ALPHA,  # float64 (rows, columns): log alpha
    BELOW,  # float64 (sequences, columns): scratch for log (kappa beta / K) of the next row
    LOG_K,  # float64 (sequences, groups * W)
    GRAD,  # (sequences, groups * W): dL/dlogK
    BY_SCALE,  # float64 (sequences, groups * W): output, the sum of dL/du u
    OFFSETS,
    GROUPS,
    LENGTHS,
    SCALE,
    columns,
    W: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    PER_PAIR: tl.constexpr,
    FAST: tl.constexpr,
):
    sequence, group = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, W)
    first = tl.load(OFFSETS + sequence)
    n = tl.load(OFFSETS + sequence + 1) - first
    start = tl.load(GROUPS + group)
    width = (tl.load(GROUPS + group + 1) - start) // W
    m = tl.load(LENGTHS + group * W + lane)
    scale = _pair_scale(SCALE, n, m, PER_PAIR)
    pair = sequence * tl.num_programs(1) * W + group * W + lane
    log_k = tl.load(LOG_K + pair) * LOG2_E
    grad = tl.load(GRAD + pair)
    log_zero = tl.zeros([W], tl.float64) + LOG_ZERO
    by_scale = log_zero * 0.0
    below = BELOW + sequence.to(tl.int64) * columns + start + lane
    for back in range(n):
        i = n - 1 - back
        cells = CELLS + (first + i).to(tl.int64) * columns + start + lane
        alpha = ALPHA + (first + i).to(tl.int64) * columns + start + lane
        has_below = lane < tl.where(back > 0, W, 0)
        diagonal = log_zero
        right = log_zero
        for step in range(width):
            j = width - 1 - step
            down = tl.load(below + j * W, mask=has_below, other=LOG_ZERO)
            beta = _log_sum_exp(down, diagonal, right, FAST)
            beta = tl.where((i == n - 1) & (j == m - 1), -log_k, beta)
            d2 = tl.load(cells + j * W)
            value = _log_kappa(d2, scale, GAUSSIAN, FAST)
            log_weight = tl.minimum(tl.load(alpha + j * W) + beta, 0.0).to(d2.dtype)
            weight = -grad * _exp2(log_weight, FAST)
            if GAUSSIAN:
                weight = weight * (1.0 + _exp2(value, FAST))
            weight = weight * scale * LN_2
            by_scale += weight * d2
            tl.store(cells + j * W, weight)
            diagonal = down
            right = tl.maximum(value + beta, LOG_ZERO)
            tl.store(below + j * W, right)
    tl.store(BY_SCALE + pair, by_scale)
