"""Depthwise convolution of Block, dense and submanifold sparse: PyTorch's, a faster one for the CPU, or Triton's.

`depthwise_conv` and `sparse_depthwise_conv` take the block's `nn.Conv2d`. They run their own code only if that is plain
(see `is_plain`) and of the block's configuration; anything else put in its place is called as the module it is.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .sites import pack, unpack, unpack_by_gathering
from .triton_switch import runs_in_triton
from .utils import is_plain


def is_depthwise(conv, x):
    """Whether conv, called on x, is a plain depthwise convolution: odd square kernel, stride 1, zero padded to same."""
    return is_plain(conv, nn.Conv2d, x) and (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[0] % 2 == 1
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )


def runs_kernel(conv, x):
    """Whether the convolution conv(x) runs in Triton."""
    return is_depthwise(conv, x) and conv.kernel_size == (7, 7) and runs_in_triton(x)


def depthwise_conv(x, conv, shift=None):
    """conv(x) of (N, C, H, W), which should lie in memory channels last; and x, for a shortcut around the layer.

    Use that x: where the convolution runs in Triton, one kernel then computes and adds both its gradients.
    shift: (C,), to be added to the x for the shortcut, which only Triton's kernel does.
    """
    if runs_kernel(conv, x):
        from . import kernels  # imports Triton

        y, x = kernels.depthwise_conv(x.permute(0, 2, 3, 1), conv.weight, conv.bias, shift=shift)
        return y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    if is_depthwise(conv, x) and x.device.type == "cpu":
        return _DepthwiseConvCPU.apply(*cast_as_autocast(x, conv.weight, conv.bias), None), x
    return conv(x), x


def sparse_depthwise_conv(x, conv, sites, shift=None):
    """Submanifold sparse convolution, packed rows (N, S, C) -> the same, as if x were zero at masked sites.

    Returns x too, and takes a shift, as `depthwise_conv`. Where conv is not plain or not of the block's configuration,
    it is called on the canvas (N, C, H, W).
    """
    if runs_kernel(conv, x):
        from . import kernels  # imports Triton

        return kernels.depthwise_conv(x, conv.weight, conv.bias, sites.visible, sites.slots, shift)
    if is_depthwise(conv, x) and x.device.type == "cpu":
        return _DepthwiseConvCPU.apply(*cast_as_autocast(x, conv.weight, conv.bias), sites), x
    return pack(conv(unpack(x, sites)), sites), x


def cast_as_autocast(*tensors):
    """Tensors on the CPU as autocast would cast them, which does not reach into autograd functions."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return [x.to(torch.get_autocast_dtype("cpu")) for x in tensors]


# ---- On the CPU


def _conv_channels_last(x, weight, bias):
    """The convolution with channels last in memory, which on the CPU is 2 to 3 times as fast."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _conv_of_sites(x, weight, bias, sites):
    """The convolution of maps (N, C, H, W), or of packed rows (N, S, C) at sites."""
    if sites is None:
        return _conv_channels_last(x, weight, bias)
    return pack(_conv_channels_last(unpack_by_gathering(x, sites), weight, bias), sites)


def _fold(x):
    """(N, C, H, W) -> (1, N * C, H, W) channels last: images become channels. A view if x lies as (H, W, N, C)."""
    n, c, h, w = x.shape
    return x.permute(2, 3, 0, 1).reshape(1, h, w, n * c).permute(0, 3, 1, 2)


def _folded_weight_grad(x, grad, weight):
    """The gradient of a depthwise convolution's weight from its input and its output's gradient, (N, C, H, W).

    Fastest where both lie in memory as (H, W, N, C).
    """
    n, c = x.shape[:2]
    if n == 0:
        return torch.zeros_like(weight)
    products = F.conv2d(_fold(x), _fold(grad).transpose(0, 1), padding=weight.shape[-1] // 2, groups=n * c)
    return products.view(n, *weight.shape).sum(0)


class _DepthwiseConvCPU(torch.autograd.Function):
    """Depthwise convolution for the CPU, dense (sites is None) or submanifold sparse, with a faster backward.

    PyTorch's weight gradient of a channels-last depthwise convolution takes 10 times as long as the forward. But for
    one channel of one image it is the correlation of the input with the output's gradient: a depthwise convolution
    again, of one image of N * C channels, with a kernel as large as the image. The gradient of the input is the
    convolution with the flipped kernel. Both then run at about the forward's speed.

    If sparse, rows instead of canvases are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, sites):
        ctx.save_for_backward(x, weight)
        ctx.sites = sites
        return _conv_of_sites(x, weight, bias, sites)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        sites, (x_needed, weight_needed, bias_needed, _) = ctx.sites, ctx.needs_input_grad
        grad_x = _conv_of_sites(grad, weight.flip(2, 3), None, sites) if x_needed else None
        grad_bias = grad.sum((0, 2, 3) if sites is None else (0, 1)) if bias_needed else None
        if weight_needed and sites is not None:
            x, grad = (unpack_by_gathering(rows, sites, space_first=True) for rows in (x, grad))
        grad_weight = _folded_weight_grad(x, grad, weight) if weight_needed else None
        return grad_x, grad_weight, grad_bias, None
