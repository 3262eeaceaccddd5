"""Layers that the dense and the sparse ConvNeXt V2 share, and when a fast path may stand in for a layer."""

import os

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

# Under Triton's interpreter the kernels run on the CPU too, slowly: for tests
TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor, type(None))  # None: a layer without a bias


def is_plain(module, cls, x):
    """Whether module(x) does exactly what the class cls does, so that a fast path may replace the call.

    It does not for a subclass, wrapper, hook, parametrization or patched `forward`, nor without `can_use_functions`.
    """
    return (
        type(module) is cls
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
        and can_use_functions(module, x)
    )


def can_use_functions(module, x):
    """Whether our own autograd functions can take x and the module's parameters.

    They cannot take other tensors than PyTorch's own (DTensor, quantized ones, proxies of torch.fx), nor be traced or
    transformed (torch.jit, torch.export, torch.func, forward-mode differentiation), except by torch.compile.
    """
    return (
        type(x) in PLAIN_TENSORS
        and all(type(parameter) in PLAIN_TENSORS for parameter in module._parameters.values())
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    )


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, of (N, ..., C) with "channels_last" or (N, C, ...) with "channels_first".

    The result is of the dtype of x, under autocast too, which computes it in float32.
    """

    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(f"data_format {data_format!r}: must be 'channels_last' or 'channels_first'")
        super().__init__(normalized_shape, eps=eps)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x).to(x.dtype)
        # Both permutations are views: the tensors of this project lie in memory channels last.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


def grn_statistics(x):
    """Norm of each channel of x (N, S, C) over space, and the mean of the norms: (N, 1, C) and (N, 1, 1).

    float32 at least: the sum of squares of float16 overflows. Where a channel is zero on all sites, the derivatives of
    its norm are 0.
    """
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1, keepdim=True)
    norm = torch.where(squares == 0, squares, squares.where(squares != 0, 1).sqrt())
    return norm, norm.mean(-1, keepdim=True) + 1e-6


class GRN(nn.Module):
    """Global response normalization (section 4, algorithm 1) of (N, ..., C): per image, over space, for each channel.

    Everything between the first and the last axis is space, so the same layer serves the dense (N, H, W, C) and the
    packed (N, S, C).
    """

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        rows, gamma, beta = x.flatten(1, -2), self.gamma.flatten(), self.beta.flatten()
        norm, mean = grn_statistics(rows)
        scale = 1 + gamma * norm / mean  # of float32 at least, as a change of gamma is small beside 1
        return (rows * scale + beta).to(x.dtype).reshape_as(x)


class Stage(nn.Sequential):
    """Blocks in sequence, (x, *context) -> x; each block gets the same context.

    With `grad_checkpointing` the activations within a block are recomputed in the backward pass.
    """

    grad_checkpointing = False

    def forward(self, x, *context):
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return x


def init_weights(module):
    """Initialize a convolution or linear layer: truncated normal of std 0.02, bias 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def channels_last(x):
    """(N, C, H, W) with channels last in memory; unlike `contiguous(memory_format=...)` for torch.vmap too."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def names_without_decay(model):
    """Names of the parameters without weight decay: all but the weights of convolutions and linear layers."""
    names = set()
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if not (name == "weight" and isinstance(module, nn.Conv2d | nn.Linear)):
                names.add(f"{prefix}.{name}" if prefix else name)
    return names
