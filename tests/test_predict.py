"""predict and neighbours: tables and pictures of folders, whatever lies in them; runs that stop and resume."""

import csv
import importlib
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images, randomise, run_script_here
from PIL import Image

import utils
from images import normalize
from models.convnextv2 import ConvNeXtV2
from models.files import INCEPTION_STATISTICS
from tools.inference import FileDataset
from tools.journal import Journal
from tools.sheet import draw_sheet

pytestmark = [
    pytest.mark.usefixtures("seed_and_one_thread"),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),  # torchvision 0.29
]
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
NAMES = ["owl", "newt", "red, eel"]
CPU = "--device cpu --num_workers 0 --batch_size 4".split()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A checkpoint of a network trained on images of 16 pixels, normalized by 0.5 and 0.5: its path and the model."""
    torch.manual_seed(0)
    model = randomise(ConvNeXtV2(num_classes=3, stem_stride=2, **SMALL)).eval()
    flags = {"input_size": (16, 16), "imagenet_default_mean_and_std": False}
    content = {"format": 2, "model": model.state_dict(), "config": model.config, "args": flags, "class_names": NAMES}
    path = tmp_path_factory.mktemp("classifier") / "checkpoint-best.pth"
    torch.save(content, path)
    return path, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images in two folders, the third a text and the seventh cut short."""
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, 10, ("a", "b"), (16, 16))
    (folder / "a/04.png").write_text("no image")
    (folder / "b/03.png").write_bytes((folder / "b/03.png").read_bytes()[:60])
    return folder


@pytest.fixture
def tool(monkeypatch, capsys, classifier):
    """tool(NAME, *flags) with the classifier on the CPU."""

    def run(name, *flags):
        flags = ["--checkpoint", classifier[0], *CPU, *flags]
        return run_script_here(importlib.import_module(f"tools.{name}"), flags, monkeypatch, capsys)

    return run


def read_pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]


def list_images(folder):
    return sorted(map(str, folder.glob("*/*.png")))


def is_bad(path):
    return path.endswith(("a/04.png", "b/03.png"))


@torch.no_grad()
@pytest.mark.parametrize("tta", ["none", "flip"])
def test_predictions_are_a_line_an_image_with_names_probabilities_and_errors(tool, classifier, folder, tmp_path, tta):
    result = tool("predict", folder, "--output", tmp_path / "out.csv", "--topk", 2, "--tta", tta)
    assert result.status == 0 and "10 images, 2 unreadable" in result.out, result.err
    header, *lines = csv.reader((tmp_path / "out.csv").open())
    assert header == ["file", "error", "class1", "probability1", "class2", "probability2"]
    assert [line[0] for line in lines] == list_images(folder)
    for file, error, *pairs in lines:
        if is_bad(file):
            assert error.split(":")[0] in ("UnidentifiedImageError", "OSError") and not pairs
            continue
        imgs = normalize(read_pixels(file), INCEPTION_STATISTICS)
        probabilities = classifier[1](imgs).softmax(1)[0]
        if tta == "flip":
            probabilities = (probabilities + classifier[1](imgs.flip(3)).softmax(1)[0]) / 2
        top = probabilities.topk(2)
        assert (error, pairs[::2]) == ("", [NAMES[i] for i in top.indices])
        assert list(map(float, pairs[1::2])) == pytest.approx(top.values.tolist(), abs=1e-4)
    assert os.listdir(tmp_path) == ["out.csv"]


def test_the_error_of_an_image_is_quoted_whole():
    def fail(index):
        raise ValueError("2 pages (--in_chans)")

    images = types.SimpleNamespace(name=lambda index: "a (1).png", open=fail)
    assert FileDataset(images, None)[3] == (None, None, None, [(3, "ValueError: 2 pages (--in_chans)")])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 4])
