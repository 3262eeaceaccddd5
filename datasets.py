"""From image files to batches: what is read, how it is augmented, in which order.

Every random draw of a sample (crop, flip, mask) is a function of (seed, epoch, sample index, repeat), and the order of
an epoch one of (seed, epoch). So neither the number of workers nor of processes changes a sample, and a run that is
stopped goes on at any step without a saved generator state.
"""

import contextlib
import functools
import itertools
import math
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from timm.data import Mixup, auto_augment, create_transform
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import InterpolationMode, v2

from utils import (
    STOP_SIGNALS,
    UserError,
    check_least,
    check_part,
    derive_seed,
    get_rank,
    get_world_size,
    image_size,
    main_process_first,
    on_all_processes,
    release_locks,
    str2bool,
)

COLOUR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels
STUB_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow names these but cannot read them
# Faster than Pillow's, bit for bit the same. Deprecated since torchvision 0.29: without it, Pillow decodes.
decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


# ---------------------------------------------------------------- flags


def add_loader_args(parser):
    group = parser.add_argument_group("loader")
    group.add_argument("--num_workers", default=10, type=int, help="loader processes, at most one a core; 0: none")
    group.add_argument("--pin_mem", default=True, type=str2bool, help="page-locked batches, faster to copy to a GPU")
    group.add_argument("--max_bad_images", default=100, type=int, help="more unreadable images than this stop the run")


def check_loader_args(args):
    check_least(args, 0, "num_workers max_bad_images")


