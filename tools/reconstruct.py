"""Draw original | masked | reconstruction of images with the weights of an FCMAE checkpoint.

python -m tools.reconstruct --checkpoint OUTPUT/checkpoint-799.pth --images A.jpg B.png --output picture.png
"""

from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode, v2

import utils
from datasets import read_files
from models.checkpoints import get_weights
from models.fcmae import from_state_dict
from tools.pictures import reconstruct
from utils import UserError


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of this project or of the original")
    parser.add_argument("--images", required=True, nargs="+", metavar="FILE", help="image files, or folders of them")
    parser.add_argument("--output", default="reconstruction.png", metavar="FILE", help="the picture to write")
    parser.add_argument(
        "--input_size", default=None, type=int, nargs="+", metavar="PIXELS", help="None: that of the training, else 224"
    )
    parser.add_argument("--mask_ratio", default=None, type=float, help="None: that of the training, else 0.6")
    parser.add_argument("--seed", default=0, type=int, help="decides the masks")
    return parser


def main(args):
    checkpoint = utils.load_checkpoint(args.checkpoint)
    trained = utils.training_flags(checkpoint)
    state = get_weights(checkpoint, args.checkpoint)
    try:
        model = from_state_dict(state, trained.get("norm_pix_loss", True))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {' '.join(str(error).split())}") from None

    size = args.input_size or trained.get("input_size", 224)
    size = [size] if isinstance(size, int) else list(size)
    if len(size) > 2 or any(side % model.patch_size or side < model.patch_size for side in size):
        raise UserError(f"--input_size {' '.join(map(str, size))}: must be one or two multiples of {model.patch_size}")
    size = (size[0], size[-1])
    mask_ratio = trained.get("mask_ratio", 0.6) if args.mask_ratio is None else args.mask_ratio
    if not 0 < mask_ratio < 1:
        raise UserError(f"--mask_ratio {mask_ratio}: must be between 0 and 1")
    if Path(args.output).resolve() in [Path(image).resolve() for image in args.images]:
        raise UserError(f"--output {args.output}: is one of the images")

    fit = v2.Compose([v2.Resize(max(size), InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    images = torch.stack([image for _, image in read_files("--images", args.images, model.in_chans, fit)])
    torch.manual_seed(args.seed)
    try:
        picture = reconstruct(model, images, mask_ratio)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    try:
        picture.save(args.output)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: {getattr(error, 'strerror', None) or error}") from None
    print(f"{len(images)} images, mask ratio {mask_ratio}: {args.output}")


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
