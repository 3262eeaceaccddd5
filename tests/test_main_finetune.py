"""Fine-tuning leaves what it promises, its flags do what they say, it resumes exactly, and evaluation counts right."""

import csv
import functools
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm.utils
import torch
from conftest import SMALL, TINY, assert_same_weights, finish, log_lines, start_ranks, weights
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from timm.data import create_transform

import hooks
import images
import main_finetune
from datasets import LabelledBatch
from images import normalize
from models import convnextv2
from models.weights import network_config
from optim_factory import get_num_layer_for_convnext_single, get_parameter_groups, half_cosine
from tasks import Classification

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["ant", "bee", "cat"]
# Everything whose state or random draws a resumed run has to find again
EVERYTHING = (
    "--batch_size 2 --update_freq 2 --mixup 0.8 --cutmix 1 --drop_path 0.3 --reprob 0.5 --clip_grad 5 "
    "--layer_decay 0.9 --weight_decay_end 0.2 --use_amp true --amp_dtype float16 --model_ema true "
    "--model_ema_eval true --model_ema_decay 0.8 --save_ckpt_steps 2 --save_ckpt_num 9 --epochs 3"
).split()


@pytest.fixture
def small(labelled_folder, narrow):
    """5 steps an epoch: 22 images in batches of 4. The head starts large enough for the backbone to learn at once."""
    flags = "--batch_size 4 --warmup_epochs 1 --epochs 2 --lr 1e-3 --head_init_scale 1".split()
    return [*TINY, "--data_path", labelled_folder, *flags]


