"""Supervised training of ConvNeXt V2, from an FCMAE checkpoint or from scratch, and evaluation.

    python main_finetune.py --model convnextv2_atto --data_path IMAGES --finetune CHECKPOINT --output_dir OUTPUT
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_base.args --data_path IMAGENET \\
        --finetune CHECKPOINT --output_dir OUTPUT
    python main_finetune.py --model convnextv2_base --eval true --resume CHECKPOINT --data_path IMAGENET

Run the same command again to go on after a stop of any kind.
"""

import utils  # isort: skip  (before torch)
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3

import datasets
import hooks
from engine_finetune import evaluate, train_one_epoch
from models import convnextv2
from models.checkpoints import get_weights, load_backbone, load_weights
from optim_factory import LayerDecayValueAssigner, create_optimizer
from utils import UserError, log, str2bool


def get_args_parser():
    parser = utils.FlagParser(add_help=False)

    utils.add_shared_args(parser, convnextv2.SIZES, epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6)

    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--warmup_steps", default=-1, type=int, help="warm-up in optimizer steps; above 0 it counts")
    group.add_argument(
        "--drop_path", default=0.0, type=float, help="drop path rate of the last block, from 0 at the first"
    )
    group.add_argument(
        "--head_init_scale", default=0.001, type=float, help="factor on the initial weights of a new head"
    )
    group.add_argument("--finetune", default="", metavar="FILE", help="checkpoint whose weights to start from")
    group.add_argument("--model_key", default="model|module", help="where in that file they are: the first of these")
    group.add_argument("--model_prefix", default="", help="what their names begin with there, to be removed")
    group.add_argument("--model_ema", default=False, type=str2bool, help="keep an exponential average of the weights")
    group.add_argument("--model_ema_decay", default=0.9999, type=float, help="its part of the old average, each step")
    group.add_argument("--model_ema_force_cpu", default=False, type=str2bool, help="keep it in the CPU's memory")
    group.add_argument("--model_ema_eval", default=False, type=str2bool, help="evaluate it too; with --eval it alone")

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

    group = parser.add_argument_group("augmentation")
    group.add_argument("--smoothing", default=0.1, type=float, help="label smoothing, 0 to 1")
    group.add_argument("--mixup", default=0.0, type=float, help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", default=0.0, type=float, help="alpha of cutmix; 0: none")
    group.add_argument(
        "--cutmix_minmax", default=None, type=float, nargs=2, help="least and largest side of the cut, 0 to 1"
    )
    group.add_argument("--mixup_prob", default=1.0, type=float, help="part of the batches that is mixed")
    group.add_argument("--mixup_switch_prob", default=0.5, type=float, help="part of those by cutmix, if both are on")
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what is mixed alike")
    group.add_argument("--color_jitter", default=None, type=float, help="strength, where --aa is none; None: no jitter")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an AutoAugment policy, or none")
    group.add_argument("--hflip", default=0.5, type=float, help="part of the images that is mirrored")
    group.add_argument("--reprob", default=0.25, type=float, help="part of the images with a rectangle erased")
    group.add_argument(
        "--remode", default="pixel", choices=("pixel", "rand", "const"), help="it becomes noise, a colour, 0"
    )
    group.add_argument("--recount", default=1, type=int, help="most rectangles an image")
    group.add_argument(
        "--train_interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"), help="of resized crops"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_set",
        default="IMNET",
        choices=("IMNET", "image_folder", "CIFAR", "CIFAR10", "DIGITS"),
        help="IMNET: train/ and val/ of class folders; image_folder: class folders; CIFAR: CIFAR-100",
    )
    group.add_argument("--data_path", default=None, metavar="FOLDER", help="where the images are, or come (CIFAR)")
    group.add_argument(
        "--eval_data_path", default=None, metavar="FOLDER", help="class folders; None: val/ of data_path"
    )
    group.add_argument("--nb_classes", default=None, type=int, help="number of classes, checked; None: as the data")
    group.add_argument("--images_per_class", default=0, type=int, help="train on the first of each class only; 0: all")
    group.add_argument(
        "--imagenet_default_mean_and_std", default=True, type=str2bool, help="pixel statistics; false: Inception's"
    )
    group.add_argument(
        "--crop_pct",
        default=None,
        type=float,
        help="part of the resized image that is evaluated; None: 0.875, and all of it up to 32 and from 384 pixels on",
    )

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval", default=False, type=str2bool, help="evaluate --resume or the output folder's newest, only"
    )
    group.add_argument("--disable_eval", default=False, type=str2bool, help="train without evaluation")
    group.add_argument(
        "--dist_eval", default=True, type=str2bool, help="divide the images; false: each process takes all"
    )
    return parser


