"""The pre-training step, and nothing about files: those are in hooks.py."""

import contextlib

import torch

import utils
from datasets import normalize, on_device
from optim_factory import adjust_learning_rate, adjust_weight_decay


def train_one_epoch(model, loader, optimizer, scaler, state, hooks, args):
    """Train from step `state.step` to the end of epoch `state.epoch`; `loader` yields the rest of that epoch."""

    def forward(batch):
        loss, _, _ = model(normalize(batch.imgs), mask_ratio=args.mask_ratio, noise=batch.noise, loss_only=True)
        return loss

    optimize(forward, model, loader, optimizer, scaler, state, hooks, args)


def optimize(forward, model, loader, optimizer, scaler, state, hooks, args):
    """Minimise `forward(batch) -> loss` over the batches of `loader`: schedule, precision, accumulation, clipping.

    What is drawn at random within a step depends on (seed, epoch, step, process) alone.
    """
    second_order = getattr(optimizer, "is_second_order", False)  # AdaHessian
    model.train()
    state.start_lap()
    for number, batch in enumerate(on_device(loader, args.device), start=1):
        state.observe_data(batch)
        end_of_step = number % args.update_freq == 0
        state.lr = adjust_learning_rate(optimizer, state.epochs_done, args)
        if args.weight_decay_end is not None:
            adjust_weight_decay(optimizer, state.epochs_done, args)
        utils.set_seed(args.seed, state.epoch, state.step, utils.get_rank(), number % args.update_freq)

        with gradients_stay_here(model) if not end_of_step else contextlib.nullcontext():
            with autocast(args):
                loss = forward(batch)
            scaler.scale(loss / args.update_freq).backward(create_graph=second_order)
        state.observe_loss(loss)

        if end_of_step:
            if args.clip_grad is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if state.time_to_log():
                state.end_lap()
                hooks("on_log", state)
            hooks("on_step", state)


def autocast(args):
    """Within, the forward pass computes in args.amp_dtype where that is safe, if args.use_amp."""
    return torch.autocast(torch.device(args.device).type, utils.AMP_DTYPES[args.amp_dtype], enabled=args.use_amp)


def gradients_stay_here(model):
    """Within, DistributedDataParallel does not average gradients: for all but the last backward of a step."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()
