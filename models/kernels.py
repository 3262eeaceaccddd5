"""Depthwise 7x7 convolution in Triton: submanifold sparse on packed rows, and dense on channels last.

Packed rows never become a canvas: a table says which rows are a patch's, and those of a masked patch are not read.

  * Work is cut into tiles of T x T sites, T = min(k, 4). In Z-order a tile of a patch is T^2 consecutive rows, so only
    tiles are looked up; the sites within are at offsets known when the kernel is compiled.
  * A program walks over tiles with one block of channels and keeps its 49 taps in registers. An output site has 49
    inputs, but a whole tile only (T + 6)^2: each is loaded once and multiplied into every output site it reaches.
  * The weight gradient is the same walk with the roles of taps and output sites exchanged. Each program writes the sum
    over its tiles, and PyTorch adds these up: no atomics, so results are the same in every run.
  * Sums are float32 (float64 of float64). The taps may be of another type than the rows.

Both operators are differentiable by each other, as often as one likes: the gradient of the input is the convolution
with the taps reversed, and the gradient of the taps is linear in the input and in the output's gradient.

Shapes: N images, C channels, H x W sites; x is dense, (N, H, W, C), or packed, (N, S, C), with V visible of the h x w
patches of an image, k x k sites each, S = V k^2. A packed x comes with two tables: visible (N, V), the number of each
visible patch on the grid, and slots (N, h, w), its inverse, -1 where masked. The taps are the weight with channels
last, (49, C).
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .launch import BATCH_SIZES, define_operator, launch
from .sites import active_sites, pack, patch_slots, unpack

SIDE = tl.constexpr(7)  # of the convolution's kernel
HALO = tl.constexpr(3)

# A program has a block of tiles x channels, 4 x 64 or 8 x 32, two elements a thread: 49 taps then take 98 registers.
# Dense maps, whose borders take registers too, and types of four bytes have one element a thread: more would spill.
BLOCK = 256
NUM_WARPS = 4
# Programs to start, so that an H100 is filled four and two times: by their registers, three or two run at once on each
# of its 132 multiprocessors. Constants, not asked of the device, so that sums are split alike everywhere.
CONV_PROGRAMS = 4 * 3 * 132
WEIGHT_GRAD_PROGRAMS = 2 * 2 * 132

# Shared below: canvas = (slots or None, num_visible, height, width). The row y and column x of a tile count in tiles.


@triton.jit
def _output_tiles(first, num_tiles, visible, canvas, K: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr):
    """Image, row and column, (TILES,) each, of the tiles first, first + 1, ..."""
    _, num_visible, height, width = canvas
    tile = first + tl.arange(0, TILES)
    if visible is None:
        across = tl.cdiv(width, T)
        image = tile // (tl.cdiv(height, T) * across)
        y = tile // across % tl.cdiv(height, T)
        x = tile % across
    else:
        side: tl.constexpr = K // T  # of a patch in tiles: 1 or 2
        patch = tl.load(visible + tile // (side * side), mask=tile < num_tiles, other=0)
        image = tile // (num_visible * side * side)
        y = patch // (width // K) * side + tile // side % side
        x = patch % (width // K) * side + tile % side
    return image, tl.where(tile < num_tiles, y, -SIDE), x  # past the end: out of reach of the canvas


@triton.jit
def _first_row(image, y, x, canvas, K: tl.constexpr, T: tl.constexpr):
    """The row of the first site of tiles, and whether they are present: on the canvas and not masked."""
    slots, num_visible, height, width = canvas
    present = (y >= 0) & (y * T < height) & (x >= 0) & (x * T < width)
    if slots is None:
        row = (image * height + y * T) * width + x * T
    else:
        side: tl.constexpr = K // T
        patch = (image * (height // K) + y // side) * (width // K) + x // side
        slot = tl.load(slots + patch, mask=present, other=-1)
        present = slot >= 0
        row = (((image * num_visible + slot) * side + y % side) * side + x % side) * T * T
    return row, present


@triton.jit
def _site(present, y, x, sy, sx, canvas, T: tl.constexpr):
    """Site (sy, sx) of tiles: its offset from the first in rows, and whether it is present."""
    slots, _, height, width = canvas
    if slots is None:  # the last tiles may reach beyond the canvas
        offset = sy * width + sx
        present = present & (y * T + sy < height) & (x * T + sx < width)
    else:  # Z-order: the bits of row and column in turn
        offset = sy // 2 * 8 + sx // 2 * 4 + sy % 2 * 2 + sx % 2
    return offset, present


@triton.jit
def _add_products(sums, factors, x, wy: tl.constexpr, wx: tl.constexpr, SUMS: tl.constexpr, FACTORS: tl.constexpr):
    """sums[s] + factors[w - s] * x for each s, where there is such a factor.

    Both are squares, SUMS and FACTORS wide: one of output sites, one of taps. x is the input at w = (wy, wx) of the
    window around a tile: output site s meets it with tap w - s, and tap s at output site w - s.
    """
    # Only these rows and columns of sums have such a factor; what is before and after them stays
    top: tl.constexpr = max(0, wy - FACTORS + 1)
    bottom: tl.constexpr = min(SUMS, wy + 1)
    left: tl.constexpr = max(0, wx - FACTORS + 1)
    right: tl.constexpr = min(SUMS, wx + 1)
    result = sums[: top * SUMS]
    for sy in tl.static_range(top, bottom):
        result += sums[sy * SUMS : sy * SUMS + left]
        for sx in tl.static_range(left, right):
            result += (tl.fma(factors[(wy - sy) * FACTORS + wx - sx], x, sums[sy * SUMS + sx]),)
        result += sums[sy * SUMS + right : (sy + 1) * SUMS]
    return result + sums[bottom * SUMS :]


@triton.jit
def _correlate(
    sums, factors, x, image, ty, tx, channel, canvas,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The sums, SUMS x SUMS, with the products of factors and inputs in the window around each tile added."""
    REACH: tl.constexpr = (HALO + T - 1) // T  # of the halo in tiles
    FACTORS: tl.constexpr = T + SIDE - SUMS  # T x T output sites and SIDE x SIDE taps, in either role
    for dy in tl.static_range(-REACH, REACH + 1):
        for dx in tl.static_range(-REACH, REACH + 1):
            row, present = _first_row(image, ty + dy, tx + dx, canvas, K, T)
            pointers = x + row.to(tl.int64)[:, None] * C + channel[None, :]
            for sy in tl.static_range(max(0, -HALO - dy * T), min(T, T + HALO - dy * T)):
                for sx in tl.static_range(max(0, -HALO - dx * T), min(T, T + HALO - dx * T)):
                    offset, valid = _site(present, ty + dy, tx + dx, sy, sx, canvas, T)
                    mask = valid[:, None] & (channel < C)[None, :]
                    value = tl.load(pointers + offset * C, mask=mask, other=0).to(sums[0].dtype)
                    sums = _add_products(sums, factors, value, dy * T + sy + HALO, dx * T + sx + HALO, SUMS, FACTORS)
    return sums


