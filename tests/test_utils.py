"""The schedule, the parameter groups and the files, against values worked out by hand."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch.optim import lr_scheduler as schedulers

import checkpoints
import main_finetune
import run
import utils
from models import convnextv2
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from optim_factory import LayerDecayValueAssigner, Schedule, create_optimizer, get_parameter_groups, load_moments


def parse(text):
    return main_finetune.get_args_parser().parse_args(text.split())


def make_optimizer(*scales):
    groups = [{"params": [torch.zeros(1)], "lr_scale": scale, "decays": scale == 1} for scale in scales]
    return torch.optim.SGD(groups, lr=9.0, weight_decay=0.0)


def test_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    optimizer = make_optimizer(1.0, 0.5)
    schedule = Schedule(parse("--lr 1 --min_lr 0.2 --warmup_epochs 10 --epochs 50"), steps_per_epoch=5)
    by_hand = {0: 0.0, 2.5: 0.25, 10: 1.0, 20: 0.2 + 0.8 * 0.8535534, 30: 0.6, 50: 0.2}
    for epoch, lr in by_hand.items():
        assert schedule.apply(optimizer, epoch) == pytest.approx(lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 2])


@pytest.mark.parametrize(
    "flags, reference",
    [
        ("--sched cosine", lambda opt: schedulers.CosineAnnealingLR(opt, 12, eta_min=0.1)),
        ("--sched linear", lambda opt: schedulers.LinearLR(opt, 1.0, 0.1, total_iters=12)),
        ("--sched poly --poly_power 2 --min_lr 0", lambda opt: schedulers.PolynomialLR(opt, 12, power=2)),
        ("--sched step --decay_epochs 5 --decay_rate 0.5", lambda opt: schedulers.StepLR(opt, 5, gamma=0.5)),
        ("--sched multistep --decay_milestones 2 7", lambda opt: schedulers.MultiStepLR(opt, [2, 7], gamma=0.1)),
        ("--sched constant", lambda opt: schedulers.ConstantLR(opt, factor=1.0)),
    ],
)
def test_schedules_are_those_of_torch(flags, reference):
    """And all start with the same warm-up. Steps do not go below min_lr, where torch's have no such bound."""
    text = f"--lr 1 --min_lr 0.1 --epochs 12 {flags} --warmup_epochs"
    schedule, optimizer = Schedule(parse(f"{text} 0"), steps_per_epoch=5), torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = reference(optimizer)
    for epoch in range(12):
        assert schedule.lr(epoch) == pytest.approx(max(optimizer.param_groups[0]["lr"], schedule.args.min_lr))
        optimizer.step()
        scheduler.step()
    warm = Schedule(parse(f"{text} 4"), steps_per_epoch=5)
    assert [warm.lr(epoch) for epoch in (0, 1, 2.5)] == [0, 0.25, 0.625]


def test_weight_decay_follows_its_own_cosine_and_spares_groups_that_do_not_decay():
    optimizer = make_optimizer(1.0, 0.5)
    schedule = Schedule(parse("--lr 1 --epochs 10 --weight_decay 0.1 --weight_decay_end 0.5"), steps_per_epoch=5)
    for epoch, decay in {0: 0.1, 5: 0.3, 10: 0.5}.items():
        schedule.apply(optimizer, epoch)
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([decay, 0.0])


