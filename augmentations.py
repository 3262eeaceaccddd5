"""timm's AutoAugment and RandAugment on arrays (H, W, C) of uint8, to save time: timm draws, Pillow's pixels result.

Equal to Pillow's to rounding: at most one level, in a few of a hundred pixels. What is not here goes through Pillow.
"""

import itertools
import random
from functools import partial

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from images import to_pillow, to_tensor

LEVELS = np.arange(256)
GRAY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue


def on_tensors(transform):
    """timm's transform of Pillow images as a list of transforms of uint8 (C, H, W): a policy, a jitter, or a flip."""
    from timm.data import auto_augment
    from torchvision import transforms

    if isinstance(transform, transforms.RandomHorizontalFlip | transforms.RandomVerticalFlip):
        return [transform]
    if not isinstance(transform, auto_augment.RandAugment | auto_augment.AutoAugment):
        for operation in getattr(transform, "ops", ()):  # of AugMix, which blends Pillow images
            operation.aug_fn = posterize_image if "Posterize" in operation.name else operation.aug_fn
        return [to_pillow, transform, to_tensor]
    for operation in getattr(transform, "ops", None) or itertools.chain(*transform.policy):
        operation.aug_fn = find_operation(operation.name, operation.aug_fn)
    return [to_array, transform, from_array]


def find_operation(name, timms):
    """The operation of that name on arrays: array, amounts, fillcolor=, resample= -> array."""
    name = name.removesuffix("Increasing").removesuffix("Original")
    if name in OPERATIONS:
        return OPERATIONS[name]
    return partial(through_pillow, timms)


def to_array(pixels):
    return pixels.permute(1, 2, 0).contiguous().numpy()


def from_array(array):
    return torch.from_numpy(array).permute(2, 0, 1)


def through_pillow(operation, array, *amounts, **options):
    image = operation(Image.fromarray(array if array.shape[2] > 1 else array[:, :, 0]), *amounts, **options)
    return np.array(image).reshape(array.shape)


def posterize_image(image, bits, **_):
    """timm's operation, also for the 0 bits that it may draw, which Pillow from 13 on refuses."""
    from timm.data import auto_augment

    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


# ---------------------------------------------------------------- color


def look_up(array, table):
    """Each value replaced by the one at its place in a table (256,)."""
    changed = bytearray(array.tobytes()).translate(table.astype(np.uint8).tobytes())
    return np.frombuffer(changed, np.uint8).reshape(array.shape)


def blend(a, b, factor):
    """a where the factor is 0, b where it is 1, beyond b where it is larger: as Pillow cuts decimals off."""
    return (a + np.float32(factor) * (b - a)).clip(0, 255)


def invert(array, **_):
    return look_up(array, 255 - LEVELS)


def posterize(array, bits, **_):
    return look_up(array, LEVELS & (0xFF << (8 - bits))) if bits < 8 else array


def solarize(array, threshold, **_):
    return look_up(array, np.where(LEVELS < threshold, LEVELS, 255 - LEVELS))


def solarize_add(array, amount, **_):
    return look_up(array, np.where(LEVELS < 128, np.minimum(LEVELS + amount, 255), LEVELS))


def brightness(array, factor, **_):
    return look_up(array, blend(np.float32(0), LEVELS.astype(np.float32), factor))


def contrast(array, factor, **_):
    means = reduce_pixels(np.add, array) / array[:, :, 0].size
    gray = np.float32(np.floor((means @ GRAY if len(means) == 3 else means[0]) + 0.5))
    return look_up(array, blend(gray, LEVELS.astype(np.float32), factor))


def reduce_pixels(function, array):
    """A ufunc such as np.add reduced over all pixels (H, W, C) -> (C,); faster than over both axes at once."""
    dtype = np.int64 if function is np.add else None
    columns = function.reduce(array.reshape(len(array), -1), axis=0, dtype=dtype)
    return function.reduce(columns.reshape(-1, array.shape[2]), axis=0)


def auto_contrast(array, **_):
    low, high = (reduce_pixels(function, array).astype(np.float32) for function in (np.minimum, np.maximum))
    flat = high <= low
    scale = 255 / np.where(flat, 255, high - low)
    scale, low = (np.tile(x, array.shape[1]).astype(np.float32) for x in (scale, np.where(flat, 0, low)))
    rows = array.reshape(len(array), -1).astype(np.float32)
    return ((rows - low) * scale + np.float32(1e-3)).astype(np.uint8).reshape(array.shape)


