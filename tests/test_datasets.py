"""What is read from which files, and that samples depend on nothing but (seed, epoch, index)."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from datasets import Batch, EpochSampler, ImageFolder, PretrainDataset, find_images, read_image

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RGB = np.stack([GREY, GREY * 2, 255 - GREY], axis=-1)


def saved(tmp_path, image, name):
    image.save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "ppm", "tga", "gif", "webp", "jp2"])
def test_every_format_reads_as_rgb(tmp_path, ending):
    image = Image.fromarray(RGB)
    options = {"lossless": True} if ending == "webp" else {}
    image.save(tmp_path / f"a.{ending}", **options)
    assert find_images(tmp_path) == [str(tmp_path / f"a.{ending}")]
    read = np.asarray(read_image(tmp_path / f"a.{ending}", 3)).astype(int)
    assert np.abs(read - RGB).max() <= (3 if ending == "gif" else 0)


def test_jpeg_in_grey_and_cmyk(tmp_path):
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    cmyk = saved(tmp_path, Image.fromarray(flat).convert("CMYK"), "cmyk.jpg")
    assert np.abs(np.asarray(read_image(cmyk, 3)).astype(int) - flat).max() <= 8
    grey = saved(tmp_path, Image.fromarray(flat[:, :, 0]), "grey.JPEG")
    assert np.abs(np.asarray(read_image(grey, 3)).astype(int) - 200).max() <= 2


def test_grey_alpha_and_palette(tmp_path):
    grey = saved(tmp_path, Image.fromarray(GREY), "grey.png")
    assert np.array_equal(np.asarray(read_image(grey, 3)), np.stack([GREY] * 3, axis=-1))
    assert np.array_equal(np.asarray(read_image(grey, 1)), GREY)
    rgba = saved(tmp_path, Image.fromarray(np.dstack([RGB, GREY])), "rgba.png")
    assert np.array_equal(np.asarray(read_image(rgba, 3)), RGB)
    assert np.array_equal(np.asarray(read_image(rgba, 4)), np.dstack([RGB, GREY]))
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80" + b"\xff" * 254)
    assert np.array_equal(np.asarray(read_image(tmp_path / "palette.png", 1)), GREY)


def test_16_bit_grey_keeps_its_upper_byte(tmp_path):
    sixteen = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 256 + 17), "sixteen.png")
    assert np.array_equal(np.asarray(read_image(sixteen, 1)), GREY)
    tiff = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 256 + 17), "sixteen.tif")
    assert np.array_equal(np.asarray(read_image(tiff, 3))[..., 2], GREY)
    big_endian = saved(tmp_path, Image.fromarray((GREY.astype(np.uint16) * 256 + 17).astype(">u2")), "big_endian.tif")
    assert np.array_equal(np.asarray(read_image(big_endian, 1)), GREY)
    (tmp_path / "sixteen.pgm").write_bytes(
        b"P5 8 8 65535\n" + (GREY.astype(np.uint16) * 256 + 17).astype(">u2").tobytes()
    )
    assert np.array_equal(np.asarray(read_image(tmp_path / "sixteen.pgm", 1)), GREY)


def test_floating_point_grey_is_stretched(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.float32) / 63 - 0.5), "float.tif")
    assert np.abs(np.asarray(read_image(path, 1)).astype(float) - GREY / 63 * 255).max() <= 0.5


def test_arrays_of_any_number_of_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (10, 12, 5), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read_image(tmp_path / "a.npy", 5).permute(1, 2, 0).numpy(), array)
    sample, noise, unreadable = PretrainDataset(ImageFolder(tmp_path, 5), (8, 16), 2, seed=0)[0, 0]
    assert sample.shape == (5, 8, 16) and sample.dtype == torch.uint8 and noise.shape == (2,) and not unreadable
    with pytest.raises(ValueError, match="must be uint8"):
        read_image(tmp_path / "a.npy", 3)


def test_folders_flat_and_nested_without_hidden_files(tmp_path):
    image = Image.fromarray(RGB)
    for name in ("b.png", "deep/er/a.PNG", ".hidden.png", ".cache/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name, format="png")
    assert find_images(tmp_path) == [str(tmp_path / "b.png"), str(tmp_path / "deep/er/a.PNG")]


def test_links_in_circles_are_walked_once(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_images(tmp_path) == [str(tmp_path / "a.png")]


def test_train_folder_is_used_if_there(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    Image.fromarray(RGB).save(tmp_path / "train" / "cat" / "a.png")
    Image.fromarray(RGB).save(tmp_path / "val" / "b.png")
    args = type("Args", (), {"data_set": "image_folder", "data_path": str(tmp_path), "in_chans": 3})
    images = datasets.build_pretrain_images(args)
    assert [images.name(i) for i in range(len(images))] == [str(tmp_path / "train" / "cat" / "a.png")]


def test_digits_hold_out_a_fixed_fifth_with_all_classes():
    from sklearn.datasets import load_digits

    train, val = datasets.Digits(True, 1), datasets.Digits(False, 1)
    assert len(val) == 1797 // 5 and sorted([*train.numbers, *val.numbers]) == list(range(1797))
    assert set(load_digits().target[val.numbers]) == set(range(10))
    assert train.images.max() == 255 and train.read(0).size == (8, 8)


# ---------------------------------------------------------------- randomness


def samples(dataset, keys):
    return [(image, noise) for image, noise, _ in (dataset[key] for key in keys)]


def equal(a, b):
    return torch.equal(a[0], b[0]), torch.equal(a[1], b[1])


def test_a_sample_is_a_function_of_seed_epoch_and_index(image_folder):
    images = ImageFolder(image_folder, 3)
    first, again, other = (PretrainDataset(images, (32, 32), 16, seed) for seed in (0, 0, 1))
    torch.manual_seed(5)
    a = samples(first, [(0, 3), (1, 3), (0, 4)])
    torch.manual_seed(6)
    b = samples(again, [(0, 4), (0, 3), (1, 3)])
    assert equal(a[0], b[1]) == equal(a[1], b[2]) == equal(a[2], b[0]) == (True, True)
    assert equal(a[0], a[1]) == (False, False)  # another epoch, another crop and mask
    assert equal(a[0], other[0, 3][:2]) == (False, False)


def test_drawing_a_sample_leaves_the_global_generators_alone(image_folder):
    dataset = PretrainDataset(ImageFolder(image_folder, 3), (32, 32), 16, seed=0)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    dataset[0, 0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_batches(image_folder, workers):
    dataset = PretrainDataset(ImageFolder(image_folder, 3), (16, 16), 4, seed=0)
    sampler = EpochSampler(22, batch_size=4, update_freq=1, seed=0)
    sampler.set_position(2, 3)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Batch.collate, num_workers=workers)
    (imgs, noise, unreadable), _ = loader
    indices = next(iter(sampler))
    assert torch.equal(imgs, torch.stack([dataset[key][0] for key in indices]))
    assert torch.equal(noise, torch.stack([dataset[key][1] for key in indices])) and unreadable == []


def flat(sampler):
    return [index for batch in sampler for _, index in batch]


def test_order_is_reshuffled_every_epoch_and_has_whole_steps_only():
    sampler = EpochSampler(23, batch_size=2, update_freq=3, seed=0)
    orders = []
    for epoch in range(2):
        sampler.set_position(epoch, 0)
        orders.append(flat(sampler))
    assert sampler.steps_per_epoch == 3 and len(sampler) == 9
    assert len(set(orders[0])) == 18 and orders[0] != orders[1]
    sampler.set_position(1, 2)
    assert flat(sampler) == orders[1][12:] and len(sampler) == 3


def test_a_step_takes_the_same_samples_however_divided():
    def steps(batch_size, update_freq, world_size):
        ranks = [EpochSampler(40, batch_size, update_freq, 7, rank, world_size) for rank in range(world_size)]
        orders = [flat(sampler) for sampler in ranks]
        per_rank = batch_size * update_freq
        return [
            sorted(i for order in orders for i in order[step * per_rank : (step + 1) * per_rank])
            for step in range(ranks[0].steps_per_epoch)
        ]

    assert steps(8, 1, 1) == steps(4, 1, 2) == steps(4, 2, 1) == steps(2, 2, 2)


def test_an_unreadable_image_is_named_and_the_next_stands_in(tmp_path):
    for name in "ac":
        Image.fromarray(RGB).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    dataset = PretrainDataset(ImageFolder(tmp_path, 3), (8, 8), 1, seed=0)
    _, _, unreadable = dataset[0, 1]
    assert len(unreadable) == 1 and unreadable[0].startswith(str(tmp_path / "b.png"))
    assert dataset[0, 2][2] == []


def test_normalize_matches_torchvision_and_inverts():
    from torchvision.transforms import v2

    imgs = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(imgs / 255)
    assert torch.allclose(datasets.normalize(imgs), expected, atol=1e-6)
    assert torch.equal(datasets.denormalize(datasets.normalize(imgs)), imgs)
    grey = imgs[:, :1]
    assert torch.equal(datasets.denormalize(datasets.normalize(grey)), grey)
