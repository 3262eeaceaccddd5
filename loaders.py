"""From a data set to the batches of a rank: the order of an epoch, and the loader with its workers.

The order is a function of (seed, epoch), whatever the number of workers and ranks; it is never stored.
"""

import functools
import math
import os
import signal
import time

import numpy as np
import torch

import images
import utils
from datasets import Batch, EvalDataset, LabelledBatch, PretrainDataset
from flags import Switch, at_least
from utils import TrainingError, UserError

# Kept in checkpoints: another law of the order needs another number; 1 was NumPy's
ORDERS = {"full": 2, "blocks": 3, "balanced": 4}
BLOCK, WINDOW = 64, 256  # of --shuffle blocks: neighboring samples, and blocks that are shuffled among each other


def add_loader_args(parser, orders=()):
    """The flags of loaders. orders: those of --shuffle, of a training."""
    add = parser.add_argument_group("loader").add_argument
    add("--num_workers", default=10, type=at_least(0), help="loader processes, at most one per core; 0: none")
    add("--pin_mem", action=Switch, default=True, help="page-locked batches, which copy to a GPU faster")
    blocks = f"blocks: shuffle {WINDOW} blocks of {BLOCK} neighboring samples at a time, for archives on slow disks"
    balanced = "; balanced: every class equally often, images of small classes several times"
    if orders:
        order = f"order of an epoch; {blocks}{balanced if 'balanced' in orders else ''}"
        add("--shuffle", default="full", choices=orders, help=order)
    stalled = "seconds to wait for a batch before the run stops and names the files being read; 0: no limit"
    add("--data_timeout", default=900, type=at_least(0), help=stalled)
    add("--max_bad_images", default=100, type=at_least(0), help="stop after more unreadable images than this")


# ---------------------------------------------------------------- the order of an epoch