@pytest.fixture
def brief(small):
    """3 steps without evaluation."""
    return [*small, *"--images_per_class 4 --warmup_epochs 0 --epochs 1 --disable_eval true".split()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def once(shared, finetune):
    """once(name, *flags): the folder of a run that is made once for all tests."""

    def run(name, *flags):
        folder = shared / name
        if not folder.exists():
            result = finetune(*flags, "--output_dir", folder)
            assert result.status == 0, result.err
            (folder / "stdout.txt").write_text(result.out)
        return folder

    return run


@pytest.fixture
def finished(once, small):
    return once("finished", *small, *"--model_ema true --model_ema_eval true --model_ema_decay 0.5".split())


@pytest.fixture
def everything(once, small, narrow):
    return once("everything", *small, *EVERYTHING)


def load(path):
    return torch.load(path, weights_only=True)


def table(path):
    """A CSV file's titles, names of the rows and values."""
    titles, *rows = csv.reader(path.read_text().splitlines())
    return titles, [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=float)


def build_classifier(state):
    model = convnextv2.ConvNeXtV2(num_classes=len(state["head.weight"]), **network_config(state))
    model.load_state_dict(state)
    return model.eval()


def predictions(state, folder, size=32):
    """Targets and predicted classes of val/, by Pillow and the model alone."""
    targets, images = [], []
    for path in sorted(folder.glob("val/*/*.png")):
        image = np.asarray(Image.open(path).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        images.append(torch.from_numpy((image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).permute(2, 0, 1))
        targets.append(CLASSES.index(path.parent.name))
    model = build_classifier(state)
    with torch.no_grad():
        return targets, model(torch.stack(images).float()).argmax(1).tolist()


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


# ---------------------------------------------------------------- what a run leaves


def test_log_txt_has_losses_and_accuracies_of_both_models(finished):
    lines = log_lines(finished)
    meters = {"loss", *(f"{meter}{k}" for meter in ("acc", "precision", "recall") for k in (1, 5))}
    tested = {f"test_{name}{what}" for name in meters for what in ("", "_ema")}
    trained = {"train_loss", "train_lr", "epoch", "n_parameters"}
    assert all(set(line) == trained | tested for line in lines)
    assert [line["epoch"] for line in lines] == [0, 1]
    n_parameters = sum(value.numel() for value in weights(finished, "checkpoint-1.pth").values())
    for line in lines:
        assert line["n_parameters"] == n_parameters and line["test_acc5"] == 100  # of three classes
        assert 0 <= line["test_acc1"] <= 100 and 0 < line["test_loss"] < 10 and 0 < line["train_loss"] < 10
    assert [line["train_lr"] for line in lines] == pytest.approx([0.8e-3, half_cosine(1e-3, 1e-6, 0.8)])


def test_checkpoints_name_the_classes_and_the_best_epoch(finished):
    assert sorted(path.name for path in finished.glob("*.pth")) == [
        "checkpoint-0.pth",
        "checkpoint-1.pth",
        "checkpoint-best-ema.pth",
        "checkpoint-best.pth",
        "encoder-best-ema.pth",
        "encoder-best.pth",
    ]
    last = load(finished / "checkpoint-1.pth")
    assert last["class_names"] == CLASSES and last["epoch"] == 2 and last["step"] == 0
    for what, name in (("", "checkpoint-best.pth"), ("_ema", "checkpoint-best-ema.pth")):
        accuracies = [line[f"test_acc1{what}"] for line in log_lines(finished)]
        best = accuracies.index(max(accuracies))  # the first of equals
        assert last["best"][f"test_acc1{what}"] == [accuracies[best], best, 1 - best]
        assert load(finished / name)["epoch"] == best + 1
        assert_same_weights(weights(finished, name), weights(finished, f"checkpoint-{best}.pth"))


def test_reports_agree_with_scikit_learn(finished, labelled_folder):
    last = load(finished / "checkpoint-1.pth")
    for what, state in (("", last["model"]), ("_ema", last["model_ema"])):
        targets, predicted = predictions(state, labelled_folder)
        titles, names, counts = table(finished / f"confusion{what}.csv")
        assert titles[1:] == names == CLASSES
        assert np.array_equal(counts, confusion_matrix(targets, predicted, labels=range(3)))
        titles, names, values = table(finished / f"per_class{what}.csv")
        assert titles == "class images precision1 recall1 precision5 recall5".split() and names == CLASSES
        options = dict(labels=range(3), zero_division=np.nan)
        precision, recall, _, images = precision_recall_fscore_support(targets, predicted, **options)
        np.testing.assert_allclose(values[:, :3], np.stack([images, precision, recall], axis=1), atol=5e-5)
        assert log_lines(finished)[1][f"test_acc1{what}"] == pytest.approx(100 * counts.trace() / 7)
        assert Image.open(finished / f"confusion{what}.png").width > 3 * 24


def test_tensorboard_holds_accuracies_and_the_confusion(finished):
    logged = events(finished)
    for name, key in (("test/acc1", "test_acc1"), ("test/acc1_ema", "test_acc1_ema"), ("test/loss", "test_loss")):
        scalars = logged.Scalars(name)
        assert [event.step for event in scalars] == [1000, 2000]
        assert [event.value for event in scalars] == pytest.approx([line[key] for line in log_lines(finished)])
    assert [event.step for event in logged.Images("confusion")] == [2000]
    assert [event.step for event in logged.Images("confusion_ema")] == [2000]


def test_the_console_reports_the_evaluations(finished):
    out, lines = (finished / "stdout.txt").read_text(), log_lines(finished)
    assert "convnextv2_atto, 3 classes: 0.0 M parameters" in out and "22 images, 5 steps of 4 an epoch" in out
    for line in lines:
        assert f"evaluation: top-1 {line['test_acc1']:.2f} %  top-5 100.00 %  loss {line['test_loss']:.4f}" in out
        assert f"EMA weights: top-1 {line['test_acc1_ema']:.2f} %" in out
    assert out.count("(7 images)") == 4


def test_without_evaluation_no_val_is_needed(small, finetune, labelled_folder, tmp_path):
    shutil.copytree(labelled_folder / "train", tmp_path / "data" / "train")
    flags = [*small, "--data_path", tmp_path / "data", "--epochs", 1, "--output_dir", tmp_path / "run"]
    assert finetune(*flags, "--disable_eval", "true").status == 0
    assert set(log_lines(tmp_path / "run")[0]) == {"train_loss", "train_lr", "epoch", "n_parameters"}
    files = [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("events")]
    assert sorted(files) == ["args.json", "checkpoint-0.pth", "log.txt", "run.lock"]


# ---------------------------------------------------------------- stop and resume


def assert_same(a, b, where=""):
    """Two checkpoints, or parts of them, bit for bit."""
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", ["checkpoint-0.pth", "checkpoint-0-4.pth", "checkpoint-1-2.pth"])
def test_resume_is_exact_with_everything_on(everything, small, finetune, tmp_path, name):
    shutil.copy(everything / name, tmp_path)
    result = finetune(*small, *EVERYTHING, "--output_dir", tmp_path)
    assert result.status == 0 and f"resuming from {tmp_path / name}" in result.out
    uninterrupted, resumed = (load(folder / "checkpoint-2.pth") for folder in (everything, tmp_path))
    assert {"model", "model_ema", "optimizer", "scaler", "best", "epoch_means"} < uninterrupted.keys()
    assert uninterrupted["scaler"]["_growth_tracker"] > 0
    for checkpoint in (uninterrupted, resumed):
        del checkpoint["args"]  # of another folder
    assert_same(resumed, uninterrupted)
    assert log_lines(tmp_path)[-2:] == log_lines(everything)[-2:]
    for best in tmp_path.glob("checkpoint-best*.pth"):
        assert_same(load(best)["model"], load(everything / best.name)["model"])


def test_the_best_accuracy_outlives_a_resume(finished, small, finetune, tmp_path):
    checkpoint = load(finished / "checkpoint-0.pth")
    checkpoint["best"] = {"test_acc1": [100.5, 0, 0]}  # not to be beaten
    torch.save(checkpoint, tmp_path / "checkpoint-0.pth")
    result = finetune(*small, "--output_dir", tmp_path)
    assert "best test_acc1 so far: 100.5, epoch 0" in result.out
    assert load(tmp_path / "checkpoint-1.pth")["best"] == {"test_acc1": [100.5, 0, 1]}
    assert not (tmp_path / "checkpoint-best.pth").exists()


def test_resume_takes_the_weight_decay_and_the_rate_of_now(finished, small, finetune, tmp_path):
    result = finetune(
        *small, "--weight_decay", 0.3, "--resume", finished / "checkpoint-0.pth", "--output_dir", tmp_path
    )
    assert "weight_decay 0.05 -> 0.3" in result.out
    groups = load(tmp_path / "checkpoint-1.pth")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]


def test_resume_takes_the_precision_and_the_momentum_of_now(finished, small, finetune, tmp_path):
    flags = ["--resume", finished / "checkpoint-0.pth", "--output_dir", tmp_path]
    flags += "--use_amp true --amp_dtype float16 --opt_betas 0.5 0.9".split()
    result = finetune(*small, *flags)
    assert result.status == 0 and "use_amp False -> True" in result.out and "opt_betas None -> [0.5, 0.9]" in result.out
    last = load(tmp_path / "checkpoint-1.pth")
    assert last["scaler"] and {group["betas"] for group in last["optimizer"]["param_groups"]} == {(0.5, 0.9)}


def test_averaging_starts_from_the_weights_of_a_run_without(finished, small, finetune, tmp_path):
    checkpoint = load(finished / "checkpoint-0.pth")
    del checkpoint["model_ema"]
    torch.save(checkpoint, tmp_path / "plain.pth")
    flags = ["--resume", tmp_path / "plain.pth", "--model_ema", "true", "--model_ema_decay", 1]
    result = finetune(*small, *flags, "--output_dir", tmp_path / "run")
    assert "has no EMA weights: the average starts from its weights" in result.out
    assert_same_weights(load(tmp_path / "run" / "checkpoint-1.pth")["model_ema"], checkpoint["model"])


# ---------------------------------------------------------------- numbers


@pytest.fixture
def steps(small, finetune, monkeypatch):
    """steps(*flags): loss and learning rate of each step of a run."""

    def run(*flags):
        seen = []
        monkeypatch.setattr(hooks.Console, "on_log", lambda _, run: seen.append((run.lap["loss"], run.lr)))
        result = finetune(*small, "--print_freq", 1, "--disable_eval", "true", *flags)
        assert result.status == 0, result.err
        return np.array(seen).T

    return run


def test_precisions_agree_over_20_steps(steps, narrow, monkeypatch):
    """An error of the relative size 2 ** -8 (bfloat16) or 2 ** -11 (float16) in logits of about 1."""
    # The default first scale would leave out some steps of float16
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**10))
    flags = "--epochs 4 --opt sgd --lr 0.003 --aa none --reprob 0".split()
    single, _ = steps(*flags)
    assert len(single) == 20 and single[10:].mean() < single[:10].mean() - 0.02  # it learns
    for dtype, tolerance in (("bfloat16", 2e-2), ("float16", 2.5e-3)):
        losses, _ = steps(*flags, "--use_amp", "true", "--amp_dtype", dtype)
        assert not np.array_equal(losses, single)
        assert not np.array_equal(torch.tensor(losses).to(getattr(torch, dtype)).double(), losses)  # a float32 loss
        np.testing.assert_allclose(losses, single, atol=tolerance)


