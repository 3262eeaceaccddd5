"""Classify the frozen features of a checkpoint by k nearest neighbors and by logistic regression.

    python -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path LABELLED
    torchrun --nproc_per_node=8 -m tools.probe --checkpoint OUTPUT/checkpoint-799.pth --data_path IMAGENET
    python -m tools.probe --checkpoint OUTPUT/checkpoint-9.pth --data_path DIGITS

A feature is the mean over all sites of the encoder's last stage. Both classifiers are deterministic.
"""

from argparse import Namespace

import datasets
import flags
import utils
from evaluation import probe
from tools.common import add_input_size_arg, add_model_key_arg, choose_input_size, find_seen, load_network


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="in any known form")
    add("--data_path", required=True, metavar="FOLDER", help="train/ and val/ of class folders, or DIGITS")
    add("--images_per_class", default=0, type=flags.at_least(0), help="fit on the first images of each class; 0: all")
    add_input_size_arg(add)
    add_model_key_arg(add)
    add("--batch_size", default=64, type=flags.at_least(1), help="images of a forward pass")
    datasets.add_loader_args(parser)
    flags.add_machine_args(parser, training=False)
    return parser


def main(args):
    flags.check_device(args)
    model, checkpoint = load_network(args.checkpoint, args.model_key)
    size = choose_input_size(args.input_size, checkpoint, 8 * model.config["stem_stride"])
    device = utils.init_distributed_mode(args)
    model = utils.to_device(model, device, args.triton)
    in_chans = model.config["in_chans"]
    seen = find_seen(checkpoint, in_chans)
    known = {"in_chans": in_chans, "input_size": size, "pixel_range": seen.pixel_range}
    probe_args = Namespace(**vars(args) | known)
    sets = datasets.build_probe_sets(probe_args, args.data_path, args.images_per_class)
    loaders = [datasets.build_eval_loader(dataset, probe_args, device) for dataset in sets]
    accuracies, counts, unreadable = probe(
        model.forward_trunk, loaders, device, lambda: utils.autocast(args, device), statistics=seen.statistics
    )
    for name in unreadable:
        utils.log(f"unreadable image, left out: {name}")
    results = f"k-nearest-neighbor {accuracies['probe_knn']:.2f} %  linear {accuracies['probe_linear']:.2f} %"
    utils.log(f"{args.checkpoint}: {results}  ({counts[0]} and {counts[1]} images)")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
