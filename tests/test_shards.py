"""The same images from folders, archives, lists and tables; an index that is built once; what is damaged is named."""

import csv
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from images import ClassFolders, build_images

CLASSES = ["ant", "bee", "cat"]


def entries(folder):
    """(class, name, bytes) of the images of class folders."""
    return [(path.parent.name, path.name, path.read_bytes()) for path in sorted(Path(folder).glob("*/*.png"))]


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_a_class(folder, found):
    for label in CLASSES:
        write_tar(folder / f"{label}.tar", [(name, data) for c, name, data in reversed(found) if c == label])


def tar_of_class_folders(folder, found):
    write_tar(folder.with_suffix(".tar"), [(f"./all/{c}/{name}", data) for c, name, data in found], tarfile.GNU_FORMAT)


def tar_of_tars(folder, found):
    tar_a_class(folder / "tars", found)
    write_tar(folder.with_suffix(".tar"), [(path.name, path.read_bytes()) for path in (folder / "tars").iterdir()])
    shutil.rmtree(folder)


def webdataset_shards(folder, found, label=lambda c: (".cls", str(CLASSES.index(c)).encode())):
    """Two shards of samples in no order, with labels beside the images."""
    for shard in range(2):
        members = []
        for c, name, data in found[1 - shard :: 2]:
            suffix, text = label(c)
            members += [(f"{c}/{name}", data), (f"{c}/{Path(name).stem}{suffix}", text)]
        write_tar(folder / f"{shard:06}.tar", members)


def webdataset_of_json(folder, found):
    webdataset_shards(folder, found, lambda c: (".json", json.dumps({"label": c, "width": 48}).encode()))


def zip_of_class_folders(folder, found):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for number, (c, name, data) in enumerate(found):
            archive.writestr(f"{c}/{name}", data, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][number % 2])


def class_folders(folder, found):
    for c, name, data in found:
        (folder / c).mkdir(parents=True, exist_ok=True)
        (folder / c / name).write_bytes(data)


def csv_list(folder, found):
    class_folders(folder.parent / "files" / folder.name, found)
    with open(folder.with_suffix(".csv"), "w", newline="") as file:
        rows = [(f"files/{folder.name}/{c}/{name}", "unused", c) for c, name, _ in reversed(found)]
        csv.writer(file).writerows([("path", "other", "label"), *rows])


def parquet_files(folder, found, names=CLASSES):
    """As Hugging Face's hub has them: two files, row groups of 3, images of bytes and path, classes by number."""
    import pyarrow
    import pyarrow.parquet

    (folder.parent / "data").mkdir(parents=True, exist_ok=True)
    split = {"train": "train", "val": "validation"}[folder.name]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for number in range(2):
        rows = found[number::2]
        table = pyarrow.table(
            {
                "image": [{"bytes": data, "path": name} for _, name, data in rows],
                "label": [names.index(c) for c, _, _ in rows],
            }
        ).replace_schema_metadata(metadata)
        path = folder.parent / "data" / f"{split}-{number:05}-of-00002.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=3)


def arrow_files(folder, found):
    """As `save_to_disk` of Hugging Face's library lays out a dictionary of data sets."""
    import pyarrow

    folder.mkdir(parents=True)
    table = pyarrow.table(
        {"image": [{"bytes": d, "path": n} for _, n, d in found], "label": [CLASSES.index(c) for c, _, _ in found]}
    )
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def pixels(found):
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, _, data in found])


def npz_file(folder, found):
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent.with_suffix(".npz")
    arrays = dict(np.load(path)) if path.exists() else {}
    found = found[::-1]  # as files mix classes; in a class the order stays
    found = [entry for label in CLASSES for entry in sorted(e for e in found if e[0] == label)][::1]
    arrays |= {f"{folder.name}_images": pixels(found)}
    arrays |= {f"{folder.name}_labels": np.array([[CLASSES.index(c)] for c, _, _ in found])}
    np.savez(path, **arrays)


FORMATS = {f.__name__: f for f in (
    class_folders, tar_a_class, tar_of_class_folders, tar_of_tars, webdataset_shards, webdataset_of_json,
    zip_of_class_folders, csv_list, parquet_files, arrow_files,
)}  # fmt: skip


@pytest.fixture(scope="session")
def all_formats(tmp_path_factory, labelled_folder):
    """The labelled folder in each format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, write in FORMATS.items():
        for split in ("train", "val"):
            write(folder / name / split, entries(labelled_folder / split))
    return folder


def contents(image_set):
    return [image_set.index.read(i) for i in range(len(image_set))]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_format_holds_the_same_images_in_the_same_order(all_formats, labelled_folder, name, split):
    expected = ClassFolders(labelled_folder / split, 3)
    found = build_images("IMNET", all_formats / name, split, 3)
    assert found.class_names == (["0", "1", "2"] if name == "webdataset_shards" else CLASSES)
    assert np.array_equal(found.targets, expected.targets) and contents(found) == contents(expected)
    assert [Path(found.name(i)).name for i in range(7)] == [Path(expected.name(i)).name for i in range(7)]
    unlabelled = build_images("image_folder", all_formats / name, split, 3, labelled=False)
    assert contents(unlabelled) == contents(expected)
    assert contents(pickle.loads(pickle.dumps(found))) == contents(expected)
