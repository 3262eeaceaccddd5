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
from torch.utils._pytree import tree_leaves

from .sites import active_sites, pack, patch_slots, unpack

SIDE = tl.constexpr(7)  # of the convolution's kernel
HALO = tl.constexpr(3)

# A program has a block of tiles x channels, 4 x 64 or 8 x 32, two elements a thread: 49 taps then take 98 registers.
BLOCK = 256
NUM_WARPS = 4
# Programs to start, so that an H100 is filled four and two times: by their registers, three or two run at once on each
# of its 132 multiprocessors. Constants, not asked of the device, so that sums are split alike everywhere.
CONV_PROGRAMS = 4 * 3 * 132
WEIGHT_GRAD_PROGRAMS = 2 * 2 * 132

# What changes with the batch and the images: no reason to compile again
SIZES = ["num_tiles", "tiles_per_program", "num_visible", "height", "width"]


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
    result = ()
    for sy in tl.static_range(SUMS):
        for sx in tl.static_range(SUMS):
            total = sums[sy * SUMS + sx]
            if wy >= sy and wy - sy < FACTORS and wx >= sx and wx - sx < FACTORS:
                total = tl.fma(factors[(wy - sy) * FACTORS + wx - sx], x, total)
            result += (total,)
    return result


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


@triton.jit(do_not_specialize=SIZES)
def _conv_kernel(
    x, taps, bias, out, visible, slots, num_tiles, tiles_per_program, num_visible, height, width,
    C: tl.constexpr, K: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = bias + the convolution of x with the taps. Programs: chunks of tiles x blocks of channels."""
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    canvas = (slots, num_visible, height, width)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # One value a channel, but loaded as a whole block: each thread then holds those of the channels it works on.
    shared = tl.zeros((TILES, 1), tl.int32) + channel[None, :]
    start = tl.load(bias + shared, mask=shared < C, other=0).to(dtype)
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
        pointers = out + row.to(tl.int64)[:, None] * C + channel[None, :]
        for sy in tl.static_range(T):
            for sx in tl.static_range(T):
                offset, valid = _site(present, ty, tx, sy, sx, canvas, T)
                mask = valid[:, None] & (channel < C)[None, :]
                tl.store(pointers + offset * C, sums[sy * T + sx].to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
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

# Under Triton's interpreter (TRITON_INTERPRET=1) the kernels run on the CPU too: so they are tested
PACKAGE = __package__.replace(".", "_")  # of the operators, so that a clone and an installed copy can both be imported
DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)


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
    blocks, tiles = math.ceil(channels / block), BLOCK // block
    tiles_per_program = tiles * math.ceil(num_tiles * blocks / (tiles * programs))
    sizes = dict(num_tiles=num_tiles, tiles_per_program=tiles_per_program)
    sizes |= dict(num_visible=num_visible, height=height, width=width)
    sizes |= dict(C=channels, K=k, T=tile, TILES=tiles, CHANNELS=block, num_warps=NUM_WARPS, num_stages=1)
    return (math.ceil(num_tiles / tiles_per_program), blocks), sizes


def _maps(x, visible, slots):
    """x as maps (N, C, H, W), of float32 at least, and the function that turns such maps back into the form of x."""
    if slots is None:
        return x.permute(0, 3, 1, 2).to(_sum_type(x)), lambda maps: maps.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    k = math.isqrt(x.shape[1] // visible.shape[1])
    sites = active_sites(visible.long(), slots.shape[1:], k)
    return unpack(x.to(_sum_type(x)), sites), lambda maps: pack(maps, sites).to(x.dtype)


def _sum_type(x):
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op(f"{PACKAGE}::depthwise_conv", mutates_args=())
def _conv(
    x: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor, visible: torch.Tensor | None, slots: torch.Tensor | None
) -> torch.Tensor:
    """x, dense or packed, taps (49, C) and bias (C,) -> like x."""
    maps, back = _maps(x, visible, slots)
    weight = taps.to(maps.dtype).t().reshape(-1, 1, 7, 7)
    return back(F.conv2d(maps, weight, bias.to(maps.dtype), padding=3, groups=len(weight)))


@_conv.register_kernel(DEVICES)
def _(*inputs):
    x, taps, bias, visible, slots = _contiguous(*inputs)
    out = torch.empty_like(x)
    grid, sizes = _plan(x, visible, slots, CONV_PROGRAMS)
    with torch.cuda.device_of(x):
        _conv_kernel[grid](x, taps, bias, out, visible, slots, **sizes)
    return out


@_conv.register_fake
def _(x, taps, bias, visible, slots):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{PACKAGE}::depthwise_conv_weight_grad", mutates_args=())
def _weight_grad(
    x: torch.Tensor, grad: torch.Tensor, visible: torch.Tensor | None, slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the gradient of the output, both dense or packed -> those of the taps (49, C) and of the bias (C,)."""
    (maps, _), (grad_maps, _) = _maps(x, visible, slots), _maps(grad, visible, slots)
    channels = x.shape[-1]
    weight = torch.nn.grad.conv2d_weight(maps, (channels, 1, 7, 7), grad_maps, padding=3, groups=channels)
    return weight.flatten(1).t().contiguous(), grad_maps.sum((0, 2, 3))


@_weight_grad.register_kernel(DEVICES)
def _(*inputs):
    x, grad, visible, slots = _contiguous(*inputs)
    grid, sizes = _plan(x, visible, slots, WEIGHT_GRAD_PROGRAMS)
    partial = x.new_empty(grid[0], 50, x.shape[-1], dtype=_sum_type(x))
    with torch.cuda.device_of(x):
        _weight_grad_kernel[grid](x, grad, partial, visible, slots, **sizes)
    return partial[:, :49].sum(0), partial[:, 49].sum(0)


@_weight_grad.register_fake
def _(x, grad, visible, slots):
    channels, dtype = x.shape[-1], _sum_type(x)
    return x.new_empty(49, channels, dtype=dtype), x.new_empty(channels, dtype=dtype)


# ---- Derivatives


def _conv_setup(ctx, inputs, output):
    x, taps, bias, visible, slots = inputs
    ctx.save_for_backward(x, taps, visible, slots)
    ctx.bias_dtype = bias.dtype


def _conv_backward(ctx, grad):
    x, taps, *tables = ctx.saved_tensors
    grad_x = grad_taps = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _conv(grad, taps.flip(0), torch.zeros_like(taps[0]), *tables)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_taps, grad_bias = _weight_grad(x, grad, *tables)
        grad_taps, grad_bias = grad_taps.to(taps.dtype), grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_taps, grad_bias, None, None


def _weight_grad_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx, grad_taps, grad_bias):
    x, grad, *tables = ctx.saved_tensors
    of_x = _conv(grad, grad_taps.flip(0), torch.zeros_like(grad_bias), *tables) if ctx.needs_input_grad[0] else None
    of_grad = _conv(x, grad_taps, grad_bias, *tables) if ctx.needs_input_grad[1] else None
    return of_x, of_grad, None, None


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)


