"""The same images from folders, archives, lists and tables; an index that is built once; what is damaged is named."""

import csv
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import SMALL, TINY, assert_same_weights, log_lines, weights
from PIL import Image

import datasets
import hooks
import index
import main_finetune
import shards
import sources
import tables
import utils
from image_sets import ClassFolders, ImageFolder, build_images
from loaders import build_eval_loader, build_train_loader
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision 0.29

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
    """As MedMNIST's: both splits in a file, labels (n, 1); the classes mixed, those of a class in their order."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / "images.npz"
    arrays = dict(np.load(path)) if path.exists() else {}
    mixed = sorted(found, key=lambda entry: entry[1])
    arrays[f"{folder.name}_images"] = pixels(mixed)
    arrays[f"{folder.name}_labels"] = np.array([[CLASSES.index(c)] for c, _, _ in mixed])
    np.savez(path, **arrays)


def npy_files(folder, found):
    folder.parent.mkdir(parents=True, exist_ok=True)
    np.save(folder.with_suffix(".npy"), pixels(found))
    np.save(folder.parent / f"{folder.name}_labels.npy", [CLASSES.index(c) for c, _, _ in found])


FORMATS = {f.__name__: f for f in (
    class_folders, tar_a_class, tar_of_class_folders, tar_of_tars, webdataset_shards, webdataset_of_json,
    zip_of_class_folders, csv_list, parquet_files, arrow_files,
)}  # fmt: skip


ARRAYS = {"npz_file": npz_file, "npy_files": npy_files}


@pytest.fixture(scope="session")
def all_formats(tmp_path_factory, labelled_folder):
    """The labelled folder in each format."""
    folder = tmp_path_factory.mktemp("formats")
    for name, write in (FORMATS | ARRAYS).items():
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


def path_of(all_formats, name):
    return all_formats / name / "images.npz" if name == "npz_file" else all_formats / name


def finetune_args(path, *flags):
    command = [*TINY, "--batch_size", 4, "--data_path", path, *flags]
    args = main_finetune.get_args_parser().parse_args([*map(str, command)])
    args.update_freq = 1
    return args


@pytest.mark.parametrize("name", [*FORMATS, *ARRAYS])
def test_every_format_makes_the_same_batches(all_formats, labelled_folder, name):
    """Of pre-training and fine-tuning, from any step on; resumed in each."""

    def batches(path, step=0):
        args = finetune_args(path)
        found = []
        args.scale, args.repeated_sampling = (0.2, 1), 1
        for dataset in (datasets.build_dataset(True, args), datasets.build_pretrain_dataset(args)):
            loader, sampler = build_train_loader(dataset, args, "cpu")
            sampler.set_position(1, step)
            found.append([batch[:2] for batch in loader])
        return found

    whole, rest = batches(labelled_folder), batches(path_of(all_formats, name), step=2)
    for expected, found in zip(whole, rest, strict=True):
        for a, b in zip(expected[2:], found, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_run_resumes_in_another_format_bit_for_bit(all_formats, labelled_folder, finetune, tmp_path, narrow):
    flags = [*TINY, "--batch_size", 4, "--warmup_epochs", 1, "--epochs", 2, "--save_ckpt_steps", 3]
    assert finetune(*flags, "--data_path", labelled_folder, "--output_dir", tmp_path / "a").status == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").glob("checkpoint-[01].pth"):
        path.unlink()  # as if killed between
    (tmp_path / "b" / "checkpoint-1-3.pth").unlink()
    (tmp_path / "b" / "checkpoint-best.pth").unlink()
    resumed = finetune(*flags, "--data_path", all_formats / "tar_of_tars", "--output_dir", tmp_path / "b")
    assert resumed.status == 0 and "epoch 0, step 3" in resumed.out
    for name in ("checkpoint-1.pth", "checkpoint-best.pth"):
        assert_same_weights(weights(tmp_path / "a", name), weights(tmp_path / "b", name))


@pytest.fixture
def both_trainings(narrow, pretrain, finetune, monkeypatch):
    """both_trainings(data, folder, interrupted): pre-training and fine-tuning from it, of 2 epochs of 5 steps.

    interrupted: each ends at its 8th step as by a SIGKILL, with a checkpoint of the 7th, and resumes with a worker.
    """
    note = hooks.Console.on_log
    monkeypatch.setattr("models.cost.describe", lambda *_, **options: "not counted, to save a third of the time")

    def stop(console, run):
        note(console, run)
        if (run.epoch, run.step) == (1, 3):
            raise KeyboardInterrupt  # at once: nothing more is saved

    def train(data, folder, interrupted=False):
        flags = ["--data_path", data, *"--batch_size 4 --epochs 2 --warmup_epochs 1 --save_ckpt_steps 2".split()]
        flags += ["--print_freq", 1]
        start = ["--stem_stride", 1, "--finetune", folder / "pretrained" / "checkpoint-1.pth"]
        for script, name, more in (
            (pretrain, "pretrained", [*SMALL, "--picture_freq", 0]),
            (finetune, "finetuned", [*TINY, *start]),
        ):
            command = [*more, *flags, "--output_dir", folder / name]
            if interrupted:
                with monkeypatch.context() as patch:
                    patch.setattr(hooks.Console, "on_log", stop)
                    assert script(*command).status == 130
            result = script(*command, "--num_workers", int(interrupted))
            assert result.status == 0 and ("epoch 1, step 2" in result.out) == interrupted

    return train


def test_pretraining_and_fine_tuning_are_bit_equal_from_every_format_also_after_a_kill(
    all_formats, labelled_folder, both_trainings, tmp_path
):
    both_trainings(labelled_folder, tmp_path / "folders")
    for name in (
        "class_folders", "tar_a_class", "webdataset_shards", "csv_list", "parquet_files", "npz_file", "npy_files",
    ):  # fmt: skip
        both_trainings(path_of(all_formats, name), tmp_path / name, interrupted=True)
        for run in ("pretrained", "finetuned"):
            expected, found = tmp_path / "folders" / run, tmp_path / name / run
            assert_same_weights(weights(found, "checkpoint-1.pth"), weights(expected, "checkpoint-1.pth"))
            assert log_lines(found) == log_lines(expected), name  # losses and accuracies


REFERENCES = """
import glob, hashlib, json, sys
import datasets, webdataset
formats, labelled, out = sys.argv[1:]
found = {}
def digest(data): return hashlib.sha256(data).hexdigest()
for name in ("webdataset_shards", "webdataset_of_json"):
    for split in ("train", "val"):
        samples = webdataset.WebDataset(sorted(glob.glob(f"{formats}/{name}/{split}/*.tar")), shardshuffle=False)
        label = lambda s: int(s["cls"]) if "cls" in s else ["ant", "bee", "cat"].index(json.loads(s["json"])["label"])
        found[f"{name}/{split}"] = sorted((label(s), digest(s["png"])) for s in samples)
