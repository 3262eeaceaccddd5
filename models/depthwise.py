"""Depthwise convolution of Block, dense and submanifold sparse: PyTorch's, a faster one for the CPU, or Triton's.

`depthwise_conv` and `sparse_depthwise_conv` take the block's `nn.Conv2d`. They run their own code only if that is plain
(see `is_plain`) and of the block's configuration; anything else put in its place is called as the module it is.
"""

import functools
import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .sites import pack, unpack, unpack_by_gathering
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


def depthwise_conv(x, conv):
    """conv(x) of (N, C, H, W), which should lie in memory channels last."""
    if is_depthwise(conv, x):
        if runs_in_triton(x, conv.weight):
            from . import kernels  # imports Triton

            return kernels.depthwise_conv(x, conv.weight, conv.bias)
        if x.device.type == "cpu":
            return _DepthwiseConvCPU.apply(*cast_as_autocast(x, conv.weight, conv.bias), None)
    return conv(x)


def sparse_depthwise_conv(x, conv, sites):
    """Submanifold sparse convolution: packed rows (N, S, C) -> packed rows, as if zero at the sites that are masked.

    Where conv is not plain or not of the block's configuration, it is called on the canvas (N, C, H, W).
    """
    if is_depthwise(conv, x):
        if runs_in_triton(x, conv.weight):
            from . import kernels  # imports Triton

            return kernels.sparse_depthwise_conv(x, conv.weight, conv.bias, sites.visible, sites.slots)
        if x.device.type == "cpu":
            return _DepthwiseConvCPU.apply(*cast_as_autocast(x, conv.weight, conv.bias), sites)
    return pack(conv(unpack(x, sites)), sites)


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


# ---- In Triton

# Under Triton's interpreter the kernels run on the CPU too, slowly: for tests
TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
_enabled = None


def use_triton(enabled):
    """Whether depthwise convolutions on CUDA run in the kernels of `models.kernels`.

    None, the default: if they work there, which is tried at the first convolution. True does not try.
    """
    global _enabled
    _enabled = enabled


def runs_in_triton(x, weight):
    """Whether the convolution of x with weight (C, 1, K, K) is to run in the kernels of `models.kernels`."""
    if x.device.type not in TRITON_DEVICES or weight.shape[-1] != 7:
        return False
    return _decide(x.device) if _enabled is None else _enabled


@functools.cache
def _try_and_warn(device):
    reason = triton_works(device)
    if reason:
        warnings.warn(f"depthwise convolutions run in PyTorch, not in Triton kernels: {reason}", stacklevel=2)
    return reason is None


def _decide(device):
    return _try_and_warn(device)


# torch.compile must not trace the attempt. `torch.compiler.assume_constant_result` does just this, but only after
# importing all of torch._dynamo, which takes a second.
_decide._dynamo_marked_constant = True


@functools.cache
def triton_works(device):
    """None if the Triton kernels work on a device, which is tried on a small input; else the reason why not.

    Processes that train together compare their answers and then call `use_triton` alike. Raises OutOfMemoryError, which
    is no reason.
    """
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    try:
        from . import kernels

        with unset_fake_temporarily():  # in case the first use is under torch.compile or a FakeTensorMode
            kernels.try_on(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