@pytest.mark.parametrize("count", [3, 7])
def test_warmup_steps_are_optimizer_steps(steps, count):
    _, rates = steps("--warmup_steps", count, "--warmup_epochs", 20)
    assert rates[: count + 1] == pytest.approx([1e-3 * step / count for step in range(count + 1)])
    assert len(rates) == 10 and rates[count + 1] < 1e-3


@pytest.mark.parametrize("flags", ["--sched step --decay_epochs 1", "--sched multistep --decay_milestones 1"])
def test_rates_decay_at_the_epoch_that_is_told(steps, flags):
    _, rates = steps(*flags.split(), *"--warmup_epochs 0 --decay_rate 0.5".split())
    assert rates == pytest.approx(5 * [1e-3] + 5 * [5e-4])


def test_binary_cross_entropy_is_that_of_every_class_by_itself():
    logits, targets = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    for smoothing, low, high in ((0.0, 0.0, 1.0), (0.2, 0.04, 0.84)):
        truth = torch.full((4, 5), low).scatter(1, targets[:, None], high)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
        criterion = Classification("bce", range(5)).build_loss(smoothing)
        assert criterion(logits, targets).item() == pytest.approx(expected.item())


def final(finetune, flags, folder):
    """The last checkpoint of a run."""
    result = finetune(*flags, "--output_dir", folder)
    assert result.status == 0, result.err
    last = max(folder.glob("checkpoint-?.pth"))
    return load(last)


# ---------------------------------------------------------------- flags change what they say


@pytest.mark.parametrize(
    "before, flags",
    [
        ("", "--seed 1"),
        ("", "--lr 2e-3"),
        ("", "--min_lr 5e-4"),
        ("", "--warmup_epochs 1"),
        ("", "--warmup_steps 2"),
        ("", "--update_freq 3"),
        ("", "--drop_path 0.9"),
        ("", "--head_init_scale 0.5"),
        ("", "--layer_decay 0.5"),
        ("", "--weight_decay 0.5"),
        ("", "--weight_decay_end 0.5"),
        ("", "--clip_grad 0.1"),
        ("", "--clip_grad 0.1 --use_amp true"),
        ("", "--use_amp true"),
        ("--use_amp true", "--amp_dtype float16"),
        ("", "--opt sgd"),
        ("", "--opt lion"),
        ("--opt sgd", "--momentum 0.5"),
        ("", "--opt_betas 0.5 0.9"),
        ("", "--opt_eps 1e-3"),
        ("", "--sched linear"),
        ("--sched poly", "--poly_power 3"),
        ("", "--loss bce"),
        ("--loss bce", "--smoothing 0"),
        ("--loss bce", "--mixup 0.8"),
        ("", "--smoothing 0"),
        ("", "--mixup 0.8"),
        ("", "--cutmix 1"),
        ("--mixup 0.8", "--smoothing 0"),
        ("--cutmix 1", "--cutmix_minmax 0.2 0.4"),
        ("--mixup 0.8 --cutmix 1", "--mixup_prob 0.2"),
        ("--mixup 0.8 --cutmix 1", "--mixup_switch_prob 1"),
        ("--mixup 0.8 --cutmix 1", "--mixup_mode elem"),
        ("--mixup 0.8 --cutmix 1", "--mixup_mode pair"),
        ("", "--aa none"),
        ("", "--aa augmix-m5"),
        ("--aa none", "--color_jitter 0.4"),
        ("", "--hflip 1"),
        ("", "--vflip 1"),
        ("", "--reprob 1"),
        ("--reprob 1", "--remode const"),
        ("--reprob 1", "--remode rand"),
        ("--reprob 1", "--recount 4"),
        ("--input_size 48", "--train_interpolation bilinear"),
        ("--aa none", "--imagenet_default_mean_and_std false"),  # --aa fills with the mean
        ("", "--images_per_class 2"),
        ("--images_per_class 8", "--class_weights balanced"),
        ("--images_per_class 8 --loss bce", "--class_weights balanced"),
        ("", "--shuffle balanced"),
    ],
)
def test_flags_of_the_training_change_the_weights(once, brief, narrow, finetune, tmp_path, before, flags):
    original = weights(once(f"brief {before}", *brief, *before.split()), "checkpoint-0.pth")
    changed = final(finetune, [*brief, *before.split(), *flags.split()], tmp_path)["model"]
    assert changed.keys() == original.keys()
    assert any(not torch.equal(changed[name], original[name]) for name in original)


