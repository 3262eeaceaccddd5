"""Images and labels in lists, tables and arrays: CSV and TSV, Parquet and Arrow, NumPy's and MNIST's files."""

import csv
import functools
import gzip
import itertools
import json
import os

import numpy as np

from sources import DEFAULTS, SEPARATOR, SPLITS
from utils import UserError

OPEN_FILES = 128  # archives and tables that a process keeps open


def list_table(listing):
    """List the rows of a CSV or TSV file, or of Parquet and Arrow files, with their labels.

    Raises UserError for a column or a split that is not there.
    """
    source, options = listing.source, listing.options
    content, open_file = ("path", CsvTable) if source.kind == "list" else ("image", open_table)
    listing.labelled = True
    for file in source.files:
        part, table = listing.add_part(file), open_file(listing.path(file))
        images, splits, columns = (
            find_columns(source, table.titles, name, getattr(options, f"{name}_column"))
            for name in (content, "split", "label")
        )
        if not images:
            default = getattr(options, f"{content}_column")
            raise UserError(f"{source}: no column {default!r} among {table.titles}; give --{content}_column")
        splits = table.read(splits[0]) if splits else None
        chosen, names = choose_split(source, splits), table.read_names(images[0])
        labels = list(map(join_values, zip(*map(table.read, columns), strict=True))) or [None] * len(names)
        if len(columns) == 1 and (classes := table.class_names(columns[0])):
            listing.class_names = classes
            labels = [classes[int(number)] if number and int(number) >= 0 else None for number in labels]
        rows = zip(names, labels, splits or itertools.repeat(None), strict=False)
        listing.add(
            part,
            ((label, name, (row, 0)) for row, (name, label, split) in enumerate(rows) if chosen in (None, split)),
        )


def find_columns(source, titles, name, given):
    """The titles of columns that --NAME_column gives, of labels perhaps several; none if it is the default one's.

    Raises UserError for a title that is not there.
    """
    columns = split_columns(given) if name == "label" else [given]
    for title in columns:
        if title not in titles and given != getattr(DEFAULTS, f"{name}_column"):
            raise UserError(f"--{name}_column {title or repr('')}: {source} has the columns {', '.join(titles)}")
        if columns.count(title) > 1:
            raise UserError(f"--{name}_column {given}: has {title} more than once; give each column once")
    return [title for title in columns if title in titles]


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
                raise UserError(f"{self.path}: image {number} of the list has {len(row)} of {len(self.titles)} columns")
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
        n = images.shape[:1]
        fits = labels is None or labels.dtype.kind in "iu" and labels.shape in (n, (*n, 1))
        if images.ndim not in (3, 4) or not fits:
            found = f"images {images.shape} and labels {None if labels is None else f'{labels.dtype} {labels.shape}'}"
            accepted = "(n, height, width) or (n, height, width, channels), and whole numbers (n,); others in a list"
            raise ValueError(f"{found}: must be {accepted}")
        labels = None if labels is None else labels.reshape(-1)
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
