"""ConvNeXt V2 (arXiv 2301.00808): the dense network for fine-tuning and evaluation.

Shapes: N images, C channels, H x W sites. Tensors are (N, C, H, W) outside and channels last in memory throughout.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .depthwise import depthwise_conv, runs_kernel
from .mlp import can_fuse, fused_mlp, output_bias
from .utils import GRN, LayerNorm, Stage, channels_last, init_weights, is_plain, names_without_decay
from .weights import check_same_blocks, find_weights, load_backbone, network_config, split_decoder

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
    """ConvNeXt V2 block (figure 5), (N, C, H, W) -> the same: depthwise 7x7, LayerNorm, MLP with GELU and GRN.

    A further argument here is an option of every network: see `Network`.
    """

    def __init__(self, dim, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = make_drop_path(drop_path)

    def mlp(self, x):
        """All that follows the depthwise convolution, site by site but for GRN: (N, ..., C) -> (N, ..., C)."""
        if can_fuse(x, self.norm, self.pwconv1, self.act, self.grn, self.pwconv2):
            return fused_mlp(x, self.norm, self.pwconv1, self.grn, self.pwconv2)
        return self.pwconv2(self.grn(self.act(self.pwconv1(self.norm(x)))))

    def shortcut_bias(self, x):
        """The constant (C,) in the MLP, where the convolution's kernel is to add it to the shortcut; else None.

        The MLP's last matrix product then adds the shortcut, which saves passes over memory. x: the block's input.
        """
        is_ours = (
            type(self).mlp is Block.mlp and "mlp" not in self.__dict__ and is_plain(self.drop_path, nn.Identity, x)
        )
        if is_ours and runs_kernel(self.dwconv, x):
            return output_bias(x, self.norm, self.pwconv1, self.act, self.grn, self.pwconv2)
        return None

    def add_mlp(self, shortcut, x):
        """shortcut + the MLP of x, (N, ..., C) each, where the shortcut has `shortcut_bias`."""
        return fused_mlp(x, self.norm, self.pwconv1, self.grn, self.pwconv2, shortcut)

    def forward(self, x):
        bias = self.shortcut_bias(x)
        y, x = depthwise_conv(x, self.dwconv, bias)
        y = y.permute(0, 2, 3, 1)
        if bias is not None:
            return self.add_mlp(x.permute(0, 2, 3, 1), y).permute(0, 3, 1, 2)
        return x + self.drop_path(self.mlp(y).permute(0, 3, 1, 2))


def make_drop_path(rate):
    if rate == 0.0:
        return nn.Identity()
    from timm.layers import DropPath  # timm takes a second to import

    return DropPath(rate)


class Network(nn.Module):
    """The layers that the dense classifier and the sparse encoder share.

    Args:
        in_chans: channels of the images.
        depths, dims: blocks and channels of the four stages.
        drop_path_rate: drop path rate of the last block, rising linearly from 0 at the first.
        stem_stride: side of the stem's square pixels-to-site patches; the total stride is 8 times that.
        block_options: further arguments of every block.

    `config` holds the arguments of the constructor, `cls(**model.config)` builds the same network.
    """

    block, stem, downsample = Block, nn.Sequential, nn.Sequential  # classes of the layers, for subclasses to replace

    def __init__(
        self,
        in_chans=3,
        depths=(3, 3, 9, 3),
        dims=(96, 192, 384, 768),
        drop_path_rate=0.0,
        stem_stride=4,
        **block_options,
    ):
        super().__init__()
        self.depths, self.dims, self.stem_stride = tuple(depths), tuple(dims), stem_stride
        self.block_options = block_options
        self.config = dict(in_chans=in_chans, depths=self.depths, dims=self.dims, drop_path_rate=drop_path_rate)
        defaults = inspect.signature(Block).parameters
        options = {name: value for name, value in block_options.items() if value != defaults[name].default}
        self.config |= dict(stem_stride=stem_stride, **options)
        self.downsample_layers = nn.ModuleList([self.make_stem(in_chans)])
        self.downsample_layers += [self.make_downsample(*pair) for pair in zip(dims[:-1], dims[1:], strict=True)]
        last = max(sum(depths) - 1, 1)
        rates = (drop_path_rate * block / last for block in range(sum(depths)))
        self.stages = nn.ModuleList(
            Stage(*(self.block(dim, drop_path=next(rates), **block_options) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )

    def make_stem(self, in_chans):
        """The stem: a non-overlapping convolution of stem_stride x stem_stride pixels."""
        conv = nn.Conv2d(in_chans, self.dims[0], kernel_size=self.stem_stride, stride=self.stem_stride)
        return self.stem(conv, LayerNorm(self.dims[0], data_format="channels_first"))

    def make_downsample(self, dim, next_dim):
        """The layer before a later stage: a 2x2 stride-2 convolution."""
        norm = LayerNorm(dim, data_format="channels_first")
        return self.downsample(norm, nn.Conv2d(dim, next_dim, kernel_size=2, stride=2))

    def set_grad_checkpointing(self, enable=True):
        """Recompute the activations within blocks in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self):
        """Names of parameters without weight decay; timm's `create_optimizer_v2` asks for them."""
        return names_without_decay(self)