def test_blr_is_the_rate_for_256_images(brief, finetune, tmp_path):
    brief = [flag for flag in brief if flag not in ("--lr", "1e-3")]
    result = finetune(*brief, "--blr", 0.064, "--update_freq", 3)
    assert "peak learning rate 3.00e-03" in result.out


def distance(a, b):
    return sum((a[name] - b[name]).double().square().sum() for name in a).sqrt().item()


GRADIENT_DESCENT = "--images_per_class 1 --batch_size 3 --opt momentum --momentum 0 --weight_decay 0".split()


@pytest.fixture
def descend(brief, narrow, finetune, tmp_path):
    """descend(steps, rate, *flags): checkpoint after steps of plain gradient descent; at rate 0 as it began."""

    def run(steps, rate, *flags):
        folder = tmp_path / f"{steps} {rate} {flags}"
        rates = ["--lr", rate, "--min_lr", rate]
        return final(finetune, [*brief, *GRADIENT_DESCENT, *flags, *rates, "--epochs", steps], folder)

    return run


@pytest.mark.parametrize("amp", ["", "--use_amp true --amp_dtype float16"], ids=["float32", "float16"])
def test_clip_grad_bounds_the_norm_of_the_gradient(descend, amp):
    """In float16 the scaler may leave out the first step."""
    flags = ["--clip_grad", 1e-2, "--head_init_scale", 0.001, *amp.split()]
    before, after = descend(2, 0, *flags), descend(2, 1, *flags)
    assert 0.9e-2 < distance(before["model"], after["model"]) <= 2.02e-2


def test_averaged_weights_follow_by_their_decay(descend):
    flags = "--model_ema true --model_ema_decay 0.75".split()
    before, after = descend(1, 0, *flags), descend(1, 1, *flags)
    assert distance(before["model"], after["model"]) > 0.1
    for name, value in after["model_ema"].items():
        expected = 0.75 * before["model"][name] + 0.25 * after["model"][name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)


def test_head_init_scale_scales_a_new_head(descend):
    whole, scaled = (descend(1, 0, "--head_init_scale", scale)["model"] for scale in (1, 0.001))
    torch.testing.assert_close(scaled["head.weight"], whole["head.weight"] * 0.001)
    assert whole["head.weight"].any() and torch.equal(
        scaled["stages.0.0.dwconv.weight"], whole["stages.0.0.dwconv.weight"]
    )


def test_weight_decay_ends_where_it_should_and_spares_norms(brief, finetune, tmp_path):
    flags = [*brief, "--weight_decay", 0.1, "--weight_decay_end", 0.5]
    groups = final(finetune, flags, tmp_path)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups if not group["decays"]} == {0.0}
    decay = [group["weight_decay"] for group in groups if group["decays"]]
    assert decay == [pytest.approx(half_cosine(0.1, 0.5, 2 / 3))]  # of the last of three steps


def test_layer_decay_scales_the_rate_of_each_layer(brief, finetune, tmp_path):
    checkpoint = final(finetune, [*brief, "--layer_decay", 0.5], tmp_path)
    model = convnextv2.convnextv2_atto(num_classes=3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = get_parameter_groups(model, 0.05, (), lambda name: get_num_layer_for_convnext_single(name, model.depths))
    rate, scales = log_lines(tmp_path)[0]["train_lr"], {}
    for group, saved in zip(own, checkpoint["optimizer"]["param_groups"], strict=True):
        assert saved["lr"] == pytest.approx(rate * saved["lr_scale"])
        scales |= {names[id(parameter)]: saved["lr_scale"] for parameter in group["params"]}
    assert scales["head.weight"] == scales["norm.bias"] == 1
    assert scales["stages.3.0.dwconv.weight"] == 0.5 and scales["stages.2.1.dwconv.weight"] == 0.25  # depths 1, 1, 2, 1
    assert scales["downsample_layers.0.0.weight"] == scales["stages.0.0.norm.weight"] == 0.5**5


def test_compile_device_and_precision_reach_the_model(small, narrow, finetune, monkeypatch):
    compiled, dtypes, devices = [], set(), []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    average = timm.utils.ModelEmaV3
    monkeypatch.setattr(
        timm.utils, "ModelEmaV3", lambda *args, device: devices.append(device) or average(*args, device=device)
    )
    forward = convnextv2.ConvNeXtV2.forward

    def note_type(model, imgs, **kwargs):
        logits = forward(model, imgs, **kwargs)
        if not imgs.is_meta:  # whose cost is counted
            dtypes.add(logits.dtype)
        return logits

    monkeypatch.setattr(convnextv2.ConvNeXtV2, "forward", note_type)
    ema = "--model_ema true --model_ema_eval true --model_ema_force_cpu true".split()
    result = finetune(
        *small, *ema, *"--epochs 1 --use_amp true --amp_dtype float16 --compile --grad_checkpointing".split()
    )
    assert result.status == 0 and len(compiled) == 1 and dtypes == {torch.float16} and devices == ["cpu"]
    assert compiled[0].stages[0].grad_checkpointing


def test_nb_classes_is_checked(brief, finetune):
    assert finetune(*brief, "--nb_classes", 3).status == 0
    assert finetune(*brief, "--nb_classes", 1000).status == 2


def test_sizes_channels_and_stems_change_the_model(small, finetune, tmp_path):
    flags = [*small, *"--epochs 1 --input_size 32 48 --in_chans 1 --stem_stride 2 --batch_size 11".split()]
    state = final(finetune, flags, tmp_path)["model"]
    assert state["downsample_layers.0.0.weight"].shape == (8, 1, 2, 2) and state["head.weight"].shape == (3, 32)


def test_channels_of_any_number_come_from_arrays(small, finetune, tmp_path):
    for number in range(8):
        path = tmp_path / ("train", "val")[number % 2] / f"class{number // 2 % 2}" / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(number).integers(0, 256, (40, 36, 5), dtype=np.uint8))
    result = finetune(*small, "--data_path", tmp_path, "--in_chans", 5, "--aa", "none", "--epochs", 1)
    assert result.status == 0 and "(2 classes" not in result.err and "(4 images)" in result.out


