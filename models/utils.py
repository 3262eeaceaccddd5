"""Layers that the dense and the sparse ConvNeXt V2 share, and when a fast path may stand in for a layer."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

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


def has_compute_dtype(x, weight):
    """Whether a matrix product of x with weight is computed, under autocast or without, in the dtype of x."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return x.dtype == torch.get_autocast_dtype(device)
    return x.dtype == weight.dtype


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels, of (N, ..., C) with "channels_last" or (N, C, ...) with "channels_first"."""

    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(f"data_format {data_format!r}: must be 'channels_last' or 'channels_first'")
        super().__init__(normalized_shape, eps=eps)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x)
        # Both permutations are views: the tensors of this project lie in memory channels last.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def grn_statistics(x, differentiable=True):
    """Norm of each channel of x (N, S, C) over space, and the mean of the norms: (N, 1, C) and (N, 1, 1).

    float32 at least: the sum of squares of float16 overflows.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if differentiable:  # also where a channel is zero on all sites, as the faster square root is not
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype)
    else:
        norm = x.to(dtype).square().sum(1, keepdim=True).sqrt()
    return norm, norm.mean(-1, keepdim=True) + 1e-6


def _saved_statistics(x, norm, mean):
    """norm and mean as saved, or recomputed as functions of x where the backward pass is itself differentiated."""
    return grn_statistics(x) if torch.is_grad_enabled() else (norm, mean)


def _grn_gradients(grad_scale, x, gamma, norm, mean):
    """From the gradient of GRN's scale 1 + gamma * n, n = norm / mean: gamma's, and a factor of x in x's."""
    n = norm / mean
    grad_n = grad_scale * gamma
    grad_norm = (grad_n - (grad_n * n).mean(-1, keepdim=True)) / mean
    # d norm / d x = x / norm, and 0 where a channel is zero on all sites
    factor = grad_norm / norm.masked_fill(norm == 0, torch.inf)
    return (grad_scale * n).sum((0, 1)).to(gamma.dtype), factor.to(x.dtype)


def scale_rows(x, gamma, beta, norm, mean):
    """GRN of x (N, S, C) by its statistics: gamma * (x * n) + beta + x."""
    return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * norm / mean).to(x.dtype))


class _GRN(torch.autograd.Function):
    """`scale_rows` by the statistics of x itself. Keeps x once and passes over it less often than autograd would."""

    @staticmethod
    def forward(ctx, x, gamma, beta):
        norm, mean = grn_statistics(x, differentiable=False)
        ctx.save_for_backward(x, gamma, norm, mean)
        ctx.beta_dtype = beta.dtype
        return scale_rows(x, gamma, beta, norm, mean)

    @staticmethod
    def backward(ctx, grad):
        x, gamma, norm, mean = ctx.saved_tensors
        norm, mean = _saved_statistics(x, norm, mean)
        grad_scale = (grad.to(norm.dtype) * x.to(norm.dtype)).sum(1, keepdim=True)
        grad_gamma, factor = _grn_gradients(grad_scale, x, gamma, norm, mean)
        grad_x = (grad * (1 + gamma * norm / mean).to(x.dtype)).addcmul_(x, factor)
        return grad_x, grad_gamma, grad.sum((0, 1), dtype=norm.dtype).to(ctx.beta_dtype)


class _GRNLinear(torch.autograd.Function):
    """A linear layer after GRN, (N, S, C) -> (N, S, D), with the scale of each image folded into a weight of its own.

    GRN's output and its gradient, both as large as x, are never computed: where S is many times D, a pass over them
    costs more than the matrix products. The gradients of scale and weight are sums over space of the same products of
    x and grad, one (D, C) an image.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta, weight, bias):
        norm, mean = grn_statistics(x, differentiable=False)
        ctx.save_for_backward(x, gamma, beta, weight, norm, mean)
        ctx.bias_dtype = bias.dtype
        weights = (weight * (1 + gamma * norm / mean)).to(x.dtype)  # (N, D, C)
        return torch.baddbmm((bias + weight @ beta).to(x.dtype), x, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, gamma, beta, weight, norm, mean = ctx.saved_tensors
        norm, mean = _saved_statistics(x, norm, mean)
        scale = 1 + gamma * norm / mean
        products = torch.bmm(grad.transpose(1, 2), x).to(norm.dtype)  # (N, D, C)
        grad_bias = grad.sum((0, 1), dtype=norm.dtype)
        grad_weight = (products * scale).sum(0).addcmul_(grad_bias[:, None], beta.to(norm.dtype))
        grad_gamma, factor = _grn_gradients((products * weight).sum(1, keepdim=True), x, gamma, norm, mean)
        grad_x = torch.bmm(grad, (weight * scale).to(x.dtype)).addcmul_(x, factor)
        grad_beta = grad_bias @ weight.to(norm.dtype)
        return grad_x, grad_gamma, grad_beta.to(beta.dtype), grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)


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
        if can_use_functions(self, x):
            return _GRN.apply(rows, gamma, beta).view_as(x)
        return scale_rows(rows, gamma, beta, *grn_statistics(rows)).reshape_as(x)


def can_fuse(x, grn, linear):
    """Whether `fused_grn_linear` gives what linear(grn(x)) gives, in fewer passes over memory: x (N, ..., C)."""
    return (
        is_plain(grn, GRN, x)
        and is_plain(linear, nn.Linear, x)
        and linear.bias is not None
        and has_compute_dtype(x, linear.weight)
        # With fewer sites an image's own weight would be as large as its features.
        and x.shape[1:-1].numel() >= 8 * linear.out_features
    )


def fused_grn_linear(x, grn, linear):
    """linear(grn(x)) of x (N, ..., C), where `can_fuse` allows it: see `_GRNLinear`."""
    gamma, beta = grn.gamma.flatten(), grn.beta.flatten()
    out = _GRNLinear.apply(x.flatten(1, -2), gamma, beta, linear.weight, linear.bias)
    return out.view(*x.shape[:-1], out.shape[-1])


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
