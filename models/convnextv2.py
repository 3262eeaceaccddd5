"""ConvNeXt V2 (arXiv 2301.00808), the dense network for fine-tuning and evaluation.

Shapes: N images, C channels, H x W sites. Tensors are (N, C, H, W) outside and channels last in memory throughout.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from models.checkpoints import get_weights, load_backbone, network_config, split_decoder
from models.utils import GRN, LayerNorm, depthwise_conv, grn_linear, init_weights, run_block
from utils import UserError

# Appendix A of the paper: blocks and channels of the four stages
SIZES = {
    "convnextv2_atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "convnextv2_femto": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "convnextv2_pico": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "convnextv2_nano": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "convnextv2_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "convnextv2_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "convnextv2_large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "convnextv2_huge": dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}


class Block(nn.Module):
    """ConvNeXt V2 block (figure 5), (N, C, H, W) -> the same: depthwise 7x7, LayerNorm, MLP with GELU and GRN."""

    def __init__(self, dim, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def mlp(self, x):
        """All that follows the depthwise convolution, site by site but for GRN: (N, ..., C) -> (N, ..., C)."""
        return grn_linear(self.act(self.pwconv1(self.norm(x))), self.grn, self.pwconv2)

    def forward(self, x):
        y = depthwise_conv(x, self.dwconv.weight, self.dwconv.bias)
        y = self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.drop_path(y)


def make_downsample_layers(in_chans, dims, stem_stride):
    """The stem, a non-overlapping convolution, and the three 2x2 stride-2 convolutions before the later stages."""
    layers = nn.ModuleList(
        [
            nn.Sequential(
                nn.Conv2d(in_chans, dims[0], kernel_size=stem_stride, stride=stem_stride),
                LayerNorm(dims[0], data_format="channels_first"),
            )
        ]
    )
    for dim, next_dim in zip(dims[:-1], dims[1:], strict=True):
        layers.append(
            nn.Sequential(
                LayerNorm(dim, data_format="channels_first"),
                nn.Conv2d(dim, next_dim, kernel_size=2, stride=2),
            )
        )
    return layers


def make_stages(block, depths, dims, drop_path_rate):
    """The four stages of `block(dim, drop_path)`; the drop path rate rises linearly from 0 over all blocks."""
    last = max(sum(depths) - 1, 1)
    rates = (drop_path_rate * block / last for block in range(sum(depths)))
    return nn.ModuleList(
        nn.Sequential(*(block(dim, drop_path=next(rates)) for _ in range(depth)))
        for depth, dim in zip(depths, dims, strict=True)
    )


class ConvNeXtV2(nn.Module):
    """ConvNeXt V2 classifier: images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        in_chans: channels of the images.
        num_classes: width of the head.
        depths, dims: blocks and channels of the four stages.
        drop_path_rate: drop path rate of the last block, rising linearly from 0 at the first.
        head_init_scale: factor on the initial weights and bias of the head.
        stem_stride: side of the stem's square pixels-to-site patches; the total stride is 8 times that.
    """

    def __init__(
        self,
        in_chans=3,
        num_classes=1000,
        depths=(3, 3, 9, 3),
        dims=(96, 192, 384, 768),
        drop_path_rate=0.0,
        head_init_scale=1.0,
        stem_stride=4,
    ):
        super().__init__()
        self.depths = tuple(depths)
        self.grad_checkpointing = False
        self.downsample_layers = make_downsample_layers(in_chans, dims, stem_stride)
        self.stages = make_stages(Block, depths, dims, drop_path_rate)
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
            self.head.bias.mul_(head_init_scale)

    def forward_trunk(self, x):
        """(N, in_chans, H, W) -> features of the sites (N, C, h, w), h = H / total stride."""
        x = x.contiguous(memory_format=torch.channels_last)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in stage:
                x = run_block(self.grad_checkpointing, block, x)
        return x

    def set_grad_checkpointing(self, enable=True):
        """Whether the activations within blocks are made again in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def forward_features(self, x):
        """(N, in_chans, H, W) -> pooled, normalised features (N, C)."""
        return self.norm(self.forward_trunk(x).mean((2, 3)))

    def forward(self, x, window=None):
        """(N, in_chans, H, W) -> logits (N, num_classes).

        window: (height, width) in sites. The head then sees each such window by itself, as it saw whole images of the
        training's size, and its logits are averaged: the fully convolutional use of it, for larger images.
        """
        if window is None:
            return self.head(self.forward_features(x))
        x = self.forward_trunk(x)
        window = [min(side, most) for side, most in zip(window, x.shape[2:], strict=True)]
        x = F.avg_pool2d(x, window, stride=1)  # (N, C, windows down, windows across)
        return self.head(self.norm(x.permute(0, 2, 3, 1))).mean((1, 2))


def from_state_dict(state):
    """The classifier that a state dict (dense names) was taken from, of any size, with its weights.

    Raises ValueError, naming what is missing, if it is not of a classifier.
    """
    if "head.weight" not in state:
        raise ValueError("no head.weight: accepted is a classifier with its head")
    model = ConvNeXtV2(num_classes=len(state["head.weight"]), **network_config(state))
    model.load_state_dict(state)
    return model


def from_checkpoint(checkpoint, path, model_key="model|module"):
    """The network of a checkpoint of any known form and size, and what was loaded: see `load_backbone`.

    Norm and head are as they start where the file has none. Raises UserError if it holds no ConvNeXt V2.
    """
    state, _ = split_decoder(get_weights(checkpoint, path, model_key))
    try:
        config = network_config(state)
    except ValueError as error:
        raise UserError(f"{path}: {error}: accepted is a ConvNeXt V2") from None
    model = ConvNeXtV2(num_classes=len(state.get("head.weight", [0])), **config)
    return model, load_backbone(model, state, path)


def convnextv2_atto(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_atto"], **kwargs)


def convnextv2_femto(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_femto"], **kwargs)


def convnextv2_pico(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_pico"], **kwargs)


def convnextv2_nano(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_nano"], **kwargs)


def convnextv2_tiny(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_tiny"], **kwargs)


def convnextv2_base(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_base"], **kwargs)


def convnextv2_large(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_large"], **kwargs)


def convnextv2_huge(**kwargs):
    return ConvNeXtV2(**SIZES["convnextv2_huge"], **kwargs)
