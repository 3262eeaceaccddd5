"""Curves from log.txt: what is drawn of which lines, names of runs, and mistakes reported in one line."""

import errno
import json
import os
import sys

import pytest
from conftest import run_script_here
from PIL import Image

import tools.plot
from tools.figure import shorten_paths

pytest.importorskip("matplotlib")


@pytest.fixture
def plot(capsys, monkeypatch):
    """plot(*flags): tools/plot.py, see `run_script_here`. The module that opens windows cannot be imported."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    return lambda *flags: run_script_here(tools.plot, flags, monkeypatch, capsys)


def pretraining(epochs=3, loss=0.9):
    """Entries of the log of a pre-training."""
    return [dict(train_loss=loss - 0.1 * e, train_lr=1e-4 * e, epoch=e, n_parameters=9) for e in range(epochs)]


def write_log(folder, entries):
    """A folder with a log.txt of these entries, strings as they are."""
    folder.mkdir(parents=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def draw(*folders):
    return tools.plot.draw(tools.plot.read_runs(folders)[0])


def curves(figure):
    """{label of the y axis: [(epochs done, values), ...]}."""
    return {
        axis.get_ylabel(): [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
        for axis in figure.axes
    }


def legends(figure):
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


def test_different_losses_have_axes_of_their_own(tmp_path):
    pretrained, tuned, old = (write_log(tmp_path / name, pretraining()) for name in ("a", "b", "c"))
    (pretrained / "args.json").write_text('{"mask_ratio": 0.6, "norm_pix_loss": true}')
    (tuned / "args.json").write_text('{"loss": "ce"}')
    drawn = {label: len(runs) for label, runs in curves(draw(pretrained, tuned, old)).items()}
    assert drawn == {
        "loss": 1, "loss (cross-entropy)": 1, "loss (of normalized patches)": 1, "learning rate": 3
    }  # fmt: skip


def test_each_panel_shows_its_keys_by_epochs_done(tmp_path):
    first = dict(train_loss=2.0, train_lr=0.1, test_loss=3.0, test_acc1=10.0, test_acc5=50.0, test_precision1=7.0)
    second = dict(train_loss=1.0, train_lr=0.2, test_loss_ema=4.0, test_acc1_ema=20.0, images_per_second=800.0)
    third = dict(train_loss=0.5, train_lr=0.0, probe_knn=30.0, probe_linear=40)
    run = write_log(tmp_path / "run", [entry | {"epoch": e} for e, entry in enumerate((first, second, third))])
    assert curves(draw(run)) == {
        "loss": [([1, 2, 3], [2.0, 1.0, 0.5]), ([1], [3.0]), ([2], [4.0])],
        "top-1 accuracy (%)": [([1], [10.0]), ([2], [20.0]), ([3], [30.0]), ([3], [40.0])],
        "learning rate": [([1, 2, 3], [0.1, 0.2, 0.0])],
        "throughput (images / s)": [([2], [800.0])],
    }


def test_a_panel_without_data_is_left_out(tmp_path):
    assert list(curves(draw(write_log(tmp_path / "run", pretraining())))) == ["loss", "learning rate"]


def test_a_curve_connects_the_epochs_with_a_finite_value(tmp_path):
    entries = pretraining(6)
    entries[1]["train_loss"], entries[2]["train_loss"] = float("nan"), float("-inf")
    entries[0]["probe_knn"], entries[5]["probe_knn"], entries[4]["probe_knn"] = 10.0, 20.0, "of no use"
    drawn = curves(draw(write_log(tmp_path / "run", entries)))
    assert drawn["loss"][0][0] == [1, 4, 5, 6]
    assert drawn["top-1 accuracy (%)"] == [([1, 6], [10.0, 20.0])]


def test_a_curve_of_one_point_has_a_marker_and_so_has_its_legend(tmp_path):
    figure = draw(write_log(tmp_path / "run", [*pretraining(2), dict(epoch=2, train_loss=1.0, test_loss=2.0)]))
    training, test = figure.axes[0].get_lines()
    assert training.get_marker() == "None" and test.get_marker() == "s"
    assert [line.get_marker() for line in figure.legends[0].get_lines()] == ["None", "s"]


def test_epochs_that_were_trained_again_replace_the_earlier_ones(tmp_path):
    run = write_log(tmp_path / "run", [*pretraining(5), *pretraining(3, loss=0.5)[1:]])
    ((x, y),) = curves(draw(run))["loss"]
    assert x == [1, 2, 3] and y == pytest.approx([0.9, 0.4, 0.3])


def test_each_run_has_a_color_and_each_kind_of_curve_a_line_style(tmp_path):
    entries = [entry | dict(test_loss=1.0, test_acc1=2.0) for entry in pretraining()]
    figure = draw(*(write_log(tmp_path / name, entries) for name in ("a", "b", "c")))
    styles = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert len(set(styles)) == 6 and len({color for color, _ in styles}) == 3 and {s for _, s in styles} == {"-", "--"}
    assert [line.get_linestyle() for line in figure.axes[1].get_lines()] == ["--"] * 3  # test, in every panel
    assert legends(figure) == [["a", "b", "c"], ["training", "test"]]
    assert [line.get_color() for line in figure.legends[0].get_lines()] == [color for color, _ in styles[::2]]


def test_many_runs_have_different_colors(tmp_path):
    figure = draw(*(write_log(tmp_path / f"run{i}", pretraining()) for i in range(15)))
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 15


def test_one_run_with_one_kind_of_curve_has_a_title_and_no_legend(tmp_path):
    figure = draw(write_log(tmp_path / "tiny", pretraining()))
    assert legends(figure) == [] and figure.get_suptitle() == "tiny"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("/runs/tiny", "tiny"),
        ("/runs/tiny /runs/base", "tiny base"),
        ("/runs/a/x /runs/b/x /runs/y", "a/x b/x y"),
        ("/x/runs/tiny /y/runs/tiny", "x/runs/tiny y/runs/tiny"),
        ("/tiny /runs/tiny", "/tiny runs/tiny"),
        ("/ /runs", "/ runs"),
    ],
)
def test_names_are_the_shortest_unique_endings_of_the_paths(paths, names):
    assert shorten_paths(paths.split()) == names.split()


def test_the_picture_is_written_beside_the_first_log_and_each_run_reported_in_a_line(plot, tmp_path):
    a = write_log(tmp_path / "a", [*pretraining(2), dict(epoch=2, train_loss=float("nan"))])
    b = write_log(tmp_path / "b", [pretraining()[0] | dict(probe_knn=12.345, images_per_second=700)])
    result = plot(a / "log.txt", b, a)  # the first one twice
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines() == [
        "a: epochs done 3, train_loss nan, train_lr 0.0001 (epoch 2)",
        "b: epochs done 1, train_loss 0.9, probe_knn 12.35, train_lr 0, images_per_second 700",
        str(a / "curves.png"),
    ]
    with Image.open(a / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 50  # something is drawn
    assert sorted(os.listdir(a)) == ["curves.png", "log.txt"]


def test_other_lines_are_skipped_and_counted(plot, tmp_path):
    deep = "[" * 100_000
    others = [deep, "epoch 3", '{"epoch": 3, "train_lo', "[1]", "3"]
    others += ["{}", '{"epoch": "3"}', '{"epoch": 0.5}', "9" * 5000, ""]
    run = write_log(tmp_path / "run", [*others[:5], *pretraining(), *others[5:]])
    result = plot(run)
    assert result.status == 0
    assert result.out.splitlines()[0] == f"{run}/log.txt: skipped 9 lines that are no JSON object with an epoch"
    assert result.out.splitlines()[1].startswith("run: epochs done 3, train_loss 0.7")


@pytest.mark.filterwarnings("error")  # warnings would be lines on the terminal
@pytest.mark.parametrize("name", [r"$\frac{$", "_old", "日本", os.fsdecode(b"\xff")])
def test_runs_may_have_any_names(plot, tmp_path, name):
    try:
        runs = [write_log(tmp_path / name, pretraining()), write_log(tmp_path / "b", pretraining())]
    except OSError as error:  # a file system of another encoding
        pytest.skip(str(error))
    assert legends(draw(*runs))[0] == [os.fsencode(name).decode(errors="replace"), "b"]
    for given in (runs, runs[:1]):
        result = plot(*given, "--output", tmp_path / "curves.png")
        assert (result.status, result.err) == (0, "")


def test_the_extension_of_output_decides_the_format(plot, tmp_path):
    run = write_log(tmp_path / "run", pretraining())
    assert plot(run, "--output", tmp_path / "curves.pdf").status == 0
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("FOLDER/none", "FOLDER/none: No such file or directory; accepted is a run's output folder, or its log.txt"),
        ("FOLDER", "FOLDER/log.txt: No such file or directory"),
        ("FOLDER/run FOLDER/none", "FOLDER/none: No such file"),
        ("FOLDER/text", "FOLDER/text/log.txt: no line is a JSON object with an epoch"),
        ("FOLDER/empty", "FOLDER/empty/log.txt: no line is"),
        ("FOLDER/bare", "nothing to draw: no finite value of train_loss, "),
        ("FOLDER/run --output FOLDER/none/curves.png", "--output FOLDER/none/curves.png: No such file or directory"),
        ("FOLDER/run --output FOLDER/run", "--output FOLDER/run: must end in one of .png, .pdf, .svg"),
        ("FOLDER/run --output FOLDER/run/log.txt", "run/log.txt: must end in one of .png"),
        ("FOLDER/run --output FOLDER/dir.png", "--output FOLDER/dir.png: Is a directory"),
        ("", "required: LOGDIR"),
    ],
)
def test_mistakes_are_reported_in_one_line(plot, tmp_path, flags, words):
    write_log(tmp_path / "run", pretraining())
    write_log(tmp_path / "text", ["no log"])
    write_log(tmp_path / "empty", [])
    write_log(tmp_path / "bare", [dict(epoch=0, train_loss=float("nan"))])
    (tmp_path / "dir.png").mkdir()
    result = plot(*flags.replace("FOLDER", str(tmp_path)).split())
    assert result.status == 2 and len(result.err.splitlines()) == 1
    assert words.replace("FOLDER", str(tmp_path)) in result.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "log.txt"]


def test_without_matplotlib_a_line_says_how_to_get_it(plot, tmp_path, monkeypatch):
    run = write_log(tmp_path / "run", pretraining())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = plot(run)
    assert result.status == 2 and len(result.err.splitlines()) == 1
    assert "needs matplotlib: pip install matplotlib" in result.err


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(plot, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = write_log(tmp_path / "run", pretraining())
    monkeypatch.setattr(os, "fsync", full)
    result = plot(run)
    assert result.status == 2 and result.err.endswith("run/curves.png: No space left on device\n")
    assert os.listdir(run) == ["log.txt"]
