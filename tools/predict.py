"""Predict classes or numbers of images, or compute their features, with the network of a checkpoint.

    python -m tools.predict --checkpoint OUTPUT/checkpoint-best.pth A.jpg B.png
    python -m tools.predict --checkpoint OUTPUT/checkpoint-best.pth FOLDER --output predictions.csv --sheet sheet.png
    python -m tools.predict --checkpoint OUTPUT/checkpoint-799.pth FOLDER --output features.parquet --scale 4
    torchrun --nproc_per_node=8 -m tools.predict --checkpoint FILE FOLDER --output predictions.csv

    .csv              file, error, class1, probability1, class2, ...: a line an image; before them, where images have
                      several classes, those above 0.5, joined by ; in classes. Of a regression file, error, TARGET, ...
    .parquet          file, error, features (C,): the mean over all sites of a stage's map, as the probes take it
    .npy              the features as an array (n, C), nan for an unreadable image; NAME.names.csv has file and error

Task, image size, crop, channels, normalization and names of classes are the checkpoint's. An unreadable image keeps its
line, with its error. A run that was stopped resumes by the same command, on any number of processes.
"""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import flags
import tasks
import utils
from checkpoints import write_csv
from evaluation import pool_features
from image_sets import spread
from models.weights import find_weights
from sources import in_one_line
from tools.common import check_output, write_output
from tools.inference import add_inference_args, load_inference
from tools.journal import Journal
from tools.sheet import check_picture, read_pixels, save_sheet
from utils import UserError, log

ENDINGS = (".csv", ".npy", ".parquet")
CHUNK = 8192  # rows written at a time


def get_args_parser():
    parser = flags.FlagParser(add_help=False)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("--output", metavar="FILE", help="predictions (.csv) or features (.npy, .parquet); None: print predictions")
    add("--topk", default=5, type=flags.at_least(1), help="number of classes for an image")
    add("--scale", default=4, type=int, choices=(1, 2, 3, 4), help="stage whose features are written, 4 the last")
    add("--tta", default="none", choices=("none", "flip"), help="flip: average over the image and its mirror image")
    add("--sheet", metavar="FILE", help="picture of up to 64 of the images with their classes")
    add_inference_args(parser)
    return parser