for name, split in (("parquet_files", "train"), ("parquet_files", "validation")):
    rows = datasets.load_dataset("parquet", data_files=glob.glob(f"{formats}/{name}/data/{split}-*"), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    key = f"{name}/{split.replace('idation', '')}"
    found[key] = sorted((row["label"], digest(row["image"]["bytes"])) for row in rows)
folders = datasets.load_dataset("imagefolder", data_dir=labelled)
folders.save_to_disk(out)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def references(all_formats, labelled_folder, tmp_path_factory):
    """{format/split: [(class, SHA-256)]} as webdataset and Hugging Face read them, and a data set that these saved."""
    folder = tmp_path_factory.mktemp("references")
    command = [sys.executable, "-c", REFERENCES, all_formats, labelled_folder, folder / "saved"]
    environment = os.environ | {
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }  # offline, and nothing in the home folder
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), folder / "saved"


def test_other_readers_find_the_same_samples(all_formats, references):
    import hashlib

    for name, expected in references[0].items():
        found = build_images("IMNET", all_formats / name.split("/")[0], name.split("/")[1], 3)
        digests = [hashlib.sha256(data).hexdigest() for data in contents(found)]
        assert sorted([int(t), d] for t, d in zip(found.targets, digests, strict=True)) == expected


def test_a_data_set_that_hugging_face_saved_is_read(labelled_folder, references):
    for split, expected in (("train", "train"), ("val", "val")):
        found = build_images("IMNET", references[1], split, 3)
        assert found.class_names == CLASSES
        assert contents(found) == contents(ClassFolders(labelled_folder / expected, 3))


# ---------------------------------------------------------------- the index


