"""timm's AutoAugment and RandAugment on batches of uint8, on any device: timm draws, Pillow's pixels result.

A loader worker only notes what a policy would do to each image (`on_tensors`), and sorts the notes of a batch by
operation (`sort_notes`). On the device `augment` does each operation to all its images at once, and never waits for it.
All is Pillow's bit for bit but shifts and rotations: in float32 instead of float64 single values are one level off,
which an operation after it may enlarge.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from PIL import Image

from images import to_pillow, to_tensor

# ---------------------------------------------------------------- in the loader


class Notes(list):
    """What a policy would do to an image of (height, width): [((operation, *options), amounts), ...], up to 2 amounts.

    timm takes it for a Pillow image: its operations that move pixels call these methods; for all others see `note`.
    """

    def __init__(self, size):
        self.size = size[::-1]  # as Pillow has it

    def transform(self, size, method, matrix, fillcolor, resample):
        a, b, c, d, e, f = matrix  # (x, y) is read at (a x + b y + c, d x + e y + f)
        axis, amounts = (3, (b, c)) if (d, e, f) == (0, 1, 0) else (2, (d, f))
        return note("shift", self, *amounts, options=(axis, fillcolor, resample))

    def rotate(self, degrees, fillcolor, resample):
        angle = math.radians(degrees)
        return note("rotate", self, math.cos(angle), math.sin(angle), options=(fillcolor, resample))


def note(operation, notes, *amounts, options=(), **_):
    notes.append(((operation, *options), amounts))
    return notes


def on_tensors(transforms):
    """timm's flips, jitter and policy as transforms of uint8 (C, H, W), of which the last adds the image's `Notes`.

    Only what is not here, such as blur, is left to Pillow.
    """
    from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip

    steps, policy = [], None
    for transform in transforms:
        if isinstance(transform, RandomHorizontalFlip | RandomVerticalFlip):
            steps.append(transform)
        elif makes_notes(transform):
            policy = transform  # timm's last
        else:
            steps += [to_pillow, transform, to_tensor]
    return [*steps, functools.partial(take_notes, policy)]


def makes_notes(policy):
    """Whether all operations of a policy are here: then it is changed to take `Notes`, not images."""
    from timm.data import auto_augment

    operations = list(getattr(policy, "ops", ()) or itertools.chain(*getattr(policy, "policy", ())))
    names = [operation.name.removesuffix("Increasing").removesuffix("Original") for operation in operations]
    is_sequence = isinstance(policy, auto_augment.RandAugment | auto_augment.AutoAugment)
    is_known = is_sequence and all(name in OPERATIONS or name.startswith(MOVES) for name in names)
    for operation, name in zip(operations, names, strict=True):
        if is_known and name in OPERATIONS:
            operation.aug_fn = functools.partial(note, name)
        elif name == "Posterize":
            operation.aug_fn = posterize_image
    return is_known


def take_notes(policy, img):
    notes = Notes(img.shape[1:])
    return img, policy(notes) if policy else notes


def posterize_image(image, bits, **_):
    """timm's operation, also for the 0 bits that it may draw, which Pillow from 13 on refuses."""
    from timm.data import auto_augment

    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def sort_notes(batch):
    """The `Notes` of N images as (rounds, numbers), for `augment`; in a round each image has one operation at most.

    A round is [((operation, *options), number of images), ...]. numbers (rounds, 4, N) float64: the order of the images
    that it needs, the order that restores theirs, and their two amounts in the former.
    """
    rounds, numbers = [], torch.zeros(max(map(len, batch), default=0), 4, len(batch), dtype=torch.float64)
    for turn, rows in enumerate(numbers):
        notes = [notes[turn] if turn < len(notes) else (("keep",), ()) for notes in batch]
        order = sorted(range(len(batch)), key=lambda i: notes[i][0])
        rows[0], rows[1] = torch.tensor(order), torch.tensor(order).argsort()
        rows[2:] = torch.tensor([(*notes[i][1], 0, 0)[:2] for i in order], dtype=torch.float64).T
        groups = itertools.groupby(notes[i][0] for i in order)
        rounds.append([(operation, len(list(group))) for operation, group in groups])
    return rounds, numbers


