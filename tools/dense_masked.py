"""The plain way to compute FCMAE's encoder, a dense network that masks every activation: the reference of the others.

Masked sites must be zero before each depthwise convolution, and GRN's norm must skip them. It computes every site, in
(N, C, H, W) throughout, and shares only the parameters with the project's encoder.
"""

import torch
import torch.nn.functional as F
from torch import nn


def layer_norm(norm, x):
    """LayerNorm over the channels of (N, C, H, W), contiguous in that layout."""
    x = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm.weight, norm.bias, norm.eps)
    return x.permute(0, 3, 1, 2).contiguous()


def masked_block(block, x, visible):
    """A ConvNeXt V2 block on (N, C, H, W), zero where visible (N, 1, H, W) is."""
    dim = x.shape[1]
    y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=dim) * visible
    y = layer_norm(block.norm, y)
    y = F.conv2d(y, block.pwconv1.weight.view(4 * dim, dim, 1, 1), block.pwconv1.bias)
    y = F.gelu(y) * visible
    norm = torch.sqrt((y * y).sum((2, 3), keepdim=True))  # (N, 4C, 1, 1), over visible sites as the others are 0
    response = norm / (norm.mean(1, keepdim=True) + 1e-6)
    gamma, beta = (p.view(1, -1, 1, 1) for p in (block.grn.gamma, block.grn.beta))
    y = gamma * (y * response) + beta + y
    y = F.conv2d(y, block.pwconv2.weight.view(dim, 4 * dim, 1, 1), block.pwconv2.bias)
    return (x + y) * visible


class DenseMasked(nn.Module):
    """Images (N, in_chans, H, W), mask (N, L), 1 = masked -> latent (N, C, h, w), zero at masked patches."""

    def __init__(self, encoder):
        super().__init__()
        self.downsample_layers, self.stages = encoder.downsample_layers, encoder.stages

    def forward(self, imgs, mask, visible=None):
        h, w = (size // (8 * self.downsample_layers[0][0].stride[0]) for size in imgs.shape[2:])
        keep = 1 - mask.view(-1, 1, h, w).to(imgs.dtype)
        x = imgs
        for i, (layers, blocks) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            visible = keep.repeat_interleave(8 >> i, dim=2).repeat_interleave(8 >> i, dim=3)  # (N, 1, H, W)
            for layer in layers:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer_norm(layer, x)
            x = x * visible
            for block in blocks:
                x = masked_block(block, x, visible)
        return x
