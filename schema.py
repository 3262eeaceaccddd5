"""What the entries of a checkpoint of this project may be, and the check that they are."""

import math

from utils import UserError

CHECKPOINT_FORMAT = 2
COUNT, SIDE, NUMBER = range(2**48), range(1, 2**16), (int, float)


def fits(value, form):
    """Whether a value has a form, which is one of these:

    a type (a bool is no int), None, a range of whole numbers, a function that says it; (A, B): one of these forms;
    [A, B]: a list of these in turn; [A, ...]: a list of any length; {name: A, str: B}: a dict from strings, with B for
    all other names; there `...` is the form of an entry that is absent.
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        if not isinstance(value, list | tuple):
            return False
        forms = form[:1] * len(value) if form[-1] is ... else form
        return len(forms) == len(value) and all(map(fits, value, forms))
    if isinstance(form, dict):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            return False
        names, others = value.keys() | form.keys() - {str}, form.get(str, object)
        return all(fits(value.get(name, ...), form.get(name, others)) for name in names)
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, type):
        return isinstance(value, form) and (type(value) is not bool or form in (bool, object))
    return form(value) if callable(form) else value is form


def number(accepts):
    """The form of an int or float for which accepts(value) holds."""
    return lambda value: type(value) in (int, float) and accepts(value)


# What evaluation and tools read of a training's flags
FLAGS_READ = {
    "input_size": (..., SIDE, [SIDE], [SIDE, SIDE]),
    "crop_pct": (..., None, number(lambda value: 0 < value <= 1)),
    "pixel_range": (..., None, lambda value: fits(value, [NUMBER, NUMBER]) and value[0] < value[1]),
    "mean": (..., None, [number(lambda value: abs(value) < 2**64), ...]),
    "std": (..., None, [number(lambda value: 0 < value < 2**64), ...]),
    "mask_ratio": (..., number(lambda value: 0 < value < 1)),
    "norm_pix_loss": (..., bool),
    "label_column": (..., str),
    "imagenet_default_mean_and_std": (..., bool),
}
# What can be a constructor's arguments; what concerns shapes is read from the weights instead
CONFIG = {
    "norm_pix_loss": (..., bool),
    "mask_ratio": (..., float),
    "drop_path_rate": (..., float),
    "head_init_scale": (..., float),
    "sparse_backend": (..., str),
    "img_size": (..., int, [COUNT, ...]),
    str: (bool, int, float, str, [COUNT, ...], None),
}
TASK = {"kind": str, "loss": str, str: (str, [NUMBER, ...])}  # what `tasks.Task.state_dict` returns
OPTIMIZER = {"state": dict, "param_groups": [{"params": list}, ...]}


def is_flags(value):
    return fits(value, FLAGS_READ) and len(value.get("mean") or ()) == len(value.get("std") or ())


# The entries of a checkpoint of this project that are not weights: forms, and the same in words
SCHEMA = {
    "lr": (number(lambda value: 0 <= value < math.inf), "a number, at least 0"),
    "config": (CONFIG, "a dict of the network's options"),
    "optimizer": (OPTIMIZER, "the state dict of an optimizer"),
    "scaler": (dict, "a dict"),
    "hooks": (dict, "a dict"),
    "args": (is_flags, "a dict of the training's flags"),
    "class_names": ((None, [str, ...]), "None or a list of strings"),
    "task": ((None, TASK), "None or a dict with kind and loss"),
    "unreadable_images": ([str, ...], "a list of strings"),
    "best": ({str: [NUMBER, COUNT, COUNT]}, "a dict of [value, epoch, measurements since]"),
    "epoch_means": ({str: [NUMBER, COUNT]}, "a dict of [sum, count]"),
    "epoch_loss": ([object, ...], "[sum, count]"),
}
for name in ("epoch", "step", "num_images", "effective_batch_size", "sample_order"):
    SCHEMA[name] = COUNT, "a whole number, at least 0"


def check_schema(checkpoint, path):
    """Raise UserError, naming the entry, for a checkpoint that this version of the project cannot have written."""
    if not fits(checkpoint["format"], range(1, CHECKPOINT_FORMAT + 1)):
        known = f"this version reads 1 and {CHECKPOINT_FORMAT}"
        raise UserError(f"{path}: format is {checkpoint['format']!r}; {known}: update the code")
    for name, (form, accepted) in SCHEMA.items():
        if name in checkpoint and not fits(checkpoint[name], form):
            raise UserError(f"{path}: {name} is {str(checkpoint[name])[:60]!r}; must be {accepted}")
