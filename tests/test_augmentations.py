"""timm draws what is done to an image; done to a whole batch it gives the pixels of timm's Pillow operations."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, create_transform

import augmentations
from augmentations import OPERATIONS, augment, on_tensors, sort_notes
from images import to_pillow, to_tensor

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((56, 48), Image.Resampling.BICUBIC)
MOVES = ("Shear", "Translate", "Rotate")  # interpolated in float32, where Pillow has float64
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BLACK = augmentations.posterize_image  # Pillow refuses to posterize to 0 bits


def build_operation(name, level, resample, fill):
    """timm's, always applied."""
    hparams = dict(img_mean=fill, interpolation=resample, translate_const=40)
    operation = auto_augment.AugmentOp(name, 1.0, level, hparams)
    operation.aug_fn = BLACK if "Posterize" in name else operation.aug_fn
    return operation


def take_notes(operation, image):
    (step,) = on_tensors([auto_augment.RandAugment([operation], 1)])
    return step(to_tensor(image))[1]


def augment_all(images, batch):
    imgs = torch.stack([to_tensor(image) for image in images]).contiguous(memory_format=torch.channels_last)
    before = imgs.clone()
    found = augment(imgs, *sort_notes(batch))
    assert torch.equal(imgs, before) and found.dtype == torch.uint8
    assert not found.numel() or found.is_contiguous(memory_format=torch.channels_last)
    return found


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "name", [name for name in auto_augment.NAME_TO_OP if "Blur" not in name and name != "Desaturate"]
)
def test_an_operation_is_timms(name, mode):
    """Bit for bit; where it moves pixels, to one level and in few pixels. In a batch as alone."""
    image, fill = PHOTO.convert(mode), (124, 116, 104) if mode == "RGB" else (115,)
    batch, expected = [], []
    for number, (level, resample) in enumerate(itertools.product(np.linspace(0, 10, 9), FILTERS)):
        random.seed(number)
        expected.append(to_tensor(build_operation(name, level, resample, fill)(image)))
        random.seed(number)
        batch.append(take_notes(build_operation(name, level, resample, fill), image))
    found = augment_all([image] * len(batch), batch)
    differences = (found.int() - torch.stack(expected).int()).abs()
    if name.startswith(MOVES):
        assert differences.max() <= 1 and differences.float().mean() < 0.02
    else:
        assert not differences.any()
    alone = torch.cat([augment_all([image], [notes]) for notes in batch])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("name", ["AutoContrast", "Contrast", "Equalize", "Sharpness"])
@pytest.mark.parametrize("levels", [(0, 40, 200), (255, 255, 255), None])
def test_an_image_of_few_levels_is_treated_as_by_pillow(name, levels):
    pixels = np.random.default_rng(0).integers(3, 5, (7, 9, 3), dtype=np.uint8)
    image = Image.new("RGB", (9, 7), levels) if levels else Image.fromarray(pixels)
    operation = build_operation(name, 8, FILTERS[0], (0, 0, 0))
    expected = to_tensor(operation(image))
    assert torch.equal(augment_all([image], [take_notes(operation, image)])[0], expected)


def test_contrast_is_stretched_as_by_pillow_between_any_two_levels():
    """Pillow rounds in float64, by which a few whole results are one lower: all 32,640 pairs and the levels between."""
    low, high = np.triu_indices(256, 1)
    pixels = np.linspace(low, high, 256).round().astype(np.uint8).T  # from low to high in each row
    found = OPERATIONS["AutoContrast"](torch.from_numpy(pixels[:, None, None]), None).numpy()[:, 0, 0]
    for row in range(0, len(pixels), 331):
        expected = auto_augment.auto_contrast(Image.fromarray(pixels[row : row + 1]))
        assert np.array_equal(found[row : row + 1], np.asarray(expected))


def test_a_move_beyond_the_image_leaves_the_fill():
    for axis, offset in ((3, 60.0), (3, -60.0), (2, 1e4), (2, -48.0)):
        notes = [(("shift", axis, (1, 2, 3), 2), (0.0, offset))]
        assert (augment_all([PHOTO], [notes]) == torch.tensor([1, 2, 3]).view(1, 3, 1, 1)).all()


@pytest.mark.parametrize("bits", [8, 9, 12])
def test_posterize_to_all_bits_or_more_changes_nothing(bits):
    """As timm draws by a policy like rand-m30-mmax30."""
    img = to_tensor(PHOTO)[None]
    amounts = torch.full((2, 1, 1, 1, 1), bits, dtype=torch.float64)
    assert torch.equal(augmentations.posterize(img, amounts), img)


def test_posterize_to_no_bits_is_black():
    assert not augment_all([PHOTO], [[(("Posterize",), (0,))]]).any()
    assert not np.asarray(augmentations.posterize_image(PHOTO, 0)).any()


def build_policies(policy, monkeypatch):
    """timm's transforms of Pillow images, mended where Pillow 13 refuses 0 bits, and the same on tensors."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, BLACK)
    options = dict(is_training=True, normalize=False, hflip=0.5, auto_augment=policy, mean=(0.5, 0.4, 0.3))
    timms, ours = (create_transform((3, 48, 56), **options).transforms[1:-1] for _ in range(2))
    return timms, on_tensors(ours)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-mstd101", "v0", "originalr", "3a", "augmix-m5"])
def test_a_policy_draws_what_timms_draws(policy, monkeypatch):
    """From the same state the same operations with the same magnitudes, and the same state afterwards."""
    timms, ours = build_policies(policy, monkeypatch)
    expected, imgs, batch = [], [], []
    for seed in range(40):
        states = []
        for steps, result in ((timms, PHOTO), (ours, to_tensor(PHOTO))):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            for step in steps:
                result = step(result)
            states.append((random.random(), np.random.rand(), torch.rand(1)))
            if steps is timms:
                expected.append(to_tensor(result).int())
        imgs.append(result[0]), batch.append(result[1])
        assert states[0] == states[1]
    found = augment_all(imgs, batch).int()
    different = (found - torch.stack(expected)).abs() > 8  # a level of difference may be pushed apart by a later step
    assert different.float().mean() < 0.004
    assert sum(not torch.equal(img, to_tensor(PHOTO).int()) for img in found) > 10
    assert any(batch) == (policy not in ("3a", "augmix-m5"))  # those have what only Pillow does


@pytest.mark.parametrize("threads", [1, 2])
def test_what_becomes_of_an_image_does_not_depend_on_its_batch(threads, monkeypatch):
    """Bit for bit, whatever stands beside it, in any order, by any number of threads."""
    timms, ours = build_policies("rand-m9-mstd0.5-n4", monkeypatch)
    photos = [PHOTO.rotate(90 * number).resize((51, 37)) for number in range(12)]  # of no length that vectors like
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    imgs, batch = zip(*(ours[1](ours[0](to_tensor(photo))) for photo in photos), strict=True)
    alone = torch.cat([augment_all([img], [notes]) for img, notes in zip(imgs, batch, strict=True)])
    try:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        assert torch.equal(augment_all(imgs, batch), alone)
        order = torch.randperm(12).tolist()
        shuffled = augment_all([imgs[i] for i in order], [batch[i] for i in order])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shuffled, alone[order])


def test_a_batch_without_notes_stays():
    assert torch.equal(augment_all([PHOTO, PHOTO], [[], []])[1], to_tensor(PHOTO))


def test_timms_own_operations_stay():
    before = dict(auto_augment.NAME_TO_OP)
    on_tensors([auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {})])
    assert auto_augment.NAME_TO_OP == before
    assert to_pillow(to_tensor(PHOTO)).tobytes() == PHOTO.tobytes()
