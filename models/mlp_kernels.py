"""The passes of `models.mlp` over the 4C channels in Triton: GELU with the norm of GRN, and the gradients of both.

With h and its gradients (N, S, 4C), s = scale and f = factor (N, 1, 4C), and sums over the S sites of an image:

    gelu_norm     a = GELU(h), if it is to be kept; the root of the sum of a^2
    scaled_gelu   y = s a
    gelu_dot      the sum of g a
    gelu_grad     GELU'(h) (s g + f a), and its sum over images and sites

where GELU(h) = h P(h) and GELU'(h) = P(h) + h p(h), by the normal distribution P and its density p. Each reads h once
and computes a anew, in float32 (float64 of float64), which costs less than reading it.

A program has one image, a chunk of its sites and a block of channels, and walks over tiles of sites x channels. Sums
over sites stay in its registers; PyTorch adds those of the chunks: no atomics, the same results in every run.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .launch import define_operator, launch
from .passes import Plain, sum_type

# A tile has 16 elements for each thread: 8 of bfloat16 are loaded at a time, from rows of 128 bytes
SITES, CHANNELS, NUM_WARPS = 32, 64, 4
CHUNK = 256  # sites of a program


@triton.jit
def _gelu(h):
    """GELU(h) and GELU'(h)."""
    p = tl.exp(-0.5 * h * h) * 0.3989422804014327  # 1 / sqrt(2 pi)
    P = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)  # 1 / sqrt(2)
    return h * P, P + h * p


