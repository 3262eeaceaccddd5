"""What `tools.benchmark --part loader` times: JPEG files to a batch, by the original's transforms and by datasets.py.

One process, one thread, no workers, files that the system still holds in memory: what a core delivers, not a disk.
"""

import itertools

import numpy as np
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

import datasets
import main_finetune

COUNTS = {(500, 375): 100, (2000, 1500): 20}  # width, height of the files: how many of them


def draw_jpegs(folder, count, size):
    """So many JPEGs of quality 90 and that (width, height): parts of scikit-learn's two photographs, resized.

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
        part = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        part.save(folder / f"{number:03}.jpg", quality=90)


def original(input_size):
    """Pillow's picture cropped, flipped, made a tensor and normalised, all on the CPU."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(input_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(datasets.IMAGENET_DEFAULT_MEAN, datasets.IMAGENET_DEFAULT_STD),
        ]
    )


def original_finetuning(input_size):
    """timm's, as by default: RandAugment and random erasing, all on the CPU."""
    return create_transform(
        input_size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )


def whole_batch(folder, transform):
    """A batch of all images of a folder, float32."""
    images = torchvision_datasets.ImageFolder(folder, transform)
    return DataLoader(images, batch_size=len(images), shuffle=True)


def own(folder, input_size, repeats=1):
    """The loader of pre-training: batches of uint8, which the device normalises."""
    images = datasets.ImageFolder(folder, 3)
    dataset = datasets.PretrainDataset(images, (input_size, input_size), (input_size // 32) ** 2, seed=0)
    sampler = datasets.EpochSampler(len(images), len(images), 1, seed=0, repeats=repeats)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)


def own_finetuning(folder, input_size):
    """The loader of fine-tuning with its default augmentation: batches of uint8 and noise."""
    flags = ["--data_set", "image_folder", "--data_path", str(folder)]
    args = main_finetune.get_args_parser().parse_args(flags)
    args.input_size = (input_size, input_size)
    dataset, _ = datasets.build_dataset(True, args)
    sampler = datasets.EpochSampler(len(dataset.images), len(dataset.images), 1, seed=0)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)


def pretraining_steps(folder, input_size):
    """Functions without arguments, by contestant, that load a batch of as many samples as there are files."""
    return {
        "original": step_of(whole_batch(folder, original(input_size))),
        "this loader": step_of(own(folder, input_size)),
        "4 crops an image": step_of(own(folder, input_size, repeats=4)),
    }


def finetuning_steps(folder, input_size):
    """The same for fine-tuning."""
    return {
        "original": step_of(whole_batch(folder, original_finetuning(input_size))),
        "this loader": step_of(own_finetuning(folder, input_size)),
    }


MAKE_STEPS = {"pre-training": pretraining_steps, "fine-tuning": finetuning_steps}


def step_of(loader):
    epochs = itertools.count()

    def step():
        if hasattr(loader.batch_sampler, "set_position"):
            loader.batch_sampler.set_position(next(epochs), 0)  # other crops each time
        (_,) = loader

    return step
