"""A small labelled data set: crops of photographs and textures that come with scikit-image and scikit-learn.

    pip install scikit-image
    python -m examples.crops FOLDER

    FOLDER/unlabelled/0000.png ...      for FCMAE
    FOLDER/train/CLASS/000.png ...      FOLDER/val/CLASS/...

A class is one of 17 photographs, textures and micrographs; 7 of them are gray, so color alone does not tell them
apart. Crops for training, with and without labels, are of the left two thirds, those to validate of the right third.
A crop is a square of 48 to 96 pixels, resized. It is a function of (seed, class, number).
"""

from pathlib import Path

import numpy as np
from PIL import Image

import flags
from utils import UserError

SIDE = 64  # pixels of a crop
GRAY = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon")
COLOR = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def load_pictures():
    """{class: RGB image}. Raises UserError without scikit-image."""
    from sklearn.datasets import load_sample_images

    try:
        from skimage import data
    except ModuleNotFoundError:
        raise UserError("examples.crops: needs scikit-image: pip install scikit-image") from None
    pictures = {name: getattr(data, name)() for name in GRAY + COLOR}
    pictures |= {"motorcycle": data.stereo_motorcycle()[0]}
    pictures |= dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    return {name: Image.fromarray(pixels).convert("RGB") for name, pixels in sorted(pictures.items())}


def draw_crop(rng, picture, train):
    """A random crop (SIDE, SIDE) of the part of a picture for training, or of that for validation."""
    split = picture.width * 2 // 3
    left, right = (0, split) if train else (split, picture.width)
    side = int(rng.integers(48, 97))
    x, y = rng.integers(left, right - side + 1), rng.integers(picture.height - side + 1)
    return picture.resize((SIDE, SIDE), Image.BICUBIC, (x, y, x + side, y + side))


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where to write")
    add("--unlabelled", default=2000, type=flags.at_least(0), help="crops without labels")
    add("--train", default=10, type=flags.at_least(1), help="labelled crops of each class for training")
    add("--val", default=30, type=flags.at_least(1), help="labelled crops of each class for validation")
    add("--seed", default=0, type=flags.at_least(0), help="seed of all crops")
    return parser


def main(args):
    folder, pictures = Path(args.folder), load_pictures()

    def write(path, key, picture, train):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_crop(np.random.default_rng((args.seed, *key)), picture, train).save(path)

    for split, name, count in ((0, "train", args.train), (1, "val", args.val)):
        for label, (title, picture) in enumerate(pictures.items()):
            for number in range(count):
                write(folder / name / title / f"{number:03}.png", (split, label, number), picture, name == "train")
    for number in range(args.unlabelled):
        picture = list(pictures.values())[number % len(pictures)]
        write(folder / "unlabelled" / f"{number:04}.png", (2, number), picture, True)
    labelled = f"{args.train} to train and {args.val} to validate of each of {len(pictures)} classes"
    print(f"{args.unlabelled} unlabelled crops, {labelled}: {folder}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
