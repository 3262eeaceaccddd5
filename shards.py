"""Where images lie: folders, tar and zip files, lists, tables and arrays, whatever a path leads to; see `index`."""

import collections
import csv
import functools
import gzip
import itertools
import json
import os
import re
import stat
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils import UserError, log

THREADS = 16  # that wait for a file system
OPEN_FILES = 128  # archives and tables that a process keeps open
ENCODING = "utf-8", "surrogateescape"  # of names in tar files
SEPARATOR = ";"  # of several values in a label
DEFLATED = 1 << 63  # in an offset: a compressed member of a zip file
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


def shorten(words, count=4):
    return ", ".join(words[:count]) + ", ..." * (len(words) > count)


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


# ---------------------------------------------------------------- listing


class Group(NamedTuple):
    """Images of one class, folder and part, by name."""

    label: str | None
    folder: str
    part: int
    names: str  # joined by NUL
    places: np.ndarray | None = None  # (n, 2) uint64: offset, or row of a table, and size; None: a file each


class Listing:
    """What is found in a source. parts: [path relative to the root, size or -1 for a folder, time in ns]."""

    def __init__(self, source, options):
        self.source, self.options = source, options
        self.parts, self.groups, self.left_out = [], [], []
        self.class_names, self.labelled = None, False  # names in their order; whether labels are not names of folders
        self.empty, self.same = [], []  # class folders without an image; those that are one folder
        self.start, self.next_line, self.images, self.done = time.monotonic(), 2.0, 0, 0

    def path(self, name):
        return os.path.join(self.source.root, name)

    def add_part(self, name):
        self.parts.append([name, *state_of(self.path(name))])
        return len(self.parts) - 1

    def add(self, part, entries):
        """Add (label, name, (offset, size)) of a part's images."""
        groups = collections.defaultdict(list)
        for label, name, place in entries:
            groups[label, os.path.dirname(name)].append((name.replace("\0", ""), place))
        for (label, folder), members in groups.items():
            names, places = zip(*sorted(members), strict=True)
            self.groups.append(Group(label, folder, part, "\0".join(names), np.array(places, dtype=np.uint64)))

    def map(self, work, tasks, count):
        """Yield work(task), which has found count(result) images, of each; log the rate and the time left at times."""
        total = self.done + len(tasks)
        with ThreadPoolExecutor(THREADS) as pool:
            for result in pool.map(work, tasks):
                self.images, self.done = self.images + count(result), self.done + 1
                seconds = time.monotonic() - self.start
                if seconds > self.next_line:
                    self.next_line = seconds + 10
                    rate, left = self.images / seconds, seconds * (total - self.done) / self.done
                    progress = f"{self.images:,} images, {rate:,.0f} images/s, about {left:.0f} s left"
                    log(f"listing {self.source}: {progress}")
                yield result


def state_of(path):
    """Size (-1: a folder) and time of change of a part."""
    status = os.stat(path)
    return -1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


def list_source(source, options):
    """The `Listing` of a source. What is left out, and classes without an image, are logged. Raises UserError."""
    listing = Listing(source, options)
    if source.kind == "folder":
        list_folder(listing)
    elif source.kind == "archive":
        list_archives(listing, source.files)
    else:
        list_table(listing)
    for lines, what in ((listing.left_out, "left out"), (listing.empty, "class folders without an image")):
        if lines:
            log(in_one_line(f"{source}: {len(lines)} {what}: {shorten(lines)}"))
    return listing


# ---------------------------------------------------------------- folders


class Scan(NamedTuple):  # of one folder
    folder: str
    above: tuple  # (device, inode) of the folders from the root to this one
    time: int
    names: list
    folders: list
    archives: list
    odd: list


