"""Measure the mean and the standard deviation of each channel of the training images, as flags of a training.

    python -m tools.statistics --data_path IMAGES
    python -m tools.statistics --data_path SLIDES.csv --in_chans 5 --pixel_range 0 4095

In [0, 1] after --pixel_range, as the loader decodes them. Every image counts the same, whatever its size, as it does in
training; within an image, every pixel does.
"""

import time
from functools import partial

import torch

import datasets
import flags
import loaders
import sources
import tasks
from image_sets import build_images
from images import decode_fast, to_tensor
from utils import UserError, log


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    data_sets = ("image_folder", "IMNET", "CIFAR", "CIFAR10", "DIGITS")
    add("--data_set", default="image_folder", choices=data_sets, help="as of a training")
    add("--data_path", metavar="PATH", help="as of a training; its train/ if it has one")
    add("--in_chans", default=3, type=flags.at_least(1, 1024), help="channels of the images, as of a training")
    datasets.add_pixel_range_arg(add)
    sources.add_source_args(add)
    add("--val_fraction", default=0.0, type=flags.fraction_below_1, help="fraction of each class that is not measured")
    loss = "as of a training: by it, --val_fraction is of each class or of all images"
    add("--loss", default="ce", choices=tasks.find_losses(), help=loss)
    add("--seed", default=0, type=int, help="by which --val_fraction is drawn")
    add("--batch_size", default=16, type=flags.at_least(1), help="images that a worker measures at a time")
    loaders.add_loader_args(parser)
    return parser


def build_measured_images(args):
    if args.val_fraction:
        return datasets.build_labelled_images(True, args.replace(eval_data_path=None, images_per_class=0))
    source = args.data_set, args.data_path, "train", args.in_chans
    return build_images(*source, labelled=False, options=sources.options_of(args))


def measure_image(image, args):
    """Mean and mean square of each channel of an opened image, in [0, 1]: (2, C, 1) float64."""
    pixels = to_tensor(decode_fast(image, args.in_chans, pixel_range=args.pixel_range)).flatten(1)
    counts = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    return torch.stack([(counts * levels).sum(1), (counts * levels**2).sum(1)])[:, :, None] / pixels.shape[1]


def measure(loader, total):
    """(mean, std, number of images): of each channel (C,) float64, in [0, 1]. The rate and the time left are logged."""
    sums, count, start, next_line = 0, 0, time.monotonic(), 2.0
    for batch in loader:
        for name in batch.unreadable:
            log(f"unreadable image, left out: {name}")
        if len(batch.imgs):
            sums, count = sums + batch.imgs[..., 0].sum(0), count + len(batch.imgs)
        seconds = time.monotonic() - start
        if seconds > next_line:
            next_line = seconds + 10
            rate = count / seconds
            log(f"{count:,} of {total:,} images, {rate:,.0f} images/s, about {(total - count) / rate:.0f} s left")
    if not count:
        raise UserError("--data_path: no image can be read")
    mean, square = sums / count
    return mean, (square - mean**2).clamp(min=0).sqrt(), count


def main(args):
    datasets.check_image_args(args, "a folder of images")
    torch.set_num_threads(1)  # as a worker has: for counting, more would wait for each other
    dataset = datasets.EvalDataset(build_measured_images(args), partial(measure_image, args=args), args.max_bad_images)
    mean, std, count = measure(loaders.build_eval_loader(dataset, args, "cpu"), len(dataset))
    for channel in (std < 1e-6).nonzero().flatten().tolist():
        raise UserError(f"--data_path: channel {channel} is {mean[channel]:.6g} in all pixels: leave it out")
    log(f"{count:,} images:")
    print("--mean", *(f"{value:.6g}" for value in mean), "--std", *(f"{value:.6g}" for value in std))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
