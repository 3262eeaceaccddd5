"""Measure feature collapse (channels that all respond alike) by the cosine distance between channels, per block.

python -m tools.collapse --checkpoint output/tiny/checkpoint-799.pth --images imagenet/val --num_images 1000
python -m tools.collapse --checkpoint A.pth B.pth --images imagenet/val --output collapse.png    # beside each other
python -m tools.collapse --checkpoint output/digits/checkpoint-7.pth --data_set DIGITS          # needs no images
"""

import os
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import flags
from image_sets import Digits, find_files, read_files, spread
from images import COLOR_MODES
from models.utils import GRN
from tools import common
from tools.figure import add_legends, check_figure, choose_colors, make_figure, save_figure, shorten_paths
from utils import UserError, format_count

BATCH = 8  # images at a time
DEAD = 0.01  # a channel is dead in an image if its norm is at most this fraction of the channels' mean norm


class Layer(NamedTuple):  # the measurements at one GRN, averages over images
    block: str  # stages.STAGE.BLOCK, as in the names of the weights
    index: float  # from 0 at the first block to 1 at the last: networks of any depth share the axis
    before: float  # cosine distance of GRN's input, the expanded features after GELU
    after: float  # cosine distance of GRN's output
    dead: float  # fraction of dead channels in the input


