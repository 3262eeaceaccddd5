"""Classify the frozen features of a checkpoint by k nearest neighbors and by logistic regression.

    python -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path LABELLED
    torchrun --nproc_per_node=8 -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path IMAGENET
    python -m tools.probe --checkpoint OUTPUT/checkpoint-9.pth --data_path DIGITS

A feature is the mean over all sites of the encoder's last stage. Both classifiers are deterministic.
"""

import datasets
import flags
import utils
from evaluation import probe
from loaders import add_loader_args, build_eval_loader
from tools.inference import add_inference_args, load_inference


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("--data_path", required=True, metavar="FOLDER", help="train/ and val/ of class folders, or DIGITS")
    add("--images_per_class", default=0, type=flags.at_least(0), help="fit on the first images of each class; 0: all")
    add_loader_args(parser)
    add_inference_args(parser, workers=False)
    return parser


def main(args):
    inference = load_inference(args)
    model, device, seen = inference.model, inference.device, inference.seen
    known = {"in_chans": model.config["in_chans"], "input_size": inference.input_size, "pixel_range": seen.pixel_range}
    sets = datasets.build_probe_sets(args.replace(**known), args.data_path, args.images_per_class)
    loaders = [build_eval_loader(dataset, args, device) for dataset in sets]
    accuracies, counts, unreadable = probe(
        model.forward_trunk, loaders, device, lambda: utils.autocast(args, device), statistics=seen.statistics
    )
    for name in unreadable:
        utils.log(f"unreadable image, left out: {name}")
    results = f"k-nearest-neighbor {accuracies['probe_knn']:.2f} %  linear {accuracies['probe_linear']:.2f} %"
    utils.log(f"{args.checkpoint}: {results}  ({counts[0]} and {counts[1]} images)")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
