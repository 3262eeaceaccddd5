"""Rows of numbers kept on disk as they are computed, by several processes, so that a stopped tool resumes.

OUTPUT.partial/
    run.json       what the rows depend on
    run.lock       held while a run writes here
    rows-*         one file a process and start: blocks of (indices, rows, errors), the last one perhaps cut short
    rows.npy       all rows in the order of the images, while the output is written
"""

import contextlib
import io
import json
import shutil
import uuid
from pathlib import Path

import numpy as np

import utils
from checkpoints import lock_folder, write_text
from utils import TrainingError, UserError


class Journal:
    """The rows that --output is made of. Raises UserError if its folder holds those of a run with another key."""

    def __init__(self, output, key):
        self.output, self.folder = output, Path(f"{output}.partial")
        utils.on_main_rank(lambda: self.prepare(json.loads(json.dumps(key))))
        self.file = None

    def prepare(self, key):
        try:
            self.folder.mkdir(exist_ok=True)
            lock_folder(self.folder)
            path = self.folder / "run.json"
            before = json.loads(path.read_text()) if path.exists() else key
            changed = [name for name in key if key[name] != before.get(name)]
            if changed:
                fix = "give the same to resume, delete the folder, or choose another output"
                raise UserError(f"{self.folder}: holds part of a run with another {' and '.join(changed)}: {fix}")
            write_text(path, json.dumps(key))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"--output {self.output}: {getattr(error, 'strerror', None) or error}") from None

    def blocks(self):
        """All whole blocks of indices (n,), rows (n, D), empty if no image could be read, and [(index, error)]."""
        for path in sorted(self.folder.glob("rows-*")):
            with open(path, "rb") as file, contextlib.suppress(EOFError, ValueError):  # at its end, or cut short
                while True:
                    yield np.load(file), np.load(file), json.loads(np.load(file).item())

    def done(self):
        """The indices whose rows are kept. What could not be read is tried again."""
        return {index for indices, *_ in self.blocks() for index in indices.tolist()}

    def append(self, indices, rows, errors):
        content = io.BytesIO()
        for part in (indices, rows, json.dumps(errors)):
            np.save(content, np.asarray(part))
        try:
            self.file = self.file or open(self.folder / f"rows-{uuid.uuid4().hex}", "ab", buffering=0)
            self.file.write(content.getvalue())
        except OSError as error:
            raise UserError(f"--output {self.output}: {error.strerror}; the same command resumes") from None

    def merge(self, count):
        """(rows (count, D) as a memory-mapped rows.npy, nan where an image cannot be read; {index: error}).

        Raises TrainingError if rows are missing, as when another process has died, UserError if no image can be read.
        """
        done = self.done()
        errors = {index: error for *_, errors in self.blocks() for index, error in errors if index not in done}
        missing = count - len(done) - len(errors)
        if missing:
            raise TrainingError(f"{missing} of {count} images are not done: a process ended; the same command resumes")
        if not done:
            raise UserError(f"none of the {count} images can be read: {errors[0]}")
        width = next(rows.shape[1] for _, rows, _ in self.blocks() if len(rows))
        merged = np.lib.format.open_memmap(self.folder / "rows.npy", "w+", np.float32, (count, width))
        merged[:] = np.nan
        for indices, rows, _ in self.blocks():
            if len(rows):
                merged[indices] = rows
        merged.flush()
        return merged, errors

    def remove(self):
        if self.file:
            self.file.close()
        shutil.rmtree(self.folder)
