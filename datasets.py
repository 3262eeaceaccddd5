"""From flags to samples and batches: which images, how they are cropped and augmented.

Every random draw of a sample is a function of (seed, epoch, index, repeat), whatever the number of workers and ranks; a
run resumes at any step without a saved generator state.
"""

import functools
import itertools
import math
import os
import random
from typing import NamedTuple

import numpy as np
import torch

import augmentations
import flags
import sources
import tasks
import utils
from checkpoints import write_csv, write_whole
from flags import Switch, at_least, fraction
from image_sets import CIFARS, build_images, first_of_each_class, split_validation
from images import COLOR_MODES, RandomCrop, check_resized, decode, statistics_of, to_tensor, try_open
from tables import split_columns
from utils import UserError


def add_unlabelled_args(parser):
    """The flags of images for pre-training."""
    add = parser.add_argument_group("data").add_argument
    add("--data_set", default="image_folder", choices=("image_folder", "DIGITS"), help="DIGITS comes with scikit-learn")
    add("--data_path", metavar="FOLDER", help="images, nested or flat; its train/ if it has one")
    add("--scale", default=(0.2, 1.0), type=float, nargs=2, help="range of the crop's area, as a fraction of the image")
    crops = "crops per decoded image, each with its own mask; must divide --batch_size"
    add("--repeated_sampling", default=1, type=at_least(1), help=crops)
    add_image_args(add)


def add_image_args(add, statistics="ImageNet's"):
    """The flags of images for any training. statistics: in words, those without --mean and --std."""
    add("--hflip", default=0.5, type=fraction, help="probability of a horizontal flip")
    turned = "probability of a vertical flip, for images without up and down, as of microscopes"
    add("--vflip", default=0.0, type=fraction, help=turned)
    add_pixel_range_arg(add)
    of_each = f"of each channel in [0, 1], as python -m tools.statistics prints it; None: {statistics}"
    add("--mean", nargs="+", type=fraction, metavar="VALUE", help=f"mean {of_each}")
    add("--std", nargs="+", type=flags.fraction_above_0, metavar="VALUE", help=f"standard deviation {of_each}")
    sources.add_source_args(add)


def add_pixel_range_arg(add):
    meaning = "values that become black and white, for 16-bit and float images; None: the upper byte of 16 bits, the"
    number = flags.number(float, math.isfinite, "a number")
    add("--pixel_range", nargs=2, type=number, metavar=("LOW", "HIGH"), help=f"{meaning} own range of each float image")


def check_image_args(args, accepted, needs_path=True):
    """Raise UserError for flags of `add_image_args` that do not fit, or a data set without the path that it needs."""
    if args.pixel_range and args.pixel_range[0] >= args.pixel_range[1]:
        raise UserError(f"--pixel_range {args.pixel_range[0]:g} {args.pixel_range[1]:g}: give the smaller first")
    with utils.name_in_errors("--mean, --std"):
        statistics_of(args)
    if args.data_set in ("DIGITS", *CIFARS) and args.in_chans not in COLOR_MODES:
        raise UserError(f"--in_chans {args.in_chans}: must be one of {list(COLOR_MODES)} for {args.data_set}")
    for name in ("data_path", "eval_data_path"):
        if args.data_set == "DIGITS" and getattr(args, name, None):
            raise UserError(f"--{name} {getattr(args, name)}: --data_set DIGITS needs none; leave one of them out")
    if args.data_set != "DIGITS" and not args.data_path and needs_path:
        raise UserError(f"--data_path: give {accepted}, or --data_set DIGITS")


def check_unlabelled_args(args):
    """Raise UserError for flags of `add_unlabelled_args` that do not fit each other or other flags."""
    check_image_args(args, "a folder of images")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: must be above 0, at most 1, the smaller first")
    if args.batch_size % args.repeated_sampling:
        problem = f"must divide --batch_size {args.batch_size}, because all crops of an image are in one batch"
        raise UserError(f"--repeated_sampling {args.repeated_sampling}: {problem}")


