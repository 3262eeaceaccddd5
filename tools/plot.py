"""Draw the curves of runs, from their log.txt: loss, accuracy, learning rate, throughput.

python -m tools.plot output/tiny                                    # writes output/tiny/curves.png
python -m tools.plot output/tiny output/base --output curves.png    # beside each other
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import utils
from tools.figure import add_legend, add_names, check_figure, colours, make_figure, save_figure, short_names
from utils import UserError

# Kinds of curves, in all panels: their lines, and the marker of a point alone
KINDS = {
    "training": ("-", "o"),
    "test": ("--", "s"),
    "test, averaged weights": (":", "^"),
    "k-NN probe": ("-.", "D"),
    "linear probe": ((0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
}
# Each panel by the label of its y axis: which key of log.txt it shows as which kind of curve
PANELS = {
    "loss": {"train_loss": "training", "test_loss": "test", "test_loss_ema": "test, averaged weights"},
    "top-1 accuracy (%)": {
        "test_acc1": "test",
        "test_acc1_ema": "test, averaged weights",
        "probe_knn": "k-NN probe",
        "probe_linear": "linear probe",
    },
    "learning rate": {"train_lr": "training"},
    "throughput (images / s)": {"images_per_second": "training"},
}
KEYS = [key for panel in PANELS.values() for key in panel]


class Run(NamedTuple):
    name: str
    epochs: dict  # epochs done, rising -> {key: value}


class Curve(NamedTuple):
    run: str
    kind: str  # of KINDS
    x: list  # epochs done
    y: list  # finite values


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    parser.add_argument("runs", nargs="+", metavar="LOGDIR", help="output folder of a run, or its log.txt")
    parser.add_argument(
        "--output",
        default=None,
        metavar="FILE",
        help="the picture to write; None: curves.png in the first run's folder",
    )
    return parser


def parse_line(line):
    """(epochs done, {key: value}) of a line of log.txt; None if it is not one."""
    try:
        entry = json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
        return None
    epoch = entry.get("epoch") if isinstance(entry, dict) else None
    if not isinstance(epoch, float) or not epoch.is_integer():
        return None
    return epoch + 1, {key: entry[key] for key in KEYS if isinstance(entry.get(key), float)}


def read_log(path):
    """What log.txt says of each epoch, {epochs done: {key: value}}, and the number of lines that are no epoch's.

    A line takes back those before it of the same or later epochs: the run went on from an earlier checkpoint.
    Raises UserError if the file cannot be read or has no line of an epoch.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted is a run's output folder, or its log.txt") from None
    epochs, others = {}, 0
    for line in filter(str.strip, lines):
        parsed = parse_line(line)
        if parsed is None:
            others += 1
            continue
        while epochs and next(reversed(epochs)) >= parsed[0]:
            epochs.popitem()
        epochs[parsed[0]] = parsed[1]
    if not epochs:
        raise UserError(f"{path}: no line of it is a JSON object with an epoch, as training writes")
    if others:
        print(f"{path}: passed over {others} lines that are no JSON object with an epoch")
    return epochs


def read_runs(given):
    """The runs in these folders or log files, each once, by names that tell them apart. Raises UserError."""
    logs = [Path(os.path.abspath(os.path.join(path, "log.txt") if os.path.isdir(path) else path)) for path in given]
    logs = list(dict.fromkeys(logs))
    names = short_names([log.parent if log.name == "log.txt" else log for log in logs])
    return [Run(name, read_log(log)) for name, log in zip(names, logs, strict=True)], logs[0].parent


def find_curves(runs, panel):
    """The curves of one of PANELS, those of each run that have a finite value."""
    curves = []
    for run in runs:
        for key, kind in panel.items():
            points = [(x, entry[key]) for x, entry in run.epochs.items() if math.isfinite(entry.get(key, math.nan))]
            if points:
                curves.append(Curve(run.name, kind, *map(list, zip(*points, strict=True))))
    return curves


def draw(runs):
    """A matplotlib figure with the panels that have data: one colour a run, one line style a kind of curve.

    Raises UserError if no run has a finite value of anything.
    """
    panels = {label: curves for label, panel in PANELS.items() if (curves := find_curves(runs, panel))}
    if not panels:
        raise UserError(f"nothing to draw: no finite value of {', '.join(KEYS)}")
    figure, axes = make_figure(len(panels))
    colour_of = dict(zip([run.name for run in runs], colours(len(runs)), strict=True))
    look_of = {}  # of each kind, as the legend shows it
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            line, marker = KINDS[curve.kind]
            look = dict(linestyle=line, marker=marker if len(curve.x) == 1 else None)
            axis.plot(curve.x, curve.y, color=colour_of[curve.run], **look)
            look_of[curve.kind] = look_of.get(curve.kind, {"color": "0.3"}) | {k: v for k, v in look.items() if v}
        axis.set(xlabel="epochs done", ylabel=label)
        axis.ticklabel_format(axis="y", scilimits=(-2, 5))
    last = max(next(reversed(run.epochs)) for run in runs)
    for axis in axes:
        axis.set_xlim(0, 1.02 * last)
        axis.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
    add_names(figure, colour_of)
    add_legend(figure, look_of, "lower")
    return figure


def last_values(run):
    """The last value of each key in one line, with its epoch where that is not the last one."""
    last = next(reversed(run.epochs))
    words = []
    for key in KEYS:
        done = next((epoch for epoch in reversed(run.epochs) if key in run.epochs[epoch]), None)
        if done is not None:
            words.append(f"{key} {run.epochs[done][key]:.4g}" + (f" (epoch {done:.0f})" if done != last else ""))
    return f"{run.name}: {', '.join([f'epochs done {last:.0f}', *words])}"


def main(args):
    runs, folder = read_runs(args.runs)
    output = args.output or folder / "curves.png"
    check_figure(output)
    save_figure(draw(runs), output)
    for run in runs:
        print(last_values(run))
    print(output)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
