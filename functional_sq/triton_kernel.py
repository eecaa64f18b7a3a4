"""The kernels of `functional_sq.triton_mm` and `triton_conv`; importing them imports Triton."""

# mypy: ignore-errors
# It is Triton's language, which has no types, and Triton is no dependency.

# Its source is read by Triton, and written again by Inductor: no annotations that are text, no names but `tl`.
import triton
import triton.language as tl

__all__ = ["convolve", "convolve_alone", "multiply"]


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Apply one of `functional_sq.ACTIVATIONS` to float32."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif ACTIVATION == "gelu":
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "tanh":
        x = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    return x


@triton.jit
def _coded(x, scale, zero_point, DTYPE: tl.constexpr):
    """Return codes of float32: `quantize` with one scale, for int8 of all 8 bits and e4m3; no zero point: 0."""
    if tl.int8 == DTYPE:
        # Within 2**21, so that adding 1.5 * 2**23 rounds to integers, half to even, and leaves them in the last bits: a
        # GPU converts a number to an integer in the time of eight additions.
        steps = tl.minimum(tl.maximum(x * tl.div_rn(1.0, tl.load(scale)), -2097152.0), 2097152.0)
        code = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        if zero_point is not None:
            code += tl.load(zero_point)
        code = tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)
    else:
        # A quotient, rounded, from that by the reciprocal and its remainder: in a third of the time of a division.
        divisor = tl.load(scale)
        reciprocal = tl.div_rn(1.0, divisor)
        x = tl.minimum(tl.maximum(x, -448.0 * divisor), 448.0 * divisor)
        steps = x * reciprocal
        code = tl.fma(tl.fma(-steps, divisor, x), reciprocal, steps).to(DTYPE)
    return code


