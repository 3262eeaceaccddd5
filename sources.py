"""What a path leads to: a folder of images or of archives, archives, a list, tables or arrays."""

import collections
import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils import log

SEPARATOR = ";"  # of several values in a label
UNSUPPORTED_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS"}  # Pillow has no decoder; for EPS it starts Ghostscript
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
ALL_SPLITS = (*SPLITS["train"], *SPLITS["val"])
KINDS = {".tar": "archive", ".zip": "archive", ".csv": "list", ".tsv": "list"}
KINDS |= {".parquet": "table", ".arrow": "table", ".npy": "array", ".npz": "array"}


class Options(NamedTuple):
    """How images are read: names of columns, where indexes are kept, see `index`, and the range of gray values."""

    path_column: str = "path"
    image_column: str = "image"
    label_column: str = "label"
    split_column: str = "split"
    index_dir: str | None = None
    pixel_range: tuple | None = None  # see `images.scale_to_8_bits`


DEFAULTS = Options()


def options_of(args):
    return Options(**{name: value for name, value in vars(args).items() if name in Options._fields})


def add_source_args(add):
    """The flags of how a source of images is read."""
    columns = {
        "path": "paths of images in a CSV or TSV list",
        "image": "images in a Parquet or Arrow table",
        "label": "labels, several titles joined by commas; and key of the class in webdataset's .json",
        "split": "splits: train or val",
    }
    for name, content in columns.items():
        default = getattr(DEFAULTS, f"{name}_column")
        add(f"--{name}_column", default=default, metavar="NAME", help=f"column of {content}")
    kept = "where the index of a large data set is kept; None: beside the data, else in ~/.cache"
    add("--index_dir", metavar="FOLDER", help=kept)


@functools.cache
def find_formats():
    """The names of the formats that Pillow decodes within this process, in the order in which it tries them."""
    Image.preinit()  # the usual ones first
    Image.init()
    return [name for name in Image.ID if name not in UNSUPPORTED_FORMATS]


@functools.cache
def image_extensions():
    """The suffixes of files that hold an image, in lower case."""
    readable, names = find_formats(), Image.registered_extensions()
    return frozenset(extension for extension, name in names.items() if name in readable) | {".npy"}


def in_one_line(text):
    """The text with all that does not print as escapes, such as \\n: a file's name may hold any."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shorten(words):
    return ", ".join(words[:4]) + ", ..." * (len(words) > 4)


# ---------------------------------------------------------------- what a path leads to


class Source(NamedTuple):
    """kind: folder (of images, or of archives), archive, list, table, array. files: in root; none for a folder."""

    kind: str
    root: str
    files: tuple = ()
    split: str = ""

    def __str__(self):
        return os.path.join(self.root, self.files[0]) if len(self.files) == 1 else self.root


def find_source(path, split, needed):
    """The `Source` of a split ("train", "val" or "") of a path. needed: the path has to have such a part.

    Raises FileNotFoundError or NotADirectoryError with the path that was tried.
    """
    root, suffix = Path(path), Path(path).suffix.lower()
    if "{" in root.name and not root.exists():
        return Source("archive", str(root.parent), tuple(expand_braces(root.name)))
    if root.is_file():
        if suffix not in KINDS:
            raise NotADirectoryError(root)
        if split == "val" and (KINDS[suffix] == "archive" or suffix == ".npy"):  # such a file has one split
            raise FileNotFoundError(root / split)
        return Source(KINDS[suffix], str(root.parent), (root.name,), split)
    if split:
        names = [f"{name}{suffix}" for name in SPLITS[split] if name != "test" for suffix in ("", *KINDS)]
        found = next((root / name for name in names if (root / name).exists()), None)
        if found is not None:
            report_unused_folders(root, found.name)
            return find_source(found, "", False)
        if files := find_mnist(root, split):
            return Source("array", str(root), files)
    if tables := list_tables(root, split):
        return Source("table", str(root), *tables)
    if needed and split or not root.exists():
        raise FileNotFoundError(root / split if needed else root)
    return Source("folder", str(root))


def report_unused_folders(root, used):
    beside = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    beside = sorted(name for name in beside if name.lower() not in ALL_SPLITS and name != used)
    if beside:
        log(f"{root}: {used} is used; not {shorten(beside)} beside it")


def find_mnist(root, split):
    """MNIST's files of images and labels in a folder, packed or not, or ()."""
    stem = "train" if split == "train" else "t10k"
    for folder, suffix in itertools.product(("", "raw/", "MNIST/raw/"), ("", ".gz")):
        files = tuple(f"{folder}{stem}-{what}-ubyte{suffix}" for what in ("images-idx3", "labels-idx1"))
        if all((root / file).exists() for file in files):
            return files
    return ()


def list_tables(root, split):
    """(files, split to choose by a column) of Parquet and Arrow files as Hugging Face's hub and library have them."""
    if (root / "state.json").exists():  # of save_to_disk: the files that count
        return tuple(file["filename"] for file in json.loads((root / "state.json").read_text())["_data_files"]), split
    found = [path for path in [*root.glob("*"), *root.glob("data/*")] if KINDS.get(path.suffix) == "table"]
    files = collections.defaultdict(list)
    for path in sorted(found):
        files[re.match(r"[a-z]*", path.name)[0]].append(str(path.relative_to(root)))
    for name in SPLITS.get(split, ()):
        if name in files:
            return tuple(files[name]), ""
    return (tuple(sorted(itertools.chain(*files.values()))), split) if files and not files.keys() & ALL_SPLITS else ()


def expand_braces(text):
    """The names of a pattern such as train-{000000..000146}.tar or {a,b}.tar."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    first, dots, last = match[1].partition("..")
    choices = match[1].split(",")
    if dots and first.isdigit() and last.isdigit():
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return sum((expand_braces(text[: match.start()] + choice + text[match.end() :]) for choice in choices), [])
