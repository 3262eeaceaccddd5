"""What `tools.benchmark --part loader` times: from JPEG files to a batch.

    original           Pillow, and torchvision's or timm's transforms as there: float32, normalized, randomly erased
    this loader        datasets.py: uint8, which the device normalizes and erases
    4 crops an image   the same with --repeated_sampling 4, for pre-training

One process, one thread, no workers, files that the system still holds in memory: the speed of a core, not of a disk.
"""

import itertools
from argparse import Namespace

import numpy as np
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

import datasets
import flags
import utils
from images import IMAGENET_STATISTICS, ImageFolder

COUNTS = {(500, 375): 100, (2000, 1500): 20}  # width and height of the files: how many of them
NO_WORKERS = Namespace(num_workers=0, pin_mem=False)


def draw_jpegs(folder, count, size):
    """`count` JPEGs of quality 90 and this (width, height): parts of scikit-learn's two photographs, resized.

    Those are 640 x 427, so that 500 x 375 takes 0.28 bytes a pixel, but 2000 x 1500, smoother than from a camera, 0.13.
    """
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    folder.mkdir(parents=True)
    for number in range(count):
        photo = photos[number % len(photos)]
        height = photo.height * rng.uniform(0.7, 1)
        width = height * size[0] / size[1]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        image = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        image.save(folder / f"{number:03}.jpg", quality=90)


def pretrain_transform(input_size):
    """The original's: a Pillow image cropped, flipped, made a tensor and normalized, all on the CPU."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(input_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_STATISTICS),
        ]
    )


def finetune_transform(input_size):
    """The original's by default, timm's: RandAugment and random erasing, all on the CPU."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = datasets.posterize  # with Pillow 13 timm's fails now and then
    return create_transform(
        input_size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )


def original_loader(folder, transform):
    """One batch of all images of a folder, float32."""
    images = torchvision_datasets.ImageFolder(folder, transform)
    return DataLoader(images, batch_size=len(images), shuffle=True)


def pretrain_loader(folder, input_size, repeats=1):
    """The project's loader of pre-training: one batch of as many samples as there are images, uint8."""
    images = ImageFolder(folder, 3)
    dataset = datasets.PretrainDataset(images, (input_size, input_size), (input_size // 32) ** 2, seed=0)
    sampler = datasets.EpochSampler(len(images), len(images), 1, seed=0, repeats=repeats)
    return datasets.build_loader(dataset, sampler, NO_WORKERS, "cpu")


def finetune_loader(folder, input_size):
    """The project's loader of fine-tuning with its default augmentation: one batch, uint8."""
    parser = flags.FlagParser()
    datasets.add_labelled_args(parser)
    args = parser.parse_args(["--data_set", "image_folder", "--data_path", str(folder)])
    args = Namespace(**vars(args) | {"input_size": (input_size, input_size), "in_chans": 3, "seed": 0})
    dataset, _ = datasets.build_dataset(True, args)
    sampler = datasets.EpochSampler(len(dataset.images), len(dataset.images), 1, seed=0)
    return datasets.build_loader(dataset, sampler, NO_WORKERS, "cpu")


def make_pretrain_steps(folder, input_size):
    """Functions without arguments, by contestant, that load a batch of as many samples as there are files."""
    return {
        "original": make_step(original_loader(folder, pretrain_transform(input_size))),
        "this loader": make_step(pretrain_loader(folder, input_size)),
        "4 crops an image": make_step(pretrain_loader(folder, input_size, repeats=4)),
    }


def make_finetune_steps(folder, input_size):
    """The same for fine-tuning."""
    return {
        "original": make_step(original_loader(folder, finetune_transform(input_size))),
        "this loader": make_step(finetune_loader(folder, input_size)),
    }


MAKE_STEPS = {"pre-training": make_pretrain_steps, "fine-tuning": make_finetune_steps}


def make_step(loader):
    epochs = itertools.count()

    def step():
        if hasattr(loader.batch_sampler, "set_position"):
            loader.batch_sampler.set_position(next(epochs), 0)  # other crops each time
        (_,) = loader

    return step
