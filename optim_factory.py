"""The optimizer and its schedule: learning rate, weight decay, parameter groups, layer decay; and their flags."""

import math
from bisect import bisect_right

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

from utils import UserError, check_least, get_world_size

# ---------------------------------------------------------------- schedule


def add_schedule_args(parser, epochs, warmup_epochs, blr, min_lr):
    """The flags of both scripts, with the defaults in which they differ."""
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", default=64, type=int, help="images per process and forward pass")
    group.add_argument("--epochs", default=epochs, type=int, help="passes over the images")
    group.add_argument(
        "--update_freq", default=1, type=int, help="forward passes per optimizer step, to accumulate their gradients"
    )
    group.add_argument(
        "--lr", default=None, type=float, help="peak learning rate; None: blr x effective batch size / 256"
    )
    group.add_argument("--blr", default=blr, type=float, help="base learning rate, per 256 images")
    group.add_argument(
        "--warmup_epochs", default=warmup_epochs, type=int, help="epochs over which the rate rises linearly from 0"
    )
    group.add_argument("--sched", default="cosine", choices=tuple(SCHEDULES), help="how it falls after that")
    group.add_argument(
        "--min_lr", default=min_lr, type=float, help="learning rate at the end, at least; not constant's"
    )
    group.add_argument("--decay_epochs", default=30, type=int, help="epochs from one decay to the next of step")
    group.add_argument(
        "--decay_milestones", default=None, type=int, nargs="+", help="epochs, from the run's start, of multistep"
    )
    group.add_argument("--decay_rate", default=0.1, type=float, help="factor at each decay of step and multistep")
    group.add_argument("--poly_power", default=0.9, type=float, help="power of poly; 1 is linear")
    group.add_argument("--weight_decay", default=0.05, type=float, help="none on norms, biases, GRN, mask token")
    group.add_argument(
        "--weight_decay_end", default=None, type=float, help="at the end, along a cosine; None: constant"
    )
    group.add_argument("--clip_grad", default=None, type=float, help="largest norm of the gradients; None: any")
    group.add_argument("--seed", default=0, type=int, help="decides weights and all that is drawn at random")
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch, counted from 0, of a new run")


# What of it decides a run's numbers: a resumed run says if it changed.
SCHEDULE_FLAGS = (
    "epochs warmup_epochs lr sched min_lr decay_epochs decay_milestones decay_rate poly_power weight_decay "
    "weight_decay_end clip_grad seed effective_batch_size"
).split()


