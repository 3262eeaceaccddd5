"""Active sites: where the packed rows of visible patches lie on the canvas of all sites.

Shapes: N images, h x w = L patches each, of which V visible; k x k sites a patch (k = 8, 4, 2, 1 by stage);
H x W = hk x wk sites, of which S = V k^2 active; C channels.
"""

import math
from typing import NamedTuple

import torch


class Sites(NamedTuple):
    """The active sites of one stage: where the packed rows lie on the canvas, site by site and patch by patch."""

    rows: torch.Tensor  # (N * S,) number of each packed row's site among the N * H * W of the canvas
    canvas: tuple  # N, H, W
    sources: torch.Tensor  # (N, H, W) number of each site's packed row, N * S where there is none; None but on the CPU
    visible: torch.Tensor  # (N, V) numbers of the visible patches, int32
    slots: torch.Tensor  # (N, h, w) see `patch_slots`


def z_order(k, device=None):
    """Row and column (k * k,) each of the sites of a k x k square along a Z-order curve; k is a power of 2."""
    i = torch.arange(k * k, device=device)
    y = x = torch.zeros_like(i)
    for bit in range(k.bit_length() - 1):
        x = x | ((i >> 2 * bit) & 1) << bit
        y = y | ((i >> (2 * bit + 1)) & 1) << bit
    return y, x


def patch_slots(visible, grid):
    """Numbers (N, V) of visible patches -> (N, h, w) index of each patch of the grid in V, -1 if masked; int32."""
    slots = torch.full((visible.shape[0], grid[0] * grid[1]), -1, dtype=torch.int32, device=visible.device)
    order = torch.arange(visible.shape[1], dtype=torch.int32, device=visible.device)
    return slots.scatter(1, visible, order.expand_as(visible)).view(-1, *grid)


def active_sites(visible, grid, k):
    """The sites of visible patches: (N, V) patch numbers on a grid of (h, w), k x k sites a patch -> `Sites`."""
    n, height, width = visible.shape[0], grid[0] * k, grid[1] * k
    y, x = z_order(k, visible.device)
    y = (visible // grid[1])[:, :, None] * k + y  # (N, V, k * k)
    x = (visible % grid[1])[:, :, None] * k + x
    image = torch.arange(n, device=visible.device)[:, None, None]
    rows = ((image * height + y) * width + x).flatten()
    canvas, sources, count = (n, height, width), None, rows.shape[0]
    if visible.device.type == "cpu":
        sources = torch.full((n * height * width,), count).index_copy_(0, rows, torch.arange(count)).view(canvas)
    return Sites(rows, canvas, sources, visible.int(), patch_slots(visible, grid))


def unpack(x, sites):
    """Packed rows (N, S, C) -> canvas (N, C, H, W), zero at the other sites."""
    canvas = x.new_zeros(math.prod(sites.canvas), x.shape[-1]).index_copy_(0, sites.rows, x.flatten(0, 1))
    return canvas.view(*sites.canvas, x.shape[-1]).permute(0, 3, 1, 2)


def unpack_by_gathering(x, sites, space_first=False):
    """The canvas of `unpack`, in a third of its time on the CPU; the derivative would take longer there.

    space_first: the canvas lies in memory as (H, W, N, C) instead of (N, H, W, C).
    """
    rows = torch.cat([x.flatten(0, 1), x.new_zeros(1, x.shape[-1])])
    sources = sites.sources.permute(1, 2, 0) if space_first else sites.sources
    canvas = rows.index_select(0, sources.flatten()).view(*sources.shape, x.shape[-1])
    return canvas.permute(2, 3, 0, 1) if space_first else canvas.permute(0, 3, 1, 2)


def pack(canvas, sites):
    """Canvas (N, C, H, W) -> packed rows (N, S, C)."""
    rows = canvas.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sites.rows)
    sites_per_image = sites.visible.shape[1] * (sites.canvas[1] // sites.slots.shape[1]) ** 2
    return rows.view(sites.canvas[0], sites_per_image, rows.shape[-1])


def rows_as_map(x):
    """Packed rows (N, S, C) as a map (N, C, S, 1), a view: for modules that act on each site of such maps by itself."""
    return x.transpose(1, 2).unsqueeze(-1)


def map_as_rows(x):
    """The inverse of `rows_as_map`."""
    return x.squeeze(-1).transpose(1, 2)
