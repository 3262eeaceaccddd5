"""The training of both scripts, by epochs and optimizer steps; the pre-training step. Files are the hooks' work."""

import contextlib
import time

import torch
import torch.distributed as dist

import utils
from images import normalize, statistics_of
from models import triton_switch
from utils import OneLineError, log


def prepare_training(model, args):
    """The model as it is trained: with --grad_checkpointing, --compile, and gradients averaged over the ranks."""
    model.set_grad_checkpointing(args.grad_checkpointing)
    utils.main_rank_first(lambda: compile_kernels(model, args))
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Around DDP, so that it cuts its graph at the buckets: gradients are then averaged while others are computed
    return torch.compile(model) if args.compile else model


def compile_kernels(model, args):
    """Compile the Triton kernels of a training step side by side; the first step would do it one after the other."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        if not args.use_amp:
            log("float32 with TF32; --use_amp true (bfloat16) moves half the bytes at up to twice the speed")
        if triton_switch.runs_in_triton(torch.empty(0, device=device)):
            from models.launch import compile_variants, find_variants

            dtype = getattr(torch, args.amp_dtype) if args.use_amp else None
            compile_variants(find_variants(model, (2, args.in_chans, *args.input_size), dtype))


def train(run, train_one_epoch, evaluate=lambda: {}):
    """The epochs of a run, from where it stands to the last one.

    train_one_epoch(): from `run.step` to the end of `run.epoch`. evaluate() -> {suffix: Evaluation}, see
    `Run.add_evaluations`.
    """
    if run.is_finished(run.epoch):
        epochs, done = run.args.epochs, "epochs are done"
        state = f"of {epochs} {done}" if run.epoch <= epochs else f"{done}, more than --epochs {epochs}"
        return log(f"nothing left to do: {run.epoch} {state}")
    run.hooks("on_start", run)
    while not run.is_finished(run.epoch):
        run.sampler.set_position(run.epoch, run.step)
        run.hooks("on_epoch_start", run)
        try:
            train_one_epoch()
            run.add_evaluations(evaluate())
            run.hooks("on_evaluate", run)
        except OneLineError:
            raise
        except Exception:
            if run.between_steps:  # as when a loader worker was killed: hooks save the run
                run.hooks("on_error", run)
            raise
        run.close_epoch()
        run.hooks("on_epoch_end", run)
        run.start_epoch(run.epoch + 1)
    run.hooks("on_end", run)


def train_one_epoch(model, loader, run):
    """Train from step `run.step` to the end of epoch `run.epoch`; `loader` yields the rest of that epoch."""
    statistics = statistics_of(run.args)

    def compute_loss(batch):
        loss, _, _ = model(normalize(batch.imgs, statistics), noise=batch.noise, masked_only=True)
        return loss

    optimize(compute_loss, model, loader, run)


def optimize(compute_loss, model, loader, run):
    """Minimize compute_loss(batch) over an epoch: schedule, precision, accumulation, clipping.

    compute_loss returns a scalar, or terms by name, {name: scalar}, whose sum is minimized and which are all logged.
    What is drawn at random within a step depends on (seed, epoch, step, batch of the step, rank) alone.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    model.train()
    batches = iter(on_device(loader, run.device))
    run.start_lap()
    while run.step < run.steps_per_epoch:
        run.lr = run.schedule.apply(optimizer, run.epochs_done)
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