def check_args(args):
    """Complete the flags, or raise UserError for those that cannot work, before anything is loaded."""
    args.input_size = utils.image_size(args, least=8 * args.stem_stride)
    utils.check_shared_args(args)
    utils.check_least(args, 0, "images_per_class head_init_scale mixup cutmix opt_eps momentum")
    if args.color_jitter is not None:
        utils.check_least(args, 0, "color_jitter")
    utils.check_least(args, 1, "recount")
    for name in ("drop_path", "smoothing", "mixup_prob", "mixup_switch_prob", "hflip", "reprob", "model_ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    if args.drop_path == 1:
        raise UserError("--drop_path 1.0: must be less than 1")
    for name in ("layer_decay", "crop_pct"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name} {value}: must be above 0, at most 1")
    if args.smoothing == 1:
        raise UserError("--smoothing 1.0: must be less than 1")
    check_optimizer(args)
    if mixes(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even for mixup and cutmix")
    if args.cutmix_minmax and not 0 <= args.cutmix_minmax[0] <= args.cutmix_minmax[1] <= 1:
        raise UserError(f"--cutmix_minmax {args.cutmix_minmax}: must be two numbers from 0 to 1, the smaller first")
    args.aa = None if args.aa.lower() in ("", "none") else args.aa
    if args.data_set in ("DIGITS", "CIFAR", "CIFAR10") and args.in_chans not in datasets.COLOUR_MODES:
        raise UserError(f"--in_chans {args.in_chans}: must be one of {list(datasets.COLOUR_MODES)} for {args.data_set}")
    if args.in_chans not in (1, 3) and not args.eval and (args.aa or args.color_jitter):
        raise UserError(
            f"--aa {args.aa}, --color_jitter {args.color_jitter}: made for grey and RGB images; "
            f"give --aa none and no --color_jitter for --in_chans {args.in_chans}"
        )
    if not args.eval:
        try:
            datasets.build_transform(True, args)
        except (ValueError, TypeError, KeyError, AssertionError) as error:  # timm's, of a policy it does not know
            raise UserError(f"--aa {args.aa}: not a policy of timm: {error}") from None
    if args.data_set != "DIGITS" and not args.data_path and not (args.eval and args.eval_data_path):
        raise UserError("--data_path: give a folder of class folders, or --data_set DIGITS")
    if args.eval and args.disable_eval:
        raise UserError("--eval true and --disable_eval true: nothing to do")
    if args.model_ema_eval and not args.model_ema and not args.eval:
        raise UserError("--model_ema_eval true: there are no averaged weights without --model_ema true")


def optimizer_name(args):
    return args.opt.lower().removeprefix("lookahead_")


def check_optimizer(args):
    if optimizer_name(args) not in list_optimizers():
        raise UserError(f"--opt {args.opt}: must be one of {', '.join(list_optimizers())}")
    info = get_optimizer_info(optimizer_name(args))
    count = info.num_betas if info.has_betas else 0
    if args.opt_betas and (len(args.opt_betas) != count or not all(0 <= beta < 1 for beta in args.opt_betas)):
        raise UserError(f"--opt_betas {args.opt_betas}: --opt {args.opt} takes {count or 'none'}, from 0 to below 1")
    if info.second_order and args.use_amp and args.amp_dtype == "float16":
        raise UserError(f"--opt {args.opt}: needs second derivatives, whose range is not float16's; take bfloat16")


def mixes(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_data(args, class_names=None):
    """Training set (None with --eval), evaluation set (None with --disable_eval) and the names of their classes."""
    train = evaluation = None
    if not args.eval:
        train, _ = utils.on_all_processes(lambda: datasets.build_dataset(True, args))
        class_names = train.images.class_names
    if not args.disable_eval:
        evaluation, _ = utils.on_all_processes(lambda: datasets.build_dataset(False, args, class_names))
        class_names = class_names or evaluation.images.class_names
    if args.nb_classes not in (None, len(class_names)):
        raise UserError(f"--nb_classes {args.nb_classes}: the data has {len(class_names)} classes")
    if evaluation is not None and len(evaluation.images.class_names) != len(class_names):
        raise UserError(f"the data has {len(evaluation.images.class_names)} classes, the model {len(class_names)}")
    return train, evaluation, class_names


def build_model(args, num_classes):
    return convnextv2.__dict__[args.model](
        in_chans=args.in_chans,
        num_classes=num_classes,
        drop_path_rate=args.drop_path,
        head_init_scale=args.head_init_scale,
        stem_stride=args.stem_stride,
    )


def build_optimizer(args, model):
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


def build_loss(args, num_classes):
    """criterion(logits, targets), and mixup_fn(images, classes) -> images, targets for it, or None."""
    if mixes(args):
        mixup_fn = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
        return SoftTargetCrossEntropy(), mixup_fn
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing), None
    return torch.nn.CrossEntropyLoss(), None


def start_from(args, model):
    """Start from the weights in --finetune, and tell what was taken from there."""
    checkpoint = utils.load_checkpoint(args.finetune)
    state = get_weights(checkpoint, args.finetune, args.model_key, args.model_prefix)
    for line in load_backbone(model, state, args.finetune):
        log(line)


# What decides a run's numbers: a resumed run says if it changed.
RUN_FLAGS = (
    "epochs warmup_epochs seed lr min_lr layer_decay layer_decay_type weight_decay weight_decay_end clip_grad "
    "drop_path smoothing mixup cutmix aa hflip reprob model_ema model_ema_decay data_set data_path images_per_class "
    "input_size use_amp amp_dtype effective_batch_size num_images"
).split()


def build_hooks(args, state):
    observers = [hooks.UnreadableImages(args.max_bad_images), hooks.Console()]
    if state.model_ema is not None and not args.eval:
        observers.insert(0, hooks.AveragedWeights())
    if args.output_dir and not args.eval:
        observers.append(hooks.LogFile(args.output_dir))
    if args.log_dir or args.output_dir:
        observers.append(hooks.TensorBoard(args.log_dir or args.output_dir))
    if args.output_dir:
        observers.append(hooks.ClassReport(args.output_dir))
    if not args.eval:
        observers += hooks.saving_hooks(args)  # last: what they keep has been logged
    return hooks.Hooks(observers)


def evaluate_only(args):
    """Evaluate --resume, else the newest checkpoint in the output folder; no training set is loaded."""
    # checkpoint and data
    if args.resume:
        checkpoint, path = utils.load_checkpoint(args.resume), args.resume
    else:
        checkpoint, path = utils.newest_checkpoint(args.output_dir) if args.output_dir else (None, None)
    if checkpoint is None:
        raise UserError("--eval true: give --resume FILE, or an --output_dir with checkpoints")
    key = "model_ema" if args.model_ema_eval else args.model_key
    if args.model_ema_eval and key not in checkpoint:
        raise UserError(f"--model_ema_eval true: {path} holds no averaged weights, which --model_ema true keeps")
    weights = get_weights(checkpoint, path, key, args.model_prefix)
    _, dataset, class_names = build_data(args, checkpoint.get("class_names"))
    if "head.weight" in weights and len(weights["head.weight"]) != len(class_names):
        raise UserError(f"{path}: has {len(weights['head.weight'])} classes, the data {len(class_names)}")

    # model
    model = build_model(args, len(class_names)).to(args.device)
    load_weights(model, weights, path)
    state = hooks.RunState(args, model, images=dataset.images, class_names=class_names)
    if "format" in checkpoint:
        state.epoch = checkpoint["epoch"]
    log(f"{args.model}: {state.n_parameters / 1e6:.1f} M parameters from {path}, {len(class_names)} classes")

    # evaluation
    observers = build_hooks(args, state)
    observers("on_start", state)
    loader = datasets.build_eval_loader(dataset, args)
    state.observe_evaluations({"_ema" if args.model_ema_eval else "": evaluate(model, loader, args)})
    observers("on_evaluate", state)


def main(args):
    check_args(args)
    utils.init_distributed_mode(args)
    utils.complete_lr(args)
    utils.prepare_output(args)
    if args.eval:
        return evaluate_only(args)

    # data
    dataset, eval_dataset, class_names = build_data(args)
    loader, sampler = datasets.build_train_loader(dataset, args)
    eval_loader = None if eval_dataset is None else datasets.build_eval_loader(eval_dataset, args)
    if args.warmup_steps > 0:
        args.warmup_epochs = args.warmup_steps / sampler.steps_per_epoch

    # model and optimizer
    torch.manual_seed(args.seed)
    model = model_without_ddp = build_model(args, len(class_names)).to(args.device)
    if args.finetune:
        utils.on_all_processes(lambda: start_from(args, model))
    model_ema = None
    if args.model_ema:
        model_ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    optimizer = build_optimizer(args, model)
    criterion, mixup_fn = build_loss(args, len(class_names))
    scaler = torch.amp.GradScaler(args.device.partition(":")[0], enabled=args.use_amp and args.amp_dtype == "float16")
    state = hooks.RunState(args, model, optimizer, scaler, sampler, dataset.images, model_ema, class_names)
    hooks.resume(state, RUN_FLAGS)
    if args.compile:
        model = torch.compile(model)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)

    # configuration
    utils.log_args(args)
    log(
        f"{args.model}: {state.n_parameters / 1e6:.1f} M parameters, {len(class_names)} classes; "
        f"{len(dataset.images)} images, {sampler.steps_per_epoch} steps of {args.effective_batch_size} an epoch; "
        f"learning rate up to {args.lr:.2e}; {loader.num_workers} loader workers"
    )

    # training
    if state.epoch >= args.epochs:
        return log(f"nothing left to do: {state.epoch} of {args.epochs} epochs are done")
    observers = build_hooks(args, state)
    observers("on_start", state)
    while state.epoch < args.epochs:
        sampler.set_position(state.epoch, state.step)
        observers("on_epoch_start", state)
        train_one_epoch(model, criterion, loader, optimizer, scaler, state, observers, args, mixup_fn)
        if eval_loader is not None:
            parts = {"": model_without_ddp} | ({"_ema": model_ema.module} if args.model_ema_eval else {})
            give_up = state.stop_requested if args.dist_eval else lambda: False
            state.observe_evaluations(
                {what: evaluate(part, eval_loader, args, give_up) for what, part in parts.items()}
            )
            observers("on_evaluate", state)
        observers("on_epoch_end", state)
        state.end_epoch()
    observers("on_end", state)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
