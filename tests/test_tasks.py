"""Tasks: classes, several classes or numbers of an image; metrics and weights are scikit-learn's, losses torch's."""

import csv
import importlib
import io
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_weights, log_lines, run_script_here, weights
from PIL import Image
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
    top_k_accuracy_score,
)  # fmt: skip
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup

import main_finetune
import shards
import tasks
from datasets import build_labelled_sets
from engine_finetune import build_mixup
from evaluation import ClassEvaluation, MultiLabelEvaluation, RegressionEvaluation
from loaders import BalancedSampler
from run import is_better
from tasks import Classification, Labels, MultiLabel, Regression, find_task, restore_task
from tools import convert, predict, probe


def test_metrics_agree_with_scikit_learn():
    scores, targets = torch.randn(60, 7), torch.randint(6, (60,))  # the last class has no image
    result = ClassEvaluation(0.5, targets, scores.topk(3).indices, range(7), topk=(3, 2))
    columns, metrics = result.per_class(), result.metrics()
    assert columns["images"].tolist() == targets.bincount(minlength=7).tolist() and metrics["loss"] == 0.5
    assert list(metrics) == Classification.metric_names((3, 2))
    assert Classification.metric_names([2]) == [
        "loss",
        "acc1",
        "acc2",
        "precision1",
        "recall1",
        "precision2",
        "recall2",
    ]
    assert np.array_equal(result.confusion(), confusion_matrix(targets, scores.argmax(1), labels=range(7)))
    truth = torch.nn.functional.one_hot(targets, 7)
    for k in (1, 2, 3):
        prediction = torch.zeros(60, 7).scatter(1, scores.topk(k).indices, 1)
        precision, recall, *_ = precision_recall_fscore_support(truth, prediction, zero_division=np.nan)
        np.testing.assert_allclose(columns[f"precision{k}"], precision)
        np.testing.assert_allclose(columns[f"recall{k}"], recall)
        assert metrics[f"recall{k}"] == pytest.approx(100 * recall[:6].mean())
        assert metrics[f"precision{k}"] == pytest.approx(100 * np.nan_to_num(precision[:6]).mean())
        accuracy = top_k_accuracy_score(targets, scores, k=k, labels=range(7))
        assert metrics[f"acc{k}"] == pytest.approx(100 * accuracy)


def test_an_evaluation_prints_accuracies_loss_and_what_was_left_out():
    result = ClassEvaluation(0.5, torch.tensor([0, 1]), torch.tensor([[0, 1]] * 2), "ab", (1, 5), unreadable=["a.png"])
    assert str(result) == "top-1 50.00 %  top-5 100.00 %  loss 0.5000  (2 images, 1 unreadable left out)"


# ---------------------------------------------------------------- metrics


def test_several_classes_an_image_are_judged_as_by_scikit_learn():
    truth, logits = torch.rand(50, 5) < 0.3, torch.randn(50, 5).mul(3).round()  # with equal scores
    truth[:, 4] = False  # a class without an image is left out of the means
    result = MultiLabelEvaluation(0.5, truth.float(), logits, range(5))
    columns, metrics = result.per_class(), result.metrics()
    expected = [average_precision_score(truth[:, k], logits[:, k]) for k in range(4)]
    assert columns["average_precision"][:4].tolist() == pytest.approx(expected) and columns["images"][4] == 0
    scores = precision_recall_fscore_support(truth, logits > 0, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), scores, strict=False):
        assert columns[name][:4].tolist() == pytest.approx(values[:4].tolist())
    f1 = partial(f1_score, truth, logits > 0)
    expected = [0.5, *(100 * x for x in (np.mean(expected), f1(average="macro", labels=range(4)), f1(average="micro")))]
    exactly = partial(pytest.approx, rel=1e-12)
    assert metrics == dict(zip(MultiLabel.metric_names(None), map(exactly, expected), strict=True))
    assert str(result).endswith("loss 0.5000  (50 images)")