# ---------------------------------------------------------------- --finetune


@pytest.fixture
def pretrained(shared, narrow, pretrain, labelled_folder):
    """A checkpoint of pre-training; made once."""
    path = shared / "pretrained" / "checkpoint-0.pth"
    if not path.exists():
        flags = [*TINY, *"--input_size 64 --decoder_embed_dim 16 --batch_size 11 --epochs 1".split()]
        result = pretrain(*flags, "--data_path", labelled_folder, "--output_dir", path.parent)
        assert result.status == 0, result.err
    return path


@pytest.fixture
def untrained(brief):
    """A run that leaves the weights as they are."""
    return [*brief, "--lr", 0, "--min_lr", 0]


def test_finetune_starts_from_the_encoder(pretrained, untrained, finetune, tmp_path):
    result = finetune(*untrained, "--finetune", pretrained, "--output_dir", tmp_path)
    assert re.search(r"left out \d+ tensors of the pre-training's decoder", result.out)
    assert "newly initialized: norm and head" in result.out
    started = weights(tmp_path, "checkpoint-0.pth")
    encoder = {
        name.removeprefix("encoder."): value
        for name, value in load(pretrained)["model"].items()
        if name.startswith("encoder.")
    }
    assert set(started) - set(encoder) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert_same_weights({name: started[name] for name in encoder}, encoder)


def test_finetune_keeps_a_head_of_as_many_classes_only(finished, untrained, finetune, labelled_folder, tmp_path):
    start = finished / "checkpoint-1.pth"
    same = final(finetune, [*untrained, "--finetune", start], tmp_path / "same")["model"]
    assert_same_weights(same, load(start)["model"])
    two = tmp_path / "data"
    shutil.copytree(labelled_folder, two, ignore=shutil.ignore_patterns("bee"))
    result = finetune(*untrained, "--data_path", two, "--finetune", start, "--output_dir", tmp_path / "two")
    assert "left out the head: it has 3 classes, not 2" in result.out and "newly initialized: head" in result.out
    other = weights(tmp_path / "two", "checkpoint-0.pth")
    assert other["head.weight"].shape == (2, 32) and torch.equal(other["norm.weight"], same["norm.weight"])


def test_finetune_averages_the_stem_for_grey_images(pretrained, untrained, finetune, tmp_path):
    result = finetune(*untrained, "--in_chans", 1, "--finetune", pretrained, "--output_dir", tmp_path)
    assert "the stem's 3 channels were averaged into 1" in result.out
    stem = weights(tmp_path, "checkpoint-0.pth")["downsample_layers.0.0.weight"]
    before = load(pretrained)["model"]["encoder.downsample_layers.0.0.weight"]
    torch.testing.assert_close(stem, before.sum(1, keepdim=True))  # the same answer to a grey picture


