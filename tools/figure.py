"""What the tools that draw with matplotlib, an optional extra, share: names, colours, legends, the file.

Figures are made without matplotlib.pyplot: no window is opened, whatever backend is set.
"""

import os
import tempfile
import warnings
from pathlib import Path

import utils
from utils import UserError

ENDINGS = (".png", ".pdf", ".svg")


def check_figure(output):
    """Raise UserError if a figure could not be written to --output, so that no long work is done in vain."""
    folder = Path(output).parent
    if Path(output).suffix.lower() not in ENDINGS:
        raise UserError(f"--output {output}: must end in one of {', '.join(ENDINGS)}")
    if os.path.isdir(output):
        raise UserError(f"--output {output}: Is a directory")
    try:
        import matplotlib  # noqa: F401

        tempfile.TemporaryFile(dir=folder).close()
    except ModuleNotFoundError:
        raise UserError(f"--output {output}: needs matplotlib: pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


def save_figure(figure, output):
    """Write a figure whole or not at all, in the format that the name's ending says. Raises UserError if that fails."""
    kind = Path(output).suffix[1:].lower()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks: boxes stand for it
            utils.write_whole(output, lambda file: figure.savefig(file, format=kind))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None


def make_figure(panels):
    """A matplotlib figure of 1 to 4 panels and its axes, a list in reading order."""
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


def colours(count):
    """So many colours that are easy to tell apart, the first ten of them the usual ones."""
    import matplotlib

    if count <= 10:
        return matplotlib.colormaps["tab10"].colors[:count]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def add_legend(figure, look_of, where):
    """Say above ("upper") or below ("lower") the panels how each name is drawn; the figure grows by as much.

    look_of: {name: properties of a matplotlib line}. Of one name alone there is nothing to tell: it is left out.
    """
    from matplotlib.lines import Line2D

    if len(look_of) < 2:
        return
    width, height = figure.get_size_inches()
    entry = 0.8 + 0.08 * max(map(len, look_of))  # inches: the line, and letters of the usual size
    columns = min(max(int(width / entry), 1), len(look_of))
    figure.set_size_inches(width, height + 0.22 * -(-len(look_of) // columns))
    handles = [Line2D([], [], **look) for look in look_of.values()]
    empty = [""] * len(handles)
    legend = figure.legend(handles, empty, loc=f"outside {where} center", ncols=columns, frameon=False)
    # Names of files may hold $ or begin with _: as labels they would be formulae, or left out.
    for text, name in zip(legend.get_texts(), look_of, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(name))


def add_names(figure, colour_of):
    """Say above the panels which colour each name of {name: colour} has. One name alone is the title."""
    if len(colour_of) == 1:
        figure.suptitle(printable(*colour_of), fontsize="large", parse_math=False)
    add_legend(figure, {name: dict(color=colour) for name, colour in colour_of.items()}, "upper")


def printable(name):
    """A file's name, which may be any bytes, as text that can be drawn."""
    return os.fsencode(name).decode(errors="replace")


def short_names(paths):
    """For each of several different paths as much of its end as tells it from the others: c, or b/c beside a/c."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = next(k for k in range(1, len(own) + 1) if all(other[-k:] != own[-k:] for other in others))
        names.append(str(Path(*own[-count:])))
    return names