def test_features_of_a_scale_are_written_with_names(tool, classifier, folder, tmp_path, scale):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.npy", "out.parquet"):
        assert tool("predict", folder, "--output", tmp_path / name, "--scale", scale).status == 0
    array, table = np.load(tmp_path / "out.npy"), parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert array.dtype == np.float32 and array.shape == (10, SMALL["dims"][scale - 1])
    names = list(csv.reader((tmp_path / "out.names.csv").open()))[1:]
    assert [row["file"] for row in table] == [name for name, _ in names] == list_images(folder)
    for path, row, (_, error), features in zip(list_images(folder), table, names, array, strict=True):
        if is_bad(path):
            assert row["features"] is None and row["error"] == error != "" and np.isnan(features).all()
        else:
            maps = classifier[1].feature_maps(normalize(read_pixels(path), INCEPTION_STATISTICS))[scale - 1]
            assert features == pytest.approx(maps.mean((2, 3))[0].numpy(), abs=1e-4) and error == ""
            assert row["features"] == features.tolist() and row["error"] is None


def test_a_run_that_stops_resumes_with_what_is_done_and_ends_with_the_same_file(tool, folder, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.csv", tmp_path / "stopped.csv"
    assert tool("predict", folder, "--output", whole).status == 0
    append = Journal.append

    def append_once(journal, *block):
        append(journal, *block)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append_once)
    assert tool("predict", folder, "--output", stopped).status == 130 and not stopped.exists()
    monkeypatch.setattr(Journal, "append", append)
    (rows,) = (tmp_path / "stopped.csv.partial").glob("rows-*")
    rows.write_bytes(rows.read_bytes() + b"\x40\0\0\0\0\0\0\0cut short")  # as SIGKILL leaves it
    result = tool("predict", folder, "--output", stopped, "--topk", 1)
    assert result.status == 2 and "stopped.csv.partial: holds part of a run with another --topk" in result.err
    result = tool("predict", folder, "--output", stopped)
    assert "resuming: 3 of 10 images are done" in result.out  # of the first four one cannot be read
    assert stopped.read_bytes() == whole.read_bytes() and sorted(os.listdir(tmp_path)) == ["stopped.csv", "whole.csv"]


def test_what_could_not_be_read_is_tried_again(tool, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "images")
    output = tmp_path / "out.csv"
    with monkeypatch.context() as stopped:
        stopped.setattr(Journal, "merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tool("predict", tmp_path / "images", "--output", output).status == 130
    for name in ("a/04.png", "b/03.png"):
        shutil.copy(folder / "a/00.png", tmp_path / "images" / name)
    result = tool("predict", tmp_path / "images", "--output", output)
    assert "resuming: 8 of 10 images are done" in result.out and "unreadable" not in result.out
    assert not any(error for _, error, *_ in list(csv.reader(output.open()))[1:])


def test_processes_share_the_images_and_another_number_of_them_resumes(tool, folder, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert tool("predict", folder, "--output", whole).status == 0
    with monkeypatch.context() as first_of_two:
        first_of_two.setattr(utils, "get_world_size", lambda: 2)
        result = tool("predict", folder, "--output", output)
    assert result.status == 1 and "5 of 10 images are not done: a process ended" in result.err and not output.exists()
    result = tool("predict", folder, "--output", output)
    assert "resuming: 3 of 10 images are done" in result.out and output.read_bytes() == whole.read_bytes()


def test_predict_into_head_ends_quietly(tool, folder, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    stdout = os.dup(1)
    try:
        os.dup2(write, 1)
        with open(write, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            result = tool("predict", folder)
    finally:
        os.dup2(stdout, 1)
    assert result.status == 128 + signal.SIGPIPE and not result.err


def test_another_image_size_than_the_trainings_is_said(tool, folder):
    result = tool("predict", folder, "--input_size", 32)
    assert result.status == 0
    assert result.err == "WARNING: --input_size makes images of 32 x 32: the checkpoint was trained at 16 x 16\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": ["owl"]}, "names of classes that are not the head's 3"),
        ({"class_names": 5}, "class_names is '5'; must be None or a list of strings"),
        ({"config": {"drop_path_rate": "high"}}, "must be a dict of the network's options"),
        ({"class_names": [1, 2, 3]}, "must be None or a list of strings"),
        ({"task": {"kind": "regression"}}, "must be None or a dict with kind and loss"),
        ({"task": {"kind": "regression", "loss": "ce"}}, "its task is"),
        ({"task": {"kind": "regression", "loss": "mse", "mean": [0], "std": [1]}}, "3 targets with means [0]"),
        ({"task": {"kind": "regression", "loss": "mse", "mean": [0] * 3, "std": [0] * 3}}, "3 targets with means"),
        ({"config": 7}, "must be a dict of the network's options"),
        ({"args": [1, 2]}, "must be a dict of the training's flags"),
        ({"args": {"input_size": ()}}, "must be a dict of the training's flags"),
        ({"args": {"input_size": "big"}}, "must be a dict of the training's flags"),
        ({"args": {"input_size": (16, 16), "crop_pct": "much"}}, "must be a dict of the training's flags"),
    ],
)
def test_a_crafted_checkpoint_is_one_line(tool, classifier, folder, tmp_path, change, words):
    torch.save(torch.load(classifier[0]) | change, tmp_path / "crafted.pth")
    result = tool("predict", folder, "--checkpoint", tmp_path / "crafted.pth")
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--output FOLDER/out.txt", "out.txt: must end in one of .csv, .npy, .parquet"),
        ("--output FOLDER/none/out.csv", "out.csv: no such folder"),
        ("--output FOLDER", "must end in one of"),
        ("--sheet FOLDER/a.png", "--output: give a .csv"),
        ("--output FOLDER/out.npy --sheet FOLDER/a.png", "shows predicted classes"),
        ("--output FOLDER/out.csv --sheet FOLDER/a.odd", "--sheet FOLDER/a.odd: unknown file extension"),
        ("--batch_size 0", "--batch_size 0: must be a whole number, at least 1"),
        ("--scale 5", "invalid choice: 5"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tool, folder, tmp_path, flags, words):
    result = tool("predict", folder, *flags.replace("FOLDER", str(tmp_path)).split())
    words = words.replace("FOLDER", str(tmp_path))
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err
    assert not list(tmp_path.iterdir())