def add_labelled_args(parser):
    """The flags of labelled images, of their augmentation and of evaluation."""
    add = parser.add_argument_group("data").add_argument
    data_sets = ("IMNET", "image_folder", "CIFAR", "CIFAR10", "DIGITS")
    meaning = "IMNET: train/ and val/ of class folders; image_folder: class folders; CIFAR: CIFAR-100"
    add("--data_set", default="IMNET", choices=data_sets, help=meaning)
    add("--data_path", metavar="FOLDER", help="images; CIFAR is downloaded into it if missing")
    add("--eval_data_path", metavar="FOLDER", help="class folders to evaluate; None: val/ of --data_path")
    held_out = "fraction of --data_path, of each class where an image has one, to hold out for evaluation, drawn by"
    held_out += " --seed; 0: evaluate val/"
    add("--val_fraction", default=0.0, type=flags.fraction_below_1, help=held_out)
    add("--nb_classes", type=at_least(1), help="expected number of classes; None: as many as the data has")
    add("--images_per_class", default=0, type=at_least(0), help="train on the first of each class only; 0: on all")
    statistics = "without --mean and --std, normalize by ImageNet's; false: by Inception's, 0.5 and 0.5"
    add("--imagenet_default_mean_and_std", action=Switch, default=True, help=statistics)
    center = "size of the center crop that is evaluated, as a fraction of the resized image; None: 0.875, and no crop"
    center += " for images of at most 32 or at least 384 pixels"
    add("--crop_pct", type=flags.fraction_above_0, help=center)
    add_image_args(add, "the checkpoint's with --finetune or --eval, else ImageNet's")

    add = parser.add_argument_group("augmentation").add_argument
    add("--color_jitter", type=fraction, help="strength, only with --aa none; None: no jitter")
    policy = "rand-m9-mstd0.5-inc1"
    add("--aa", default=policy, type=flags.str_or_none, help="timm's name of an AutoAugment policy, or none")
    modes = ("bicubic", "bilinear", "random")
    add("--train_interpolation", default="bicubic", choices=modes, help="of resized crops; random: one of the two")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action=Switch, default=False, help="only evaluate --resume, or the newest of --output_dir")
    add("--disable_eval", action=Switch, default=False, help="train without evaluation")
    add("--dist_eval", action=Switch, default=True, help="divide the images among ranks; false: each takes all")
    size = "side of the evaluated images, or height and width: the logits of windows of --input_size are averaged;"
    add("--eval_size", action=flags.ImageSize, help=f"{size} None: --input_size")
    add("--topk", default=(1, 5), type=at_least(1), nargs="+", help="k of accuracy, precision and recall")


def check_labelled_args(args):
    """Raise UserError for flags of `add_labelled_args` that do not fit each other or other flags."""
    check_image_args(args, "a folder of class folders", needs_path=not (args.eval and args.eval_data_path))
    if args.eval_size is not None:
        flags.check_image_size("eval_size", args.eval_size, least=8 * args.stem_stride)
    if args.val_fraction and args.eval_data_path:
        beside = "not with --eval_data_path, which has the images to evaluate"
        raise UserError(f"--val_fraction {args.val_fraction}: {beside}")
    if args.eval:
        return
    if args.in_chans not in (1, 3) and (args.aa or args.color_jitter):
        fix = f"give --aa none and no --color_jitter for --in_chans {args.in_chans}"
        raise UserError(f"--aa {args.aa}, --color_jitter {args.color_jitter}: made for gray and RGB images; {fix}")
    try:
        build_transform(True, args)
    except (ValueError, TypeError, KeyError, AssertionError) as error:  # timm's, of a policy it does not know
        raise UserError(f"--aa {args.aa}: not a policy of timm: {error}") from None


def on_all_ranks(build):
    """The image set of build(), on the main rank first. Raises UserError unless all ranks have the same."""
    images = utils.on_all_ranks(lambda: utils.main_rank_first(build))
    (count, digest), *others = utils.all_gather((len(images), images.digest))
    for rank, (other_count, other_digest) in enumerate(others, start=1):
        if digest != other_digest:
            found = f"{other_count} instead of {count}" if count != other_count else f"{count}, of other names"
            raise UserError(f"rank {rank} has other images or classes than rank 0: {found} images; give all the same")
    return images