class ConvNeXtV2(Network):
    """ConvNeXt V2 classifier: images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        num_classes: width of the head.
        head_init_scale: factor on the initial weights and bias of the head.
        network: the arguments of `Network`.
    """

    def __init__(self, in_chans=3, num_classes=1000, *, head_init_scale=1.0, **network):
        super().__init__(in_chans, **network)
        self.config |= dict(num_classes=num_classes, head_init_scale=head_init_scale)
        self.norm = LayerNorm(self.dims[-1])
        self.head = nn.Linear(self.dims[-1], num_classes)
        self.apply(init_weights)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
            self.head.bias.mul_(head_init_scale)

    def feature_maps(self, x):
        """(N, in_chans, H, W) -> the outputs of the four stages, for dense prediction: a list of (N, C, h, w).

        C is `dims`, and h = H / stride rounded down, where the strides are 1, 2, 4 and 8 times `stem_stride`.
        """
        maps, x = [], channels_last(x)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_trunk(self, x):
        """(N, in_chans, H, W) -> features of the sites (N, C, h, w), h = H / total stride."""
        return self.feature_maps(x)[-1]

    def forward_features(self, x):
        """(N, in_chans, H, W) -> pooled, normalized features (N, C)."""
        return self.norm(self.forward_trunk(x).permute(0, 2, 3, 1).mean((1, 2)))  # so is its gradient channels last

    def forward(self, x, window=None):
        """(N, in_chans, H, W) -> logits (N, num_classes).

        window: (height, width) in sites, for images larger than those of the training. The head sees each such window
        by itself, as it saw whole images in training, and its logits are averaged: fully convolutional evaluation.
        """
        if window is None or isinstance(window, torch.fx.Proxy):  # torch.fx puts a proxy in the place of None
            return self.head(self.forward_features(x))
        x = self.forward_trunk(x)
        window = [min(side, most) for side, most in zip(window, x.shape[2:], strict=True)]
        x = F.avg_pool2d(x, window, stride=1)  # (N, C, windows down, windows across)
        return self.head(self.norm(x.permute(0, 2, 3, 1))).mean((1, 2))


def from_checkpoint(checkpoint, model_key="model|module"):
    """The classifier of a checkpoint in any known form, and lines that report what was loaded: see `load_backbone`.

    The size follows from the weights, and other options from the checkpoint's `config`, if it has one. Norm and head
    keep their initial weights where the checkpoint has none. Raises ValueError if it holds no ConvNeXt V2.
    """
    state, _ = split_decoder(find_weights(checkpoint, model_key))
    try:
        config = network_options(checkpoint.get("config") or {}) | network_config(state)
        model = ConvNeXtV2(num_classes=len(state.get("head.weight", [0])), **config)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:  # of a crafted file, anything
        raise ValueError(f"{error}: must be the weights of a ConvNeXt V2") from None
    check_same_blocks(checkpoint.get("config") or {}, model)  # an option that this code does not know
    return model, load_backbone(model, state)


def find_size(config):
    """The name in SIZES of a network with these depths and dims, or None."""
    sizes = {name: (size["depths"], size["dims"]) for name, size in SIZES.items()}
    return next((name for name in sizes if sizes[name] == (tuple(config["depths"]), tuple(config["dims"]))), None)


def network_options(config):
    """The arguments of `Network`, its blocks' included, among those of a model that is built on it."""
    names = inspect.signature(Network).parameters.keys() | inspect.signature(Block).parameters.keys()
    return {name: value for name, value in config.items() if name in names}


convnextv2_atto = partial(ConvNeXtV2, **SIZES["convnextv2_atto"])
convnextv2_femto = partial(ConvNeXtV2, **SIZES["convnextv2_femto"])
convnextv2_pico = partial(ConvNeXtV2, **SIZES["convnextv2_pico"])
convnextv2_nano = partial(ConvNeXtV2, **SIZES["convnextv2_nano"])
convnextv2_tiny = partial(ConvNeXtV2, **SIZES["convnextv2_tiny"])
convnextv2_base = partial(ConvNeXtV2, **SIZES["convnextv2_base"])
convnextv2_large = partial(ConvNeXtV2, **SIZES["convnextv2_large"])
convnextv2_huge = partial(ConvNeXtV2, **SIZES["convnextv2_huge"])