class EpochSampler(torch.utils.data.Sampler):
    """Batches of keys (epoch, index, repeat) for one rank, in an order that is a function of (seed, epoch).

    A step takes the next batch_size * update_freq * world_size samples, however they are divided; an epoch has whole
    steps only. repeats: samples per image, all in one batch; must divide batch_size ("repeated sampling" of MAE-ST and
    Hiera). An epoch takes 1 / repeats of the images, and that many epochs take all. shuffle: "full" or "blocks".
    prefetch(start, stop): called, with "blocks", for each block of images about a window before it is needed.
    """

    def __init__(
        self, num_samples, batch_size, update_freq, seed, rank=0, world_size=1, repeats=1, shuffle="full", prefetch=None
    ):  # fmt: skip
        self.num_samples, self.batch_size, self.update_freq, self.seed = num_samples, batch_size, update_freq, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        self.order, self.permute = ORDERS[shuffle], permute if shuffle == "full" else permute_blocks
        self.prefetch = prefetch if shuffle == "blocks" else None
        self.steps_per_epoch = num_samples // (batch_size * update_freq * world_size)
        self.set_position(0, 0)

    def set_position(self, epoch, step):
        """Iterate over this epoch next, from this optimizer step on."""
        self.epoch, self.step = epoch, step

    def __len__(self):
        return (self.steps_per_epoch - self.step) * self.update_freq

    def __iter__(self):
        epoch, prefetched = self.epoch, 0
        for batch in range(self.step * self.update_freq, self.steps_per_epoch * self.update_freq):
            if self.prefetch is not None:
                prefetched = self.prefetch_blocks(epoch, batch, prefetched)
            yield self.batch_keys(epoch, batch)

    def batch_keys(self, epoch, batch):
        """The keys of this rank's batch of that number, counted from the start of the epoch."""
        key, start = self.position(epoch, batch, self.rank)
        indices = self.permute(np.arange(start, start + self.batch_size // self.repeats), self.num_samples, *key)
        return [(epoch, index, repeat) for index in indices.tolist() for repeat in range(self.repeats)]

    def position(self, epoch, batch, rank):
        """(key of the order, place in it) of the first image of a rank's batch; `repeats` epochs share an order."""
        cycle, part = divmod(epoch, self.repeats)
        count = self.batch_size // self.repeats
        return (self.seed, cycle), part * (self.num_samples // self.repeats) + (batch * self.world_size + rank) * count

    def batch_indices(self, epoch, batch):
        """The images of that batch."""
        return [index for _, index, _ in self.batch_keys(epoch, batch)[:: self.repeats]]

    def prefetch_blocks(self, epoch, batch, prefetched):
        """Prefetch the blocks up to a window after this batch but those `prefetched`; how many are done then."""
        key, start = self.position(epoch, batch, 0)
        end = min((start // BLOCK // WINDOW + 1) * WINDOW + start // BLOCK % WINDOW, self.num_samples // BLOCK)
        slots = np.arange(max(prefetched, start // BLOCK // WINDOW * WINDOW), end)
        for first in permute(slots, self.num_samples // BLOCK, *key, 0) * BLOCK if len(slots) else ():
            first = (int(first) + block_shift(self.num_samples, *key)) % self.num_samples
            self.prefetch(first, min(first + BLOCK, self.num_samples))
        return max(prefetched, end)


class BalancedSampler(EpochSampler):
    """As `EpochSampler`, but every class equally often: of targets (n,), n draws an epoch.

    A class takes its images round by round, over several epochs if it is large, each round in an order of its own, in
    which an image comes once at most: what an epoch leaves over, less than a step and a draw of each class, is passed
    over in that round. The repeat in a key is the number of the round: each time an image comes it is augmented anew.
    """

    def __init__(self, targets, *args):
        super().__init__(len(targets), *args)
        self.order = ORDERS["balanced"]
        counts = np.bincount(targets)
        self.by_class, starts = np.argsort(targets, kind="stable"), np.cumsum(counts) - counts
        self.starts, self.counts = starts[counts > 0], counts[counts > 0]

    def batch_keys(self, epoch, batch):
        key, start = self.position(epoch, batch, self.rank)
        slots = permute(np.arange(start, start + self.batch_size), self.num_samples, *key)
        draws, classes = np.divmod(slots, len(self.counts))
        draws += epoch * -(-self.num_samples // len(self.counts))
        rounds, places = np.divmod(draws, self.counts[classes])
        for cls, number in set(zip(classes.tolist(), rounds.tolist(), strict=True)):
            same = (classes == cls) & (rounds == number)
            places[same] = permute(places[same], int(self.counts[cls]), self.seed, cls, number)
        indices = self.by_class[self.starts[classes] + places]
        return [(epoch, *key) for key in zip(indices.tolist(), rounds.tolist(), strict=True)]


def permute(positions, count, *key):
    """Where a permutation of range(count), drawn by the integers of the key, takes positions (n,); nothing is stored.

    A Feistel network on the next power of two; what it takes outside the range goes through it again (cycle walking:
    Black and Rogaway, 2002).
    """
    bits = max(count - 1, 3).bit_length()
    low, rounds = np.uint64(bits // 2), np.random.SeedSequence((len(key), *key)).generate_state(8, np.uint64)
    masks = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)

    def network(x):
        halves = [x & masks[0], x >> low]
        for number, round_key in enumerate(rounds):
            changed, other = number % 2, halves[1 - number % 2]
            mixed = (other + round_key) * np.uint64(0x9E3779B97F4A7C15)  # then as in splitmix64
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xBF58476D1CE4E5B9)
            halves[changed] = halves[changed] ^ (mixed >> np.uint64(32)) & masks[changed]
        return halves[0] | halves[1] << low

    found = network(np.asarray(positions).astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = network(found[outside])
    return found.astype(np.int64)


def permute_blocks(positions, count, *key):
    """As `permute`, but of blocks of neighbors; within each window of blocks the samples are shuffled.

    Blocks start at another sample for each key, so that the incomplete one, which comes last, is another.
    """
    found, windows = np.empty(len(positions), dtype=np.int64), positions // (BLOCK * WINDOW)
    for window in np.unique(windows).tolist():
        start = window * BLOCK * WINDOW
        places = permute(positions[windows == window] - start, min(BLOCK * WINDOW, count - start), *key, 1 + window)
        slots = window * WINDOW + places // BLOCK
        whole = slots < count // BLOCK
        slots[whole] = permute(slots[whole], count // BLOCK, *key, 0) if whole.any() else slots[whole]
        found[windows == window] = slots * BLOCK + places % BLOCK
    return (found + block_shift(count, *key)) % count


def block_shift(count, *key):
    return utils.derive_seed(*key, 0, 0) % count


# ---------------------------------------------------------------- loaders


def build_train_loader(dataset, args, device, repeats=1):
    """The loader of a training set's batches, and its `EpochSampler`. Raises UserError if there is no whole step."""
    count, world_size = len(dataset.images), utils.get_world_size()
    share = args.batch_size, args.update_freq, args.seed, utils.get_rank(), world_size
    if args.shuffle == "balanced":
        sampler = BalancedSampler(dataset.targets, *share)
    else:
        sampler = EpochSampler(count, *share, repeats, args.shuffle, getattr(dataset.images, "prefetch", None))
    if sampler.steps_per_epoch == 0:
        raise UserError(
            f"{count} images make no whole step of {args.batch_size * args.update_freq * world_size} "
            f"(--batch_size {args.batch_size} x --update_freq {args.update_freq} x {world_size} ranks)"
        )
    return Loader(dataset, sampler, args, device), sampler


def build_eval_loader(dataset, args, device, divided=True):
    """The loader of this rank's share of an evaluation set, no image twice; divided False: of all of it."""
    rank, world_size = (utils.get_rank(), utils.get_world_size()) if divided else (0, 1)
    indices = range(rank, len(dataset), world_size)
    return Loader(dataset, torch.utils.data.BatchSampler(indices, args.batch_size, False), args, device)


class Loader(torch.utils.data.DataLoader):
    """Batches of a data set by the flags of `add_loader_args`, of which tools may lack --data_timeout.

    Raises UserError for more than the data set's max_bad_images unreadable ones of an evaluation, and what the data set
    raises; TrainingError if no batch comes within --data_timeout seconds.
    """

    waiting_since = None  # of the loader, if any, that the process waits for: `time.monotonic()`

    def __init__(self, dataset, batch_sampler, args, device):
        workers = min(args.num_workers, len(os.sched_getaffinity(0)))
        self.images = dataset.images
        self.opening = torch.full((workers,), -1).share_memory_()  # the image that each worker has opened last
        self.max_bad_images = dataset.max_bad_images if isinstance(dataset, EvalDataset) else math.inf
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=functools.partial(collate, Batch if isinstance(dataset, PretrainDataset) else LabelledBatch),
            num_workers=workers,
            pin_memory=args.pin_mem and torch.device(device).type == "cuda",
            timeout=getattr(args, "data_timeout", 0) if workers else 0,
            persistent_workers=workers > 0,
            worker_init_fn=functools.partial(init_worker, self.opening),
            generator=torch.Generator(),  # else each epoch would draw from the global one
        )

    def __iter__(self):
        batches, unreadable = super().__iter__(), []
        while True:
            try:
                Loader.waiting_since = time.monotonic()
                batch = next(batches, None)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                names = ", ".join(sorted({self.images.name(index) for index in self.opening.tolist() if index >= 0}))
                problem = f"no batch came within --data_timeout {self.timeout:g} seconds"
                raise TrainingError(f"{problem}; the loader workers read {names or 'nothing yet'}") from None
            finally:
                Loader.waiting_since = None
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise UserError(str(batch))  # itself it would hold this frame, which holds it, and with it the workers
            unreadable += batch.unreadable
            if len(unreadable) > self.max_bad_images:
                problem = f"{len(unreadable)} images could not be read, --max_bad_images is {self.max_bad_images}"
                raise UserError(f"{problem}; the first: {unreadable[0]}")
            yield batch


def collate(kind, samples):
    return samples if isinstance(samples, UserError) else kind.collate(samples)


def init_worker(noted, worker):
    """In a worker: note what it opens; ignore stop signals, as the main process needs it until it has saved."""
    images.opening = noted[worker]
    for signum in utils.STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
