"""A small labelled data set: crops of pictures, by default of those that come with scikit-image and scikit-learn.

    pip install scikit-image
    python -m examples.crops FOLDER
    python -m examples.crops FOLDER --pictures PHOTOGRAPHS --unlabelled 3000 --side 128 --cut 128 384
    python -m examples.crops FOLDER --pictures page text --turns --gray

    FOLDER/unlabelled/000000.png ...        for FCMAE
    FOLDER/train/CLASS/000000.png ...       FOLDER/val/CLASS/...

A class is a picture: by default one of 17 photographs, textures and micrographs, of which 7 are gray, so color alone
does not tell them apart. With --turns it is how far a crop is turned, counterclockwise. Crops for training, with and
without labels, are of the left two thirds of a picture, those to validate of the right third. A crop is a square of
--cut pixels, resized to --side, and a function of (seed, class, number).
"""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

import flags
from utils import UserError

GRAY = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon")
COLOR = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
OTHERS = ("china", "flower", "motorcycle")  # two of scikit-learn, and one of a stereo pair
TURNS = (0, 90, 180, 270)  # degrees


def load_picture(name):
    """Pixels of a picture that comes with scikit-image or scikit-learn. Raises UserError if there is none."""
    from sklearn.datasets import load_sample_image

    try:
        from skimage import data
    except ModuleNotFoundError:
        raise UserError("examples.crops: needs scikit-image: pip install scikit-image") from None
    if name in ("china", "flower"):
        return load_sample_image(f"{name}.jpg")
    if name == "motorcycle":
        return data.stereo_motorcycle()[0]
    if name not in (*GRAY, *COLOR, "page", "text"):
        raise UserError(f"--pictures {name}: no such folder; names: page, text, {', '.join(GRAY + COLOR + OTHERS)}")
    return getattr(data, name)()


def load_pictures(names):
    """{class: RGB image}, sorted. names: for `load_picture`, or folders of pictures. Raises UserError for others."""
    pictures = {}
    for name in names:
        files = sorted(path for path in Path(name).iterdir() if path.is_file()) if Path(name).is_dir() else [name]
        if not files:
            raise UserError(f"--pictures {name}: has no pictures")
        for path in files:
            try:
                picture = Image.open(path) if path != name else Image.fromarray(load_picture(name))
                picture, title = picture.convert("RGB"), Path(path).stem
            except OSError as error:
                raise UserError(f"--pictures: {path}: {error}") from None
            if title in pictures:
                raise UserError(f"--pictures: {path}: another picture has this name too; rename one of them")
            pictures[title] = picture
    return dict(sorted(pictures.items()))


def draw_crop(rng, picture, train, side, cut):
    """A random crop (side, side) of the part of a picture for training, or of that for validation."""
    split = picture.width * 2 // 3
    left, right = (0, split) if train else (split, picture.width)
    length = int(rng.integers(cut[0], cut[1] + 1))
    x, y = rng.integers(left, right - length + 1), rng.integers(picture.height - length + 1)
    return picture.resize((side, side), Image.BICUBIC, (x, y, x + length, y + length))


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where to write")
    known = "folders of pictures, or names of those that come with scikit-image; None: 17 of them"
    add("--pictures", nargs="+", metavar="FOLDER", help=known)
    add("--turns", default=False, action=flags.Switch, help="a class is one of four quarter turns, not a picture")
    add("--gray", default=False, action=flags.Switch, help="write gray images")
    add("--side", default=64, type=flags.at_least(1), help="pixels of a written crop")
    add("--cut", default=(48, 96), type=flags.at_least(1), nargs=2, help="range of its side in the picture, in pixels")
    add("--unlabelled", default=2000, type=flags.at_least(0), help="crops without labels")
    add("--train", default=10, type=flags.at_least(1), help="labelled crops of each class for training")
    add("--val", default=30, type=flags.at_least(1), help="labelled crops of each class for validation")
    add("--seed", default=0, type=flags.at_least(0), help="seed of all crops")
    return parser


def main(args):
    folder, pictures = Path(args.folder), load_pictures(args.pictures or GRAY + COLOR + OTHERS)
    for name, picture in pictures.items():
        most = min(picture.width - picture.width * 2 // 3, picture.height)
        if not args.cut[0] <= args.cut[1] <= most:
            problem = f"must be at most {most}, a third of the width of {name} or its height; the smaller first"
            raise UserError(f"--cut {args.cut[0]} {args.cut[1]}: {problem}")
    sources, classes = [], {}  # pictures and how far they are turned
    for name, turn in itertools.product(pictures, TURNS if args.turns else (0,)):
        sources.append((pictures[name], turn))
        classes.setdefault(f"{turn:03}" if args.turns else name, []).append(sources[-1])

    def write(folder, sources, count, train, *key):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (picture, turn) in zip(range(count), itertools.cycle(sources), strict=False):
            crop = draw_crop(np.random.default_rng((args.seed, *key, number)), picture, train, args.side, args.cut)
            crop.rotate(turn).convert("L" if args.gray else "RGB").save(folder / f"{number:06}.png")

    for label, (title, ours) in enumerate(classes.items()):
        write(folder / "train" / title, ours, args.train, True, 0, label)
        write(folder / "val" / title, ours, args.val, False, 1, label)
    write(folder / "unlabelled", sources, args.unlabelled, True, 2)
    labelled = f"{args.train} to train and {args.val} to validate of each of {len(classes)} classes"
    print(f"{args.unlabelled} unlabelled crops, {labelled}: {folder}")


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
