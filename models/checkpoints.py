"""Weights under the names and shapes of other programs, how they come into a model, and how a run goes on.

What is read, told apart by the names alone:

    dense       this project, the original's fine-tuned files; released FCMAE files hold no norm and no head
    encoder.    the same names under a prefix, beside a decoder: FCMAE pre-training
    kernel      the original's Minkowski training, see `remap_checkpoint_keys`
    timm        stem.0, stages.1.blocks.0.conv_dw, head.fc, ...
"""

import re

import torch
import torch.distributed as dist

from utils import UserError, load_checkpoint, log, newest_checkpoint, on_all_processes

# This project's names and timm's; # stands for a number. The first that fits counts, in either direction.
TIMM_NAMES = (
    ("downsample_layers.0.#.", "stem.#."),
    ("downsample_layers.#.#.", "stages.#.downsample.#."),
    ("stages.#.#.dwconv.", "stages.#.blocks.#.conv_dw."),
    ("stages.#.#.norm.", "stages.#.blocks.#.norm."),
    ("stages.#.#.pwconv1.", "stages.#.blocks.#.mlp.fc1."),
    ("stages.#.#.pwconv2.", "stages.#.blocks.#.mlp.fc2."),
    ("stages.#.#.grn.gamma", "stages.#.blocks.#.mlp.grn.weight"),
    ("stages.#.#.grn.beta", "stages.#.blocks.#.mlp.grn.bias"),
    ("norm.", "head.norm."),
    ("head.", "head.fc."),
)
DECODER = ("decoder.", "proj.", "pred.", "mask_token")


def rename(name, pairs):
    """`name` with the first of pairs (from, to) that its beginning fits exchanged; unchanged if none does."""
    for old, new in pairs:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), name)
        if match:
            return new.replace("#", "{}").format(*match.groups()) + name[match.end() :]
    return name


def to_timm(state):
    """A state dict of the dense model with timm's names and shapes.

    GRN is (4C,) there, and the linear layers of the four smallest sizes, those with two blocks in the first stage, are
    1x1 convolutions. timm demands the norm before the head: where there is none it is written as it starts.
    """
    convolutions = count_blocks(state, "stages.0.") == 2
    state = dict(state)
    if "norm.weight" not in state:
        width = len(state["downsample_layers.3.1.weight"])
        state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    converted = {}
    for name, value in state.items():
        if ".grn." in name:
            value = value.flatten()
        elif convolutions and ".pwconv" in name and name.endswith(".weight"):
            value = value[:, :, None, None]
        converted[rename(name, TIMM_NAMES)] = value
    return converted


def remap_checkpoint_keys(state):
    """A state dict in any known form with this project's names and shapes, those of the original's dense code.

    From the original's Minkowski training: `kernel` (kh * kw, in, out), or (kh * kw, C) if depthwise, the first axis of
    space running fastest, becomes `weight` (out, in, kh, kw) or (C, 1, kh, kw); biases (1, C) become (C,); `.ln.` and
    `.linear.` go; GRN (1, 4C) becomes (1, 1, 1, 4C), as does timm's (4C,). timm's 1x1 convolutions become linear.
    """
    from_timm = [(theirs, ours) for ours, theirs in TIMM_NAMES]
    remapped = {}
    for name, value in state.items():
        name = rename(name.replace(".ln.", ".").replace(".linear.", "."), from_timm)
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(len(value) ** 0.5)
            value = value.view(side, side, *((1,) if value.ndim == 2 else ()), *value.shape[1:])
            value = value.permute(3, 2, 1, 0).contiguous()
        elif name.endswith((".grn.gamma", ".grn.beta")):
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        elif name.endswith((".pwconv1.weight", ".pwconv2.weight")):
            value = value.flatten(1)
        remapped[name] = value
    return remapped


