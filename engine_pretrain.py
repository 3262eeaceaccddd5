"""The pre-training step, and nothing about files: those are in hooks.py."""

import contextlib

import torch

import utils
from datasets import normalize


def train_one_epoch(model, loader, optimizer, scaler, state, hooks, args):
    """Train from step `state.step` to the end of epoch `state.epoch`; `loader` yields the rest of that epoch."""
    model.train()
    state.start_lap()
    for number, batch in enumerate(loader, start=1):
        state.observe_data(batch)
        end_of_step = number % args.update_freq == 0
        state.lr = utils.adjust_learning_rate(optimizer, state.epoch + state.step / state.steps_per_epoch, args)
        torch.manual_seed(
            utils.derive_seed(args.seed, state.epoch, state.step, utils.get_rank(), number % args.update_freq)
        )

        imgs = normalize(batch.imgs.to(args.device, non_blocking=True))
        noise = batch.noise.to(args.device, non_blocking=True)
        with gradients_stay_here(model) if not end_of_step else contextlib.nullcontext():
            with torch.autocast(state.device_type, utils.AMP_DTYPES[args.amp_dtype], enabled=args.use_amp):
                loss, _, _ = model(imgs, mask_ratio=args.mask_ratio, noise=noise)
            scaler.scale(loss / args.update_freq).backward()
        state.observe_loss(loss)

        if end_of_step:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if state.time_to_log():
                state.end_lap()
                hooks("on_log", state)
            hooks("on_step", state)


def gradients_stay_here(model):
    """Within, DistributedDataParallel does not average gradients: for all but the last backward of a step."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()
