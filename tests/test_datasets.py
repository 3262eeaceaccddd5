"""Samples depend on nothing but (seed, epoch, index, repeat), whatever the loader; augmentation is timm's."""

import argparse
import itertools
import random
import re
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

import augmentations
import datasets
import engine_finetune
import engine_pretrain
import images
import loaders
import utils
from datasets import Batch, LabelledBatch, PretrainDataset, TrainDataset
from flags import FlagParser, add_model_args
from image_sets import Digits, ImageFolder
from images import normalize, to_tensor
from loaders import EpochSampler
from tasks import Classification
from utils import UserError

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((300, 200))


def flags(text="", add=datasets.add_labelled_args, **values):
    """The flags of the data, with those of the model and of training that they need."""
    parser = FlagParser()
    add_model_args(parser, ["convnextv2_atto"])
    parser.add_argument("--batch_size", default=4, type=int)
    loaders.add_loader_args(parser, ("full", "blocks", "balanced"))
    engine_finetune.add_batch_args(parser)
    add(parser)
    return argparse.Namespace(**vars(parser.parse_args(text.split())) | dict(update_freq=1, seed=0, loss="ce") | values)


def build_pretrain_loader(images, **values):
    """A loader of crops of 16 x 16 with 4 patches, and its sampler."""
    args = flags("--num_workers 0", datasets.add_unlabelled_args, **values)
    dataset = PretrainDataset(images, (16, 16), 4, args.seed)
    return *loaders.build_train_loader(dataset, args, "cpu", args.repeated_sampling), dataset


# ---------------------------------------------------------------- samples of pre-training


def equal(a, b):
    return torch.equal(a[0], b[0]), torch.equal(a[1], b[1])


def test_a_sample_is_a_function_of_seed_epoch_index_and_repeat(image_folder):
    images = ImageFolder(image_folder, 3)
    first, again, other = (PretrainDataset(images, (32, 32), 16, seed) for seed in (0, 0, 1))
    keys = [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1)]
    torch.manual_seed(5)
    a = [first[key] for key in keys]
    torch.manual_seed(6)
    b = [again[key] for key in reversed(keys)][::-1]
    assert all(equal(*pair) == (True, True) for pair in zip(a, b, strict=True))
    for different in (a[1], a[2], a[3], other[0, 3, 0]):
        assert equal(a[0], different) == (False, False)


def test_the_noise_of_a_mask_does_not_depend_on_the_image(image_folder):
    torch.manual_seed(utils.derive_seed(7, 2, 5, 0))
    expected = torch.rand(16)
    dataset = PretrainDataset(ImageFolder(image_folder, 3), (32, 32), 16, seed=7, scale=(0.5, 0.6), hflip=1)
    assert torch.equal(dataset[2, 5, 0][1], expected)


def test_drawing_samples_leaves_the_global_generators_alone(image_folder):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    args = flags("--data_set image_folder --input_size 48", data_path=str(image_folder))
    for dataset in (
        PretrainDataset(ImageFolder(image_folder, 3), (32, 32), 16, 0),
        datasets.build_dataset(True, args),
    ):
        utils.set_seed(0)
        expected = draw()
        utils.set_seed(0)
        dataset[0, 0, 0]
        assert draw() == expected


def test_a_sample_is_a_crop_of_torchvision_flipped_or_not(tmp_path):
    """In all its numbers: the draws of `v2.RandomResizedCrop` after the noise, resized, from the sample's own state."""
    PHOTO.save(tmp_path / "a.png")
    pixels = v2.functional.pil_to_tensor(PHOTO)
    transform = v2.RandomResizedCrop((96, 64), (0.3, 0.9), interpolation=v2.InterpolationMode.BICUBIC)
    for hflip, vflip in itertools.product((0, 1), repeat=2):
        options = dict(scale=(0.3, 0.9), hflip=hflip, vflip=vflip)
        dataset = PretrainDataset(ImageFolder(tmp_path, 3), (96, 64), 6, seed=3, **options)
        for epoch in range(4):
            torch.manual_seed(utils.derive_seed(3, epoch, 0, 0))
            noise, expected = torch.rand(6), transform(pixels)
            image, found, _ = dataset[epoch, 0, 0]
            image = image.flip(2) if hflip else image
            assert torch.equal(image.flip(1) if vflip else image, expected) and torch.equal(found, noise)