# ---------------------------------------------------------------- on the device


def augment(imgs, rounds, numbers):
    """uint8 (N, C, H, W), channels last in memory, changed by what `sort_notes` gave; numbers are on their device."""
    imgs = imgs.permute(0, 2, 3, 1)  # as in memory, where an image is one piece
    for groups, (order, back, *amounts) in zip(rounds, numbers, strict=True):
        counts = [count for _, count in groups]
        parts = imgs.index_select(0, order.long()).permute(0, 3, 1, 2).split(counts)
        parts = zip(groups, parts, torch.stack(amounts)[..., None, None, None].split(counts, 1), strict=True)
        parts = [OPERATIONS[name](part, amounts, *options) for ((name, *options), _), part, amounts in parts]
        imgs = torch.cat([part.permute(0, 2, 3, 1) for part in parts]).index_select(0, back.long())
    return imgs.permute(0, 3, 1, 2)


# Operations: uint8 (n, C, H, W) of 1 or 3 channels, amounts (2, n, 1, 1, 1) float64 -> uint8 (n, C, H, W)


def keep(imgs, _):
    return imgs


def invert(imgs, _):
    return ~imgs


def posterize(imgs, bits):
    return imgs & (255 << (8 - bits[0].int()).clamp(min=0)).byte()  # timm may draw more than 8 bits: all of them


def solarize(imgs, threshold):
    return imgs ^ (imgs >= threshold[0].short()).byte() * 255


def solarize_add(imgs, amount):
    return imgs + (imgs < 128) * amount[0].byte()  # at most 128


def blend(a, b, factor):
    """a where the factor is 0, b where it is 1, beyond b where it is larger: as Pillow cuts decimals off."""
    return (b - a).mul_(factor[0].float()).add_(a).clamp_(0, 255).byte()


