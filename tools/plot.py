"""Draw the curves of runs, from their log.txt: loss, accuracy, learning rate, throughput.

python -m tools.plot output/tiny                                    # writes output/tiny/curves.png
python -m tools.plot output/tiny output/base --output curves.png    # beside each other
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import flags
from tools.figure import add_legend, add_names, check_figure, choose_colors, make_figure, save_figure, shorten_paths
from utils import UserError

# Kinds of curves, the same in all panels: line style, and marker of a curve of one point
KINDS = {
    "training": ("-", "o"),
    "test": ("--", "s"),
    "test, averaged weights": (":", "^"),
    "k-NN probe": ("-.", "D"),
    "linear probe": ((0, (6, 1.5, 1, 1.5, 1, 1.5)), "v"),
}
# Panels by the label of their y axis: {key of log.txt: kind of curve}
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
    epochs: dict  # epochs done, in rising order -> {key: value}


class Curve(NamedTuple):
    run: str
    kind: str  # of KINDS
    x: list  # epochs done
    y: list  # finite values


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    parser.add_argument("runs", nargs="+", metavar="LOGDIR", help="output folder of a run, or its log.txt")
    parser.add_argument(
        "--output",
        default=None,
        metavar="FILE",
        help="picture to write; None: curves.png in the first run's folder",
    )
    return parser


def parse_line(line):
    """(epochs done, {key: value}) of a line of log.txt; None for any other line."""
    try:
        entry = json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
        return None
    epoch = entry.get("epoch") if isinstance(entry, dict) else None
    if not isinstance(epoch, float) or not epoch.is_integer():
        return None
    return epoch + 1, {key: entry[key] for key in KEYS if isinstance(entry.get(key), float)}


def read_log(path):
    """The entries of log.txt as {epochs done: {key: value}}; lines that are no entry are skipped and counted.

    An entry discards earlier ones of the same or later epochs: the run resumed from an earlier checkpoint. Raises
    UserError if the file cannot be read or has no entry.
    """
    try:
        lines = path.read_text(errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; accepted is a run's output folder, or its log.txt") from None
    epochs, skipped = {}, 0
    for line in filter(str.strip, lines):
        parsed = parse_line(line)
        if parsed is None:
            skipped += 1
            continue
        while epochs and next(reversed(epochs)) >= parsed[0]:
            epochs.popitem()
        epochs[parsed[0]] = parsed[1]
    if not epochs:
        raise UserError(f"{path}: no line is a JSON object with an epoch; accepted is the log.txt of a training")
    if skipped:
        print(f"{path}: skipped {skipped} lines that are no JSON object with an epoch")
    return epochs


def read_runs(paths):
    """The runs in folders or log files, each once and under a unique name, and the first one's folder.

    Raises UserError as `read_log` does.
    """
    logs = [Path(os.path.abspath(os.path.join(path, "log.txt") if os.path.isdir(path) else path)) for path in paths]
    logs = list(dict.fromkeys(logs))
    names = shorten_paths([log.parent if log.name == "log.txt" else log for log in logs])
    return [Run(name, read_log(log)) for name, log in zip(names, logs, strict=True)], logs[0].parent


def find_curves(runs, panel):
    """The curves of a panel of PANELS: of each run and key with a finite value."""
    curves = []
    for run in runs:
        for key, kind in panel.items():
            points = [(x, entry[key]) for x, entry in run.epochs.items() if math.isfinite(entry.get(key, math.nan))]
            if points:
                curves.append(Curve(run.name, kind, *map(list, zip(*points, strict=True))))
    return curves


def draw(runs):
    """A matplotlib figure of the panels that have data: one color per run, one line style per kind of curve.

    Raises UserError if no run has a finite value.
    """
    panels = {label: curves for label, panel in PANELS.items() if (curves := find_curves(runs, panel))}
    if not panels:
        raise UserError(f"nothing to draw: no finite value of {', '.join(KEYS)}")
    figure, axes = make_figure(len(panels))
    colors = dict(zip([run.name for run in runs], choose_colors(len(runs)), strict=True))
    legend = {}  # style of each kind of curve
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            line, marker = KINDS[curve.kind]
            style = {"linestyle": line} | ({"marker": marker} if len(curve.x) == 1 else {})
            axis.plot(curve.x, curve.y, color=colors[curve.run], **style)
            legend[curve.kind] = {"color": "0.3"} | legend.get(curve.kind, {}) | style
        axis.set(xlabel="epochs done", ylabel=label)
        axis.ticklabel_format(axis="y", scilimits=(-2, 5))
    last = max(next(reversed(run.epochs)) for run in runs)
    for axis in axes:
        axis.set_xlim(0, 1.02 * last)
        axis.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
    add_names(figure, colors)
    add_legend(figure, legend, "lower")
    return figure


def format_last_values(run):
    """The last value of each key in one line, with its epoch if that is not the last one."""
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
        print(format_last_values(run))
    print(output)


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