def list_folder(listing):
    """List the images below a folder, nested or flat; and those in its archives, if it has no image.

    Hidden files and folders do not count, nor does a link to a folder that holds it. Raises UserError for a folder that
    cannot be read.
    """
    archives, level, identities = [], [("", ())], collections.defaultdict(list)
    while level:
        scans, level = listing.map(functools.partial(scan_folder, listing), level, lambda scan: len(scan.names)), []
        for scan in scans:
            label, prefix = scan.folder.split("/")[0] or None, os.path.join(scan.folder, "")
            if scan.names:
                listing.groups.append(Group(label, scan.folder, len(listing.parts), "\0".join(sorted(scan.names))))
            listing.parts.append([scan.folder, -1, scan.time])
            if scan.folder == label:
                identities[scan.above[-1]].append(label)
            listing.left_out += [f"{prefix}{name} (not a regular file)" for name in scan.odd]
            archives += [f"{prefix}{name}" for name in scan.archives]
            level += [(f"{prefix}{name}", scan.above) for name in sorted(scan.folders)]
    listing.same = [sorted(names) for names in identities.values() if len(names) > 1]
    if not listing.groups and archives:
        return list_archives(listing, sorted(archives))
    listing.left_out += [f"{name} (an archive beside images)" for name in archives]
    filled = {group.label for group in listing.groups}
    listing.empty = sorted(name for names in identities.values() for name in names if name not in filled)


def scan_folder(listing, task):
    folder, above = task
    path, extensions = listing.path(folder), image_extensions()
    try:
        status = os.stat(path)
        scan = Scan(folder, (*above, (status.st_dev, status.st_ino)), status.st_mtime_ns, [], [], [], [])
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = entry.name[entry.name.rfind(".") :].lower()
                if entry.name.startswith(".") or entry.name == "lost+found":
                    continue
                if suffix in extensions and entry.is_file():
                    scan.names.append(entry.name)
                elif entry.is_dir():
                    target = entry.stat() if entry.is_symlink() else None
                    if target is None or (target.st_dev, target.st_ino) not in scan.above:
                        scan.folders.append(entry.name)
                elif suffix in extensions:
                    scan.odd.append(entry.name)
                elif KINDS.get(suffix) == "archive" and entry.is_file():
                    scan.archives.append(entry.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error.strerror}; make it readable, or move it away") from None
    return scan


# ---------------------------------------------------------------- archives


class Unit(NamedTuple):
    """A tar or zip file, or a tar file within one, whose members get the prefix; start, end: in bytes."""

    part: int
    prefix: str
    start: int
    end: int


class Members(NamedTuple):  # the images of a unit
    part: int
    names: str  # joined by NUL
    places: np.ndarray  # (n, 2) uint64: offset and size
    labels: list | None  # of webdataset
    inner: list  # tar files within
    left_out: list


def list_archives(listing, files):
    """List the images in tar and zip files. Their classes are, whichever is there first:

    the labels in .cls or .json beside the images (webdataset); the names of several archives, unless these are
    numbered from 0; the folders, or archives, within an archive, below one that all share.
    """
    units, results = [], []
    for file in files:
        try:
            part = listing.add_part(file)
            units.append(Unit(part, "", 0, max(listing.parts[part][1], 0)))
        except OSError as error:
            listing.left_out.append(f"{file} ({error.strerror})")
    while units:
        found = list(listing.map(functools.partial(list_members, listing), units, lambda found: len(found.places)))
        results, units = results + found, [unit for members in found for unit in members.inner]
    listing.left_out += [line for members in results for line in members.left_out]
    name_classes(listing, [members for members in results if members.names], files)


