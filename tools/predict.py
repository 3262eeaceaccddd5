"""Print the most probable classes of images by name.

python -m tools.predict --checkpoint OUTPUT/checkpoint-best.pth A.jpg B.png
"""

import torch

import flags
from images import in_one_line, read_files
from tools.common import add_input_size_arg, add_model_key_arg, build_transform, choose_input_size, load_network


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="of a classifier, in any known form")
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--topk", default=5, type=flags.at_least(1), help="number of classes to print")
    add_model_key_arg(add)
    add_input_size_arg(add)
    return parser


def main(args):
    model, checkpoint = load_network(args.checkpoint, args.model_key, needs_head=True)
    count, in_chans = model.head.out_features, model.config["in_chans"]
    size = choose_input_size(args.input_size, checkpoint, 8 * model.config["stem_stride"])
    names = checkpoint.get("class_names") or [f"class {number}" for number in range(count)]
    for file, image in read_files("IMAGE", args.images, in_chans, build_transform(checkpoint, size, in_chans)):
        with torch.inference_mode():
            top = model(image[None])[0].softmax(0).topk(min(args.topk, count))
        probabilities = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        print(f"{in_one_line(file)}: {', '.join(f'{names[number]} {100 * p:.1f} %' for number, p in probabilities)}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
