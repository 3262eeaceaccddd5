"""Image sets: `len`, `name(i)`, `open(i)`, `in_chans`, `digest`.

Labelled sets also have `targets` (n,) and `class_names`.
"""

import hashlib
import io
import os
from pathlib import Path

import numpy as np

import sources
import utils
from images import decode, open_array, open_image, try_open
from index import open_index
from tables import read_arrays
from utils import UserError


def find_images(folder):
    """Paths of the images below a folder, nested or flat, by folder and name. Hidden files and folders do not count."""
    index = open_index(sources.Source("folder", str(folder)))
    return [index.name(number) for number in range(len(index))]


def spread(items, count):
    """At most `count` of the items, at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def find_files(flag, paths):
    """These files, and all images below those that are folders. Raises UserError, naming the flag, if there is none."""
    files = [file for path in paths for file in (find_images(path) if os.path.isdir(path) else [path])]
    if not files:
        raise UserError(f"{flag} {' '.join(paths)}: no image there")
    return files


def read_files(flag, paths, in_chans, transform):
    """Yield transform(opened image) of files and of folders of them. Raises UserError for an unreadable one."""
    for file in find_files(flag, paths):
        try:
            with open_image(file, in_chans) as image:
                pixels = transform(image)
        except Exception as error:  # Pillow's plugins raise nearly everything
            raise UserError(sources.in_one_line(f"{flag} {file}: cannot be read: {error}")) from None
        yield pixels


class ImageFolder:
    """The images of a folder or another `sources.Source`, without labels."""

    def __init__(self, source, in_chans, options=sources.DEFAULTS):
        self.source = source if isinstance(source, sources.Source) else sources.Source("folder", str(source))
        self.index, self.in_chans = open_index(self.source, options), in_chans
        self.digest = self.index.digest

    def __len__(self):
        return len(self.index)

    def name(self, index):
        return self.index.name(index)

    def open(self, index):
        return open_image(io.BytesIO(self.index.read(index)), self.in_chans)

    def prefetch(self, start, stop):
        self.index.prefetch(start, stop)


class ClassFolders(ImageFolder):
    """The images of class folders or another source, with labels. class_names: the classes of the model, if it has any.

    Raises UserError for an image without a class, for a class that is not among class_names, and for two class folders
    that are one.
    """

    def __init__(self, source, in_chans, class_names=None, options=sources.DEFAULTS):
        super().__init__(source, in_chans, options)
        index = self.index
        if len(index) and index.target[0] < 0:  # those come first
            name = index.path_in_part(0)
            beside = "lies beside the class folders; give one folder a class"
            if self.source.files:
                beside = f"has no label (--label_column {options.label_column}); give it one, with --loss bce"
                beside += f" {sources.SEPARATOR} for none of the classes"
            raise UserError(f"{self.source}: {name} {beside}")
        for names in index.meta["same"]:
            raise UserError(f"{self.source}: the classes {' and '.join(names)} are one folder; keep one of them")
        self.class_names = list(index.class_names if class_names is None else class_names)
        self.targets = index.target
        if self.class_names != index.class_names:
            self.targets = number_classes(self.source, index.class_names, self.class_names)[index.target]


def number_classes(source, found, class_names):
    """(n,) int32, the number of each class that was found among class_names. Raises UserError for others."""
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(set(found) - set(numbers))
    if unknown:
        classes = utils.format_count(len(numbers), "class")
        problem = f"is not among the {classes} of the model: {sources.shorten(class_names)}"
        raise UserError(f"{source}: class {unknown[0]} ({len(unknown)} such) {problem}")
    return np.array([numbers[name] for name in found], dtype=np.int32)


class ImageArrays:
    """Labelled images in memory: arrays (n, H, W) or (n, H, W, C) of a source that errors name; a class for each."""

    def __init__(self, arrays, source, targets, class_names, in_chans):
        self.arrays, self.source, self.in_chans = arrays, source, in_chans
        self.targets, self.class_names = np.asarray(targets), list(class_names)
        self.digest = f"{len(arrays)} {hash_arrays(arrays[:1], arrays[-1:], self.targets)} {self.class_names}"

    def __len__(self):
        return len(self.arrays)

    def name(self, index):
        return f"{self.source}, image {index}"

    def open(self, index):
        return open_array(self.arrays[index], self.in_chans)


class Digits(ImageArrays):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which need no download. A fixed fifth is held out."""

    def __init__(self, train, in_chans):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        held_out = len(order) // 5
        numbers = np.sort(order[held_out:] if train else order[:held_out])
        arrays = np.rint(digits.images[numbers] * (255 / 16)).astype(np.uint8)
        self.numbers = numbers
        super().__init__(arrays, "DIGITS", digits.target[numbers], map(str, digits.target_names), in_chans)

    def name(self, index):
        return f"digit {self.numbers[index]}"


CIFARS = {"CIFAR": (100, "cifar-100-python"), "CIFAR10": (10, "cifar-10-batches-py")}


