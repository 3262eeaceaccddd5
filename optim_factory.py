"""The optimizer and its schedule: learning rate, weight decay, parameter groups, layer decay; and their flags."""

import math
from bisect import bisect_right

import torch

import flags
import utils
from flags import above_0, at_least, fraction_above_0, fraction_below_1
from utils import UserError

# ---------------------------------------------------------------- schedule


def add_schedule_args(parser, epochs, warmup_epochs, blr, min_lr):
    """The flags of both scripts, with the defaults in which they differ."""
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", default=64, type=at_least(1), help="images per rank and forward pass")
    add("--epochs", default=epochs, type=at_least(1), help="passes over the images")
    accumulated = "forward passes per optimizer step, whose gradients are accumulated"
    add("--update_freq", default=1, type=at_least(1), help=accumulated)
    add("--lr", type=at_least(0.0), help="peak learning rate; None: blr x effective batch size / 256")
    add("--blr", default=blr, type=at_least(0.0), help="base learning rate, per 256 images")
    add("--warmup_epochs", default=warmup_epochs, type=at_least(0), help="epochs of linear warm-up from 0")
    add("--warmup_steps", default=-1, type=int, help="optimizer steps of warm-up; above 0 replaces --warmup_epochs")
    add("--sched", default="cosine", choices=tuple(DECAYS), help="learning rate after warm-up")
    add("--min_lr", default=min_lr, type=at_least(0.0), help="lowest learning rate after warm-up")
    add("--decay_epochs", default=30, type=at_least(1), help="--sched step: epochs between two decays")
    add("--decay_milestones", type=at_least(0), nargs="+", help="--sched multistep: epochs at which it decays")
    add("--decay_rate", default=0.1, type=fraction_above_0, help="--sched step, multistep: factor at each decay")
    add("--poly_power", default=0.9, type=above_0, help="--sched poly: the power; 1 is linear")
    add("--weight_decay", default=0.05, type=at_least(0.0), help="none on norms, biases, GRN and mask token")
    add("--weight_decay_end", type=at_least(0.0), help="weight decay at the end of a cosine; None: constant")
    add("--clip_grad", type=above_0, help="maximum norm of the gradients; None: no clipping")
    add("--seed", default=0, type=seed, help="seed of the weights and of every random draw")
    add("--start_epoch", default=0, type=at_least(0), help="first epoch, from 0, of a new run")


seed = flags.number(int, lambda value: 0 <= value < 2**63, "a whole number, at least 0, below 2 ** 63")


def check_schedule_args(args):
    """Raise UserError for flags that do not fit each other."""
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}")
    milestones = args.decay_milestones or []
    if args.sched == "multistep" and not milestones or sorted(set(milestones)) != milestones:
        given = " ".join(map(str, milestones)) or None
        raise UserError(f"--decay_milestones {given}: --sched multistep takes one or more epochs in rising order")


def effective_batch_size(args):
    """Images per optimizer step, over all ranks."""
    return args.batch_size * args.update_freq * utils.get_world_size()


def peak_lr(args):
    """The learning rate after warm-up. Raises UserError if it is below --min_lr."""
    lr = args.blr * effective_batch_size(args) / 256 if args.lr is None else args.lr
    if args.min_lr > lr:
        raise UserError(f"--min_lr {args.min_lr}: must be at most the peak learning rate {lr:g}")
    return lr