@triton.jit
def _place(sites, channels, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program: its image, its chunk's first site and the end, channels, and where its sums (4C,) are."""
    chunks = tl.cdiv(sites, CHUNK)
    image, begin = tl.program_id(0) // chunks, tl.program_id(0) % chunks * CHUNK
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return image, begin, tl.minimum(begin + CHUNK, sites), channel, tl.program_id(0) * channels + channel


@triton.jit
def _tile(image, first, end, channel, sites, channels, SITES: tl.constexpr):
    """Offsets of a tile (SITES, CHANNELS), and which of it are present."""
    site = first + tl.arange(0, SITES)
    row = (image * sites + site).to(tl.int64)
    return row[:, None] * channels + channel[None, :], (site < end)[:, None] & (channel < channels)[None, :]


@triton.jit(do_not_specialize=["sites"])
def _gelu_norm_kernel(h, a, partial, sites, channels, SITES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """partial (N * chunks, 4C): the sums of GELU(h)^2. a: GELU(h), or None."""
    image, begin, end, channel, at_sums = _place(sites, channels, CHUNK, CHANNELS)
    total = tl.zeros((SITES, CHANNELS), partial.dtype.element_ty)
    for first in range(begin, end, SITES):
        at, present = _tile(image, first, end, channel, sites, channels, SITES)
        value, slope = _gelu(tl.load(h + at, mask=present, other=0).to(total.dtype))
        total += value * value
        if a is not None:
            tl.store(a + at, value.to(a.dtype.element_ty), mask=present)
    tl.store(partial + at_sums, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["sites"])
def _scaled_gelu_kernel(h, scale, y, sites, channels, SITES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """y = scale * GELU(h)."""
    image, begin, end, channel, at_sums = _place(sites, channels, CHUNK, CHANNELS)
    factor = tl.load(scale + image * channels + channel, mask=channel < channels, other=0)[None, :]
    for first in range(begin, end, SITES):
        at, present = _tile(image, first, end, channel, sites, channels, SITES)
        value, slope = _gelu(tl.load(h + at, mask=present, other=0).to(factor.dtype))
        tl.store(y + at, (value * factor).to(y.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["sites"])
def _gelu_dot_kernel(
    h, grad, partial, sites, channels, SITES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr
):
    """partial (N * chunks, 4C): the sums of grad * GELU(h)."""
    image, begin, end, channel, at_sums = _place(sites, channels, CHUNK, CHANNELS)
    total = tl.zeros((SITES, CHANNELS), partial.dtype.element_ty)
    for first in range(begin, end, SITES):
        at, present = _tile(image, first, end, channel, sites, channels, SITES)
        value, slope = _gelu(tl.load(h + at, mask=present, other=0).to(total.dtype))
        total += value * tl.load(grad + at, mask=present, other=0).to(total.dtype)
    tl.store(partial + at_sums, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["sites"])
def _gelu_grad_kernel(
    h, grad, scale, factor, out, partial, sites, channels,
    SITES: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = GELU'(h) * (scale * grad + factor * GELU(h)); a scale of None is 1. partial (N * chunks, 4C): its sums."""
    image, begin, end, channel, at_sums = _place(sites, channels, CHUNK, CHANNELS)
    at_image, exists = image * channels + channel, channel < channels
    of_a = tl.load(factor + at_image, mask=exists, other=0)[None, :]
    if scale is not None:
        of_grad = tl.load(scale + at_image, mask=exists, other=0)[None, :]
    total = tl.zeros((SITES, CHANNELS), partial.dtype.element_ty)
    for first in range(begin, end, SITES):
        at, present = _tile(image, first, end, channel, sites, channels, SITES)
        value, slope = _gelu(tl.load(h + at, mask=present, other=0).to(total.dtype))
        grad_a = tl.load(grad + at, mask=present, other=0).to(total.dtype)
        if scale is not None:
            grad_a *= of_grad
        grad_h = slope * (grad_a + of_a * value)
        total += grad_h
        tl.store(out + at, grad_h.to(out.dtype.element_ty), mask=present)
    tl.store(partial + at_sums, tl.sum(total, axis=0), mask=channel < channels)


# ---- Operators: a reference in plain PyTorch for any device, replaced by the kernel where Triton runs


def _run(kernel, h, *others):
    """Launch a kernel on h (N, S, 4C) and its other tensors."""
    n, sites, channels = h.shape
    grid = n * math.ceil(sites / CHUNK), math.ceil(channels / CHANNELS)
    blocks = dict(SITES=SITES, CHANNELS=CHANNELS, CHUNK=CHUNK, num_warps=NUM_WARPS, num_stages=1)
    launch(kernel, grid, h, *others, sites=sites, channels=channels, **blocks)


def _new_sums(h):
    """A tensor (N, chunks, 4C) for the sums of each program over its sites."""
    n, sites, channels = h.shape
    return h.new_empty(n, math.ceil(sites / CHUNK), channels, dtype=sum_type(h))


def _gelu_norm_plain(h: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    a, norm = Plain.gelu_norm(h)
    return a if keep else h.new_empty(0), norm


def _gelu_norm_triton(h, keep):
    a, partial = torch.empty_like(h) if keep else None, _new_sums(h)
    _run(_gelu_norm_kernel, h, a, partial)
    return a if keep else h.new_empty(0), partial.sum(1, keepdim=True).sqrt_()


def _scaled_gelu_plain(h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return Plain.scaled_gelu(h, F.gelu(h), scale)


def _scaled_gelu_triton(h, scale):
    y = torch.empty_like(h)
    _run(_scaled_gelu_kernel, h, scale, y)
    return y


def _gelu_dot_plain(h: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return Plain.gelu_dot(h, F.gelu(h), grad)


def _gelu_dot_triton(h, grad):
    partial = _new_sums(h)
    _run(_gelu_dot_kernel, h, grad, partial)
    return partial.sum(1, keepdim=True)


def _gelu_grad_plain(
    h: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor | None, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return Plain.gelu_grad(h, F.gelu(h), grad.clone(), scale, factor)


def _gelu_grad_triton(h, grad, scale, factor):
    out, partial = torch.empty_like(h), _new_sums(h)
    _run(_gelu_grad_kernel, h, grad, scale, factor, out, partial)
    return out, partial.sum((0, 1))


def _new_sum(h):
    return h.new_empty(h.shape[0], 1, h.shape[2], dtype=sum_type(h))


_gelu_norm = define_operator(
    "gelu_norm",
    _gelu_norm_plain,
    _gelu_norm_triton,
    lambda h, keep: (torch.empty_like(h) if keep else h.new_empty(0), _new_sum(h)),
)
_scaled_gelu = define_operator(
    "scaled_gelu", _scaled_gelu_plain, _scaled_gelu_triton, lambda h, scale: torch.empty_like(h)
)
_gelu_dot = define_operator("gelu_dot", _gelu_dot_plain, _gelu_dot_triton, lambda h, grad: _new_sum(h))
_gelu_grad = define_operator(
    "gelu_grad",
    _gelu_grad_plain,
    _gelu_grad_triton,
    lambda h, grad, scale, factor: (torch.empty_like(h), h.new_empty(h.shape[2], dtype=sum_type(h))),
)


# ---- What `models.mlp` calls, as `Plain`


def gelu_norm(h, keep):
    return _gelu_norm(h, keep)


def scaled_gelu(h, a, scale):
    return _scaled_gelu(h, scale)


def gelu_dot(h, a, grad):
    return _gelu_dot(h, grad)


def gelu_grad(h, a, grad, scale, factor):
    return _gelu_grad(h, grad, scale, factor)


def calls(device, dtype):
    """The operators with small inputs of a dtype: what `triton_works` tries."""
    h, grad = torch.linspace(-3, 3, 96, device=device).view(2, 2, 3, 8).to(dtype)
    scale, factor = torch.linspace(-1, 1, 32, device=device, dtype=torch.float32).view(2, 2, 1, 8)
    return [
        (_gelu_norm, (h, True)),
        (_scaled_gelu, (h, scale)),
        (_gelu_dot, (h, grad)),
        (_gelu_grad, (h, grad, scale, factor)),
    ]
