"""An image, from its file to a normalized tensor: opened, decoded, cropped, resized."""

import contextlib
import functools
import io
import logging
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from index import read_file
from models.files import find_statistics
from sources import find_formats, in_one_line
from utils import format_count

try:
    import simplejpeg
except ImportError:  # Pillow decodes all JPEGs then
    simplejpeg = None

for name in ("PIL", "tifffile"):  # print lines without the file's name; what matters they raise
    logging.getLogger(name).setLevel(logging.CRITICAL)
COLOR_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels


def open_image(file, in_chans):
    """The image in a file, given by its path or by its bytes (io.BytesIO), whose content says what it is.

    A context manager of an undecoded Pillow image or, from .npy and from TIFF of which Pillow would not read all, of
    what `open_array` returns. Raises what Pillow raises for an unknown file, ValueError for an array or a number of
    channels that do not fit, ImportError if tifffile is missing.
    """
    file = file if isinstance(file, io.BytesIO) else io.BytesIO(read_file(file))
    start = bytes(file.getbuffer()[:6])
    if start == b"\x93NUMPY":
        return open_array(np.load(file), in_chans)
    image = None
    with contextlib.suppress(UnidentifiedImageError):
        image = Image.open(file, formats=find_formats())
    is_tiff = start[:2] in (b"II", b"MM") and start[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+")
    if is_tiff and (image is None or not is_plain_tiff(image, in_chans)):
        file.seek(0)
        return open_array(read_tiff(file, in_chans), in_chans)
    if image is None:
        raise UnidentifiedImageError("not an image in a format that Pillow reads")
    if in_chans not in COLOR_MODES:
        raise ValueError(f"such files have 1, 3 or 4 channels, not {in_chans}: only .npy arrays and TIFF have others")
    return image


def is_plain_tiff(image, in_chans):
    """Whether Pillow reads all of a TIFF file that it opened: one page, of one band or of 8-bit colors."""
    bands, bits, extra = (image.tag_v2.get(tag, default) for tag, default in ((277, 1), (258, (1,)), (338, (0,))))
    is_read = bands == 1 or bands == len(image.getbands()) and max(bits) <= 8
    is_opacity = image.mode != "RGBA" or in_chans != 4 or extra[0] in (1, 2)  # else the fourth band is one like others
    return image.n_frames == 1 and is_read and is_opacity and in_chans in COLOR_MODES


def read_tiff(file, in_chans):
    """(H, W, C) of a TIFF file: the C bands of its one page, or its C pages of one band; smaller copies do not count.

    Raises ValueError unless C is in_chans, or 1 or 3 where Pillow's images of in_chans channels can be made of that.
    """
    try:
        import tifffile
    except ImportError:
        problem = "a TIFF file of several pages or bands is read by tifffile, which is missing"
        raise ImportError(f"{problem}: pip install tifffile") from None
    with tifffile.TiffFile(file) as tiff:
        pages = [page for page in tiff.pages if not page.is_reduced]
        page, shapes = pages[0], {(page.shape, page.axes, page.dtype) for page in pages}
        bands = page.samplesperpixel
        converts = len(pages) == 1 and bands in (1, 3) and in_chans in COLOR_MODES
        fits = len(pages) * bands == in_chans and 1 in (len(pages), bands) or converts
        if len(shapes) > 1 or page.axes not in ("YX", "YXS", "SYX") or not fits:
            accepted = f"1 page of {format_count(in_chans, 'band')}, or {format_count(in_chans, 'page')} of 1 band"
            found = f"{format_count(len(pages), 'page')} {page.shape}, {page.axes}"
            raise ValueError(f"TIFF of {found}: must be {accepted} and one size (--in_chans)")
        if page.photometric not in (1, 2):  # black is 0, RGB
            raise ValueError(f"TIFF of several pages or bands in {page.photometric.name}: must be MINISBLACK or RGB")
        values, limit = page.imagelength * page.imagewidth * bands * len(pages), 2 * (Image.MAX_IMAGE_PIXELS or np.inf)
        if values > limit:  # as Pillow's of pixels
            raise ValueError(f"TIFF of {values:,} values, the limit is {limit:,}: cut it into tiles")
        arrays = [page.asarray(maxworkers=1) for page in pages]
        orientation = page.tags.valueof(274, 1)
    array = np.stack(arrays) if page.axes == "YX" else arrays[0]
    array = array if page.axes == "YXS" else np.moveaxis(array, 0, 2)
    array = array.swapaxes(0, 1) if orientation >= 5 else array
    return np.flip(array, [axis - 1 for axis in REVERSED_AXES.get(orientation, ())])


def open_array(array, in_chans):
    """As `open_image`, of an array of numbers (H, W) or (H, W, C): a tensor (C, H, W), which `decode` scales.

    C is in_chans, or that of gray, RGB or 8-bit RGBA where `decode` can convert it. Raises ValueError for others.
    """
    channels = 1 if array.ndim == 2 else array.shape[-1]
    converts = in_chans in COLOR_MODES and (channels in (1, 3) or channels == 4 and array.dtype == np.uint8)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or channels != in_chans and not converts:
        accepted = f"(height, width, {in_chans}) of uint8, uint16 or float"
        raise ValueError(f"array of {array.dtype} {array.shape}: must be {accepted}")
    array = array * np.uint8(255) if array.dtype == bool else array.astype(array.dtype.newbyteorder("="))
    return contextlib.nullcontext(torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1))


