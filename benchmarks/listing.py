"""How long a data set takes to be listed, and what a process holds of it: time and memory at 1 and 14 million images.

    python -m benchmarks.listing                    # 1,000,000 files of 632 bytes in 1,000 class folders: about 6 GB
    python -m benchmarks.listing --count 100000

Each figure is of a process of its own. "start" is `index.open_index` with an index that is kept; memory is what that
process adds to its anonymous memory (what is mapped from a file is shared and can be dropped). The folders are in the
system's cache; the 14 million entries are the real ones repeated.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import utils  # noqa: F401  isort: skip  (before torch)
import numpy as np
import torch
from PIL import Image

import index
import sources
from image_sets import ImageFolder
from loaders import EpochSampler

CLASSES = 1000


def write_files(folder, count):
    """So many small JPEGs in class folders, and the same in one tar file a class, as far as they are not there."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    (folder / "tars").mkdir(parents=True, exist_ok=True)
    for name in (f"n{number:08}" for number in range(CLASSES)):
        images, archive = folder / "files" / name, folder / "tars" / f"{name}.tar"
        if not images.exists():
            images.mkdir(parents=True)
            for number in range(count // CLASSES):
                (images / f"{name}_{37 * number}.JPEG").write_bytes(file.getvalue())
        if not archive.exists():
            with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
                tar.add(images, arcname="")


def own_memory():
    """MiB of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def measure(work, *args):
    """("seconds, of them on the CPU, MiB of its own", result) of work(*args) in a new process."""

    def run(pipe):
        before, start, cpu = own_memory(), time.perf_counter(), time.process_time()
        result = work(*args)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        pipe.send((f"{seconds:.2f} s ({cpu:.2f} s of CPU), {own_memory() - before:.1f} MiB", result))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    process.start()
    outcome = ours.recv()
    process.join()
    return outcome


def start(path, keep=False):
    source = sources.find_source(path, "", False)
    return len(index.open_index(source, keep=keep))


def repeat_index(path, count):
    """Keep, as that of the path, an index of its entries repeated until there are `count`."""
    source = sources.find_source(path, "", False)
    listed = index.open_index(source)
    times, n, parts = -(-count // len(listed)), len(listed), len(listed.parts)
    copies = np.repeat(np.arange(times), n)
    columns = {name: np.tile(column, times) for name, column in listed.columns.items()}
    columns["part"] = (columns["part"] + copies * parts).astype(np.uint32)
    columns["name_end"] = columns["name_end"] + copies.astype(np.uint64) * listed.name_end[-1]
    meta = listed.meta | {"parts": listed.parts * times}
    shutil.rmtree(listed.folder)
    repeated = index.Index(source, sources.DEFAULTS, meta, columns)
    index.keep_index(repeated, index.index_places(source, sources.DEFAULTS))
    return len(repeated)


def take_batches(count, shuffle):
    """The keys of 1,000 batches of 128 from the middle of an epoch."""
    sampler = EpochSampler(count, 128, 1, 0, shuffle=shuffle)
    sampler.set_position(3, max(sampler.steps_per_epoch - 1000, 0))
    return sum(map(len, sampler))


def count_seeks(count, shuffle):
    """Reads of an epoch from one archive that do not start where the last one ended; what was read is cached."""
    position, seeks, cached = 0, 0, np.zeros(count, dtype=bool)

    def read(start, stop):
        nonlocal position, seeks
        seeks, position = seeks + (start != position), stop
        cached[start:stop] = True

    for batch in EpochSampler(count, 128, 1, 0, shuffle=shuffle, prefetch=read):
        for _, number, _ in batch:
            if not cached[number]:
                read(number, number + 1)
    return seeks


def read_images(images, order):
    """Read images in this order, as a loader worker does: how many descriptors are open then."""
    for number in order:
        images.index.read(int(number))
    return len(os.listdir("/proc/self/fd"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", default=1_000_000, type=int, help="files to write")
    parser.add_argument("--repeated", default=14_197_122, type=int, help="entries of the repeated index")
    parser.add_argument("--folder", help="where, and kept; None: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.folder or tempfile.mkdtemp())
    try:
        write_files(folder, args.count)
        time.sleep(0.1)
        for kind in ("files", "tars"):
            path = folder / kind
            shutil.rmtree(path / ".index", ignore_errors=True)
            for what, keep in (("list", True), ("start", False)):
                figures, count = measure(start, path, keep)
                print(f"{kind}: {what} {count:,} images: {figures}", flush=True)
            images = ImageFolder(sources.find_source(path, "", False), 3)
            order = np.random.default_rng(0).integers(0, len(images), 20_000)
            figures, descriptors = measure(read_images, images, order)
            print(f"{kind}: 20,000 reads: {figures}, {descriptors} descriptors", flush=True)
            measure(repeat_index, path, args.repeated)
            figures, count = measure(start, path)
            size = sum(file.stat().st_size for file in path.glob(".index/*/*"))
            print(f"{kind}: start {count:,} entries: {figures}; {size / 2**20:.0f} MiB on disk", flush=True)
        for shuffle in ("full", "blocks"):
            figures, keys = measure(take_batches, args.repeated, shuffle)
            print(f"{shuffle}: order of 1,000 batches of 128 of {args.repeated:,} images: {figures}")
            print(f"{shuffle}: {count_seeks(args.count, shuffle):,} seeks for {args.count:,} images", flush=True)
    finally:
        if not args.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
