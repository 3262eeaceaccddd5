"""Where images lie: folders, tar and zip files, lists and tables, listed once into an index that all processes map.

The index of a large source is kept beside the data, else in ~/.cache, or in --index_dir; that of a small one in memory:

    .index/NAME-KEY-DIGEST/       the digest is of the parts' sizes and times: a stale index is noticed
        meta.json                 version, parts, class names, digest of the list
        part.npy                  (n,) uint32, the folder or file that holds an image
        target.npy                (n,) int32, its class; -1: none
        names.npy, name_end.npy   (bytes,) uint8 and (n,) uint64: its name within the part
        offset.npy, size.npy      (n,) uint64 and uint32, where it lies in an archive, or its row in a table

Images are in the order of torchvision's ImageFolder, by class, folder and name, whatever the source: an epoch has the
same order, and a run resumes, if folders become archives.
"""

import collections
import contextlib
import csv
import functools
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
from typing import NamedTuple

import numpy as np

from utils import UserError, log

VERSION = 1
KEPT_FROM = 50_000  # images: a shorter list is made faster than it is read
THREADS = 16  # that wait for a file system
OPEN_FILES = 128  # archives that a process keeps open
RECENT = (
    50_000_000  # nanoseconds: a folder that changed so shortly before may change again at the same time of its clock
)
DEFLATED = np.uint64(1 << 63)  # in an offset: a compressed member of a zip file
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
ALL_SPLITS = (*SPLITS["train"], *SPLITS["val"])
ARCHIVES, LISTS, TABLES, ARRAYS = (".tar", ".zip"), (".csv", ".tsv"), (".parquet", ".arrow"), (".npy", ".npz")
KINDS = {
    suffix: kind
    for kind, suffixes in dict(archive=ARCHIVES, list=LISTS, table=TABLES, array=ARRAYS).items()
    for suffix in suffixes
}


class Options(NamedTuple):
    """How sources are read: the names of columns, and where indexes are kept (None: beside the data)."""

    path_column: str = "path"
    image_column: str = "image"
    label_column: str = "label"
    split_column: str = "split"
    index_dir: str | None = None


DEFAULTS = Options()


class Source(NamedTuple):
    """kind: folder (of images, or of archives), archive, list, table, array. files: in root; none for a folder."""

    kind: str
    root: str
    files: tuple = ()
    split: str = ""

    def __str__(self):
        return os.path.join(self.root, self.files[0]) if len(self.files) == 1 else self.root


class Group(NamedTuple):
    """Images of one class, folder and part, by name. offsets, sizes: None for files."""

    label: str | None
    folder: str
    part: int
    names: str  # joined by NUL
    offsets: np.ndarray | None = None
    sizes: np.ndarray | None = None


class Listing:
    """What listing a source finds. parts: [path relative to the root, size or -1 for a folder, time in ns]."""

    def __init__(self):
        self.parts, self.groups, self.left_out = [], [], []
        self.class_names, self.labelled = None, False  # names in their order; whether labels are not names of folders
        self.empty, self.same = set(), []  # class folders without an image; those that are one folder

    def add_part(self, root, path):
        self.parts.append([path, *state_of(root, path)])
        return len(self.parts) - 1

    def add(self, part, entries):
        """Add (label, name, offset, size) of a part's images."""
        groups = collections.defaultdict(list)
        for label, name, *place in entries:
            groups[label, os.path.dirname(name)].append((name.replace("\0", ""), *place))
        for (label, folder), members in groups.items():
            names, *places = zip(*sorted(members), strict=True)
            columns = [np.array(column, dtype=np.uint64) for column in places]
            self.groups.append(Group(label, folder, part, "\0".join(names), *columns))


def state_of(root, path):
    """Size (-1: a folder) and time of change of a part."""
    status = os.stat(os.path.join(root, path))
    return -1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


class Progress:
    """A line with the rate and the time left, after two seconds and then every ten."""

    def __init__(self, source):
        self.source, self.start, self.next, self.images, self.done = source, time.monotonic(), 2.0, 0, 0

    def track(self, results, total, count):
        """Yield each result of a part, which holds count(result) images, of so many parts."""
        for result in results:
            self.images, self.done = self.images + count(result), self.done + 1
            seconds = time.monotonic() - self.start
            if seconds > self.next:
                self.next = seconds + 10
                left = seconds * (total - self.done) / self.done
                rate = f"{self.images / seconds:,.0f} images/s"
                log(f"listing {self.source}: {self.images:,} images, {rate}, about {left:.0f} s left")
            yield result


