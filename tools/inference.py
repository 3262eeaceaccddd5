"""Shared by predict and neighbours: image files in batches through the network of a checkpoint."""

import os
from typing import NamedTuple

import numpy as np
import torch

import datasets
import flags
import utils
from image_sets import find_files
from images import normalize, open_image, try_open
from loaders import Loader
from sources import in_one_line
from tools.common import Seen, add_input_size_arg, add_model_key_arg, choose_input_size, find_seen, load_network
from utils import UserError


def add_inference_args(parser, workers=True):
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="in any known form")
    add_model_key_arg(add)
    add_input_size_arg(add)
    add("--batch_size", default=64, type=flags.at_least(1), help="images of a forward pass")
    if workers:  # else they are among the flags of the loader
        add("--num_workers", default=10, type=flags.at_least(0), help="loader processes, at most one per core; 0: none")
    flags.add_machine_args(parser, training=False)


class ImageFiles:
    """An image set, see `images`, of files and of all images below folders; without labels.

    Raises UserError for a path that does not exist, and if there is no image.
    """

    def __init__(self, flag, paths, in_chans):
        for path in paths:
            if not os.path.exists(path):
                raise UserError(f"{flag} {path}: No such file or folder")
        self.paths, self.in_chans = np.array([os.fsencode(file) for file in find_files(flag, paths)]), in_chans

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(bytes(self.paths[index]))

    def open(self, index):
        return open_image(self.name(index), self.in_chans)


class FileDataset(datasets.EvalDataset):
    """As `EvalDataset`, without classes: an unreadable file is (None, None, None, [(index, error)])."""

    def load(self, index):
        image, error = try_open(self.images, index, self.transform)
        if error is not None:
            return None, None, None, [(index, error.removeprefix(in_one_line(self.images.name(index)))[2:-1])]
        return image, 0, index, []


class Inference(NamedTuple):
    """A network and all that its training says about images."""

    model: torch.nn.Module
    checkpoint: dict
    input_size: tuple  # (height, width)
    seen: Seen
    device: torch.device
    args: object

    def build_dataset(self, flag, paths):
        in_chans = self.model.config["in_chans"]
        images = ImageFiles(flag, paths, in_chans)
        transform = datasets.build_eval_transform(self.input_size, in_chans, self.seen.crop_pct, self.seen.pixel_range)
        return FileDataset(images, transform)

    def compute(self, function, dataset, indices):
        """Yield (indices (n,), rows (n, D), [(index, error)]) of batches: function(normalized imgs) -> rows.

        rows are on the CPU, and empty if no image of the batch can be read.
        """
        sampler = torch.utils.data.BatchSampler(indices, self.args.batch_size, False)
        for batch in Loader(dataset, sampler, self.args.replace(pin_mem=True), self.device):
            rows = ()
            if len(batch.imgs):
                imgs = batch.imgs.to(self.device, non_blocking=True)
                with torch.no_grad(), utils.autocast(self.args, self.device):
                    rows = function(normalize(imgs, self.seen.statistics)).cpu()
            yield batch.indices, rows, batch.unreadable


def load_inference(args):
    """The `Inference` of --checkpoint, in this process and its device. Raises UserError."""
    flags.check_device(args)
    model, checkpoint = load_network(args.checkpoint, args.model_key)
    size = choose_input_size(args.input_size, checkpoint, 8 * model.config["stem_stride"])
    device = utils.init_distributed_mode(args)
    seen = find_seen(checkpoint, model.config["in_chans"])
    return Inference(utils.to_device(model, device, args.triton), checkpoint, size, seen, device, args)