def check_args(args):
    """The ending of the output. Raises UserError for flags that do not fit each other, before any long work."""
    ending = Path(args.output or "stdout.csv").suffix.lower()
    if ending not in ENDINGS:
        raise UserError(f"--output {args.output}: must end in one of {', '.join(ENDINGS)}")
    if ending == ".parquet" and not find_spec("pyarrow"):
        raise UserError(f"--output {args.output}: needs pyarrow: pip install pyarrow, or write .npy")
    for flag, path in (("--output", args.output), ("--sheet", args.sheet)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{flag} {path}: no such folder {Path(path).parent}")
        if path and os.path.isdir(path):
            raise UserError(f"{flag} {path}: Is a directory")
        if path:
            check_output(path, args.images, flag)
    if args.sheet:
        check_picture("--sheet", args.sheet)
        if ending != ".csv":
            raise UserError(f"--sheet {args.sheet}: shows predicted classes: give a .csv as --output")
    return ending


def build_function(args, model, task):
    """function(normalized imgs) -> rows: those of the task's predictions, or features (N, C) without a task."""

    def compute(imgs):
        return task.predict(model(imgs).float()) if task else pool_features(model.feature_maps(imgs)[args.scale - 1])

    def function(imgs):
        outputs = compute(imgs)
        if args.tta == "flip":
            outputs = (outputs + compute(imgs.flip(3))) / 2
        return task.rows(outputs, args.topk) if task else outputs

    return function


def find_task(inference):
    """The task of the checkpoint; classes have numbers if it has no names. Raises UserError for what does not fit."""
    count = inference.model.head.out_features
    with utils.name_in_errors(f"--checkpoint {inference.args.checkpoint}"):
        if "head.weight" not in find_weights(inference.checkpoint, inference.args.model_key):
            raise ValueError("no head.weight: accepted is a classifier with its head")
        task = tasks.restore_task(inference.checkpoint)
        task = task or tasks.Classification("ce", [f"class {number}" for number in range(count)])
        if len(task.names) != count or not all(isinstance(name, str) for name in task.names):
            raise ValueError(f"names of classes that are not the head's {count}")
    return task


def print_predictions(inference, dataset, function, task):
    """A line an image. Raises UserError if none can be read."""
    unreadable = []
    for indices, rows, errors in inference.compute(function, dataset, range(len(dataset))):
        lines = {index: f"cannot be read: {error}" for index, error in errors}
        for index, row in zip(indices.tolist(), rows, strict=True):
            lines[index] = task.describe_row(row, inference.args.topk)
        for index in sorted(lines):
            print(f"{in_one_line(dataset.images.name(index))}: {lines[index]}", flush=True)
        unreadable += errors
    if len(unreadable) == len(dataset):
        raise UserError(f"none of the {len(dataset)} images can be read: {unreadable[0][1]}")


def describe_run(args, dataset):
    """What the rows depend on, in JSON: a journal with another is refused."""
    listing = hashlib.sha256(b"\0".join(map(bytes, dataset.images.paths))).hexdigest()
    stat = Path(args.checkpoint).stat() if Path(args.checkpoint).exists() else None
    names = ("topk", "scale", "tta", "model_key", "input_size", "use_amp", "amp_dtype")
    key = {f"--{name}": getattr(args, name) for name in names} | {"list of images": listing}
    return key | {"--checkpoint": [os.path.abspath(args.checkpoint), stat and [stat.st_mtime_ns, stat.st_size]]}


def write_list(output, images, errors, cells=lambda index: {}):
    """A line an image: file, error, and the texts of cells(index) by their titles if it could be read."""
    first = next(index for index in range(len(images)) if index not in errors)

    def lines():
        yield "file", "error", *cells(first)
        for index in range(len(images)):
            values = () if index in errors else cells(index).values()
            yield images.name(index), errors.get(index, ""), *values

    write_output(output, lambda file: write_csv(file, lines()))


def write_parquet(output, images, rows, errors):
    import pyarrow.parquet

    text, features = pyarrow.string(), pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema([("file", text), ("error", text), ("features", features)])

    def write(file):
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for first in range(0, len(images), CHUNK):
                numbers = range(first, min(first + CHUNK, len(images)))
                names = [os.fsencode(images.name(i)).decode(errors="backslashreplace") for i in numbers]
                features = [None if i in errors else rows[i] for i in numbers]
                columns = dict(file=names, error=[errors.get(i) for i in numbers], features=features)
                writer.write_table(pyarrow.table(columns, schema=schema))

    write_output(output, write)


def write_output_files(args, journal, dataset, ending, task):
    """--output and --sheet from a complete journal, which is then removed."""
    images = dataset.images
    rows, errors = journal.merge(len(images))
    if ending == ".csv":
        write_list(args.output, images, errors, lambda index: task.cells(rows[index], args.topk))
    elif ending == ".parquet":
        write_parquet(args.output, images, rows, errors)
    else:
        write_list(Path(args.output).with_suffix(".names.csv"), images, errors)
        os.replace(journal.folder / "rows.npy", args.output)
    journal.remove()
    unreadable = f", {len(errors)} unreadable, such as {images.name(min(errors))}" if errors else ""
    log(f"{utils.format_count(len(images), 'image')}{unreadable}: {args.output}")
    if args.sheet:
        draw_predictions(args, dataset, rows, errors, task)


def draw_predictions(args, dataset, rows, errors, task):
    cells = []
    for index in spread(range(len(dataset)), 64):
        caption = "unreadable" if index in errors else "\n".join(task.cells(rows[index], 1).values())
        cells.append((read_pixels(dataset, index), caption, None))
    save_sheet("--sheet", args.sheet, [cells[i : i + 8] for i in range(0, len(cells), 8)])
    log(f"{len(cells)} of them: {args.sheet}")


def main(args):
    ending = check_args(args)
    inference = load_inference(args)
    task = find_task(inference) if ending == ".csv" else None
    dataset = inference.build_dataset("IMAGE", args.images)
    function = build_function(args, inference.model, task)
    if not args.output:
        if args.sheet or utils.get_world_size() > 1:
            raise UserError("--output: give a .csv; --sheet and several processes need it")
        return print_predictions(inference, dataset, function, task)

    journal = Journal(args.output, describe_run(args, dataset))
    done = journal.done()
    left = [index for index in range(len(dataset)) if index not in done]
    utils.barrier()  # all have read what is done before any writes more
    if done:
        log(f"resuming: {len(done)} of {len(dataset)} images are done")
    for block in inference.compute(function, dataset, left[utils.get_rank() :: utils.get_world_size()]):
        journal.append(*block)
    utils.barrier()
    utils.on_main_rank(lambda: write_output_files(args, journal, dataset, ending, task))


if __name__ == "__main__":
    flags.run_script(main, get_args_parser(), __doc__)