# ---------------------------------------------------------------- what a path leads to


def find_source(path, split, needed):
    """The `Source` of a split ("train", "val" or "") of a path. needed: the path has to have such a part.

    Raises FileNotFoundError or NotADirectoryError with the path that was tried.
    """
    root = Path(path)
    if "{" in root.name and not root.exists():
        return Source("archive", str(root.parent), tuple(expand_braces(root.name)))
    if root.is_file() and root.suffix.lower() in KINDS:
        kind = KINDS[root.suffix.lower()]
        if split == "val" and (kind == "archive" or root.suffix.lower() == ".npy"):
            raise FileNotFoundError(root / split)  # such a file has one split
        return Source(kind, str(root.parent), (root.name,), split)
    found = find_split(root, split) if split else None
    if found is None:
        if split and (files := find_mnist(root, split)):
            return Source("array", str(root), files)
        if split and (tables := list_tables(root, split)):
            return Source("table", str(root), *tables)
        found = root / split if needed and split else root
    elif beside := [p.name for p in root.iterdir() if p.is_dir() and p.name.lower() not in (*ALL_SPLITS, found.name)]:
        if beside := sorted(name for name in beside if not name.startswith(".")):
            log(f"{root}: {found.name} is used; not {', '.join(beside[:4])}{', ...' * (len(beside) > 4)} beside it")
    if not found.exists():
        raise FileNotFoundError(found)
    if found.is_dir():
        tables = list_tables(found, "")
        return Source("table", str(found), *tables) if tables else Source("folder", str(found))
    if found.suffix.lower() not in KINDS:
        raise NotADirectoryError(found)
    return Source(KINDS[found.suffix.lower()], str(found.parent), (found.name,))


def find_split(root, split):
    """The folder or file below root that is this split by its name, or None."""
    names = [name for name in SPLITS[split] if name != "test"]
    return next(filter(Path.exists, (root / f"{name}{suffix}" for name in names for suffix in ("", *KINDS))), None)


def find_mnist(root, split):
    """MNIST's files of images and labels in a folder, packed or not, or ()."""
    stem = "train" if split == "train" else "t10k"
    for folder in ("", "raw/", "MNIST/raw/"):
        for suffix in ("", ".gz"):
            files = tuple(f"{folder}{stem}-{what}-ubyte{suffix}" for what in ("images-idx3", "labels-idx1"))
            if all((root / file).exists() for file in files):
                return files
    return ()


def list_tables(root, split):
    """(files, split to choose by a column) of Parquet and Arrow files as Hugging Face's hub and library have them."""
    if (root / "state.json").exists():  # of save_to_disk: the files that count
        return tuple(file["filename"] for file in json.loads((root / "state.json").read_text())["_data_files"]), split
    files = sorted(str(p.relative_to(root)) for p in [*root.glob("*"), *root.glob("data/*")] if p.suffix in TABLES)
    splits = [re.match(r"[a-z]*", os.path.basename(file))[0] for file in files]
    for name in SPLITS.get(split, ()):
        if name in splits:
            return tuple(file for file, other in zip(files, splits, strict=True) if other == name), ""
    return (tuple(files), split) if files and not set(splits) & set(ALL_SPLITS) else ()


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


# ---------------------------------------------------------------- folders


def list_folder(root, extensions, progress, options):
    """The `Listing` of the images below a folder, nested or flat; and of its archives, if it has no image.

    Hidden files and folders do not count, nor does a link to a folder that holds it. Raises UserError for a folder that
    cannot be read.
    """
    listing, archives, level, identities = Listing(), [], [("", ())], collections.defaultdict(list)
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            scans = pool.map(functools.partial(scan_folder, root, extensions), level)
            below, level = level, []
            for scan in progress.track(scans, progress.done + len(below), lambda scan: len(scan.names)):
                part, label = len(listing.parts), scan.folder.split("/")[0] or None
                listing.parts.append([scan.folder, -1, scan.time])
                if scan.names:
                    listing.groups.append(Group(label, scan.folder, part, "\0".join(sorted(scan.names))))
                if scan.folder and "/" not in scan.folder:
                    identities[scan.above[-1]].append(scan.folder)
                prefix = f"{scan.folder}/" if scan.folder else ""
                listing.left_out += [f"{prefix}{name} (not a regular file)" for name in scan.odd]
                archives += [f"{prefix}{name}" for name in scan.archives]
                level += [(f"{prefix}{name}", scan.above) for name in sorted(scan.folders)]
    listing.same = [sorted(names) for names in identities.values() if len(names) > 1]
    if not listing.groups and archives:
        return list_archives(root, sorted(archives), extensions, progress, options, listing)
    if archives:
        listing.left_out += [f"{name} (an archive beside images)" for name in archives]
    listing.empty = {p[0] for p in listing.parts if p[0] and "/" not in p[0]} - {g.label for g in listing.groups}
    return listing