def test_an_evaluation_without_a_class_is_the_worst_there_is():
    """Not nan, which no later epoch is better than."""
    metrics = MultiLabelEvaluation(0.5, torch.zeros(4, 2), torch.randn(4, 2), "ab").metrics()
    assert metrics == {"loss": 0.5, "mAP": 0, "f1_macro": 0, "f1_micro": 0}


def test_numbers_are_judged_as_by_scikit_learn():
    true, predicted = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    true[:, 2] = 7  # the same in all images
    result = RegressionEvaluation(0.5, true, predicted, ["a", "b", "c"])
    for name, score in (("r2", r2_score), ("mae", mean_absolute_error)):
        assert result.per_class()[name].tolist() == pytest.approx(score(true, predicted, multioutput="raw_values"))
        assert result.metrics()[name] == pytest.approx(score(true, predicted))
    assert list(result.metrics()) == Regression.metric_names(None)


def test_a_smaller_error_is_better_and_every_number_than_nan():
    assert is_better("test_mae", 1, 2) and is_better("test_loss", 1, 2) and is_better("test_r2", 2, 1)
    nan = float("nan")
    assert is_better("loss", 1, nan) and not is_better("loss", nan, 1) and not is_better("loss", nan, nan)


# ---------------------------------------------------------------- losses


def test_balanced_classes_are_weighted_as_by_scikit_learn():
    """A class without an image has no weight."""
    targets, probabilities = np.array([0, 0, 0, 1, 1, 3]), torch.rand(4, 4).softmax(1)
    logits = torch.randn(4, 4)
    weights = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets)
    weights = torch.tensor([*weights[:2], 0, weights[2]], dtype=torch.float32)
    smoothed = 0.9 * probabilities + 0.1 / 4
    expected = torch.nn.CrossEntropyLoss(weights)(logits, smoothed)
    found = Classification("ce", "abcd").build_loss(0.1, targets)(logits, probabilities)
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("task", [Classification, MultiLabel])
def test_balanced_questions_are_weighted_as_by_scikit_learn(task):
    """Each class is a problem of two: yes and no."""
    classes = np.array([0, 0, 0, 1, 1, 2])
    truth, logits = np.eye(3)[classes], torch.randn(6, 3)
    weights = [compute_class_weight("balanced", classes=np.array([0, 1]), y=column) for column in truth.T]
    weights = np.stack(weights, 1)[truth.astype(int), range(3)]
    truth = torch.tensor(truth, dtype=torch.float32)
    expected = torch.nn.BCEWithLogitsLoss(torch.tensor(weights, dtype=torch.float32))(logits, truth)
    targets = classes if task is Classification else truth.numpy()
    criterion = task("bce", "abc").build_loss(0.0, targets)
    assert criterion(logits, torch.from_numpy(targets)).item() == pytest.approx(expected.item())


def test_cross_entropy_is_torchs_with_its_label_smoothing():
    logits, targets = torch.randn(6, 4), torch.randint(4, (6,))
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2)
    assert Classification("ce", "abcd").build_loss(0.2)(logits, targets).item() == pytest.approx(expected.item())


def test_smoothing_of_a_question_is_towards_one_half():
    logits, truth = torch.randn(6, 4), (torch.rand(6, 4) < 0.5).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.8 * truth + 0.1)
    assert MultiLabel("bce", "abcd").build_loss(0.2)(logits, truth).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_targets_are_mixed_as_by_timm_and_numbers_as_exactly(mode):
    imgs, numbers = torch.rand(4, 3, 8, 8), torch.randn(4, 2) * 1000

    def mix(targets, num_classes):
        np.random.seed(0)
        args = build_args("", *f"--batch_size 4 --mixup 0.8 --cutmix 1 --mixup_mode {mode}".split())
        return build_mixup(args, num_classes)(imgs.clone(), targets)

    np.random.seed(0)
    theirs = Mixup(0.8, 1.0, mode=mode, label_smoothing=0.1, num_classes=3)(imgs.clone(), torch.tensor([0, 1, 2, 0]))
    mixed, probabilities = mix(torch.tensor([0, 1, 2, 0]), 3)
    assert torch.equal(mixed, theirs[0]) and torch.allclose(0.9 * probabilities + 0.1 / 3, theirs[1])
    with torch.autocast("cpu", torch.bfloat16):
        _, mixed_numbers = mix(numbers, 2)
    torch.testing.assert_close(mixed_numbers, mix(torch.arange(4), 4)[1] @ numbers)