def test_half_of_the_samples_are_flipped_whatever_their_crops():
    def draw(hflip, vflip=0):
        dataset = PretrainDataset(Digits(True, 3), (32, 32), 1, seed=0, hflip=hflip, vflip=vflip)
        _, crops, flips = zip(*[dataset.draw(PHOTO, (0, index, 0)) for index in range(1000)], strict=True)
        return np.array([[2 in axes, 1 in axes] for axes in flips]), np.array(crops)

    for p in (0, 0.25, 0.5, 1):
        assert draw(p)[0].mean(0) == pytest.approx([p, 0], abs=0.05 * (0 < p < 1))
    flips, crops = draw(0.5, 0.5)
    assert flips.mean(0) == pytest.approx([0.5, 0.5], abs=0.05)
    assert np.array_equal(flips[:, 0], draw(0.5)[0][:, 0])  # a run that flips vertically too draws the others as before
    correlations = np.corrcoef(flips.T, crops.T)
    assert np.abs(correlations[0, 1:]).max() < 0.1 and np.abs(correlations[1, 2:]).max() < 0.1


def test_arrays_of_any_number_of_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (10, 12, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    image, noise, unreadable = PretrainDataset(ImageFolder(tmp_path, 5), (8, 16), 2, seed=0)[0, 0, 0]
    assert image.shape == (5, 8, 16) and image.dtype == torch.uint8 and noise.shape == (2,) and not unreadable


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_batches(image_folder, workers):
    loader, sampler, dataset = build_pretrain_loader(ImageFolder(image_folder, 3), num_workers=workers)
    sampler.set_position(2, 3)
    batches, keys = list(loader), list(sampler)
    assert len(batches) == len(keys) == 2
    for batch, batch_keys in zip(batches, keys, strict=True):
        images, noises, unreadable = zip(*[dataset[key] for key in batch_keys], strict=True)
        assert torch.equal(batch.imgs, torch.stack(images)) and torch.equal(batch.noise, torch.stack(noises))
        assert batch.unreadable == []


def test_workers_ignore_the_signals_of_a_scheduler():
    handlers = {signum: signal.getsignal(signum) for signum in utils.STOP_SIGNALS}
    noted, images.opening = images.opening, None
    loaders.init_worker([noted], 0)
    assert all(signal.getsignal(signum) == signal.SIG_IGN for signum in handlers)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert images.opening is noted


# ---------------------------------------------------------------- order


def keys_of(epoch, step=0, count=22, batch_size=4, update_freq=1, rank=0, world_size=1, repeats=1):
    sampler = EpochSampler(count, batch_size, update_freq, 3, rank, world_size, repeats)
    sampler.set_position(epoch, step)
    batches = list(sampler)
    assert len(batches) == len(sampler) and all(len(batch) == batch_size for batch in batches)
    for number, batch in enumerate(batches, start=step * update_freq):
        assert sampler.batch_indices(epoch, number) == [index for _, index, _ in batch[::repeats]]
    return batches


def test_without_repeats_the_order_is_one_permutation_an_epoch():
    order = loaders.permute(np.arange(22), 22, 3, 5)[:20]
    assert [key for batch in keys_of(5) for key in batch] == [(5, index, 0) for index in order]


@pytest.mark.parametrize("permute", [loaders.permute, loaders.permute_blocks])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 22, 64, 65, 1000, 20000])
def test_a_permutation_takes_every_number_once_and_is_known_at_any_place(permute, count):
    whole = permute(np.arange(count), count, 3, 5)
    assert sorted(whole) == list(range(count))
    places = np.random.default_rng(0).integers(0, count, 50)
    assert np.array_equal(permute(places, count, 3, 5), whole[places])
    assert count < 22 or not np.array_equal(permute(np.arange(count), count, 3, 6), whole)


def test_permutations_are_as_even_as_random_ones():
    """Chi-square, by degrees of freedom: which number comes where, and which after which; all 24 orders of four."""
    epochs, count = 3000, 12
    orders = np.array([loaders.permute(np.arange(count), count, 0, epoch) for epoch in range(epochs)])
    where = np.zeros((count, count))
    np.add.at(where, (np.arange(count), orders), 1)
    after = np.zeros((count, count))
    np.add.at(after, (orders[:, :-1], orders[:, 1:]), 1)
    after = after[~np.eye(count, dtype=bool)]
    for found, degrees in ((where, (count - 1) ** 2), (after, len(after) - 1)):
        chi_square = ((found - found.mean()) ** 2 / found.mean()).sum()
        assert abs(chi_square / degrees - 1) < 5 * (2 / degrees) ** 0.5
    four = [tuple(loaders.permute(np.arange(4), 4, 0, epoch)) for epoch in range(2400)]
    assert len(set(four)) == 24 and min(map(four.count, set(four))) > 50