def add_labelled_args(parser):
    """The flags of labelled images, of their augmentation and of evaluation."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set",
        default="IMNET",
        choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "DIGITS"),
        help="IMNET: train/ and val/ of class folders; image_folder: class folders; CIFAR: CIFAR-100",
    )
    group.add_argument("--data_path", default=None, metavar="FOLDER", help="where the images are, or come (CIFAR)")
    group.add_argument(
        "--eval_data_path", default=None, metavar="FOLDER", help="class folders; None: val/ of data_path"
    )
    group.add_argument("--nb_classes", default=None, type=int, help="number of classes, checked; None: as the data")
    group.add_argument("--images_per_class", default=0, type=int, help="train on the first of each class only; 0: all")
    group.add_argument(
        "--imagenet_default_mean_and_std", default=True, type=str2bool, help="pixel statistics; false: Inception's"
    )
    group.add_argument(
        "--crop_pct",
        default=None,
        type=float,
        help="part of the resized image that is evaluated; None: 0.875, and all of it up to 32 and from 384 pixels on",
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument("--color_jitter", default=None, type=float, help="strength, where --aa is none; None: no jitter")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an AutoAugment policy, or none")
    group.add_argument("--hflip", default=0.5, type=float, help="part of the images that is mirrored")
    group.add_argument("--reprob", default=0.25, type=float, help="part of the images with a rectangle erased")
    group.add_argument(
        "--remode", default="pixel", choices=("pixel", "rand", "const"), help="it becomes noise, a colour, 0"
    )
    group.add_argument("--recount", default=1, type=int, help="most rectangles an image")
    group.add_argument(
        "--train_interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"), help="of resized crops"
    )
    group.add_argument("--mixup", default=0.0, type=float, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", default=0.0, type=float, help="alpha of cutmix; 0: none")
    group.add_argument(
        "--cutmix_minmax", default=None, type=float, nargs=2, help="least and largest side of the cut, 0 to 1"
    )
    group.add_argument("--mixup_prob", default=1.0, type=float, help="part of the batches that is mixed")
    group.add_argument("--mixup_switch_prob", default=0.5, type=float, help="part of those by cutmix, if both are on")
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what is mixed alike")

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval", default=False, type=str2bool, help="evaluate --resume or the output folder's newest, only"
    )
    group.add_argument("--disable_eval", default=False, type=str2bool, help="train without evaluation")
    group.add_argument(
        "--dist_eval", default=True, type=str2bool, help="divide the images; false: each process takes all"
    )
    group.add_argument(
        "--eval_size",
        default=None,
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of the evaluated images, or height and width: logits of --input_size's windows are averaged",
    )
    group.add_argument("--topk", default=(1, 5), type=int, nargs="+", help="k of accuracies, precisions and recalls")


def check_labelled_args(args):
    """Complete the flags, or raise UserError for those that cannot work."""
    if args.eval and args.disable_eval:
        raise UserError("--eval true and --disable_eval true: nothing to do")
    if min(args.topk) < 1:
        raise UserError(f"--topk {min(args.topk)}: must be at least 1")
    args.topk = sorted({1, *args.topk})
    unit, args.pool_window = 8 * args.stem_stride, None
    if args.eval_size is not None:
        args.eval_size = image_size(args, least=unit, flag="eval_size")
        args.pool_window = [side // unit for side in args.input_size]
    check_least(args, 0, "images_per_class color_jitter mixup cutmix")
    check_least(args, 1, "recount")
    check_part(args, "hflip reprob mixup_prob mixup_switch_prob")
    if mixes(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even for mixup and cutmix")
    if args.cutmix_minmax and not 0 <= args.cutmix_minmax[0] <= args.cutmix_minmax[1] <= 1:
        raise UserError(f"--cutmix_minmax {args.cutmix_minmax}: must be two numbers from 0 to 1, the smaller first")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop_pct {args.crop_pct}: must be above 0, at most 1")
    args.aa = None if args.aa.lower() in ("", "none") else args.aa
    if args.data_set in ("DIGITS", "CIFAR", "CIFAR10"):
        check_colour_mode(args)
    if args.data_set != "DIGITS" and not args.data_path and not (args.eval and args.eval_data_path):
        raise UserError("--data_path: give a folder of class folders, or --data_set DIGITS")
    if args.eval:
        return
    if args.in_chans not in (1, 3) and (args.aa or args.color_jitter):
        raise UserError(
            f"--aa {args.aa}, --color_jitter {args.color_jitter}: made for grey and RGB images; "
            f"give --aa none and no --color_jitter for --in_chans {args.in_chans}"
        )
    try:
        build_transform(True, args)
    except (ValueError, TypeError, KeyError, AssertionError) as error:  # timm's, of a policy it does not know
        raise UserError(f"--aa {args.aa}: not a policy of timm: {error}") from None


def check_colour_mode(args, data_set=None):
    """Raise UserError unless images of this data set, by default args.data_set, can be read as args.in_chans."""
    if args.in_chans not in COLOUR_MODES:
        accepted = list(COLOUR_MODES)
        raise UserError(f"--in_chans {args.in_chans}: must be one of {accepted} for {data_set or args.data_set}")


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


def open_image(path, in_chans):
    """A context manager of a file's image: Pillow's, not decoded yet, or, from .npy, a uint8 tensor (C, H, W).

    Raises whatever Pillow raises for a file that it does not know, ValueError for an array that does not fit.
    """
    if str(path).lower().endswith(".npy"):
        array = np.load(path)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != in_chans:
            raise ValueError(f"array of {array.dtype} {array.shape}: must be uint8 (height, width, {in_chans})")
        return contextlib.nullcontext(torch.from_numpy(array).permute(2, 0, 1))
    if in_chans not in COLOUR_MODES:
        raise ValueError(f"image files have 1, 3 or 4 channels, not {in_chans}: only .npy arrays have others")
    return Image.open(path)


def read_image(path, in_chans):
    """A file as a Pillow image of 1 (grey), 3 (RGB) or 4 (RGBA) channels, or, from .npy, as a uint8 tensor (C, H, W).

    16-bit greys keep their upper 8 bits; 32-bit and floating-point ones are stretched from their own range to 8 bits.
    Raises what `open_image` raises, and whatever Pillow raises for a file that it cannot decode.
    """
    with open_image(path, in_chans) as image:
        return decode(image, in_chans)


def decode(image, in_chans, shrink=1):
    """What `open_image` opened, as `read_image` returns it; shrink as in `read_pixels`."""
    if torch.is_tensor(image):
        return image
    if shrink > 1:
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    return to_colours(image, in_chans)


def read_pixels(image, in_chans, shrink=1):
    """What `open_image` opened, decoded as `read_image` does but faster, as a uint8 tensor (C, H, W); RGBA by Pillow.

    shrink: 1, or for a JPEG 2, 4 or 8: of each dimension that part, rounded up, is decoded.
    """
    plain = isinstance(image, JpegImageFile) and in_chans < 4 and image.mode in ("L", COLOUR_MODES[in_chans])
    pixels = decode_whole(image) if plain and shrink == 1 else None
    if pixels is not None:
        return pixels.expand(in_chans, -1, -1)
    image = decode(image, in_chans, shrink)
    # Resizing weighs colours by their opacity: Pillow does, tensors do not
    return image if torch.is_tensor(image) or image.mode == "RGBA" else v2.functional.pil_to_tensor(image)


def decode_whole(jpeg):
    """A JPEG that Pillow opened by torchvision, uint8 (C, H, W); None if that cannot decode it."""
    if decode_jpeg is None:
        return None
    jpeg.fp.seek(0)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(jpeg.fp.read()), dtype=torch.uint8))
    except RuntimeError:  # Pillow may, or else says what is wrong
        return None


def to_colours(image, in_chans):
    """A Pillow image of any mode with so many channels of 8 bits."""
    image.load()
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image, sixteen=";16" in image.mode or image.format in ("PNG", "PPM"))
    elif image.mode == "P":
        image = image.convert("RGBA")  # applies the transparent colour, if any
    return image.convert(COLOUR_MODES[in_chans])


def read_files(flag, paths, in_chans, transform):
    """Yield each image of files and of folders of them: its path, and transform(image).

    Raises UserError, beginning with flag, if there is none, and for one that cannot be read.
    """
    files = [file for path in paths for file in (find_images(path) if os.path.isdir(path) else [path])]
    if not files:
        raise UserError(f"{flag} {' '.join(paths)}: no image there")
    for file in files:
        try:
            image = read_image(file, in_chans)
        except Exception as error:  # Pillow's plugins raise nearly everything
            raise UserError(f"{flag} {file}: cannot be read: {error}") from None
        yield file, transform(image)


def to_8_bits(grey, sixteen):
    """A grey image of 16 bits, of either byte order or held in 32, or one of 32 bits, with 8."""
    array = np.asarray(grey)
    if sixteen:
        return Image.fromarray((array >> 8).astype(np.uint8))
    low, high = float(array.min()), float(array.max())
    return Image.fromarray(np.rint((array - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


class ImageFolder:
    """The images below a folder: `len`, `name(index)`, `open(index)`, `read(index)`."""

    def __init__(self, folder, in_chans):
        # Bytes in one array: each loader worker would slowly copy a list of a million Python strings.
        self.paths = np.array([os.fsencode(path) for path in find_images(folder)])
        self.in_chans = in_chans

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return os.fsdecode(bytes(self.paths[index]))

    def open(self, index):
        return open_image(self.name(index), self.in_chans)

    def read(self, index):
        return read_image(self.name(index), self.in_chans)


class ClassFolders(ImageFolder):
    """The images below a folder's class folders, with `targets`, numbers of `class_names` (default: the folders found).

    Raises UserError for a class folder that is not among class_names, and for images outside of any.
    """

    def __init__(self, folder, in_chans, class_names=None):
        super().__init__(folder, in_chans)
        own = [Path(self.name(index)).relative_to(folder).parts[0] for index in range(len(self))]
        loose = [name for name in set(own) if not (Path(folder) / name).is_dir()]
        if loose:
            raise UserError(f"{folder}: {loose[0]} lies beside the class folders; accepted is one folder a class")
        self.class_names = sorted(set(own)) if class_names is None else list(class_names)
        unknown = sorted(set(own) - set(self.class_names))
        if unknown:
            raise UserError(
                f"{folder}: class folder {unknown[0]} ({len(unknown)} such) is not among the "
                f"{len(self.class_names)} classes that the model has: {shorten(self.class_names)}"
            )
        number = {name: i for i, name in enumerate(self.class_names)}
        self.targets = np.array([number[name] for name in own], dtype=np.int64)


def shorten(names, most=4):
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class Digits:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which need no download. A fixed fifth is held out."""

    def __init__(self, train, in_chans):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.images))
        held_out = len(order) // 5
        self.numbers = np.sort(order[held_out:] if train else order[:held_out])
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[self.numbers]
        self.class_names = [str(name) for name in digits.target_names]
        self.in_chans = in_chans

    def __len__(self):
        return len(self.numbers)

    def name(self, index):
        return f"digit {self.numbers[index]}"

    def read(self, index):
        return Image.fromarray(self.images[self.numbers[index]]).convert(COLOUR_MODES[self.in_chans])

    open = read  # a Pillow image closes like a file


