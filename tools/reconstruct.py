"""Draw original | masked | reconstruction of images with the weights of an FCMAE checkpoint.

python -m tools.reconstruct --checkpoint OUTPUT/checkpoint-799.pth --images A.jpg B.png --output picture.png
"""

from pathlib import Path

import flags
import utils
from tools.common import add_input_size_arg, check_not_among, choose_input_size, write_output
from utils import UserError


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of this project or of the original")
    parser.add_argument("--images", required=True, nargs="+", metavar="FILE", help="image files, or folders of them")
    parser.add_argument("--output", default="reconstruction.png", metavar="FILE", help="picture to write")
    add_input_size_arg(parser)
    parser.add_argument(
        "--mask_ratio",
        default=None,
        type=flags.fraction_below_1,
        help="fraction of patches to mask; None: as in the training, else 0.6",
    )
    parser.add_argument("--seed", default=0, type=flags.at_least(0), help="seed of the masks")
    return parser


def picture_format(output):
    """Pillow's name of the format that the file's ending asks for. Raises UserError if Pillow cannot write it."""
    from PIL import Image

    Image.init()
    name = Image.registered_extensions().get(Path(output).suffix.lower())
    if name not in Image.SAVE:
        raise UserError(f"--output {output}: unknown file extension; .png and .jpg are known")
    return name


def main(args):
    import torch
    from torchvision.transforms import InterpolationMode, v2

    from checkpoints import load_checkpoint, training_flags
    from evaluation import draw_reconstructions
    from images import read_files
    from models import fcmae

    file_format = picture_format(args.output)
    check_not_among("--output", args.output, args.images)
    checkpoint = load_checkpoint(args.checkpoint)
    with utils.name_in_errors(f"--checkpoint {args.checkpoint}"):
        model = fcmae.from_checkpoint(checkpoint)
    size = choose_input_size(args.input_size, checkpoint, model.patch_size, multiple_of=model.patch_size)
    mask_ratio = args.mask_ratio
    if mask_ratio is None:
        mask_ratio = training_flags(checkpoint).get("mask_ratio", 0.6)

    fit = v2.Compose([v2.Resize(max(size), InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    imgs = torch.stack([image for _, image in read_files("--images", args.images, model.in_chans, fit)])
    torch.manual_seed(args.seed)
    with utils.name_in_errors("--mask_ratio"):
        picture = draw_reconstructions(model, imgs, mask_ratio=mask_ratio)
    write_output(args.output, lambda file: picture.save(file, file_format))
    print(f"{len(imgs)} images, mask ratio {mask_ratio}: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
