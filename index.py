"""The index of a data set: which images it has and where they lie, listed once, mapped by all processes.

The index of a large source is kept beside the data, else in ~/.cache, or in --index_dir; that of a small one in memory:

    .index/NAME-KEY-DIGEST/       the key is of all that a list depends on, the digest of what was found
        meta.json                 version, parts and their sizes and times (a stale index is noticed), class names
        part.npy                  (n,) uint32, the folder or file that holds an image
        target.npy                (n,) int32, its class; -1: none
        names.npy, name_end.npy   (bytes,) uint8 and (n,) uint64: its name within the part
        offset.npy, size.npy      (n,) uint64 and uint32, where it lies in an archive, or its row in a table

Images are in the order of torchvision's ImageFolder, by class, folder and name, whatever the source: an epoch has the
same order, and a run resumes, if folders become archives.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shards import DEFLATED, THREADS, Group, list_source, state_of
from sources import DEFAULTS, image_extensions
from tables import OPEN_FILES, open_table
from utils import log

VERSION = 1
KEPT_FROM = 50_000  # images: a shorter list is made faster than it is read
RECENT = 50_000_000  # nanoseconds: a folder that changed so shortly before may change again at the same time


class Index:
    """Where the images of a source lie: `name(i)`, `read(i)`, `target` (n,), `class_names`, `digest`.

    columns: as above; None: mapped from `folder`.
    """

    def __init__(self, source, options, meta, columns=None, folder=None):
        if columns is None:
            columns = {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}
        self.source, self.options, self.meta, self.folder = source, options, meta, folder
        self.columns = {name: np.asarray(column) for name, column in columns.items()}
        self.part, self.target, self.names, self.name_end, self.offset, self.size = (
            self.columns.get(name) for name in ("part", "target", "names", "name_end", "offset", "size")
        )
        self.class_names, self.digest, self.parts = meta["class_names"], meta["digest"], meta["parts"]
        self.descriptors = {}  # of archives, by part; a fork shares them safely, as `pread` moves no position

    def __reduce__(self):
        return Index, (self.source, self.options, self.meta, None if self.folder else self.columns, self.folder)

    def __len__(self):
        return len(self.part)

    def path_in_part(self, index):
        start = self.name_end[index - 1] if index else 0
        return os.fsdecode(self.names[int(start) : int(self.name_end[index])].tobytes())

    def name(self, index):
        part = "" if self.source.kind == "list" else self.parts[self.part[index]][0]
        return os.path.join(self.source.root, part, self.path_in_part(index))

    def read(self, index):
        """The bytes of an image. Raises OSError or ValueError."""
        kind = self.meta["kind"]
        if kind == "table":
            path = os.path.join(self.source.root, self.parts[self.part[index]][0])
            return open_table(path).read_image(int(self.offset[index]), self.options.image_column)
        if kind == "archive":
            data = self.read_member(int(self.part[index]), int(self.offset[index]), int(self.size[index]))
        else:
            data = read_file(self.name(index))
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data  # as 26 images of ImageNet-22K are

    def read_member(self, part, offset, size):
        data = os.pread(self.open_part(part), size, offset & ~DEFLATED)
        if len(data) < size:
            raise OSError(f"{self.parts[part][0]} is cut short")
        return zlib.decompress(data, -15) if offset & DEFLATED else data

    def prefetch(self, start, stop):
        """Have the system read these images of archives, in one piece, ahead of their use."""
        if self.meta["kind"] != "archive":
            return
        first, parts = self.offset[start:stop] & np.uint64(DEFLATED - 1), self.part[start:stop]
        end = first + self.size[start:stop]
        for part in np.unique(parts):
            low, high = int(first[parts == part].min()), int(end[parts == part].max())
            with contextlib.suppress(OSError):  # reading them will name it
                os.posix_fadvise(self.open_part(int(part)), low, high - low, os.POSIX_FADV_WILLNEED)

    def open_part(self, part):
        """A descriptor of an archive, kept open; raises OSError if the file was changed after it was listed."""
        path, *state = self.parts[part][:3]
        if part not in self.descriptors:
            while len(self.descriptors) >= OPEN_FILES:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            self.descriptors[part] = os.open(os.path.join(self.source.root, path), os.O_RDONLY | os.O_CLOEXEC)
        if list(state_of(self.descriptors[part])) != state:
            raise OSError(f"{path} was changed after it was listed")
        return self.descriptors[part]


def read_file(path):
    """The bytes of a regular file: a FIFO would keep its reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return file.read()


def open_index(source, options=DEFAULTS, keep=False):
    """The `Index` of a source: the one that is kept, if it is not stale, else a new one.

    keep: also that of a small source. One process of a machine lists, others wait for it. Raises UserError for what
    cannot be listed.
    """
    import filelock

    places = index_places(source, options)
    index = find_index(source, options, places)
    if index is not None:
        return index
    lock = os.path.join(tempfile.gettempdir(), f"{places[-1].name}-{os.getuid()}.lock")
    with filelock.FileLock(lock):
        index = find_index(source, options, places, say=True)
        if index is None:
            index = build_index(source, options)
            if keep or len(index) >= KEPT_FROM:
                index = keep_index(index, places)
    return index