def test_weights_decay_and_nothing_else():
    model = FCMAE(img_size=32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_embed_dim=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, rest = get_parameter_groups(model, 0.05)
    decay_names = {names[id(parameter)] for parameter in decay["params"]}
    block = {"dwconv.weight", "pwconv1.weight", "pwconv2.weight"}
    assert decay_names == {
        *(f"encoder.downsample_layers.{i}.{0 if i == 0 else 1}.weight" for i in range(4)),
        *(f"encoder.stages.{i}.0.{name}" for i in range(4) for name in block),
        *(f"decoder.0.{name}" for name in block),
        "proj.weight",
        "pred.weight",
    }
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert len(decay["params"]) + len(rest["params"]) == len(names)


# Worked out by hand. By model and type of layer decay: the factor, and for the four downsample layers, the blocks of
# the four stages, and the rest (norm and head) first the layer ids, then the powers of the factor.
LAYERS = {
    ("convnextv2_atto", "single", 0.9): (
        ([1, 3, 5, 11], [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]], 13),
        ([12, 10, 8, 2], [[12, 11], [10, 9], [8, 7, 6, 5, 4, 3], [2, 1]], 0),
    ),
    ("convnextv2_tiny", "single", 0.9): (
        ([1, 4, 7, 16], [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18]], 19),
        ([18, 15, 12, 3], [[18, 17, 16], [15, 14, 13], [12, 11, 10, 9, 8, 7, 6, 5, 4], [3, 2, 1]], 0),
    ),
    ("convnextv2_base", "single", 0.8): (
        (
            [1, 4, 7, 34],
            [
                [1, 2, 3],
                [4, 5, 6],
                [7, 8, 9, 10, 11, 12, 13, 14, 15]
                + [16, 17, 18, 19, 20, 21, 22, 23, 24]
                + [25, 26, 27, 28, 29, 30, 31, 32, 33],
                [34, 35, 36],
            ],
            37,
        ),
        (
            [36, 33, 30, 3],
            [
                [36, 35, 34],
                [33, 32, 31],
                [30, 29, 28, 27, 26, 25, 24, 23, 22]
                + [21, 20, 19, 18, 17, 16, 15, 14, 13]
                + [12, 11, 10, 9, 8, 7, 6, 5, 4],
                [3, 2, 1],
            ],
            0,
        ),
    ),
    ("convnextv2_base", "group", 0.6): (
        (
            [0, 2, 3, 12],
            [
                [1, 1, 1],
                [2, 2, 2],
                [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11],
                [12, 12, 12],
            ],
            13,
        ),
        (
            [13, 11, 10, 1],
            [
                [12, 12, 12],
                [11, 11, 11],
                [10, 10, 10, 9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2],
                [1, 1, 1],
            ],
            0,
        ),
    ),
}
DECAYS_OUTSIDE_BLOCKS = {
    "downsample_layers.0.0.weight",
    "downsample_layers.1.1.weight",
    "downsample_layers.2.1.weight",
    "downsample_layers.3.1.weight",
    "head.weight",
}
DECAYS_IN_A_BLOCK = {"dwconv.weight", "pwconv1.weight", "pwconv2.weight"}
BLOCK = DECAYS_IN_A_BLOCK | {
    *("dwconv.bias", "norm.weight", "norm.bias", "pwconv1.bias", "pwconv2.bias", "grn.gamma", "grn.beta")
}


def look_up(layers, name):
    """The entry for a parameter's name in one of the two halves of a table above."""
    downsample, stages, rest = layers
    part, *path = name.split(".")
    if part == "downsample_layers":
        return downsample[int(path[0])]
    if part == "stages":
        assert ".".join(path[2:]) in BLOCK
        return stages[int(path[0])][int(path[1])]
    assert name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    return rest


@pytest.mark.parametrize(("name", "kind", "decay"), LAYERS)
def test_layer_decay_gives_every_parameter_the_rate_and_decay_of_the_table(name, kind, decay):
    ids, powers = LAYERS[name, kind, decay]
    with torch.device("meta"):
        model = getattr(convnextv2, name)()
    assert [len(stage) for stage in ids[1]] == [len(stage) for stage in powers[1]] == [len(s) for s in model.stages]
    assigner = LayerDecayValueAssigner.of_decay(decay, model.depths, kind)
    groups = get_parameter_groups(model, 0.05, (), assigner.get_layer_id, assigner.get_scale)
    placed = [(id(parameter), group) for group in groups for parameter in group["params"]]
    group_of = dict(placed)
    assert len(placed) == len(group_of) == len(list(model.parameters()))
    for parameter, value in model.named_parameters():
        group = group_of[id(value)]
        decays = parameter in DECAYS_OUTSIDE_BLOCKS or (
            parameter.startswith("stages.") and parameter.split(".", 3)[3] in DECAYS_IN_A_BLOCK
        )
        assert assigner.get_layer_id(parameter) == look_up(ids, parameter), parameter
        assert group["lr_scale"] == pytest.approx(decay ** look_up(powers, parameter), rel=1e-12), parameter
        assert (group["weight_decay"], group["decays"]) == ((0.05, True) if decays else (0.0, False)), parameter


def test_layer_decay_by_groups_is_refused_for_other_depths():
    with pytest.raises(ValueError, match=r"\(3, 3, 27, 3\), not \(3, 3, 9, 3\): take 'single'"):
        LayerDecayValueAssigner.of_decay(0.9, (3, 3, 9, 3), "group")


