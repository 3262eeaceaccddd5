"""What `tools.benchmark --part loader` times: from JPEG files to a batch.

original           Pillow, and torchvision's or timm's transforms as there: float32, normalized, randomly erased
this loader        datasets.py: uint8, which the device augments (fine-tuning), normalizes and erases
and augmented      the same, and augmented by the same core as if it were the device
4 crops an image   the same with --repeated_sampling 4, for pre-training
"""

import functools
import itertools

import numpy as np
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

import augmentations
import datasets
import main_finetune
import main_pretrain
from loaders import build_train_loader
from models.files import IMAGENET_STATISTICS

COUNTS = {(500, 375): 100, (2000, 1500): 20}  # width and height of the files: how many of them


def draw_jpegs(folder, count, size):
    """`count` JPEGs of quality 90 and this (width, height): parts of scikit-learn's two photographs, resized."""
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
    crop = transforms.RandomResizedCrop(input_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(*IMAGENET_STATISTICS)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])


def finetune_transform(input_size):
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = augmentations.posterize_image  # with Pillow 13 timm's fails now and then
    policy = dict(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
    return create_transform(input_size, is_training=True, **policy, re_prob=0.25, re_mode="pixel")


def original_loader(folder, transform):
    images = torchvision_datasets.ImageFolder(folder, transform)
    return DataLoader(images, batch_size=len(images), shuffle=True)


def project_loader(training, folder, input_size, repeats=1):
    """The project's, with the default flags of a training: one batch of as many samples as there are images, uint8."""
    pretraining = training == "pre-training"
    script = main_pretrain if pretraining else main_finetune
    count = sum(path.is_file() for path in folder.rglob("*"))
    command = f"--data_set image_folder --input_size {input_size} --batch_size {count} --num_workers 0 --no-pin_mem"
    args = script.get_args_parser().parse_args([*command.split(), "--data_path", str(folder)])
    dataset = datasets.build_pretrain_dataset(args) if pretraining else datasets.build_dataset(True, args)
    loader, _ = build_train_loader(dataset, args, "cpu", repeats)
    return loader


def make_steps(training, folder, input_size):
    """{contestant: function that loads a batch of as many samples as there are files} of a kind of training."""
    pretraining = training == "pre-training"
    transform = pretrain_transform if pretraining else finetune_transform
    loaders = {"original": original_loader(folder, transform(input_size))}
    loaders["this loader"] = project_loader(training, folder, input_size)
    if pretraining:
        loaders["4 crops an image"] = project_loader(training, folder, input_size, repeats=4)
    epochs = itertools.count()

    def step(loader, augmented=False):
        if hasattr(loader.batch_sampler, "set_position"):
            loader.batch_sampler.set_position(next(epochs), 0)  # other crops each time
        (batch,) = loader
        if augmented:
            augmentations.augment(batch.imgs, batch.rounds, batch.numbers)

    steps = {name: functools.partial(step, loader) for name, loader in loaders.items()}
    if not pretraining:
        steps["and augmented"] = functools.partial(step, loaders["this loader"], augmented=True)
    return steps
