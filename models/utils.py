"""Layers that the dense and the sparse ConvNeXt V2 share, and what a model costs."""

import importlib.util
import os
from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, of (N, ..., C) with "channels_last" or (N, C, H, W) with "channels_first"."""

    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(f"data_format {data_format!r}: must be 'channels_last' or 'channels_first'")
        super().__init__(normalized_shape, eps=eps)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x)
        # Both permutations are views: the tensors of this project lie in memory channels last.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def grad_by_autograd(function, inputs, grad):
    """Gradients of function(*inputs), of plain operations, that can be differentiated again: for AdaHessian."""
    with torch.enable_grad():
        needed = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(function(*inputs), needed, grad, create_graph=True))
    return tuple(next(grads) if x.requires_grad else None for x in inputs)


def _grn_statistics(x):
    """Norm of each channel of x (N, ..., C) over space, and their mean: (N, ..., C) and (N, ..., 1).

    float32 at least: the sum of squares of float16 overflows.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = x.to(dtype).square().sum(tuple(range(1, x.ndim - 1)), keepdim=True).sqrt()
    return norm, norm.mean(-1, keepdim=True) + 1e-6


def _grn_gradients(grad_scale, x, gamma, norm, mean):
    """From the gradient of GRN's scale 1 + gamma * n, n = norm / mean: that of gamma, and what x adds to its own."""
    n = norm / mean
    grad_n = grad_scale * gamma
    grad_norm = (grad_n - (grad_n * n).mean(-1, keepdim=True)) / mean
    # d norm / d x = x / norm, and 0 where a channel is zero on all sites
    factor = torch.where(norm > 0, grad_norm / norm, 0)
    return (grad_scale * n).flatten(0, -2).sum(0), factor.to(x.dtype)


class _GRN(torch.autograd.Function):
    """gamma * (x * n) + beta + x of (N, ..., C); the derivative by hand keeps x once and passes over it less."""

    @staticmethod
    def forward(ctx, x, gamma, beta):
        norm, mean = _grn_statistics(x)
        ctx.save_for_backward(x, gamma, beta, norm, mean)
        return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * norm / mean).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, norm, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return grad_by_autograd(_grn, (x, gamma, beta), grad)
        grad_scale = (grad.to(norm.dtype) * x.to(norm.dtype)).sum(tuple(range(1, x.ndim - 1)), keepdim=True)
        grad_gamma, factor = _grn_gradients(grad_scale, x, gamma, norm, mean)
        grad_x = (grad * (1 + gamma * norm / mean).to(x.dtype)).addcmul_(x, factor)
        return grad_x, grad_gamma, grad.flatten(0, -2).sum(0, dtype=norm.dtype)