def small_classifier():
    return ConvNeXtV2(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=3)


def optimizer_args(opt, flags=""):
    return parse(f"--opt {opt} --lr 1e-3 --momentum 0.8 --opt_eps 1e-7 {flags}")


def steps(model, optimizer):
    """Whether two steps of training change the weights, to numbers."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 3, 32, 32)).square().sum()
        loss.backward()
        optimizer.step()
    after = list(model.parameters())
    changed = any(not new.equal(old) for new, old in zip(after, before, strict=True))
    return changed and all(parameter.isfinite().all() for parameter in after)


def failure(make_optimizer):
    """What happens to two steps of an optimizer for a small classifier; nothing if they succeed."""
    model = small_classifier()
    try:
        return None if steps(model, make_optimizer(model)) else "weights are the same or no numbers"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
def test_every_optimizer_of_timm_that_works_here_takes_steps_with_layer_decay(seed_and_one_thread):
    def by_timm(model):
        return create_optimizer_v2(model, name, 1e-3)  # fails if it needs a GPU or another package

    def by_us(model):
        assigner = LayerDecayValueAssigner.of_decay(0.9, model.depths, "single")
        return create_optimizer(optimizer_args(name), model, assigner.get_layer_id, assigner.get_scale)

    torch.manual_seed(0)
    failures = {}
    with torch.compiler.set_stance("force_eager"):  # some compile their step, for half a minute
        for name in [*list_optimizers(), "lookahead_adamw"]:
            if failure(by_timm) is None:
                failures[name] = failure(by_us)
    assert {"adamw", "sgd", "lamb", "lion", "rmsprop", "lookahead_adamw"} <= failures.keys()
    assert not {name: reason for name, reason in failures.items() if reason}


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
def test_every_optimizer_that_is_accepted_resumes_bit_for_bit(seed_and_one_thread, tmp_path):
    """None keeps a state outside of its state dict, such as a generator of its own."""
    imgs, targets = torch.randn(16, 6), torch.randint(0, 3, (16,))

    def build(name):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
        groups = [{"params": list(model.parameters()), "lr_scale": 1.0}]
        return model, create_optimizer_v2(groups, opt=name, lr=1e-3, weight_decay=0.05, momentum=0.9)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(imgs), targets).backward()
            optimizer.step()

    different = []
    with torch.compiler.set_stance("force_eager"):
        for name in [*list_optimizers(), "lookahead_adamw"]:
            if name.startswith(("bnb", "fused")) or name in ("adahessian",):  # CUDA alone; refused
                continue
            model, optimizer = build(name)
            train(model, optimizer, range(7))
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "middle.pth")
            train(model, optimizer, range(7, 14))
            weights, state = torch.load(tmp_path / "middle.pth")
            resumed, optimizer = build(name)
            resumed.load_state_dict(weights)
            load_moments(optimizer, state)
            train(resumed, optimizer, range(7, 14))
            if not all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values())):
                different.append(name)
    assert different == []


@pytest.mark.parametrize("damage", [None, torch.zeros(2, 3), {"exp_avg": torch.zeros(3)}, "other", {"step": "x"}])
def test_moments_of_another_form_are_a_value_error(damage):
    optimizer = make_optimizer(1.0)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    state = {"state": {0: moments}, "param_groups": optimizer.state_dict()["param_groups"]}
    load_moments(optimizer, state)
    state["state"][0] = moments | damage if isinstance(damage, dict) else damage
    with pytest.raises(ValueError):
        load_moments(optimizer, state)


@pytest.mark.parametrize("number", [0, 7, (1,)], ids=["twice", "of no group", "no number"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_moments_of_parameters_that_no_group_or_two_have_are_a_value_error(name, number):
    model = small_classifier()
    optimizer = create_optimizer(optimizer_args(name), model)
    state = optimizer.state_dict()
    if number == 7:
        state["state"][1000] = {}
    else:
        state["param_groups"][-1]["params"][-1] = number
    with pytest.raises(ValueError, match="the optimizer's state is damaged"):
        load_moments(optimizer, state)


def test_optimizer_flags_reach_the_optimizer():
    model = small_classifier()
    adamw = create_optimizer(optimizer_args("adamw", "--opt_betas 0.7 0.9"), model).param_groups
    assert [(group["lr"], group["eps"], group["betas"]) for group in adamw] == [(1e-3, 1e-7, (0.7, 0.9))] * 2
    assert [group["weight_decay"] for group in adamw] == [0.05, 0.0]
    assert [group["betas"] for group in create_optimizer(optimizer_args("adamw"), model).param_groups] == [
        (0.9, 0.999)
    ] * 2
    assert [group["momentum"] for group in create_optimizer(optimizer_args("sgd"), model).param_groups] == [0.8] * 2
    everything = create_optimizer(optimizer_args("adamw"), model, filter_bias_and_bn=False).param_groups
    assert [group["weight_decay"] for group in everything] == [0.05, 0.05]


def test_parameters_on_the_skip_list_and_frozen_ones_do_not_decay():
    model = small_classifier()
    model.stages[0].requires_grad_(False)
    decay, rest = get_parameter_groups(model, 0.05, skip_list=["head.weight"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [{names[id(parameter)] for parameter in group["params"]} for group in (decay, rest)]
    assert "head.weight" in placed[1] and "head.weight" not in placed[0]
    assert not [name for name in placed[0] | placed[1] if name.startswith("stages.0.")]


def test_the_optimizer_is_the_papers(pretrain, image_folder, tmp_path):
    """AdamW (.9, .95), lr = blr x effective batch size / 256."""
    from conftest import SMALL

    flags = "--batch_size 4 --update_freq 2 --epochs 1 --warmup_epochs 0 --blr 0.0064 --picture_freq 0".split()
    result = pretrain(*SMALL, "--data_path", image_folder, *flags, "--output_dir", tmp_path)
    assert result.status == 0 and f"peak learning rate {0.0064 * 8 / 256:.2e}" in result.out
    checkpoint = checkpoints.load_checkpoint(tmp_path / "checkpoint-0.pth")
    for group, decay in zip(checkpoint["optimizer"]["param_groups"], (0.05, 0.0), strict=True):
        assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == decay and group["decoupled_weight_decay"]


def test_seeds_of_different_keys_differ():
    keys = [(0,), (0, 0), (0, 5), (0, 5, 0), (5, 0), (0, 0, 5), (1, 5)]
    assert len({utils.derive_seed(*key) for key in keys}) == len(keys)
    assert utils.derive_seed(0, 5) == utils.derive_seed(0, 5)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-0.pth"
    checkpoints.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        checkpoints.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_its_own_half_written_files_are_removed(tmp_path):
    for name in (".checkpoint-3.pth-abc.tmp", ".log.txt-abc.tmp", ".mine.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    checkpoints.remove_half_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "notes.tmp"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_is_kept():
    """By a process whose model is on the CPU. The system would have to clear 16384 pages for each of these tensors."""
    code = """if True:
        import resource, utils, torch

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        first = faults()
        utils.to_device(torch.nn.Linear(1, 1), "cpu")
        faults()  # the heap grows
        print(first, faults())
    """
    root = Path(utils.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
    before, after = map(int, out.split())
    assert before > 100000 and after < 1000


@pytest.mark.parametrize(
    "words, value",
    [("", False), ("--use_amp", True), ("--use_amp true", True), ("--use_amp false", False), ("--no-use_amp", False)],
)
def test_switches_have_one_style(words, value):
    assert parse(words).use_amp == value


def test_image_sizes_are_height_and_width():
    assert parse("").input_size == (224, 224) and parse("--input_size 32").input_size == (32, 32)
    assert parse("--input_size 32 48 --eval_size 64").input_size == (32, 48)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    for value in (np.int64(3), np.float64(3), np.str_("a"), object()):
        with pytest.raises(TypeError, match=r"a.pth\['hooks'\]\['Count'\]\[0\] is a "):
            checkpoints.save_together({tmp_path / "a.pth": {"model": {}, "hooks": {"Count": [value]}}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("threads", "cores", "load", "hint"),
    [(2, 2, 0.9, None), (2, 2, 1.8, "OMP_NUM_THREADS=1"), (16, 4, 0.0, "OMP_NUM_THREADS=4"), (1, 2, 9.0, None)],
)
def test_a_hint_appears_where_threads_wait_for_each_other(threads, cores, load, hint):
    hints = run.hint_at_threads(threads, cores, load)
    assert len(hints) == (hint is not None) and all(hint in text for text in hints)
