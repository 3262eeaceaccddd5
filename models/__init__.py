"""ConvNeXt V2 and FCMAE (arXiv 2301.00808) in plain PyTorch; `pip install .` installs this package as `convnextv2`.

import convnextv2

model = convnextv2.from_checkpoint("checkpoint-best.pth")    # any file of weights, see `models.files`
logits = model(imgs)                                         # (N, in_chans, H, W) -> (N, num_classes)
maps = model.feature_maps(imgs)                              # four of (N, C, h, w), for dense prediction
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

model = convnextv2.convnextv2_tiny(num_classes=10)           # from scratch
loss, pred, mask = convnextv2.FCMAE(224, **convnextv2.SIZES["convnextv2_tiny"])(imgs)
"""

from .convnextv2 import (
    SIZES,
    ConvNeXtV2,
    convnextv2_atto,
    convnextv2_base,
    convnextv2_femto,
    convnextv2_huge,
    convnextv2_large,
    convnextv2_nano,
    convnextv2_pico,
    convnextv2_tiny,
)
from .fcmae import FCMAE
from .files import from_checkpoint

__all__ = [
    "FCMAE",
    "SIZES",
    "ConvNeXtV2",
    "convnextv2_atto",
    "convnextv2_base",
    "convnextv2_femto",
    "convnextv2_huge",
    "convnextv2_large",
    "convnextv2_nano",
    "convnextv2_pico",
    "convnextv2_tiny",
    "from_checkpoint",
]
