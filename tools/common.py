"""Shared by the tools: flags of weights and image size, the dense network, its transform, files to write."""

import sys
from pathlib import Path
from typing import NamedTuple

import flags
import utils
from checkpoints import load_checkpoint, training_flags, write_whole
from datasets import build_eval_transform
from images import find_statistics, normalize
from models import convnextv2
from utils import UserError


def add_model_key_arg(add):
    keys = "checkpoint keys to try, separated by |; model_ema: the EMA weights"
    add("--model_key", default="model|module", metavar="KEYS", help=keys)


def add_input_size_arg(add):
    size = "side of the images, or height and width; None: as in the training, else 224"
    add("--input_size", action=flags.ImageSize, help=size)


def load_network(path, model_key):
    """The dense network of a checkpoint of any known form, in evaluation mode, and the checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    with utils.name_in_errors(f"--checkpoint {path}"):
        model, _ = convnextv2.from_checkpoint(checkpoint, model_key)
    return model.eval(), checkpoint


class Seen(NamedTuple):
    """How a checkpoint's training saw images."""

    crop_pct: float | None  # see `datasets.build_eval_transform`
    statistics: tuple  # see `images.normalize`
    pixel_range: tuple | None  # see `images.decode`


def find_seen(checkpoint, in_chans):
    """The `Seen` of a checkpoint of a network for so many channels. Raises UserError."""
    given = training_flags(checkpoint)
    with utils.name_in_errors("--checkpoint"):
        statistics = find_statistics(given, in_chans)
    return Seen(given.get("crop_pct"), statistics, given.get("pixel_range"))


def choose_input_size(input_size, checkpoint, total_stride, multiple_of=1):
    """(height, width): input_size if given, else that of the checkpoint's training. Raises UserError if it is unfit."""
    trained = training_flags(checkpoint).get("input_size")
    size = input_size or trained or (224, 224)
    flags.check_image_size("input_size", size, multiple_of=multiple_of, least=total_stride)
    if trained and trained != tuple(size) and utils.is_main_process():
        asked, before = (" x ".join(map(str, sides)) for sides in (size, trained))
        warning = f"WARNING: --input_size makes images of {asked}: the checkpoint was trained at {before}"
        print(warning, file=sys.stderr)
    return size


def build_transform(checkpoint, input_size, in_chans):
    """An opened image -> normalized (C, height, width), as the checkpoint's training evaluates, at the given size."""
    seen = find_seen(checkpoint, in_chans)
    transform = build_eval_transform(input_size, in_chans, seen.crop_pct, seen.pixel_range)
    return lambda image: normalize(transform(image)[None], seen.statistics)[0]


def check_output(output, images, flag="--output"):
    """Raise UserError if the output is one of the images to read."""
    if Path(output).resolve() in [Path(path).resolve() for path in images]:
        raise UserError(f"{flag} {output}: is one of the images; choose another name")


def write_output(output, write, flag="--output"):
    """Call write(file) to write the output whole or not at all. Raises UserError, naming its flag, if that fails."""
    try:
        write_whole(output, write)
    except OSError as error:
        raise UserError(f"{flag} {output}: {error.strerror or error}") from None