def load_cifar(num_classes, folder, train, in_chans):
    """CIFAR-10 or CIFAR-100 in a folder, downloaded into it if missing. Raises UserError if that fails."""
    from torchvision import datasets as torchvision_datasets

    try:
        data = getattr(torchvision_datasets, f"CIFAR{num_classes}")(folder, train=train, download=True)
    except Exception as error:  # of the network, the disk or the archive
        problem = f"CIFAR{num_classes} is not there and cannot be downloaded: {error}"
        raise UserError(f"--data_path {folder}: {problem}") from None
    return ImageArrays(data.data, folder, data.targets, data.classes, in_chans)


def load_arrays(source, in_chans, labels_of, class_names=None):
    """The images of an .npy or .npz file or of MNIST's, see `tables.read_arrays`, in the order of class folders.

    labels_of: the flag whose files need labels; None: any. Raises UserError if they lack them.
    """
    arrays, labels = read_arrays(source)
    if labels is None and labels_of:
        raise UserError(f"{labels_of} {source}: has no labels; give them as NAME_labels.npy, or in an .npz file")
    numbers, targets = np.unique(np.zeros(len(arrays), int) if labels is None else labels, return_inverse=True)
    found = list(map(str, numbers))
    class_names = found if class_names is None else class_names
    images = ImageArrays(arrays, source, number_classes(source, found, class_names)[targets], class_names, in_chans)
    return Subset(images, np.argsort(images.targets, kind="stable"))


class Subset:
    """The images of these numbers (n,) of a labelled image set."""

    def __init__(self, images, numbers):
        self.numbers, self.images, self.in_chans = numbers, images, images.in_chans
        self.targets, self.class_names = images.targets[numbers], images.class_names
        self.digest = f"{images.digest} {hash_arrays(numbers)}"

    def __len__(self):
        return len(self.numbers)

    def name(self, index):
        return self.images.name(int(self.numbers[index]))

    def open(self, index):
        return self.images.open(int(self.numbers[index]))


def rank_in_class(targets, order):
    """(n,) the place of each image among those of its class, in this order of the images (n,)."""
    order = order[np.argsort(targets[order], kind="stable")]
    counts = np.bincount(targets)
    ranks = np.empty(len(targets), dtype=np.int64)
    ranks[order] = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def first_of_each_class(images, count):
    """The `Subset` of the first `count` images of each class; 0: all images."""
    if not count:
        return images
    ranks = rank_in_class(images.targets, np.arange(len(images)))
    return Subset(images, np.flatnonzero(ranks < count))


def split_validation(images, fraction, seed, of_each_class=True):
    """Two `Subset`s: the rest, and this fraction by the seed, of each class: at least 1 image of a class of 2."""
    order = np.random.default_rng(utils.derive_seed(seed, 1)).permutation(len(images))
    targets = images.targets if of_each_class else np.zeros(len(images), dtype=np.int64)
    counts = np.bincount(targets)
    held = np.minimum(np.maximum(np.rint(counts * fraction).astype(np.int64), 1), counts - 1)
    is_held = rank_in_class(targets, order) < held[targets]
    return Subset(images, np.flatnonzero(~is_held)), Subset(images, np.flatnonzero(is_held))


def hash_arrays(*arrays):
    return hashlib.blake2b(b"".join(np.ascontiguousarray(array) for array in arrays), digest_size=16).hexdigest()


def build_images(
    data_set, path, split, in_chans, labelled=True, class_names=None, flag="--data_path", options=sources.DEFAULTS
):  # fmt: skip
    """The image set that --data_set names. Another one is added here and to the choices of the flag.

    split: "train", "val", or "" if path has no such parts. flag: where path comes from. Raises UserError if none of the
    first 100 images can be read.
    """
    if data_set == "DIGITS":
        return Digits(split == "train", in_chans)
    for name, (num_classes, folder) in CIFARS.items():
        if data_set == name or data_set not in CIFARS and (Path(path) / folder).is_dir():
            return load_cifar(num_classes, path, split == "train", in_chans)
    accepted = "a folder with a folder of images for each class" if labelled else "a folder of images"
    try:
        source = sources.find_source(path, split, needed=data_set == "IMNET" or split == "val")
    except OSError as error:
        problem = "not a folder" if isinstance(error, NotADirectoryError) else "no such folder"
        subfolder = "" if Path(str(error)) == Path(path) else f" {error}"
        others = "--data_set DIGITS"
        if split == "val" and subfolder:
            others = "--eval_data_path FOLDER, --val_fraction 0.1 (of the training images), or --disable_eval"
        raise UserError(f"{flag} {path}: {problem}{subfolder}; give {accepted}, or {others}") from None
    if source.kind == "array":
        images = load_arrays(source, in_chans, flag if labelled else None, class_names)
    elif labelled:
        images = ClassFolders(source, in_chans, class_names, options)
    else:
        images = ImageFolder(source, in_chans, options)
    if not len(images):
        raise UserError(f"{flag} {source}: no image there; give {accepted}: files that Pillow reads, or .npy")
    errors = []
    for index in range(min(len(images), 100)):
        _, error = try_open(images, index, lambda image: decode(image, in_chans, pixel_range=options.pixel_range))
        if error is None:
            return images
        errors.append(error)
    raise UserError(f"{flag} {source}: none of the first {len(errors)} images can be read: {errors[0]}")