def test_finetune_finds_weights_under_any_key_and_prefix(finished, untrained, finetune, tmp_path):
    state = load(finished / "checkpoint-1.pth")["model"]
    torch.save({"net": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "other.pth")
    flags = ["--finetune", tmp_path / "other.pth", "--model_key", "ema|net", "--model_prefix", "backbone."]
    assert_same_weights(final(finetune, [*untrained, *flags], tmp_path / "run")["model"], state)


def test_finetune_does_not_matter_once_the_run_has_a_checkpoint(finished, small, finetune, tmp_path):
    shutil.copy(finished / "checkpoint-0.pth", tmp_path)
    result = finetune(*small, "--finetune", finished / "checkpoint-1.pth", "--output_dir", tmp_path)
    assert "resuming from" in result.out
    assert_same_weights(weights(tmp_path, "checkpoint-1.pth"), weights(finished, "checkpoint-1.pth"))


@pytest.mark.parametrize("flags", ["--finetune", "--resume", "--eval true --resume"])
def test_weights_of_blocks_with_other_options_are_refused(finished, small, finetune, tmp_path, flags):
    checkpoint = load(finished / "checkpoint-1.pth")
    checkpoint["config"]["activation"] = "relu"  # leaves no trace in the weights
    torch.save(checkpoint, tmp_path / "other.pth")
    result = finetune(*small, *flags.split(), tmp_path / "other.pth")
    assert result.status == 2 and "other.pth: a network with options {'activation': 'relu'}, not {}" in result.err


def test_weights_of_another_size_name_the_flag_that_fits_them(small, finetune, tmp_path):
    atto = convnextv2.ConvNeXtV2(num_classes=3, **convnextv2.SIZES["convnextv2_atto"])
    torch.save({"model": atto.state_dict()}, tmp_path / "atto.pth")
    result = finetune(*small, "--model", "convnextv2_nano", "--finetune", tmp_path / "atto.pth")
    assert result.status == 2 and "has the weights of convnextv2_atto: give --model convnextv2_atto" in result.err


# ---------------------------------------------------------------- --eval


@pytest.fixture
def evaluations(monkeypatch):
    """The `Evaluation`s that are made."""
    made = []
    evaluate = main_finetune.evaluate
    monkeypatch.setattr(main_finetune, "evaluate", lambda *args: made.append(evaluate(*args)) or made[-1])
    return made


def test_eval_repeats_what_training_logged_without_its_images(
    finished, finetune, labelled_folder, tmp_path, evaluations
):
    shutil.copytree(labelled_folder / "val", tmp_path / "val")
    flags = [*TINY, "--data_path", tmp_path, "--batch_size", 4, "--eval", "true"]
    lines = log_lines(finished)
    for epoch, ema in ((0, ""), (1, ""), (1, "_ema")):
        checkpoint = finished / f"checkpoint-{epoch}.pth"
        result = finetune(*flags, "--resume", checkpoint, "--model_ema_eval", "true" if ema else "false")
        assert result.status == 0, result.err
        assert evaluations[-1].accuracy(1) == lines[epoch][f"test_acc1{ema}"]
        assert evaluations[-1].loss == lines[epoch][f"test_loss{ema}"]
        title = "EMA weights" if ema else "evaluation"
        assert f"{title}: top-1 {lines[epoch][f'test_acc1{ema}']:.2f} %" in result.out and "best" not in result.out


def test_eval_takes_the_newest_checkpoint_of_the_output_folder(finished, small, finetune, tmp_path, evaluations):
    for name in ("checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-best.pth"):
        shutil.copy(finished / name, tmp_path)
    assert finetune(*small, "--eval", "true", "--output_dir", tmp_path).status == 0
    assert evaluations[0].loss == log_lines(finished)[1]["test_loss"]


def test_eval_takes_what_the_command_line_leaves_open_from_the_checkpoint(finetune, labelled_folder, tmp_path):
    """An image size, crop or statistics of its own would give another accuracy without a word."""
    training = "--model convnextv2_femto --input_size 40 48 --crop_pct 0.8 --in_chans 1 --stem_stride 1 --aa none "
    training += "--imagenet_default_mean_and_std false --batch_size 4 --epochs 1 --warmup_epochs 0 --head_init_scale 1"
    common = ["--data_path", labelled_folder, "--output_dir", tmp_path, *"--device cpu --num_workers 0".split()]
    assert finetune(*common, *training.split()).status == 0
    result = finetune(*common, "--eval", "true")
    assert result.status == 0, result.err
    assert f"loss {log_lines(tmp_path)[0]['test_loss']:.4f}" in result.out and "NOTE" not in result.out

    result = finetune(*common, *"--eval true --input_size 32 --crop_pct 0.8".split())
    assert "NOTE: --input_size (32, 32) differs from the training" in result.out and "crop_pct" not in result.out
    result = finetune(*common, *"--eval true --model convnextv2_atto".split())
    assert result.status == 2 and "has convnextv2_femto; leave the flag out" in result.err
    result = finetune(*common, *"--eval true --min_lr 1 --batch_size 3 --mixup 1".split())  # flags of the training
    assert result.status == 0


def test_eval_writes_its_reports_and_nothing_else(finished, small, finetune, tmp_path):
    result = finetune(*small, "--eval", "true", "--resume", finished / "checkpoint-1.pth", "--output_dir", tmp_path)
    assert result.status == 0
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events")}
    assert names == {"confusion.csv", "confusion.png", "per_class.csv"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_eval_honours_the_precision(finished, small, finetune, evaluations):
    flags = [*small, "--eval", "true", "--resume", finished / "checkpoint-1.pth"]
    for more in ("", "--use_amp true", "--use_amp true --amp_dtype float16"):
        assert finetune(*flags, *more.split()).status == 0
    single, brain, half = (evaluation.loss for evaluation in evaluations)
    assert 0 < abs(half - single) < 2e-3 and 0 < abs(brain - single) < 2e-2


def test_eval_honours_crop_and_statistics_and_drops_no_path(finished, small, finetune, evaluations):
    flags = [*small, "--eval", "true", "--resume", finished / "checkpoint-1.pth"]
    for more in ("", "--crop_pct 0.5", "--imagenet_default_mean_and_std false", "--drop_path 0.9"):
        assert finetune(*flags, *more.split()).status == 0
    losses = [evaluation.loss for evaluation in evaluations]
    assert len(set(losses)) == 3 and losses[3] == losses[0]


def test_eval_size_and_topk(finished, small, finetune, labelled_folder, evaluations):
    """Windows of 1 x 1 site, as training images of 32 pixels have, of 2 x 3."""
    flags = [*small, "--eval", "true", "--resume", finished / "checkpoint-1.pth"]
    for more in ("--eval_size 32", "--eval_size 64 96 --topk 2"):
        assert finetune(*flags, *more.split()).status == 0
    same, larger = evaluations
    assert same.loss == pytest.approx(log_lines(finished)[1]["test_loss"], rel=1e-5)
    assert larger.topk == [1, 2] and larger.answers.shape == (7, 2)
    model = build_classifier(weights(finished, "checkpoint-1.pth"))
    imgs = []
    for path in sorted(labelled_folder.glob("val/*/*.png")):  # 0.875 of 73 x 109 pixels is cut out
        imgs.append(eval_transform((64, 96))(Image.open(path)))
    with torch.no_grad():
        logits = model.head(model.norm(model.forward_trunk(torch.stack(imgs)).permute(0, 2, 3, 1))).mean((1, 2))
    expected = torch.nn.functional.cross_entropy(logits, larger.targets).item()
    assert larger.loss == pytest.approx(expected, rel=1e-5)


def eval_transform(size):
    """timm's, at a size."""
    return create_transform((3, *size), interpolation="bicubic", crop_pct=0.875)


def test_evaluation_is_in_the_order_of_the_set(narrow):
    """However the loader, or the processes, divided it."""
    model = convnextv2.convnextv2_atto(num_classes=3)
    imgs = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([2, 0, 1, 1, 0])
    parts = [torch.tensor(part) for part in ([3, 1], [4], [0, 2])]
    loader = [LabelledBatch(imgs[part], targets[part], part, []) for part in parts]
    args = main_finetune.get_args_parser().parse_args(["--device", "cpu"])
    evaluation = main_finetune.evaluate(model, loader, Classification("ce", CLASSES), args)
    assert evaluation.targets.tolist() == targets.tolist() and evaluation.accuracy(5) == 100
    with torch.no_grad():
        logits = model.eval()(normalize(imgs))
    assert evaluation.answers[:, 0].tolist() == logits.argmax(1).tolist()
    assert evaluation.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_eval_reads_weights_of_other_programs(finished, small, finetune, tmp_path, evaluations):
    torch.save(load(finished / "checkpoint-1.pth")["model"], tmp_path / "raw.pth")
    assert finetune(*small, "--eval", "true", "--resume", tmp_path / "raw.pth").status == 0
    assert evaluations[0].loss == log_lines(finished)[1]["test_loss"]


def test_any_number_of_processes_evaluates_every_image_once(finetune, tmp_path, evaluations):
    """The 359 digits held out, of which 3 processes do not take equally many."""
    torch.manual_seed(0)
    model = convnextv2.convnextv2_atto(in_chans=1, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "random.pth")
    flags = [*TINY, *"--in_chans 1 --data_set DIGITS --eval true --batch_size 50".split()]
    flags += ["--resume", tmp_path / "random.pth", "--output_dir"]
    three = start_ranks(main_finetune, *flags, tmp_path / "3", ranks=3)
    printed = [finetune(*flags, tmp_path / "1").out, finish(three[0])]
    _, _, counts = table(tmp_path / "1" / "confusion.csv")
    assert counts.sum() == 359 and (counts.sum(0) > 0).sum() > 1  # not all the same class
    pattern = r"evaluation: top-1 ([\d.]+) %  top-5 ([\d.]+) %  loss ([\d.]+)  \(359 images\)"
    results = [re.findall(pattern, out) for out in printed]
    assert results[0] == results[1] and len(results[0]) == 1
    for name in ("confusion.csv", "per_class.csv"):
        assert len({(tmp_path / run / name).read_bytes() for run in "13"}) == 1
    logged = events(tmp_path / "3")
    assert logged.Scalars("test/loss")[0].value == pytest.approx(evaluations[0].loss, rel=1e-6)
    assert len(logged.Images("confusion")) == 1  # which is written last


# ---------------------------------------------------------------- command lines of the original


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            "--model convnextv2_base --eval true --resume /path/to/checkpoint --input_size 224 --data_path /path",
            {"model": "convnextv2_base", "eval": True, "resume": "/path/to/checkpoint", "batch_size": 64},
        ),
        (
            "--model convnextv2_base --batch_size 32 --update_freq 4 --blr 6.25e-4 --epochs 100 --warmup_epochs 20 "
            "--layer_decay_type 'group' --layer_decay 0.6 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 "
            "--mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True --model_ema_eval True --use_amp True "
            "--data_path /path --output_dir /results --finetune /path/to/checkpoint",
            {"layer_decay_type": "group", "layer_decay": 0.6, "blr": 6.25e-4, "model_ema": True, "use_amp": True},
        ),
        (
            "--model convnextv2_huge --batch_size 32 --input_size 512 --update_freq 4 --lr 4e-5 --epochs 30 "
            "--warmup_steps -1 --local-rank 3 --nb_classes 1000 --data_set image_folder --eval_data_path /val "
            "--opt_betas 0.9 0.999 --clip_grad 3 --dist_eval true --disable_eval false --model_key 'model|module'",
            {"local_rank": 3, "nb_classes": 1000, "opt_betas": [0.9, 0.999], "warmup_steps": -1, "clip_grad": 3.0},
        ),
    ],
)
def test_command_lines_of_the_original_are_read(line, expected):
    args = vars(main_finetune.get_args_parser().parse_args(shlex.split(line)))
    assert {name: args[name] for name in expected} == expected