class Cifar:
    """CIFAR-10 or CIFAR-100 in a folder, downloaded into it if it is not there."""

    def __init__(self, kind, folder, train, in_chans):
        try:
            self.data = kind(folder, train=train, download=True)
        except Exception as error:  # of the network, the disk or the archive
            raise UserError(
                f"--data_path {folder}: {kind.__name__} is neither there nor can it be downloaded: {error}"
            ) from None
        self.folder, self.in_chans = folder, in_chans
        self.targets = np.array(self.data.targets)
        self.class_names = list(self.data.classes)

    def __len__(self):
        return len(self.data)

    def name(self, index):
        return f"{self.folder}, image {index}"

    def read(self, index):
        return self.data[index][0].convert(COLOUR_MODES[self.in_chans])

    open = read


class Subset:
    """The first `count` images of each class of other images."""

    def __init__(self, images, count):
        targets = np.asarray(images.targets)
        self.numbers = np.sort(np.concatenate([np.flatnonzero(targets == t)[:count] for t in np.unique(targets)]))
        self.images, self.targets, self.class_names = images, targets[self.numbers], images.class_names

    def __len__(self):
        return len(self.numbers)

    def name(self, index):
        return self.images.name(self.numbers[index])

    def open(self, index):
        return self.images.open(self.numbers[index])

    def read(self, index):
        return self.images.read(self.numbers[index])


