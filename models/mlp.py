"""Norm and MLP of a block as one function: LayerNorm, linear, GELU, GRN, linear, in few passes over its 4C channels.

Most of a training step's bytes are moved here. So the tensors of 4C channels, N images x S sites each, are as few as
the gradients need:

    z = (x - mean x) / std x     kept; the norm's weight w and bias v go into the next layer's:
    h = z (W1 w)^T + b1 + W1 v   kept
    a = GELU(h)                  kept on the CPU; in Triton each pass computes it anew from h
    n = |a| / mean |a|           |a|: the norm over the sites of an image, (N, 1, 4C); the mean over its channels
    y = (1 + gamma n) a          kept
    out = y W2^T + b2 + W2 beta  GRN's beta goes into the bias, and where the depthwise convolution runs in Triton
                                 both into the block's shortcut, to which the product is then added in one pass

and backward, where g is the gradient of out, and that of y is g W2:

    the gradient of 1 + gamma n is the sum over sites of (g W2) a
    the gradient of h is GELU'(h) ((1 + gamma n) g W2 + f a), where f, (N, 1, 4C), comes from the gradient of |a|

Where an image has many sites for its channels (`folds_scale`), the scale 1 + gamma n goes into a weight W2 of each
image's own instead: y is never computed, and the gradients of scale and weight are sums over the same products g^T a.
Where even a batch has few (`folds_affine`), a pass over a weight costs more than one over the rows: w, v and beta are
then applied to the rows, as the modules would.

The passes over h are in `models.mlp_kernels`: Triton kernels, and the plain PyTorch beside them.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from .passes import Plain
from .triton_switch import runs_in_triton
from .utils import GRN, LayerNorm, grn_statistics, is_plain


class _MLP(torch.autograd.Function):
    """x (N, S, C), eps, w, v (C,), W1 (4C, C), b1, gamma, beta (4C,), W2 (C, 4C), b2 (C,) -> (N, S, C), as x.

    shortcut: None, or rows like x, which are added to and have b2 + W2 beta in them; then beta and b2 are None.
    Parameters may be of another dtype than x, and get gradients of their own. Sums and scales are of float32 at least.
    """

    @staticmethod
    def forward(ctx, x, shortcut, eps, *parameters):
        norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2 = parameters
        passes, dtype, folded = choose_passes(x), x.dtype, folds_scale(x)
        affine, low1 = (norm_weight.to(dtype), norm_bias.to(dtype)), weight1
        if folds_affine(x):
            affine, low1 = (None, None), weight1 * norm_weight
            bias1 = bias1 + weight1 @ norm_bias
            bias2 = bias2 if beta is None else bias2 + weight2 @ beta
        start = bias2.to(dtype) if shortcut is None else shortcut  # what the last product is added to
        z, *statistics = torch.native_layer_norm(x, x.shape[-1:], *affine, eps)
        h = F.linear(z, low1.to(dtype), bias1.to(dtype))
        a, norm = passes.gelu_norm(h, folded)
        mean = norm.mean(-1, keepdim=True) + 1e-6
        scale = 1 + gamma * norm / mean
        if folded:
            y, low2 = None, (weight2 * scale).to(dtype)  # (N, C, 4C)
            out = torch.baddbmm(start, a, low2.transpose(1, 2))
        else:
            y, low2 = passes.scaled_gelu(h, a, scale), weight2.to(dtype)
            if beta is not None and not folds_affine(x):
                y += beta.to(dtype)
            start = start if shortcut is None else start.flatten(0, 1)
            out = torch.addmm(start, y.flatten(0, 1), low2.t()).view_as(x)
        ctx.save_for_backward(x, *parameters, *statistics, z, h, a, y, low2, norm, mean)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # read once: checkpointing recomputes them for it
        x, *parameters = saved[:9]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient is itself differentiated
            return differentiable_gradients(ctx, grad, x, parameters)
        with without_autocast(x):
            grad_x, *grads = _MLP.compute_gradients(grad, x, *parameters, *saved[9:])
        grads = (None if p is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, *grads

    @staticmethod
    def compute_gradients(
        grad, x, norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2,
        x_mean, x_rstd, z, h, a, y, low2, norm, mean,
    ):  # fmt: skip
        """The gradients of x and of the parameters."""
        passes, dtype, n = choose_passes(x), x.dtype, norm / mean
        scale = 1 + gamma * n
        # out = y W2^T + bias or shortcut
        grad_bias2 = grad_beta = None
        if bias2 is not None:
            grad_bias2 = grad.sum((0, 1), dtype=norm.dtype)
        if y is None:
            products = torch.bmm(grad.transpose(1, 2), a).to(norm.dtype)  # (N, C, 4C)
            grad_weight2 = (products * scale).sum(0)
            grad_scale = (products * weight2).sum(1, keepdim=True)
            grad_a, scale = torch.bmm(grad, low2), None  # folded in already
        else:
            grad_weight2 = (grad.flatten(0, 1).t() @ y.flatten(0, 1)).to(norm.dtype)
            grad_a = grad @ low2  # but for the scale
            grad_scale = passes.gelu_dot(h, a, grad_a)
        if beta is not None and folds_affine(x):
            grad_weight2 = torch.addcmul(grad_weight2, grad_bias2[:, None], beta)
            grad_beta = sum_rows(weight2, grad_bias2)
        elif beta is not None:
            grad_beta = grad_a.sum((0, 1), dtype=norm.dtype)
        # y = scale a
        grad_n = grad_scale * gamma
        grad_norm = (grad_n - (grad_n * n).mean(-1, keepdim=True)) / mean
        # d norm / d a = a / norm, and 0 where a channel is zero on all sites
        factor = grad_norm / norm.masked_fill(norm == 0, torch.inf)
        grad_h, grad_bias1 = passes.gelu_grad(h, a, grad_a, scale, factor)
        # h = z (W1 w)^T + bias
        grad_weight1 = (grad_h.flatten(0, 1).t() @ z.flatten(0, 1)).to(norm.dtype)  # (4C, C)
        if folds_affine(x):
            grad_z = grad_h @ (weight1 * norm_weight).to(dtype)
            grad_x, _, _ = norm_gradients(grad_z, x, x_mean, x_rstd)
            grad_norm_weight, grad_norm_bias = (grad_weight1 * weight1).sum(0), sum_rows(weight1, grad_bias1)
            grad_weight1 = torch.addcmul(grad_weight1 * norm_weight, grad_bias1[:, None], norm_bias)
        else:
            affine = norm_weight.to(dtype), norm_bias.to(dtype)
            grad_x, grad_norm_weight, grad_norm_bias = norm_gradients(
                grad_h @ weight1.to(dtype), x, x_mean, x_rstd, *affine
            )
        grad_gamma = (grad_scale * n).sum((0, 1))
        return (
            grad_x, grad_norm_weight, grad_norm_bias, grad_weight1, grad_bias1, grad_gamma, grad_beta,
            grad_weight2, grad_bias2,
        )  # fmt: skip


def sum_rows(weight, factors):
    """factors (M,) @ weight (M, K), in the dtype of factors.

    Not as a matrix product where the step is compiled: autocast would round it, and Inductor fuses a sum.
    """
    if torch.compiler.is_compiling():
        return (weight * factors[:, None]).sum(0)
    return factors @ weight.to(factors.dtype)


def norm_gradients(grad, x, mean, rstd, weight=None, bias=None):
    """The gradients of x, weight and bias of a layer norm, of the latter two where they are given."""
    wanted = [True, weight is not None, bias is not None]
    return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, wanted)


def differentiable_gradients(ctx, grad, x, parameters):
    """The gradients of `plain_mlp` as functions of grad and inputs, None where not needed."""
    needed_x, needed_shortcut, _, *needed = ctx.needs_input_grad
    with torch.enable_grad():
        out = plain_mlp(x, ctx.eps, *parameters)
    wanted = [x for x, need in zip((x, *parameters), (needed_x, *needed), strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    grad_x, *grads = (next(grads) if need else None for need in (needed_x, *needed))
    return grad_x, grad if needed_shortcut else None, None, *grads


def plain_mlp(x, eps, norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2):
    """What `_MLP` computes but for a shortcut, by plain operations."""
    dtype = x.dtype
    z = F.layer_norm(x, x.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    a = F.gelu(F.linear(z, weight1.to(dtype), bias1.to(dtype)))
    norm, mean = grn_statistics(a)
    y = (1 + gamma * norm / mean) * a
    if beta is None:
        return F.linear(y.to(dtype), weight2.to(dtype))
    return F.linear((y + beta).to(dtype), weight2.to(dtype), bias2.to(dtype))


def folds_scale(x):
    """Whether an image of x (N, S, C) is so large for the (C, 4C) weight that one of its own saves passes."""
    return x.shape[1] >= 8 * x.shape[2]


def folds_affine(x):
    """Whether the batch x (N, S, C) is so large for the weights that passes over them cost less than over its rows.

    And in low precision, in which torch's layer norm would give, on the CPU even sum, the gradients of w and v.
    """
    return folds_scale(x) or x.dtype.itemsize < 4 or x.shape[0] * x.shape[1] >= 16 * x.shape[2]


def choose_passes(x):
    """The functions `gelu_norm`, `scaled_gelu`, `gelu_dot` and `gelu_grad` for x: Triton's, or plain ones."""
    if runs_in_triton(x):
        from . import mlp_kernels  # imports Triton

        return mlp_kernels
    return Plain


