"""Flags: the parser, types that check ranges, switches, and the groups that both scripts share."""

import utils  # isort: skip  (before torch)
import argparse
import contextlib
import math
import re
import shlex
import sys
from pathlib import Path

import torch

from utils import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, and switches without a placeholder."""

    def _format_action_invocation(self, action):
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


UNSET = object()


class Flags(argparse.Namespace):
    """The values of all flags; `given`, which is no flag, holds the names of those on the command line."""

    __slots__ = ("given",)

    def replace(self, **changes):
        """A copy with changes."""
        flags = Flags(**vars(self) | changes)
        flags.given = self.given
        return flags


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` with defaults in its help, flag files (`@recipes/NAME.args`) and no abbreviated flags.

    A flag file holds flags as on the command line, on any number of lines; # starts a comment. Later flags win.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """`Flags`, and the words of the command line that are none."""
        unset = {action.dest: UNSET for action in self._actions if action.default is not argparse.SUPPRESS}
        words = self.read_flag_files(sys.argv[1:] if args is None else args)
        values, rest = super().parse_known_args(words, Flags(**unset))
        values.given = frozenset(name for name, value in vars(values).items() if value is not UNSET)
        for name in unset.keys() - values.given:
            setattr(values, name, self.get_default(name))
        return values, rest

    def read_flag_files(self, words, within=()):
        """The words of a command line with the content of NAME for each @NAME. within: the files that are being read"""
        expanded = []
        for word in words:
            if word[:1] != "@":
                expanded.append(word)
                continue
            if word in within:
                self.error(f"{word}: a flag file that includes itself")
            try:
                lines = Path(word[1:]).read_text().splitlines()
                content = [flag for line in lines for flag in shlex.split(line, comments=True)]
            except UnicodeDecodeError:
                self.error(f"{word}: not a text file; must hold flags")
            except OSError as error:
                self.error(f"{word}: {error.strerror}")
            except ValueError as error:  # of shlex
                self.error(f"{word}: {str(error).lower()}: each line must hold whole words")
            expanded += self.read_flag_files(content, (*within, word))
        return expanded

    def error(self, message):
        """End with one line, on the main process, instead of the usage of a hundred flags."""
        message = re.sub(r"^argument (--\w+)[^:]*: (?=.*: must be )", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n" if utils.is_main_process() else None)


def run_script(main, parser, description):
    """Parse the command line by a parser without help and call main(args), see `utils.run_main`."""
    parser = FlagParser(description=description.splitlines()[0], parents=[parser])
    utils.run_main(main, parser.parse_args(), parser.prog)


def number(kind, accepts, accepted):
    """Argument type: an int or float (`kind`) for which accepts(value) holds; `accepted` says the same in words."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {accepted}")
        return value

    return convert


def at_least(low, at_most=None):
    """Argument type: a finite number from `low` on, up to `at_most`, whole if `low` is an int."""
    kind = "a whole number, " if isinstance(low, int) else ""
    high, limit = (math.inf, "") if at_most is None else (at_most, f", at most {at_most}")
    return number(type(low), lambda value: low <= value <= high and value < math.inf, f"{kind}at least {low}{limit}")


above_0 = number(float, lambda value: 0 < value < math.inf, "a number above 0")
fraction = number(float, lambda value: 0 <= value <= 1, "from 0 to 1")
fraction_below_1 = number(float, lambda value: 0 <= value < 1, "from 0 to below 1")
fraction_above_0 = number(float, lambda value: 0 < value <= 1, "above 0, at most 1")


def str_or_none(text):
    """Argument type: text, or None for an empty one and for `none`."""
    return None if text.lower() in ("", "none") else text


def str2bool(text):
    """Argument type: true or false."""
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: must be true or false")


