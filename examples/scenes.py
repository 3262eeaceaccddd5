"""An embedded data set of scenes: scikit-learn's digits on crops of its photographs, in the layouts that people have.

    python -m examples.scenes FOLDER

    FOLDER/unlabelled/0000.png ...      for FCMAE
    FOLDER/train/images/0000.png ...    FOLDER/val/images/...
    FOLDER/train/masks/0000.png ...     class of each pixel: 0 background, 1 + digit, or 1 with --one_class
    FOLDER/train/annotations.json       COCO: boxes and masks (run lengths), category 1 + digit

Training scenes use the left two thirds of the photographs and the digits of `image_sets.Digits`' training part;
validation scenes the right third and the held-out digits. A scene is a function of (seed, number).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import flags
from image_sets import Digits

SIDE = 128  # pixels of a scene
DIGIT_SIDES = (24, 48)  # range of a digit's side


def draw_background(rng, photographs):
    """A random square crop (SIDE, SIDE, 3) float of a photograph, mirrored half of the time."""
    photograph = photographs[rng.integers(len(photographs))]
    side = rng.integers(SIDE // 2, min(photograph.shape[:2]) + 1)
    top, left = (rng.integers(length - side + 1) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side]).resize((SIDE, SIDE), Image.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float32)
    return pixels[:, ::-1] if rng.integers(2) else pixels


def draw_scene(rng, photographs, digits):
    """A scene (SIDE, SIDE, 3) uint8, and for each of its 1 to 4 digits its class and its mask (SIDE, SIDE) bool."""
    pixels, taken, objects = draw_background(rng, photographs).copy(), np.zeros((SIDE, SIDE), bool), []
    for _ in range(rng.integers(1, 5)):
        number, side = rng.integers(len(digits)), rng.integers(*DIGIT_SIDES)
        top, left = rng.integers(0, SIDE - side, 2)
        area = np.s_[top : top + side, left : left + side]
        if taken[area].any():
            continue
        taken[area] = True
        digit = Image.fromarray(digits.arrays[number]).resize((side, side), Image.BICUBIC)
        ink = np.asarray(digit, dtype=np.float32)[:, :, None] / 255
        bright = pixels[area].mean() < 128
        color = rng.uniform(170, 255, 3) if bright else rng.uniform(0, 80, 3)
        pixels[area] = pixels[area] * (1 - ink) + color * ink
        mask = np.zeros((SIDE, SIDE), bool)
        mask[area] = ink[:, :, 0] > 0.5
        objects.append((1 + int(digits.targets[number]), mask))
    return pixels.round().astype(np.uint8), objects


def encode_mask(mask):
    """COCO's uncompressed run lengths of a mask (H, W), column by column, the first of zeros."""
    values = np.concatenate([[False], mask.flatten(order="F")])
    changes = np.flatnonzero(values[1:] != values[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def annotate(objects, image_id, first_id):
    """COCO's annotations of a scene."""
    annotations = []
    for number, (category, mask) in enumerate(objects):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        annotation = dict(id=first_id + number, image_id=image_id, category_id=category, bbox=list(map(int, box)))
        annotations.append(annotation | dict(area=int(mask.sum()), iscrowd=0, segmentation=encode_mask(mask)))
    return annotations


def draw_scenes(count, train, seed, part):
    """Yield the name of the file, pixels and objects of each scene, from the photographs' part to train or validate."""
    from sklearn.datasets import load_sample_images

    photographs, digits = load_sample_images().images, Digits(train, in_chans=1)
    split = photographs[0].shape[1] * 2 // 3
    photographs = [photograph[:, :split] if train else photograph[:, split:] for photograph in photographs]
    for number in range(count):
        yield f"{number:04}.png", *draw_scene(np.random.default_rng((seed, number, part)), photographs, digits)


def write_split(folder, count, train, seed, one_class=False):
    """Images, masks and annotations of one split. one_class: all digits are category 1."""
    categories = [dict(id=1 + i, name=name) for i, name in enumerate(["digit"] if one_class else "0123456789")]
    coco = dict(images=[], annotations=[], categories=categories)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image_id, (name, pixels, objects) in enumerate(draw_scenes(count, train, seed, int(train)), start=1):
        objects = [(1 if one_class else category, mask) for category, mask in objects]
        classes = np.zeros((SIDE, SIDE), np.uint8)
        for category, mask in objects:
            classes[mask] = category
        Image.fromarray(pixels).save(folder / "images" / name)
        Image.fromarray(classes).save(folder / "masks" / name)
        coco["images"].append(dict(id=image_id, file_name=name, height=SIDE, width=SIDE))
        coco["annotations"] += annotate(objects, image_id, len(coco["annotations"]) + 1)
    (folder / "annotations.json").write_text(json.dumps(coco))


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where to write")
    add("--unlabelled", default=2000, type=flags.at_least(0), help="scenes without labels")
    add("--train", default=100, type=flags.at_least(1), help="labelled scenes for training")
    add("--val", default=100, type=flags.at_least(1), help="labelled scenes for validation")
    add("--one_class", default=False, action=flags.Switch, help="all digits are one class: an easier task")
    add("--seed", default=0, type=flags.at_least(0), help="seed of all scenes")
    return parser


def main(args):
    folder = Path(args.folder)
    (folder / "unlabelled").mkdir(parents=True, exist_ok=True)
    for name, pixels, _ in draw_scenes(args.unlabelled, True, args.seed, part=2):
        Image.fromarray(pixels).save(folder / "unlabelled" / name)
    write_split(folder / "train", args.train, True, args.seed, args.one_class)
    write_split(folder / "val", args.val, False, args.seed, args.one_class)
    print(f"{args.unlabelled} unlabelled scenes, {args.train} to train and {args.val} to validate: {folder}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