def cosine_distance(x):
    """Average cosine distance between the channels of each image: x (N, ..., C) -> (N,), from 0 to 0.5.

    Section 4 of the paper: 1 / C^2 sum_ij (1 - cos(x_i, x_j)) / 2, where x_i is channel i's map as one vector. 0: all
    are equal up to scale, collapsed; 0.5: orthogonal on average. The cosine of a channel of zeros is 0 to all.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)  # (N, S, C)
    norm = torch.linalg.vector_norm(x, dim=1)
    # The sum of all cosines is the squared length of the sum of all unit vectors: C * S operations, not C^2 * S.
    to_unit = norm.clamp(min=torch.finfo(x.dtype).tiny).reciprocal()  # (N, C)
    sum_of_units = (x @ to_unit[:, :, None])[:, :, 0]  # (N, S)
    similarity = sum_of_units.square().sum(1) / x.shape[2] ** 2
    return ((1 - similarity) / 2).clamp(min=0)


def dead_channels(x):
    """Fraction of the channels of each image whose norm is at most DEAD of the mean: x (N, ..., C) -> (N,)."""
    norm = torch.linalg.vector_norm(x.flatten(1, -2), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (norm <= DEAD * norm.mean(1, keepdim=True)).to(norm.dtype).mean(1)


@torch.inference_mode()
def measure(model, images):
    """The `Layer` of each block in order. model: a `ConvNeXtV2`; images: a list of tensors (in_chans, H, W)."""
    grns = {name.removesuffix(".grn"): module for name, module in model.named_modules() if isinstance(module, GRN)}
    sums = dict.fromkeys(grns, 0)
    device = next(model.parameters()).device

    def observe(block, grn, inputs, output):  # (N, H, W, 4C)
        measurements = [cosine_distance(inputs[0]), cosine_distance(output), dead_channels(inputs[0])]
        sums[block] = sums[block] + torch.stack(measurements).sum(1)

    handles = [grn.register_forward_hook(partial(observe, block)) for block, grn in grns.items()]
    for first in range(0, len(images), BATCH):
        model.forward_features(torch.stack(images[first : first + BATCH]).to(device))
    for handle in handles:
        handle.remove()
    last = max(len(grns) - 1, 1)
    return [Layer(block, i / last, *(sums[block] / len(images)).tolist()) for i, block in enumerate(grns)]


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help="one or more, in any known form")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", nargs="+", metavar="FILE", help="image files, or folders of them")
    images.add_argument("--data_set", choices=("DIGITS",), help="scikit-learn's held-out digits instead")
    add("--num_images", default=64, type=flags.at_least(1), help="images to use; of more, evenly spread ones")
    add("--output", metavar="FILE", help="picture of the curves, drawn by matplotlib")
    common.add_model_key_arg(add)
    common.add_input_size_arg(add)
    flags.add_device_arg(add)
    return parser


def read_images(args, in_chans, transform):
    """The images of --images or --data_set as a list of tensors (in_chans, H, W). Raises UserError."""
    if args.data_set == "DIGITS":
        if in_chans not in COLOR_MODES:
            raise UserError(f"--data_set DIGITS: has 1, 3 or 4 channels, not the {in_chans} of the network")
        digits, found = Digits(train=False, in_chans=in_chans), []
        for number in spread(range(len(digits)), args.num_images):
            with digits.open(number) as image:
                found.append(transform(image))
        return found
    chosen = spread(find_files("--images", args.images), args.num_images)
    return list(read_files("--images", chosen, in_chans, transform))


def print_tables(curves):
    """A row per block and their mean, checkpoints of the same blocks side by side. curves: as in `draw`."""
    tables = {}  # {blocks: names of the checkpoints}
    for name, layers in curves.items():
        tables.setdefault(tuple(layer.block for layer in layers), []).append(name)
    for blocks, names in tables.items():
        width = max(24, *map(len, names)) + 3
        print(f"\n{'':18}" + "".join(f"{name:>{width}}" for name in names))
        print(f"{'block':<12}{'layer':>6}" + f"{'before':>{width - 16}}{'after':>8}{'dead %':>8}" * len(names))
        rows = [[curves[name][i] for name in names] for i in range(len(blocks))]
        means = [Layer("mean", None, *np.mean([layer[2:] for layer in curves[name]], axis=0)) for name in names]
        for row in [*rows, means]:
            cells = (f"{before:>{width - 16}.3f}{after:>8.3f}{100 * dead:>8.1f}" for *_, before, after, dead in row)
            index = "" if row is means else f"{row[0].index:.2f}"
            print(f"{row[0].block:<12}{index:>6}{''.join(cells)}")


def draw(curves):
    """Figure 4 of the paper as a matplotlib figure. curves: {name of the checkpoint: its `Layer`s}."""
    figure, (axis,) = make_figure(1)
    colors = choose_colors(curves)
    for name, layers in curves.items():
        index = [layer.index for layer in layers]
        axis.plot(index, [layer.after for layer in layers], color=colors[name], linestyle="-")
        axis.plot(index, [layer.before for layer in layers], color=colors[name], linestyle="--")
    axis.set(xlabel="normalized layer index", ylabel="cosine distance between channels")
    axis.set_ylim(min(axis.get_ylim()[0], 0.4), 0.505)  # differences of thousandths must not fill the picture
    add_legends(figure, colors, {"after GRN": dict(linestyle="-"), "before GRN": dict(linestyle="--")})
    return figure


def main(args):
    flags.check_device(args)
    if args.output:
        check_figure(args.output)
        common.check_output(args.output, args.images or [])
    paths, networks, curves = list(dict.fromkeys(map(os.path.abspath, args.checkpoint))), [], {}
    for path in paths:  # all, before any is measured
        model, checkpoint = common.load_network(path, args.model_key)
        stride = 8 * model.config["stem_stride"]
        size = common.choose_input_size(args.input_size, checkpoint, stride, multiple_of=stride)
        networks.append((model, common.build_transform(checkpoint, size, model.config["in_chans"])))

    for name, (model, transform) in zip(shorten_paths(paths), networks, strict=True):
        images = read_images(args, model.config["in_chans"], transform)
        height, width = images[0].shape[1:]
        print(f"{name}: {format_count(len(images), 'image')} of {height} x {width} pixels", flush=True)
        curves[name] = measure(model.to(args.device), images)
    print("cosine distance between channels, before and after GRN: 0 = all alike (collapsed), 0.5 = orthogonal")
    print_tables(curves)
    if args.output:
        save_figure(draw(curves), args.output)
        print(args.output)


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
