"""From image files to batches: what is read, how it is augmented, in which order.

Every random draw of a sample (crop, flip, mask) is a function of (seed, epoch, sample index), and the order of an epoch
one of (seed, epoch). So neither the number of workers nor of processes changes a sample, and a run that is stopped goes
on at any step without a saved generator state.
"""

import contextlib
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode, v2

from utils import UserError, derive_seed, get_rank, get_world_size

COLOUR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels
STUB_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow names these but cannot read them


# ---------------------------------------------------------------- images


def image_extensions():
    """The file name endings, lower case, that `read_image` reads."""
    Image.init()
    readable = set(Image.OPEN) - STUB_FORMATS
    return {ending for ending, name in Image.registered_extensions().items() if name in readable} | {".npy"}


def find_images(folder):
    """The images below a folder, nested or flat, sorted, each folder once. Hidden files and folders do not count."""
    endings = image_extensions()
    paths, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            os.path.join(parent, name)
            for name in names
            if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
        ]
    return sorted(paths)


def read_image(path, in_chans):
    """A file as a Pillow image of 1 (grey), 3 (RGB) or 4 (RGBA) channels, or, from .npy, as a uint8 tensor (C, H, W).

    16-bit greys keep their upper 8 bits; 32-bit and floating-point ones are stretched from their own range to 8 bits.
    Raises whatever Pillow raises for a file that it cannot read, ValueError for an array that does not fit.
    """
    if str(path).lower().endswith(".npy"):
        array = np.load(path)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != in_chans:
            raise ValueError(f"array of {array.dtype} {array.shape}: must be uint8 (height, width, {in_chans})")
        return torch.from_numpy(array).permute(2, 0, 1)
    if in_chans not in COLOUR_MODES:
        raise ValueError(f"image files have 1, 3 or 4 channels, not {in_chans}: only .npy arrays have others")
    with Image.open(path) as image:
        image.load()
        if image.mode.startswith(("I", "F")):
            image = to_8_bits(image, sixteen=";16" in image.mode or image.format in ("PNG", "PPM"))
        elif image.mode == "P":
            image = image.convert("RGBA")  # applies the transparent colour, if any
        return image.convert(COLOUR_MODES[in_chans])


