"""Supervised training of ConvNeXt V2, from an FCMAE checkpoint or from scratch, and evaluation.

    python main_finetune.py --model convnextv2_atto --data_path IMAGES --finetune CHECKPOINT --output_dir OUTPUT
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_base.args --data_path IMAGENET \\
        --finetune CHECKPOINT --output_dir OUTPUT
    python main_finetune.py --model convnextv2_base --eval true --resume CHECKPOINT --data_path IMAGENET

Run the same command again to go on after a stop of any kind.
"""

import utils  # isort: skip  (before torch)
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import datasets
import hooks
import optim_factory
from engine_finetune import evaluate, train_one_epoch
from models import convnextv2
from models.checkpoints import get_weights, load_backbone, load_weights, resume, weights_to_evaluate
from models.utils import describe
from utils import UserError, log, str2bool


def get_args_parser():
    parser = utils.FlagParser(add_help=False)
    optim_factory.add_schedule_args(parser, epochs=100, warmup_epochs=20, blr=5e-4, min_lr=1e-6)
    utils.add_model_args(parser, convnextv2.SIZES)

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

    group = parser.add_argument_group("loss")
    group.add_argument("--loss", default="ce", choices=("ce", "bce"), help="cross-entropy, or binary for each class")
    group.add_argument("--smoothing", default=0.1, type=float, help="label smoothing, 0 to 1")

    optim_factory.add_optimizer_args(parser)
    datasets.add_labelled_args(parser)
    datasets.add_loader_args(parser)
    utils.add_machine_args(parser)
    hooks.add_output_args(parser, watched="test_acc1")
    return parser


def check_args(args):
    """Complete the flags, or raise UserError for those that cannot work, before anything is loaded."""
    args.input_size = utils.image_size(args, least=8 * args.stem_stride)
    utils.check_least(args, 1, "in_chans")
    utils.check_machine_args(args)
    optim_factory.check_schedule_args(args)
    optim_factory.check_optimizer_args(args)
    datasets.check_loader_args(args)
    datasets.check_labelled_args(args)
    utils.check_least(args, 0, "head_init_scale")
    utils.check_part(args, "model_ema_decay")
    utils.check_part(args, "drop_path smoothing", one=False)
    if args.model_ema_eval and not args.model_ema and not args.eval:
        raise UserError("--model_ema_eval true: there are no averaged weights without --model_ema true")
    if args.watch is None and not args.disable_eval:
        args.watch = "test_acc1"
    evaluated = [] if args.disable_eval else [f"test_{name}" for name in utils.Evaluation.metric_names(args.topk)]
    hooks.check_output_args(args, metrics=["train_loss", *evaluated])


def build_model(args):
    return convnextv2.__dict__[args.model](
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        drop_path_rate=args.drop_path,
        head_init_scale=args.head_init_scale,
        stem_stride=args.stem_stride,
    )


def build_loss(args):
    """criterion(logits, targets), where targets are classes (N,), or soft if images are mixed."""
    if args.loss == "bce":
        return BinaryCrossEntropy(args.smoothing)  # soft targets are smoothed already, and left as they are
    if datasets.mixes(args):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else torch.nn.CrossEntropyLoss()


def start_from(args, model):
    """Start from the weights in --finetune, and tell what was taken from there."""
    checkpoint = utils.load_checkpoint(args.finetune)
    state = get_weights(checkpoint, args.finetune, args.model_key, args.model_prefix)
    for line in load_backbone(model, state, args.finetune):
        log(line)


# What decides a run's numbers: a resumed run says if it changed.
RUN_FLAGS = (
    "opt_eps opt_betas momentum layer_decay layer_decay_type drop_path loss smoothing mixup cutmix cutmix_minmax "
    "mixup_prob mixup_switch_prob mixup_mode color_jitter aa hflip reprob remode recount train_interpolation model_ema "
    "model_ema_decay data_set data_path images_per_class imagenet_default_mean_and_std crop_pct input_size eval_size "
    "use_amp amp_dtype num_images"
).split() + optim_factory.SCHEDULE_FLAGS