def half_cosine(start, end, progress):
    """From start at progress 0 to end at 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def decayed(lr, args, times):
    return max(lr * args.decay_rate**times, args.min_lr)


# The learning rate after warm-up, from (peak lr, args, epochs done with a fraction, progress after warm-up from 0 to 1)
DECAYS = {
    "cosine": lambda lr, args, epoch, progress: half_cosine(lr, args.min_lr, progress),
    "linear": lambda lr, args, epoch, progress: args.min_lr + (lr - args.min_lr) * (1 - progress),
    "poly": lambda lr, args, epoch, progress: args.min_lr + (lr - args.min_lr) * (1 - progress) ** args.poly_power,
    "step": lambda lr, args, epoch, progress: decayed(lr, args, int(epoch / args.decay_epochs)),
    "multistep": lambda lr, args, epoch, progress: decayed(lr, args, bisect_right(args.decay_milestones, epoch)),
    "constant": lambda lr, args, epoch, progress: lr,
}


class Schedule:
    """Learning rate (linear warm-up from 0, then --sched) and weight decay as functions of the epochs done."""

    def __init__(self, args, steps_per_epoch):
        self.args, self.peak_lr = args, peak_lr(args)
        self.warmup_epochs = args.warmup_steps / steps_per_epoch if args.warmup_steps > 0 else args.warmup_epochs

    def lr(self, epoch):
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / (self.args.epochs - self.warmup_epochs)
        return DECAYS[self.args.sched](self.peak_lr, self.args, epoch, progress)

    def weight_decay(self, epoch):
        start, end = self.args.weight_decay, self.args.weight_decay_end
        return start if end is None else half_cosine(start, end, epoch / self.args.epochs)

    def apply(self, optimizer, epoch):
        """Set both in an optimizer's groups, scaled by layer decay (`lr_scale`), and return the learning rate."""
        lr, weight_decay = self.lr(epoch), self.weight_decay(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group["decays"]:
                group["weight_decay"] = weight_decay
        return lr


# ---------------------------------------------------------------- parameter groups and layer decay


def get_num_layer_for_convnext_single(var_name, depths):
    """Layer id of a parameter where each block is a layer: 1 (the stem) to sum(depths) + 1 (norm and head)."""
    kind, *numbers = var_name.split(".")
    if kind == "downsample_layers":
        return sum(depths[: int(numbers[0])]) + 1
    if kind == "stages":
        return sum(depths[: int(numbers[0])]) + int(numbers[1]) + 1
    return sum(depths) + 1


def get_num_layer_for_convnext(var_name):
    """Layer id of a parameter in 12 groups of three consecutive blocks, for depths 3, 3, 27, 3: 0 (the stem) to 13."""
    kind, *numbers = var_name.split(".")
    if kind == "downsample_layers":
        return (0, 2, 3, 12)[int(numbers[0])]
    if kind == "stages":
        stage, block = int(numbers[0]), int(numbers[1])
        return (1, 2, 3 + block // 3, 12)[stage]
    return 13


class LayerDecayValueAssigner:
    """The factor on the learning rate of each layer: `values[layer id]`.

    layer_decay_type: "single" (a layer is a block) or "group" (three blocks; ValueError unless depths are 3, 3, 27, 3).
    """

    def __init__(self, values, depths=(3, 3, 27, 3), layer_decay_type="single"):
        if layer_decay_type == "group" and tuple(depths) != (3, 3, 27, 3):
            raise ValueError(
                f"layer decay 'group' is made for depths (3, 3, 27, 3), not {tuple(depths)}: take 'single'"
            )
        self.values, self.depths, self.layer_decay_type = values, depths, layer_decay_type

    @classmethod
    def of_decay(cls, decay, depths, layer_decay_type):
        """Factors decay ** (layers above), 1 for norm and head."""
        layers = 12 if layer_decay_type == "group" else sum(depths)
        return cls([decay ** (layers + 1 - i) for i in range(layers + 2)], depths, layer_decay_type)

    def get_scale(self, layer_id):
        return self.values[layer_id]

    def get_layer_id(self, var_name):
        if self.layer_decay_type == "group":
            return get_num_layer_for_convnext(var_name)
        return get_num_layer_for_convnext_single(var_name, self.depths)


def get_parameter_groups(model, weight_decay=1e-5, skip_list=(), get_num_layer=None, get_layer_scale=None):
    """Groups for an optimizer. No weight decay on vectors, on `model.no_weight_decay()` and on names in skip_list.

    With get_num_layer(name) -> id and get_layer_scale(id) -> factor there are two groups a layer, with that `lr_scale`.
    """
    skip_list, groups = {*skip_list, *model.no_weight_decay()}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or name in skip_list
        layer = get_num_layer(name) if get_num_layer else None
        scale = get_layer_scale(layer) if get_layer_scale else 1.0
        options = {"weight_decay": 0.0 if exempt else weight_decay, "decays": not exempt, "lr_scale": scale}
        groups.setdefault((layer, exempt), {"params": []} | options)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


# ---------------------------------------------------------------- the optimizer


def add_optimizer_args(parser):
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", metavar="NAME", help="any first-order optimizer of timm")
    add("--opt_eps", default=1e-8, type=at_least(0.0), help="epsilon, if the optimizer has one")
    add("--opt_betas", type=fraction_below_1, nargs="+", help="betas; None: the optimizer's defaults")
    add("--momentum", default=0.9, type=at_least(0.0), help="momentum, if the optimizer has one")
    add("--layer_decay", default=1.0, type=fraction_above_0, help="factor on the learning rate per layer, from the top")
    kinds = ("single", "group")
    add("--layer_decay_type", default="single", choices=kinds, help="a layer is one block, or three (base and larger)")


def check_optimizer_args(args):
    """Raise UserError for an optimizer that timm lacks or that the flags do not fit."""
    from timm.optim import get_optimizer_info, list_optimizers

    name = base_name(args)
    if name not in list_optimizers():
        raise UserError(f"--opt {args.opt}: must be one of {', '.join(list_optimizers())}")
    info = get_optimizer_info(name)
    if info.second_order:
        raise UserError(f"--opt {args.opt}: needs second derivatives; must be a first-order optimizer, such as adamw")
    if "momentum" in args.given and not info.has_momentum:
        raise UserError(f"--momentum {args.momentum}: --opt {args.opt} has none; leave the flag out")
    count = info.num_betas if info.has_betas else 0
    if args.opt_betas and len(args.opt_betas) != count:
        raise UserError(f"--opt_betas {args.opt_betas}: --opt {args.opt} takes {count or 'none'}")


def base_name(args):
    """The name in timm's list of the optimizer that --opt wraps or is."""
    return args.opt.lower().removeprefix("lookahead_")


def create_optimizer(args, model, get_num_layer=None, get_layer_scale=None, filter_bias_and_bn=True, skip_list=()):
    """timm's optimizer --opt for the parameter groups of a model. Raises ValueError if timm has none of that name.

    filter_bias_and_bn: False applies weight decay to all parameters.
    """
    from timm.optim import create_optimizer_v2

    groups = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    if not filter_bias_and_bn:
        groups = [group | {"weight_decay": args.weight_decay, "decays": True} for group in groups]
    options = {"eps": args.opt_eps, "weight_decay": args.weight_decay, "momentum": args.momentum}
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    if base_name(args) in ("adam", "adamw"):
        options["fused"] = True
    return create_optimizer_v2(groups, opt=args.opt, lr=peak_lr(args), **options)


def create_layer_decay_optimizer(args, model):
    """The optimizer of fine-tuning, with --layer_decay. Raises UserError for what this model cannot have."""
    get_num_layer = get_layer_scale = None
    if args.layer_decay != 1:
        with utils.name_in_errors(f"--layer_decay_type {args.layer_decay_type}"):
            assigner = LayerDecayValueAssigner.of_decay(args.layer_decay, model.depths, args.layer_decay_type)
        get_num_layer, get_layer_scale = assigner.get_layer_id, assigner.get_scale
    try:
        return create_optimizer(args, model, get_num_layer, get_layer_scale)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # of its flags, or of a package that it needs
        raise UserError(f"--opt {args.opt}: {error}") from None


def load_moments(optimizer, state):
    """Load an optimizer's state dict, but keep the hyper-parameters of today's flags.

    Raises ValueError for other groups, and for a state that would fail or spoil the next step.
    """
    names = "lr weight_decay decays lr_scale betas eps momentum fused foreach capturable maximize amsgrad".split()
    hyperparameters = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    is_whole = all(type(number) is int for number in numbers) and len(set(numbers)) == len(numbers)
    if not (is_whole and all(n in numbers and isinstance(values, dict) for n, values in state["state"].items())):
        raise ValueError("the optimizer's state is damaged")
    optimizer.load_state_dict(state)
    for group, current in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(current)

    is_plain = type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # their states are known
    moments = list((optimizer.state if is_plain else state["state"]).items())
    if is_plain and len({frozenset(values) for _, values in moments}) > 1:
        raise ValueError("the optimizer's state is damaged: parameters have different moments")
    for number, (parameter, values) in enumerate(moments):
        for name, value in values.items():
            fits = not is_plain or fits_parameter(name, value, parameter)
            if not fits or torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"the optimizer's {name} of parameter {number} is damaged")


def fits_parameter(name, value, parameter):
    """Whether this can be the step count, or a moment, of a parameter in torch's own optimizers."""
    if name == "step":
        return type(value) in (int, float) or torch.is_tensor(value) and value.numel() == 1
    return value is None or torch.is_tensor(value) and value.shape == parameter.shape