def index_places(source, options):
    """Paths of a kept index without its digest, the preferred first: FOLDER/NAME-KEY, of all that a list depends on."""
    root = os.path.realpath(source.root)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnextv2-index"
    folders = [Path(options.index_dir)] if options.index_dir else [Path(root) / ".index", cache]
    name = re.sub(r"[^\w.-]", "_", os.path.basename(source.files[0] if source.files else root))[:40]
    places = []
    for folder in folders:
        beside = "" if folder == Path(root) / ".index" else root  # where it is, it moves with the data
        key = json.dumps([1, beside, *source[2:], sorted(image_extensions()), options[:4]])  # 1: as indexes are out
        places.append(folder / f"{name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}")
    return places


def find_index(source, options, places, say=False):
    """The kept `Index` of a source, or None. say: delete one that is stale, and log why."""
    for path in (path for place in places for path in place.parent.glob(f"{place.name}-*")):
        try:
            meta = json.loads((path / "meta.json").read_text())
            version = meta.get("version", 1)
            if version == VERSION and is_current(source.root, meta["parts"]):
                return Index(source, options, meta, folder=path)
            reason = "the images have changed" if version == VERSION else f"of version {version}, not {VERSION}"
        except (OSError, EOFError, ValueError, KeyError) as error:
            reason = str(error)
        if say:
            log(f"{path} is stale ({reason}): the images are listed anew")
            shutil.rmtree(path, ignore_errors=True)
    return None


def is_current(root, parts):
    """Whether all parts are as they were when they were listed."""

    def check(share):
        return all(part[3] and list(state_of(os.path.join(root, part[0]))) == part[1:3] for part in share)

    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(check, (parts[number::THREADS] for number in range(THREADS))))


def build_index(source, options):
    """List a source: its `Index`, in memory, in ImageFolder's order; labels that are numbers in theirs."""
    started = time.time_ns()
    listing = list_source(source, options)
    labels = {group.label for group in listing.groups} - {None}
    class_names = listing.class_names or (sort_labels(labels) if listing.labelled else sorted(labels))
    numbers = {label: number for number, label in enumerate(class_names)} | {None: -1}

    def key(group):
        return numbers[group.label], group.folder

    groups = [merge(list(same)) for _, same in itertools.groupby(sorted(listing.groups, key=key), key)]
    columns = build_columns(groups, [numbers[group.label] for group in groups])
    digest = hashlib.blake2b(json.dumps([class_names, *[group[:2] for group in groups]]).encode(), digest_size=16)
    for name in sorted(columns.keys() - {"part"}):
        digest.update(columns[name])
    kind = "archive" if source.kind == "folder" and "offset" in columns else source.kind
    # What changed just before may change once more without a new time
    parts = [[*part, part[2] < started - RECENT] for part in listing.parts]
    meta = dict(version=VERSION, kind=kind, parts=parts, class_names=class_names, same=listing.same)
    seconds = time.monotonic() - listing.start
    if seconds > 2:
        log(f"listed {source}: {len(columns['part']):,} images in {seconds:.1f} s")
    return Index(source, options, meta | {"digest": digest.hexdigest()}, columns)


def sort_labels(labels):
    """Labels in their order: of numbers if all are whole ones, else by name."""
    whole = all(re.fullmatch(r"\d{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label) if whole else 0, label))


def merge(groups):
    """One group of several of the same class and folder, by file name; its part is then an array."""
    if len(groups) == 1:
        return groups[0]
    names = [name for group in groups for name in group.names.split("\0")]
    order = sorted(range(len(names)), key=lambda i: os.path.basename(names[i]))
    parts = np.concatenate([np.full(group.names.count("\0") + 1, group.part) for group in groups])[order]
    places = None if groups[0].places is None else np.concatenate([group.places for group in groups])[order]
    return Group(*groups[0][:2], parts, "\0".join(names[i] for i in order), places)


def build_columns(groups, targets):
    """The columns of an index: the images of these groups, each with its target, one after the other."""
    names = np.frombuffer(os.fsencode("\0".join(group.names for group in groups)), dtype=np.uint8)
    ends = np.append(np.flatnonzero(names == 0), len(names)) if groups else np.empty(0, dtype=np.int64)
    counts = [group.names.count("\0") + 1 for group in groups]
    parts = [np.broadcast_to(group.part, count) for group, count in zip(groups, counts, strict=True)]
    columns = {
        "part": np.concatenate([[], *parts], dtype=np.uint32, casting="unsafe"),
        "target": np.repeat(np.array(targets, dtype=np.int32), counts),
        "names": names[names != 0],
        "name_end": (ends - np.arange(len(ends))).astype(np.uint64),
    }
    if groups and groups[0].places is not None:
        columns["offset"] = np.concatenate([group.places[:, 0] for group in groups])
        columns["size"] = np.concatenate([group.places[:, 1] for group in groups]).astype(np.uint32)
    return columns


def keep_index(index, places):
    """Write an index to the first place that can be written, and return it as mapped from there; else as it is."""
    root = index.source.root
    for place in places:
        final = place.with_name(f"{place.name}-{index.digest[:16]}")
        try:
            before = state_of(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            if index.parts and index.parts[0][:3] == ["", *before]:  # our own change of the folder that was listed
                index.parts[0][1:3] = state_of(root)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as temporary:
                os.chmod(temporary, 0o755)
                for name, column in index.columns.items():
                    np.save(f"{temporary}/{name}.npy", column)
                Path(temporary, "meta.json").write_text(json.dumps(index.meta))
                for path in Path(temporary).iterdir():
                    with open(path) as file:
                        os.fsync(file.fileno())
                shutil.rmtree(final, ignore_errors=True)
                os.rename(temporary, final)
            return Index(index.source, index.options, index.meta, folder=final)
        except OSError as error:
            log(f"the index is not kept in {place.parent}: {error.strerror or error}")
    return index