# ---- What the models call


def depthwise_conv(x, weight, bias):
    """Depthwise convolution, zero padded: (N, C, H, W), channels last in memory, with a (C, 1, 7, 7) -> the same."""
    return sparse_depthwise_conv(x.permute(0, 2, 3, 1), weight, bias, None, None).permute(0, 3, 1, 2)


def sparse_depthwise_conv(x, weight, bias, visible, slots):
    """Submanifold sparse depthwise convolution: packed rows (N, S, C) with a (C, 1, 7, 7) -> packed rows.

    visible: (N, V) and slots: (N, h, w), of int32; both None for a dense x (N, H, W, C).
    """
    if torch.is_autocast_enabled(x.device.type):
        # The taps stay as they are: read once a program, summed in float32 in any case.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _conv(x, weight.flatten(1).t().contiguous(), bias, visible, slots)


def try_on(device):
    """Run both kernels on a device and compare them with the reference. Raises what Triton raises, or RuntimeError."""
    visible = torch.tensor([[2, 0]], device=device)
    tables = visible.int(), patch_slots(visible, (2, 2))
    dtypes = [torch.float32, torch.bfloat16] if torch.device(device).type == "cuda" else [torch.float32]
    for dtype in dtypes:
        x, grad = torch.arange(128, device=device).view(2, 1, 2, 32).to(dtype) / 128
        taps, bias = torch.ones(49, 32, device=device) / 64, torch.ones(32, device=device)
        for operator, inputs in ((_conv, (x, taps, bias, *tables)), (_weight_grad, (x, grad, *tables))):
            results, expected = tree_leaves(operator(*inputs)), tree_leaves(operator._init_fn(*inputs))
            if not all(torch.allclose(*pair, atol=0.02) for pair in zip(results, expected, strict=True)):
                raise RuntimeError(f"wrong results of {operator._opoverload} for {dtype}")