class Scan(NamedTuple):  # of one folder
    folder: str
    above: tuple  # (device, inode) of the folders from the root to this one
    time: int
    names: list
    folders: list
    archives: list
    odd: list


def scan_folder(root, extensions, task):
    folder, above = task
    path = os.path.join(root, folder)
    try:
        status = os.stat(path)
        scan = Scan(folder, (*above, (status.st_dev, status.st_ino)), status.st_mtime_ns, [], [], [], [])
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                suffix = name[name.rfind(".") :].lower()
                if name.startswith(".") or name == "lost+found":
                    continue
                if suffix in extensions and entry.is_file():
                    scan.names.append(name)
                elif entry.is_dir():
                    target = entry.stat() if entry.is_symlink() else None
                    if target is None or (target.st_dev, target.st_ino) not in scan.above:
                        scan.folders.append(name)
                elif suffix in extensions:
                    scan.odd.append(name)
                elif suffix in ARCHIVES and entry.is_file():
                    scan.archives.append(name)
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error.strerror}; make it readable, or move it away") from None
    return scan


# ---------------------------------------------------------------- archives


class Unit(NamedTuple):
    """A tar file, or one within a tar file, whose members get the prefix; start, end: in bytes."""

    part: int
    prefix: str
    start: int
    end: int


def list_archives(root, files, extensions, progress, options, listing=None):
    """The `Listing` of the images in tar and zip files. Their classes are, whichever is there first:

    the labels in .cls or .json beside the images (webdataset); the names of several archives, unless these are
    numbered from 0; the folders, or archives, within an archive, below one that all share.
    """
    listing = listing or Listing()
    units = []
    for file in files:
        try:
            part = listing.add_part(root, file)
            units.append(Unit(part, "", 0, max(listing.parts[part][1], 0)))
        except OSError as error:
            listing.left_out.append(f"{file} ({error.strerror})")

    def list_unit(unit):
        return list_members(root, listing.parts[unit.part][0], unit, extensions, options.label_column)

    results, inner = [], units
    with ThreadPoolExecutor(THREADS) as pool:
        while inner:
            found = pool.map(list_unit, inner)
            new = list(progress.track(found, progress.done + len(inner), lambda result: result.names.count("\0") + 1))
            results, inner = results + new, [unit for result in new for unit in result.inner]
    listing.left_out += [line for result in results for line in result.left_out]
    name_classes([result for result in results if result.names], files, listing)
    return listing


class Members(NamedTuple):  # the images of a unit
    part: int
    names: str  # joined by NUL
    offsets: np.ndarray
    sizes: np.ndarray
    labels: list | None  # of webdataset
    inner: list  # tar files within
    left_out: list


def list_members(root, file, unit, extensions, label_column):
    """The `Members` of a unit; what is damaged is named, and the images before it count."""
    images, labels, inner, left_out = [], {}, [], []
    walk = walk_zip if file.lower().endswith(".zip") else walk_tar
    descriptor = os.open(os.path.join(root, file), os.O_RDONLY)
    try:
        for name, offset, size, problem in walk(descriptor, unit.start, unit.end):
            name = unit.prefix + name.removeprefix("./").replace("\0", "")
            stem, dot, suffix = name.rpartition(".")
            suffix = dot + suffix.lower()
            is_image, unsafe = suffix in extensions, name[0] == "/" or ".." in name and ".." in name.split("/")
            if name.startswith(".", name.rfind("/") + 1):  # hidden
                continue
            if is_image and (problem or unsafe or size >= 1 << 32):
                reason = problem or ("outside of the archive" if unsafe else "4 GiB or more")
                left_out.append(f"{file}/{name} ({reason})")
            elif is_image:
                images.append((name, offset, size))
            elif suffix == ".tar" and not problem and size:
                inner.append(Unit(unit.part, f"{stem}/", offset, offset + size))
            elif suffix in (".cls", ".json") and not problem and size < 1 << 20:
                label = read_label(os.pread(descriptor, size, offset), suffix, label_column)
                if label is not None and (suffix == ".cls" or stem not in labels):
                    labels[stem] = label
    except (ValueError, OSError) as error:
        left_out.append(f"{file}{'/' if unit.prefix else ''}{unit.prefix.rstrip('/')} ({error})")
    finally:
        os.close(descriptor)
    names, offsets, sizes = zip(*images, strict=True) if images else ((), (), ())
    found = [labels.get(name.rpartition(".")[0]) for name in names] if labels else None
    offsets, sizes = np.array(offsets, dtype=np.uint64), np.array(sizes, dtype=np.uint32)
    return Members(unit.part, "\0".join(names), offsets, sizes, found, inner, left_out)