def check_schedule_args(args):
    """Raise UserError for values that cannot work."""
    check_least(args, 1, "batch_size epochs update_freq decay_epochs")
    check_least(args, 0, "warmup_epochs seed start_epoch lr blr min_lr weight_decay weight_decay_end clip_grad")
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed}: must be less than 2 ** 63")
    if args.start_epoch >= args.epochs:
        raise UserError(f"--start_epoch {args.start_epoch}: must be less than --epochs {args.epochs}")
    for name in ("decay_rate", "poly_power"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be a number above 0")
    milestones = args.decay_milestones or []
    if args.sched == "multistep" and not milestones or sorted(set(milestones)) != milestones:
        given = " ".join(map(str, milestones)) or None
        raise UserError(f"--decay_milestones {given}: --sched multistep takes one or more epochs, each after the other")


def complete_lr(args):
    """Set args.effective_batch_size and, if no rate is given, args.lr from args.blr. For after distributed set-up."""
    args.effective_batch_size = args.batch_size * args.update_freq * get_world_size()
    if args.lr is None:
        args.lr = args.blr * args.effective_batch_size / 256
    if args.min_lr > args.lr:
        raise UserError(f"--min_lr {args.min_lr}: must not be more than the peak learning rate {args.lr:g}")


def half_cosine(start, end, progress):
    """From start at progress 0 to end at 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# After warm-up: the learning rate by (args, epochs done with a fraction, progress from 0 to 1).
SCHEDULES = {
    "cosine": lambda args, epoch, progress: half_cosine(args.lr, args.min_lr, progress),
    "linear": lambda args, epoch, progress: args.min_lr + (args.lr - args.min_lr) * (1 - progress),
    "poly": lambda args, epoch, progress: args.min_lr + (args.lr - args.min_lr) * (1 - progress) ** args.poly_power,
    "step": lambda args, epoch, progress: decayed(args, int(epoch / args.decay_epochs)),
    "multistep": lambda args, epoch, progress: decayed(args, bisect_right(args.decay_milestones, epoch)),
    "constant": lambda args, epoch, progress: args.lr,
}


def decayed(args, times):
    return max(args.lr * args.decay_rate**times, args.min_lr)


def adjust_learning_rate(optimizer, epoch, args):
    """Set and return the learning rate at a point in training: linear warm-up from 0, then args.sched.

    epoch: epochs done, with a fraction. Parameter groups with an `lr_scale` get that part of it.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = SCHEDULES[args.sched](args, epoch, progress)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def adjust_weight_decay(optimizer, epoch, args):
    """Set and return the weight decay, half a cosine to args.weight_decay_end over all epochs, of groups that decay."""
    weight_decay = half_cosine(args.weight_decay, args.weight_decay_end, epoch / args.epochs)
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay
    return weight_decay


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

    layer_decay_type: "single" (each block a layer) or "group" (three blocks; ValueError but for depths 3, 3, 27, 3).
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
    """Groups for an optimizer: weights decay; norms, biases, GRN, mask token and names in skip_list do not.

    With get_num_layer(name) -> id and get_layer_scale(id) -> factor two groups a layer, with that `lr_scale`.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim == 1 or ".grn." in name or name.endswith("mask_token") or name in skip_list
        layer = get_num_layer(name) if get_num_layer else None
        if (layer, exempt) not in groups:
            groups[layer, exempt] = {
                "params": [],
                "weight_decay": 0.0 if exempt else weight_decay,
                "decays": not exempt,
                "lr_scale": get_layer_scale(layer) if get_layer_scale else 1.0,
            }
        groups[layer, exempt]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def create_optimizer(args, model, get_num_layer=None, get_layer_scale=None, filter_bias_and_bn=True, skip_list=()):
    """timm's optimizer args.opt for the parameter groups of a model. Raises ValueError if timm has none of that name.

    filter_bias_and_bn: False lets weight decay act on all parameters.
    """
    groups = get_parameter_groups(model, args.weight_decay, skip_list, get_num_layer, get_layer_scale)
    if not filter_bias_and_bn:
        groups = [group | {"weight_decay": args.weight_decay, "decays": True} for group in groups]
    options = {"eps": args.opt_eps, "betas": tuple(args.opt_betas) if args.opt_betas else None}
    if optimizer_name(args) in ("adam", "adamw"):
        options["fused"] = True
    return create_optimizer_v2(
        groups,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        **{name: value for name, value in options.items() if value is not None},
    )


# ---------------------------------------------------------------- the optimizer of fine-tuning


def add_optimizer_args(parser):
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="any optimizer of timm")
    group.add_argument("--opt_eps", default=1e-8, type=float, help="its epsilon, if it has one")
    group.add_argument("--opt_betas", default=None, type=float, nargs="+", help="its betas; None: its defaults")
    group.add_argument("--momentum", default=0.9, type=float, help="its momentum, if it has one")
    group.add_argument(
        "--layer_decay", default=1.0, type=float, help="factor on the learning rate, per layer from the top"
    )
    group.add_argument(
        "--layer_decay_type",
        default="single",
        choices=("single", "group"),
        help="a layer is a block, or three (base, large, huge)",
    )


def optimizer_name(args):
    return args.opt.lower().removeprefix("lookahead_")


def check_optimizer_args(args):
    """Raise UserError for values that cannot work."""
    check_least(args, 0, "opt_eps momentum")
    if not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer_decay {args.layer_decay}: must be above 0, at most 1")
    if optimizer_name(args) not in list_optimizers():
        raise UserError(f"--opt {args.opt}: must be one of {', '.join(list_optimizers())}")
    info = get_optimizer_info(optimizer_name(args))
    count = info.num_betas if info.has_betas else 0
    if args.opt_betas and (len(args.opt_betas) != count or not all(0 <= beta < 1 for beta in args.opt_betas)):
        raise UserError(f"--opt_betas {args.opt_betas}: --opt {args.opt} takes {count or 'none'}, from 0 to below 1")
    if info.second_order and args.use_amp and args.amp_dtype == "float16":
        raise UserError(f"--opt {args.opt}: needs second derivatives, whose range is not float16's; take bfloat16")


def build_optimizer(args, model):
    """The optimizer that the flags name, with layer decay. Raises UserError for what this model or run cannot have."""
    if args.distributed and get_optimizer_info(optimizer_name(args)).second_order:
        raise UserError(f"--opt {args.opt}: second derivatives of one process only, not of {args.world_size}")
    get_num_layer = get_layer_scale = None
    if args.layer_decay != 1:
        try:
            assigner = LayerDecayValueAssigner.of_decay(args.layer_decay, model.depths, args.layer_decay_type)
        except ValueError as error:
            raise UserError(f"--layer_decay_type {args.layer_decay_type}: {error}") from None
        get_num_layer, get_layer_scale = assigner.get_layer_id, assigner.get_scale
    try:
        return create_optimizer(args, model, get_num_layer, get_layer_scale)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # of its flags, or of a package that it needs
        raise UserError(f"--opt {args.opt}: {error}") from None