def sharpness(array, factor, **_):
    """Blend with the means of 3 x 3 pixels in which the center counts 5 times; the border stays."""
    x = array.astype(np.int16)
    total = x[:-2] + x[1:-1] + x[2:]
    total = total[:, :-2] + total[:, 1:-1] + total[:, 2:] + 4 * x[1:-1, 1:-1]
    smooth = np.floor(total * np.float32(1 / 13) + np.float32(0.5))
    sharpened = array.copy()
    sharpened[1:-1, 1:-1] = blend(smooth, x[1:-1, 1:-1], factor)
    return sharpened


# ---------------------------------------------------------------- geometry

# How far to the right of each row's pixels their new values are read, (rows,), in pixels


def shear(amount, rows, width):
    return amount * (np.arange(rows) + 0.5)


def translate(amount, rows, width):
    return np.full(rows, float(amount))


def translate_by_fraction(amount, rows, width):
    return np.full(rows, amount * width)


def shift(array, amount, axis, law, fillcolor, resample):
    """Shear or translate along an axis, 0 the vertical one, as Pillow's transform does.

    resample: a filter of Pillow's, or several to draw from, as timm gives it.
    """
    resample = random.choice(resample) if isinstance(resample, list | tuple) else resample
    array = array if axis else transpose(array)
    shifted = shift_rows(array, law(amount, *array.shape[:2]), fillcolor, resample)
    return shifted if axis else transpose(shifted)


def transpose(array):
    """(H, W, C) -> (W, H, C), contiguous; by channels, as that is twice as fast."""
    turned = np.empty((array.shape[1], array.shape[0], array.shape[2]), array.dtype)
    for channel in range(array.shape[2]):
        turned[:, :, channel] = array[:, :, channel].T
    return turned


def shift_rows(array, shifts, fill, resample):
    """Each row of (R, W, C) uint8 read so many pixels further right: shifts (R,). What lies outside is `fill` (C,).

    resample: Pillow's BILINEAR, or else BICUBIC, with Pillow's kernels.
    """
    rows, width, channels = array.shape
    whole = np.floor(shifts)
    d = shifts - whole
    if resample == Image.Resampling.BILINEAR:
        first, weights = 0, [1 - d, d]
    else:
        first, weights = -1, [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]
    whole, nearest = (x.clip(-width, width).astype(np.int64) for x in (whole, np.floor(shifts + 0.5)))
    left, right = max(1 - whole.min(), 0), max(2 + whole.max(), 0)  # what is read beyond the edges repeats them
    edges = np.repeat(array[:, :1], left, axis=1), np.repeat(array[:, -1:], right, axis=1)
    padded = np.concatenate([edges[0], array, edges[1]], axis=1)
    starts = np.arange(rows) * padded.shape[1] + left + first + whole
    read = cut_out(padded.ravel(), starts * channels, (width + len(weights) - 1) * channels)
    read = torch.from_numpy(read).float()
    shifted = torch.full((rows, width * channels), 1e-3)  # as Pillow cuts decimals off, but of float64
    for i, weight in enumerate(weights):
        tap = read[:, i * channels : (i + width) * channels]
        shifted.addcmul_(tap, torch.from_numpy(weight.astype(np.float32))[:, None])
    shifted = shifted.numpy().clip(0, 255).astype(np.uint8)  # faster than torch's
    outside = cut_out(np.repeat([True, False, True], width * channels), (width + nearest) * channels, width * channels)
    np.copyto(shifted, np.tile(np.broadcast_to(np.uint8(fill), channels), width), where=outside)
    return shifted.reshape(array.shape)


def cut_out(line, starts, length):
    """(R, length): that much of a line (n,) from each start (R,)."""
    return sliding_window_view(line, length)[starts]


OPERATIONS = {
    "AutoContrast": auto_contrast,
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": partial(shift, axis=1, law=shear),
    "ShearY": partial(shift, axis=0, law=shear),
    "TranslateX": partial(shift, axis=1, law=translate),
    "TranslateY": partial(shift, axis=0, law=translate),
    "TranslateXRel": partial(shift, axis=1, law=translate_by_fraction),
    "TranslateYRel": partial(shift, axis=0, law=translate_by_fraction),
}