def list_members(listing, unit):
    """The `Members` of a unit; what is damaged is named, and the images before it count."""
    file, extensions = listing.parts[unit.part][0], image_extensions()
    images, labels, inner, left_out = [], {}, [], []
    walk = walk_zip if file.lower().endswith(".zip") else walk_tar
    descriptor = os.open(listing.path(file), os.O_RDONLY)
    try:
        for name, offset, size, problem in walk(descriptor, unit.start, unit.end):
            name = unit.prefix + name.removeprefix("./").replace("\0", "")
            stem, dot, suffix = name.rpartition(".")
            suffix = dot + suffix.lower()
            if name.startswith(".", name.rfind("/") + 1):  # hidden
                continue
            if suffix in extensions:
                if name[0] == "/" or ".." in name and ".." in name.split("/"):
                    problem = problem or "outside of the archive"
                elif size >= 1 << 32:
                    problem = problem or "4 GiB or more"
                if problem:
                    left_out.append(f"{file}/{name} ({problem})")
                else:
                    images.append((name, (offset, size)))
            elif suffix == ".tar" and not problem and size:
                inner.append(Unit(unit.part, f"{stem}/", offset, offset + size))
            elif suffix in (".cls", ".json") and not problem and size < 1 << 20:
                label = read_label(os.pread(descriptor, size, offset), suffix, listing.options.label_column)
                if label is not None and (suffix == ".cls" or stem not in labels):
                    labels[stem] = label
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        left_out.append(f"{file}/{unit.prefix}".rstrip("/") + f" ({error})")
    finally:
        os.close(descriptor)
    names, places = zip(*images, strict=True) if images else ((), ())
    found = [labels.get(name.rpartition(".")[0]) for name in names] if labels else None
    return Members(unit.part, "\0".join(names), np.array(places, dtype=np.uint64), found, inner, left_out)


def read_label(data, suffix, label_column):
    """The label in a .cls or .json file of webdataset as text, or None."""
    try:
        label = data.decode().strip() if suffix == ".cls" else json.loads(data).get(label_column)
    except (ValueError, AttributeError):
        return None
    return join_values([label]) if isinstance(label, str | int | float | list) and not isinstance(label, bool) else None


def name_classes(listing, results, files):
    """Add `Members` to a listing, with the classes as `list_archives` says; files: the archives, also empty ones."""
    stems = {file: os.path.splitext(os.path.basename(file))[0] for file in files}
    prefixes, numbers = zip(*[re.fullmatch(r"(.*?)(\d*)", stem).groups() for stem in stems.values()], strict=True)
    numbered = len(set(prefixes)) == 1 and sorted(int(number or -1) for number in numbers) == list(range(len(files)))
    listing.labelled = any(members.labels for members in results)
    by_stem = len(stems) > 1 and not numbered
    shared = "" if listing.labelled or by_stem else find_shared_folder(results)
    for members in results:
        names = members.names.split("\0")
        if listing.labelled:
            labels = members.labels or [None] * len(names)
        elif by_stem:
            labels = [stems[listing.parts[members.part][0]]] * len(names)
        else:
            labels = (name[len(shared) :].rpartition("/")[0].split("/")[0] or None for name in names)
        listing.add(members.part, zip(labels, names, members.places.tolist(), strict=True))


def find_shared_folder(results):
    """The folder, as "a/b/", below which all images lie in folders of their own."""
    folders = {os.path.dirname(name) for members in results for name in members.names.split("\0")}
    shared = os.path.commonpath(folders) if folders and all(folders) else ""
    return os.path.join(os.path.dirname(shared) if shared in folders else shared, "")


def walk_tar(descriptor, start, end):
    """Yield (name, offset, size, what it is if it is not a regular file or None) of a tar file's members.

    ustar, GNU (long names, sizes in base 256) and pax; four times as fast as `tarfile`. Raises ValueError
    where the file is damaged or cut short.
    """
    position, pax = start, {}
    while position + 512 <= end:
        header = os.pread(descriptor, 512, position)
        if not any(header):
            return
        kind, offset = header[156:157], position + 512
        try:
            if header[257:262] != b"ustar":  # of an old format, known by its checksum alone
                tarfile.TarInfo.frombuf(header, *ENCODING)
            size = 0 if kind in b"123456" else int(pax.get("size", 0)) or tarfile.nti(header[124:136])
        except tarfile.HeaderError:
            raise ValueError(f"not a tar file, or damaged, from byte {position} on") from None
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
        name = tarfile.nts(header[:100], *ENCODING)
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{tarfile.nts(header[345:500], *ENCODING)}/{name}"
        name, pax = pax.get("path", name), {}
        if kind != b"5" and name:
            yield name, offset, size, None if kind in b"0\x007" else f"member of type {kind.decode(errors='replace')}"
    if position < end or start == end:
        raise ValueError("cut short" if start < end else "empty")


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
    """As `walk_tar`; raises zipfile.BadZipFile. The offset of a compressed member has the bit DEFLATED."""
    with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            local = os.pread(descriptor, 30, info.header_offset)
            lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            offset = info.header_offset + 30 + lengths
            known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
            offset |= DEFLATED if info.compress_type == zipfile.ZIP_DEFLATED else 0
            if not info.is_dir():
                yield info.filename, offset, info.compress_size, None if known else "encrypted or of another method"