def build_pretrain_images(args):
    """The unlabelled images that --data_set and --data_path name. Raises UserError if there are none."""
    if args.data_set == "DIGITS":
        return Digits(train=True, in_chans=args.in_chans)
    folder = Path(args.data_path)
    if (folder / "train").is_dir():
        folder = folder / "train"
    check_folder("--data_path", args.data_path, folder, "a folder of images, or --data_set DIGITS")
    return check_images("--data_path", ImageFolder(folder, args.in_chans), folder)


def check_folder(flag, given, folder, accepted):
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        where = "" if Path(given) == folder else f" {folder}"
        raise UserError(f"{flag} {given}: {what}{where}; accepted is {accepted}")


def check_images(flag, images, folder):
    """Images of a folder, or UserError if there are none or none of the first ones can be read."""
    if not len(images):
        raise UserError(f"{flag} {folder}: no image there; accepted are files that Pillow reads, and .npy")
    errors = []
    for index in range(min(len(images), 100)):
        image, error = try_read(images, index)
        if error is None:
            return images
        errors.append(error)
    raise UserError(f"{flag} {folder}: none of the first {len(errors)} images can be read: {errors[0]}")


def build_images(is_train, args, class_names=None):
    """The labelled images of --data_set, with `targets` and `class_names`. Raises UserError if there are none.

    class_names: the classes of the training images or of the checkpoint, for a folder that may lack some.
    """
    if args.data_set == "DIGITS":
        images = Digits(is_train, args.in_chans)
    elif args.data_set in ("CIFAR", "CIFAR10"):
        kind = CIFAR100 if args.data_set == "CIFAR" else CIFAR10
        images = main_process_first(lambda: Cifar(kind, args.data_path, is_train, args.in_chans))
    else:
        flag, folder = labelled_folder(is_train, args)
        check_folder(flag, getattr(args, flag[2:]), folder, "a folder with a folder of images for each class")
        images = check_images(flag, ClassFolders(folder, args.in_chans, class_names), folder)
    if is_train and args.images_per_class:
        images = Subset(images, args.images_per_class)
    return images


def labelled_folder(is_train, args):
    """Which flag names the class folders, and where they are: in train/ or val/ if there is one."""
    if not is_train and args.eval_data_path:
        return "--eval_data_path", Path(args.eval_data_path)
    folder = Path(args.data_path)
    part = folder / ("train" if is_train else "val")
    # IMNET demands the parts; image_folder may be the class folders themselves
    return "--data_path", part if part.is_dir() or args.data_set == "IMNET" or not is_train else folder


def try_read(images, index, read=None):
    """(image, None), or (None, its name and what is wrong) if it cannot be read. read: a function, or images.read."""
    try:
        return (read or images.read)(index), None
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