opening = torch.tensor(-1)  # the image opened last: a loader worker shares it, so that one that stalls can be named


def try_open(images, index, read):
    """(read(opened image), None), or (None, "name (error)"), in one line, of an image that cannot be read."""
    opening.fill_(index)
    try:
        with images.open(index) as image:
            return read(image), None
    except Exception as error:  # Pillow's plugins raise nearly everything
        return None, in_one_line(f"{images.name(index)} ({type(error).__name__}: {error})")


def decode(image, in_chans, shrink=1, pixel_range=None):
    """The pixels of an opened image, upright: a Pillow image of mode COLOR_MODES[in_chans], or uint8 (C, H, W).

    shrink: for a JPEG 2, 4 or 8 decodes each side at 1 / shrink of its length, rounded up. pixel_range: (low, high),
    see `scale_to_8_bits`, for more than 8 bits. Raises ValueError for values that 8 bits cannot show.
    """
    if torch.is_tensor(image):
        return decode_array(image, in_chans, pixel_range)
    if shrink > 1:
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    orientation, layout = find_orientation(image), find_layout(image)
    image.load()
    if image.mode.startswith(("I", "F")):
        sixteen = ";16" in image.mode or image.format in ("PNG", "PPM")
        image = Image.fromarray(scale_to_8_bits(np.asarray(image), pixel_range, sixteen))
    elif ";16" in layout:
        check_16_bit_color(image, pixel_range)
    elif image.mode == "P":
        image = image.convert("RGBA")  # applies the transparent color, if any
    image = image.convert(COLOR_MODES[in_chans])
    return image.transpose(TURNS[orientation]) if orientation > 1 else image


def decode_array(pixels, in_chans, pixel_range=None):
    """`decode`, of a tensor (C, H, W) of any dtype, see `open_array`; one range for all channels."""
    if pixels.dtype != torch.uint8:
        pixels = torch.from_numpy(scale_to_8_bits(pixels.numpy(), pixel_range, pixels.dtype == torch.uint16))
    if in_chans == len(pixels) and in_chans not in (1, 3):  # four bands need not be RGBA
        return pixels
    return to_pillow(pixels).convert(COLOR_MODES[in_chans])  # which augmentation and resizing take


# By EXIF orientation: how to turn a Pillow image upright, and which axes of (C, H, W) to reverse, from 5 on after
# height and width have changed places
NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = {orientation: Image.Transpose[name] for orientation, name in enumerate(NAMES, start=2)}
REVERSED_AXES = {2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}


def find_orientation(image):
    """The EXIF orientation of an opened image, 1 to 8; 1 if it has none, or if Pillow turns it by itself (TIFF)."""
    if torch.is_tensor(image) or image.format == "TIFF":
        return 1
    find_layout(image)  # reading the tag of a PNG loads the image
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged: the pixels are there
        return 1
    return orientation if orientation in TURNS else 1