def to_8_bits(grey, sixteen):
    """A grey image of 16 bits, of either byte order or held in 32, or one of 32 bits, with 8."""
    array = np.asarray(grey)
    if sixteen:
        return Image.fromarray((array >> 8).astype(np.uint8))
    low, high = float(array.min()), float(array.max())
    return Image.fromarray(np.rint((array - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


class ImageFolder:
    """The images below a folder: `len`, `name(index)`, `read(index)`."""

    def __init__(self, folder, in_chans):
        # Bytes in one array: each loader worker would slowly copy a list of a million Python strings.
        self.paths = np.array([os.fsencode(path) for path in find_images(folder)])
        self.in_chans = in_chans

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(bytes(self.paths[index]))

    def read(self, index):
        return read_image(self.name(index), self.in_chans)


class Digits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which need no download. A fixed fifth is held out."""

    def __init__(self, train, in_chans):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        held_out = len(order) // 5
        self.numbers = np.sort(order[held_out:] if train else order[:held_out])
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.in_chans = in_chans

    def __len__(self):
        return len(self.numbers)

    def name(self, index):
        return f"digit {self.numbers[index]}"

    def read(self, index):
        return Image.fromarray(self.images[self.numbers[index]]).convert(COLOUR_MODES[self.in_chans])


def build_pretrain_images(args):
    """The unlabelled images that --data_set and --data_path name. Raises UserError if there are none."""
    if args.data_set == "DIGITS":
        return Digits(train=True, in_chans=args.in_chans)
    folder = Path(args.data_path)
    if (folder / "train").is_dir():
        folder = folder / "train"
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"--data_path {args.data_path}: {what}; accepted is a folder of images, or --data_set DIGITS")
    images = ImageFolder(folder, args.in_chans)
    if not len(images):
        raise UserError(
            f"--data_path {args.data_path}: no image in {folder}; accepted are files that Pillow reads, and .npy"
        )
    errors = []
    for index in range(min(len(images), 100)):
        image, error = try_read(images, index)
        if error is None:
            return images
        errors.append(error)
    raise UserError(f"--data_path {args.data_path}: none of the first {len(errors)} images can be read: {errors[0]}")


def try_read(images, index):
    """(image, None), or (None, its name and what is wrong) if it cannot be read."""
    try:
        return images.read(index), None
    except Exception as error:  # Pillow's plugins raise nearly everything
        return None, f"{images.name(index)} ({type(error).__name__}: {error})"


# ---------------------------------------------------------------- samples


@contextlib.contextmanager
def randomness_of(*key):
    """Inside, torch's, NumPy's and Python's generators depend on nothing but the key; after, they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = derive_seed(*key)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class Batch(NamedTuple):
    """What the pre-training loader yields."""

    imgs: torch.Tensor  # (N, C, H, W) uint8
    noise: torch.Tensor  # (N, L) in [0, 1): what decides the masks
    unreadable: list  # names of the files that could not be read, and for which others stand in

    @staticmethod
    def collate(samples):
        imgs, noise, unreadable = zip(*samples, strict=True)
        return Batch(torch.stack(imgs), torch.stack(noise), [name for names in unreadable for name in names])


class PretrainDataset(torch.utils.data.Dataset):
    """Augmented images with the noise of their masks; `dataset[epoch, index]`.

    For an image that cannot be read the next one that can stands in, and the sample says so.
    """

    def __init__(self, images, input_size, num_patches, seed):
        self.images = images
        self.num_patches = num_patches
        self.seed = seed
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(input_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __getitem__(self, key):
        """(epoch, index) -> image (C, H, W) uint8, noise (L,), names of files that could not be read."""
        epoch, index = key
        image, unreadable = self.read(index)
        with randomness_of(self.seed, epoch, index):
            noise = torch.rand(self.num_patches)
            return self.transform(image), noise, unreadable

    def read(self, index):
        unreadable = []
        for shift in range(len(self.images)):
            image, error = try_read(self.images, (index + shift) % len(self.images))
            if error is None:
                return image, unreadable
            unreadable.append(error)
        raise OSError(f"none of the {len(self.images)} images can be read any more; the first: {unreadable[0]}")


def pixel_statistics(in_chans):
    """Mean and standard deviation of each channel, in [0, 1]: ImageNet's, or their averages if not 3 channels."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (mean, std) if in_chans == 3 else (mean.mean().expand(in_chans), std.mean().expand(in_chans))


def normalize(imgs):
    """uint8 (N, C, H, W) -> float32, each channel with ImageNet's mean and deviation taken out."""
    mean, std = (s.to(imgs.device)[:, None, None] for s in pixel_statistics(imgs.shape[1]))
    return (imgs / 255 - mean) / std


def denormalize(imgs):
    """The inverse of `normalize`, clipped: float (N, C, H, W) -> uint8."""
    mean, std = (s.to(imgs.device)[:, None, None] for s in pixel_statistics(imgs.shape[1]))
    return ((imgs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- order and loader


class EpochSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, of an order that is a function of (seed, epoch), from any step on.

    An optimizer step takes the next batch_size * update_freq * world_size samples of the order, however they are
    divided. An epoch has whole steps only: the rest of its order is left out, another one each epoch.
    """

    def __init__(self, num_samples, batch_size, update_freq, seed, rank=0, world_size=1):
        self.num_samples, self.batch_size, self.update_freq, self.seed = num_samples, batch_size, update_freq, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = num_samples // (batch_size * update_freq * world_size)
        self.set_position(0, 0)

    def set_position(self, epoch, step):
        """What to yield next: the batches of this epoch from this optimizer step on."""
        self.epoch, self.step = epoch, step

    def __len__(self):
        return (self.steps_per_epoch - self.step) * self.update_freq

    def __iter__(self):
        epoch = self.epoch
        order = np.random.default_rng(derive_seed(self.seed, epoch)).permutation(self.num_samples)
        for batch in range(self.step * self.update_freq, self.steps_per_epoch * self.update_freq):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]


def build_pretrain_loader(dataset, args):
    """The loader of `Batch`es and its sampler. Raises UserError if the images make no whole optimizer step."""
    sampler = EpochSampler(
        len(dataset.images), args.batch_size, args.update_freq, args.seed, get_rank(), get_world_size()
    )
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"{len(dataset.images)} images make no whole step of {args.effective_batch_size} "
            f"(--batch_size {args.batch_size} x --update_freq {args.update_freq} x {get_world_size()} processes)"
        )
    workers = min(args.num_workers, len(os.sched_getaffinity(0)))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Batch.collate,
        num_workers=workers,
        pin_memory=args.pin_mem and args.device.startswith("cuda"),
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each epoch would draw from the global one
    )
    return loader, sampler
