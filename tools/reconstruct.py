"""Draw original | masked | reconstruction of images with the weights of an FCMAE checkpoint.

python -m tools.reconstruct --checkpoint OUTPUT/checkpoint-799.pth --images A.jpg B.png --output picture.png

A network trained with --norm_pix_loss predicts patches without their brightness and contrast. Its reconstruction is
drawn twice: with each patch's true mean and deviation given back, and with those of the visible patches, all it knows.
"""

from functools import partial

import torch

import flags
import utils
from checkpoints import load_checkpoint, training_flags
from evaluation import draw_reconstructions
from image_sets import read_files
from images import check_resized, decode
from models import fcmae
from tools.common import add_input_size_arg, check_output, choose_input_size, find_seen, write_output
from tools.sheet import check_picture


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="of this project or of the original")
    add("--images", required=True, nargs="+", metavar="FILE", help="image files, or folders of them")
    add("--output", default="reconstruction.png", metavar="FILE", help="picture to write")
    add_input_size_arg(add)
    ratio = "fraction of patches to mask; None: as in the training, else 0.6"
    add("--mask_ratio", type=flags.fraction_below_1, help=ratio)
    add("--seed", default=0, type=flags.at_least(0), help="seed of the masks")
    return parser


def main(args):
    from torchvision.transforms import InterpolationMode, v2

    file_format = check_picture("--output", args.output)
    check_output(args.output, args.images)
    checkpoint = load_checkpoint(args.checkpoint)
    with utils.name_in_errors(f"--checkpoint {args.checkpoint}"):
        model = fcmae.from_checkpoint(checkpoint)
    size = choose_input_size(args.input_size, checkpoint, model.patch_size, multiple_of=model.patch_size)
    ratio = training_flags(checkpoint).get("mask_ratio", 0.6) if args.mask_ratio is None else args.mask_ratio

    seen = find_seen(checkpoint, model.in_chans)
    read = partial(decode, in_chans=model.in_chans, pixel_range=seen.pixel_range)
    resize = [partial(check_resized, shorter=max(size)), v2.Resize(max(size), InterpolationMode.BICUBIC)]
    fit = v2.Compose([read, *resize, v2.CenterCrop(size), v2.PILToTensor()])
    imgs = torch.stack(list(read_files("--images", args.images, model.in_chans, fit)))
    torch.manual_seed(args.seed)
    with utils.name_in_errors("--mask_ratio"):
        picture = draw_reconstructions(model, imgs, mask_ratio=ratio, statistics=seen.statistics)
    write_output(args.output, lambda file: picture.save(file, file_format))
    print(f"{utils.format_count(len(imgs), 'image')}, mask ratio {ratio}: {args.output}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