# ---------------------------------------------------------------- balanced order

TARGETS = np.repeat([0, 1, 3], [40, 5, 3])  # class 2 has no image


def epoch_keys(epoch, step=0, rank=0, world_size=1, batch_size=4):
    sampler = BalancedSampler(TARGETS, batch_size, 1, 7, rank, world_size)
    sampler.set_position(epoch, step)
    return list(sampler)


def test_a_balanced_epoch_has_every_class_equally_often_and_every_image_of_it():
    keys = [key for batch in epoch_keys(2) for key in batch]
    images = [index for _, index, _ in keys]
    assert np.bincount(TARGETS[images]).tolist() == [16, 16, 0, 16] and len(set(keys)) == len(keys) == 48
    for cls in (0, 1, 3):  # of whole rounds and the ends of two others
        counts = np.bincount(images, minlength=48)[TARGETS == cls]
        assert counts.max() - counts.min() <= 2
    later = [index for epoch in range(5) for batch in epoch_keys(epoch) for _, index, _ in batch]
    assert np.bincount(later, minlength=48)[:40].tolist() == [2] * 40  # over epochs


def test_a_balanced_round_has_an_image_once_at_most_and_passes_over_less_than_a_step():
    targets = np.repeat([0, 1, 2], [40, 6, 3])  # 49 images: neither whole steps of 4, nor 3 x 16
    sampler, keys = BalancedSampler(targets, 4, 1, 7), []
    for epoch in range(10):
        sampler.set_position(epoch, 0)
        keys += [key[1:] for batch in sampler for key in batch]
    assert len(set(keys)) == len(keys) == 10 * 48
    for index in range(40):  # 17 draws of each class an epoch, of which less than 1 + 3 fail to come
        assert sum(key[0] == index for key in keys) <= 5 and sum(key[0] < 40 for key in keys) > 10 * (17 - 4)