@pytest.fixture
def folder(tmp_path, labelled_folder):
    """Class folders whose times of change are an hour ago."""
    shutil.copytree(labelled_folder / "train", tmp_path / "data")
    settle(tmp_path / "data")
    return tmp_path / "data"


def settle(folder):
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 3600 * 10**9))


def open_index(path, **options):
    return index.open_index(sources.find_source(path, "", False), sources.DEFAULTS._replace(**options), keep=True)


def names(index):
    return [index.path_in_part(i) for i in range(len(index))]


def test_an_index_is_built_once_mapped_and_pickled_by_its_path(folder, monkeypatch):
    first = open_index(folder)
    assert first.folder.parent == folder / ".index" and not list(folder.glob(".index/.new*"))
    monkeypatch.setattr("index.build_index", lambda *_: 1 / 0)
    second = open_index(folder)
    assert names(second) == names(first) and second.digest == first.digest and second.class_names == CLASSES
    assert isinstance(second.target.base, np.memmap) and len(pickle.dumps(second)) < 5000


def test_a_small_source_leaves_no_index(folder):
    ClassFolders(folder, 3)
    assert not (folder / ".index").exists()


@pytest.mark.parametrize("change", ["added", "removed", "version", "damaged"])
def test_a_stale_index_is_named_and_built_anew(folder, monkeypatch, capsys, change):
    kept = open_index(folder).folder
    if change == "added":
        shutil.copy(folder / "ant" / "00.png", folder / "bee" / "new.png")
        settle(folder / "bee")
    elif change == "removed":
        (folder / "ant" / "00.png").unlink()
    elif change == "version":
        monkeypatch.setattr("index.VERSION", 2)
    else:
        (kept / "target.npy").write_bytes(b"")
    capsys.readouterr()
    assert len(open_index(folder)) == 22 + (change == "added") - (change == "removed")
    reasons = {"version": "of version 1, not 2", "damaged": "No data left in file"}
    reason = reasons.get(change, "the images have changed")
    assert capsys.readouterr().out == f"{kept} is stale ({reason}): the images are listed anew\n"
    assert len(list(folder.glob(".index/*"))) == 1


def test_a_folder_that_changes_while_it_is_listed_is_listed_again(folder, capsys):
    os.utime(folder / "bee", ns=(0, time.time_ns() + 10**9))  # as if within the listing
    open_index(folder)
    capsys.readouterr()
    open_index(folder)
    assert "the images have changed" in capsys.readouterr().out


@pytest.mark.parametrize("index_dir", [False, True])
def test_an_index_that_cannot_be_kept_is_used_from_memory(folder, monkeypatch, capsys, tmp_path, index_dir):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(np, "save", full)
    index = open_index(folder, index_dir=str(tmp_path / "index") if index_dir else None)
    assert len(index) == 22 and index.folder is None
    assert capsys.readouterr().out.count("No space left on device") == 2 - index_dir
    assert not [
        path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".json") or path.name.startswith(".new")
    ]
    monkeypatch.undo()
    assert open_index(folder, index_dir=str(tmp_path / "index")).folder.parent == tmp_path / "index"


def test_of_two_jobs_one_lists_and_the_other_waits(folder, monkeypatch):
    list_folder, listed = shards.list_folder, []

    def slowly(*args):
        listed.append(args)
        time.sleep(0.3)
        return list_folder(*args)

    monkeypatch.setattr(shards, "list_folder", slowly)
    with ThreadPoolExecutor(2) as jobs:
        indexes = list(jobs.map(open_index, [folder, folder]))
    assert len(listed) == 1 and [len(index) for index in indexes] == [22, 22]
    assert indexes[0].folder == indexes[1].folder


def test_all_ranks_must_have_the_same_images(labelled_folder, folder, monkeypatch):
    def gather(value):
        return [value, other] if value and isinstance(value[0], int) else [value]

    monkeypatch.setattr(utils, "all_gather", gather)
    found = ClassFolders(folder, 3)
    other = (len(found), found.digest)
    assert datasets.on_all_ranks(lambda: found) is found
    (folder / "ant" / "00.png").rename(folder / "ant" / "renamed.png")
    renamed = ClassFolders(folder, 3)
    with pytest.raises(UserError, match="^rank 1 has other images or classes than rank 0: 22, of other names"):
        datasets.on_all_ranks(lambda: renamed)
    (folder / "ant" / "renamed.png").unlink()
    fewer = ClassFolders(folder, 3)
    with pytest.raises(UserError, match="22 instead of 21 images"):
        datasets.on_all_ranks(lambda: fewer)
    (folder / "ant").rename(folder / "aphid")
    assert ClassFolders(folder, 3).digest != fewer.digest