def without_autocast(x):
    """A context without autocast on the device of x: dtypes are chosen by hand."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


# ---- What a block calls


def can_fuse(x, norm, linear1, act, grn, linear2):
    """Whether `fused_mlp` computes, in fewer passes over memory, what calling the modules would: x (N, ..., C)."""
    return (
        all(is_plain(linear, nn.Linear, x) and linear.bias is not None for linear in (linear1, linear2))
        and is_plain(norm, LayerNorm, x)
        and norm.data_format == "channels_last"
        and is_plain(act, nn.GELU, x)
        and act.approximate == "none"
        and is_plain(grn, GRN, x)
        and compute_dtype(x, norm.weight, linear1.weight, linear2.weight) is not None
    )


def compute_dtype(x, *weights):
    """The dtype in which matrix products of x with weights are computed, under autocast or without; None if mixed."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        double = any(tensor.dtype == torch.float64 for tensor in (x, *weights))  # which autocast leaves as it is
        return None if double else torch.get_autocast_dtype(device)
    return x.dtype if all(weight.dtype == x.dtype for weight in weights) else None


def output_bias(x, norm, linear1, act, grn, linear2):
    """What of the MLP of x is the same at all sites, (C,), for a shortcut to have in it: see `fused_mlp`.

    None if `fused_mlp` cannot add a shortcut like x.
    """
    if not can_fuse(x, norm, linear1, act, grn, linear2) or compute_dtype(x, linear2.weight) != x.dtype:
        return None
    with without_autocast(x):
        return linear2.bias + sum_rows(linear2.weight.t(), grn.beta.flatten())


def fused_mlp(x, norm, linear1, grn, linear2, shortcut=None):
    """linear2(grn(gelu(linear1(norm(x))))), (N, ..., C), where `can_fuse` allows it: see the top of this file.

    shortcut: like x, with `output_bias` in it, and the MLP is added to it: its last product does, in the same pass.
    """
    rows = x.flatten(1, -2).to(compute_dtype(x, linear1.weight))
    beta, bias = grn.beta.flatten(), linear2.bias
    if shortcut is not None:
        shortcut, beta, bias = shortcut.flatten(1, -2), None, None
    layers = norm.weight, norm.bias, linear1.weight, linear1.bias, grn.gamma.flatten(), beta
    with without_autocast(x):
        out = _MLP.apply(rows, shortcut, norm.eps, *layers, linear2.weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])
