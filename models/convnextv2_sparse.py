"""The ConvNeXt V2 encoder on visible patches only: submanifold sparse convolution in plain PyTorch.

The mask removes whole patches of 8 x 8 sites after the stem (32 x 32 pixels by default), the same number in every
image, and downsampling (8 x 8 -> 4 x 4 -> 2 x 2 -> 1 site a patch) never crosses a patch border. So no general sparse
tensor is needed: the active sites are packed into rows, (N, S, C), a static shape.

  * Stem: the pixels of a site are one row, the convolution one matrix product.
  * LayerNorm, MLP and GRN take the rows as they are: every row is an active site.
  * The sites of a patch lie in Z-order (a Morton curve), so that each four consecutive rows are a 2 x 2 square: the
    2 x 2 stride-2 convolution is a view, (N, S/4, 4C), and a matrix product.
  * Only the depthwise 7x7 crosses patches: the rows are brought onto a canvas of zeros, (N, C, H, W), convolved, and
    the same rows gathered back. Output sites = input sites: that is submanifold sparse convolution. With `use_triton`
    a kernel for CUDA reads and writes the rows where they are (`models.kernels`).

Shapes: N images, h x w = L patches each, of which V visible; k x k sites a patch (k = 8, 4, 2, 1 by stage);
H x W = hk x wk sites, of which S = V k^2 active; C channels. Parameters have the names and shapes of the dense
`ConvNeXtV2`, so its weights fit without conversion.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.convnextv2 import Block, make_downsample_layers, make_stages
from models.utils import (
    cast_as_autocast,
    conv_channels_last,
    depthwise_conv,
    folded_weight_grad,
    grad_by_autograd,
    init_weights,
    run_block,
    runs_in_triton,
)


class Sites(NamedTuple):
    """The active sites of one stage: where the packed rows lie on the canvas, site by site and patch by patch."""

    rows: torch.Tensor  # (N * S,) number of each packed row's site among the N * H * W of the canvas
    canvas: tuple  # N, H, W
    sources: torch.Tensor  # (N, H, W) number of each site's packed row, N * S where there is none; None but on the CPU
    visible: torch.Tensor  # (N, V) numbers of the visible patches, int32
    slots: torch.Tensor  # (N, h, w) see `patch_slots`


def z_order(k, device=None):
    """Row and column (k * k,) each of the sites of a k x k square along a Z-order curve; k is a power of 2."""
    i = torch.arange(k * k, device=device)
    y = x = torch.zeros_like(i)
    for bit in range(k.bit_length() - 1):
        x = x | ((i >> 2 * bit) & 1) << bit
        y = y | ((i >> (2 * bit + 1)) & 1) << bit
    return y, x


def patch_slots(visible, grid):
    """Numbers (N, V) of visible patches -> (N, h, w) which of the V each patch of the grid is, -1 if removed; int32."""
    slots = torch.full((len(visible), grid[0] * grid[1]), -1, dtype=torch.int32, device=visible.device)
    order = torch.arange(visible.shape[1], dtype=torch.int32, device=visible.device)
    return slots.scatter(1, visible, order.expand_as(visible)).view(-1, *grid)


def active_sites(visible, grid, k):
    """The sites of visible patches: (N, V) patch numbers on a grid of (h, w), k x k sites a patch -> `Sites`."""
    n, height, width = len(visible), grid[0] * k, grid[1] * k
    y, x = z_order(k, visible.device)
    y = (visible // grid[1])[:, :, None] * k + y  # (N, V, k * k)
    x = (visible % grid[1])[:, :, None] * k + x
    image = torch.arange(n, device=visible.device)[:, None, None]
    rows = ((image * height + y) * width + x).flatten()
    canvas, sources = (n, height, width), None
    if visible.device.type == "cpu":
        sources = (
            torch.full((n * height * width,), len(rows)).index_copy_(0, rows, torch.arange(len(rows))).view(canvas)
        )
    return Sites(rows, canvas, sources, visible.int(), patch_slots(visible, grid))


def unpack(x, sites):
    """Packed rows (N, S, C) -> canvas (N, C, H, W), zero at the other sites."""
    canvas = x.new_zeros(math.prod(sites.canvas), x.shape[-1]).index_copy_(0, sites.rows, x.flatten(0, 1))
    return canvas.view(*sites.canvas, -1).permute(0, 3, 1, 2)


def unpack_by_gathering(x, sites, space_first=False):
    """What `unpack` returns, in a third of its time on the CPU; its derivative would take longer there.

    space_first: the canvas lies in memory as (H, W, N, C) instead of (N, H, W, C).
    """
    rows = torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])])
    sources = sites.sources.permute(1, 2, 0) if space_first else sites.sources
    canvas = rows.index_select(0, sources.flatten()).view(*sources.shape, -1)
    return canvas.permute(2, 3, 0, 1) if space_first else canvas.permute(0, 3, 1, 2)


def pack(canvas, sites):
    """Canvas (N, C, H, W) -> packed rows (N, S, C)."""
    rows = canvas.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sites.rows)
    return rows.view(sites.canvas[0], -1, rows.shape[-1])


class _SparseDepthwiseConvCPU(torch.autograd.Function):
    """`pack(depthwise_conv(unpack(x)))` for the CPU, that keeps rows instead of canvases for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, sites):
        ctx.save_for_backward(x, weight, bias)
        ctx.sites = sites
        return pack(conv_channels_last(unpack_by_gathering(x, sites), weight, bias), sites)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True

            def plain(x, weight, bias):
                return pack(depthwise_conv(unpack(x, ctx.sites), weight, bias), ctx.sites)

            return *grad_by_autograd(plain, (x, weight, bias), grad), None
        grad_x = pack(conv_channels_last(unpack_by_gathering(grad, ctx.sites), weight.flip(2, 3)), ctx.sites)
        x_canvas, grad_canvas = (unpack_by_gathering(rows, ctx.sites, space_first=True) for rows in (x, grad))
        grad_weight = folded_weight_grad(x_canvas, grad_canvas, weight)
        return grad_x, grad_weight, grad.sum((0, 1)), None