# ---------------------------------------------------------------- folders that are not what they seem


def test_a_folder_that_cannot_be_read_is_refused(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="bee: cannot be listed: Permission denied"):
        ImageFolder(folder, 3)


def test_class_folders_that_are_one_folder_are_refused(folder):
    (folder / "wasp").symlink_to(folder / "bee")
    with pytest.raises(UserError, match="the classes bee and wasp are one folder"):
        ClassFolders(folder, 3)
    assert len(ImageFolder(folder, 3)) == 22 + 7


def test_class_folders_without_an_image_are_named(folder, capsys):
    (folder / "wasp").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").touch()
    assert ClassFolders(folder, 3).class_names == CLASSES
    assert "2 class folders without an image: notes, wasp" in capsys.readouterr().out


def test_folders_beside_train_are_named(folder, capsys):
    (folder / "cat").rename(folder / "train")
    (folder / "test").mkdir()
    assert len(build_images("image_folder", folder, "train", 3, labelled=False)) == 7
    assert "train is used; not ant, bee beside it" in capsys.readouterr().out


def test_one_class_is_nothing_to_learn(folder):
    for name in ("ant", "bee"):
        shutil.rmtree(folder / name)
    with pytest.raises(UserError, match="has one class only, cat: nothing to tell apart"):
        datasets.build_labelled_sets(finetune_args(folder, "--data_set", "image_folder", "--disable_eval"))


def test_only_regular_files_are_opened(folder, capsys):
    os.mkfifo(folder / "ant" / "fifo.png")
    found = ImageFolder(folder, 3)
    assert len(found) == 22 and "1 left out: ant/fifo.png (not a regular file)" in capsys.readouterr().out
    path = Path(found.name(3))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        found.open(3)


def test_a_disk_that_is_gone_costs_no_search_of_all_images(folder, monkeypatch):
    args = finetune_args(folder, "--data_set", "image_folder", "--eval_data_path", folder, "--max_bad_images", 3)
    sets = datasets.build_labelled_sets(args)[:2]
    opened = []

    def gone(index, number):
        opened.append(number)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("index.Index.read", gone)
    for args.num_workers in (0, 1):
        train = build_train_loader(sets[0], args, "cpu")[0]
        for loader, most in ((train, 4), (build_eval_loader(sets[1], args, "cpu"), 4)):
            opened.clear()
            with pytest.raises(UserError, match="^4 images .*could not be read, --max_bad_images is 3.*Input/output"):
                list(loader)
            assert len(opened) == (0 if args.num_workers else most)


# ---------------------------------------------------------------- archives that are not what they seem

PIXEL = io.BytesIO()
Image.new("RGB", (4, 4)).save(PIXEL, "PNG")
PIXEL = PIXEL.getvalue()


def tar_index(path):
    return index.build_index(sources.find_source(path, "", False), sources.DEFAULTS)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_of_every_tar_format(tmp_path, format):
    members = {f"a/{'x' * 90}/{'y' * 60}.png": PIXEL, "b/1.png": PIXEL[::-1], "b/2.JPEG": b"2"}
    if format != tarfile.USTAR_FORMAT:
        members |= {f"a/{'é' * 100}/{'z' * 120}.png": b"3"}
    index = tar_index(write_tar(tmp_path / "a.tar", members.items(), format))
    assert {index.path_in_part(i): index.read(i) for i in range(len(index))} == members
    assert index.class_names == ["a", "b"]


