"""The pre-training step, and the optimizer step of both scripts. Nothing about files: those are the hooks' work."""

import contextlib
import time

import torch

import utils
from images import normalize, statistics_of


def train_one_epoch(model, loader, optimizer, scaler, schedule, run, args):
    """Train from step `run.step` to the end of epoch `run.epoch`; `loader` yields the rest of that epoch."""

    statistics = statistics_of(args)

    def compute_loss(batch):
        loss, _, _ = model(normalize(batch.imgs, statistics), noise=batch.noise, masked_only=True)
        return loss

    optimize(compute_loss, model, loader, optimizer, scaler, schedule, run, args)


def optimize(compute_loss, model, loader, optimizer, scaler, schedule, run, args):
    """Minimize compute_loss(batch) over an epoch: schedule, precision, accumulation, clipping.

    compute_loss returns a scalar, or terms by name, {name: scalar}, whose sum is minimized and which are all logged.
    What is drawn at random within a step depends on (seed, epoch, step, batch of the step, rank) alone.
    """
    model.train()
    batches = iter(on_device(loader, run.device))
    run.start_lap()
    while run.step < run.steps_per_epoch:
        run.lr = schedule.apply(optimizer, run.epochs_done)
        for micro in range(args.update_freq):
            start = time.perf_counter()
            batch = next(batches)
            run.add_batch(batch, seconds=time.perf_counter() - start)
            utils.set_seed(args.seed, run.epoch, run.step, micro, utils.get_rank())
            with average_gradients(model, enabled=micro == args.update_freq - 1):
                with utils.autocast(args, run.device):
                    loss = compute_loss(batch)
                terms = loss if isinstance(loss, dict) else {}
                loss = sum(terms.values()) if terms else loss
                scaler.scale(loss / args.update_freq).backward()
            run.add_losses({"loss": loss} | terms | {"loss": loss})  # the sum first, whatever the terms are called

        scaler.unscale_(optimizer)
        run.hooks("on_gradients", run)
        if args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        run.between_steps = False
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.end_step()

        if run.is_time_to_log():
            run.end_lap()
            run.hooks("on_log", run)
        run.hooks("on_step", run)


def average_gradients(model, enabled):
    """Within, DistributedDataParallel averages gradients over the ranks only if enabled: for a step's last batch."""
    return contextlib.nullcontext() if enabled or not hasattr(model, "no_sync") else model.no_sync()


def on_device(loader, device):
    """The loader's batches with their tensors on a device; to a GPU they are copied while the last step computes."""

    def move(batch):
        return type(batch)(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch))

    if torch.device(device).type != "cuda":
        yield from map(move, loader)
        return
    stream = torch.cuda.Stream(device)
    for batch in loader:
        with torch.cuda.stream(stream):
            batch = move(batch)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for x in filter(torch.is_tensor, batch):
            x.record_stream(current)  # its memory is not given to the next copy before this stream is done with it
        yield batch
