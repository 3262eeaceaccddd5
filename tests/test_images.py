"""Which files are found, what is read from them, how they are cropped and normalized."""

import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import simplejpeg
import tifffile
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_image
from torchvision.transforms import v2

import image_sets
import images
import sources
from image_sets import ClassFolders, Digits, ImageFolder, build_images, find_images
from images import Crop, RandomCrop
from models.files import INCEPTION_STATISTICS, find_statistics
from utils import UserError

GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RGB = np.stack([GRAY, GRAY * 2, 255 - GRAY], axis=-1)


def save(tmp_path, image, name):
    image.save(tmp_path / name)
    return tmp_path / name


def read_image(path, in_chans, **options):
    with images.open_image(path, in_chans) as image:
        return images.decode(image, in_chans, **options)


def read_set(image_set, index):
    with image_set.open(index) as image:
        return images.decode(image, image_set.in_chans)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "tga", "gif", "webp", "jp2"])
def test_every_format_reads_as_rgb(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(RGB).save(tmp_path / f"a.{extension}", **options)
    assert find_images(tmp_path) == [str(tmp_path / f"a.{extension}")]
    pixels = np.asarray(read_image(tmp_path / f"a.{extension}", 3)).astype(int)
    assert np.abs(pixels - RGB).max() <= (3 if extension == "gif" else 0)


def test_jpeg_in_gray_and_cmyk(tmp_path):
    flat = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    cmyk = save(tmp_path, Image.fromarray(flat).convert("CMYK"), "cmyk.jpg")
    assert np.abs(np.asarray(read_image(cmyk, 3)).astype(int) - flat).max() <= 8
    gray = save(tmp_path, Image.fromarray(flat[:, :, 0]), "gray.JPEG")
    assert np.abs(np.asarray(read_image(gray, 3)).astype(int) - 200).max() <= 2


def test_gray_alpha_and_palette(tmp_path):
    gray = save(tmp_path, Image.fromarray(GRAY), "gray.png")
    assert np.array_equal(read_image(gray, 3), np.stack([GRAY] * 3, axis=-1))
    assert np.array_equal(read_image(gray, 1), GRAY)
    rgba = save(tmp_path, Image.fromarray(np.dstack([RGB, GRAY])), "rgba.png")
    assert np.array_equal(read_image(rgba, 3), RGB)
    assert np.array_equal(read_image(rgba, 4), np.dstack([RGB, GRAY]))
    palette = Image.fromarray(GRAY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80" + b"\xff" * 254)
    assert np.array_equal(read_image(tmp_path / "palette.png", 1), GRAY)


def test_16_bit_gray_keeps_its_upper_byte(tmp_path):
    sixteen = GRAY.astype(np.uint16) * 256 + 17
    for name, array in (("a.png", sixteen), ("a.tif", sixteen), ("big_endian.tif", sixteen.astype(">u2"))):
        path = save(tmp_path, Image.fromarray(array), name)
        assert np.array_equal(read_image(path, 1), GRAY)
        assert np.array_equal(np.asarray(read_image(path, 3))[..., 2], GRAY)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + sixteen.astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "a.pgm", 1), GRAY)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_12_bits_in_a_16_bit_file_are_refused_with_the_range_that_shows_them(tmp_path, extension):
    """The upper byte of 16 bits would show 16 levels of them."""
    twelve = GRAY.astype(np.uint16) * 65
    path = save(tmp_path, Image.fromarray(twelve), f"a.{extension}")
    with pytest.raises(ValueError, match="16-bit image without a value above 4095, of 65535: .* --pixel_range 0 4095"):
        read_image(path, 1)
    with pytest.raises(UserError, match="none of the first 1 images can be read: .*--pixel_range 0 4095"):
        build_images("image_folder", tmp_path, "train", 1, labelled=False)
    assert np.array_equal(read_image(path, 1, pixel_range=(0, 4095)), np.rint(twelve * (255 / 4095)))
    options = sources.DEFAULTS._replace(pixel_range=(0, 4095))
    assert len(build_images("image_folder", tmp_path, "train", 1, labelled=False, options=options))
    assert not np.any(read_image(save(tmp_path, Image.fromarray(twelve * 0), f"black.{extension}"), 1))