def test_sizes_in_base_256_and_headers_without_magic(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a/1.png", PIXEL), ("b/2.png", PIXEL)], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + len(PIXEL).to_bytes(11, "big")
    data[257:265] = bytes(8)  # as before POSIX: known by its checksum alone
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    assert [tar_index(path).read(i) for i in range(2)] == [PIXEL] * 2


def test_hostile_members_are_left_out_and_nothing_else_is_read(tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a/link.png", tarfile.SYMTYPE), ("a/hard.png", tarfile.LNKTYPE), ("a/device.png", tarfile.CHRTYPE),
            ("a/fifo.png", tarfile.FIFOTYPE), ("../out.png", tarfile.REGTYPE), ("/etc/x.png", tarfile.REGTYPE),
            ("a/good.png", tarfile.REGTYPE), ("a/\n.png", tarfile.SYMTYPE),
            ("b/good.png", tarfile.REGTYPE), ("b/._good.png", tarfile.REGTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", len(PIXEL) * (kind == tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(PIXEL))
    index = tar_index(path)
    assert names(index) == ["a/good.png", "b/good.png"] and index.read(0) == PIXEL
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "7 left out" in line and "a/link.png (member of type 2)" in line


@pytest.mark.parametrize(
    "fault, message", [("cut", "cut short"), ("garbage", "damaged, from byte"), ("empty", "empty")]
)
def test_a_damaged_archive_is_named_and_what_precedes_counts(tmp_path, capsys, fault, message):
    for label in ("ant", "bee"):
        write_tar(tmp_path / f"{label}.tar", [(f"{i}.png", PIXEL) for i in range(4)])
    path = tmp_path / "bee.tar"
    data = path.read_bytes()
    step = 512 + -(-len(PIXEL) // 512) * 512
    damaged = {"cut": data[: 2 * step + 520], "garbage": data[: 2 * step] + b"x" * 9000, "empty": b""}[fault]
    path.write_bytes(damaged)
    index = tar_index(tmp_path)
    assert index.class_names == CLASSES[: 1 + (fault != "empty")] and len(index) == 4 + 2 * (fault != "empty")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "1 left out: bee.tar (" in line and message in line


def test_a_member_of_negative_size_does_not_turn_the_reader_in_circles(tmp_path, capsys):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for pax in ({}, {"size": "-2048"}):
            info = tarfile.TarInfo("a/1.png")
            info.size, info.pax_headers = len(PIXEL), pax
            tar.addfile(info, io.BytesIO(PIXEL))
    assert len(tar_index(path)) == 1 and "a member of size -2048" in capsys.readouterr().out


def test_an_archive_that_is_rewritten_in_the_run_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a/1.png", PIXEL), ("b/2.png", PIXEL)])
    found = ClassFolders(sources.find_source(path, "", False), 3)
    found.open(0)
    os.utime(path, ns=(0, 0))
    with pytest.raises(OSError, match="a.tar was changed after it was listed"):
        found.open(1)


def test_many_archives_are_read_with_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr("index.OPEN_FILES", 4)
    for number in range(12):
        write_tar(tmp_path / f"{number:03}.tar", [("a.png", PIXEL)])
    index, before = tar_index(tmp_path), len(os.listdir("/proc/self/fd"))
    assert index.class_names == [] and all(index.read(i) == PIXEL for i in [*range(12), *range(12)])
    assert len(os.listdir("/proc/self/fd")) == before + 4


def test_gzipped_images_are_unpacked_and_zip_files_that_are_none_are_named(tmp_path, capsys):
    import gzip

    path = write_tar(tmp_path / "a.tar", [("a/1.png", gzip.compress(PIXEL)), ("b/2.png", PIXEL)])
    assert tar_index(path).read(0) == PIXEL  # as 26 images of ImageNet-22K are
    (tmp_path / "b.zip").write_bytes(b"PK no")
    assert not len(tar_index(tmp_path / "b.zip")) and "b.zip (File is not a zip file)" in capsys.readouterr().out


def test_braces_name_shards():
    assert sources.expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert sources.expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]


def test_a_pattern_reads_the_shards_that_it_names(all_formats, capsys):
    folder = all_formats / "webdataset_shards" / "train"
    found = build_images("image_folder", folder / "{000000..000002}.tar", "train", 3)
    assert len(found) == 22 and "1 left out: 000002.tar (No such file or directory)" in capsys.readouterr().out


def test_labels_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    rows = "".join(f"{n}.png,{n}\n" for n in (10, 9, 2, 100))
    (tmp_path / "a.csv").write_text(f"path,label\n{rows}")
    index = tar_index(tmp_path / "a.csv")
    assert index.class_names == ["2", "9", "10", "100"] and names(index)[0] == "2.png"


# ---------------------------------------------------------------- mistakes


def write_list(tmp_path, text, name="a.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("file,label\na.png,0\n", "", r"no column 'path' among \['file', 'label'\]; give --path_column"),
        ("path,label\na.png,0\n", "--label_column kind", "--label_column kind: .* has the columns path, label"),
        ("path,label\na.png,0\n", "--label_column label,", "--label_column '': .* has the columns path, label"),
        ("path,a,b\na.png,0,1\n", "--label_column a,b,a --loss mse", "--label_column a,b,a: has a more than once"),
        ("path,label\na.png,0\nb.png\n", "", "image 2 of the list has 1 of 2 columns"),
        ("path,label,split\na.png,0,test\n", "", "no image of train among the splits test"),
        ("path,label\na.png,0\nb.png,\n", "--disable_eval", r"b.png has no label \(--label_column label\)"),
        ("path,label\na.png,0\n", "--disable_eval", "none of the first 1 images can be read: .*a.png"),
        ("", "", "no column 'path'"),
        ("path,label\n", "", "no image there"),
    ],
)
def test_mistakes_in_a_list(tmp_path, text, flags, message):
    args = finetune_args(write_list(tmp_path, text), *flags.split())
    with pytest.raises(UserError, match=message):
        datasets.build_labelled_sets(args)


def test_a_list_is_relative_to_its_folder_and_may_have_splits(folder, tmp_path, finetune):
    rows = "".join(
        f"{'val' if i % 4 == 0 else 'train'}\tdata/{p.parent.name}/{p.name}\t{p.parent.name}\n"
        for i, p in enumerate(sorted(folder.glob("*/*.png")))
    )
    path = write_list(tmp_path, f"fold\tfile\tkind\n{rows}", "a.tsv")
    columns = "--split_column fold --path_column file --label_column kind".split()
    train, evaluation, task = datasets.build_labelled_sets(finetune_args(path, *columns))
    assert (len(train.images), len(evaluation), task.names) == (16, 6, CLASSES)
    result = finetune(*TINY, "--data_path", path)
    assert result.status == 2 and result.err.count("\n") == 1 and "give --path_column" in result.err


def test_a_list_without_splits_is_told_its_ways_out(tmp_path, folder):
    path = write_list(tmp_path, "path,label\ndata/ant/00.png,x\ndata/bee/01.png,y\n")
    with pytest.raises(UserError, match="give --val_fraction 0.1, --eval_data_path, or --split_column"):
        datasets.build_labelled_sets(finetune_args(path))


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("parquet_files", "--image_column jpg", "--image_column jpg: .* has the columns image, label"),
        ("parquet_files", "--label_column kind", "--label_column kind: .* has the columns image, label"),
        ("arrow_files", "--image_column label", "column label holds no bytes"),
    ],
)
def test_mistakes_in_tables(all_formats, name, flags, message):
    with pytest.raises(UserError, match=message):
        datasets.build_labelled_sets(finetune_args(all_formats / name, *flags.split()))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.npz", "a.npy", "a.tar", "a.zip"])
