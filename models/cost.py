"""What a model costs: parameters, multiply-adds and the memory of activations."""

from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """The cost of a batch."""

    parameters: int
    multiply_adds: int  # of the forward pass; what papers call FLOPs
    activations: int  # bytes that the forward pass keeps for the backward, in float32

    def __str__(self):
        return (
            f"{self.parameters / 1e6:.1f} M parameters, {self.multiply_adds / 1e9:.3g} G multiply-adds, "
            f"{self.activations / 2**20:.0f} MiB of float32 activations"
        )


def cost(build, shape, **inputs):
    """The `Cost` of build() -> model for images of this shape (N, C, H, W), and further inputs by name.

    Nothing is computed: tensors are empty.
    """
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, imgs = build(), torch.empty(shape)
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter:
        model(imgs, **inputs)
    # Apart, as the counter hooks every module, and fast paths, which keep less, do not replace what is hooked
    with saved_tensors_hooks(keep, lambda x: x):
        outputs = model(imgs, **inputs)  # noqa: F841  (held, so that no storage is freed and counted under another's address)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2, sum(kept.values()))


def describe(build, in_chans, input_size, grad_checkpointing=False, **inputs):
    """The cost of build() -> model for one image of input_size (height, width), in words."""
    height, width = input_size
    note = ", before --grad_checkpointing" if grad_checkpointing else ""
    return f"{cost(build, (1, in_chans, height, width), **inputs)} an image of {height} x {width}{note}"