def to_gray(pixels):
    """float (n, C, H, W) -> (n, 1, H, W), Pillow's whole numbers."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, 1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).mul_(2**-16).floor_()


def brightness(imgs, factor):
    return blend(0, imgs.float(), factor)


def color(imgs, factor):
    pixels = imgs.float()
    return blend(to_gray(pixels), pixels, factor)


def contrast(imgs, factor):
    pixels = imgs.float()
    mean = to_gray(pixels).sum((1, 2, 3), keepdim=True, dtype=torch.float64) / pixels[0, 0].numel()
    return blend((mean + 0.5).floor().float(), pixels, factor)


def sharpness(imgs, factor):
    """Blend with the means of 3 x 3 pixels in which the center counts 5 times; the border stays."""
    pixels = imgs.float()
    smooth, center = pixels.clone(), pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(center, alpha=4)
    smooth[..., 1:-1, 1:-1] = total.mul_(1 / 13).add_(0.5).floor_()
    return blend(smooth, pixels, factor)


def auto_contrast(imgs, _):
    values = imgs.contiguous().flatten(2)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    levels = torch.arange(256, dtype=torch.float64, device=imgs.device)
    scale = levels[255] / (high - low)  # 255 / would multiply by the inverse, which rounds otherwise
    tables = torch.where(high > low, levels * scale + -low * scale, levels).clamp(0, 255).byte()
    return tables.gather(2, values.long()).view(imgs.shape)


def equalize(imgs, _):
    from torchvision.transforms.v2 import functional

    return functional.equalize(imgs)


# Moves: the pixel (x, y), whose center is (x + 0.5, y + 0.5), gets the value at another place


def count_along(imgs, axis, start=0, extra=0):
    """int32 from start to (the length of an axis of (n, C, H, W)) + extra, to broadcast with the images."""
    numbers = torch.arange(start, imgs.shape[axis] + extra, dtype=torch.int32, device=imgs.device)
    return numbers.view([-1 if i == axis else 1 for i in range(4)])


def find_taps(places, resample):
    """The whole numbers below places, int32, and the weights of the four pixels from one before them on.

    resample: Pillow's BILINEAR, or else BICUBIC.
    """
    whole = places.floor()
    d = (places - whole).float()
    if resample == Image.Resampling.BILINEAR:
        return whole.int(), [torch.zeros_like(d), 1 - d, d, torch.zeros_like(d)]
    d2, d3 = d * d, d * d * d
    return whole.int(), [2 * d2 - d3 - d, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2]


def is_outside(pixels, length):
    return pixels != pixels.clamp(0, length - 1)


def finish(pixels, outside, fill):
    """float (n, C, H, W) -> uint8, as Pillow cuts decimals off; the color `fill` (C,) where outside (n, 1, H, W)."""
    imgs = pixels.add_(1e-3).clamp_(0, 255).byte()  # what is whole in float64 may be less in float32
    for plane, level in zip(imgs.split(1, 1), fill, strict=True):
        plane.masked_fill_(outside, level)
    return imgs


def shift(imgs, amounts, axis, fill, resample):
    """Shear or translate: (x, y) gets the value at (x + slope y + offset, y); axis 2: at (x, y + slope x + offset)."""
    slope, offset = amounts
    length, shifts = imgs.shape[axis], slope * (count_along(imgs, 5 - axis) + 0.5) + offset
    whole, weights = find_taps(shifts, resample)
    index = (whole + count_along(imgs, axis, -1, 2)).clamp_(0, length - 1)  # repeats the edges
    read = imgs.contiguous().gather(axis, index.long().expand(-1, imgs.shape[1], -1, -1)).float()
    pixels = torch.zeros(imgs.shape, device=imgs.device)
    for i, weight in enumerate(weights):
        pixels.addcmul_(read.narrow(axis, i, length), weight)
    nearest = (shifts + 0.5).floor().int() + count_along(imgs, axis)
    return finish(pixels, is_outside(nearest, length), fill)


def rotate(imgs, amounts, fill, resample):
    """Counterclockwise around the center, by the angle of which cosine and sine are given."""
    (cos, sin), (n, channels, height, width) = amounts, imgs.shape
    x, y = count_along(imgs, 3) + (0.5 - width / 2), count_along(imgs, 2) + (0.5 - height / 2)
    x, y = cos * x - sin * y + width / 2, sin * x + cos * y + height / 2
    outside = is_outside(x.floor().int(), width) | is_outside(y.floor().int(), height)
    (left, across), (top, down) = find_taps(x - 0.5, resample), find_taps(y - 0.5, resample)

    # Rows of pixels whose edges are repeated, in each place of memory four neighbors; first down, then across
    columns = count_along(imgs, 3, -2, 2).flatten().clamp_(0, width - 1)
    rows = imgs.permute(0, 2, 3, 1).index_select(2, columns).float().flatten()
    of_image = count_along(imgs, 0) * height
    tops = [(top + i).clamp_(0, height - 1) + of_image for i in (-1, 0, 1, 2)]
    index = torch.stack(tops, -1) * (width + 4) + (left.clamp_(-1, width - 1) + 1)[..., None]
    neighbors = weigh(rows.unfold(0, 4 * channels, channels), index, down)
    index = torch.arange(4 * len(neighbors), dtype=torch.int32, device=imgs.device)
    pixels = weigh(neighbors.view(-1, channels), index, across)
    return finish(pixels.view(n, height, width, channels).permute(0, 3, 1, 2), outside, fill)


def weigh(table, index, weights):
    """(M, D): sums of four rows of a table (R, D) each, by index (4 M) and four weights of M numbers."""
    weights = torch.stack(weights, -1).view(-1, 4)
    return F.embedding_bag(index.view(-1, 4), table, per_sample_weights=weights, mode="sum")


MOVES = ("Rotate", "Shear", "Translate")  # how timm's names of these begin
OPERATIONS = {"keep": keep, "shift": shift, "rotate": rotate, "Invert": invert, "Posterize": posterize}
OPERATIONS |= {"Solarize": solarize, "SolarizeAdd": solarize_add, "AutoContrast": auto_contrast, "Equalize": equalize}
OPERATIONS |= {"Brightness": brightness, "Color": color, "Contrast": contrast, "Sharpness": sharpness}
