"""Layers that the dense and the sparse ConvNeXt V2 share."""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import nn


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


def _grad_by_autograd(function, inputs, grad):
    """Gradients of function(*inputs), of plain operations, that can be differentiated again: for AdaHessian."""
    with torch.enable_grad():
        needed = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(function(*inputs), needed, grad, create_graph=True))
    return tuple(next(grads) if x.requires_grad else None for x in inputs)


class _GRN(torch.autograd.Function):
    """gamma * (x * n) + beta + x of (N, ..., C), with the derivative by hand: it keeps x once and passes over it less.

    Statistics are float32 at least: the sum of squares of float16 overflows.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta):
        dtype, space = torch.promote_types(x.dtype, torch.float32), tuple(range(1, x.ndim - 1))
        norm = x.to(dtype).square().sum(space, keepdim=True).sqrt()  # g: (N, ..., C), one value an image and channel
        mean = norm.mean(-1, keepdim=True) + 1e-6
        ctx.save_for_backward(x, gamma, beta, norm, mean)
        return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * norm / mean).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, norm, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _grad_by_autograd(_grn, (x, gamma, beta), grad)
        space = tuple(range(1, x.ndim - 1))
        n = norm / mean
        grad_scale = (grad.to(norm.dtype) * x.to(norm.dtype)).sum(space, keepdim=True)  # of 1 + gamma * n
        grad_n = grad_scale * gamma
        grad_norm = (grad_n - (grad_n * n).mean(-1, keepdim=True)) / mean
        # d norm / d x = x / norm, and 0 where a channel is zero on all sites
        factor = torch.where(norm > 0, grad_norm / norm, 0)
        grad_x = (grad * (1 + gamma * n).to(x.dtype)).addcmul_(x, factor.to(x.dtype))
        grad_gamma = (grad_scale * n).flatten(0, -2).sum(0)
        return grad_x, grad_gamma, grad.flatten(0, -2).sum(0, dtype=norm.dtype)


def _grn(x, gamma, beta):
    """What `_GRN` computes, in plain operations."""
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim - 1)), keepdim=True)
    return gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + beta + x


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


def _unfold(x, n):
    """The inverse of `_fold`, a view: (1, N * C, H, W) -> (N, C, H, W)."""
    _, _, h, w = x.shape
    return x.permute(2, 3, 0, 1).reshape(h, w, n, -1).permute(2, 3, 0, 1)


def _conv_as_it_lies(x, weight, bias=None):
    """Depthwise convolution of (N, C, H, W) that leaves the layout in memory as it is, (N, H, W, C) or (H, W, N, C)."""
    n, c = x.shape[:2]
    pad = weight.shape[-1] // 2
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias, padding=pad, groups=c)
    bias = None if bias is None else bias.repeat(n)
    return _unfold(F.conv2d(_fold(x), weight.repeat(n, 1, 1, 1), bias, padding=pad, groups=n * c), n)


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
        return _conv_as_it_lies(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _grad_by_autograd(_depthwise_conv, (x, weight, bias), grad)
        (n, c), pad = x.shape[:2], weight.shape[-1] // 2
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _conv_as_it_lies(grad, weight.flip(2, 3))
        if ctx.needs_input_grad[1]:
            grad_weight = F.conv2d(_fold(x), _fold(grad).transpose(0, 1), padding=pad, groups=n * c)
            grad_weight = grad_weight.view(n, *weight.shape).sum(0)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


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

    x should lie in memory as (N, H, W, C), on the CPU best as (H, W, N, C): (N, C, H, W) is 2 to 3 times slower.
    """
    if runs_in_triton(x, weight):
        from models import kernels  # imports Triton

        return kernels.depthwise_conv(x, weight, bias)
    if x.device.type != "cpu":
        return _depthwise_conv(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        # Autocast does not reach into autograd functions, so its casts are made here.
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _DepthwiseConvCPU.apply(x, weight, bias)


def init_weights(module):
    """Initialise a convolution or linear layer: truncated normal of std 0.02, bias 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