def read_label(data, suffix, label_column):
    """The label in a .cls or .json file of webdataset as text, or None."""
    try:
        label = data.decode().strip() if suffix == ".cls" else json.loads(data).get(label_column)
    except (ValueError, AttributeError):
        return None
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else None


def name_classes(results, files, listing):
    """Add the groups of `Members` to a listing, with the classes as `list_archives` says; files: their archives."""
    stems = {file: os.path.splitext(os.path.basename(file))[0] for file in files}
    prefixes, numbers = zip(*[re.fullmatch(r"(.*?)(\d*)", stem).groups() for stem in stems.values()], strict=True)
    numbered = len(set(prefixes)) == 1 and sorted(int(number or -1) for number in numbers) == list(range(len(files)))
    listing.labelled = labelled = any(result.labels for result in results)
    by_stem = not labelled and len(stems) > 1 and not numbered
    shared = "" if labelled or by_stem else shared_folder(results)
    for result in results:
        names = result.names.split("\0")
        if by_stem:
            labels = itertools.repeat(stems[listing.parts[result.part][0]])
        elif labelled:
            labels = result.labels or itertools.repeat(None)
        else:
            labels = (name[len(shared) :].rpartition("/")[0].split("/")[0] or None for name in names)
        listing.add(result.part, zip(labels, names, result.offsets.tolist(), result.sizes.tolist(), strict=False))


def shared_folder(results):
    """The folder, as "a/b/", below which all images lie in folders of their own."""
    folders = {os.path.dirname(name) for result in results for name in result.names.split("\0")}
    shared = os.path.commonpath(folders) if folders and all(folders) else ""
    shared = os.path.dirname(shared) if shared in folders else shared
    return f"{shared}/" if shared else ""