class LabelledBatch(NamedTuple):
    """What the loaders of fine-tuning and evaluation yield."""

    imgs: torch.Tensor  # (N, C, H, W) uint8
    targets: torch.Tensor  # (N,) class numbers
    indices: torch.Tensor  # (N,) which images of the data set these are
    unreadable: list  # as above; in evaluation they are left out of the batch
    erased: list  # the parts (image, rows, columns) of imgs that noise takes the place of
    noise: torch.Tensor  # theirs one after the other, flat; float32, for normalised images

    @staticmethod
    def collate(samples):
        imgs, targets, indices, unreadable, erasures = zip(*samples, strict=True)
        read = [image for image in imgs if image is not None]
        parts = [(number, *part) for number, some in enumerate(erasures) for part in some]
        return LabelledBatch(
            torch.stack(read) if read else torch.empty(0),
            torch.tensor([target for target in targets if target is not None]),
            torch.tensor([index for index in indices if index is not None]),
            [name for names in unreadable for name in names],
            [(number, *where) for number, where, _ in parts],
            torch.cat([torch.empty(0), *(noise.flatten() for _, _, noise in parts)]),
        )

    def augmented(self, imagenet=True):
        """The images, (N, C, H, W) float32: normalised (see `pixel_statistics`), and noise in the parts to erase."""
        imgs, first = normalize(self.imgs, imagenet), 0
        for number, rows, columns in self.erased:
            part = imgs[number, :, rows, columns]
            part.copy_(self.noise[first : first + part.numel()].view_as(part))
            first += part.numel()
        return imgs