def write_16_bit_png(path, array):
    """Colors (H, W, 3) uint16, which Pillow reads but does not write."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def test_16_bit_colors_keep_their_upper_byte_and_12_bits_are_refused(tmp_path):
    path = tmp_path / "a.png"
    write_16_bit_png(path, RGB.astype(np.uint16) * 257)
    assert np.array_equal(read_image(path, 3), RGB)
    with pytest.raises(ValueError, match="--pixel_range is for gray images"):
        read_image(path, 3, pixel_range=(0, 4095))
    write_16_bit_png(path, RGB.astype(np.uint16) * 16)
    with pytest.raises(ValueError, match="16-bit colors whose upper byte does not exceed 15: convert them to 8 bits"):
        read_image(path, 3)
    with pytest.raises(ValueError, match="16-bit colors"), Image.open(path) as image:
        random_crop((8, 8))(image)
    assert np.array_equal(read_image(path, 3, pixel_range=(0, 65535)), RGB // 16)


def test_not_a_number_is_refused_or_with_a_range_its_lowest(tmp_path):
    array = GRAY.astype(np.float32)
    array[2, 3], array[4, 4] = np.nan, np.inf
    path = save(tmp_path, Image.fromarray(array), "float.tif")
    with pytest.raises(ValueError, match="holds NaN or infinite values; with --pixel_range LOW HIGH, NaN is LOW"):
        read_image(path, 1)
    found = np.asarray(read_image(path, 1, pixel_range=(10, 50)))
    expected = np.rint((GRAY.clip(10, 50) - 10.0) * (255 / 40))
    expected[2, 3], expected[4, 4] = 0, 255
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_pixel_range_is_the_same_for_every_image_and_decoder(tmp_path, dtype):
    array = (GRAY.astype(dtype) / 3).astype(dtype)
    path = save(tmp_path, Image.fromarray(array), "a.tif")
    expected = np.rint((array.clip(1, 5).astype(float) - 1) * (255 / 4))
    assert np.array_equal(read_image(path, 1, pixel_range=(1, 5)), expected)
    with images.open_image(path, 3) as image:
        assert np.array_equal(images.decode_fast(image, 3, pixel_range=(1, 5))[2], expected)
    crop = RandomCrop((8, 8), (1, 1), "bicubic", 1, pixel_range=(1, 5))
    with images.open_image(path, 1) as image:
        assert np.array_equal(crop.cut(image, [Crop(0, 0, 8, 8)])[0][0], expected)


def test_a_pixel_range_leaves_8_bits_alone(tmp_path):
    path = save(tmp_path, Image.fromarray(GRAY), "a.png")
    assert np.array_equal(read_image(path, 1, pixel_range=(0, 4095)), GRAY)


def test_floating_point_gray_is_stretched(tmp_path):
    path = save(tmp_path, Image.fromarray(GRAY.astype(np.float32) / 63 - 0.5), "float.tif")
    assert np.abs(np.asarray(read_image(path, 1)).astype(float) - GRAY / 63 * 255).max() <= 0.5


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 5])
def test_arrays_of_any_number_of_channels(tmp_path, in_chans):
    array = np.random.default_rng(0).integers(0, 256, (10, 12, in_chans), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", in_chans)
    assert np.array_equal(images.to_tensor(image).permute(1, 2, 0), array)
    assert torch.is_tensor(image) == (in_chans not in (1, 3))  # augmentation takes Pillow images
    with pytest.raises(ValueError, match=r"array of uint8 \(10, 12, .\): must be \(height, width, 6\) of"):
        read_image(tmp_path / "a.npy", 6)


def test_gray_and_rgb_arrays_are_converted_as_image_files_are(tmp_path):
    for array, in_chans, expected in (
        (RGB, 1, np.asarray(Image.fromarray(RGB).convert("L"))),
        (GRAY, 3, np.stack([GRAY] * 3, axis=-1)),
        (GRAY.astype(np.uint16) * 256 + 17, 1, GRAY),
    ):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(read_image(tmp_path / "a.npy", in_chans), expected)


def test_image_files_have_no_other_number_of_channels(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB), "a.png")
    with pytest.raises(ValueError, match="only .npy arrays and TIFF have others"):
        read_image(path, 5)


# ---------------------------------------------------------------- many channels, and TIFF

BANDS = np.random.default_rng(0).random((10, 12, 16))
LAYOUTS = {  # of (H, W, C): what tifffile is given
    "pages": lambda array: (np.moveaxis(array, 2, 0), {}),
    "bands": lambda array: (array, dict(planarconfig="contig")),
    "planes": lambda array: (
        np.moveaxis(array, 2, 0),
        dict(planarconfig="separate", compression="zlib", byteorder=">"),
    ),
    "big": lambda array: (np.moveaxis(array, 2, 0), dict(bigtiff=True)),
    "ImageJ": lambda array: (np.moveaxis(array, 2, 0), dict(imagej=True, metadata={"axes": "CYX"})),
    "OME": lambda array: (np.moveaxis(array, 2, 0), dict(ome=True, metadata={"axes": "CYX"})),
}


def save_tiff(path, array, **options):
    tifffile.imwrite(path, array, **{"photometric": "minisblack"} | options)
    return path


def read_both_ways(path, in_chans, **options):
    """(H, W, C) uint8 of `decode`, which `decode_fast` reads too."""
    pixels = images.to_tensor(read_image(path, in_chans, **options))
    with images.open_image(path, in_chans) as image:
        assert torch.equal(images.to_tensor(images.decode_fast(image, in_chans, **options)), pixels)
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("layout", [*LAYOUTS, "npy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("in_chans", [2, 4, 16])
def test_channels_are_bands_or_pages_of_a_tiff_or_of_an_array(tmp_path, layout, dtype, in_chans):
    array = (BANDS[:, :, :in_chans] * (255 if dtype == np.uint8 else 60_000)).astype(dtype)
    path = tmp_path / f"a.{'npy' if layout == 'npy' else 'tif'}"
    if layout == "npy":
        np.save(path, array)
    else:
        pixels, options = LAYOUTS[layout](array)
        save_tiff(path, pixels, **options)
    low, high = float(array.min()), float(array.max())
    values = array.astype(float)
    seen = {np.uint8: values, np.uint16: values // 256}.get(dtype, (values - low) * (255 / (high - low)))
    assert np.array_equal(read_both_ways(path, in_chans), np.rint(seen))
    ranged = array if dtype == np.uint8 else np.rint((array.clip(20_000, 40_000) - 20_000.0) * (255 / 20_000))
    assert np.array_equal(read_both_ways(path, in_chans, pixel_range=(20_000, 40_000)), ranged)


def test_three_pages_are_rgb_and_smaller_copies_no_channels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for channel in np.moveaxis(RGB, 2, 0):
            file.write(channel, photometric="minisblack", contiguous=False)
        file.write(GRAY[::2, ::2], photometric="minisblack", subfiletype=1)
    assert np.array_equal(read_both_ways(tmp_path / "a.tif", 3), RGB)


def test_16_bit_colors_of_a_tiff_have_a_range_and_all_their_bands(tmp_path):
    """Pillow reads their upper bytes, of separate planes the first alone, and of floats none."""
    for options in ({}, {"planarconfig": "separate"}):
        array = np.moveaxis(RGB, 2, 0) if options else RGB
        path = save_tiff(tmp_path / "a.tif", array.astype(np.uint16) * 16, photometric="rgb", **options)
        assert np.array_equal(read_both_ways(path, 3, pixel_range=(0, 4080)), RGB)
        assert np.array_equal(
            read_both_ways(path, 1, pixel_range=(0, 4080))[:, :, 0], Image.fromarray(RGB).convert("L")
        )
        with pytest.raises(ValueError, match="16-bit image without a value above 4080, of 65535"):
            read_image(path, 3)
        path = save_tiff(tmp_path / "a.tif", array.astype(np.float32), photometric="rgb", **options)
        assert np.array_equal(read_both_ways(path, 3, pixel_range=(0, 255)), RGB)


def test_a_fourth_band_of_a_tiff_is_opacity_only_if_the_file_says_so(tmp_path):
    bands = np.dstack([RGB, GRAY])
    path = save_tiff(tmp_path / "a.tif", bands, photometric="rgb", extrasamples=["unspecified"])
    assert torch.equal(read_image(path, 4), torch.from_numpy(bands).permute(2, 0, 1))
    path = save_tiff(tmp_path / "a.tif", bands, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(path, 4).mode == "RGBA"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_bands_is_turned_upright(tmp_path, orientation):
    expected = np.asarray(read_image(save_turned(tmp_path, "tif", orientation), 3))
    path = save_tiff(
        tmp_path / "b.tif", CORNERS.astype(np.uint16), photometric="rgb", extratags=[(274, 3, 1, orientation)]
    )
    assert np.array_equal(read_both_ways(path, 3, pixel_range=(0, 255)), expected)


@pytest.mark.parametrize(
    "shape, options, in_chans, message",
    [
        ((5, 8, 8), {}, 1, r"TIFF of 5 pages \(8, 8\), YX: must be 1 page of 1 band, or 1 page of 1 band and"),
        ((5, 8, 8), {}, 4, r"TIFF of 5 pages \(8, 8\)"),
        ((8, 9, 5), {}, 5, r"TIFF of 8 pages \(9, 5\)"),  # which tifffile takes for pages
        ((8, 8), {}, 5, r"TIFF of 1 page \(8, 8\)"),
        ((8, 8, 3), {"photometric": "rgb"}, 5, r"TIFF of 1 page \(8, 8, 3\), YXS: must be 1 page of 5 bands"),
        ((2, 8, 8, 3), {"photometric": "rgb"}, 6, r"TIFF of 2 pages \(8, 8, 3\)"),
        ((8, 8, 2), {"planarconfig": "contig"}, 1, r"TIFF of 1 page \(8, 8, 2\)"),
        ((5, 8, 8), {"photometric": "miniswhite"}, 5, "in MINISWHITE: must be MINISBLACK or RGB"),
    ],
)
def test_a_tiff_of_other_pages_is_refused_by_its_shape(tmp_path, shape, options, in_chans, message):
    path = save_tiff(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(ValueError, match=message):
        read_image(path, in_chans)


def test_a_damaged_tiff_a_bomb_and_a_missing_tifffile_are_named(tmp_path, monkeypatch, caplog):
    path = save_tiff(tmp_path / "a.tif", np.zeros((5, 40, 40), np.uint8), compression="zlib")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    with pytest.raises(Image.DecompressionBombError):
        read_image(path, 5)
    path = save_tiff(tmp_path / "b.tif", np.zeros((40, 41, 5), np.uint8), planarconfig="contig")
    with pytest.raises(ValueError, match="TIFF of 8,200 values, the limit is 1,598: cut it into tiles"):
        read_image(path, 5)
    monkeypatch.undo()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "b.tif (" in images.try_open(ImageFolder(tmp_path, 5), 1, lambda image: image)[1]
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match="is read by tifffile, which is missing: pip install tifffile"):
        build_images("image_folder", tmp_path, "train", 5, labelled=False)
    assert not caplog.records  # of Pillow and tifffile, without the file's name


@pytest.mark.parametrize("name", ["a.eps", "a.jpg"])
def test_no_file_starts_another_program(tmp_path, monkeypatch, name):
    """Pillow hands EPS files, whatever they are called, to Ghostscript."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: started.append(arguments))
    Image.fromarray(RGB).save(tmp_path / name, format="EPS")
    with pytest.raises(Image.UnidentifiedImageError):
        read_image(tmp_path / name, 3)
    assert not started and (name == "a.jpg") == bool(find_images(tmp_path))


