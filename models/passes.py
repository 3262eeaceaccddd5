"""The passes of `models.mlp` over the 4C channels in plain PyTorch, and the dtype of sums."""

import torch
import torch.nn.functional as F


class Plain:
    """The passes in plain PyTorch. h, a and gradients are (N, S, 4C); norm, scale and factor (N, 1, 4C)."""

    @staticmethod
    def gelu_norm(h, keep=True):
        """a = GELU(h) and its norm over the sites, of float32 at least: the squares of float16 overflow."""
        a = F.gelu(h)
        return a, a.to(sum_type(h)).square().sum(1, keepdim=True).sqrt()

    @staticmethod
    def scaled_gelu(h, a, scale):
        """scale * a, multiplied in the dtype of scale."""
        return (a * scale).to(a.dtype)

    @staticmethod
    def gelu_dot(h, a, grad):
        """The sum over the sites of grad * a: (N, 1, 4C)."""
        return (grad.to(sum_type(h)) * a.to(sum_type(h))).sum(1, keepdim=True)

    @staticmethod
    def gelu_grad(h, a, grad, scale, factor):
        """GELU'(h) (scale * grad + factor * a), in place of grad, and its sum over images and sites.

        A scale of None is 1.
        """
        grad = grad if scale is None else grad.mul_(scale)
        grad.addcmul_(a, factor.to(a.dtype))
        grad_h = torch.ops.aten.gelu_backward.grad_input(grad, h, grad_input=grad)
        return grad_h, grad_h.sum((0, 1), dtype=factor.dtype)


def sum_type(x):
    return torch.promote_types(x.dtype, torch.float32)
