"""Print the most probable classes of images by name.

python -m tools.predict --checkpoint OUTPUT/checkpoint-best.pth A.jpg B.png
"""

import flags
import utils
from tools.common import add_input_size_arg, add_model_key_arg, build_transform, choose_input_size
from utils import UserError


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of a classifier, in any known form")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--topk", default=5, type=flags.at_least(1), help="number of classes to print")
    add_model_key_arg(parser)
    add_input_size_arg(parser)
    return parser


def load_classifier(path, model_key):
    """The classifier of a checkpoint, in evaluation mode, and the checkpoint. Raises UserError if it has no head."""
    from checkpoints import load_checkpoint
    from models import convnextv2, weights

    checkpoint = load_checkpoint(path)
    with utils.name_in_errors(f"--checkpoint {path}"):
        if "head.weight" not in weights.find_weights(checkpoint, model_key):
            raise UserError(f"--checkpoint {path}: no head.weight: accepted is a classifier with its head")
        model, _ = convnextv2.from_checkpoint(checkpoint, model_key)
    return model.eval(), checkpoint


def main(args):
    import torch

    from images import read_files

    model, checkpoint = load_classifier(args.checkpoint, args.model_key)
    count, in_chans = model.head.out_features, model.config["in_chans"]
    size = choose_input_size(args.input_size, checkpoint, 8 * model.config["stem_stride"])
    names = checkpoint.get("class_names") or [f"class {number}" for number in range(count)]
    transform = build_transform(checkpoint, size, in_chans)
    for file, image in read_files("IMAGE", args.images, in_chans, transform):
        with torch.inference_mode():
            top = model(image[None])[0].softmax(0).topk(min(args.topk, count))
        probabilities = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        print(f"{file}: {', '.join(f'{names[number]} {100 * p:.1f} %' for number, p in probabilities)}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
