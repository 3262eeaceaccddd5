"""Figures by matplotlib, an optional extra, for several tools: names, colors, legends, the file.

Figures are made without matplotlib.pyplot: no window opens, whatever the backend.
"""

import os
import tempfile
import warnings
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
    try:
        import matplotlib  # noqa: F401

        tempfile.TemporaryFile(dir=Path(output).parent).close()
    except ModuleNotFoundError:
        raise UserError(f"--output {output}: needs matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


def save_figure(figure, output):
    """Write a figure whole or not at all, in the format of the file's ending. Raises UserError if that fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks are drawn as boxes
        write_output(output, lambda file: figure.savefig(file, format=Path(output).suffix[1:].lower()))


def make_figure(panels):
    """A matplotlib figure of 1 to 4 panels and the list of its axes in reading order."""
    from matplotlib.figure import Figure

    size = {1: (8, 5), 2: (12, 4.5), 3: (14, 4), 4: (11, 7.2)}[panels]  # inches
    rows, columns = (2, 2) if panels == 4 else (1, panels)
    figure = Figure(size, dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def choose_colors(count):
    """`count` colors that are easy to distinguish; matplotlib's usual ten if those are enough."""
    import matplotlib

    if count <= 10:
        return matplotlib.colormaps["tab10"].colors[:count]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def add_legend(figure, styles, side):
    """A legend above ("upper") or below ("lower") the panels, for which the figure grows. One entry needs no legend.

    styles: {name: properties of a matplotlib line}.
    """
    from matplotlib.lines import Line2D

    if len(styles) < 2:
        return
    width, height = figure.get_size_inches()
    entry = 0.8 + 0.08 * max(map(len, styles))  # inches: the line, and letters of the usual size
    columns = min(max(int(width / entry), 1), len(styles))
    figure.set_size_inches(width, height + 0.22 * -(-len(styles) // columns))
    handles = [Line2D([], [], **style) for style in styles.values()]
    legend = figure.legend(handles, [""] * len(handles), loc=f"outside {side} center", ncols=columns, frameon=False)
    # File names may hold $ or start with _: as labels they would be formulas, or left out.
    for text, name in zip(legend.get_texts(), styles, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(name))


def add_names(figure, colors):
    """A legend of {name: color} above the panels. A single name becomes the title."""
    if len(colors) == 1:
        figure.suptitle(printable(*colors), fontsize="large", parse_math=False)
    add_legend(figure, {name: dict(color=color) for name, color in colors.items()}, "upper")


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