@triton.jit
def _place(m, n, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Return the rows and columns of this program's tile; tiles that run together share rows and columns."""
    tall, wide = tl.cdiv(m, HEIGHT), tl.cdiv(n, WIDTH)
    at = tl.program_id(0)
    first = at // (16 * wide) * 16
    together = tl.minimum(tall - first, 16)
    within = at % (16 * wide)
    row = (first + within % together) * HEIGHT + tl.arange(0, HEIGHT)
    return row, within // together * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _finish(
    total,
    row,
    column,
    in_columns,
    scale,
    offset,
    bias,
    residual,
    weight_zero_point,
    of_row,
    to_scale,
    to_zero_point,
    y,
    m,
    n,
    ACTIVATION: tl.constexpr,
):
    """Write `(total - weight_zero_point of_row - offset) * scale + bias + residual`, or codes of it.

    of_row: the sum of a row's codes, `(HEIGHT, 1)` or one for each column; y and residual are `(m, n)`.
    """
    inside = (row < m)[:, None] & in_columns[None, :]
    place = row[:, None].to(tl.int64) * n + column[None, :]
    if weight_zero_point is not None:
        total -= of_row * tl.load(weight_zero_point + column, mask=in_columns, other=0)[None, :]
    if offset is not None:
        total -= tl.load(offset + column, mask=in_columns, other=0)[None, :]
    # Where a sum follows a product a compiler would round once for both: not through a choice.
    x = tl.where(total == 0, 0.0, total.to(tl.float32) * tl.load(scale + column, mask=in_columns, other=0.0)[None, :])
    if bias is not None:
        x += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        x += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    x = _activated(x, ACTIVATION)
    if to_scale is not None:
        tl.store(y + place, _coded(x, to_scale, to_zero_point, y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + place, x.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m"])
def multiply(
    q,
    codes,
    scale,
    offset,
    bias,
    residual,
    weight_zero_point,
    row_sum,
    to_scale,
    to_zero_point,
    y,
    m,
    n,
    k,
    ACTIVATION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """Write one tile, HEIGHT x WIDTH, of `q @ codes.T`, or with a scale what `_finish` makes of it.

    All are contiguous: q `(m, k)` and codes `(n, k)` int8 or float8, residual and y `(m, n)`; None is what is left out.
    WHOLE: k is a multiple of DEPTH. IMPRECISE: so many products of float8 a tensor core adds, with fewer bits than
    float32 has, before their sum is added in float32; None: all.
    """
    row, column = _place(m, n, HEIGHT, WIDTH)
    along = tl.arange(0, DEPTH)
    # Past the end: of few rows they are not loaded, of many the first ones again, which needs no mask.
    FEW: tl.constexpr = HEIGHT == 16
    rows = row if FEW else row % m
    columns = column if FEW else column % n
    in_rows, in_columns = (row < m)[:, None], (column < n)[:, None]
    of_q = q + rows[:, None].to(tl.int64) * k + along[None, :]
    of_codes = codes + columns[:, None].to(tl.int64) * k + along[None, :]
    total = tl.zeros((HEIGHT, WIDTH), tl.int32 if codes.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, k, DEPTH):
        if not WHOLE:
            left = along[None, :] < k - start
            a = tl.load(of_q, mask=in_rows & left, other=0.0)
            b = tl.load(of_codes, mask=in_columns & left, other=0.0)
        elif FEW:
            a = tl.load(of_q, mask=in_rows, other=0.0)
            b = tl.load(of_codes, mask=in_columns, other=0.0)
        else:
            a, b = tl.load(of_q), tl.load(of_codes)
        total = tl.dot(a, b.T, total, out_dtype=total.dtype, max_num_imprecise_acc=IMPRECISE)
        of_q += DEPTH
        of_codes += DEPTH
    if scale is None:
        place = row[:, None].to(tl.int64) * n + column[None, :]
        tl.store(y + place, total, mask=in_rows & (column < n)[None, :])
    else:
        of_row = None
        if row_sum is not None:
            of_row = tl.load(row_sum + row, mask=row < m, other=0)[:, None]
        _finish(
            total,
            row,
            column,
            column < n,
            scale,
            offset,
            bias,
            residual,
            weight_zero_point,
            of_row,
            to_scale,
            to_zero_point,
            y,
            m,
            n,
            ACTIVATION,
        )


@triton.jit(do_not_specialize=["m"])
def convolve(
    q,
    from_scale,
    zero_point,
    zeros,
    codes,
    scale,
    offset,
    bias,
    residual,
    weight_zero_point,
    to_scale,
    to_zero_point,
    y,
    m,
    n,
    groups,
    units,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    above,
    left,
    taps,
    ACTIVATION: tl.constexpr,
    TAPS_IN_ROW: tl.constexpr,
    STEPS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EACH: tl.constexpr,
    PIXEL: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """As `multiply`, where a row of the first matrix is a window, read where it lies; of one group of channels.

    q `(images, height, width, groups * channels)`, codes `(groups * n, *kernel, channels)` and y
    `(images, out_height, out_width, groups * n)`, contiguous. There are `units * UNIT` channels in a group and taps
    elements in a kernel; no constant, with which all steps are written out, and hold twice as many registers. Each of
    STEPS takes DEPTH channels of one pixel; WHOLE: that divides them. With PIXEL an element is a row of pixels side by
    side, of so many channels each, in one group. ZEROS: windows begin above and left of the image, and read 0 where
    there is no pixel; or one of the rows of zeros, ROWS x DEPTH codes of the zero point. A group is TOGETHER groups of
    EACH channels. With from_scale q holds real values, of one group, which are quantized as they are loaded. IMPRECISE:
    as in `multiply`.
    """
    row, within = _place(m, n, HEIGHT, WIDTH)
    group = tl.program_id(1)
    along = tl.arange(0, DEPTH)
    window = row % m
    over = window // out_width
    top, side = over % out_height * stride_y - above, window % out_width * stride_x - left
    place = (over // out_height * height + top) * width + side
    # Products with UNIT, a constant, so that the compiler knows how many bytes lie in a row from an even address on.
    pitch = groups * units * UNIT if PIXEL is None else PIXEL
    of_q = q + place[:, None].to(tl.int64) * pitch + (group * units * UNIT + along)[None, :]
    of_codes = codes + (group * n + within % n)[:, None].to(tl.int64) * (taps * units) * UNIT + along[None, :]
    total = tl.zeros((HEIGHT, WIDTH), tl.int32 if codes.dtype.element_ty == tl.int8 else tl.float32)
    REAL: tl.constexpr = from_scale is not None
    SUMS: tl.constexpr = weight_zero_point is not None
    if SUMS:
        sums = tl.zeros((HEIGHT, 1 if REAL else 16 if TOGETHER == 1 else WIDTH), tl.int32)
    if zeros is not None:
        missing = zeros + (tl.program_id(0) % ROWS * DEPTH + along)[None, :]
    for step in range(taps * STEPS):
        tap, start = step // STEPS, step % STEPS * DEPTH
        down, right = tap // TAPS_IN_ROW * dilation_y, tap % TAPS_IN_ROW * dilation_x
        in_q = of_q + ((down * width + right) * pitch + start)
        in_codes = of_codes + (tap * units * UNIT + start)
        rest = along[None, :] < units * UNIT - start
        in_image = rest
        if ZEROS:
            at = (side + right)[:, None]
            if PIXEL is not None:
                at += ((start + along) // PIXEL)[None, :]
            inside = ((top + down >= 0) & (top + down < height))[:, None] & (at >= 0) & (at < width)
            if zeros is not None:
                in_q = tl.where(inside, in_q, missing)
            else:
                in_image = inside if WHOLE else inside & rest
        BARE: tl.constexpr = WHOLE and (not ZEROS or zeros is not None)
        a = tl.load(in_q) if BARE else tl.load(in_q, mask=in_image, other=0.0)
        b = tl.load(in_codes) if WHOLE else tl.load(in_codes, mask=rest, other=0.0)
        if REAL:  # 0.0, where nothing is loaded, is the zero point
            a = _coded(a.to(tl.float32), from_scale, zero_point, codes.dtype.element_ty)
        total = tl.dot(a, b.T, total, out_dtype=total.dtype, max_num_imprecise_acc=IMPRECISE)
        if SUMS and REAL:
            sums += tl.sum(a if WHOLE else tl.where(rest, a, 0), 1, keep_dims=True, dtype=tl.int32)
        elif SUMS:
            if TOGETHER == 1:
                ones = tl.full((16, DEPTH), 1, tl.int8)
            else:  # where a column and a channel are of one group
                channel = start + along if PIXEL is None else (start + along) % PIXEL
                ones = ((channel // EACH)[None, :] == (within // (n // TOGETHER))[:, None]).to(tl.int8)
            sums = tl.dot(a, ones.T, sums, out_dtype=tl.int32)
    column, in_columns = group * n + within, within < n
    of_row = None
    if SUMS:
        of_row = tl.max(sums, 1, keep_dims=True) if TOGETHER == 1 and not REAL else sums
    _finish(
        total,
        row,
        column,
        in_columns,
        scale,
        offset,
        bias,
        residual,
        weight_zero_point,
        of_row,
        to_scale,
        to_zero_point,
        y,
        m,
        groups * n,
        ACTIVATION,
    )


@triton.jit
def _elements(
    of_q, tap, TAPS, TAPS_IN_ROW: tl.constexpr, dilation_y, dilation_x, top, side, height, width, channels, inside, zero
):
    """Return the codes of one element of each window, or `zero` where there is no pixel, or no such element."""
    down, right = tap // TAPS_IN_ROW * dilation_y, tap % TAPS_IN_ROW * dilation_x
    in_image = (top + down >= 0) & (top + down < height) & (side + right >= 0) & (side + right < width) & (tap < TAPS)
    return tl.load(of_q + (down * width + right) * channels, mask=in_image[:, None] & inside, other=zero)


@triton.jit
def _dots(a, b, c, d, words, total):
    """Return `total` plus the products of four int8 with the bytes of an int32, which are one instruction.

    Of each tensor four numbers are taken at a time; those of int8 are one register, and transposed first.
    """
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 x<8>;
            prmt.b32 x0, $4, $5, 0x5140;
            prmt.b32 x1, $6, $7, 0x5140;
            prmt.b32 x2, $4, $5, 0x7362;
            prmt.b32 x3, $6, $7, 0x7362;
            prmt.b32 x4, x0, x1, 0x5410;
            prmt.b32 x5, x0, x1, 0x7632;
            prmt.b32 x6, x2, x3, 0x5410;
            prmt.b32 x7, x2, x3, 0x7632;
            dp4a.s32.s32 $0, x4, $8, $12;
            dp4a.s32.s32 $1, x5, $9, $13;
            dp4a.s32.s32 $2, x6, $10, $14;
            dp4a.s32.s32 $3, x7, $11, $15;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
        [a, b, c, d, words, total],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit(do_not_specialize=["m"])
def convolve_alone(
    q,
    zero_point,
    codes,
    scale,
    offset,
    bias,
    residual,
    weight_zero_point,
    to_scale,
    to_zero_point,
    y,
    m,
    units,
    height,
    width,
    out_height,
    out_width,
    stride_y,
    stride_x,
    dilation_y,
    dilation_x,
    above,
    left,
    ACTIVATION: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_IN_ROW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    DOTS: tl.constexpr,
):
    """As `convolve`, where each of `units * UNIT` channels is a group with one output.

    q `(images, height, width, channels)`, codes `(TAPS, channels)` and y `(images, out_height, out_width, channels)`.
    Where there is no pixel the zero point is read; None: 0. DOTS: products of int8 are added by fours, and codes are
    `(fours, channels, 4)`, the last with zeros; else in float32, which is as exact for up to 25 of them.
    """
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    channels = units * UNIT
    in_columns = column < channels
    inside = (row < m)[:, None] & in_columns[None, :]
    over = row // out_width
    top, side = over % out_height * stride_y - above, row % out_width * stride_x - left
    place = (over // out_height * height + top) * width + side
    of_q = q + place[:, None].to(tl.int64) * units * UNIT + column[None, :]
    zero = 0.0
    if zero_point is not None:
        zero = tl.load(zero_point).to(q.dtype.element_ty)
    total = tl.zeros((HEIGHT, WIDTH), tl.int32 if DOTS else tl.float32)
    SUMS: tl.constexpr = weight_zero_point is not None
    sums = None
    if SUMS:
        sums = tl.zeros((HEIGHT, WIDTH), tl.int32)
    where = dilation_y, dilation_x, top, side, height, width, channels, inside, zero
    if DOTS:
        of_codes = codes.to(tl.pointer_type(tl.int32)) + column[None, :]
        for first in tl.static_range(0, TAPS, 4):
            a = _elements(of_q, first, TAPS, TAPS_IN_ROW, *where)
            b = _elements(of_q, first + 1, TAPS, TAPS_IN_ROW, *where)
            c = _elements(of_q, first + 2, TAPS, TAPS_IN_ROW, *where)
            d = _elements(of_q, first + 3, TAPS, TAPS_IN_ROW, *where)
            words = tl.load(of_codes + first // 4 * units * UNIT, mask=in_columns[None, :], other=0)
            total = _dots(a, b, c, d, tl.broadcast_to(words, (HEIGHT, WIDTH)), total)
            if SUMS:
                ones = 0x01010101 if first + 4 <= TAPS else 0x01010101 & ((1 << 8 * (TAPS - first)) - 1)
                sums = _dots(a, b, c, d, tl.full((HEIGHT, WIDTH), ones, tl.int32), sums)
    else:
        for tap in tl.static_range(TAPS):
            a = _elements(of_q, tap, TAPS, TAPS_IN_ROW, *where)
            w = tl.load(codes + tap * units * UNIT + column[None, :], mask=in_columns[None, :], other=0.0)
            total += a.to(tl.float32) * w.to(tl.float32)
            if SUMS:
                sums += a.to(tl.int32)
    _finish(
        total,
        row,
        column,
        in_columns,
        scale,
        offset,
        bias,
        residual,
        weight_zero_point,
        sums,
        to_scale,
        to_zero_point,
        y,
        m,
        channels,
        ACTIVATION,
    )
