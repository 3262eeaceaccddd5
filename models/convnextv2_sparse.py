"""The ConvNeXt V2 encoder on visible patches only: submanifold sparse convolution in plain PyTorch.

The mask covers whole patches of 8 x 8 sites after the stem (32 x 32 pixels by default), the same number in every
image, and downsampling (8 x 8 -> 4 x 4 -> 2 x 2 -> 1 site a patch) never crosses a patch border. So no general sparse
tensor is needed: the active sites are packed into rows, (N, S, C), a static shape.

  * Stem: the pixels of a site are one row, the convolution one matrix product.
  * LayerNorm, MLP and GRN take the rows as they are: every row is an active site.
  * The sites of a patch lie in Z-order (a Morton curve), so that each four consecutive rows are a 2 x 2 square: the
    2 x 2 stride-2 convolution is a view, (N, S/4, 4C), and a matrix product.
  * Only the depthwise 7x7 crosses patches: the rows are brought onto a canvas of zeros, (N, C, H, W), convolved, and
    the same rows gathered back. Output sites = input sites: that is submanifold sparse convolution. On CUDA a Triton
    kernel reads and writes the rows where they are (`models.kernels`).

All modules are called but the convolutions, whose weights are read as long as they are plain (see `is_plain`) and as
built here. Otherwise (a hook, an adapter, another kernel) they are called too, on a canvas or the whole image, which is
slower.

Shapes: as in `models.sites`. Parameters have the names and shapes of the dense `ConvNeXtV2`, so its weights fit without
conversion.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .convnextv2 import Block, Network
from .depthwise import sparse_depthwise_conv
from .sites import active_sites, map_as_rows, pack, rows_as_map, unpack
from .utils import LayerNorm, init_weights, is_plain


class SparseBlock(Block):
    """`Block` on packed rows: (N, S, C) -> (N, S, C)."""

    def forward(self, x, sites):
        bias = self.shortcut_bias(x)
        y, x = sparse_depthwise_conv(x, self.dwconv, sites, bias)
        return x + self.drop_path(self.mlp(y)) if bias is None else self.add_mlp(x, y)


def squares_to_channels(imgs, side):
    """(N, C, H, W) -> (N, C * side * side, H / side, W / side), as `F.pixel_unshuffle` but channels last in memory."""
    n, c, height, width = imgs.shape
    x = imgs.reshape(n, c, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, height // side, width // side, c * side * side).permute(0, 3, 1, 2)


class SparseStem(nn.Sequential):
    """Convolution and norm: images (N, in_chans, H, W) -> packed rows (N, S, C) of the first stage."""

    def forward(self, imgs, sites):
        conv, norm = self
        if is_patch_conv(conv, imgs):
            pixels = pack(squares_to_channels(imgs, conv.stride[0]), sites)  # (N, S, in_chans * stride * stride)
            x = F.linear(pixels, conv.weight.flatten(1), conv.bias)
        else:
            x = pack(conv(imgs), sites)
        return norm_rows(norm, x)


class SparseDownsample(nn.Sequential):
    """Norm and 2x2 stride-2 convolution of packed rows: (N, 4S, C) at sites -> (N, S, C') at next_sites."""

    def forward(self, x, sites, next_sites):
        norm, conv = self
        x = norm_rows(norm, x)
        if not (is_patch_conv(conv, x) and conv.stride == (2, 2)):
            return pack(conv(unpack(x, sites)), next_sites)
        x = x.reshape(x.shape[0], x.shape[1] // 4, 4 * x.shape[2])  # four rows in Z-order: the 2 x 2 sites row by row
        return F.linear(x, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class SparseConvNeXtV2(Network):
    """The encoder of FCMAE: images (N, in_chans, H, W), mask (N, L), 1 = masked -> (N, C, h, w), zero where masked.

    Args: those of `Network`.
    """

    block, stem, downsample = SparseBlock, SparseStem, SparseDownsample

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.apply(init_weights)

    def forward(self, imgs, mask, visible=None):
        """visible: (N, V) numbers of the visible patches, if known; else they are read from the mask.

        Reading their count waits for the device.
        """
        grid = self.grid(imgs)
        if visible is None:
            visible, _ = split_patches(mask, count_visible(mask))
        sites = active_sites(visible, grid, 8)
        x = self.downsample_layers[0](imgs, sites)
        x = self.stages[0](x, sites)
        for i in range(1, len(self.stages)):
            previous, sites = sites, active_sites(visible, grid, 8 >> i)
            x = self.downsample_layers[i](x, previous, sites)
            x = self.stages[i](x, sites)
        return unpack(x, sites)

    def grid(self, imgs):
        """The number of patches (h, w) of images (N, in_chans, H, W). Raises ValueError if the last is not whole."""
        unit = 8 * self.stem_stride
        if imgs.shape[2] % unit or imgs.shape[3] % unit:
            raise ValueError(f"images of {imgs.shape[2]} x {imgs.shape[3]}: both sides must be multiples of {unit}")
        return imgs.shape[2] // unit, imgs.shape[3] // unit


def norm_rows(norm, x):
    """Call norm, a layer for maps with channels first, on packed rows (N, S, C)."""
    if is_plain(norm, LayerNorm, x):  # without views, into whose gradients autograd does not add in place
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
    return map_as_rows(norm(rows_as_map(x)))


def is_patch_conv(conv, x):
    """Whether conv is a plain convolution of non-overlapping squares, so that a matrix product computes it."""
    return (
        is_plain(conv, nn.Conv2d, x)
        and conv.kernel_size == conv.stride == (conv.stride[0], conv.stride[0])
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def split_patches(mask, num_visible):
    """Mask (N, L) -> numbers of the visible (N, V) and of the masked (N, R) patches, each in order."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort: distinct numbers, of which the zeros' are lower
        places = torch.arange(mask.shape[1], device=mask.device)
        order = (mask * mask.shape[1] + places).topk(mask.shape[1], largest=False).indices
    else:
        order = mask.argsort(dim=1, stable=True)  # the zeros come first
    return order[:, :num_visible], order[:, num_visible:].contiguous()


def count_visible(mask):
    """The number of zeros in each row of mask (N, L). Raises ValueError unless it is one number, and not 0."""
    counts = (mask == 0).sum(dim=1).unique().tolist()
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"the mask leaves {counts} patches visible: must be one number, at least 1, in every image")
    return counts[0]