class _GRNLinear(torch.autograd.Function):
    """A linear layer after GRN, (N, S, C) -> (N, S, D), with the scale of each image folded into its own weight.

    GRN's output is never made, nor its gradient: both are as large as x, and every pass over them costs more than the
    products where S is many times D. The gradients of scale and weight are sums over space of the same products of
    x and grad, one (D, C) an image.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias):
        norm, mean = _grn_statistics(x)
        ctx.save_for_backward(x, gamma, beta, weight, bias, norm, mean)
        weights = (weight * (1 + gamma * norm / mean)).to(x.dtype)  # (N, D, C)
        return torch.baddbmm((bias + weight @ beta).to(x.dtype), x, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, weight, bias, norm, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return grad_by_autograd(_grn_linear, (x, gamma, beta, weight, bias), grad)
        scale = 1 + gamma * norm / mean
        products = torch.bmm(grad.transpose(1, 2), x).to(norm.dtype)  # (N, D, C)
        grad_bias = grad.sum((0, 1), dtype=norm.dtype)
        grad_weight = (products * scale).sum(0).addcmul_(grad_bias[:, None], beta)
        grad_gamma, factor = _grn_gradients((products * weight).sum(1, keepdim=True), x, gamma, norm, mean)
        grad_x = torch.bmm(grad, (weight * scale).to(x.dtype)).addcmul_(x, factor)
        return grad_x, grad_gamma, grad_bias @ weight, grad_weight, grad_bias


def _grn(x, gamma, beta):
    """What `_GRN` computes, in plain operations."""
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), keepdim=True)
    return gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + beta + x


def _grn_linear(x, gamma, beta, weight, bias):
    """What `_GRNLinear` computes, in plain operations."""
    return F.linear(_grn(x, gamma, beta), weight, bias)


def grn_linear(x, grn, linear):
    """linear(grn(x)) of x (N, ..., C), in whichever way takes fewer passes over memory."""
    sites = x.shape[1:-1].numel()
    if sites < 8 * linear.out_features:  # an image's own weight would be as large as its features
        return linear(grn(x))
    out = _GRNLinear.apply(x.flatten(1, -2), grn.gamma.flatten(), grn.beta.flatten(), linear.weight, linear.bias)
    return out.view(*x.shape[:-1], -1)


class GRN(nn.Module):
    """Global response normalisation (section 4, algorithm 1) of (N, ..., C): per image, over space, for each channel.

    Everything between the first and the last axis is space, so the same layer serves the dense (N, H, W, C) and the
    packed (N, S, C).
    """

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        return _GRN.apply(x, self.gamma.flatten(), self.beta.flatten())


def _fold(x):
    """(N, C, H, W) -> (1, N * C, H, W) channels last: images become channels. A view if x lies as (H, W, N, C)."""
    n, c, h, w = x.shape
    return x.permute(2, 3, 0, 1).reshape(1, h, w, n * c).permute(0, 3, 1, 2)


def conv_channels_last(x, weight, bias=None):
    """`_depthwise_conv` with channels last in memory, which on the CPU is 2 to 3 times as fast."""
    return _depthwise_conv(x.contiguous(memory_format=torch.channels_last), weight, bias)


def folded_weight_grad(x, grad, weight):
    """The gradient of a depthwise convolution's weight from its input and its output's gradient, (N, C, H, W).

    Fastest where both lie in memory as (H, W, N, C).
    """
    n, c = x.shape[:2]
    products = F.conv2d(_fold(x), _fold(grad).transpose(0, 1), padding=weight.shape[-1] // 2, groups=n * c)
    return products.view(n, *weight.shape).sum(0)


class _DepthwiseConvCPU(torch.autograd.Function):
    """Depthwise convolution for the CPU, with a faster backward.

    PyTorch's weight gradient of a channels-last depthwise convolution takes 10 times as long as the forward. But for
    one channel of one image it is the correlation of the input with the output's gradient: a depthwise convolution
    again, of one image of N * C channels, with a kernel as large as the image. The gradient of the input is the
    convolution with the flipped kernel. Both then run at about the forward's speed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return conv_channels_last(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return grad_by_autograd(_depthwise_conv, (x, weight, bias), grad)
        grad_x = conv_channels_last(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        grad_weight = folded_weight_grad(x, grad, weight) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _depthwise_conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


_triton_devices = ()


def use_triton(on):
    """Whether depthwise convolutions on CUDA run in the kernels of `models.kernels`. Without Triton they never do."""
    global _triton_devices
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU too, slowly: for tests
    devices = ("cuda", "cpu") if interpreted else ("cuda",)
    _triton_devices = devices if on and importlib.util.find_spec("triton") else ()


def runs_in_triton(x, weight):
    """Whether the convolution of x with weight (C, 1, K, K) is to run in the kernels of `models.kernels`."""
    return x.device.type in _triton_devices and weight.shape[-1] == 7


def depthwise_conv(x, weight, bias):
    """Depthwise convolution, stride 1, zero padded: (N, C, H, W) with an odd square kernel (C, 1, K, K) -> the same.

    x should lie in memory as (N, H, W, C).
    """
    if runs_in_triton(x, weight):
        from models import kernels  # imports Triton

        return kernels.depthwise_conv(x, weight, bias)
    if x.device.type != "cpu":
        return _depthwise_conv(x, weight, bias)
    return _DepthwiseConvCPU.apply(*cast_as_autocast(x, weight, bias))


def cast_as_autocast(*tensors):
    """Tensors on the CPU as autocast would cast them, which does not reach into autograd functions."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return [x.to(torch.get_autocast_dtype("cpu")) for x in tensors]


def run_block(checkpointing, block, *inputs):
    """block(*inputs); with checkpointing its activations are made again in the backward pass instead of kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def init_weights(module):
    """Initialise a convolution or linear layer: truncated normal of std 0.02, bias 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Cost(NamedTuple):
    """What a model takes for a batch."""

    parameters: int
    multiply_adds: int  # of the forward pass; what papers call FLOPs
    activations: int  # bytes that the forward pass keeps for the backward, in float32

    def __str__(self):
        return (
            f"{self.parameters / 1e6:.1f} M parameters, {self.multiply_adds / 1e9:.3g} G multiply-adds, "
            f"{self.activations / 2**20:.0f} MiB of float32 activations"
        )


def cost(build, shape, **inputs):
    """The `Cost` of build() -> model for images of this shape (N, C, H, W), and further inputs by name.

    Nothing is computed: tensors are empty. Activations are those of plain operations; fast paths may keep less.
    """
    with torch.device("meta"):
        model, imgs = build(), torch.empty(shape)
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        outputs = model(imgs, **inputs)  # noqa: F841  (held, so that no storage is freed and counted under another's address)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, sum(kept.values()))


def describe(build_model, args, **inputs):
    """What build_model(args) costs for one image, in words; MinkowskiEngine's encoder counts as ours, its equal."""
    packed = Namespace(**vars(args) | {"sparse_backend": "packed"})
    height, width = args.input_size
    told = cost(lambda: build_model(packed), (1, args.in_chans, height, width), **inputs)
    before = ", before --grad_checkpointing" if args.grad_checkpointing else ""
    return f"{told} an image of {height} x {width}{before}"