def test_files_that_are_not_what_their_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(UserError, match=name):
        build_images("image_folder", tmp_path / name, "train", 3)


def test_pyarrow_is_asked_for_where_it_is_missing(all_formats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    tables.open_table.cache_clear()
    with pytest.raises(UserError, match="is read by pyarrow, which is missing: pip install pyarrow"):
        build_images("image_folder", all_formats / "parquet_files", "train", 3)


IMAGES = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "has the arrays pictures; must have"),
        ({"images": IMAGES[0]}, r"images \(8, 8\)"),
        ({"images": IMAGES, "labels": np.zeros(4, "f4")}, r"labels float32 \(4,\): must be .* whole numbers \(n,\)"),
        ({"images": IMAGES, "labels": np.zeros((4, 2), int)}, r"labels int64 \(4, 2\): must be"),
        ({"images": IMAGES, "labels": np.zeros((2, 2), int)}, r"labels int64 \(2, 2\): must be"),
        ({"images": IMAGES, "labels": np.zeros((), int)}, r"labels int64 \(\): must be"),
    ],
)
def test_arrays_of_other_names_shapes_or_dtypes_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"a.npz: .*{message}"):
        build_images("image_folder", tmp_path / "a.npz", "train", 3)


def read_array(found, index):
    """(H, W, C) of an image set of arrays."""
    with found.open(index) as image:
        return image.permute(1, 2, 0).numpy()