class Switch(argparse.Action):
    """A boolean flag: `--flag`, `--flag true`, `--flag false` and `--no-flag`."""

    def __init__(self, option_strings, dest, **kwargs):
        negatives = [f"--no-{name[2:]}" for name in option_strings]
        super().__init__([*option_strings, *negatives], dest, nargs="?", type=str2bool, **kwargs)

    def __call__(self, parser, namespace, value, option_string=None):
        negative = option_string.startswith("--no-")
        if negative and value is not None:
            parser.error(f"{option_string} {str(value).lower()}: takes no value")
        setattr(namespace, self.dest, not negative if value is None else value)


class ImageSize(argparse.Action):
    """A flag of one or two numbers, kept as (height, width)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(nargs="+", type=at_least(1, 16384), metavar="PIXELS"))

    def __call__(self, parser, namespace, sizes, option_string=None):
        if len(sizes) > 2:
            parser.error(f"{option_string} {' '.join(map(str, sizes))}: must be one or two numbers")
        setattr(namespace, self.dest, (sizes[0], sizes[-1]))


def check_image_size(flag, size, multiple_of=1, least=1):
    """Raise UserError unless both sides of (height, width) are at least `least` and multiples of `multiple_of`."""
    if any(side < least or side % multiple_of for side in size):
        accepted = f"multiples of {multiple_of} (8 x --stem_stride)" if multiple_of > 1 else f"numbers from {least} on"
        raise UserError(f"--{flag} {' '.join(map(str, dict.fromkeys(size)))}: must be one or two {accepted}")


# ---------------------------------------------------------------- shared groups


def add_model_args(parser, names):
    """The flags of the network. names: the models to choose from."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default="convnextv2_base", choices=list(names), metavar="NAME", help=f"one of {', '.join(names)}")
    add("--input_size", default=(224, 224), action=ImageSize, help="side of the images, or height and width")
    channels = "channels of the images: 1 reads gray, 3 RGB, 4 RGBA, others .npy and TIFF"
    add("--in_chans", default=3, type=at_least(1, 1024), help=channels)
    stride = "stride of the stem in pixels; the total stride and the mask unit are 8 times that"
    add("--stem_stride", default=4, type=int, choices=(1, 2, 4), help=stride)


def add_device_arg(add):
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=device, help="cuda, cuda:N or cpu")


def add_machine_args(parser, training=True):
    """The flags of device, precision and processes. training: also those that only training heeds."""
    add = parser.add_argument_group("speed").add_argument
    add_device_arg(add)
    add("--use_amp", default=False, action=Switch, help="automatic mixed precision")
    add("--amp_dtype", default="bfloat16", choices=("bfloat16", "float16"), help="dtype of --use_amp")
    add("--triton", default=True, action=Switch, help="use our Triton kernels, on CUDA if they work")
    if training:
        add("--compile", default=False, action=Switch, help="torch.compile the model")
        less = "recompute activations in the backward pass: less memory, more time"
        add("--grad_checkpointing", default=False, action=Switch, help=less)

    add = parser.add_argument_group("distributed (torchrun and other launchers set these)").add_argument
    add("--world_size", default=1, type=int, help="number of processes")
    add("--local_rank", "--local-rank", default=-1, type=int, help="rank of this process on its machine")
    add("--dist_on_itp", default=False, action=Switch, help="read ranks from Open MPI's environment")
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--dist_timeout", default=1800, type=at_least(1), help="seconds after which a silent process counts as dead")


def device(text):
    """Argument type: cpu, cuda or cuda:N."""
    with contextlib.suppress(RuntimeError):
        if torch.device(text).type in ("cpu", "cuda"):
            return text
    raise argparse.ArgumentTypeError(f"{text}: must be cpu, cuda or cuda:N")


def check_device(args):
    """Raise UserError if this machine does not have --device."""
    wanted, gpus = torch.device(args.device), torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        raise UserError(f"--device {args.device}: {gpus or 'no'} CUDA GPU is visible; --device cpu works")


def network_args(args):
    """The constructor arguments of both networks that flags set. A further option of `models.convnextv2` joins here."""
    return {"in_chans": args.in_chans}
