"""The ConvNeXt V2 encoder on MinkowskiEngine's general sparse tensors, the original's way, kept to compare with.

Same parameters and same numbers as `SparseConvNeXtV2`, but slower. Needs MinkowskiEngine: 0.5.4, or the original's CUDA
fork.
"""

import collections
import collections.abc

import torch
from torch import nn

from .convnextv2 import Block
from .convnextv2_sparse import SparseConvNeXtV2, count_visible, norm_rows, split_patches
from .sites import active_sites, pack

collections.Sequence = collections.abc.Sequence  # MinkowskiEngine 0.5.4 imports it from where Python 3.9 had it
try:
    import MinkowskiEngine as ME
except ImportError as error:
    raise ImportError(f"the minkowski backend needs MinkowskiEngine ({error}); `make minkowski` builds it") from None


class MinkowskiConv(nn.Module):
    """A Minkowski convolution without parameters of its own: it is called with the dense ones."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        del self.layer.kernel  # else it would appear in the state dict

    def forward(self, x, conv):
        """Sparse tensor and the `nn.Conv2d` whose weight and bias to use -> sparse tensor."""
        # (out, in, kh, kw) -> (kh * kw, in, out), or (kh * kw, C) if depthwise; the first axis of space runs fastest
        kernel = conv.weight.permute(3, 2, 1, 0).flatten(0, 1)
        self.layer.kernel = kernel.squeeze(1) if conv.groups > 1 else kernel.contiguous()
        x = self.layer(x)
        return with_features(x, x.F + conv.bias)


def with_features(x, features):
    """The sparse tensor x with other features."""
    return ME.SparseTensor(features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)


def rows_by_image(x, n):
    """The features of a sparse tensor of n images as (n, S, C), and the order of its rows that does it."""
    order = x.C[:, 0].argsort(stable=True)
    return x.F[order].view(n, -1, x.F.shape[1]), order


class MinkowskiConvNeXtV2(SparseConvNeXtV2):
    """The encoder of FCMAE on MinkowskiEngine. Arguments, parameters and results as of `SparseConvNeXtV2`.

    It reads the weights of the convolutions, which it does not call, and loops over the blocks of the stages.
    """

    block = Block

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        depthwise = getattr(ME, "MinkowskiDepthwiseConvolution", ME.MinkowskiChannelwiseConvolution)
        dims = self.dims
        with torch.random.fork_rng(devices=[]):  # their initial weights are not used: they must not shift later draws
            self.depthwise = nn.ModuleList(MinkowskiConv(depthwise(dim, kernel_size=7, dimension=2)) for dim in dims)
            self.pool = nn.ModuleList(
                MinkowskiConv(ME.MinkowskiConvolution(a, b, kernel_size=2, stride=2, dimension=2))
                for a, b in zip(dims[:-1], dims[1:], strict=True)
            )

    def forward(self, imgs, mask, visible=None):
        """As of `SparseConvNeXtV2`."""
        if visible is None:
            visible, _ = split_patches(mask, count_visible(mask))
        n, (h, w) = len(imgs), self.grid(imgs)
        sites = active_sites(visible, (h, w), 8)
        rows = self.downsample_layers[0](imgs, sites)
        at = torch.cartesian_prod(*(torch.arange(size, device=imgs.device) for size in (n, 8 * h, 8 * w)))
        at = at.view(n, 8 * h, 8 * w, 3).permute(0, 3, 1, 2)
        x = ME.SparseTensor(rows.flatten(0, 1), coordinates=pack(at, sites).flatten(0, 1).int(), device=imgs.device)
        for stage, blocks in enumerate(self.stages):
            if stage > 0:
                norm, conv = self.downsample_layers[stage]
                x = self.pool[stage - 1](with_features(x, norm_rows(norm, x.F[None])[0]), conv)
            for block in blocks:
                y = self.depthwise[stage](x, block.dwconv)
                rows, order = rows_by_image(y, n)
                y = torch.empty_like(y.F).index_copy(0, order, block.drop_path(block.mlp(rows)).flatten(0, 1))
                x = with_features(x, x.F + y)
        image, row, column = x.C.long().t()
        latent = x.F.new_zeros(n * h * w, x.F.shape[1])
        latent = latent.index_copy(0, (image * h + row // 8) * w + column // 8, x.F)
        return latent.view(n, h, w, -1).permute(0, 3, 1, 2)