class Crop(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def shrunk(self, by):
        """The same part of the image decoded at 1 / by of its size: edges move to the nearest pixel there."""
        top, left = round(self.top / by), round(self.left / by)
        bottom, right = round((self.top + self.height) / by), round((self.left + self.width) / by)
        return Crop(top, left, bottom - top, right - left)


class View(NamedTuple):
    """All that is random in a pre-training sample: which part of an image it shows, and what decides its mask."""

    crop: Crop
    mirrored: bool
    noise: torch.Tensor  # (L,) in [0, 1)


class PretrainDataset(torch.utils.data.Dataset):
    """Augmented images with the noise of their masks; `dataset[epoch, index]`, further ones `[epoch, index, repeat]`.

    A sample is (image (C, H, W) uint8, noise (L,), names of files that could not be read). Crops are resized with
    antialiased bicubic interpolation. For an image that cannot be read the next one that can stands in, and the sample
    says so.
    """

    collate = staticmethod(Batch.collate)

    def __init__(self, images, input_size, num_patches, seed, scale=(0.2, 1.0), hflip=0.5):
        self.images, self.input_size, self.num_patches, self.seed = images, input_size, num_patches, seed
        self.scale, self.hflip = scale, hflip

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The samples of those keys, as DataLoader asks for them: neighbours of one image are cut from one reading."""
        groups = itertools.groupby(keys, key=lambda key: key[:2])
        return [sample for (_, index), group in groups for sample in self.samples(index, list(group))]

    def samples(self, index, keys):
        """The samples of keys that have the same epoch and image."""
        (image, views), _, unreadable = read_or_next(self.images, index, lambda number: self.read(number, keys))
        samples = [(self.cut(image, view), view.noise, []) for view in views]
        samples[0][2].extend(unreadable)  # named once
        return samples

    def read(self, index, keys):
        """An image, as large as its views need it, and its view for each key."""
        with self.images.open(index) as image:
            height, width = v2.functional.get_size(image)
            views = [self.draw_view(key, height, width) for key in keys]
            crops = [view.crop for view in views]
            shrink = most_shrink(crops, self.input_size) if isinstance(image, JpegImageFile) else 1
            views = [view._replace(crop=view.crop.shrunk(shrink)) for view in views]
            return read_pixels(image, self.images.in_chans, shrink), views

    def draw_view(self, key, height, width):
        """The view that a key has of an image of that size."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *key))
        noise = torch.rand(self.num_patches, generator=generator)
        crop = draw_crop(height, width, self.scale, generator)
        return View(crop, mirrored=torch.rand((), generator=generator).item() < self.hflip, noise=noise)

    def cut(self, image, view):
        """(C, H, W) uint8 of a tensor or Pillow image."""
        image = v2.functional.resized_crop(image, *view.crop, self.input_size, InterpolationMode.BICUBIC)
        if isinstance(image, Image.Image):
            image = v2.functional.pil_to_tensor(image)
        return v2.functional.horizontal_flip(image) if view.mirrored else image


def draw_crop(height, width, scale, generator, ratio=(3 / 4, 4 / 3), tries=10):
    """A random `Crop` by the law of torchvision's RandomResizedCrop (Inception's).

    Its share of the area is uniform in `scale`, the logarithm of its width / height in `ratio`, its place among those
    within the image. If none of the tries fits, the largest centred crop of a ratio in those bounds.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, log_ratio, y, x in torch.rand(tries, 4, dtype=torch.float64, generator=generator).tolist():
        area = (scale[0] + share * (scale[1] - scale[0])) * height * width
        width_per_height = math.exp(low + log_ratio * (high - low))
        h, w = round(math.sqrt(area / width_per_height)), round(math.sqrt(area * width_per_height))
        if 0 < h <= height and 0 < w <= width:
            return Crop(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def most_shrink(crops, size):
    """The largest of 1, 2, 4, 8 by which a JPEG may be decoded smaller and each crop still not be enlarged to size.

    libjpeg then leaves out most of the inverse transform. Crops of 224: the samples of 2000 x 1500 pixels take 1 / 1.6
    of the time, those of 1024 x 768 1 / 1.1; of 500 x 375 hardly any can be shrunk.
    """
    room = min(min(crop.height / (size[0] + 1), crop.width / (size[1] + 1)) for crop in crops)  # + 1: edges move
    return max(shrink for shrink in (1, 2, 4, 8) if shrink <= max(room, 1))


def read_or_next(images, index, read=None):
    """The image of that number, or the next that can be read: image, its number, names of those that could not be."""
    unreadable = []
    for number in itertools.chain(range(index, len(images)), range(index)):
        image, error = try_read(images, number, read)
        if error is None:
            return image, number, unreadable
        unreadable.append(error)
    raise OSError(f"none of the {len(images)} images can be read any more; the first: {unreadable[0]}")


class DecodeAndCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized, of an image that is opened only: a JPEG is decoded no larger than the crop needs."""

    def __init__(self, in_chans, size, interpolation):
        super().__init__(size, interpolation=interpolation)
        self.in_chans = in_chans

    def __call__(self, image):
        crop = Crop(*self.get_params(image, self.scale, self.ratio))
        several = isinstance(self.interpolation, tuple | list)
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        shrink = most_shrink([crop], self.size) if isinstance(image, JpegImageFile) else 1
        image = decode(image, self.in_chans, shrink)
        return v2.functional.resized_crop(image, *crop.shrunk(shrink), self.size, interpolation)


class TrainDataset(torch.utils.data.Dataset):
    """Augmented images with their classes; `dataset[epoch, index]`.

    Stand-ins as in `PretrainDataset`, for an image that cannot be decoded and cropped.
    transform: a `Compose` from an opened image, see `open_image`, to uint8 (C, height, width), whose first decodes it.
    """

    collate = staticmethod(LabelledBatch.collate)

    def __init__(self, images, transform, erasing, seed):
        self.images, self.erasing, self.seed = images, erasing, seed
        self.crop, self.augment = transform.transforms[0], v2.Compose(transform.transforms[1:])

    def __getitem__(self, key):
        """(epoch, index) -> image (C, H, W) uint8, class, index, names of unreadable files, `Erasures`."""
        epoch, index = key
        with randomness_of(self.seed, epoch, index):
            image, number, unreadable = read_or_next(self.images, index, self.read)
            image = self.augment(image)
            erasures = self.erasing(Erasures(image.shape))
        return image, int(self.images.targets[number]), number, unreadable, erasures

    def read(self, number):
        with self.images.open(number) as image:
            return self.crop(image)


class Erasures(list):
    """What timm's RandomErasing would write into a normalised image of that shape: ((rows, columns), noise) each.

    Noise has no place among the 8 bits of a pixel, so it travels beside the image, which the device normalises.
    """

    dtype = torch.float32

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def size(self):
        return self.shape

    def __setitem__(self, part, noise):
        _, rows, columns = part
        noise = noise.expand(self.shape[0], rows.stop - rows.start, columns.stop - columns.start)  # of one colour
        self.append(((rows, columns), noise))


class EvalDataset(torch.utils.data.Dataset):
    """Images with their classes; `dataset[index]`. An image that cannot be read is left out, and the sample says so."""

    collate = staticmethod(LabelledBatch.collate)

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        """index -> image (C, H, W) uint8, class, index, [], []; or None three times, [the name of the file], []."""
        image, error = try_read(self.images, index)
        if error is not None:
            return None, None, None, [error], []
        return self.transform(image), int(self.images.targets[index]), index, [], []


def build_dataset(is_train, args, class_names=None):
    """The data set of --data_set for training or evaluation, and its number of classes. See `build_images`."""
    images = build_images(is_train, args, class_names)
    transform = build_transform(is_train, args)
    if is_train:
        dataset = TrainDataset(images, transform, build_erasing(args), args.seed)
    else:
        dataset = EvalDataset(images, transform)
    return dataset, len(images.class_names)


def build_labelled_sets(args, class_names=None):
    """Training set (None with --eval), evaluation set (None with --disable_eval) and the names of their classes.

    class_names: of the checkpoint that is evaluated. On all processes; raises UserError as `build_images` does.
    """
    train = evaluation = None
    if not args.eval:
        train, _ = on_all_processes(lambda: build_dataset(True, args))
        class_names = train.images.class_names
    if not args.disable_eval:
        evaluation, _ = on_all_processes(lambda: build_dataset(False, args, class_names))
        class_names = class_names or evaluation.images.class_names
    if args.nb_classes not in (None, len(class_names)):
        raise UserError(f"--nb_classes {args.nb_classes}: the data has {len(class_names)} classes")
    if evaluation is not None and len(evaluation.images.class_names) != len(class_names):
        raise UserError(f"the data has {len(evaluation.images.class_names)} classes, the model {len(class_names)}")
    return train, evaluation, class_names


def build_transform(is_train, args):
    """timm's transform of a Pillow image, or of a tensor (C, H, W), to uint8 (C, height, width).

    Training: of an image that `open_image` opened; random crop, flip, RandAugment or colour jitter. Evaluation: the
    shorter side resized to size / crop_pct and the centre cut out; without crop_pct, up to 32 and from 384 pixels on,
    resized to the very size. The size of evaluation is args.eval_size, if that is given.
    """
    size = args.input_size if is_train else getattr(args, "eval_size", None) or args.input_size
    smallest = min(size)
    options = dict(input_size=(args.in_chans, *size), normalize=False)
    if is_train:
        transform = create_transform(
            **options,
            is_training=True,
            mean=pixel_statistics(args.in_chans, args.imagenet_default_mean_and_std)[0].tolist(),  # fills, in --aa
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,  # of RandAugment
        )
        if smallest <= 32:  # as usual for CIFAR: whole images, shifted by up to 4 pixels
            read = functools.partial(decode, in_chans=args.in_chans)
            resize = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
            crop = v2.Compose([read, resize, v2.RandomCrop(size, padding=4)])
        else:
            crop = DecodeAndCrop(args.in_chans, size, args.train_interpolation)
        transform.transforms[0] = v2.Compose([crop, to_picture])
    elif args.crop_pct or 32 < smallest < 384:
        transform = create_transform(**options, interpolation="bicubic", crop_pct=args.crop_pct or 224 / 256)
    else:
        transform = create_transform(**options, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
    return transform


def to_picture(image):
    """A tensor of 1 or 3 channels as a Pillow image, which RandAugment takes; others as they are."""
    return v2.functional.to_pil_image(image) if torch.is_tensor(image) and len(image) in (1, 3) else image


def posterize(image, bits, **_):
    """timm's operation of that name, also for 0 bits, which leave black: so Pillow did before 13, which refuses."""
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits) if bits < 8 else image


for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[name] = posterize


def build_erasing(args):
    """timm's random erasing, for `Erasures`."""
    return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu")


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args):
    """mixup_fn(images, classes (N,)) -> mixed images, class probabilities (N, args.num_classes); None without."""
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def pixel_statistics(in_chans, imagenet=True):
    """Mean and standard deviation of each channel, in [0, 1]: ImageNet's, or their averages if not 3 channels.

    imagenet: False for 0.5 and 0.5, Inception's.
    """
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    if not imagenet:
        mean, std = torch.tensor(IMAGENET_INCEPTION_MEAN), torch.tensor(IMAGENET_INCEPTION_STD)
    return (mean, std) if in_chans == 3 else (mean.mean().expand(in_chans), std.mean().expand(in_chans))