def build_pretrain_dataset(args):
    """The `PretrainDataset` of the flags, on all ranks. Raises UserError as `build_images` does."""
    source = args.data_set, args.data_path, "train", args.in_chans, False
    images = on_all_ranks(lambda: build_images(*source, options=sources.options_of(args)))
    height, width = (side // (8 * args.stem_stride) for side in args.input_size)  # of the grid of patches
    options = args.scale, args.hflip, args.vflip, args.pixel_range, args.max_bad_images
    return PretrainDataset(images, args.input_size, height * width, args.seed, *options)


def build_dataset(is_train, args, task=None):
    """The data set for training or evaluation, on all ranks. Raises UserError as `build_images` does.

    Its targets are the numbers of labels, until `build_labelled_sets` knows what they mean.
    """
    images = on_all_ranks(lambda: build_labelled_images(is_train, args, task))
    transform = build_transform(is_train, args)
    if not is_train:
        return EvalDataset(images, transform, args.max_bad_images)
    return TrainDataset(images, transform, args.seed, args.max_bad_images)


def build_labelled_images(is_train, args, task=None):
    """The image set for training or evaluation. task: if it is known."""
    flag, path, split = "--data_path", args.data_path, "train" if is_train or args.val_fraction else "val"
    if not is_train and args.eval_data_path:
        flag, path, split = "--eval_data_path", args.eval_data_path, ""
    whole = args.val_fraction and args.data_set == "IMNET"  # which need not have a train/
    data_set, options = "image_folder" if whole else args.data_set, sources.options_of(args)
    class_names = task.names if task and task.one_class else None
    images = build_images(data_set, path, split, args.in_chans, True, class_names, flag, options)
    if args.val_fraction:
        one_class = (task or tasks.find_task(args.loss, find_labels(images, args))).one_class
        images = split_validation(images, args.val_fraction, args.seed, one_class)[0 if is_train else 1]
        if not len(images):
            raise UserError(f"--val_fraction {args.val_fraction}: holds out no image, as no class has two")
    return first_of_each_class(images, args.images_per_class) if is_train else images


def find_labels(images, args):
    """The `tasks.Labels` of an image set."""
    return tasks.Labels(images.class_names, images.targets, split_columns(args.label_column), images.name)


def write_validation_list(images, args):
    """validation.csv: path and labels of the images that --val_fraction holds out."""
    titles = split_columns(args.label_column)
    labels = (images.class_names[label].split(sources.SEPARATOR, len(titles) - 1) for label in images.targets)
    rows = ((os.path.abspath(images.name(i)), *cells) for i, cells in enumerate(labels))
    path = os.path.join(args.output_dir, "validation.csv")
    write_whole(path, lambda file: write_csv(file, [("path", *titles), *rows]))


def build_labelled_sets(args, task=None):
    """On all ranks: training set (None with --eval), evaluation set (None with --disable_eval), the `tasks.Task`.

    task: that of the model to evaluate; None: what the labels say. Raises UserError for labels that do not fit it.
    """
    train = evaluation = None
    if not args.eval:
        train = build_dataset(True, args)
        labels = find_labels(train.images, args)
        with utils.name_in_errors(f"--data_path {args.data_path or args.data_set}"):
            task = tasks.find_task(args.loss, labels).fit(args.loss, labels)
            train.targets = task.read_targets(labels)
    if not args.disable_eval:
        evaluation = build_dataset(False, args, task)
        task = task or tasks.Classification("ce", evaluation.images.class_names)
        with utils.name_in_errors(f"{args.eval_data_path or args.data_path or args.data_set}, to evaluate"):
            evaluation.targets = task.read_targets(find_labels(evaluation.images, args))
    if args.nb_classes not in (None, len(task.names)):
        raise UserError(f"--nb_classes {args.nb_classes}: the data has {utils.format_count(len(task.names), 'class')}")
    if args.val_fraction and evaluation is not None and args.output_dir and utils.is_main_process():
        write_validation_list(evaluation.images, args)
    return train, evaluation, task


def build_probe_sets(args, data_path, images_per_class=0, flag="--data_path"):
    """Two `EvalDataset`s, to fit a probe and to test it, on all ranks. Raises UserError as `build_images` does."""
    data_set, options = "DIGITS" if data_path == "DIGITS" else "IMNET", sources.options_of(args)

    def build(split, class_names=None):
        source = data_set, data_path, split, args.in_chans, True, class_names, flag, options
        return on_all_ranks(lambda: build_images(*source))

    train = build("train")
    val = build("val", train.class_names)
    transform = build_eval_transform(args.input_size, args.in_chans, pixel_range=options.pixel_range)
    sets = first_of_each_class(train, images_per_class), val
    return [EvalDataset(images, transform, args.max_bad_images) for images in sets]


class ImageDataset(torch.utils.data.Dataset):
    """dataset[key]: a sample of an image set. targets: (n,) classes, or (n, K) float32, or None."""

    def __init__(self, images, max_bad_images):
        self.images, self.max_bad_images = images, max_bad_images
        self.targets = getattr(images, "targets", None)

    def __getitem__(self, key):
        return self.load_all([key])[0]

    def __getitems__(self, keys):
        """The samples of a batch, for DataLoader; a UserError is returned: a worker would add its traceback to it."""
        try:
            return self.load_all(keys)
        except UserError as error:
            return error

    def load_all(self, keys):
        return [self.load(key) for key in keys]

    def read_or_next(self, index, read):
        """read(opened image) of this index, or of the next that can be read; its index; names of those that cannot.

        Raises UserError at once for more than max_bad_images in a row: a disk that is gone costs no search of all.
        """
        count, most, unreadable = len(self.images), self.max_bad_images, []
        for number in itertools.islice(itertools.chain(range(index, count), range(index)), most + 1):
            result, error = try_open(self.images, number, read)
            if error is None:
                return result, number, unreadable
            unreadable.append(error)
        problem = f"none of the {count} images can be read any more"
        if len(unreadable) > most:
            problem = f"{len(unreadable)} images in a row could not be read, --max_bad_images is {most}"
        raise UserError(f"{problem}; the first: {unreadable[0]}")


class PretrainDataset(ImageDataset):
    """dataset[epoch, index, repeat]: a random crop (C, H, W) uint8, mask noise (L,), names of unreadable files."""

    def __init__(
        self, images, input_size, num_patches, seed, scale=(0.2, 1.0), hflip=0.5, vflip=0.0, pixel_range=None,
        max_bad_images=100,
    ):  # fmt: skip
        super().__init__(images, max_bad_images)
        self.num_patches, self.seed = num_patches, seed
        self.flips = {2: hflip, 1: vflip}  # probabilities by axis of (C, H, W); vertical last: older runs lack it
        self.random_crop = RandomCrop(input_size, scale, "bicubic", images.in_chans, pixel_range)

    def load_all(self, keys):
        """Neighbors of one image are cut from one decoding."""
        samples = []
        with torch.random.fork_rng(devices=()):  # `draw` seeds torch's generator alone
            for (_, index), group in itertools.groupby(keys, key=lambda key: key[:2]):
                crops, _, unreadable = self.read_or_next(index, functools.partial(self.read, keys=list(group)))
                samples += [(*crop, [] if number else unreadable) for number, crop in enumerate(crops)]  # named once
        return samples

    def read(self, image, keys):
        """(image (C, H, W) uint8, noise (L,)) of an opened image, for each key."""
        noises, crops, flips = zip(*[self.draw(image, key) for key in keys], strict=True)
        cuts = self.random_crop.cut(image, crops)
        return [(cut.flip(axes) if axes else cut, noise) for cut, axes, noise in zip(cuts, flips, noises, strict=True)]

    def draw(self, image, key):
        """All that is random in a sample: the noise of its mask (L,) in [0, 1), its `Crop`, the axes to flip."""
        torch.default_generator.manual_seed(utils.derive_seed(self.seed, *key))
        noise = torch.rand(self.num_patches)  # first: the mask does not depend on the image
        crop = self.random_crop.draw(image)
        return noise, crop, [axis for axis, p in self.flips.items() if torch.rand(()).item() < p]


class TrainDataset(ImageDataset):
    """dataset[epoch, index, repeat]: crop (C, H, W) uint8, target, index, unreadable files, `augmentations.Notes`."""

    def __init__(self, images, transform, seed, max_bad_images=100):
        super().__init__(images, max_bad_images)
        self.seed = seed
        self.read, self.augment = transform.transforms

    def load_all(self, keys):
        """Torch's, NumPy's and Python's generators on the CPU are left as they were."""
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng(devices=()):
            try:
                return super().load_all(keys)
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)

    def load(self, key):
        seed = utils.derive_seed(self.seed, *key)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        image, index, unreadable = self.read_or_next(key[1], self.read)
        image, notes = self.augment(image)
        return image, self.targets[index], index, unreadable, notes