def test_every_other_format_of_pillow_is_tried():
    Image.init()
    assert set(Image.OPEN) - set(images.find_formats()) == {"BUFR", "EPS", "GRIB", "HDF5", "MPEG"}
    assert images.find_formats().index("JPEG") < 6  # the usual ones first


def test_a_file_is_named_in_one_line_whatever_it_is_called(tmp_path):
    (tmp_path / "a\nb\x1b[1m.png").write_text("not an image")
    _, error = images.try_open(ImageFolder(tmp_path, 3), 0, images.decode)
    assert error.startswith(f"{tmp_path}/a\\nb\\x1b[1m.png (UnidentifiedImageError: ") and error.isprintable()
    with pytest.raises(UserError, match=r"^--images .*/a\\nb\\x1b\[1m.png: cannot be read: ") as caught:
        list(image_sets.read_files("--images", [str(tmp_path)], 3, np.asarray))
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------- orientation

CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :8], CORNERS[:8, 16:], CORNERS[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save_turned(folder, extension, orientation):
    """CORNERS as a camera that was turned writes it: the pixels as they are, and the tag."""
    exif = Image.Exif()
    exif[0x112] = orientation
    options = dict(jpg=dict(quality=100, subsampling=0), webp=dict(lossless=True)).get(extension, {})
    Image.fromarray(CORNERS).save(folder / f"a.{extension}", exif=exif, **options)
    return folder / f"a.{extension}"


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_an_image_is_turned_upright_as_its_exif_tag_says(tmp_path, decoder, extension, orientation):
    path = save_turned(tmp_path, extension, orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path, 3), expected)
    assert np.array_equal(read_fast(path, 3).permute(1, 2, 0), expected)
    assert np.array_equal(read_image(path, 1), Image.fromarray(expected).convert("L"))
    with Image.open(path) as image:
        assert images.find_size(image) == expected.shape[:2]
        (cut,) = random_crop((4, 4)).cut(image, [Crop(2, 2, 4, 4)])
    assert np.array_equal(cut.permute(1, 2, 0), expected[2:6, 2:6])