@functools.cache  # a copy to a GPU for each batch would wait for it
def pixel_scales(in_chans, device, imagenet=True):
    """`pixel_statistics`, (C, 1, 1) each, on a device."""
    return [s.to(device)[:, None, None] for s in pixel_statistics(in_chans, imagenet)]


def normalize(imgs, imagenet=True):
    """uint8 (N, C, H, W) -> float32, each channel with the mean and deviation of `pixel_statistics` taken out."""
    mean, std = pixel_scales(imgs.shape[1], imgs.device, imagenet)
    return (imgs / 255 - mean) / std


def denormalize(imgs):
    """The inverse of `normalize`, clipped: float (N, C, H, W) -> uint8."""
    mean, std = pixel_scales(imgs.shape[1], imgs.device)
    return ((imgs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- order and loader


class EpochSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, of an order that is a function of (seed, epoch), from any step on.

    An optimizer step takes the next batch_size * update_freq * world_size samples of the order, however they are
    divided. An epoch has whole steps only: the rest of its order is left out, another one each epoch.

    repeats: how many samples are made of an image once it is read, in one batch: (epoch, index), (epoch, index, 1), ...
    ("repeated sampling" of MAE-ST and Hiera). An epoch still has as many samples as there are images: each takes 1 /
    repeats of them, and that many epochs take all. Raises UserError if repeats does not divide batch_size.
    """

    def __init__(self, num_samples, batch_size, update_freq, seed, rank=0, world_size=1, repeats=1):
        if repeats < 1 or batch_size % repeats:
            raise UserError(
                f"--repeated_sampling {repeats}: must be at least 1 and divide --batch_size {batch_size}, as all "
                f"samples of an image are in one batch of one process"
            )
        self.num_samples, self.batch_size, self.update_freq, self.seed = num_samples, batch_size, update_freq, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        self.steps_per_epoch = num_samples // (batch_size * update_freq * world_size)
        self.set_position(0, 0)

    def set_position(self, epoch, step):
        """What to yield next: the batches of this epoch from this optimizer step on."""
        self.epoch, self.step = epoch, step

    def __len__(self):
        return (self.steps_per_epoch - self.step) * self.update_freq

    def __iter__(self):
        epoch = self.epoch
        order = self.order(epoch)
        for batch in range(self.step * self.update_freq, self.steps_per_epoch * self.update_freq):
            images = self.part(order, batch)[:: self.repeats].tolist()
            yield [(epoch, index, repeat)[: 3 if repeat else 2] for index in images for repeat in range(self.repeats)]

    def order(self, epoch):
        """The index of each sample's image."""
        turn, part = divmod(epoch, self.repeats)
        everything = np.random.default_rng(derive_seed(self.seed, turn)).permutation(self.num_samples)
        count = self.num_samples // self.repeats
        return everything[part * count : (part + 1) * count].repeat(self.repeats)

    def part(self, order, batch):
        """What this process takes of an order for its batch of that number."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        return order[first : first + self.batch_size]


def build_train_loader(dataset, args, repeats=1):
    """The loader of a training set's batches and its sampler, `EpochSampler`.

    Raises UserError if there is no whole optimizer step, or if repeats does not divide --batch_size.
    """
    sampler = EpochSampler(
        len(dataset.images), args.batch_size, args.update_freq, args.seed, get_rank(), get_world_size(), repeats
    )
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"{len(dataset.images)} images make no whole step of {args.effective_batch_size} "
            f"(--batch_size {args.batch_size} x --update_freq {args.update_freq} x {get_world_size()} processes)"
        )
    return build_loader(dataset, args, batch_sampler=sampler), sampler


def build_eval_loader(dataset, args):
    """The loader of this process's part of an evaluation set, or with --dist_eval false of all of it: none twice."""
    rank, world_size = (get_rank(), get_world_size()) if args.dist_eval else (0, 1)
    return build_loader(dataset, args, batch_size=args.batch_size, sampler=range(rank, len(dataset), world_size))


def prepare_worker(worker):
    """Signals to the whole job are for the main process, which needs its workers until it has saved; so is the lock."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    release_locks()


def build_loader(dataset, args, **which):
    workers = min(args.num_workers, len(os.sched_getaffinity(0)))
    return torch.utils.data.DataLoader(
        dataset,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=args.pin_mem and args.device.startswith("cuda"),
        persistent_workers=workers > 0,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # else each epoch would draw from the global one
        **which,
    )


def on_device(loader, device):
    """The loader's batches with their tensors on a device, copied there beside what it computes."""

    def move(batch):
        return type(batch)(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch))

    if torch.device(device).type != "cuda":
        yield from map(move, loader)
        return
    stream = torch.cuda.Stream(device)
    for batch in loader:
        with torch.cuda.stream(stream):
            batch = move(batch)
        now = torch.cuda.current_stream(device)
        now.wait_stream(stream)
        for x in filter(torch.is_tensor, batch):
            x.record_stream(now)  # its memory is not given to the next copy before this stream has done with it
        yield batch


def describe(loader, args):
    """A line on what is trained on, and how fast."""
    sampler = loader.batch_sampler
    return (
        f"{sampler.num_samples} images, {sampler.steps_per_epoch} steps of {args.effective_batch_size} an epoch; "
        f"learning rate up to {args.lr:.2e}; {loader.num_workers} loader workers"
    )