def build_hooks(args, state):
    observers = [hooks.UnreadableImages(args.max_bad_images), hooks.Console()]
    if args.log_dir or args.output_dir:
        observers.append(hooks.TensorBoard(args.log_dir or args.output_dir))
    if args.output_dir:
        observers.append(hooks.ClassReport(args.output_dir))
    if args.eval:
        return hooks.Hooks(observers)
    if args.output_dir:
        observers.append(hooks.LogFile(args.output_dir))
    if args.profile_steps:
        observers.append(hooks.Profiler(args.profile_steps, args.output_dir))
    if state.model_ema is not None:
        observers.append(hooks.AveragedWeights())
    return hooks.Hooks(observers + hooks.saving_hooks(args))  # last: what they keep has been logged


def evaluate_only(args):
    """Evaluate --resume, else the newest checkpoint in the output folder; no training set is loaded."""
    # checkpoint and data
    checkpoint, weights, path = weights_to_evaluate(args)
    _, dataset, class_names = datasets.build_labelled_sets(args, checkpoint.get("class_names"))
    args.num_classes = len(class_names)
    if "head.weight" in weights and len(weights["head.weight"]) != args.num_classes:
        raise UserError(f"{path}: has {len(weights['head.weight'])} classes, the data {args.num_classes}")

    # model
    model = utils.to_device(build_model(args), args)
    load_weights(model, weights, path)
    state = hooks.RunState(args, model, images=dataset.images, class_names=class_names)
    if "format" in checkpoint:
        state.epoch = checkpoint["epoch"]
    log(f"{args.model}: {state.n_parameters / 1e6:.1f} M parameters from {path}, {args.num_classes} classes")

    # evaluation
    observers = build_hooks(args, state)
    observers("on_start", state)
    loader = datasets.build_eval_loader(dataset, args)
    state.observe_evaluations({"_ema" if args.model_ema_eval else "": evaluate(model, loader, args)})
    observers("on_evaluate", state)
    observers("on_epoch_end", state)


def main(args):
    check_args(args)
    utils.init_distributed_mode(args)
    optim_factory.complete_lr(args)
    utils.prepare_output(args)
    if args.eval:
        return evaluate_only(args)

    # data
    dataset, eval_dataset, class_names = datasets.build_labelled_sets(args)
    args.num_classes = len(class_names)
    loader, sampler = datasets.build_train_loader(dataset, args)
    eval_loader = None if eval_dataset is None else datasets.build_eval_loader(eval_dataset, args)
    if args.warmup_steps > 0:
        args.warmup_epochs = args.warmup_steps / sampler.steps_per_epoch

    # model and optimizer
    torch.manual_seed(args.seed)
    model_without_ddp = utils.to_device(build_model(args), args)
    if args.finetune:
        utils.on_all_processes(lambda: start_from(args, model_without_ddp))
    model_ema = None
    if args.model_ema:
        device = "cpu" if args.model_ema_force_cpu else None
        model_ema = ModelEmaV3(model_without_ddp, args.model_ema_decay, device=device)
    optimizer = optim_factory.build_optimizer(args, model_without_ddp)
    criterion, mixup_fn = build_loss(args), datasets.build_mixup(args)
    scaler = utils.loss_scaler(args)
    state = hooks.RunState(args, model_without_ddp, optimizer, scaler, sampler, dataset.images, model_ema, class_names)
    resume(state, RUN_FLAGS)
    model = utils.for_training(model_without_ddp, args)

    # configuration
    utils.log_args(args)
    log(f"{args.model}, {len(class_names)} classes: {describe(build_model, args)}")
    log(datasets.describe(loader, args))

    # training
    if state.ends_before(state.epoch):
        return log(f"nothing left to do: {state.epoch} of {args.epochs} epochs are done")
    observers = build_hooks(args, state)
    observers("on_start", state)
    while not state.ends_before(state.epoch):
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
        state.sum_up()
        observers("on_epoch_end", state)
        state.end_epoch()
    observers("on_end", state)


if __name__ == "__main__":
    utils.run_script(main, utils.FlagParser(description=__doc__.splitlines()[0], parents=[get_args_parser()]))