def find_layout(image):
    """How Pillow describes the pixels in the file of an opened image; once loaded, as it was found before."""
    return vars(image).setdefault("layout", str(getattr(image, "tile", "")))


def find_size(image):
    """(height, width) of an opened image as `decode` returns it."""
    if torch.is_tensor(image):
        return tuple(image.shape[1:])
    return image.size if find_orientation(image) >= 5 else image.size[::-1]


def scale_to_8_bits(array, pixel_range=None, sixteen=False):
    """Numbers of any dtype as uint8: low to high of pixel_range become 0 to 255, values beyond are clipped, NaN is low.

    Without pixel_range 16 bits keep their upper byte, other numbers are stretched from their own minimum and maximum.
    Raises ValueError where that would leave nothing to see: values of at most 12 bits in 16, NaN, infinite values.
    """
    if pixel_range is None and sixteen:
        highest = array.max(initial=0)
        if 0 < highest < 4096:  # its upper byte is nearly empty
            fix = "give the range of the images, such as --pixel_range 0 4095 for 12 bits"
            raise ValueError(f"16-bit image without a value above {highest}, of 65535: {fix}")
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.uint16 and pixel_range is not None:
        return scaled_16_bits(*pixel_range)[array]
    if pixel_range is None:
        if not np.isfinite(array).all():
            raise ValueError("holds NaN or infinite values; with --pixel_range LOW HIGH, NaN is LOW")
        pixel_range = float(array.min()), float(array.max())
    low, high = pixel_range
    array = np.nan_to_num(array.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((array.clip(low, high) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


@functools.cache
def scaled_16_bits(low, high):
    """(65536,) what `scale_to_8_bits` makes of each value of 16 bits: looking it up is several times as fast."""
    return scale_to_8_bits(np.arange(1 << 16), (low, high))


def check_16_bit_color(image, pixel_range):
    """Raise ValueError if the upper bytes of 16-bit colors, all that Pillow reads, are not the picture."""
    highest = max(high for _, high in (band.getextrema() for band in image.split()[:3]))
    if pixel_range is not None and tuple(pixel_range) != (0, 65535):
        raise ValueError("16-bit colors are read by their upper byte; --pixel_range is for gray images, .npy and TIFF")
    if pixel_range is None and 0 < highest < 16:
        raise ValueError(f"16-bit colors whose upper byte does not exceed {highest}: convert them to 8 bits")


def decode_fast(image, in_chans, shrink=1, pixel_range=None):
    """As `decode`, but faster, and as a uint8 tensor (C, H, W); RGBA stays a Pillow image."""
    plain = isinstance(image, JpegImageFile) and in_chans < 4 and image.mode in ("L", COLOR_MODES[in_chans])
    pixels = decode_jpeg(image, shrink) if plain else None
    if pixels is None:
        image = decode(image, in_chans, shrink, pixel_range)
        # Resizing has to weigh colors by their opacity: Pillow does, tensors do not
        return image if torch.is_tensor(image) or image.mode == "RGBA" else to_tensor(image)
    orientation = find_orientation(image)
    if orientation > 1:
        pixels = (pixels.transpose(1, 2) if orientation >= 5 else pixels).flip(REVERSED_AXES[orientation])
    return pixels.expand(in_chans, -1, -1)


def decode_jpeg(image, shrink=1):
    """A JPEG that Pillow opened, as uint8 (C, H, W), not turned: Pillow's pixels; None where only Pillow can."""
    if simplejpeg is None:
        return None
    image.fp.seek(0)
    colorspace = "GRAY" if image.mode == "L" else "RGB"
    least = dict(min_height=-(-image.height // shrink), min_width=-(-image.width // shrink))
    try:
        pixels = simplejpeg.decode_jpeg(image.fp.read(), colorspace, **least)
    except ValueError:  # Pillow may succeed, or else says what is wrong
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_tensor(image):
    """A Pillow image as uint8 (C, H, W); a tensor as it is."""
    if torch.is_tensor(image):
        return image
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def to_pillow(pixels):
    """uint8 (C, H, W) of 1, 3 or 4 channels as a Pillow image; a Pillow image as it is."""
    if not torch.is_tensor(pixels):
        return pixels
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if len(pixels) == 1 else array)


def check_resized(image, shorter):
    """The decoded image as it is. Raises ValueError if it is too long to resize its shorter side to so many pixels."""
    height, width = find_size(image)
    pixels = shorter * max(shorter, max(height, width) * shorter // min(height, width))
    if pixels > (Image.MAX_IMAGE_PIXELS or np.inf):
        limit = f"{pixels} pixels, Pillow's limit is {Image.MAX_IMAGE_PIXELS}"
        raise ValueError(f"{width} x {height} pixels: with the shorter side resized to {shorter} it would have {limit}")
    return image


class Crop(NamedTuple):  # a rectangle of an image, in pixels
    top: int
    left: int
    height: int
    width: int

    def shrink(self, factor):
        """The same rectangle of the image decoded at 1 / factor of its size: edges move to the nearest pixel there."""
        top, left = round(self.top / factor), round(self.left / factor)
        bottom, right = round((self.top + self.height) / factor), round((self.left + self.width) / factor)
        return Crop(top, left, bottom - top, right - left)


def find_shrink(image, crops, size):
    """The largest of 1, 2, 4, 8 by which an opened JPEG may be shrunk, for speed, with no crop enlarged to size."""
    if not isinstance(image, JpegImageFile):
        return 1
    room = min(min(crop.height / (size[0] + 1), crop.width / (size[1] + 1)) for crop in crops)  # + 1: edges move
    return max(shrink for shrink in (1, 2, 4, 8) if shrink <= max(room, 1))


class RandomCrop:
    """Random crops of an opened image by the law of torchvision's RandomResizedCrop, as uint8 (C, height, width).

    size: (height, width) to which they are resized. interpolation: bicubic, bilinear, or random: one of the two.
    """

    def __init__(self, size, scale, interpolation, in_chans, pixel_range=None):
        from torchvision.transforms import v2

        self.size, self.in_chans, self.pixel_range = size, in_chans, pixel_range
        self.law = v2.RandomResizedCrop(size, scale)
        self.interpolations = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)

    def draw(self, image):
        return Crop(**self.law.make_params([torch.empty(1).expand(find_size(image))]))

    def cut(self, image, crops):
        """Each of these crops, resized; a JPEG is decoded once and no larger than they need."""
        modes = self.interpolations
        mode = random.choice(modes) if len(modes) > 1 else modes[0]
        shrink = find_shrink(image, crops, self.size)
        pixels = decode_fast(image, self.in_chans, shrink, self.pixel_range)
        return [resize(pixels, crop.shrink(shrink), self.size, mode) for crop in crops]

    def __call__(self, image):
        return self.cut(image, [self.draw(image)])[0]


def resize(pixels, crop, size, mode):
    """A crop of uint8 (C, H, W) or of an RGBA image, resized with antialiasing to (height, width): uint8 (C, h, w)."""
    top, left, height, width = crop
    if torch.is_tensor(pixels):
        part = pixels[None, :, top : top + height, left : left + width]
        part = part.contiguous(memory_format=torch.channels_last)  # the fastest for 3 channels
        return F.interpolate(part, size, mode=mode, antialias=True)[0]
    box, filter = (left, top, left + width, top + height), Image.Resampling[mode.upper()]
    return to_tensor(pixels.crop(box).resize(size[::-1], filter))


def statistics_of(args):
    """(mean, std) of each channel by the flags of a training, see `find_statistics`."""
    return find_statistics(vars(args), args.in_chans)


@functools.cache  # a copy to a GPU for each batch would wait for it
def statistics_on(device, statistics):
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in statistics)


def normalize(imgs, statistics=None):
    """uint8 (N, C, H, W) -> float32 without the (mean, std) of each channel, those of ImageNet if None."""
    mean, std = statistics_on(imgs.device, statistics or find_statistics({}, imgs.shape[1]))
    return (imgs / 255 - mean) / std


def denormalize(imgs, statistics=None):
    """The inverse of `normalize`, clipped: float (N, C, H, W) -> uint8."""
    mean, std = statistics_on(imgs.device, statistics or find_statistics({}, imgs.shape[1]))
    return ((imgs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