def test_crops_of_a_turned_image_are_those_of_the_upright_one(tmp_path, decoder):
    turned, upright = (save(tmp_path, PHOTO, name) for name in ("a.png", "b.png"))
    PHOTO.transpose(Image.Transpose.ROTATE_90).save(turned, exif=JPEGS["on its side"][1]["exif"])
    for seed in range(3):
        cuts = []
        for path in (turned, upright):
            torch.manual_seed(seed)
            with Image.open(path) as image:
                cuts.append(random_crop((40, 50))(image))
        assert torch.equal(*cuts)


def test_a_damaged_exif_tag_leaves_the_image_as_it_is(tmp_path):
    PHOTO.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*garbage")
    assert read_fast(tmp_path / "a.jpg", 3).shape == (3, *PHOTO.size[::-1])
    assert read_image(tmp_path / "a.jpg", 3).size == PHOTO.size


# ---------------------------------------------------------------- folders and classes


def test_folders_flat_and_nested_without_hidden_files(tmp_path):
    for name in ("b.png", "deep/er/a.PNG", ".hidden.png", ".cache/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / name, format="png")
    assert find_images(tmp_path) == [str(tmp_path / "b.png"), str(tmp_path / "deep/er/a.PNG")]


def test_links_in_circles_are_walked_once(tmp_path):
    save(tmp_path, Image.fromarray(RGB), "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_images(tmp_path) == [str(tmp_path / "a.png")]


def test_class_folders_are_numbered_in_order_and_may_be_nested(tmp_path):
    for number, name in enumerate(("b/2.png", "b/deep/er/1.png", "B/3.png", "a/4.png", "10/5.png", ".c/6.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(GRAY + number).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    found = ClassFolders(tmp_path, 1)
    assert found.class_names == ["10", "B", "a", "b"]
    targets = {found.name(i).removeprefix(f"{tmp_path}/"): int(found.targets[i]) for i in range(len(found))}
    assert targets == {"10/5.png": 0, "B/3.png": 1, "a/4.png": 2, "b/2.png": 3, "b/deep/er/1.png": 3}
    assert [np.asarray(read_set(found, i))[0, 0] for i in range(5)] == [4, 2, 3, 0, 1]


def test_class_folders_take_the_numbers_of_known_classes(labelled_folder):
    found = ClassFolders(labelled_folder / "val", 3, ["aphid", "ant", "bee", "cat"])
    assert len(found.class_names) == 4 and np.bincount(found.targets).tolist() == [0, 3, 2, 2]
    with pytest.raises(UserError, match=r"class bee \(1 such\) is not among the 2 classes .*: ant, cat"):
        ClassFolders(labelled_folder / "val", 3, ["ant", "cat"])


def test_an_image_beside_the_class_folders_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "2.png"):
        save(tmp_path, Image.fromarray(RGB), name)
    with pytest.raises(UserError, match="2.png lies beside the class folders; give one folder a class"):
        ClassFolders(tmp_path, 3)


def test_the_first_of_each_class(labelled_folder):
    first = image_sets.first_of_each_class(ClassFolders(labelled_folder / "train", 3), 2)
    names = [first.name(i).split("/")[-1] for i in range(len(first))]
    assert names == ["00.png", "03.png", "01.png", "04.png", "02.png", "05.png"]
    assert first.targets.tolist() == [0, 0, 1, 1, 2, 2] and first.class_names == ["ant", "bee", "cat"]
    assert np.array_equal(read_set(first, 3), Image.open(labelled_folder / "train" / "bee" / "04.png"))


# ---------------------------------------------------------------- image sets of --data_set


@pytest.mark.parametrize(
    "data_set, path, split, labelled, count",
    [
        ("image_folder", "", "train", False, 22),
        ("image_folder", "val", "train", False, 7),
        ("image_folder", "", "train", True, 22),
        ("image_folder", "train", "train", True, 22),
        ("image_folder", "", "val", True, 7),
        ("IMNET", "", "train", True, 22),
        ("IMNET", "", "val", True, 7),
        ("image_folder", "train", "", True, 22),
        ("IMNET", "train", "", True, 22),
        ("DIGITS", "", "train", False, 1438),
        ("DIGITS", "", "val", True, 359),
        ("DIGITS", "", "", True, 359),
    ],
)
def test_where_the_images_are(labelled_folder, data_set, path, split, labelled, count):
    assert len(build_images(data_set, labelled_folder / path, split, 3, labelled)) == count


@pytest.mark.parametrize("split", ["train", "val"])
def test_imnet_needs_both_splits(labelled_folder, split):
    with pytest.raises(UserError, match=rf"^--eval_data_path .*/train: no such folder .*/train/{split}; give a folder"):
        build_images("IMNET", labelled_folder / "train", split, 3, flag="--eval_data_path")


def test_images_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UserError, match="no image there"):
        build_images("image_folder", tmp_path, "train", 3, labelled=False)
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(UserError, match="none of the first 1 images can be read: .*a.png"):
        build_images("image_folder", tmp_path, "train", 3, labelled=False)
    with pytest.raises(UserError, match="a.png: not a folder; give a folder of images"):
        build_images("image_folder", tmp_path / "a.png", "train", 3, labelled=False)


def test_digits_hold_out_a_fixed_fifth_with_all_classes():
    train, val = Digits(True, 1), Digits(False, 1)
    numbers = [int(found.name(i).split()[1]) for found in (train, val) for i in range(len(found))]
    assert len(val) == 1797 // 5 and sorted(numbers) == list(range(1797))
    assert train.class_names == val.class_names == list("0123456789") and set(val.targets) == set(range(10))
    assert np.array_equal(load_digits().target[numbers], [*train.targets, *val.targets])
    assert train.arrays.max() == 255 and read_set(train, 0).size == (8, 8)
    assert read_set(Digits(True, 4), 0).mode == "RGBA"


CIFARS = {
    10: ("cifar-10-batches-py", "data_batch_1", "test_batch", "batches.meta", "labels", "label_names"),
    100: ("cifar-100-python", "train", "test", "meta", "fine_labels", "fine_label_names"),
}


@pytest.mark.parametrize("num_classes", list(CIFARS))
def test_cifar_is_read_from_its_files(tmp_path, monkeypatch, num_classes):
    """Files of 4 and 2 images in place of the real ones."""
    folder, train, test, meta, labels, label_names = CIFARS[num_classes]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    files = {
        train: {"data": pixels[:4].reshape(4, -1), labels: [2, 0, 1, 2]},
        test: {"data": pixels[4:].reshape(2, -1), labels: [1, 0]},
        meta: {label_names: ["cat", "dog", "ant"]},
    }
    (tmp_path / folder).mkdir()
    for file, content in files.items():
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr(f"torchvision.datasets.CIFAR{num_classes}.train_list", [[train, ""]])
    data_set = "CIFAR" if num_classes == 100 else "CIFAR10"
    train, val = (build_images(data_set, tmp_path, split, 3) for split in ("train", "val"))
    assert train.class_names == ["cat", "dog", "ant"] and train.targets.tolist() == [2, 0, 1, 2]
    assert np.array_equal(read_set(train, 3), pixels[3].transpose(1, 2, 0))
    assert val.targets.tolist() == [1, 0] and np.array_equal(read_set(val, 0), pixels[4].transpose(1, 2, 0))
    assert image_sets.first_of_each_class(train, 1).targets.tolist() == [2, 0, 1]


def test_cifar_that_cannot_be_downloaded_is_reported_in_one_line(tmp_path, monkeypatch):
    def download(_):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    with pytest.raises(UserError, match="CIFAR10 is not there and cannot be downloaded: no network"):
        build_images("CIFAR10", tmp_path, "train", 3)


# ---------------------------------------------------------------- JPEGs

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
JPEGS = {
    "usual": (PHOTO, {"quality": 90}),
    "finest": (PHOTO, {"quality": 100, "subsampling": 0}),
    "coarsest": (PHOTO, {"quality": 5, "subsampling": "4:1:1"}),
    "progressive": (PHOTO, {"progressive": True, "subsampling": "4:2:2"}),
    "no YCbCr": (PHOTO, {"keep_rgb": True}),
    "odd size": (PHOTO.crop((0, 0, 333, 211)), {}),
    "one pixel": (PHOTO.crop((0, 0, 1, 1)), {}),
    "on its side": (PHOTO, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    "several": (PHOTO, {"format": "MPO", "save_all": True, "append_images": [PHOTO.rotate(180)]}),
    "gray": (PHOTO.convert("L"), {}),
    "CMYK": (PHOTO.convert("CMYK"), {}),
}


def read_fast(path, in_chans, shrink=1):
    with images.open_image(path, in_chans) as image:
        return images.to_tensor(images.decode_fast(image, in_chans, shrink))


def read_by_pillow(path, in_chans, shrink=1):
    """The reference: (C, H, W)."""
    with images.open_image(path, in_chans) as image:
        return images.to_tensor(images.decode(image, in_chans, shrink))


@pytest.fixture
def decoded(monkeypatch):
    """The shapes (height, width, channels) that simplejpeg has returned."""
    shapes, decode = [], simplejpeg.decode_jpeg

    def count(*data, **options):
        pixels = decode(*data, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    return shapes


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Each of the decoders, in a test."""
    if request.param == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    return request.param


@pytest.fixture(scope="module")
def large_jpeg(tmp_path_factory):
    """The folder of one JPEG of 1500 x 1001 pixels."""
    folder = tmp_path_factory.mktemp("large")
    PHOTO.resize((1500, 1001), Image.Resampling.BICUBIC).save(folder / "a.jpg", quality=95)
    return folder


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("kind", JPEGS)
def test_the_fast_decoder_reads_the_same_picture(tmp_path, decoded, kind, in_chans):
    image, options = JPEGS[kind]
    image.save(tmp_path / "a.jpg", **{"format": "JPEG"} | options)
    shrinks = [shrink for shrink in (1, 2, 4, 8) if shrink <= min(image.size)]
    for shrink in shrinks:
        expected = read_by_pillow(tmp_path / "a.jpg", in_chans, shrink)
        assert torch.equal(read_fast(tmp_path / "a.jpg", in_chans, shrink), expected)
    convertible = kind == "gray" and in_chans < 4 or kind != "CMYK" and in_chans == 3
    assert len(decoded) == convertible * len(shrinks)  # the others went through Pillow


@pytest.mark.parametrize("simple", ["missing", "failing"])
def test_pillow_decodes_what_simplejpeg_does_not(tmp_path, monkeypatch, simple):
    def fail(*_, **options):
        raise ValueError("unsupported")

    PHOTO.save(tmp_path / "a.jpg")
    if simple == "failing":
        monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    else:
        monkeypatch.setattr(images, "simplejpeg", None)  # as where it is not installed
    expected = np.asarray(read_image(tmp_path / "a.jpg", 3)).transpose(2, 0, 1)
    assert np.array_equal(read_fast(tmp_path / "a.jpg", 3), expected)


# ---------------------------------------------------------------- random crops


def random_crop(size, scale=(0.08, 1.0), in_chans=3):
    return RandomCrop(size, scale, "bicubic", in_chans)


@pytest.mark.parametrize("size, scale", [((375, 500), (0.2, 1.0)), ((30, 400), (0.9, 1.0)), ((1, 1), (0.5, 0.6))])
def test_crops_are_drawn_by_torchvision(size, scale):
    """The same numbers from the same state, those of an image that no crop fits too."""
    for seed in range(5):
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(8, scale).make_params([torch.empty(3, *size)])
        for image in (torch.empty(5, *size), Image.new("RGB", size[::-1])):
            torch.manual_seed(seed)
            assert random_crop((32, 64), scale).draw(image)._asdict() == expected


SEE_THROUGH = PHOTO.convert("RGBA")  # its brighter half
SEE_THROUGH.putalpha(PHOTO.convert("L").point(lambda gray: 255 * (gray < 128)))


def cut_by_pillow(image, crop, size):
    """As the original's transform crops and resizes."""
    top, left, height, width = crop
    box = image.crop((left, top, left + width, top + height))
    return images.to_tensor(box.resize(size[::-1], Image.Resampling.BICUBIC)).int()


@pytest.mark.parametrize("image", [PHOTO, PHOTO.convert("L"), SEE_THROUGH], ids=lambda image: image.mode)
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_crop_is_what_pillow_makes_of_it_to_rounding(tmp_path, image, extension):
    """Antialiased bicubic; colors that do not show do not bleed.

    Where one side is enlarged and the other shrunk, tensors begin with the width, Pillow with what is less work, and
    the few pixels that overshoot between the two differ.
    """
    mode = "RGB" if image.mode == "RGBA" and extension == "jpg" else image.mode
    path = save(tmp_path, image.convert(mode), f"a.{extension}")
    for in_chans in (1, 3, 4):
        crop = random_crop((288, 352), in_chans=in_chans)  # too large for a smaller decode
        for seed in range(2):
            with images.open_image(path, in_chans) as opened:
                torch.manual_seed(seed)
                found = crop(opened)
            torch.manual_seed(seed)
            expected = cut_by_pillow(read_image(path, in_chans), crop.draw(image), (288, 352))
            difference = (found.int() - expected).abs().float()
            assert (difference <= 2).float().mean() > 0.999 and difference.mean() < 0.25


@pytest.mark.parametrize("size", [(64, 96), (112, 112)])
def test_a_jpeg_is_decoded_as_small_as_its_crops_allow(large_jpeg, decoded, monkeypatch, decoder, size):
    shrinks, decodes, decode = [], [], images.decode_fast

    def count(*image):
        decodes.append(decode(*image))
        return decodes[-1]

    monkeypatch.setattr(images, "decode_fast", count)
    crop = random_crop(size, (0.001, 1.0))
    torch.manual_seed(0)
    for _ in range(40):
        with Image.open(large_jpeg / "a.jpg") as image:
            crops = [crop.draw(image) for _ in range(2)]
            assert [tuple(cut.shape[1:]) for cut in crop.cut(image, crops)] == [size] * 2
        room = min(min(crop.height / (size[0] + 1), crop.width / (size[1] + 1)) for crop in crops)
        shrinks.append(max(by for by in (1, 2, 4, 8) if by == 1 or by <= room))
        assert decodes[-1].shape == (3, -(-1001 // shrinks[-1]), -(-1500 // shrinks[-1]))
    assert set(shrinks) == {1, 2, 4, 8} and len(decodes) == 40  # one for two crops
    assert len(decoded) == (40 if decoder == "simplejpeg" else 0)


def test_a_shrunk_crop_is_large_enough_and_shows_the_same(large_jpeg):
    image, crop = Image.open(large_jpeg / "a.jpg"), random_crop((64, 96), (0.2, 1.0))
    torch.manual_seed(0)
    for _ in range(300):
        drawn = crop.draw(image)
        for by in (2, 4, 8):
            if by <= images.find_shrink(image, [drawn], (64, 96)):
                small = drawn.shrink(by)
                assert small.height >= 64 and small.width >= 96
                edges = (drawn.top, drawn.left, drawn.top + drawn.height, drawn.left + drawn.width)
                moved = (small.top, small.left, small.top + small.height, small.left + small.width)
                assert max(abs(edge / by - other) for edge, other in zip(edges, moved, strict=True)) <= 0.5
    assert images.find_shrink(image.copy(), [drawn], (1, 1)) == 1  # a copy is no JPEG any more


@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_jpeg_decoded_smaller_looks_the_same(large_jpeg, by, decoder):
    """Where the crop just fits, it differs by less than moving the crop by half a pixel of the output would make it."""

    def cut(crop, shrunk):
        with Image.open(large_jpeg / "a.jpg") as image:
            (pixels,) = random_crop((64, 96)).cut(image if shrunk else image.copy(), [crop])
        return images.to_tensor(pixels).float()

    for top, left in ((0, 0), (17, 31), (48, 60)):
        crop = Crop(top * by, left * by, 65 * by, 97 * by)
        expected = cut(crop, shrunk=False)
        difference = cut(crop, shrunk=True) - expected
        moved = cut(crop._replace(top=crop.top + by // 2), shrunk=False) - expected
        assert 0 < difference.abs().mean() < 0.75 * moved.abs().mean() and difference.mean().abs() < 0.3


def test_interpolation_is_one_of_two_if_random():
    image, crop = Image.fromarray(RGB), Crop(0, 0, 8, 8)

    def cut(interpolation):
        return RandomCrop((20, 20), (1, 1), interpolation, 3).cut(image, [crop])[0]

    bilinear, bicubic = cut("bilinear"), cut("bicubic")
    drawn = [cut("random") for _ in range(20)]
    assert not torch.equal(bilinear, bicubic)
    assert {torch.equal(x, bilinear) for x in drawn} == {torch.equal(x, bicubic) for x in drawn} == {True, False}
    assert all(torch.equal(x, bilinear) or torch.equal(x, bicubic) for x in drawn)


# ---------------------------------------------------------------- normalization


def test_normalize_matches_torchvision_and_inverts():
    imgs = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(imgs / 255)
    assert torch.allclose(images.normalize(imgs), expected, atol=1e-6)
    assert torch.allclose(images.normalize(imgs, INCEPTION_STATISTICS), imgs / 127.5 - 1, atol=1e-6)
    for channels in (imgs, imgs[:, :1], imgs.repeat(1, 2, 1, 1)):
        assert torch.equal(images.denormalize(images.normalize(channels)), channels)
    two, statistics = imgs[:, :2], ((0.3, 0.6), (0.1, 0.02))
    assert torch.allclose(images.normalize(two, statistics), v2.Normalize(*statistics)(two / 255), atol=1e-5)
    assert torch.equal(images.denormalize(images.normalize(two, statistics), statistics), two)


def test_the_statistics_are_timms_and_averages_for_other_channels():
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    assert find_statistics({}, 3) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert np.allclose(find_statistics({"imagenet_default_mean_and_std": False}, 5), 0.5)
    assert np.allclose(find_statistics({}, 5), [[0.449], [0.226]], atol=1e-3)


def test_files_and_folders_are_read_and_bad_ones_named(tmp_path):
    path = str(save(tmp_path, Image.fromarray(RGB), "a.png"))
    found = list(image_sets.read_files("--images", [path, str(tmp_path)], 3, np.asarray))
    assert len(found) == 2 and all(np.array_equal(image, RGB) for image in found)
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(UserError, match="^--images .*b.png: cannot be read"):
        list(image_sets.read_files("--images", [str(tmp_path)], 3, np.asarray))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="^--images .*empty: no image there"):
        list(image_sets.read_files("--images", [str(tmp_path / "empty")], 3, np.asarray))