def walk_tar(descriptor, start, end):
    """Yield (name, offset, size, what it is if it is not a regular file or None) of a tar file's members.

    ustar, GNU (long names, sizes in base 256) and pax. Raises ValueError where the file is damaged or cut short.
    """
    position, pax = start, {}
    while position + 512 <= end:
        header = os.pread(descriptor, 512, position)
        if not any(header):
            return
        if header[257:262] != b"ustar" and not has_checksum(header):
            raise ValueError(f"not a tar file, or damaged, from byte {position} on")
        kind, offset = header[156:157], position + 512
        size = 0 if kind in b"123456" else int(pax.get("size", 0)) or parse_size(header[124:136])
        if size < 0:
            raise ValueError(f"a member of size {size} at byte {position}")
        position = offset + -(-size // 512) * 512
        if offset + size > end:
            raise ValueError(f"cut short: a member ends at byte {offset + size} of {end}")
        if kind in b"LxgKX":
            if kind == b"L":
                pax["path"] = os.fsdecode(os.pread(descriptor, size, offset).rstrip(b"\0"))
            elif kind == b"x":
                pax |= parse_pax(os.pread(descriptor, size, offset))
            continue
        name = os.fsdecode(header[:100].partition(b"\0")[0])
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{os.fsdecode(header[345:500].partition(chr(0).encode())[0])}/{name}"
        name, pax = pax.get("path", name), {}
        if kind != b"5" and name:
            yield name, offset, size, None if kind in b"0\x007" else f"member of type {kind.decode(errors='replace')}"
    if position < end or start == end:
        raise ValueError("cut short" if start < end else "empty")


def has_checksum(header):
    """Whether the checksum of a tar header is right: old formats have nothing else to be known by."""
    try:
        return int(header[148:156].strip(b" \0") or b"x", 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def parse_size(field):
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)


def parse_pax(data):
    """{keyword: text} of a pax header: records of "LENGTH KEYWORD=TEXT\\n"."""
    records = {}
    while data:
        length = int(data.partition(b" ")[0])
        keyword, _, text = data[:length].partition(b" ")[2].partition(b"=")
        records[keyword.decode()] = os.fsdecode(text[:-1])
        data = data[max(length, 1) :]
    return records


def walk_zip(descriptor, start, end):
    """As `walk_tar`. The offset of a compressed member has the bit DEFLATED."""
    import zipfile

    try:
        with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                local = os.pread(descriptor, 30, info.header_offset)
                lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                offset = info.header_offset + 30 + lengths
                known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
                offset |= int(DEFLATED) if info.compress_type == zipfile.ZIP_DEFLATED else 0
                if not info.is_dir():
                    yield info.filename, offset, info.compress_size, None if known else "encrypted or of another method"
    except zipfile.BadZipFile as error:
        raise ValueError(error) from None


# ---------------------------------------------------------------- lists and tables


def list_list(source, options):
    """The `Listing` of a CSV or TSV file with a header. Raises UserError for a column or a split that it lacks."""
    listing, file = Listing(), source.files[0]
    listing.labelled = True
    listing.add_part(source.root, file)
    with open(os.path.join(source.root, file), newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = csv.reader(lines, delimiter="\t" if file.lower().endswith(".tsv") else ",")
        titles = next(rows, [])
        path, label, split = (find_column(source, titles, options, name) for name in ("path", "label", "split"))
        if path is None:
            raise UserError(f"{source}: no column {options.path_column!r} among {titles}; give --path_column")
        rows, width = [row for row in rows if row], max(c for c in (path, label, split) if c is not None)
        short = next((number for number, row in enumerate(rows) if len(row) <= width), None)
        if short is not None:
            raise UserError(f"{source}: image {short + 1} of the list has {len(rows[short])} of {len(titles)} columns")
    names = choose_split(source, [row[split] for row in rows] if split is not None else None)
    rows = [row for row in rows if names is None or row[split] in names]
    listing.add(0, (((row[label] or None) if label is not None else None, row[path]) for row in rows))
    return listing


def find_column(source, titles, options, name):
    """The number of a column, or None without one of its default name. Raises UserError if its flag names none."""
    title = getattr(options, f"{name}_column")
    if title in titles:
        return titles.index(title)
    if title != getattr(DEFAULTS, f"{name}_column"):
        raise UserError(f"--{name}_column {title}: {source} has the columns {', '.join(titles)}")
    return None


def choose_split(source, values):
    """The values of the split column that count, or None for all. Raises UserError if there are none."""
    if not source.split:
        return None
    if values is None:
        if source.split == "train":
            return None
        raise UserError(
            f"{source}: has no column of splits; give --val_fraction 0.1, --eval_data_path, or --split_column"
        )
    found = set(values)
    for name in SPLITS[source.split]:
        if name in found:
            return {name}
    raise UserError(f"{source}: no image of {source.split} among the splits {', '.join(sorted(found)[:4])}")


def list_table(source, options):
    """The `Listing` of the rows of Parquet and Arrow files. Raises UserError for a column or a split that they lack."""
    listing = Listing()
    listing.labelled = True
    for file in source.files:
        part, table = listing.add_part(source.root, file), open_table(os.path.join(source.root, file))
        image, label, split = (find_column(source, table.titles, options, name) for name in ("image", "label", "split"))
        if image is None:
            raise UserError(f"{source}: no column {options.image_column!r} among {table.titles}; give --image_column")
        splits = None if split is None else table.read(options.split_column)
        chosen, nothing = choose_split(source, splits), itertools.repeat(None, table.num_rows)
        labels = nothing if label is None else table.read(options.label_column)
        if classes := table.class_names(options.label_column):
            listing.class_names = classes
            labels = (classes[number] if number is not None and number >= 0 else None for number in labels)
        names = table.read(options.image_column, "path") if table.is_struct(options.image_column) else nothing
        rows = (
            (None if label is None else str(label), name or f"row {row:09}", row, 0)
            for row, (label, name) in enumerate(zip(labels, names, strict=True))
            if chosen is None or splits[row] in chosen
        )
        listing.add(part, rows)
    return listing


class Table:
    """A Parquet file, or a mapped Arrow file. Raises UserError for another file, or if pyarrow is missing."""

    def __init__(self, path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: is read by pyarrow, which is missing: pip install pyarrow") from None
        try:
            self.file = pyarrow.parquet.ParquetFile(path) if path.lower().endswith(".parquet") else None
            self.rows = None if self.file else self.map_arrow(pyarrow, path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a whole Parquet or Arrow file: {error}") from None
        self.schema = self.file.schema_arrow if self.file else self.rows.schema
        self.titles = self.schema.names
        counts = (
            [self.file.metadata.row_group(n).num_rows for n in range(self.file.num_row_groups)] if self.file else []
        )
        self.ends = np.cumsum(counts)  # of row groups
        self.num_rows = sum(counts) if self.file else self.rows.num_rows
        self.read_group = functools.lru_cache(8)(self.read_group)

    @staticmethod
    def map_arrow(pyarrow, path):
        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()

    def class_names(self, column):
        """The names of the numbers in a column, as Hugging Face's library keeps them, or None."""
        features = (
            json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
        return (features.get(column) or {}).get("names")

    def is_struct(self, column):
        return str(self.schema.field(column).type).startswith("struct")

    def read(self, column, field=None):
        """A column as a list, or a field of its structs."""
        if self.file:
            rows = self.file.read([f"{column}.{field}" if field else column], use_threads=False).column(column)
        else:
            rows = self.rows.column(column)
        return [value for chunk in rows.chunks for value in (chunk.field(field) if field else chunk).to_pylist()]

    def read_group(self, group, column):
        return self.file.read_row_group(group, [column], use_threads=False).column(column)

    def read_image(self, row, column):
        """The bytes of the image in a row. Of Parquet a whole row group is read, and the last eight are kept."""
        if self.file:
            group = int(np.searchsorted(self.ends, row, side="right"))
            value = self.read_group(group, column)[row - (self.ends[group - 1] if group else 0)].as_py()
        else:
            value = self.rows.column(column)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"column {column} holds no bytes")
        return value


open_table = functools.lru_cache(OPEN_FILES)(Table)


# ---------------------------------------------------------------- arrays


def read_arrays(source):
    """Images (n, H, W) or (n, H, W, C) and labels (n,), or None, of .npy and .npz files and of MNIST's.

    .npy: mapped; labels in NAME_labels.npy. .npz: the arrays train_images and train_labels, as of MedMNIST, x_train and
    y_train, as of Keras, images and labels, or x and y. Raises UserError for other contents.
    """
    path = os.path.join(source.root, source.files[0])
    try:
        if len(source.files) == 2:
            images, labels = (read_idx(os.path.join(source.root, file)) for file in source.files)
        elif path.lower().endswith(".npy"):
            labels = f"{path[:-4]}_labels.npy"
            images, labels = np.load(path, mmap_mode="r"), np.load(labels) if os.path.exists(labels) else None
        else:
            with np.load(path) as file:
                splits = SPLITS.get(source.split, ()) if source.split else ()
                pairs = [(f"{split}_images", f"{split}_labels") for split in splits]
                pairs += [(f"x_{split}", f"y_{split}") for split in splits] + [("images", "labels"), ("x", "y")]
                names = next((pair for pair in pairs if pair[0] in file), None)
                if names is None:
                    raise ValueError(f"has the arrays {', '.join(file)}; must have {' or '.join(p[0] for p in pairs)}")
                images, labels = file[names[0]], file[names[1]] if names[1] in file else None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}") from None
    labels = None if labels is None else labels.reshape(-1)
    if (
        images.ndim not in (3, 4)
        or labels is not None
        and (len(labels) != len(images) or labels.dtype.kind not in "iu")
    ):
        shapes = f"{images.shape} and labels {None if labels is None else labels.shape}"
        raise UserError(f"{path}: images {shapes}: must be (n, height, width) or (n, height, width, channels) and (n,)")
    return images, labels


def read_idx(path):
    """The bytes of an IDX file, as MNIST's are, in their shape."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    shape = np.frombuffer(data, dtype=">u4", offset=4, count=data[3])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)


# ---------------------------------------------------------------- the index


class Index:
    """Where the images of a source lie: `name(i)`, `read(i)`, `target` (n,), `class_names`, `digest`.

    columns: as above, mapped from `folder`, or in memory.
    """

    def __init__(self, source, options, meta, columns, folder=None):
        self.source, self.options, self.meta, self.folder = source, options, meta, folder
        self.columns = {name: np.asarray(column) for name, column in columns.items()}
        self.part, self.target, self.names, self.name_end, self.offset, self.size = (
            self.columns.get(name) for name in ("part", "target", "names", "name_end", "offset", "size")
        )
        self.class_names, self.digest, self.parts = meta["class_names"], meta["digest"], meta["parts"]
        self.descriptors = {}  # of archives, by part; a fork shares them safely, as `pread` moves no position

    def __reduce__(self):
        columns = self.columns if self.folder is None else None
        return restore, (self.source, self.options, self.meta, columns, self.folder)

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

    def prefetch(self, start, stop):
        """Have the system read these images of archives, in one piece, ahead of their use."""
        if self.meta["kind"] != "archive":
            return
        numbers = np.arange(start, stop)
        offsets, parts = (self.offset[start:stop] & ~DEFLATED).astype(np.int64), self.part[start:stop]
        for part in np.unique(parts).tolist():
            own = numbers[parts == part] - start
            first, end = int(offsets[own].min()), int((offsets + self.size[start:stop])[own].max())
            with contextlib.suppress(OSError):  # reading them will name it
                os.posix_fadvise(self.open_part(part), first, end - first, os.POSIX_FADV_WILLNEED)

    def open_part(self, part):
        """A descriptor of an archive, kept open; raises OSError if the file was changed after it was listed."""
        path, *state = self.parts[part][:3]
        if part not in self.descriptors:
            while len(self.descriptors) >= OPEN_FILES:
                os.close(self.descriptors.pop(next(iter(self.descriptors))))
            self.descriptors[part] = os.open(os.path.join(self.source.root, path), os.O_RDONLY | os.O_CLOEXEC)
        descriptor = self.descriptors[part]
        status = os.fstat(descriptor)
        if [status.st_size, status.st_mtime_ns] != state:
            raise OSError(f"{path} was changed after it was listed")
        return descriptor

    def read_member(self, part, offset, size):
        data = os.pread(self.open_part(part), size, offset & ~int(DEFLATED))
        if len(data) < size:
            raise OSError(f"{self.parts[part][0]} is cut short")
        return zlib.decompress(data, -15) if offset & int(DEFLATED) else data


def read_file(path):
    """The bytes of a regular file: a FIFO would keep its reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return file.read()


def restore(source, options, meta, columns, folder):
    return Index(source, options, meta, columns or load_columns(folder), folder)


def load_columns(folder):
    return {path.stem: np.load(path, mmap_mode="r") for path in Path(folder).glob("*.npy")}


def open_index(source, extensions, options=DEFAULTS, keep=False):
    """The `Index` of a source: the one that is kept, if it is not stale, else a new one.

    extensions: of image files. keep: also that of a small source. One process of a machine lists, others wait for it.
    Raises UserError for what cannot be listed.
    """
    import filelock

    places = index_places(source, extensions, options)
    index = find_index(source, options, places)
    if index is not None:
        return index
    lock = os.path.join(tempfile.gettempdir(), f"{places[-1].name}-{os.getuid()}.lock")
    with filelock.FileLock(lock):
        index = find_index(source, options, places, say=True)
        if index is None:
            index = build_index(source, extensions, options)
            if keep or len(index) >= KEPT_FROM:
                index = keep_index(index, places)
    return index


def index_places(source, extensions, options):
    """Paths of a kept index without its digest, the preferred first: FOLDER/NAME-KEY, of all that a list depends on."""
    root = os.path.realpath(source.root)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnextv2-index"
    folders = [Path(options.index_dir)] if options.index_dir else [Path(root) / ".index", cache]
    name = re.sub(r"[^\w.-]", "_", os.path.basename(source.files[0] if source.files else root))[:40]
    places = []
    for folder in folders:
        beside = "" if folder == Path(root) / ".index" else root  # where it is, it moves with the data
        key = json.dumps([VERSION, beside, *source[2:], sorted(extensions), options[:-1]])
        places.append(folder / f"{name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}")
    return places


def find_index(source, options, places, say=False):
    """The kept `Index` of a source, or None. say: delete one that is stale, and log why."""
    for path in (path for place in places for path in place.parent.glob(f"{place.name}-*")):
        try:
            meta = json.loads((path / "meta.json").read_text())
            with ThreadPoolExecutor(THREADS) as pool:
                shares = (meta["parts"][number::THREADS] for number in range(THREADS))
                current = all(pool.map(functools.partial(is_current, source.root), shares))
            if current:
                return Index(source, options, meta, load_columns(path), path)
            reason = "the images have changed"
        except (OSError, ValueError, KeyError) as error:
            reason = str(error)
        if say:
            log(f"{path} is stale ({reason}): the images are listed anew")
            shutil.rmtree(path, ignore_errors=True)
    return None


def is_current(root, parts):
    """Whether parts are as they were when they were listed."""
    return all(part[3] and list(state_of(root, part[0])) == part[1:3] for part in parts)


def build_index(source, extensions, options):
    """List a source: its `Index`, in memory. What is left out, and classes without an image, are logged."""
    progress, started = Progress(source), time.time_ns()
    if source.kind == "folder":
        listing = list_folder(source.root, extensions, progress, options)
    elif source.kind == "archive":
        listing = list_archives(source.root, source.files, extensions, progress, options)
    else:
        listing = (list_list if source.kind == "list" else list_table)(source, options)
    for part in listing.parts:
        part.append(part[2] < started - RECENT)  # else it may change once more without a new time
    for lines, what in ((listing.left_out, "left out"), (sorted(listing.empty), "class folders without an image")):
        if lines:
            text = f"{', '.join(lines[:4])}{', ...' * (len(lines) > 4)}"
            text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)  # names may hold any
            log(f"{source}: {len(lines)} {what}: {text}")
    meta, columns = assemble(listing)
    meta["kind"] = source.kind if source.kind != "folder" or "offset" not in columns else "archive"
    seconds = time.monotonic() - progress.start
    if seconds > 2:
        log(f"listed {source}: {len(columns['part']):,} images in {seconds:.1f} s")
    return Index(source, options, meta, columns)


def assemble(listing):
    """The meta data and the columns of a `Listing`, in ImageFolder's order; labels that are numbers in theirs."""
    labels = {group.label for group in listing.groups} - {None}
    whole = listing.labelled and all(re.fullmatch(r"\d{1,18}", label) for label in labels)
    class_names = listing.class_names or sorted(labels, key=lambda label: (int(label) if whole else 0, label))
    numbers = {label: number for number, label in enumerate(class_names)} | {None: -1}

    def key(group):
        return numbers[group.label], group.folder

    groups = [merge(list(same)) for _, same in itertools.groupby(sorted(listing.groups, key=key), key)]
    names = np.frombuffer(os.fsencode("\0".join(group.names for group in groups)), dtype=np.uint8)
    ends = np.append(np.flatnonzero(names == 0), len(names)) if groups else np.empty(0, dtype=np.int64)
    counts = [group.names.count("\0") + 1 for group in groups]
    columns = {
        "part": concatenate([np.broadcast_to(g.part, n) for g, n in zip(groups, counts, strict=True)], np.uint32),
        "target": np.repeat(np.array([numbers[group.label] for group in groups], dtype=np.int32), counts),
        "names": names[names != 0],
        "name_end": (ends - np.arange(len(ends))).astype(np.uint64),
    }
    if groups and groups[0].offsets is not None:
        columns["offset"] = concatenate([group.offsets for group in groups], np.uint64)
        columns["size"] = concatenate([group.sizes for group in groups], np.uint32)
    digest = hashlib.blake2b(json.dumps([class_names, *[group[:2] for group in groups]]).encode(), digest_size=16)
    for name in sorted(columns.keys() - {"part"}):
        digest.update(columns[name])
    meta = dict(parts=listing.parts, class_names=class_names, same=listing.same, digest=digest.hexdigest())
    return meta, columns


def concatenate(columns, dtype):
    return np.concatenate([np.empty(0, dtype), *columns], dtype=dtype, casting="unsafe")


def merge(groups):
    """One group of several of the same class and folder, by file name; its part is then an array."""
    if len(groups) == 1:
        return groups[0]
    names = [name for group in groups for name in group.names.split("\0")]
    order = sorted(range(len(names)), key=lambda i: os.path.basename(names[i]))
    parts = np.concatenate([np.full(group.names.count("\0") + 1, group.part) for group in groups])[order]
    places = [np.concatenate(column)[order] for column in list(zip(*groups, strict=True))[4:] if column[0] is not None]
    return Group(*groups[0][:2], parts, "\0".join(names[i] for i in order), *places)


def keep_index(index, places):
    """Write an index to the first place that can be written, and return it as mapped from there; else as it is."""
    for place in places:
        final, temporary = place.with_name(f"{place.name}-{index.digest[:16]}"), None
        try:
            beside = place.parent == Path(os.path.realpath(index.source.root)) / ".index" and not place.parent.exists()
            before = state_of(index.source.root, "")
            place.parent.mkdir(parents=True, exist_ok=True)
            if beside and index.parts[0][:3] == ["", *before]:  # our own change of the folder that was listed
                index.parts[0][1:3] = state_of(index.source.root, "")
            temporary = tempfile.mkdtemp(dir=place.parent, prefix=".new-")
            os.chmod(temporary, 0o755)
            for name, column in index.columns.items():
                write_file(f"{temporary}/{name}.npy", lambda file, column=column: np.save(file, column))
            write_file(f"{temporary}/meta.json", lambda file: file.write(json.dumps(index.meta).encode()))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            return Index(index.source, index.options, index.meta, load_columns(final), final)
        except OSError as error:
            log(f"the index is not kept in {place.parent}: {error.strerror or error}")
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
    return index


def write_file(path, write):
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
