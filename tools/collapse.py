"""Measure feature collapse, channels that all say the same: the cosine distance between channels, block by block.

python -m tools.collapse --checkpoint output/tiny/checkpoint-799.pth --images imagenet/val --num_images 1000
python -m tools.collapse --checkpoint A.pth B.pth --images imagenet/val --output collapse.png    # beside each other
python -m tools.collapse --checkpoint output/digits/checkpoint-19.pth --data_set DIGITS          # needs no images
"""

import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch

import utils
from datasets import COLOUR_MODES, Digits, find_images, read_files
from models.convnextv2 import Block, from_checkpoint
from tools.figure import add_legend, add_names, check_figure, colours, make_figure, save_figure, short_names
from tools.predict import build_eval_transform
from utils import UserError

BATCH = 8  # images at a time
DEAD = 0.01  # a channel is dead in an image if its norm is at most this part of the channels' mean norm


class Layer(NamedTuple):
    """What was measured at one GRN, each an average over images."""

    block: str  # stages.STAGE.BLOCK, as in the weights' names
    index: float  # of all blocks, from 0 to 1: networks of other depths fit the same axis
    before: float  # cosine distance of GRN's input, the expanded features after GELU
    after: float  # of its output
    dead: float  # part of the input's channels


def cosine_distance(x):
    """Average cosine distance between the channels of each image: x (N, ..., C) -> (N,), from 0 to 0.5.

    Section 4 of the paper: 1 / C^2 sum_ij (1 - cos(x_i, x_j)) / 2, where x_i is channel i's map as one vector. 0: all
    channels are alike up to scale, collapsed. 0.5: on average orthogonal; the sum over j = i alone keeps C orthogonal
    channels at (1 - 1 / C) / 2. A channel of zeros has no direction: its cosine is 0 to all, itself too.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)  # (N, S, C), S sites
    norm = torch.linalg.vector_norm(x, dim=1)
    # The sum of all cosines is the squared length of the sum of all unit vectors: C * S operations, not C^2 * S.
    to_unit = norm.clamp(min=torch.finfo(x.dtype).tiny).reciprocal()  # (N, C)
    sum_of_units = (x @ to_unit[:, :, None])[:, :, 0]  # (N, S)
    similarity = sum_of_units.square().sum(1) / x.shape[2] ** 2
    return ((1 - similarity) / 2).clamp(min=0)


def dead_channels(x):
    """Part of the channels of each image whose norm is at most DEAD of the mean: x (N, ..., C) -> (N,).

    After GELU a channel that never fires is seldom exactly 0.
    """
    norm = torch.linalg.vector_norm(x.flatten(1, -2), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (norm <= DEAD * norm.mean(1, keepdim=True)).to(norm.dtype).mean(1)


@torch.inference_mode()
def measure(model, images):
    """The `Layer` of every block in order. model: a `ConvNeXtV2`; images: a list of tensors (in_chans, H, W)."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    sums = dict.fromkeys(blocks, 0)
    device = next(model.parameters()).device

    def watch(name, grn):
        def add(act, inputs, x):  # (N, H, W, 4C)
            measured = [cosine_distance(x), cosine_distance(grn(x)), dead_channels(x)]
            sums[name] = sums[name] + torch.stack(measured).sum(1)

        return add

    handles = [block.act.register_forward_hook(watch(name, block.grn)) for name, block in blocks.items()]
    for first in range(0, len(images), BATCH):
        batch = torch.stack(images[first : first + BATCH]).to(device)
        model.forward_features(batch)
    for handle in handles:
        handle.remove()
    last = max(len(blocks) - 1, 1)
    return [Layer(block, i / last, *(sums[block] / len(images)).tolist()) for i, block in enumerate(blocks)]


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="FILE",
        help="one or more, of any known form, pre-training too",
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", nargs="+", metavar="FILE", help="image files, or folders of them")
    images.add_argument("--data_set", choices=("DIGITS",), help="scikit-learn's held-out digits instead")
    parser.add_argument("--num_images", default=64, type=int, help="of more images so many, evenly spread, are taken")
    parser.add_argument("--output", default=None, metavar="FILE", help="a picture of the curves, by matplotlib")
    parser.add_argument(
        "--model_key", default="model|module", help="where the weights are; model_ema: the averaged ones"
    )
    parser.add_argument(
        "--input_size", default=None, type=int, nargs="+", metavar="PIXELS", help="None: that of the training, else 224"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    return parser


def load_network(args, path):
    """The dense network of a checkpoint and the transform of its images. Raises UserError."""
    checkpoint = utils.load_checkpoint(path)
    model, _ = from_checkpoint(checkpoint, path, args.model_key)
    stem = model.downsample_layers[0][0]
    trained = utils.training_flags(checkpoint)
    size = args.input_size or trained.get("input_size", 224)
    utils.image_size(Namespace(input_size=size), least=8 * stem.stride[0], multiple_of=8 * stem.stride[0])
    return model.eval(), build_eval_transform(args, trained, stem.in_channels)


def read_images(args, in_chans, transform):
    """The images that --images or --data_set names as a list of tensors (in_chans, H, W). Raises UserError."""
    if args.data_set == "DIGITS":
        if in_chans not in COLOUR_MODES:
            raise UserError(f"--data_set DIGITS: has 1, 3 or 4 channels, not the {in_chans} of the network")
        digits = Digits(train=False, in_chans=in_chans)
        return [transform(digits.read(number)) for number in spread(range(len(digits)), args.num_images)]
    files = [file for path in args.images for file in (find_images(path) if os.path.isdir(path) else [path])]
    chosen = spread(files, args.num_images) or args.images  # which hold no image: read_files says so
    return [image for _, image in read_files("--images", chosen, in_chans, transform)]


def spread(items, count):
    """At most so many of the items, at even distances: of files sorted by class, from all classes."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def print_tables(curves):
    """A row a block and a mean, with the checkpoints side by side that have the same blocks. curves: as for `draw`."""
    blocks_of = {name: tuple(layer.block for layer in layers) for name, layers in curves.items()}
    for blocks in dict.fromkeys(blocks_of.values()):
        names = [name for name in curves if blocks_of[name] == blocks]
        widths = [max(24, len(name)) + 3 for name in names]
        print()
        print(" " * 18 + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
        titles = f"{'before':>8}{'after':>8}{'dead %':>8}"
        print(f"{'block':<12}{'layer':>6}" + "".join(f"{titles:>{width}}" for width in widths))
        for row in zip(*(curves[name] for name in names), strict=True):
            print_row(row[0].block, f"{row[0].index:.2f}", [layer[2:] for layer in row], widths)
        means = [torch.tensor([layer[2:] for layer in curves[name]]).mean(0).tolist() for name in names]
        print_row("mean", "", means, widths)


def print_row(block, index, values, widths):
    cells = [f"{before:>8.3f}{after:>8.3f}{100 * dead:>8.1f}" for before, after, dead in values]
    row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    print(f"{block:<12}{index:>6}{row}")


def draw(curves):
    """Figure 4 of the paper as a matplotlib figure. curves: {checkpoint's name: its `Layer`s}."""
    figure, (axis,) = make_figure(1)
    colour_of = dict(zip(curves, colours(len(curves)), strict=True))
    styles = {"after": "-", "before": "--"}
    for name, layers in curves.items():
        for when, style in styles.items():
            distances = [getattr(layer, when) for layer in layers]
            axis.plot([layer.index for layer in layers], distances, color=colour_of[name], linestyle=style)
    axis.set(xlabel="normalised layer index", ylabel="cosine distance between channels")
    axis.set_ylim(min(axis.get_ylim()[0], 0.4), 0.505)  # differences of thousandths are not to fill the picture
    add_names(figure, colour_of)
    add_legend(figure, {f"{when} GRN": dict(color="0.3", linestyle=style) for when, style in styles.items()}, "lower")
    return figure


def main(args):
    utils.check_least(args, 1, "num_images")
    utils.check_device(args)
    if args.output:
        check_figure(args.output)
        if Path(args.output).resolve() in [Path(image).resolve() for image in args.images or []]:
            raise UserError(f"--output {args.output}: is one of the images")
    paths = list(dict.fromkeys(map(os.path.abspath, args.checkpoint)))
    networks = [load_network(args, path) for path in paths]

    curves = {}
    for name, (model, transform) in zip(short_names(paths), networks, strict=True):
        images = read_images(args, model.downsample_layers[0][0].in_channels, transform)
        height, width = images[0].shape[1:]
        print(f"{name}: {len(images)} images of {height} x {width} pixels", flush=True)
        curves[name] = measure(model.to(args.device), images)
    print("cosine distance between channels, before and after GRN: 0 = all alike (collapsed), 0.5 = orthogonal")
    print_tables(curves)
    if args.output:
        save_figure(draw(curves), args.output)
        print(args.output)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