class EvalDataset(ImageDataset):
    """dataset[index]: image (C, H, W) uint8, target or 0, index, []; or None, None, None, [name of unreadable file]."""

    def __init__(self, images, transform, max_bad_images=math.inf):
        super().__init__(images, max_bad_images)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def load(self, index):
        image, error = try_open(self.images, index, self.transform)
        if error is not None:
            return None, None, None, [error]
        return image, 0 if self.targets is None else self.targets[index], index, []


def build_transform(is_train, args):
    """An opened or decoded image -> uint8 (C, height, width); for training it is `Compose([read, augment])`.

    For training timm's: random crop (up to 32 pixels, a shift by up to 4), flip, RandAugment or color jitter; the image
    comes with the `augmentations.Notes` of what is left to the device.
    """
    from timm.data import create_transform
    from torchvision.transforms import InterpolationMode, v2

    if not is_train:
        size = getattr(args, "eval_size", None) or args.input_size
        return build_eval_transform(size, args.in_chans, args.crop_pct, args.pixel_range)
    size, in_chans = args.input_size, args.in_chans
    timms = create_transform(
        (in_chans, *size),
        is_training=True,
        normalize=False,
        mean=statistics_of(args)[0],  # fills what rotation and shear leave empty
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,  # of RandAugment
    )
    read = RandomCrop(size, (0.08, 1.0), args.train_interpolation, in_chans, args.pixel_range)
    if min(size) <= 32:
        whole = functools.partial(decode, in_chans=in_chans, pixel_range=args.pixel_range)
        read = v2.Compose([whole, v2.Resize(size, InterpolationMode.BICUBIC), v2.RandomCrop(size, padding=4)])
    between = timms.transforms[1:-1]  # without timm's own random crop and its conversion to a tensor
    return v2.Compose([read, v2.Compose([to_tensor, *augmentations.on_tensors(between)])])


