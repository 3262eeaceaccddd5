"""Figures by matplotlib, an optional extra: panels, colors, legends, the file. No window opens."""

import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

from tools.common import write_output
from utils import UserError

ENDINGS = (".png", ".pdf", ".svg")


def check_figure(output):
    """Raise UserError if no figure can be written to --output, so that no long work is done in vain."""
    if Path(output).suffix.lower() not in ENDINGS:
        raise UserError(f"--output {output}: must end in one of {', '.join(ENDINGS)}")
    if os.path.isdir(output):
        raise UserError(f"--output {output}: Is a directory")
    if not find_spec("matplotlib"):
        raise UserError(f"--output {output}: needs matplotlib: pip install matplotlib")
    try:
        tempfile.TemporaryFile(dir=Path(output).parent).close()
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


def save_figure(figure, output):
    """Write a figure and its legends, in the format of the file's ending. Raises UserError if that fails."""
    style = dict(format=Path(output).suffix[1:].lower(), bbox_inches="tight")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks are drawn as boxes
        write_output(output, lambda file: figure.savefig(file, **style))


def make_figure(panels):
    """A matplotlib figure of this many panels and the list of its axes in reading order."""
    from matplotlib.figure import Figure

    rows = 1 if panels < 4 else 2
    columns = -(-panels // rows)
    figure = Figure((3 + 4 * columns, 1 + 3.2 * rows), dpi=120, layout="constrained")  # inches
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axis in axes:
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def choose_colors(names):
    """{name: color}: matplotlib's usual ten if those are enough, else as many that are easy to distinguish."""
    from matplotlib import colormaps

    if len(names) <= 10:
        return dict(zip(names, colormaps["tab10"].colors, strict=False))
    return {name: colormaps["turbo"](0.05 + 0.9 * i / (len(names) - 1)) for i, name in enumerate(names)}


def add_legends(figure, colors, styles):
    """Legends of {name: color}, right of the panels, and {kind: line style}, below. A single name is the title."""
    if len(colors) == 1:
        figure.suptitle(printable(*colors), fontsize="large", parse_math=False)
    else:
        lines = {name: dict(color=color) for name, color in colors.items()}
        add_legend(figure, lines, loc="upper left", bbox_to_anchor=(1, 1))
    if len(styles) > 1:
        lines = {kind: {"color": "0.3"} | style for kind, style in styles.items()}
        add_legend(figure, lines, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(lines))


def add_legend(figure, lines, **place):
    """A legend of {name: properties of a line}, outside the figure: its file grows by as much."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **line) for line in lines.values()]
    legend = figure.legend(handles, [""] * len(handles), frameon=False, **place)
    # File names may hold $ or start with _: as labels they would be formulas, or left out.
    for text, name in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(name))


def printable(name):
    """A file name, which may be any bytes, as text that can be drawn."""
    return os.fsencode(name).decode(errors="replace")


def shorten_paths(paths):
    """For each of several different paths the shortest ending that no other has: c alone, b/c beside a/c."""
    split = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for parts in split:
        others = [other for other in split if other != parts]
        count = next(k for k in range(1, len(parts) + 1) if all(other[-k:] != parts[-k:] for other in others))
        names.append(str(Path(*parts[-count:])))
    return names