def test_a_balanced_order_is_a_function_of_seed_and_epoch_however_it_is_divided():
    whole = epoch_keys(3)
    assert epoch_keys(3, step=5) == whole[5:] and epoch_keys(4) != whole
    ranks = [epoch_keys(3, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    sampler = BalancedSampler(TARGETS, 4, 1, 7)
    assert sampler.batch_indices(3, 2) == [index for _, index, _ in whole[2]]


# ---------------------------------------------------------------- labels


def read_labels(loss, columns, texts, numbers=None):
    labels = Labels(list(texts), np.arange(len(texts)) if numbers is None else np.array(numbers), columns.split(","))
    task = find_task(loss, labels).fit(loss, labels)
    return task, task.read_targets(labels).tolist()


def test_labels_are_read_as_the_loss_and_the_columns_say():
    task, targets = read_labels("bce", "label", ["b; a", ";", "b;10", "a"], [3, 0, 2, 1])
    assert (task.names, targets) == (["10", "a", "b"], [[0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]])
    task, targets = read_labels("bce", "x,y", ["1;0", "0;0", "True;1.0"])
    assert (type(task), task.names, targets) == (MultiLabel, ["x", "y"], [[1, 0], [0, 0], [1, 1]])
    task, targets = read_labels("bce", "label", ["a", "b"])
    assert (type(task), task.names, targets) == (Classification, ["a", "b"], [0, 1])
    task, targets = read_labels("l1", "x,y", ["1;10", "3;40"], [0, 1, 1, 0])
    assert (task.mean, task.std, targets) == ([2, 25], [1, 15], [[-1, -1], [1, 1], [1, 1], [-1, -1]])
    assert task.predict(torch.tensor([[0.5, -2.0]])).tolist() == [[2.5, -5]]
    assert read_labels("mse", "label", ["1;2", "2;5"])[0].names == ["label0", "label1"]


@pytest.mark.parametrize(
    ("loss", "columns", "texts", "message"),
    [
        ("ce", "label", ["a"], "has one class only, a: nothing to tell apart"),
        ("bce", "label", ["a;b", "b;a"], "all images have the same classes, a, b: nothing"),
        ("bce", "x,y", ["1;2", "0;1"], "label 2: must be 0 or 1"),
        ("bce", "x,y", ["1;", "0;1"], "0: column y is empty: must be 0 or 1"),
        ("mse", "label", ["1", "cat"], "label cat: must be a number for --loss mse"),
        ("l1", "label", ["nan", "1"], "label nan: must be a number for --loss l1"),
        ("mse", "x,y", ["2;1", ";1"], "1: column x is empty: must be a number"),
        ("mse", "label", ["inf", "1"], "label inf: must be a number"),
        ("mse", "x,y", ["1;0.1", "2;0.10", "3;1e-1"], "y is 0.1 in all images: nothing to predict"),
    ],
)
def test_labels_that_make_no_task_are_named(loss, columns, texts, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_labels(loss, columns, texts)


def test_labels_must_be_those_of_the_model():
    labels = Labels(["cat;dog"], np.array([0]), ["label"])
    for names, known in ((["cat", "owl"], "2 classes of the model: cat, owl"), (["cat"], "1 class of the model: cat")):
        with pytest.raises(ValueError, match=f"^class dog is not among the {known}"):
            MultiLabel("bce", names).read_targets(labels)
    with pytest.raises(ValueError, match="^columns x, y: must be those of the model, y, x, in this order"):
        Regression("mse", ["y", "x"], [0, 0], [1, 1]).read_targets(Labels(["1;2"], np.array([0]), ["x", "y"]))
    with pytest.raises(ValueError, match="^its task is .*'segmentation'.*; known are multi-label"):
        restore_task({"class_names": ["a"], "task": {"kind": "segmentation", "loss": "ce"}})


def build_args(path, *flags):
    command = [*TINY, "--batch_size", 2, "--data_path", path, *flags]
    return main_finetune.get_args_parser().parse_args([*map(str, command)])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_labels_in_tables_may_be_lists_and_answers(tmp_path, ending):
    """In Parquet a list of one name, or of none, is no name; in a list "a" would be."""
    png = io.BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    names, sizes = [["b"], [], ["a"], ["b"]], [[1.5, 2.0], [3.0, 4.0], [1.0, 2.0], [0.0, 1.0]]
    answers = [True, False, True, True]
    path = tmp_path / f"train.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow.parquet")
        columns = {
            "image": [png.getvalue()] * 4,
            "names": names,
            "sizes": sizes,
            "has_a": answers,
            "has_b": answers[::-1],
        }
        pyarrow.write_table(importlib.import_module("pyarrow").table(columns), path)
    else:
        rows = ["path,names,sizes,has_a,has_b"]
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(png.getvalue())
            size, has = ";".join(map(str, sizes[number])), f"{answers[number]},{answers[3 - number]}"
            rows.append(f"{number}.png,{';'.join(names[number])};,{size},{has}")
        path.write_text("\n".join(rows))

    def read(flags):
        dataset, _, task = build_labelled_sets(build_args(path, "--disable_eval", *flags.split()))
        order = np.argsort([dataset.images.name(i) for i in range(4)])
        return task, dataset.targets[order].tolist()

    task, targets = read("--label_column names --loss bce")
    assert (task.names, targets) == (["a", "b"], [[0, 1], [0, 0], [1, 0], [0, 1]])
    assert read("--label_column has_a,has_b --loss bce")[1] == [[1, 1], [0, 1], [1, 0], [1, 1]]
    task, _ = read("--label_column sizes --loss mse")
    assert (task.names, task.mean) == (["sizes0", "sizes1"], [1.375, 2.25])


@pytest.mark.parametrize("columns", ["weight,age", "age"])
def test_a_part_of_numbers_is_held_out_and_its_list_can_be_read(table, tmp_path, columns):
    """Each number occurs once: nothing could be held out of each class."""
    flags = ["--label_column", columns, "--loss", "mse", "--val_fraction", 0.25, "--output_dir", tmp_path]
    train, held_out, task = build_labelled_sets(build_args(table, *flags))
    assert (len(train.targets), len(held_out.targets)) == (12, 4)  # of the 16 of train
    for path in (["--eval_data_path", tmp_path / "validation.csv"], flags[4:6]):
        _, again, _ = build_labelled_sets(build_args(table, "--eval", *flags[:2], *path), task)
        assert again.targets.tolist() == held_out.targets.tolist()
        assert [again.images.name(i) for i in range(4)] == [held_out.images.name(i) for i in range(4)]


def test_labels_of_webdataset_may_be_lists_and_numbers():
    texts = {'["a", "b"]': "a;b", '["a"]': "a;", "1.5": "1.5", "3": "3", '"a"': "a", "true": None, "null": None}
    for value, text in texts.items():
        assert shards.read_label(f'{{"label": {value}}}'.encode(), ".json", "label") == text


def test_digits_are_numbers_too():
    _, evaluation, task = build_labelled_sets(build_args("", "--data_set", "DIGITS", "--loss", "mse", "--in_chans", 1))
    numbers = evaluation.targets[:, 0] * task.std[0] + task.mean[0]
    assert np.allclose(numbers, evaluation.images.targets, atol=1e-5)


# ---------------------------------------------------------------- runs

VALUES = np.random.default_rng(0).integers(0, 2, (24, 2))  # red, blue; the last 8 are to evaluate
VALUES[:4] = VALUES[16:20] = [[0, 0], [0, 1], [1, 0], [1, 1]]
BRIEF = "--batch_size 4 --warmup_epochs 0 --epochs 2 --lr 1e-3 --head_init_scale 1 --aa none --reprob 0".split()
TASKS = {
    "names": "--label_column colors --loss bce --mixup 0.8 --cutmix 1",
    "columns": "--label_column red,blue --loss bce --class_weights balanced",
    "numbers": "--label_column weight,age --loss mse --mixup 0.5",
    "number": "--label_column age --loss l1",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A list of 24 images of noise in gray, red, blue or violet, with labels of every kind."""
    folder, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(1)
    rows = [["path", "split", "colors", "red", "blue", "age", "weight"]]
    for number, (red, blue) in enumerate(VALUES.tolist()):
        pixels = rng.integers(0, 100, (36, 36, 3), dtype=np.uint8)
        pixels[:, :, 0] += 120 * red
        pixels[:, :, 2] += 120 * blue
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        names = ";".join(name for name, value in (("red", red), ("blue", blue)) if value) or ";"
        split = "train" if number < 16 else "val"
        rows.append([f"{number}.png", split, names, red, blue, 20 + 30 * red + number, 70 - 40.5 * blue])
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "list.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(params=TASKS)
def run(request, finetune, narrow, table, folder):
    """(name, flags, the folder of a run of two epochs, made once)"""
    flags = [*TINY, "--data_path", table, *BRIEF, *TASKS[request.param].split()]
    output = folder / request.param
    if not output.exists():
        result = finetune(*flags, "--output_dir", output)
        assert result.status == 0, result.err
        (output / "stdout.txt").write_text(result.out)
    return request.param, flags, output


def read_truth(name):
    """Of the images to evaluate: (8, K), in the order of the list."""
    red, blue = VALUES[16:].T
    age = 20 + 30 * red + np.arange(16, 24)
    columns = {"names": [blue, red], "columns": [red, blue], "numbers": [70 - 40.5 * blue, age], "number": [age]}
    return np.stack(columns[name], 1)


def predict_table(tool, checkpoint, table, tmp_path):
    """predictions.csv of the images to evaluate, in the order of the list, and what is printed of one."""
    images, output = [table.parent / f"{number}.png" for number in range(16, 24)], tmp_path / "predictions.csv"
    assert tool("--checkpoint", checkpoint, *images, "--output", output).status == 0
    with open(output, newline="") as file:
        return list(csv.DictReader(file)), tool("--checkpoint", checkpoint, images[0]).out


@pytest.fixture
def tool(monkeypatch, capsys):
    device = "--device cpu --num_workers 0".split()
    return lambda *flags: run_script_here(predict, [*flags, *device], monkeypatch, capsys)


def test_a_run_logs_what_scikit_learn_makes_of_its_predictions(run, tool, table, tmp_path):
    name, _, output = run
    rows, printed = predict_table(tool, output / "checkpoint-1.pth", table, tmp_path)
    truth, line = read_truth(name), log_lines(output)[-1]
    state = torch.load(output / "checkpoint-1.pth", weights_only=True)
    if name in ("names", "columns"):
        names = ["blue", "red"] if name == "names" else ["red", "blue"]
        assert state["class_names"] == names and state["task"]["kind"] == "multi-label classification"
        found = [{row[f"class{k}"]: float(row[f"probability{k}"]) for k in (1, 2)} for row in rows]
        found = np.array([[row[name] for name in names] for row in found])
        for row, values in zip(rows, found, strict=True):
            above = [name for p, name in sorted(zip(values, names, strict=True), reverse=True) if p > 0.5]
            assert row["classes"] == ";".join(above)
        assert line["test_mAP"] == pytest.approx(100 * average_precision_score(truth, found))
        expected = 100 * f1_score(truth, found > 0.5, average="micro", zero_division=0)
        assert line["test_f1_micro"] == pytest.approx(expected)
        titles, watched = ["class", "images", "average_precision", "precision", "recall", "f1"], "test_mAP"
        assert printed.split(": ")[1].startswith(rows[0]["classes"] or "none")
    else:
        names = ["weight", "age"] if name == "numbers" else ["age"]
        assert state["class_names"] == names and state["task"]["kind"] == "regression"
        found = np.array([[float(row[name]) for name in names] for row in rows])
        assert line["test_r2"] == pytest.approx(r2_score(truth, found), abs=1e-4)
        assert line["test_mae"] == pytest.approx(mean_absolute_error(truth, found), rel=1e-4)
        age = 20 + 30 * VALUES[:16, 0] + np.arange(16)
        assert (state["task"]["mean"][-1], state["task"]["std"][-1]) == pytest.approx((age.mean(), age.std()))
        titles, watched = ["target", "mae", "r2"], "test_r2" if name == "numbers" else "test_mae"
        assert f"{names[-1]} {found[0, -1]:.4g}" in printed
    report = list(csv.reader((output / f"per_{titles[0]}.csv").open()))
    assert report[0] == titles and [row[0] for row in report[1:]] == names
    assert list(state["best"]) == [watched] and not (output / "confusion.csv").exists()


@pytest.mark.parametrize(("name", "metric", "least"), [("names", "test_mAP", 90), ("numbers", "test_r2", 0.5)])
def test_a_task_is_learned(finetune, narrow, table, tmp_path, name, metric, least):
    flags = TASKS[name].split()[:4]
    result = finetune(
        *TINY, "--data_path", table, *BRIEF, *flags, *"--epochs 8 --lr 5e-3".split(), "--output_dir", tmp_path
    )
    assert result.status == 0 and max(line[metric] for line in log_lines(tmp_path)) > least, result.out


def test_an_evaluation_repeats_the_training_by_the_checkpoint_alone(run, finetune, table):
    name, _, output = run
    result = finetune(*TINY, "--data_path", table, "--eval", "--resume", output / "checkpoint-1.pth")
    column = TASKS[name].split()[1]
    assert f"--label_column {column}, as in the training of {output}/checkpoint-1.pth" in result.out
    evaluated = [text for text in result.out.splitlines() if text.startswith("evaluation: ")]
    assert result.status == 0 and evaluated == re.findall("evaluation: .*", (output / "stdout.txt").read_text())[-1:]


def test_a_run_resumes_exactly(run, finetune, tmp_path):
    _, flags, output = run
    shutil.copy(output / "checkpoint-0.pth", tmp_path)
    assert finetune(*flags, "--output_dir", tmp_path).status == 0
    assert_same_weights(weights(tmp_path, "checkpoint-1.pth"), weights(output, "checkpoint-1.pth"))
    assert log_lines(tmp_path)[-1] == log_lines(output)[-1]


def test_a_task_of_ones_own_is_a_class(finetune, narrow, table, tmp_path, monkeypatch):
    class Robust(Regression):
        kind, losses = "robust regression", ("huber",)

        def build_loss(self, smoothing=0.0, targets=None, device="cpu"):
            return torch.nn.functional.huber_loss

    monkeypatch.setattr(tasks, "TASKS", (Robust, *tasks.TASKS))
    flags = [*TINY, "--data_path", table, *BRIEF, "--output_dir", tmp_path]
    trained = finetune(*flags, *"--label_column age --loss huber".split())
    evaluated = finetune(*flags, "--eval")
    assert "best test_mae so far" in trained.out and evaluated.status == 0, trained.err
    assert re.findall("evaluation: .*", trained.out)[-1] in evaluated.out


def assert_one_line(result, *words):
    assert result.status == 2 and len(result.err.splitlines()) == 1, result.err
    assert all(str(word) in result.err for word in words), result.err


@pytest.fixture
def trained(folder, finetune, narrow, table):
    """{name: checkpoint} of the runs above, and of one for classes."""
    runs = TASKS | {"classes": "--label_column red --class_weights balanced"}
    for name, flags in runs.items():
        if not (folder / name).exists():
            flags = ["--data_path", table, *BRIEF, *flags.split(), "--output_dir", folder / name]
            assert finetune(*TINY, *flags).status == 0
    return {name: folder / name / "checkpoint-1.pth" for name in runs}


def read_flags(text, trained, table):
    """Names of checkpoints and of lists as their paths."""
    places = trained | {"half": table.with_name("half.csv")}
    return [*TINY, "--data_path", table, *BRIEF, *(places.get(word, word) for word in text.split())]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resume number --label_column red,blue --loss bce", "model"),
        ("--resume columns --label_column red,blue --loss mse", "kind of the targets is multi-label"),
        ("--resume numbers --label_column age,weight --loss mse", "number 0 is 'weight', not 'age'"),
        ("--resume number --label_column age --loss l1 --data_path half", "mean of the targets is"),
        ("--eval --resume names --label_column age", "to evaluate: class 36 is not among the 2 classes"),
        ("--eval --resume number --label_column colors", "to evaluate: label ;: must be a number"),
        ("--eval --resume classes --label_column colors", "is not among the 2 classes of the model: 0, 1"),
    ],
)
def test_a_checkpoint_of_another_task_is_refused(trained, finetune, table, flags, words):
    header, *rows = table.read_text().splitlines()
    table.with_name("half.csv").write_text("\n".join([header, *rows[4:]]))
    assert_one_line(finetune(*read_flags(flags, trained, table)), words)


@pytest.mark.parametrize(("before", "flags"), [("classes", "red,blue --loss bce"), ("names", "weight,age --loss mse")])
def test_the_head_of_another_task_is_left_out(trained, finetune, table, tmp_path, before, flags):
    words = f"--finetune {before} --label_column {flags} --epochs 1 --lr 0 --min_lr 0"
    result = finetune(*read_flags(words, trained, table), "--output_dir", tmp_path)
    assert result.status == 0 and "left out the head, of " in result.out and "newly initialized: head" in result.out
    first, last = torch.load(trained[before], weights_only=True)["model"], weights(tmp_path, "checkpoint-0.pth")
    assert torch.equal(first["norm.weight"], last["norm.weight"]) and len(last["head.bias"]) == 2
    assert not torch.equal(first["head.weight"], last["head.weight"])


def test_a_head_of_the_same_task_is_kept(trained, finetune, table, tmp_path):
    words = "--finetune number --label_column weight --loss mse --epochs 1 --lr 0 --min_lr 0"
    assert finetune(*read_flags(words, trained, table), "--output_dir", tmp_path).status == 0
    assert_same_weights(weights(tmp_path, "checkpoint-0.pth"), weights(trained["number"].parent, "checkpoint-1.pth"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--label_column age --loss mse --cutmix 1", "--cutmix 1.0: not for regression"),
        ("--label_column age --loss l1 --cutmix_minmax 0.2 0.4", "--cutmix_minmax: not for regression"),
        ("--label_column age --loss mse --class_weights balanced", "--class_weights balanced: not for regression"),
        ("--label_column age --loss mse --shuffle balanced", "--shuffle balanced: not for regression"),
        ("--label_column colors --loss bce --shuffle balanced", "--shuffle balanced: not for multi-label"),
        ("--label_column colors --loss bce --images_per_class 2", "--images_per_class 2: not for multi-label"),
        (
            "--label_column colors --loss bce --watch test_acc1",
            "--watch test_acc1: must be one of train_loss, test_loss, test_mAP",
        ),
        ("--label_column age --loss mse --watch test_mAP", "must be one of train_loss, test_loss, test_r2, test_mae"),
        ("--label_column colors --loss mse", "label ;: must be a number for --loss mse"),
        ("--label_column label,red --loss bce", "--label_column label: "),
        ("--label_column red,blue", "--label_column red,blue: one column for --loss ce"),
        ("--label_column age --loss mse --nb_classes 5", "--nb_classes 5: the data has 1"),
        ("--class_weights some", "invalid choice: 'some'"),
        ("--label_column red --class_weights balanced --shuffle balanced", "balanced: each balances the classes"),
        ("--label_column empty --loss mse --data_path odd", "1.png has no label (--label_column empty)"),
        ("--label_column same,empty --loss mse --data_path odd", "1.png: column empty is empty: must be a number"),
        ("--label_column missing --loss mse --data_path odd", "label nan: must be a number"),
        ("--label_column same --loss mse --data_path odd", "same is 3 in all images"),
    ],
)
def test_mistakes_are_one_line(finetune, table, flags, words):
    odd = table.with_name("odd.csv")
    odd.write_text("path,empty,missing,same\n0.png,1,2,3\n1.png,,nan,3.0\n2.png,4,5,3\n3.png,4,5,3\n")
    assert_one_line(finetune(*read_flags(flags, {"odd": odd}, table)), words)


def test_tools_take_checkpoints_of_every_task(trained, monkeypatch, capsys, tool, table, labelled_folder, tmp_path):
    """Converted files predict the same; a probe takes the features of any."""
    pytest.importorskip("safetensors")
    for name, checkpoint in trained.items():
        rows, _ = predict_table(tool, checkpoint, table, tmp_path)
        for kind, output in (("safetensors", tmp_path / f"{name}.safetensors"), ("hf", tmp_path / name)):
            flags = [checkpoint, output, "--to", kind]
            assert run_script_here(convert, flags, monkeypatch, capsys).status == 0
            assert predict_table(tool, output, table, tmp_path)[0] == rows
    flags = ["--checkpoint", trained["numbers"], "--data_path", labelled_folder, "--num_workers", 0]
    result = run_script_here(probe, [*flags, "--device", "cpu"], monkeypatch, capsys)
    assert result.status == 0 and "linear" in result.out, result.err