def get_weights(checkpoint, path, model_key="model|module", model_prefix=""):
    """The weights in a checkpoint, of any known form, with this project's names and shapes.

    model_key: names, divided by |, of which the first that the checkpoint has holds the weights; if it has none, the
    weights are the checkpoint itself. model_prefix: only names that begin with it are taken, without it.
    Raises UserError if there are none.
    """
    key = next((key for key in model_key.split("|") if key in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(
            f"{path}: holds no weights; accepted is a dict of tensors by name, or one under {model_key!r}; "
            f"it has {', '.join(map(str, list(checkpoint)[:8]))}"
        )
    # of DistributedDataParallel and torch.compile, in either order
    while state and any(all(name.startswith(wrapper) for name in state) for wrapper in ("module.", "_orig_mod.")):
        state = {name.split(".", 1)[1]: value for name, value in state.items()}
    state = {name.removeprefix(model_prefix): value for name, value in state.items() if name.startswith(model_prefix)}
    if not state:
        raise UserError(f"{path}: holds no weight whose name begins with {model_prefix!r}")
    return remap_checkpoint_keys(state)


def load_weights(model, state, path):
    """Load exactly the weights of a model. Raises UserError, with a difference of each kind, if `state` has others."""
    own = model.state_dict()
    state = {name: unflatten(value, own[name]) if name in own else value for name, value in state.items()}
    differences = [
        [f"{name} is missing" for name in own if name not in state],
        [f"{name} is not of this model" for name in state if name not in own],
        [
            f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    ]
    if any(differences):
        examples = "; ".join(kind[0] for kind in differences if kind)
        hint = ". --finetune takes what pre-training wrote" if "head.weight" in own and "mask_token" in state else ""
        raise UserError(
            f"{path}: a checkpoint of another model: {sum(map(len, differences))} differences, such as {examples}{hint}"
        )
    model.load_state_dict(state)


def load_backbone(model, state, path):
    """Load what a classifier can start from, and say in a few lines what was loaded, left out and why.

    state: weights of a classifier, of a backbone or of an FCMAE, of this project's names. A decoder is left out, a head
    of another number of classes too; a stem for other channels is adapted. Raises UserError for any other difference.
    """
    state, left_out = split_decoder(state)
    own = model.state_dict()
    report = []
    if left_out:
        report.append(f"left out {len(left_out)} tensors of the pre-training's decoder")
    if "head.weight" in state and len(state["head.weight"]) != len(own["head.weight"]):
        report.append(f"left out the head: it has {len(state['head.weight'])} classes, not {len(own['head.weight'])}")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    stem = "downsample_layers.0.0.weight"
    if stem in state and state[stem].ndim == 4 and state[stem].shape[1] != own[stem].shape[1]:
        before, now = state[stem].shape[1], own[stem].shape[1]
        state[stem] = adapt_stem(state[stem], now)
        report.append(f"the stem's {before} channels were {'repeated' if now > before else 'averaged'} into {now}")
    # A backbone comes without a head, and may come without the norm before it.
    new = [part for part in ("norm", "head") if not any(name.startswith(f"{part}.") for name in state)]
    if new:
        report.append(f"initialised anew: {' and '.join(new)}")
    kept = {name: value for name, value in own.items() if name.startswith(tuple(f"{part}." for part in new))}
    load_weights(model, kept | state, path)
    return [f"loaded {len(state)} of {len(own)} tensors from {path}", *report]


def split_decoder(state):
    """The weights of the network itself, without `encoder.`, and the names that belong to a pre-training's decoder."""
    if not any(name.startswith("encoder.") for name in state):
        return dict(state), []
    decoder = [name for name in state if name.startswith(DECODER)]
    return {name.removeprefix("encoder."): state[name] for name in state if name not in decoder}, decoder


def unflatten(value, like):
    """A tensor that was stored with axes merged or with axes of length 1 added, in the shape of `like`."""
    same = value.numel() == like.numel()
    if same and value.ndim < like.ndim and len(value) == len(like) or value.squeeze().shape == like.squeeze().shape:
        return value.reshape(like.shape)
    return value


def adapt_stem(weight, in_chans):
    """A stem's weight (C, in, s, s) for other channels: averaged into fewer or repeated into more, as large in sum."""
    before = weight.shape[1]
    if in_chans < before:
        weight = weight.mean(1, keepdim=True).expand(-1, in_chans, -1, -1)
    else:
        weight = weight.repeat(1, -(-in_chans // before), 1, 1)[:, :in_chans]
    return weight * (before / in_chans)


def network_config(state, prefix=""):
    """in_chans, depths, dims and stem_stride of the network whose weights these are: dense names after `prefix`.

    Raises ValueError, naming what is missing, if they are of none.
    """
    stem = f"{prefix}downsample_layers.0.0.weight"  # (C, in_chans, stride, stride)
    later = [f"{prefix}downsample_layers.{stage}.1.weight" for stage in (1, 2, 3)]
    missing = [name for name in (stem, *later) if name not in state]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    return dict(
        in_chans=state[stem].shape[1],
        depths=[count_blocks(state, f"{prefix}stages.{stage}.") for stage in range(4)],
        dims=[len(state[name]) for name in (stem, *later)],
        stem_stride=state[stem].shape[-1],
    )


def count_blocks(state, prefix):
    return sum(name.startswith(prefix) and name.endswith(".dwconv.weight") for name in state)


# ---------------------------------------------------------------- going on


def resume(state, run_flags):
    """Stand where the run stopped, on all processes at the same step: see `go_on`."""
    on_all_processes(lambda: go_on(state, run_flags))
    if dist.is_initialized():
        positions = [None] * dist.get_world_size()
        dist.all_gather_object(positions, (state.epoch, state.step))
        if len(set(positions)) > 1:
            raise UserError(
                f"--output_dir {state.args.output_dir}: the processes find other checkpoints there, "
                f"of (epoch, step) {sorted(set(positions))}: it must be one folder for all machines"
            )


def go_on(state, run_flags):
    """Go on from the newest whole checkpoint in the output folder, else start from --resume, else from nothing.

    run_flags: names of what decides a run's numbers; what has changed is told, and refused where it cannot be.
    """
    args = state.args
    checkpoint, path = newest_checkpoint(args.output_dir) if args.output_dir else (None, None)
    if checkpoint is None and args.resume:
        checkpoint, path = load_checkpoint(args.resume), args.resume
    if checkpoint is None:
        return
    load_model_and_ema(state, checkpoint, path)
    if checkpoint.get("format") is None:
        return log(f"weights from {path}, which another program wrote: training starts at epoch {args.start_epoch}")
    now = vars(args) | {"num_images": state.num_images}
    try:
        then = checkpoint["args"] | {"num_images": checkpoint["num_images"]}
        refuse_what_cannot_change(state, checkpoint, then, now, path)
        state.restore(checkpoint)
    except KeyError as error:
        raise UserError(f"{path}: a checkpoint without {error}: cannot be gone on from") from None
    except ValueError as error:  # of the optimizer: other groups, as another layer decay makes
        names = [name for name in ("layer_decay", "layer_decay_type") if then.get(name) != now.get(name)]
        flags = " ".join(f"--{name} {then.get(name)}" for name in names)
        raise UserError(f"{path}: saved with {flags or 'another optimizer'}; take the same: {error}") from None
    for name in run_flags:
        if then.get(name) != now[name]:
            log(f"changed since {path}: {name} {then.get(name)} -> {now[name]}")
    log(f"goes on from {path}: epoch {state.epoch}, step {state.step}")


def load_model_and_ema(state, checkpoint, path):
    """Load a checkpoint's weights, and the averaged ones, if they are kept; without any they start from the others."""
    load_weights(state.model, get_weights(checkpoint, path), path)
    if state.model_ema is None:
        return
    if "model_ema" in checkpoint:
        load_weights(state.model_ema.module, remap_checkpoint_keys(checkpoint["model_ema"]), path)
    else:
        state.model_ema.set(state.model)
        log(f"{path} holds no averaged weights: they start from the others")


def refuse_what_cannot_change(state, checkpoint, then, now, path):
    """Raise UserError for what would make nonsense of the optimizer's state or of the position in the epoch."""
    if then.get("opt") != now.get("opt"):
        raise UserError(f"{path}: saved with --opt {then.get('opt')}; can only go on with the same")
    if checkpoint["class_names"] != state.class_names:
        raise UserError(f"{path}: {other_classes(checkpoint['class_names'], state.class_names)}")
    for name in ("effective_batch_size", "num_images"):
        if checkpoint["step"] and then[name] != now[name]:
            raise UserError(
                f"{path}: saved within an epoch at {name.replace('_', ' ')} {then[name]}; "
                f"can only go on with the same, not {now[name]}"
            )


def other_classes(then, now):
    """What differs between the classes of a checkpoint and those of the data."""
    then, now = (list(names or []) for names in (then, now))
    if len(then) != len(now):
        return f"has {len(then)} classes, the data {len(now)}"
    name = next(i for i in range(len(now)) if then[i] != now[i])
    return f"has other classes than the data: number {name} is {then[name]!r}, not {now[name]!r}"


# ---------------------------------------------------------------- evaluation


def weights_to_evaluate(args):
    """args.resume, else the output folder's newest checkpoint: the checkpoint, its weights and its path.

    The averaged weights with args.model_ema_eval. Raises UserError if there are none.
    """
    if args.resume:
        checkpoint, path = load_checkpoint(args.resume), args.resume
    else:
        checkpoint, path = newest_checkpoint(args.output_dir) if args.output_dir else (None, None)
    if checkpoint is None:
        raise UserError("--eval true: give --resume FILE, or an --output_dir with checkpoints")
    key = "model_ema" if args.model_ema_eval else args.model_key
    if args.model_ema_eval and key not in checkpoint:
        raise UserError(f"--model_ema_eval true: {path} holds no averaged weights, which --model_ema true keeps")
    return checkpoint, get_weights(checkpoint, path, key, args.model_prefix), path