def test_mnist_is_read_from_its_files(tmp_path):
    import gzip

    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([7, 2, 7, 0, 2], dtype=np.uint8)
    for stem in ("train", "t10k"):
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{stem}-{what}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    for split in ("train", "val"):
        found = build_images("IMNET", tmp_path, split, 1)
        assert found.class_names == ["0", "2", "7"] and found.targets.tolist() == [0, 1, 1, 2, 2]
        assert [np.array_equal(read_array(found, i)[:, :, 0], images[n]) for i, n in enumerate((3, 1, 4, 0, 2))] == [
            True
        ] * 5
    assert len(build_images("image_folder", tmp_path, "train", 1, labelled=False)) == 5


def test_gray_arrays_of_16_bits_and_of_five_channels(tmp_path):
    sixteen = np.arange(32, dtype=np.uint16).reshape(2, 4, 4) * 2000
    np.save(tmp_path / "a.npy", sixteen)
    found = build_images("image_folder", tmp_path / "a.npy", "train", 1, labelled=False)
    assert np.array_equal(read_array(found, 1)[:, :, 0], sixteen[1])  # `decode` scales it
    bands = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "b.npy", bands)
    found = build_images("image_folder", tmp_path / "b.npy", "train", 5, labelled=False)
    assert np.array_equal(read_array(found, 2), bands[2])
    with pytest.raises(UserError, match="has no labels; give them as NAME_labels.npy"):
        build_images("image_folder", tmp_path / "b.npy", "train", 5)


def tiff_bytes(pages):
    file = io.BytesIO()
    tifffile.imwrite(file, pages, photometric="minisblack", compression="zlib")
    return file.getvalue()


def test_five_bands_of_16_bits_make_the_same_batches_as_tiff_in_every_format_and_as_arrays(tmp_path):
    bands = np.random.default_rng(0).integers(1000, 5000, (9, 40, 44, 5), dtype=np.uint16)
    found = [(CLASSES[i // 3], f"{i}.tif", tiff_bytes(np.moveaxis(image, 2, 0))) for i, image in enumerate(bands)]
    formats = class_folders, tar_a_class, webdataset_shards, zip_of_class_folders, csv_list, parquet_files, arrow_files
    for write in formats:
        write(tmp_path / write.__name__ / "train", found)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "train.npy", bands)
    np.save(tmp_path / "arrays" / "train_labels.npy", np.arange(9) // 3)
    flags = "--in_chans 5 --aa none --pixel_range 1000 5000 --input_size 32 40".split()
    batches = {}
    for name in ("arrays", *(write.__name__ for write in formats)):
        args = finetune_args(tmp_path / name, *flags)
        args.scale, args.repeated_sampling = (1, 1), 1
        for dataset in (datasets.build_dataset(True, args), datasets.build_pretrain_dataset(args)):
            loader, _ = build_train_loader(dataset, args, "cpu")
            batches.setdefault(type(dataset), []).append([batch.imgs for batch in loader])
    for first, *others in batches.values():
        assert first[0].shape == (4, 5, 32, 40) and first[0].float().std() > 50 and len(others) == len(formats)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_val_fraction_holds_out_a_stratified_part_that_depends_on_the_seed_alone(folder, tmp_path, finetune, narrow):
    def split(seed):
        args = finetune_args(folder, "--val_fraction", 0.3, "--seed", seed)
        return [s.images for s in datasets.build_labelled_sets(args)[:2]]

    (train, held), (again, other) = split(0), (split(0)[1], split(1)[1])
    sets = [{s.name(i) for i in range(len(s))} for s in (train, held, again, other)]
    assert not sets[0] & sets[1] and len(sets[0] | sets[1]) == 22 and sets[1] == sets[2] != sets[3]
    assert np.bincount(held.targets).tolist() == [2, 2, 2] and held.digest != other.digest
    flags = [*TINY, "--data_path", folder, "--batch_size", 4, "--epochs", 1, "--warmup_epochs", 0]
    assert finetune(*flags, "--val_fraction", 0.3, "--output_dir", tmp_path / "out").status == 0
    listed = build_images("image_folder", tmp_path / "out" / "validation.csv", "", 3)
    assert {listed.name(i) for i in range(len(listed))} == sets[1] and np.array_equal(listed.targets, held.targets)
    with pytest.raises(UserError, match="^--val_fraction 0.5: not with --eval_data_path"):
        datasets.check_labelled_args(finetune_args(folder, "--val_fraction", 0.5, "--eval_data_path", folder))
