"""Semantic segmentation: a U-Net of segmentation_models_pytorch on the pre-trained encoder.

    pip install segmentation_models_pytorch
    python -m examples.scenes SCENES                                                    # or your own folders:
    python -m examples.segmentation --data_path SCENES --encoder output/checkpoint-9.pth --output_dir output/unet

    FOLDER/train/images/NAME.png    RGB; all of one size, a multiple of 32 (8 x the stem's stride)
    FOLDER/train/masks/NAME.png     the class of each pixel, 255: not counted
    FOLDER/val/...

Without --encoder the encoder starts at random; --freeze leaves it as it is. Prints the mean IoU over the classes.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import flags
from examples.common import Scales, add_training_args, build_encoder, read_image, train
from images import normalize
from utils import UserError

IGNORED = 255  # class of pixels that do not count


class UNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W): the encoder's four scales into the decoder of a U-Net."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

        self.scales = Scales(encoder)
        channels = (3, 0, *encoder.dims)  # of strides 1, 2, 4, 8, 16, 32; the encoder has none of stride 2
        widths = (128, 64, 32, 32, 16)
        self.decoder = UnetDecoder(channels, widths, n_blocks=5)
        self.head = SegmentationHead(widths[-1], num_classes, kernel_size=3)

    def forward(self, imgs):
        n, _, height, width = imgs.shape
        nothing = imgs.new_empty(n, 0, height // 2, width // 2)
        return self.head(self.decoder([imgs, nothing, *self.scales(imgs).values()]))


def load_split(folder):
    """Images (n, 3, H, W) and masks (n, H, W) of a folder, uint8. Raises UserError for files that do not fit."""
    paths, images, masks = sorted(Path(folder, "images").glob("*")), [], []
    if not paths:
        raise UserError(f"--data_path: no file {folder}/images/*")
    for path in paths:
        mask = Path(folder, "masks", f"{path.stem}.png")
        if not mask.exists():
            raise UserError(f"--data_path: {path} has no mask {mask}")
        images.append(read_image(path, "RGB"))
        masks.append(read_image(mask))
        if images[-1].shape[:2] != masks[-1].shape or images[-1].shape != images[0].shape:
            raise UserError(
                f"--data_path: {path} and its mask must be of the size of the others, with one class a pixel"
            )
    if images[0].shape[0] % 32 or images[0].shape[1] % 32:
        raise UserError(f"--data_path: {path}: both sides must be multiples of 32")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks))


def mean_iou(predicted, target, num_classes):
    """Mean over the classes that occur of intersection / union, in per cent. predicted, target: (n, H, W) classes."""
    counted = target != IGNORED
    pairs = target[counted].long() * num_classes + predicted[counted].long()
    confusion = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return 100 * (confusion.diag() / union)[union > 0].mean().item()


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add_training_args(parser, epochs=20, lr=3e-3)
    return parser


def main(args):
    try:
        from segmentation_models_pytorch.losses import DiceLoss
    except ModuleNotFoundError:
        package = "segmentation_models_pytorch"
        raise UserError(f"examples.segmentation: needs {package}: pip install {package}") from None

    flags.check_device(args)
    images, masks = load_split(f"{args.data_path}/train")
    val_images, val_masks = load_split(f"{args.data_path}/val")
    classes = torch.cat([masks[masks != IGNORED], val_masks[val_masks != IGNORED]])
    num_classes = int(classes.max()) + 1
    encoder = build_encoder(args)
    model = UNet(encoder, num_classes).to(args.device)

    # Small objects count in it as much as the background, unlike in cross-entropy
    dice_loss = DiceLoss("multiclass", ignore_index=IGNORED)

    def compute_logits(imgs):
        return model(normalize(imgs.to(args.device), encoder.statistics))

    def compute_loss(indices):
        logits, target = compute_logits(images[indices]), masks[indices].to(args.device).long()
        return F.cross_entropy(logits, target, ignore_index=IGNORED) + dice_loss(logits, target)

    def evaluate():
        batches = val_images.split(args.batch_size)
        predicted = torch.cat([compute_logits(batch).argmax(1).cpu() for batch in batches])
        return mean_iou(predicted, val_masks, num_classes)

    miou = train(args, model, len(images), compute_loss, evaluate)
    print(f"mIoU {miou:.2f} %  ({len(images)} images to train, {len(val_images)} to validate, {num_classes} classes)")
    return miou


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
