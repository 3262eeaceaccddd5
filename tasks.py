"""What is learned from labels: one class an image, several, or numbers. To add a task, write a class into `TASKS`.

A task reads labels, which are text wherever they come from, as targets of the head's outputs. It has a loss, an
evaluation, a metric that decides the best checkpoint, and a form of predictions: nothing else knows what is learned.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from evaluation import ClassEvaluation, MultiLabelEvaluation, RegressionEvaluation
from flags import fraction_below_1
from index import sort_labels
from schema import TASK, fits
from sources import SEPARATOR, shorten
from utils import UserError, format_count, log


def add_loss_args(parser):
    add = parser.add_argument_group("task and loss").add_argument
    losses = "ce: cross-entropy, one class an image; bce: binary cross-entropy of each class, also of several an image"
    losses += f", as in cat{SEPARATOR}dog; mse, l1: regression, mean squared or absolute error"
    add("--loss", default="ce", choices=find_losses(), help=losses)
    add("--smoothing", default=0.1, type=fraction_below_1, help="label smoothing of classes")
    balanced = "balanced: weigh each class in the loss by images / (classes x images of the class); None: all alike"
    add("--class_weights", choices=("balanced",), help=balanced)


class Labels(NamedTuple):
    """The labels of an image set."""

    texts: list  # each label that occurs
    numbers: np.ndarray  # (n,) which of them an image has
    columns: list  # titles of the columns of a list that they come from; of several, a text joins the values
    name: Callable = str  # of an image by its number, for errors


# ---------------------------------------------------------------- tasks


class Task:
    """What all tasks share. names: of the outputs, in the order of the head. loss: which of `losses` is minimized.

    A task also has:

        fit(loss, labels)           class method: the task of a training set's `Labels`. Raises ValueError.
        encode(labels)              (L, K) float32 of their texts, or classes (L,). Raises ValueError for one unknown.
        build_loss(smoothing, targets, device)
                                    criterion(outputs (N, K), targets (N, K) or (N,), also mixed) -> scalar. targets:
                                    all of the training set, to weigh classes by their counts, or None.
        metric_names(topk)          class method: the names of `metrics()` of its evaluation.
        measure(outputs, targets, topk)
                                    (n, 1 + D): loss of each image, and what else `evaluate` needs.
        predict(outputs)            (n, K) as people read them: probabilities, or numbers in the units of the labels.
        cells(row, topk)            a line of a table of predictions: {title: text} of a row of `rows`.
        describe_row(row, topk)     the same in one line.
        str(task)                   in a few words
    """

    kind = ""  # its name in checkpoints
    losses = ()  # of --loss
    evaluation = None  # the class of its `evaluation.Evaluation`
    best = ""  # the metric that decides the best checkpoint
    one_class = False  # whether an image has one class: a label is a name, and a part of each class can be held out

    def __init__(self, loss, names):
        self.loss, self.names = loss, list(names)

    @classmethod
    def fits(cls, loss, labels):
        """Whether these `Labels` with this loss are such a task."""
        return loss in cls.losses

    @classmethod
    def check_args(cls, args):
        """Raise UserError for flags that do not fit."""
        if args.class_weights and args.shuffle == "balanced":
            problem = "each balances the classes, both favor the small ones; leave one of them out"
            raise UserError(f"--class_weights {args.class_weights} --shuffle balanced: {problem}")
        if not cls.one_class and (args.images_per_class or args.shuffle == "balanced"):
            flag = f"images_per_class {args.images_per_class}" if args.images_per_class else "shuffle balanced"
            raise UserError(f"--{flag}: not for {cls.kind}, where an image is not of one class; leave it out")

    def state_dict(self):
        """What checkpoints keep: the arguments of the constructor but the names, and `kind`."""
        return {"kind": self.kind, "loss": self.loss}

    def read_targets(self, labels):
        """(n, K) float32, or classes (n,), of the images of `Labels`. Raises as `encode` does."""
        return self.encode(labels)[labels.numbers]

    def evaluate(self, rows, targets, topk, unreadable):
        """The `Evaluation` of all images, of their rows by `measure`."""
        return self.evaluation(rows[:, 0].mean().item(), targets, rows[:, 1:], self.names, topk, unreadable)

    def rows(self, predictions, topk):
        """(n, D) what a table keeps of predictions (n, K)."""
        return predictions


class Classification(Task):
    """One class an image. With `bce` each class is a question of yes or no (Wightman et al., 2021)."""

    kind, losses, best, one_class = "classification", ("ce", "bce"), "acc1", True
    evaluation = ClassEvaluation

    @classmethod
    def fit(cls, loss, labels):
        if len(labels.texts) == 1:
            raise ValueError(f"has one class only, {labels.texts[0]}: nothing to tell apart")
        if len(labels.columns) > 1:
            columns = ",".join(labels.columns)
            raise ValueError(f"--label_column {columns}: one column for --loss {loss}, several for others")
        joined = next((text for text in labels.texts if SEPARATOR in text), None)
        if joined is not None:
            log(f"NOTE: {joined} counts as one class; where images have several, give --loss bce")
        return cls(loss, labels.texts)

    def read_targets(self, labels):
        if len(labels.texts) != len(self.names):
            raise ValueError(f"the data has {format_count(len(labels.texts), 'class')}, the model {len(self.names)}")
        return labels.numbers

    def build_loss(self, smoothing=0.0, targets=None, device="cpu"):
        """ce: the mean over images of sum_k w_k p_k (-log q_k), as torch's cross-entropy of probabilities.

        w_k = images / (classes x images of class k). bce: see `binary_cross_entropy`, with the weights
        a_k = images / (2 x images of class k), b_k = images / (2 x others): yes and no are the classes of a problem of
        two. p is smoothed towards 1 / classes where an image has one class, else towards 1/2.
        """
        function = F.cross_entropy if self.loss == "ce" else binary_cross_entropy
        count, weights = len(self.names), ()
        answers = count if self.one_class else 2
        if targets is not None:
            images = np.bincount(targets, minlength=count) if self.one_class else targets.sum(0)
            images, total = torch.from_numpy(images).to(device), len(targets)
            if self.loss == "ce":
                weights = [balance(images, total, (images > 0).sum())]
            else:
                weights = [balance(images, total, 2), balance(total - images, total, 2)]

        def criterion(logits, targets):
            targets = F.one_hot(targets, count) if targets.ndim == 1 else targets
            return function(logits, targets * (1 - smoothing) + smoothing / answers, *weights)

        return criterion

    @classmethod
    def metric_names(cls, topk):
        topk = sorted({1, *topk})
        return ["loss", *(f"acc{k}" for k in topk), *(f"{name}{k}" for k in topk for name in ("precision", "recall"))]

    def measure(self, outputs, targets, topk):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        top = outputs.topk(min(max(topk), len(self.names))).indices
        return torch.cat([losses[:, None].double(), top.double()], 1)

    def predict(self, outputs):
        return outputs.softmax(1)

    def rows(self, predictions, topk):
        """The largest probabilities and then their classes."""
        top = predictions.topk(min(topk, len(self.names)))
        return torch.cat([top.values, top.indices.to(top.values.dtype)], 1)

    def split_row(self, row):
        """[(name, probability)], in falling order."""
        count = len(row) // 2
        return [(self.names[int(number)], float(p)) for p, number in zip(row[:count], row[count:], strict=True)]

    def cells(self, row, topk):
        cells = {}
        for k, (name, p) in enumerate(self.split_row(row)[:topk], start=1):
            cells |= {f"class{k}": name, f"probability{k}": f"{p:.6f}"}
        return cells

    def describe_row(self, row, topk):
        return ", ".join(f"{name} {100 * p:.1f} %" for name, p in self.split_row(row)[:topk])

    def __str__(self):
        return format_count(len(self.names), "class")


class MultiLabel(Classification):
    """Any number of classes an image: names joined by the separator, which alone is none, or 0 and 1 in columns."""

    kind, losses, best, one_class = "multi-label classification", ("bce",), "mAP", False
    evaluation = MultiLabelEvaluation
    read_targets = Task.read_targets

    @classmethod
    def fits(cls, loss, labels):
        several = len(labels.columns) > 1 or any(SEPARATOR in text for text in labels.texts)
        return loss in cls.losses and several

    @classmethod
    def fit(cls, loss, labels):
        names = labels.columns
        if len(names) == 1:
            names = sort_labels({name for text in labels.texts for name in split_names(text)})
        task = cls(loss, names)
        table = task.encode(labels)[np.unique(labels.numbers)]
        if (table == table[0]).all():
            classes = [name for name, value in zip(names, table[0], strict=True) if value]
            raise ValueError(f"all images have the same classes, {shorten(classes) or 'none'}: nothing to tell apart")
        return task

    def encode(self, labels):
        if len(labels.columns) > 1:
            return parse_numbers(labels, self.names, "0 or 1", (0, 1)).astype(np.float32)
        numbers = {name: number for number, name in enumerate(self.names)}
        table = np.zeros((len(labels.texts), len(self.names)), dtype=np.float32)
        for row, text in zip(table, labels.texts, strict=True):
            for name in split_names(text):
                if name not in numbers:
                    known = f"{format_count(len(numbers), 'class')} of the model: {shorten(self.names)}"
                    raise ValueError(f"class {name} is not among the {known}")
                row[numbers[name]] = 1
        return table

    @classmethod
    def metric_names(cls, topk):
        return ["loss", "mAP", "f1_macro", "f1_micro"]

    def measure(self, outputs, targets, topk):
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1, keepdim=True)
        return torch.cat([losses, outputs], 1).double()

    def predict(self, outputs):
        return outputs.sigmoid()

    def rows(self, predictions, topk):
        return super().rows(predictions, len(self.names))

    def find_classes(self, row):
        """The names of the classes above 0.5, joined."""
        return SEPARATOR.join(name for name, p in self.split_row(row) if p > 0.5)

    def cells(self, row, topk):
        return {"classes": self.find_classes(row)} | super().cells(row, topk)

    def describe_row(self, row, topk):
        return f"{self.find_classes(row) or 'none'} ({super().describe_row(row, topk)})"

    def __str__(self):
        return f"{super().__str__()}, any number an image"


class Regression(Task):
    """One or several numbers an image. Outputs are standardized: mean, std (K,) are those of the training set."""

    kind, losses, evaluation = "regression", ("mse", "l1"), RegressionEvaluation

    def __init__(self, loss, names, mean, std):
        super().__init__(loss, names)
        self.mean, self.std = list(mean), list(std)
        finite = np.isfinite(self.mean + self.std).all() and min(self.std) > 0
        if not finite or not len(self.names) == len(self.mean) == len(self.std):
            count = format_count(len(self.names), "target")
            raise ValueError(f"{count} with means {mean} and deviations {std}")

    @property
    def best(self):
        """mse minimizes what R2 is made of; l1, chosen because of outliers, the MAE."""
        return "r2" if self.loss == "mse" else "mae"

    @classmethod
    def fit(cls, loss, labels):
        count = max(len(labels.columns), len(split_values(labels.texts[0], labels.columns)))
        names = labels.columns if len(labels.columns) == count else [f"{labels.columns[0]}{k}" for k in range(count)]
        values = parse_numbers(labels, names, f"a number for --loss {loss}")[labels.numbers]
        for name, least, most in zip(names, values.min(0), values.max(0), strict=True):
            if least == most:
                raise ValueError(f"{name} is {least:g} in all images: nothing to predict")
        return cls(loss, names, values.mean(0).tolist(), values.std(0).tolist())

    @classmethod
    def check_args(cls, args):
        super().check_args(args)
        if args.class_weights:
            raise UserError(f"--class_weights {args.class_weights}: not for regression, which has no classes")
        if args.cutmix or args.cutmix_minmax:
            flag = f"cutmix {args.cutmix}" if args.cutmix else "cutmix_minmax"
            reason = "a piece of an image has no number of its own; leave it out, or give --mixup"
            raise UserError(f"--{flag}: not for regression: {reason}")

    def state_dict(self):
        return super().state_dict() | {"mean": self.mean, "std": self.std}

    def encode(self, labels):
        values = parse_numbers(labels, self.names, "a number")
        return ((values - self.mean) / self.std).astype(np.float32)

    def build_loss(self, smoothing=0.0, targets=None, device="cpu"):
        """The mean over images and targets of the squared or absolute error, in standard deviations."""
        return {"mse": F.mse_loss, "l1": F.l1_loss}[self.loss]

    @classmethod
    def metric_names(cls, topk):
        return ["loss", "r2", "mae"]

    def measure(self, outputs, targets, topk):
        losses = self.build_loss()(outputs, targets, reduction="none").mean(1, keepdim=True)
        return torch.cat([losses, outputs], 1).double()

    def evaluate(self, rows, targets, topk, unreadable):
        rows = torch.cat([rows[:, :1], self.predict(rows[:, 1:])], 1)
        return super().evaluate(rows, self.predict(targets.double()), topk, unreadable)

    def predict(self, outputs):
        return outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)

    def cells(self, row, topk):
        return {name: f"{float(value):.6g}" for name, value in zip(self.names, row, strict=True)}

    def describe_row(self, row, topk):
        return ", ".join(f"{name} {float(value):.4g}" for name, value in zip(self.names, row, strict=True))

    def __str__(self):
        facts = zip(self.names, self.mean, self.std, strict=True)
        return "regression of " + ", ".join(f"{name} ({mean:.4g} +- {std:.4g})" for name, mean, std in facts)


TASKS = (MultiLabel, Regression, Classification)  # the first that fits


def find_losses():
    """The choices of --loss."""
    return list(dict.fromkeys(loss for task in reversed(TASKS) for loss in task.losses))


def find_task(loss, labels):
    """The class of the task of `Labels`."""
    return next(task for task in TASKS if task.fits(loss, labels))


def restore_task(checkpoint):
    """The task of a checkpoint; None for classes without names. Raises ValueError for one that is unknown here."""
    state, names = checkpoint.get("task") or {"kind": Classification.kind, "loss": "ce"}, checkpoint.get("class_names")
    known = {task.kind: task for task in TASKS}
    if fits(state, TASK) and state["kind"] in known and state["loss"] in known[state["kind"]].losses:
        if names is None and state["kind"] == Classification.kind:
            return None
        with contextlib.suppress(TypeError):  # other arguments
            return known[state["kind"]](names=names, **{name: state[name] for name in state if name != "kind"})
    raise ValueError(f"its task is {state}, of {names}; known are {', '.join(known)}")


# ---------------------------------------------------------------- labels as text, weights


def split_names(text):
    return [name.strip() for name in text.split(SEPARATOR) if name.strip()]


def split_values(text, columns):
    """The values in a label; in that of a single column, a list of one value ends with the separator."""
    return (text if len(columns) > 1 else text.removesuffix(SEPARATOR)).split(SEPARATOR)


def parse_numbers(labels, names, accepted, values=None):
    """(L, K) float64: the numbers in each label. names: of the targets, and of the columns if these are several.

    Raises ValueError for other columns, and for a number that is not finite or not of `values`; accepted: those that
    are, in words.
    """
    columns, count = labels.columns, len(names)
    if len(columns) > 1 and columns != names:
        raise ValueError(f"columns {', '.join(columns)}: must be those of the model, {', '.join(names)}, in this order")
    table = np.full((len(labels.texts), count), np.nan)
    for number, (row, text) in enumerate(zip(table, labels.texts, strict=True)):
        words = split_values(text, columns)
        if len(words) != count:
            raise ValueError(f"label {text}: has {format_count(len(words), 'value')}, not {count}")
        for place, word in enumerate(words):
            if not word.strip() and len(columns) > 1:
                example = next(map(labels.name, np.flatnonzero(labels.numbers == number)), f"label {text}")
                raise ValueError(f"{example}: column {columns[place]} is empty: must be {accepted}")
            with contextlib.suppress(ValueError):
                row[place] = float({"True": 1, "False": 0}.get(word, word))
            if not np.isfinite(row[place]) or values and row[place] not in values:
                raise ValueError(f"label {word.strip() or text}: must be {accepted}")
    return table


def balance(count, total, parts):
    """(K,) weights total / (parts x count), as scikit-learn's "balanced"; 0 for a class without an image."""
    return torch.where(count > 0, total / (parts * count.clamp(min=1)), 0.0).float()


def binary_cross_entropy(logits, targets, positive=1.0, negative=1.0):
    """The mean over images and classes (N, K) of -(a t log p + b (1 - t) log(1 - p)); positive, negative: a, b (K,)."""
    return -(positive * targets * F.logsigmoid(logits) + negative * (1 - targets) * F.logsigmoid(-logits)).mean()