def test_a_command_line_of_the_original_runs(pretrained, finetune, labelled_folder, tmp_path):
    line = (
        "--model convnextv2_atto --batch_size 2 --update_freq 4 --blr 6.25e-4 --epochs 1 --warmup_epochs 0 "
        "--layer_decay_type single --layer_decay 0.6 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 "
        "--cutmix 1.0 --smoothing 0.1 --model_ema True --model_ema_eval True --use_amp True --input_size 32 "
        f"--data_path {labelled_folder} --output_dir {tmp_path} --finetune {pretrained} --device cpu"
    )
    result = finetune(*shlex.split(line))
    assert result.status == 0 and "EMA weights: top-1" in result.out, result.err


# ---------------------------------------------------------------- trouble on the way


def test_unreadable_images_are_named_and_counted(small, finetune, labelled_folder, tmp_path):
    shutil.copytree(labelled_folder, tmp_path / "data")
    for name in ("train/bee/01.png", "val/cat/02.png"):
        path = tmp_path / "data" / name
        path.write_bytes(path.read_bytes()[:100])
    flags = [*small, "--data_path", tmp_path / "data", "--batch_size", 22, "--output_dir", tmp_path / "run"]
    result = finetune(*flags)
    assert result.status == 0 and "22 images, 1 step of 22 an epoch" in result.out
    for name in ("train/bee/01.png", "val/cat/02.png"):
        assert result.out.count(f"left out: {tmp_path / 'data' / name}") == 1  # once, not once an epoch
    assert result.out.count("(6 images, 1 unreadable left out)") == 2
    _, _, counts = table(tmp_path / "run" / "confusion.csv")
    assert counts.sum(1).tolist() == [3, 2, 1]
    result = finetune(*flags, "--output_dir", tmp_path / "other", "--max_bad_images", 1)
    assert result.status == 2 and "2 images could not be read, --max_bad_images is 1" in result.err