@triton.jit(do_not_specialize=BATCH_SIZES[:5])
def _conv_kernel(
    x, taps, bias, added, shift, out, shifted, partial, visible, slots,
    num_tiles, tiles_per_program, num_visible, height, width,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = added (or 0 if None) + bias + the convolution of x with the taps. Programs: chunks of tiles x channels.

    Unless None: shifted = x + shift, and partial (chunks, C), the sums of `added` over each chunk.
    """
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    canvas = (slots, num_visible, height, width)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # One value a channel, but loaded as a whole block: each thread then holds those of the channels it works on.
    shared = tl.zeros((TILES, 1), tl.int32) + channel[None, :]
    start = tl.load(bias + shared, mask=shared < C, other=0).to(dtype)
    added_sum = tl.zeros((TILES, CHANNELS), dtype)
    if shift is not None:
        offsets = tl.load(shift + shared, mask=shared < C, other=0).to(dtype)
    factors = ()
    for tap in tl.static_range(SIDE * SIDE):
        factors += (tl.load(taps + tap * C + shared, mask=shared < C, other=0).to(dtype),)

    begin = tl.program_id(0) * tiles_per_program
    for first in range(begin, tl.minimum(begin + tiles_per_program, num_tiles), TILES):
        image, ty, tx = _output_tiles(first, num_tiles, visible, canvas, K, T, TILES)
        sums = ()
        for _ in tl.static_range(T * T):
            sums += (start,)
        sums = _correlate(sums, factors, x, image, ty, tx, channel, canvas, C, K, T, T)
        row, present = _first_row(image, ty, tx, canvas, K, T)
        first_site = row.to(tl.int64)[:, None] * C + channel[None, :]
        for sy in tl.static_range(T):
            for sx in tl.static_range(T):
                offset, valid = _site(present, ty, tx, sy, sx, canvas, T)
                mask = valid[:, None] & (channel < C)[None, :]
                total = sums[sy * T + sx]
                if added is not None:
                    value = tl.load(added + first_site + offset * C, mask=mask, other=0).to(dtype)
                    total += value
                    added_sum += value
                tl.store(out + first_site + offset * C, total.to(out.dtype.element_ty), mask=mask)
                if shift is not None:
                    value = tl.load(x + first_site + offset * C, mask=mask, other=0).to(dtype) + offsets
                    tl.store(shifted + first_site + offset * C, value.to(shifted.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + tl.program_id(0) * C + channel, tl.sum(added_sum, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=BATCH_SIZES[:5])
def _weight_grad_kernel(
    x, grad, partial, visible, slots, num_tiles, tiles_per_program, num_visible, height, width,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial (chunks, 50, C): the gradients of the 49 taps and of the bias from each chunk of tiles."""
    dtype: tl.constexpr = partial.dtype.element_ty
    canvas = (slots, num_visible, height, width)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    bias = tl.zeros((TILES, CHANNELS), dtype)
    sums = ()
    for _ in tl.static_range(SIDE * SIDE):
        sums += (tl.zeros((TILES, CHANNELS), dtype),)

    begin = tl.program_id(0) * tiles_per_program
    for first in range(begin, tl.minimum(begin + tiles_per_program, num_tiles), TILES):
        image, ty, tx = _output_tiles(first, num_tiles, visible, canvas, K, T, TILES)
        row, present = _first_row(image, ty, tx, canvas, K, T)
        pointers = grad + row.to(tl.int64)[:, None] * C + channel[None, :]
        factors = ()
        for sy in tl.static_range(T):
            for sx in tl.static_range(T):
                offset, valid = _site(present, ty, tx, sy, sx, canvas, T)
                mask = valid[:, None] & (channel < C)[None, :]
                factors += (tl.load(pointers + offset * C, mask=mask, other=0).to(dtype),)
                bias += factors[sy * T + sx]
        sums = _correlate(sums, factors, x, image, ty, tx, channel, canvas, C, K, T, SIDE)

    pointers = partial + tl.program_id(0) * (SIDE * SIDE + 1) * C + channel
    for tap in tl.static_range(SIDE * SIDE):
        tl.store(pointers + tap * C, tl.sum(sums[tap], axis=0), mask=channel < C)
    tl.store(pointers + SIDE * SIDE * C, tl.sum(bias, axis=0), mask=channel < C)


# ---- Operators: a reference in plain PyTorch for any device, replaced by the kernel where Triton runs


def _plan(x, visible, slots, programs):
    """How to cut x into about so many programs: the grid, chunks of tiles x blocks of channels, and the sizes."""
    if slots is None:
        n, height, width, channels = x.shape
        num_visible, k, tile = 1, 4, 4
        num_tiles = n * math.ceil(height / tile) * math.ceil(width / tile)
    else:
        n, rows, channels = x.shape
        num_visible = visible.shape[1]
        k = math.isqrt(rows // num_visible)
        tile = min(k, 4)
        height, width = (side * k for side in slots.shape[1:])
        num_tiles = n * rows // tile**2
    block = 32 if 0 < channels % 64 <= 32 else 64  # 64 load better, unless half of the last block would be idle
    elements = BLOCK // 2 if slots is None or x.element_size() > 2 else BLOCK
    blocks, tiles = math.ceil(channels / block), elements // block
    tiles_per_program = tiles * max(math.ceil(num_tiles * blocks / (tiles * programs)), 1)
    sizes = dict(num_tiles=num_tiles, tiles_per_program=tiles_per_program)
    sizes |= dict(num_visible=num_visible, height=height, width=width)
    sizes |= dict(C=channels, K=k, T=tile, TILES=tiles, CHANNELS=block, num_warps=NUM_WARPS, num_stages=1)
    return (math.ceil(num_tiles / tiles_per_program), blocks), sizes


def _maps(x, visible, slots):
    """x as maps (N, C, H, W), of float32 at least, and the function that turns such maps back into the form of x."""
    if slots is None:
        maps = x.permute(0, 3, 1, 2).to(_sum_type(x))
        return maps, lambda maps, dtype=x.dtype: maps.permute(0, 2, 3, 1).to(dtype).contiguous()
    k = math.isqrt(x.shape[1] // visible.shape[1])
    sites = active_sites(visible.long(), slots.shape[1:], k)
    return unpack(x.to(_sum_type(x)), sites), lambda maps, dtype=x.dtype: pack(maps, sites).to(dtype)


def _sum_type(x):
    return torch.promote_types(x.dtype, torch.float32)


def _conv_plain(
    x: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor,
    added: torch.Tensor | None,
    shift: torch.Tensor | None,
    sum_added: bool,
    visible: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, dense or packed, taps (49, C), bias (C,), added like x -> the convolution, like `added` if given, else like x.

    Then x + shift (C,), and the sums of `added` over all sites (C,); each is empty if not asked for.
    """
    maps, back = _maps(x, visible, slots)
    weight = taps.to(maps.dtype).t().reshape(-1, 1, 7, 7)
    maps = F.conv2d(maps, weight, bias.to(maps.dtype), padding=3, groups=len(weight))
    out = back(maps) if added is None else (back(maps, maps.dtype) + added).to(added.dtype)
    shifted = x.new_empty(0) if shift is None else (x.to(maps.dtype) + shift).to(x.dtype)
    sums = added.to(maps.dtype).flatten(0, -2).sum(0) if sum_added else maps.new_empty(0)
    return out, shifted, sums


def _conv_triton(x, taps, bias, added, shift, sum_added, visible, slots):
    x, added = x.contiguous(), added if added is None else added.contiguous()
    grid, sizes = _plan(x, visible, slots, CONV_PROGRAMS)
    out, shifted = torch.empty_like(x if added is None else added), None if shift is None else torch.empty_like(x)
    partial = x.new_empty(grid[0], x.shape[-1], dtype=_sum_type(x)) if sum_added else None
    tensors = x, taps.contiguous(), bias, added, shift, out, shifted, partial, visible, slots
    launch(_conv_kernel, grid, *tensors, **sizes)
    sums = x.new_empty(0, dtype=_sum_type(x)) if partial is None else partial.sum(0)
    return out, x.new_empty(0) if shifted is None else shifted, sums


def _conv_fake(x, taps, bias, added, shift, sum_added, visible, slots):
    layout = dict(memory_format=torch.contiguous_format)
    shifted = x.new_empty(0) if shift is None else torch.empty_like(x, **layout)
    sums = x.new_empty(x.shape[-1] if sum_added else 0, dtype=_sum_type(x))
    return torch.empty_like(x if added is None else added, **layout), shifted, sums


def _weight_grad_plain(
    x: torch.Tensor, grad: torch.Tensor, visible: torch.Tensor | None, slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the gradient of the output, both dense or packed -> those of the taps (49, C) and of the bias (C,)."""
    (maps, _), (grad_maps, _) = _maps(x, visible, slots), _maps(grad, visible, slots)
    channels = x.shape[-1]
    weight = torch.nn.grad.conv2d_weight(maps, (channels, 1, 7, 7), grad_maps, padding=3, groups=channels)
    return weight.flatten(1).t().contiguous(), grad_maps.sum((0, 2, 3))


def _weight_grad_triton(x, grad, visible, slots):
    x, grad = x.contiguous(), grad.contiguous()
    grid, sizes = _plan(x, visible, slots, WEIGHT_GRAD_PROGRAMS)
    partial = x.new_empty(grid[0], 50, x.shape[-1], dtype=_sum_type(x))
    launch(_weight_grad_kernel, grid, x, grad, partial, visible, slots, **sizes)
    return partial[:, :49].sum(0), partial[:, 49].sum(0)


def _weight_grad_fake(x, grad, visible, slots):
    channels, dtype = x.shape[-1], _sum_type(x)
    return x.new_empty(49, channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


_conv = define_operator("depthwise_conv", _conv_plain, _conv_triton, _conv_fake)
_weight_grad = define_operator("depthwise_conv_weight_grad", _weight_grad_plain, _weight_grad_triton, _weight_grad_fake)


# ---- Derivatives


def _conv_setup(ctx, inputs, output):
    x, taps, bias, _, shift, ctx.sum_added, visible, slots = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, taps, bias, visible, slots)


def _conv_backward(ctx, grad, grad_shifted, grad_sums):
    grad_shifted = None if ctx.shift_dtype is None else grad_shifted
    sum_added = ctx.needs_input_grad[4]
    *grads, grad_shift = _conv_gradients(grad, grad_shifted, sum_added, *ctx.saved_tensors, ctx.needs_input_grad)
    grad_added = (grad + grad_sums if ctx.sum_added else grad) if ctx.needs_input_grad[3] else None
    grad_shift = grad_shift.to(ctx.shift_dtype) if sum_added else None
    return *grads, grad_added, grad_shift, None, None, None


def _conv_gradients(grad, added, sum_added, x, taps, bias, visible, slots, needed):
    """The gradients of x, taps and bias, None where not needed, and the sums of `added` over all sites.

    added: another gradient of x, to be added to its own, or None.
    """
    grad_x = grad_taps = grad_bias = sums = None
    grad, sum_added = grad.to(x.dtype), sum_added and added is not None
    if needed[0] or sum_added:
        zeros = torch.zeros_like(taps[0])
        grad_x, _, sums = _conv(grad, taps.flip(0), zeros, added, None, sum_added, visible, slots)
    if needed[1] or needed[2]:
        grad_taps, grad_bias = _weight_grad(x, grad, visible, slots)
        grad_taps, grad_bias = grad_taps.to(taps.dtype), grad_bias.to(bias.dtype)
    return grad_x, grad_taps, grad_bias, sums


class _ConvAndInput(torch.autograd.Function):
    """The convolution, and x itself: a later gradient of x is added by the kernel that computes the other."""

    @staticmethod
    def forward(ctx, x, taps, bias, dtype, visible, slots):
        rows = x.to(dtype)
        ctx.save_for_backward(rows, taps, bias, visible, slots)
        return _conv(rows, taps, bias, None, None, False, visible, slots)[0], x.view_as(x)

    @staticmethod
    def backward(ctx, grad, grad_x):
        *grads, _ = _conv_gradients(grad, grad_x, False, *ctx.saved_tensors, ctx.needs_input_grad)
        return *grads, None, None, None


def _weight_grad_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx, grad_taps, grad_bias):
    x, grad, *tables = ctx.saved_tensors
    of_x = of_grad = None
    if ctx.needs_input_grad[0]:
        of_x, *_ = _conv(grad, grad_taps.flip(0), torch.zeros_like(grad_bias), None, None, False, *tables)
    if ctx.needs_input_grad[1]:
        of_grad, *_ = _conv(x, grad_taps, grad_bias, None, None, False, *tables)
    return of_x, of_grad, None, None


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)


# ---- What the models call


def depthwise_conv(x, weight, bias, visible=None, slots=None, shift=None):
    """Depthwise convolution, zero padded or submanifold sparse, with a (C, 1, 7, 7): its result, and x for a shortcut.

    x: dense (N, H, W, C), or packed rows (N, S, C), which come with visible (N, V) and slots (N, h, w), of int32.
    shift: (C,), added to the x for the shortcut by the same kernel, whose derivative computes its gradient.
    """
    # The taps stay as they are: read once a program, summed in float32 in any case.
    taps = weight.flatten(1).t().contiguous()
    if shift is not None:
        y, x, _ = _conv(x, taps, bias, None, shift, False, visible, slots)
        return y, x
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return _ConvAndInput.apply(x, taps, bias, dtype, visible, slots)


def calls(device, dtype):
    """The operators with small inputs of a dtype: what `triton_works` tries."""
    visible = torch.tensor([[2, 0]], device=device)
    tables = visible.int(), patch_slots(visible, (2, 2))
    x, grad = torch.arange(128, device=device).view(2, 1, 2, 32).to(dtype) / 128
    taps, bias = x.new_ones(49, 32, dtype=torch.float32) / 64, x.new_ones(32, dtype=torch.float32)
    forward, backward = (None, bias, False), (grad, None, True)
    return [
        (_conv, (x, taps, bias, *forward, *tables)),
        (_conv, (x, taps, bias, *backward, *tables)),
        (_weight_grad, (x, grad, *tables)),
    ]
