"""What every script needs: distributed set-up, meters, learning-rate schedule, checkpoints, flag files, errors."""

import torch


def remap_checkpoint_keys(state):
    """A state dict of the original's Minkowski training with the names and shapes of this project (and of the dense code).

    `kernel` (kh * kw, in, out), or (kh * kw, C) if depthwise, the first axis of space running fastest, becomes
    `weight` (out, in, kh, kw) or (C, 1, kh, kw); biases (1, C) become (C,); `.ln.` and `.linear.` go; GRN (1, 4C)
    becomes (1, 1, 1, 4C). Entries that have the dense form already stay as they are.
    """
    remapped = {}
    for name, value in state.items():
        name = name.replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(len(value) ** 0.5)
            value = value.view(side, side, *((1,) if value.ndim == 2 else ()), *value.shape[1:])
            value = value.permute(3, 2, 1, 0).contiguous()
        elif name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        remapped[name] = value
    return remapped