def test_the_accuracy_rises(finetune, narrow, tmp_path):
    """Three epochs over 20 of each of the digits."""
    flags = "--data_set DIGITS --in_chans 1 --images_per_class 20 --aa none --hflip 0 --reprob 0".split()
    flags += "--batch_size 20 --epochs 3 --warmup_epochs 1 --lr 5e-3 --head_init_scale 1".split()
    assert finetune(*TINY, *flags, "--output_dir", tmp_path).status == 0
    assert log_lines(tmp_path)[-1]["test_acc1"] > 45


def test_help_shows_groups_and_every_default(finetune):
    text = finetune("--help").out
    assert "augmentation:" in text and "evaluation:" in text
    flags = text.split("\n  --")[1:]
    assert len(flags) > 70 and all("default:" in " ".join(flag.split()) for flag in flags)


def test_the_pixel_range_of_a_training_is_that_of_its_evaluation_and_tools(
    narrow, finetune, tmp_path, capsys, evaluations, monkeypatch
):
    """12 bits in 16-bit files, which cannot be read without it."""
    rng = np.random.default_rng(0)
    for number in range(8):
        path = tmp_path / "images" / ("train", "val")[number % 2] / ("ant", "bee")[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 4096, (40, 40), dtype=np.uint16)).save(path)
    small = [*TINY, "--data_path", tmp_path / "images", "--batch_size", 2, "--output_dir", tmp_path / "out"]
    brief = [*small, *"--warmup_epochs 0 --epochs 1 --aa none".split()]
    assert "such as --pixel_range 0 4095" in finetune(*brief).err
    assert finetune(*brief, "--pixel_range", 0, 4095).status == 0
    checkpoint = tmp_path / "out" / "checkpoint-0.pth"
    assert torch.load(checkpoint, weights_only=True)["args"]["pixel_range"] == [0, 4095]
    assert finetune(*small, "--eval", "--resume", checkpoint).status == 0
    assert finetune(*small, "--eval", "--resume", checkpoint, "--pixel_range", 0, 8191).status == 0
    trained, same, other = (evaluation.loss for evaluation in evaluations)
    assert trained == same != other
    from tools import predict

    predict.main(predict.get_args_parser().parse_args(["--checkpoint", str(checkpoint), str(path)]))
    assert f"{path}: " in capsys.readouterr().out
    again = [*brief[:-2], "--output_dir", tmp_path / "again", "--finetune", checkpoint, "--pixel_range", 0, 9999]
    assert "trained with --pixel_range 0 4095, which this run does not give" in finetune(*again).out


@pytest.fixture
def normalized_by(monkeypatch):
    """The (mean, std) by which images have been normalized since it was cleared."""
    used, statistics_on = set(), images.statistics_on
    monkeypatch.setattr(
        images, "statistics_on", lambda device, values: used.add(values) or statistics_on(device, values)
    )
    return used


def test_the_statistics_of_a_training_are_those_of_all_that_follows(
    narrow, pretrain, finetune, tmp_path, capsys, normalized_by
):
    """Pictures, probes, fine-tuning, its evaluation and the tools; a flag that differs is reported."""
    from tools import predict, probe, reconstruct

    rng, data = np.random.default_rng(0), tmp_path / "images"
    for number in range(8):
        path = data / ("train", "val")[number % 2] / ("ant", "bee")[number // 4] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.integers(0, 256, (36, 36, 2), dtype=np.uint8))
    common = ["--data_path", data, *"--in_chans 2 --batch_size 2 --epochs 1 --warmup_epochs 0".split()]
    own, tmp = "--mean 0.5 0.4 --std 0.2 0.3".split(), tmp_path
    more = ["--probe_freq", 1, "--probe_data_path", data, "--output_dir", tmp / "a", *own]

    def used():
        found = set(normalized_by)
        normalized_by.clear()
        return found

    assert pretrain(*SMALL, *common, *more).status == 0
    assert used() == {((0.5, 0.4), (0.2, 0.3))}
    start = ["--aa", "none", "--finetune", tmp / "a" / "checkpoint-0.pth"]
    result = finetune(*TINY, "--stem_stride", 1, *common, *start, "--output_dir", tmp / "b")
    assert result.status == 0 and "--mean 0.5 0.4 --std 0.2 0.3, as in the training of" in result.out
    evaluation = [*TINY, "--data_path", data, "--eval", "--resume", tmp / "b" / "checkpoint-0.pth"]
    assert "NOTE" not in finetune(*evaluation).out
    for tool, flags in (
        (predict, ["--checkpoint", tmp / "b" / "checkpoint-0.pth", path, "--num_workers", 0]),
        (probe, ["--checkpoint", tmp / "b" / "checkpoint-0.pth", "--data_path", data, "--num_workers", 0]),
        (reconstruct, ["--checkpoint", tmp / "a" / "checkpoint-0.pth", "--images", path, "--output", tmp / "a.png"]),
    ):
        tool.main(tool.get_args_parser().parse_args([*map(str, flags)]))
        assert used() == {((0.5, 0.4), (0.2, 0.3))}, tool
    capsys.readouterr()

    note = "NOTE: --mean 0.5 0.4 --std 0.1 0.1 differs from the training of"
    other = "--mean 0.5 0.4 --std 0.1 0.1".split()
    for command in (evaluation, [*TINY, *common, *start, "--stem_stride", 1]):
        result = finetune(*command, *other)
        assert result.status == 0 and note in result.out and used() == {((0.5, 0.4), (0.1, 0.1))}
    assert "NOTE: --mean 0.449" in finetune(*evaluation, "--imagenet_default_mean_and_std").out
    result = finetune(*TINY, *common, *start, "--in_chans", 5)
    assert result.status == 2 and "its mean and std are of 2 channels, and not used" in result.out