def sparse_depthwise_conv(x, weight, bias, sites):
    """Submanifold sparse depthwise convolution: packed rows (N, S, C) with a kernel (C, 1, K, K) -> packed rows."""
    if runs_in_triton(x, weight):
        from models import kernels  # imports Triton

        return kernels.sparse_depthwise_conv(x, weight, bias, sites.visible, sites.slots)
    if x.device.type == "cpu":
        return _SparseDepthwiseConvCPU.apply(*cast_as_autocast(x, weight, bias), sites)
    return pack(depthwise_conv(unpack(x, sites), weight, bias), sites)


def norm_rows(norm, x):
    """A "channels_first" `LayerNorm` applied to packed rows (N, S, C), whose channels are last."""
    return nn.LayerNorm.forward(norm, x)


class SparseBlock(Block):
    """`Block` on packed rows: (N, S, C) -> (N, S, C)."""

    def forward(self, x, sites):
        y = sparse_depthwise_conv(x, self.dwconv.weight, self.dwconv.bias, sites)
        return x + self.drop_path(self.mlp(y))


class SparseConvNeXtV2(nn.Module):
    """The encoder of FCMAE: images (N, in_chans, H, W), mask (N, L), 1 = removed -> (N, C, h, w), zero where removed.

    Args: as of `ConvNeXtV2`.
    """

    block = SparseBlock

    def __init__(self, in_chans=3, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), drop_path_rate=0.0, stem_stride=4):
        super().__init__()
        self.stem_stride = stem_stride
        self.grad_checkpointing = False
        self.downsample_layers = make_downsample_layers(in_chans, dims, stem_stride)
        self.stages = make_stages(self.block, depths, dims, drop_path_rate)
        self.apply(init_weights)

    def forward(self, imgs, mask, num_visible=None):
        """num_visible: V, if the caller knows it; else it is read from the mask, which waits for the device."""
        visible, grid = self.visible_patches(mask, num_visible), self.grid(imgs)
        sites = active_sites(visible, grid, 8)
        x = self.stem(imgs, sites)
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                sites = active_sites(visible, grid, 8 >> stage)
                x = self.downsample(x, self.downsample_layers[stage])
            for block in blocks:
                x = run_block(self.grad_checkpointing, block, x, sites)
        return unpack(x, sites)

    def grid(self, imgs):
        """The number of patches (h, w) of images (N, in_chans, H, W). Raises ValueError for a part of a patch."""
        unit = 8 * self.stem_stride
        if imgs.shape[2] % unit or imgs.shape[3] % unit:
            raise ValueError(f"images of {imgs.shape[2]} x {imgs.shape[3]}: both sides must be multiples of {unit}")
        return imgs.shape[2] // unit, imgs.shape[3] // unit

    @staticmethod
    def visible_patches(mask, num_visible=None):
        """Mask (N, L) -> numbers (N, V) of the visible patches, in order."""
        if num_visible is None:
            num_visible = count_visible(mask)
        return mask.argsort(dim=1, stable=True)[:, :num_visible]  # the zeros come first

    def stem(self, imgs, sites):
        """Images (N, in_chans, H, W) -> packed rows (N, S, C) of the first stage."""
        conv, norm = self.downsample_layers[0]
        pixels = pack(F.pixel_unshuffle(imgs, self.stem_stride), sites)  # (N, S, in_chans * stride * stride)
        x = F.linear(pixels, conv.weight.flatten(1), conv.bias)
        return norm_rows(norm, x)

    @staticmethod
    def downsample(x, layer):
        """2x2 stride-2 convolution of packed rows: (N, 4S, C) -> (N, S, C')."""
        norm, conv = layer
        x = norm_rows(norm, x)
        x = x.view(len(x), -1, 4 * x.shape[-1])  # four rows in Z-order: the 2 x 2 sites row by row
        return F.linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def count_visible(mask):
    """The number of zeros in each row of mask (N, L). Raises ValueError unless it is one number, and not 0."""
    counts = (mask == 0).sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"the mask leaves {counts} patches visible: must be one number, at least 1, in every image")
    return counts[0]
