"""The operations on arrays are timm's on Pillow images, at every magnitude, and timm draws them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, create_transform

import augmentations
from images import to_pillow, to_tensor

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((56, 48), Image.Resampling.BICUBIC)
MOVES = ("Shear", "Translate")  # interpolated in float32, where Pillow has float64


def draw(name, level):
    """The amounts of an operation at a magnitude of timm's, as timm draws them."""
    to_amounts = auto_augment.LEVEL_TO_ARG[name]
    return to_amounts(level, {"translate_const": 40}) if to_amounts else ()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", [name for name in auto_augment.NAME_TO_OP if "Blur" not in name])
def test_an_operation_is_timms(name, mode):
    """Bit for bit; where it moves pixels by fractions, to one level and in few pixels."""
    image, timms = PHOTO.convert(mode), auto_augment.NAME_TO_OP[name]
    array = augmentations.to_array(to_tensor(image))
    ours = augmentations.find_operation(name, timms)
    options = dict(fillcolor=(124, 116, 104) if mode == "RGB" else (115,))
    differences = []
    for seed, level in enumerate(np.linspace(0, 10, 9)):
        random.seed(seed)
        amounts = draw(name, level)
        if "Posterize" in name and amounts == (0,):
            continue  # Pillow refuses it, see below
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            before = array.copy()
            found = ours(array, *amounts, **options, resample=resample)
            expected = np.asarray(timms(image, *amounts, **options, resample=resample)).reshape(array.shape)
            differences.append(np.abs(found.astype(int) - expected))
            assert np.array_equal(array, before) and found.dtype == np.uint8
    if name.startswith(MOVES):
        assert np.max(differences) <= 1 and np.mean(differences) < 0.02
    else:
        assert not np.any(differences)


@pytest.mark.parametrize("name", ["AutoContrast", "Contrast", "Equalize", "Sharpness"])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_image_of_one_level_is_treated_as_by_pillow(name, level):
    image, timms = Image.new("RGB", (9, 7), (level, 40, 200)), auto_augment.NAME_TO_OP[name]
    amounts = () if name in ("AutoContrast", "Equalize") else (1.7,)
    found = augmentations.find_operation(name, timms)(np.array(image), *amounts)
    assert np.array_equal(found, timms(image, *amounts))


def test_a_move_beyond_the_image_leaves_the_fill():
    array = augmentations.to_array(to_tensor(PHOTO))
    for name, amount in (("TranslateX", 60), ("TranslateX", -60), ("TranslateY", 1e4), ("TranslateYRel", -1.0)):
        found = augmentations.OPERATIONS[name](array, amount, fillcolor=(1, 2, 3), resample=(2, 3))
        assert found.shape == array.shape and (found == (1, 2, 3)).all()


def test_posterize_to_no_bits_is_black():
    assert not augmentations.posterize(augmentations.to_array(to_tensor(PHOTO)), 0).any()
    assert not np.asarray(augmentations.posterize_image(PHOTO, 0)).any()


def build_policies(policy, monkeypatch):
    """timm's transform of Pillow images, mended where Pillow 13 refuses 0 bits, and the same on tensors."""
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, augmentations.posterize_image)
    options = dict(is_training=True, normalize=False, hflip=0.5, auto_augment=policy, mean=(0.5, 0.4, 0.3))
    timms, ours = (create_transform((3, 48, 56), **options).transforms[1:-1] for _ in range(2))
    return timms, [step for transform in ours for step in augmentations.on_tensors(transform)]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-mstd101", "v0", "originalr", "3a", "augmix-m5"])
def test_a_policy_draws_what_timms_draws(policy, monkeypatch):
    """From the same state the same operations with the same magnitudes, and the same state afterwards."""
    timms, ours = build_policies(policy, monkeypatch)
    different, changed, count = 0, 0, 40
    for seed in range(count):
        results = []
        for steps, result in ((timms, PHOTO), (ours, to_tensor(PHOTO))):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            for step in steps:
                result = step(result)
            results.append((to_tensor(result).int(), random.random(), np.random.rand(), torch.rand(1)))
        (expected, *after), (found, *also_after) = results
        different += ((found - expected).abs() > 8).float().mean().item()
        changed += not torch.equal(found, to_tensor(PHOTO).int())
        assert after == also_after
    assert different / count < 0.004 and changed > 10  # levels that differ by one may be pushed apart by a later step


def test_timms_own_operations_stay():
    before = dict(auto_augment.NAME_TO_OP)
    augmentations.on_tensors(auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {}))
    assert auto_augment.NAME_TO_OP == before
    assert to_pillow(to_tensor(PHOTO)).tobytes() == PHOTO.tobytes()