def build_eval_transform(size, in_chans, crop_pct=None, pixel_range=None):
    """timm's: the shorter side resized to size / crop_pct, and the center cut out. Without crop_pct it is 0.875, but
    up to 32 and from 384 pixels on the image is resized to the very size."""
    from timm.data import create_transform
    from torchvision.transforms import v2

    whole = not crop_pct and not 32 < min(size) < 384
    crop = dict(crop_pct=1.0, crop_mode="squash") if whole else dict(crop_pct=crop_pct or 0.875)
    timms = create_transform((in_chans, *size), normalize=False, interpolation="bicubic", **crop)
    steps = [functools.partial(decode, in_chans=in_chans, pixel_range=pixel_range), timms]
    if not whole:
        steps.insert(1, functools.partial(check_resized, shorter=int(max(size) / crop["crop_pct"])))
    return v2.Compose(steps)


def stack(imgs):
    """Images (C, H, W) as a batch (N, C, H, W), channels last in memory, as they come and as the networks compute.

    A worker stacks them in memory that it shares, which saves a copy.
    """
    return torch.utils.data.default_collate([img.permute(1, 2, 0) for img in imgs]).permute(0, 3, 1, 2)


class Batch(NamedTuple):  # of pre-training
    imgs: torch.Tensor  # (N, C, H, W) uint8
    noise: torch.Tensor  # (N, L) in [0, 1): decides the masks
    unreadable: list  # names of the files that could not be read and were replaced

    @staticmethod
    def collate(samples):
        imgs, noise, unreadable = zip(*samples, strict=True)
        return Batch(stack(imgs), torch.stack(noise), sum(unreadable, []))


class LabelledBatch(NamedTuple):  # of fine-tuning and evaluation
    imgs: torch.Tensor  # (N, C, H, W) uint8
    targets: torch.Tensor  # (N,) class numbers, or (N, K) float32, see `tasks`
    indices: torch.Tensor  # (N,) numbers of the images in the data set
    unreadable: list  # as above; in evaluation they are left out of the batch
    rounds: list = ()  # of training: how `augmentations.augment` changes the images
    numbers: torch.Tensor = ()

    @staticmethod
    def collate(samples):
        unreadable = sum((sample[3] for sample in samples), [])
        read = [sample for sample in samples if sample[0] is not None]
        imgs, targets, indices, _, *notes = zip(*read, strict=True) if read else ((), (), (), ())
        imgs = stack(imgs) if read else torch.empty(0)
        targets = torch.from_numpy(np.array(targets))
        targets = targets if targets.ndim == 2 else targets.long()
        plan = augmentations.sort_notes(*notes) if notes else ()
        return LabelledBatch(imgs, targets, torch.tensor(indices), unreadable, *plan)