def test_blocks_are_neighbors_and_are_prefetched_in_one_piece_before_they_are_needed():
    """A reader that counts seeks: two orders of 40,000 images of one archive, read as a disk would."""
    count, batch_size, size = 40_000, 50, loaders.BLOCK * loaders.WINDOW

    def seeks(shuffle):
        reads, cached = [], np.zeros(count, dtype=bool)

        def prefetch(start, stop):
            reads.append((start, stop))
            cached[start:stop] = True

        sampler = EpochSampler(count, batch_size, 1, 0, shuffle=shuffle, prefetch=prefetch)
        sampler.set_position(3, 7)
        indices = []
        for batch in sampler:
            for _, index, _ in batch:
                indices.append(index)
                if not cached[index]:
                    prefetch(index, index + 1)
        assert indices[:50] == sampler.batch_indices(3, 7) and len(set(indices)) == len(indices) == count - 350
        return sum(start != stop for (start, _), (_, stop) in zip(reads[1:], reads, strict=False)), indices

    (random_seeks, _), (block_seeks, indices) = seeks("full"), seeks("blocks")
    assert random_seeks > 0.99 * (count - 350) and block_seeks < 1.2 * count / loaders.BLOCK
    first = np.array(indices[: size - 350])
    assert len(np.unique(first // loaders.BLOCK)) <= 2 * loaders.WINDOW  # blocks start anywhere
    assert np.abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05


def test_order_is_reshuffled_every_epoch_and_has_whole_steps_only():
    first, second = ([index for batch in keys_of(epoch, 0, 23, 2, 3) for _, index, _ in batch] for epoch in (0, 1))
    assert len(first) == len(set(first)) == len(second) == 18 and first != second
    assert keys_of(1, 2, 23, 2, 3) == keys_of(1, 0, 23, 2, 3)[6:]


def test_repeats_share_a_batch_and_that_many_epochs_take_every_image():
    for repeats in (2, 4):
        seen = []
        for epoch in range(4, 4 + repeats):
            for batch in keys_of(epoch, count=24, repeats=repeats):
                indices = [index for _, index, _ in batch[::repeats]]
                assert batch == [(epoch, index, repeat) for index in indices for repeat in range(repeats)]
                seen += indices
        assert sorted(seen) == list(range(24))
    assert len(keys_of(0, repeats=4)) == len(keys_of(0)) == 5  # an epoch is as long


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_step_takes_the_same_samples_however_divided(repeats):
    def steps(epoch, step=0, **division):
        world_size, update_freq = division.get("world_size", 1), division.get("update_freq", 1)
        ranks = [keys_of(epoch, step, 50, rank=rank, repeats=repeats, **division) for rank in range(world_size)]
        batches = [[key for keys in batch for key in keys] for batch in zip(*ranks, strict=True)]
        return [sum(batches[i : i + update_freq], []) for i in range(0, len(batches), update_freq)]

    for epoch in (0, 1, 5):
        whole = steps(epoch, batch_size=8)
        assert whole == steps(epoch, world_size=2) == steps(epoch, update_freq=2)
        assert whole == steps(epoch, batch_size=2, update_freq=2, world_size=2)
        assert all(whole[step:] == steps(epoch, step, world_size=2) for step in range(6))


def test_too_few_images_for_a_step_are_refused(image_folder):
    images = ImageFolder(image_folder, 3)
    with pytest.raises(UserError, match=r"^22 images make no whole step of 24 .*--batch_size 12 x --update_freq 2 x 1"):
        build_pretrain_loader(images, batch_size=12, update_freq=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_repeats_are_different_samples_of_one_decoding(image_folder, monkeypatch, workers):
    images, opened = ImageFolder(image_folder, 3), []
    monkeypatch.setattr(images, "open", lambda index: opened.append(index) or ImageFolder.open(images, index))
    loader, sampler, dataset = build_pretrain_loader(images, num_workers=workers, batch_size=8, repeated_sampling=4)
    batches, keys = list(loader), list(sampler)
    assert len(batches) == len(keys) == 2 and (workers or opened == [batch[i][1] for batch in keys for i in (0, 4)])
    for batch, batch_keys in zip(batches, keys, strict=True):
        alone = [dataset[key] for key in batch_keys]
        assert torch.equal(batch.imgs, torch.stack([image for image, _, _ in alone]))
        assert torch.equal(batch.noise, torch.stack([noise for _, noise, _ in alone]))
        assert len(batch.imgs.unique(dim=0)) == len(batch.noise.unique(dim=0)) == 8


# ---------------------------------------------------------------- what cannot be read, and how much is


def test_an_unreadable_image_is_replaced_by_the_next_and_named_once(tmp_path):
    for name in "ac":
        PICTURE.save(tmp_path / f"{name}.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    dataset = PretrainDataset(ImageFolder(tmp_path, 3), (8, 8), 1, seed=0)
    batch = Batch.collate(dataset.__getitems__([(0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)]))
    assert len(batch.imgs) == 4 and len(batch.unreadable) == 1
    assert batch.unreadable[0].startswith(str(tmp_path / "b.png"))


def test_a_truncated_jpeg_is_reported_wherever_it_ends(tmp_path):
    PHOTO.save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    images = ImageFolder(tmp_path, 3)
    args = flags("--data_set image_folder --input_size 64 --aa none")
    readers = [PretrainDataset(images, (size, size), 1, seed=0) for size in (8, 400)]  # decoded small, and whole
    readers += [TrainDataset(images, datasets.build_transform(True, args), seed=0)]
    for end in (0, 2, 100, 700, len(whole) // 2, len(whole) - 200, len(whole) - 2, len(whole) - 1):
        (tmp_path / "a.jpg").write_bytes(whole[:end])
        for dataset in readers:
            with pytest.raises(UserError, match="none of the 1 images can be read any more; the first: .*a.jpg"):
                dataset[0, 0, 0]


class ManyDigits(Digits):
    """As long as ImageNet-1k."""

    def __len__(self):
        return 1_281_167


def test_a_sample_costs_the_same_however_many_images_there_are():
    images = ManyDigits(True, 3)
    dataset = PretrainDataset(images, (8, 8), 1, seed=0)
    dataset[0, 5, 0]
    tracemalloc.start()
    dataset[0, 5, 0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # bytes


# ---------------------------------------------------------------- data sets of the flags


def test_the_data_set_of_pre_training(labelled_folder):
    args = flags("--input_size 64 128 --hflip 1 --vflip 1 --scale 0.5 0.6", datasets.add_unlabelled_args)
    args.data_path, args.seed = str(labelled_folder), 8
    dataset = datasets.build_pretrain_dataset(args)
    image, noise, _ = dataset[0, 0, 0]
    assert len(dataset.images) == 22 and image.shape == (3, 64, 128) and noise.shape == (2 * 4,)
    other = PretrainDataset(ImageFolder(labelled_folder / "train", 3), (64, 128), 8, 8, (0.5, 0.6), 1, vflip=1)
    assert torch.equal(image, other[0, 0, 0][0])


@pytest.mark.parametrize(
    "text, train, evaluation",
    [
        ("--data_path {}", 22, 7),
        ("--data_path {} --images_per_class 2", 6, 7),
        ("--data_path {} --eval true", None, 7),
        ("--data_path {} --disable_eval", 22, None),
        ("--data_path {} --eval_data_path {}/train", 22, 22),
        ("--data_set image_folder --data_path {}/train --eval_data_path {}/val", 22, 7),
        ("--eval --eval_data_path {}/val", None, 7),
    ],
)
def test_labelled_sets(labelled_folder, text, train, evaluation):
    *sets, task = datasets.build_labelled_sets(flags(text.format(*[labelled_folder] * 2)))
    assert [None if dataset is None else len(dataset.images) for dataset in sets] == [train, evaluation]
    assert task.names == ["ant", "bee", "cat"]
    assert [dataset is None or dataset.images.class_names == task.names for dataset in sets] == [True, True]


def test_the_classes_must_be_those_of_the_model(labelled_folder):
    args = flags("--nb_classes 4", data_path=str(labelled_folder))
    with pytest.raises(UserError, match="^--nb_classes 4: the data has 3 classes"):
        datasets.build_labelled_sets(args)
    with pytest.raises(UserError, match="^DIGITS, to evaluate: the data has 10 classes, the model 3"):
        datasets.build_labelled_sets(flags("--data_set DIGITS --eval"), Classification("ce", ["ant", "bee", "cat"]))


@pytest.mark.parametrize("images_per_class, count", [(0, 22), (2, 6)])
def test_the_sets_of_a_probe(labelled_folder, images_per_class, count):
    args = argparse.Namespace(in_chans=3, input_size=(32, 64), max_bad_images=9)
    train, val = datasets.build_probe_sets(args, str(labelled_folder), images_per_class)
    assert len(train) == count and len(val) == 7 and train[0][0].shape == (3, 32, 64)
    train, val = datasets.build_probe_sets(args, "DIGITS", images_per_class)
    assert len(train) == (1438 if count == 22 else 20) and len(val) == 359
    with pytest.raises(UserError, match="^--probe_data_path /no/such: no such folder"):
        datasets.build_probe_sets(args, "/no/such", flag="--probe_data_path")


# ---------------------------------------------------------------- augmentation of labelled images

PLAIN = "--aa none --hflip 0"  # crops alone


class Pictures(list):
    """An image set of Pillow images."""

    targets, in_chans = [0], 3

    def open(self, index):
        return self[index].copy()


def train_samples(text, seeds=(0,), image=PICTURE):
    """The image as each seed augments it, (N, C, H, W) uint8."""
    transform = datasets.build_transform(True, flags(text))
    samples = [TrainDataset(Pictures([image]), transform, seed)[0, 0, 0] for seed in seeds]
    batch = LabelledBatch.collate(samples)
    return augmentations.augment(batch.imgs, batch.rounds, batch.numbers)


BOX = dict(top=20, left=30, height=120, width=150)


@pytest.fixture
def same_crop(monkeypatch):
    """One crop instead of random ones, which timm draws by the same law from another generator."""
    monkeypatch.setattr("torchvision.transforms.v2.RandomResizedCrop.make_params", lambda *_: BOX)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_images_are_timms(same_crop, mode, interpolation):
    """Given the crop: the flip, RandAugment of the same draws but for single pixels, normalization, erasing."""
    options = dict(is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation=interpolation)
    timms, expected = create_transform((3, 64, 96), **options), []
    crop = v2.functional.resized_crop(
        to_tensor(PICTURE), **BOX, size=(64, 96), interpolation=v2.InterpolationMode(interpolation)
    )
    timms.transforms[0] = lambda _: v2.functional.to_pil_image(crop)
    for seed in range(8):
        utils.set_seed(seed, 0, 0, 0)
        expected.append(timms(PICTURE))
    text = f"--input_size 64 96 --train_interpolation {interpolation} --reprob 0.5 --remode {mode} --recount 3"
    imgs = train_samples(text, range(8))
    differences = (normalize(imgs) - torch.stack(expected)).abs().amax(1)
    assert imgs.dtype == torch.uint8 and (differences > 1e-5).float().mean() < 0.01
    expected = list(normalize(imgs))
    utils.set_seed(1)
    erased = RandomErasing(0.5, mode=mode, max_count=3, device="cpu")(torch.stack(expected))
    utils.set_seed(1)
    assert torch.equal(engine_finetune.build_erasing(flags(text), "cpu")(normalize(imgs)), erased)
    assert 0 < (erased != torch.stack(expected)).flatten(1).any(1).sum() < 8


def test_nothing_is_erased_with_reprob_0():
    assert engine_finetune.build_erasing(flags("--reprob 0"), "cpu") is None


def test_large_training_images_are_cropped_by_the_law_of_torchvision():
    """In all its numbers: torchvision's transform, from the sample's own state."""
    transform = v2.RandomResizedCrop((64, 96), interpolation=v2.InterpolationMode.BICUBIC)
    found = train_samples(f"--input_size 64 96 {PLAIN}", range(3))
    for seed in range(3):
        torch.manual_seed(utils.derive_seed(seed, 0, 0, 0))
        assert torch.equal(found[seed], transform(to_tensor(PICTURE)))


def evaluate(text, image=PICTURE):
    """The picture as it is evaluated, (C, H, W) uint8."""
    return datasets.build_transform(False, flags(text))(image)


def resized(width, height):
    return to_tensor(PICTURE.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(32, 32), (384, 384), (416, 384)])
def test_small_and_large_images_are_evaluated_whole(size):
    assert torch.equal(evaluate("--input_size {} {}".format(*size)), resized(*size[::-1]))
    assert torch.equal(evaluate("--eval_size {} {}".format(*size)), resized(*size[::-1]))


@pytest.mark.parametrize(
    "text, shorter, size", [("", 256, 224), ("--crop_pct 0.7", 320, 224), ("--input_size 32 --crop_pct 0.5", 64, 32)]
)
def test_evaluation_cuts_out_the_center(text, shorter, size):
    width = shorter * 3 // 2
    left, top = (width - size) // 2, (shorter - size) // 2
    assert torch.equal(evaluate(text), resized(width, shorter)[:, top : top + size, left : left + size])


def test_evaluation_of_other_shapes():
    assert evaluate("--input_size 64 96").shape == (3, 64, 96)
    assert torch.equal(evaluate("", PICTURE.convert("L")), evaluate("", PICTURE.convert("L").convert("RGB")))


def test_small_training_images_are_whole_and_shifted_by_up_to_four_pixels():
    padded = torch.nn.functional.pad(resized(32, 32), [4] * 4)
    shifts = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    found = set()
    for sample in train_samples(f"--input_size 32 {PLAIN}", range(30)):
        matches = [number for number, shift in enumerate(shifts) if torch.equal(sample, shift)]
        assert len(matches) == 1
        found |= set(matches)
    assert len(found) > 15


@pytest.mark.parametrize(("flag", "axis"), [("--hflip", 3), ("--hflip 0 --vflip", 2)])
def test_flips_have_the_given_probability(flag, axis):
    never, half, always = (train_samples(f"--input_size 32 --aa none {flag} {p}", range(30)) for p in (0, 0.5, 1))
    assert torch.equal(always, never.flip(axis))
    flipped = [torch.equal(*pair) for pair in zip(half, always, strict=True)]
    assert flipped == [not torch.equal(*pair) for pair in zip(half, never, strict=True)] and 8 < sum(flipped) < 22


@pytest.mark.parametrize(
    "before, after",
    [
        ("--aa none", "--aa rand-m9-mstd0.5-inc1"),
        ("--aa rand-m9", "--aa rand-m1"),
        ("--aa none", "--aa none --color_jitter 0.4"),
        ("--aa none", "--aa none --train_interpolation bilinear"),
        ("--aa rand-m9-n9", "--aa rand-m9-n9 --imagenet_default_mean_and_std false"),
    ],
)
def test_flags_of_the_augmentation_change_images(before, after):
    common = "--input_size 48 --hflip 0"
    assert not torch.equal(*[train_samples(f"{common} {text}", range(5)) for text in (before, after)])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_augmentation_at_its_extremes_gives_an_image(in_chans):
    """rand-m9-mstd0.5-inc1 reaches magnitude 10 once in 44 draws, where Pillow 13 refuses what it did before."""
    image = PICTURE.convert({1: "L", 3: "RGB"}[in_chans])
    for policy in ("rand-m10-n8-inc1-p1", "rand-m0-n8-p1", "original", "v0", "3a", "augmix-m10"):
        transform = datasets.build_transform(True, flags(f"--input_size 32 --in_chans {in_chans} --aa {policy}"))
        samples = []
        for seed in range(40):
            utils.set_seed(seed)
            samples.append(transform(image))
        imgs, notes = zip(*samples, strict=True)
        imgs = augmentations.augment(datasets.stack(imgs), *augmentations.sort_notes(notes))
        assert imgs.shape == (40, in_chans, 32, 32) and imgs.dtype == torch.uint8
    black = augmentations.posterize_image(image, 0)
    assert black.mode == image.mode and black.size == image.size and not np.asarray(black).any()


def test_color_jitter_yields_to_aa():
    text = "--input_size 32 --hflip 0"
    assert torch.equal(train_samples(text), train_samples(f"{text} --color_jitter 0.4"))


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_arrays_are_augmented_as_pictures_are(tmp_path, size, in_chans):
    array = np.random.default_rng(0).integers(0, 256, (60, 50, in_chans), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", array)
    text = f"--data_set image_folder --input_size {size} --in_chans {in_chans} --vflip 1"
    text += " --aa none" * (in_chans == 5)
    args = flags(text, data_path=str(tmp_path), eval_data_path=str(tmp_path))
    for dataset, key in (
        (datasets.build_dataset(True, args), (0, 0, 0)),
        (datasets.build_dataset(False, args), 0),
    ):
        image = dataset[key][0]
        assert image.shape == (in_chans, size, size) and image.dtype == torch.uint8
        if in_chans == 5:
            assert abs(image.float().mean() - array.mean()) < 25


def test_a_labelled_sample_is_a_function_of_seed_epoch_index_and_repeat(labelled_folder):
    def build(seed):
        return datasets.build_dataset(True, flags("--input_size 48", seed=seed, data_path=str(labelled_folder)))

    first, again, other = build(0), build(0), build(1)
    keys = [(0, 3, 0), (1, 3, 0), (0, 4, 0), (0, 3, 1)]
    utils.set_seed(5)
    a = [first[key] for key in keys]
    utils.set_seed(6)
    b = [again[key] for key in reversed(keys)][::-1]
    assert all(torch.equal(one[0], two[0]) and one[1:] == two[1:] for one, two in zip(a, b, strict=True))
    for different in (a[1], a[2], a[3], other[0, 3, 0]):
        assert not torch.equal(a[0][0], different[0])
    assert [sample[1:4] for sample in a] == [(0, 3, []), (0, 3, []), (0, 4, []), (0, 3, [])]
    assert any(sample[4] for sample in a)  # what is done on the device


def test_batches_of_workers_are_those_of_the_main_process(labelled_folder):
    args = flags("--input_size 48", data_path=str(labelled_folder))
    dataset = datasets.build_dataset(True, args)
    batches = []
    for args.num_workers in (0, 2):
        loader, _ = loaders.build_train_loader(dataset, args, "cpu")
        batches.append(next(iter(loader)))
    (*a, _, rounds, numbers), (*b, _, other_rounds, other_numbers) = batches
    assert all(torch.equal(*pair) for pair in zip([*a, numbers], [*b, other_numbers], strict=True))
    assert rounds == other_rounds and rounds


def test_a_replaced_image_brings_its_own_class(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        PICTURE.save(tmp_path / name / "1.png")
    (tmp_path / "a" / "1.png").write_text("not an image")
    text = "--data_set image_folder --input_size 32 --num_workers 0"
    args = flags(text, data_path=str(tmp_path), eval_data_path=str(tmp_path))
    _, target, index, unreadable, _ = datasets.build_dataset(True, args)[0, 0, 0]
    assert (target, index) == (1, 1) and unreadable[0].startswith(str(tmp_path / "a" / "1.png"))
    dataset = datasets.build_dataset(False, args)
    (batch,) = loaders.build_eval_loader(dataset, args, "cpu")
    assert batch.indices.tolist() == [1] and batch.targets.tolist() == [1] and len(batch.imgs) == len(batch.unreadable)
    nothing = LabelledBatch.collate([dataset[0]])
    assert len(nothing.imgs) == len(nothing.targets) == len(nothing.indices) == 0 and len(nothing.unreadable) == 1


@pytest.mark.parametrize("size", [(60000, 1), (1, 60000)])
def test_an_image_too_long_to_resize_is_left_out_and_named(tmp_path, size):
    """With a shorter side of 256 it would have 4 billion pixels."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", size).save(tmp_path / "a" / "1.png")
    args = flags("--data_set image_folder --input_size 224", data_path=str(tmp_path), eval_data_path=str(tmp_path))
    (image, *_, names), (width, height) = datasets.build_dataset(False, args)[0], size
    limit = "resized to 256 it would have 3932160000 pixels, Pillow's limit is 89478485"
    expected = f"{tmp_path}/a/1.png (ValueError: {width} x {height} pixels: with the shorter side {limit})"
    assert image is None and names == [expected]
    args.input_size = (384, 384)  # resized to the very size
    assert datasets.build_dataset(False, args)[0][0].shape == (3, 384, 384)
    assert datasets.build_dataset(True, args)[0, 0, 0][0].shape == (3, 384, 384)


def test_an_image_of_too_many_pixels_is_left_out_and_named(tmp_path, monkeypatch):
    """Twice Pillow's limit: what a small file can claim to hold."""
    (tmp_path / "a").mkdir()
    for name in ("1", "2"):
        PICTURE.save(tmp_path / "a" / f"{name}.png")
    args = flags("--data_set image_folder --input_size 32", data_path=str(tmp_path), eval_data_path=str(tmp_path))
    train, evaluation = (datasets.build_dataset(is_train, args) for is_train in (True, False))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 200 // 2 - 1)
    problem = rf"{tmp_path}/a/1.png \(DecompressionBombError: Image size \(60000 pixels\)"
    with pytest.raises(UserError, match=problem):
        train[0, 0, 0]
    assert re.match(problem, evaluation[0][3][0])


def test_an_error_of_the_augmentation_is_not_taken_for_an_unreadable_image(labelled_folder):
    dataset = datasets.build_dataset(True, flags("--input_size 48 --aa none", data_path=str(labelled_folder)))
    dataset.augment = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        dataset[0, 0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_image_once(labelled_folder, monkeypatch, world_size):
    args = flags("--input_size 32 --num_workers 0", data_path=str(labelled_folder), batch_size=2)
    dataset = datasets.build_dataset(False, args)
    monkeypatch.setattr(utils, "get_world_size", lambda: world_size)

    def indices(rank, divided=True):
        monkeypatch.setattr(utils, "get_rank", lambda: rank)
        loader = loaders.build_eval_loader(dataset, args, "cpu", divided)
        assert len(loader) == len(list(loader))
        return [index for batch in loader for index in batch.indices.tolist()]

    assert len(dataset.images.class_names) == 3 and sorted(
        index for rank in range(world_size) for index in indices(rank)
    ) == list(range(7))
    assert all(indices(rank, divided=False) == list(range(7)) for rank in range(world_size))


# ---------------------------------------------------------------- on the device


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_on_the_device_are_those_of_the_loader(image_folder, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    loader, _, _ = build_pretrain_loader(ImageFolder(image_folder, 3))
    for found, expected in zip(engine_pretrain.on_device(loader, device), loader, strict=True):
        assert isinstance(found, Batch) and found.imgs.device.type == found.noise.device.type == device
        assert torch.equal(found.imgs.cpu(), expected.imgs) and torch.equal(found.noise.cpu(), expected.noise)


def test_mixup_mixes_images_and_classes():
    assert engine_finetune.build_mixup(flags(), 3) is None
    imgs, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    for text in ("--mixup 0.8", "--cutmix 1", "--cutmix_minmax 0.3 0.4"):
        mixed, probabilities = engine_finetune.build_mixup(flags(text), 3)(imgs.clone(), targets)
        assert not torch.equal(mixed, imgs) and probabilities.shape == (4, 3)
        assert torch.allclose(probabilities.sum(1), torch.ones(4))


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "text, message",
    [
        ("--scale 0.8 0.2", "--scale 0.8 0.2: must be above 0, at most 1, the smaller first"),
        ("--pixel_range 1 1", "--pixel_range 1 1: give the smaller first"),
        ("--mean 0.1 0.2 0.3", "--mean, --std: mean and std have 3 and 0 values: must be 3, one a channel"),
        ("--scale 0 1", "--scale 0.0 1.0: must be above 0"),
        ("--batch_size 4 --repeated_sampling 3", "--repeated_sampling 3: must divide --batch_size 4"),
        ("--data_set DIGITS --in_chans 5", r"--in_chans 5: must be one of \[1, 3, 4\] for DIGITS"),
        ("--data_path=", "--data_path: give a folder of images, or --data_set DIGITS"),
    ],
)
def test_flags_of_pre_training_that_do_not_fit(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        datasets.check_unlabelled_args(flags(f"--data_path images {text}", datasets.add_unlabelled_args))


@pytest.mark.parametrize(
    "text, message",
    [
        ("--eval_size 64 24", "--eval_size 64 24: must be one or two numbers from 32 on"),
        ("--mixup 1 --batch_size 5", "--batch_size 5: must be even for mixup and cutmix"),
        ("--cutmix_minmax 0.8 0.2", "--cutmix_minmax 0.8 0.2: .*the smaller first"),
        ("--data_set CIFAR --in_chans 5", r"--in_chans 5: must be one of \[1, 3, 4\] for CIFAR"),
        ("--data_path=", "--data_path: give a folder of class folders, or --data_set DIGITS"),
        ("--data_path= --eval", "--data_path: give a folder of class folders"),
        ("--pixel_range 4095 0", "--pixel_range 4095 0: give the smaller first"),
        ("--in_chans 5", "--aa rand.*: made for gray and RGB images; give --aa none"),
        ("--in_chans 4 --aa none --color_jitter 0.4", "--aa None, --color_jitter 0.4: made for gray and RGB"),
        ("--mean 0.1 --std 0.2", "--mean, --std: mean and std have 1 and 1 values: must be 3, one a channel"),
        ("--aa flip", "--aa flip: not a policy of timm"),
    ],
)
def test_flags_of_fine_tuning_that_do_not_fit(text, message):
    with pytest.raises(UserError, match=f"^{message}"):
        args = flags(f"--data_path images {text}")
        datasets.check_labelled_args(args)
        engine_finetune.check_batch_args(args)


@pytest.mark.parametrize(
    "text", ["", "--in_chans 5 --aa none", "--eval --aa flip", "--data_path= --eval --eval_data_path a"]
)
def test_flags_that_fit_are_left_as_they_are(text):
    args = flags(f"--data_path images {text}")
    before = dict(vars(args))
    datasets.check_labelled_args(args)
    assert vars(args) == before
