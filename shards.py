"""List the images of a source: of folders, of tar and zip files, and by `tables` of lists and tables; see `index`."""

import collections
import functools
import json
import os
import re
import stat
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from sources import KINDS, image_extensions, in_one_line, shorten
from tables import join_values, list_table
from utils import UserError, log

THREADS = 16  # that wait for a file system
ENCODING = "utf-8", "surrogateescape"  # of names in tar files
DEFLATED = 1 << 63  # in an offset: a compressed member of a zip file


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
                    log(f"listing {self.source}: {self.images:,} images, {rate:,.0f} images/s, about {left:.0f} s left")
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
