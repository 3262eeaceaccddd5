"""Print the likeliest classes of images by name.

python -m tools.predict --checkpoint OUTPUT/checkpoint-best.pth A.jpg B.png
"""

from argparse import Namespace

import torch

import utils
from datasets import build_transform, normalize, read_files
from models.checkpoints import get_weights
from models.convnextv2 import from_state_dict
from utils import UserError


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of a classifier, of any known form")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--topk", default=5, type=int, help="how many classes to print")
    parser.add_argument(
        "--model_key", default="model|module", help="where the weights are; model_ema: the averaged ones"
    )
    parser.add_argument(
        "--input_size", default=None, type=int, nargs="+", metavar="PIXELS", help="None: that of the training, else 224"
    )
    return parser


def build_eval_transform(args, trained, in_chans):
    """Image -> (C, H, W), normalised: as the training whose flags are given evaluates, at --input_size if that is."""
    size = args.input_size or trained.get("input_size", 224)
    size = [size] if isinstance(size, int) else size
    if len(size) > 2 or min(size) < 32:
        raise UserError(f"--input_size {' '.join(map(str, size))}: must be one or two numbers from 32 on")
    flags = {"crop_pct": None, "imagenet_default_mean_and_std": True} | trained
    flags |= {"input_size": (size[0], size[-1]), "in_chans": in_chans, "eval_size": None}
    transform = build_transform(False, Namespace(**flags))
    return lambda image: normalize(transform(image)[None], flags["imagenet_default_mean_and_std"])[0]


@torch.inference_mode()
def main(args):
    utils.check_least(args, 1, "topk")
    checkpoint = utils.load_checkpoint(args.checkpoint)
    state = get_weights(checkpoint, args.checkpoint, args.model_key)
    try:
        model = from_state_dict(state).eval()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {' '.join(str(error).split())}") from None
    count = len(state["head.weight"])
    names = checkpoint.get("class_names") or [f"class {number}" for number in range(count)]
    in_chans = state["downsample_layers.0.0.weight"].shape[1]
    transform = build_eval_transform(args, utils.training_flags(checkpoint), in_chans)
    for file, image in read_files("IMAGE", args.images, in_chans, transform):
        top = model(image[None])[0].softmax(0).topk(min(args.topk, count))
        classes = [
            f"{names[i]} {100 * p:.1f} %" for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        print(f"{file}: {', '.join(classes)}")


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