def test_the_contact_sheet_shows_what_the_network_saw(tool, folder, tmp_path):
    result = tool("predict", folder, "--output", tmp_path / "out.csv", "--sheet", tmp_path / "sheet.png")
    assert result.status == 0 and f"10 of them: {tmp_path / 'sheet.png'}" in result.out
    sheet, first = np.asarray(Image.open(tmp_path / "sheet.png")), Image.open(list_images(folder)[0])
    assert np.array_equal(sheet[6:110, 6:110], np.asarray(first.resize((104, 104), Image.Resampling.NEAREST)))


def test_neighbours_are_the_nearest_by_cosine_without_the_query_itself(tool, classifier, folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        importlib.import_module("tools.neighbours"), "save_sheet", lambda flag, output, rows: drawn.extend(rows)
    )
    result = tool("neighbours", folder, "--num_queries", 2, "--output", tmp_path / "out.png")
    assert result.status == 0 and "2 queries among 8 images" in result.out and result.out.count("unreadable") == 2
    good = [path for path in list_images(folder) if not is_bad(path)]
    with torch.no_grad():
        features = [classifier[1].forward_trunk(normalize(read_pixels(path), INCEPTION_STATISTICS)) for path in good]
    features = torch.nn.functional.normalize(torch.cat(features).mean((2, 3)), dim=1)
    for row, query in zip(drawn, (0, 4), strict=True):
        order = [i for i in (features @ features[query]).argsort(descending=True).tolist() if i != query]
        labels = [f"{Path(good[i]).parent.name}/{Path(good[i]).stem}" for i in [query, *order]]
        assert [caption.split("\n")[1] for _, caption, _ in row] == labels
        colors = ["green" if label[0] == labels[0][0] else "red" for label in labels[1:]]
        assert [color for *_, color in row] == ["black", *colors]


def test_neighbours_of_other_images_are_drawn(tool, folder, tmp_path):
    images, output = list_images(folder), tmp_path / "out.png"
    result = tool("neighbours", folder / "a", "--queries", images[5], images[7], "--output", output)
    assert result.status == 0 and "2 queries among 4 images" in result.out
    assert Image.open(output).size == (5 * 116, 2 * (116 + 26))


def test_a_sheet_frames_pictures_and_keeps_their_shape():
    pixels = torch.full((1, 10, 20), 90, dtype=torch.uint8)
    sheet = np.asarray(draw_sheet([[(pixels, "owl", "red"), (pixels, "newt\n1", None)]]))
    assert sheet.shape == (116 + 26, 2 * 116, 3)
    assert (
        (sheet[6:58, 6:110] == 90).all() and (sheet[4, 6:110] == (255, 0, 0)).all() and (sheet[4, 122:226] == 255).all()
    )
