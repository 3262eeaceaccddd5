"""Draw the curves of runs, from their log.txt: loss, accuracy, learning rate, throughput.

python -m tools.plot output/tiny                                    # writes output/tiny/curves.png
python -m tools.plot output/tiny output/base --output curves.png    # beside each other
"""

import contextlib
import itertools
import json
import math
import os
from pathlib import Path

import flags
from tools.figure import add_legends, check_figure, choose_colors, make_figure, save_figure, shorten_paths
from utils import UserError

# Kinds of curves, the same in all panels: line style, and marker of a curve of one point
KINDS = {
    "training": ("-", "o"),
    "test": ("--", "s"),
    "test, EMA weights": (":", "^"),
    "k-NN probe": ("-.", "D"),
    "linear probe": ((0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
}
# Panels by the label of their y axis: {key of log.txt: kind of curve}
PANELS = {
    "loss": {"train_loss": "training", "test_loss": "test", "test_loss_ema": "test, EMA weights"},
    "top-1 accuracy (%)": {
        "test_acc1": "test",
        "test_acc1_ema": "test, EMA weights",
        "probe_knn": "k-NN probe",
        "probe_linear": "linear probe",
    },
    "mAP (%)": {"test_mAP": "test", "test_mAP_ema": "test, EMA weights"},
    "R2": {"test_r2": "test", "test_r2_ema": "test, EMA weights"},
    "learning rate": {"train_lr": "training"},
    "throughput (images / s)": {"images_per_second": "training"},
}
KEYS = [key for panel in PANELS.values() for key in panel]


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="LOGDIR", help="output folder of a run, or its log.txt")
    add("--output", metavar="FILE", help="picture to write; None: curves.png in the first run's folder")
    return parser


def parse_line(line):
    """(epochs done, {key: value}) of a line of log.txt; None for any other line."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
        entry = json.loads(line, parse_int=float)
        if entry["epoch"].is_integer():
            return entry["epoch"] + 1, {key: entry[key] for key in KEYS if isinstance(entry.get(key), float)}
    return None


def read_log(path):
    """The entries of log.txt as {epochs done: {key: value}}, rising. Raises UserError if there is none."""
    try:
        lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted is a run's output folder, or its log.txt") from None
    entries = list(filter(None, map(parse_line, lines)))
    if not entries:
        raise UserError(f"{path}: no line is a JSON object with an epoch; accepted is the log.txt of a training")
    if len(lines) > len(entries):
        print(f"{path}: skipped {len(lines) - len(entries)} lines that are no JSON object with an epoch")
    epochs = {}
    for done, values in entries:  # one of an earlier epoch: the run resumed from there
        epochs = {earlier: epochs[earlier] for earlier in epochs if earlier < done} | {done: values}
    return epochs


def read_loss(folder):
    """What a run minimizes, in words for its axis, as its args.json says."""
    try:
        args = json.loads((folder / "args.json").read_text())
        if "mask_ratio" in args:
            return "loss (of normalized patches)" if args["norm_pix_loss"] else "loss (of pixels)"
        return {"ce": "loss (cross-entropy)", "bce": "loss (binary cross-entropy)"}.get(args["loss"], "loss")
    except (OSError, ValueError, KeyError, TypeError):
        return "loss"


def read_runs(paths):
    """{unique name: (its loss, its entries)} of folders or log files, each once, and the first one's folder."""
    logs = [Path(os.path.abspath(os.path.join(path, "log.txt") if os.path.isdir(path) else path)) for path in paths]
    logs = list(dict.fromkeys(logs))
    names = shorten_paths([log.parent if log.name == "log.txt" else log for log in logs])
    return {name: (read_loss(log.parent), read_log(log)) for name, log in zip(names, logs, strict=True)}, logs[0].parent


def find_panels(runs):
    """{label: [(name of the run, kind, {epochs done: value})]} of each run and key with a finite value.

    Values of different losses do not compare, so each has a panel of its own.
    """
    panels = {}
    for label, keys in PANELS.items():
        for (name, (loss, epochs)), (key, kind) in itertools.product(runs.items(), keys.items()):
            points = {done: entry[key] for done, entry in epochs.items() if math.isfinite(entry.get(key, math.nan))}
            if points:
                panels.setdefault(loss if label == "loss" else label, []).append((name, kind, points))
    return panels


def draw(runs):
    """A matplotlib figure of the panels that have data. Raises UserError if no run has a finite value."""
    panels = find_panels(runs)
    if not panels:
        raise UserError(f"nothing to draw: no finite value of {', '.join(KEYS)}")
    figure, axes = make_figure(len(panels))
    colors = choose_colors(runs)
    styles = {}  # of each kind of curve
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, kind, points in curves:
            line, marker = KINDS[kind]
            style = dict(linestyle=line) | (dict(marker=marker) if len(points) == 1 else {})
            axis.plot(*zip(*points.items(), strict=True), color=colors[name], **style)
            styles[kind] = styles.get(kind, {}) | style
        axis.set(xlabel="epochs done", ylabel=label, xlim=(0, 1.02 * max(max(epochs) for _, epochs in runs.values())))
        axis.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
        axis.ticklabel_format(axis="y", scilimits=(-2, 5))
    add_legends(figure, colors, styles)
    return figure


def format_last_values(name, epochs):
    """The last value of each key in one line, with its epoch if that is not the last one."""
    words = [f"epochs done {max(epochs):.0f}"]
    for key in KEYS:
        done = max((done for done in epochs if key in epochs[done]), default=None)
        if done is not None:
            words.append(f"{key} {epochs[done][key]:.4g}" + (f" (epoch {done:.0f})" if done != max(epochs) else ""))
    return f"{name}: {', '.join(words)}"


def main(args):
    runs, folder = read_runs(args.runs)
    output = args.output or folder / "curves.png"
    check_figure(output)
    save_figure(draw(runs), output)
    for name, (_, epochs) in runs.items():
        print(format_last_values(name, epochs))
    print(output)


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