# ---------------------------------------------------------------- lists and tables


def list_table(listing):
    """List the rows of a CSV or TSV file, or of Parquet and Arrow files, with their labels.

    Raises UserError for a column or a split that is not there.
    """
    source, options = listing.source, listing.options
    content, open_file = ("path", CsvTable) if source.kind == "list" else ("image", open_table)
    listing.labelled = True
    for file in source.files:
        part, table = listing.add_part(file), open_file(listing.path(file))
        image, split = (find_column(source, table.titles, options, name) for name in (content, "split"))
        columns = find_label_columns(source, table.titles, options)
        if image is None:
            default = getattr(options, f"{content}_column")
            raise UserError(f"{source}: no column {default!r} among {table.titles}; give --{content}_column")
        splits = None if split is None else table.read(split)
        chosen, names = choose_split(source, splits), table.read_names(image)
        labels = list(map(join_values, zip(*map(table.read, columns), strict=True))) or [None] * len(names)
        if len(columns) == 1 and (classes := table.class_names(columns[0])):
            listing.class_names = classes
            labels = [classes[int(number)] if number and int(number) >= 0 else None for number in labels]
        rows = zip(names, labels, splits or itertools.repeat(None), strict=False)
        listing.add(
            part,
            ((label, name, (row, 0)) for row, (name, label, split) in enumerate(rows) if chosen in (None, split)),
        )


def find_column(source, titles, options, name):
    """The title of a column, or None without one of its default title. Raises UserError if its flag names none."""
    title = getattr(options, f"{name}_column")
    if title not in titles and title != getattr(DEFAULTS, f"{name}_column"):
        raise UserError(f"--{name}_column {title}: {source} has the columns {', '.join(titles)}")
    return title if title in titles else None


def find_label_columns(source, titles, options):
    """The titles of the columns of labels, of which --label_column may name several; none without the default one."""
    columns = split_columns(options.label_column)
    if len(columns) == 1:
        return list(filter(None, [find_column(source, titles, options, "label")]))
    for title in columns:
        if title not in titles:
            raise UserError(f"--label_column {title}: {source} has the columns {', '.join(titles)}")
    return columns


def split_columns(label_column):
    """The titles in --label_column."""
    return [title.strip() for title in label_column.split(",")]


def join_values(cells):
    """The text of a label of one or several cells; None if all are empty. A cell may be a list, even an empty one."""
    words = [word for cell in cells for word in (cell if isinstance(cell, list) else [cell])]
    text = SEPARATOR.join("" if word is None else str(word) for word in words)
    if isinstance(cells[0], list):
        return text if len(words) > 1 else f"{text}{SEPARATOR}"  # a list of one name is not the name itself
    return None if all(word in (None, "") for word in words) else text


def choose_split(source, values):
    """The value of the split column that counts, or None for all. Raises UserError if there is none."""
    if not source.split or values is None and source.split == "train":
        return None
    if values is None:
        fix = "give --val_fraction 0.1, --eval_data_path, or --split_column"
        raise UserError(f"{source}: has no column of splits; {fix}")
    found = set(values)
    for name in SPLITS[source.split]:
        if name in found:
            return name
    raise UserError(f"{source}: no image of {source.split} among the splits {', '.join(sorted(found)[:4])}")


class CsvTable:
    """A CSV or TSV file with a header."""

    def __init__(self, path):
        self.path, delimiter = path, "\t" if path.lower().endswith(".tsv") else ","
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            self.titles, *self.rows = [row for row in csv.reader(lines, delimiter=delimiter) if row] or [[]]

    def class_names(self, column):
        return None

    def read(self, column):
        """A column as a list. Raises UserError for a line that lacks it."""
        place = self.titles.index(column)
        for number, row in enumerate(self.rows, 1):
            if len(row) <= place:
                columns = f"{len(row)} of {len(self.titles)} columns"
                raise UserError(f"{self.path}: image {number} of the list has {columns}")
        return [row[place] for row in self.rows]

    read_names = read


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
            self.rows = self.map_arrow(pyarrow, path) if self.file is None else None
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a whole Parquet or Arrow file: {error}") from None
        self.schema = self.file.schema_arrow if self.file else self.rows.schema
        self.titles = self.schema.names
        groups = self.file.num_row_groups if self.file else 0
        counts = [self.file.metadata.row_group(n).num_rows for n in range(groups)]
        self.ends = np.cumsum([0, *counts] if self.file else [0, self.rows.num_rows])  # of row groups
        self.read_group = functools.lru_cache(8)(self.read_group)

    @staticmethod
    def map_arrow(pyarrow, path):
        try:
            return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()

    def class_names(self, column):
        """The names of the numbers in a column, as Hugging Face's library keeps them, or None."""
        metadata = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        return (metadata.get("info", {}).get("features", {}).get(column) or {}).get("names")

    def read(self, column, field=None):
        """A column as a list, or a field of its structs."""
        name = f"{column}.{field}" if field else column
        rows = self.file.read([name], use_threads=False) if self.file else self.rows
        chunks = rows.column(column).chunks
        return [value for chunk in chunks for value in (chunk.field(field) if field else chunk).to_pylist()]

    def read_names(self, column):
        is_struct = str(self.schema.field(column).type).startswith("struct")
        names = self.read(column, "path") if is_struct else [None] * int(self.ends[-1])
        return [name or f"row {row:09}" for row, name in enumerate(names)]

    def read_group(self, group, column):
        rows = self.file.read_row_group(group, [column], use_threads=False) if self.file else self.rows
        return rows.column(column)

    def read_image(self, row, column):
        """The bytes of the image in a row. Of Parquet a whole row group is read, and the last eight are kept."""
        group = int(np.searchsorted(self.ends, row, side="right")) - 1
        value = self.read_group(group, column)[row - int(self.ends[group])].as_py()
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
                splits = SPLITS.get(source.split, ())
                pairs = [(f"{split}_images", f"{split}_labels") for split in splits]
                pairs += [(f"x_{split}", f"y_{split}") for split in splits] + [("images", "labels"), ("x", "y")]
                names = next((pair for pair in pairs if pair[0] in file), None)
                if names is None:
                    raise ValueError(f"has the arrays {', '.join(file)}; must have {' or '.join(p[0] for p in pairs)}")
                images, labels = file[names[0]], file[names[1]] if names[1] in file else None
        labels = None if labels is None else labels.reshape(-1)
        fits = labels is None or len(labels) == len(images) and labels.dtype.kind in "iu"
        if images.ndim not in (3, 4) or not fits:
            shapes = f"images {images.shape} and labels {None if labels is None else labels.shape}"
            raise ValueError(f"{shapes}: must be (n, height, width) or (n, height, width, channels) and (n,)")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}") from None
    return images, labels


def read_idx(path):
    """The bytes of an IDX file, as MNIST's are, in their shape."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        data = file.read()
    if data[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    shape = np.frombuffer(data, dtype=">u4", offset=4, count=data[3])
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)
