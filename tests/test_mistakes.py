"""Mistakes that people make end with one line that names what was given and what is accepted, and status 2."""

import shutil

import pytest
import torch
from conftest import SMALL, TINY

DIGITS = [*SMALL, "--data_set", "DIGITS"]


def assert_one_clear_line(result, *words):
    assert result.status == 2
    lines = result.err.strip().splitlines()
    assert lines[-1].startswith(("main_pretrain.py: error: ", "main_finetune.py: error: "))
    assert "Traceback" not in result.err + result.out
    assert len(lines) == 1
    for word in words:
        assert str(word) in lines[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--input_size 225", ["225", "multiples of 8"]),
        ("--input_size 32 36", ["32 36", "multiples of 8"]),
        ("--input_size 0", ["--input_size 0"]),
        ("--input_size 32 32 32", ["one or two"]),
        ("--model convnextv2_atom", ["convnextv2_atom", "convnextv2_atto", "convnextv2_huge"]),
        ("--mask_ratio 0", ["--mask_ratio 0"]),
        ("--mask_ratio 1", ["--mask_ratio 1"]),
        ("--mask_ratio 1.5", ["--mask_ratio 1.5", "between 0 and 1"]),
        ("--mask_ratio -0.5", ["--mask_ratio -0.5"]),
        ("--mask_ratio nan", ["--mask_ratio nan"]),
        ("--scale 0.8 0.2", ["--scale 0.8 0.2", "the smaller first"]),
        ("--scale 0 1", ["--scale 0.0 1.0", "above 0"]),
        ("--hflip 2", ["--hflip 2", "from 0 to 1"]),
        ("--vflip -1", ["--vflip -1", "from 0 to 1"]),
        ("--lr nan", ["--lr nan"]),
        ("--blr -1", ["--blr -1"]),
        ("--weight_decay inf", ["--weight_decay inf"]),
        ("--min_lr 1 --lr 1e-4", ["--min_lr 1.0", "0.0001"]),
        ("--seed -1", ["--seed -1"]),
        ("--seed 99999999999999999999", ["--seed 99999999999999999999"]),
        ("--start_epoch 900", ["--start_epoch 900", "--epochs 800"]),
        ("--device gpu", ["--device gpu", "cpu, cuda"]),
        ("--dist_on_itp true", ["--dist_on_itp true", "mpirun"]),
        ("--log_dir /dev/null/run", ["/dev/null/run", "cannot be written"]),
        ("--batch_size 0", ["--batch_size 0", "at least 1"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--warmup_epochs -1", ["--warmup_epochs -1"]),
        ("--batch_size 2000", ["1438 images", "2000"]),
        ("--batch_size 800 --update_freq 2", ["1600", "--update_freq 2"]),
        ("--in_chans 5", ["--in_chans 5", "1, 3, 4"]),
        ("--in_chans 0", ["--in_chans 0"]),
        ("--stem_stride 3", ["3", "1, 2, 4"]),
        ("--device cuda", ["--device cuda", "no CUDA GPU"]),
        ("--epoch 3", ["unrecognized arguments: --epoch 3"]),
        ("--epochs three", ["--epochs", "three"]),
        ("--use_amp maybe", ["--use_amp maybe: must be true or false"]),
        ("--amp_dtype float8", ["float8", "bfloat16"]),
        ("--data_set IMAGENET", ["IMAGENET", "DIGITS"]),
        ("--resume /no/such.pth", ["/no/such.pth", "No such file"]),
        ("--output_dir /dev/null/run", ["/dev/null/run", "cannot be written"]),
        ("@/no/such.args", ["/no/such.args", "No such file"]),
        ("--data_set DIGITS --data_path .", ["--data_path .", "DIGITS needs none"]),
        ("--world_size 8", ["--world_size 8", "no launcher", "torchrun"]),
        ("--clip_grad 0", ["--clip_grad 0", "above 0"]),
        ("--decay_rate 1e9", ["--decay_rate 1e9", "at most 1"]),
        ("--decay_milestones -1", ["--decay_milestones", "-1"]),
        ("--input_size 1000000000", ["--input_size 1000000000", "at most"]),
        ("--decoder_depth 1000000000", ["--decoder_depth 1000000000", "at most"]),
        ("--repeated_sampling 3", ["--repeated_sampling 3", "divide --batch_size"]),
        ("--repeated_sampling 0", ["--repeated_sampling 0", "at least 1"]),
        ("--sched multistep", ["--decay_milestones None", "multistep"]),
        ("--decay_milestones 5 3", ["--decay_milestones 5 3"]),
        ("--decay_rate 0", ["--decay_rate 0"]),
        ("--poly_power -1", ["--poly_power -1"]),
        ("--decay_epochs 0", ["--decay_epochs 0", "at least 1"]),
        ("--profile_steps 5:3", ["--profile_steps", "'5:3'", "A:B"]),
        ("--profile_steps 3:5", ["--profile_steps 3:5", "--output_dir"]),
        ("--watch probe_knn", ["--watch probe_knn", "train_loss"]),
        ("--probe_freq 1 --data_set image_folder --data_path .", ["--probe_freq 1", "--probe_data_path", "or DIGITS"]),
        ("--probe_freq 1 --probe_data_path DIGITS --watch acc", ["--watch acc", "train_loss, probe_knn, probe_linear"]),
        ("--early_stop 3", ["--early_stop 3", "--watch"]),
        ("--early_stop -1", ["--early_stop -1"]),
        ("--probe_freq -1", ["--probe_freq -1"]),
        ("--probe_images_per_class -1", ["--probe_images_per_class -1"]),
        ("--probe_freq 1 --probe_data_path /no/such", ["/no/such", "no such folder"]),
    ],
)
def test_wrong_flags(pretrain, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert_one_clear_line(pretrain(*DIGITS, *flags.split()), *words)


def test_no_data_path(pretrain):
    assert_one_clear_line(pretrain(*SMALL), "--data_path", "DIGITS")
    assert_one_clear_line(pretrain(*SMALL, "--data_path", ""), "--data_path", "DIGITS")


def test_no_such_folder(pretrain, tmp_path):
    assert_one_clear_line(pretrain(*SMALL, "--data_path", tmp_path / "none"), tmp_path / "none", "no such folder")


def test_a_file_for_a_folder(pretrain, image_folder):
    path = next(image_folder.glob("*/*.png"))
    assert_one_clear_line(pretrain(*SMALL, "--data_path", path), path, "not a folder")


def test_empty_folder(pretrain, tmp_path):
    assert_one_clear_line(pretrain(*SMALL, "--data_path", tmp_path), tmp_path, "no image there")


def test_folder_of_text_files(pretrain, tmp_path):
    (tmp_path / "a.txt").write_text("not an image")
    assert_one_clear_line(pretrain(*SMALL, "--data_path", tmp_path), tmp_path, "no image there")


def test_nothing_but_unreadable_images(pretrain, tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_text("not an image")
    result = pretrain(*SMALL, "--data_path", tmp_path, "--batch_size", 2)
    assert_one_clear_line(result, "none of the first 4 images can be read", "a.jpg")


def test_resume_of_a_text_file(pretrain, tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("not a checkpoint")
    assert_one_clear_line(pretrain(*DIGITS, "--resume", path), path, "not a whole checkpoint")


def test_resume_of_a_folder(pretrain, tmp_path):
    assert_one_clear_line(pretrain(*DIGITS, "--resume", tmp_path), tmp_path)


def test_resume_of_a_truncated_checkpoint(pretrain, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"model": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    assert_one_clear_line(pretrain(*DIGITS, "--resume", path), path, "not a whole checkpoint")


def test_resume_of_something_else(pretrain, tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    assert_one_clear_line(pretrain(*DIGITS, "--resume", path), path, "list", "dict of weights")


@pytest.mark.parametrize("content", [{"model": [1]}, {1: torch.zeros(1)}, {"a.bias": 3}])
def test_resume_of_a_dict_without_weights(pretrain, tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    assert_one_clear_line(pretrain(*DIGITS, "--resume", tmp_path / "odd.pth"), "odd.pth", "holds no weights")


def test_resume_of_another_model(pretrain, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"conv.weight": torch.zeros(3, 3)}, "optimizer": {}}, path)
    assert_one_clear_line(pretrain(*DIGITS, "--resume", path), path, "another model", "conv.weight")


def test_a_folder_with_checkpoints_is_not_overwritten(pretrain, tmp_path):
    torch.save({}, tmp_path / "checkpoint-3.pth")
    result = pretrain(*DIGITS, "--output_dir", tmp_path, "--auto_resume", "false")
    assert_one_clear_line(result, tmp_path, "checkpoints of a run")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'--model "convnextv2_atto', "no closing quotation: each line must hold whole words"),
        (b"--epochs 3\n@FILE", "a flag file that includes itself"),
        (bytes(range(128, 256)), "not a text file"),
    ],
    ids=["quote", "circle", "binary"],
)
def test_a_flag_file_that_cannot_be_read(pretrain, tmp_path, content, problem):
    path = tmp_path / "flags.args"
    path.write_bytes(content.replace(b"FILE", bytes(path)))
    assert_one_clear_line(pretrain(f"@{path}"), path, problem)


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture
def tune(finetune, labelled_folder):
    """tune(*flags): a run of one epoch over three classes."""
    flags = "--batch_size 4 --epochs 1 --warmup_epochs 0".split()
    return lambda *more: finetune(*TINY, "--data_path", labelled_folder, *flags, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture
def tuned(folder, tune):
    """The checkpoint of such a run; made once."""
    if not (folder / "checkpoint-0.pth").exists():
        assert tune("--output_dir", folder).status == 0
    return folder / "checkpoint-0.pth"


@pytest.fixture
def other(labelled_folder, tmp_path):
    """A copy of the images, to be spoilt."""
    return shutil.copytree(labelled_folder, tmp_path / "other")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--model convnextv2_zepto", ["convnextv2_zepto", "convnextv2_atto", "convnextv2_huge"]),
        ("--input_size 31", ["--input_size 31", "from 32 on"]),
        ("--nb_classes 1000", ["--nb_classes 1000", "3 classes"]),
        ("--layer_decay_type group --layer_decay 0.6", ["--layer_decay_type group", "(3, 3, 27, 3)", "'single'"]),
        ("--layer_decay 0", ["--layer_decay 0"]),
        ("--opt adahessian", ["--opt adahessian", "second derivatives", "adamw"]),
        ("--layer_decay_type pairs", ["pairs", "single", "group"]),
        ("--model_ema_eval true", ["--model_ema_eval true", "--model_ema true"]),
        ("--eval true --disable_eval true", ["--eval true and --disable_eval true: nothing to do"]),
        ("--model_ema_decay 1.5", ["--model_ema_decay 1.5", "from 0 to 1"]),
        ("--mixup 0.8 --batch_size 5", ["--batch_size 5", "even for mixup"]),
        ("--cutmix 1 --batch_size 5", ["--batch_size 5", "even for mixup and cutmix"]),
        ("--mixup -1", ["--mixup -1"]),
        ("--cutmix_minmax 0.8 0.2", ["--cutmix_minmax", "0.8", "0.2", "the smaller first"]),
        ("--cutmix_minmax 0.8", ["--cutmix_minmax", "expected 2"]),
        ("--mixup_prob 2", ["--mixup_prob 2"]),
        ("--opt adamx", ["--opt adamx", "adamw"]),
        ("--opt_betas 0.9", ["--opt_betas", "0.9", "adamw takes 2"]),
        ("--opt_betas 0.9 1.5", ["--opt_betas", "1.5", "below 1"]),
        ("--opt_eps -1", ["--opt_eps -1"]),
        ("--aa flip", ["--aa flip"]),
        ("--aa rand-x3", ["--aa rand-x3"]),
        ("--aa none --color_jitter -0.4", ["--color_jitter -0.4"]),
        ("--crop_pct 1.5", ["--crop_pct 1.5", "at most 1"]),
        ("--crop_pct 0", ["--crop_pct 0"]),
        ("--drop_path 1", ["--drop_path 1", "below 1"]),
        ("--drop_path -0.1", ["--drop_path -0.1"]),
        ("--smoothing 1.5", ["--smoothing 1.5"]),
        ("--smoothing 1", ["--smoothing 1"]),
        ("--reprob 2", ["--reprob 2"]),
        ("--recount 0", ["--recount 0", "at least 1"]),
        ("--clip_grad -1", ["--clip_grad -1"]),
        ("--images_per_class 1", ["3 images", "whole step of 4"]),
        ("--images_per_class -1", ["--images_per_class -1"]),
        ("--in_chans 5", ["--in_chans 5", "--aa none"]),
        ("--in_chans 5 --data_set DIGITS", ["--in_chans 5", "1, 3, 4"]),
        ("--data_set IMAGENET", ["IMAGENET", "DIGITS"]),
        ("--data_path /no/such", ["--data_path /no/such", "no such folder"]),
        ("--eval_data_path /no/such", ["--eval_data_path /no/such", "no such folder"]),
        ("--data_path=", ["--data_path", "DIGITS"]),
        ("--finetune /no/such.pth", ["/no/such.pth", "No such file"]),
        ("--eval true", ["--eval true", "--resume FILE"]),
        ("--eval true --disable_eval true", ["--disable_eval true"]),
        ("--eval true --resume /no/such.pth", ["/no/such.pth", "No such file"]),
        ("--loss huber", ["--loss", "'huber'", "'ce', 'bce', 'mse', 'l1'"]),
        ("--loss mse", ["labelled", "label ant: must be a number for --loss mse"]),
        ("--topk 0", ["--topk 0", "at least 1"]),
        ("--eval_size 16", ["--eval_size 16", "32"]),
        ("--recount 1000000000", ["--recount 1000000000", "at most"]),
        ("--cutmix_minmax 0 0", ["--cutmix_minmax 0.0 0.0", "the larger above 0"]),
        ("--color_jitter 1e9", ["--color_jitter 1e9", "from 0 to 1"]),
        ("--opt adamw --momentum 0.8", ["--momentum 0.8", "adamw has none"]),
        ("--watch test_acc3", ["--watch test_acc3", "test_acc1", "test_recall5"]),
        ("--disable_eval true --watch test_acc1", ["--watch test_acc1", "train_loss"]),
        ("--disable_eval true --early_stop 2", ["--early_stop 2", "--watch"]),
    ],
)
def test_wrong_flags_of_fine_tuning(tune, flags, words):
    assert_one_clear_line(tune(*flags.split()), *words)


def test_finetune_from_a_file_without_an_encoder(tune, tmp_path):
    torch.save({"model": {"foo": torch.zeros(3)}}, tmp_path / "foo.pth")
    assert_one_clear_line(tune("--finetune", tmp_path / "foo.pth"), "foo.pth", "another model", "foo is not")


def test_finetune_finds_nothing_under_a_key_or_prefix(tune, tuned):
    assert_one_clear_line(tune("--finetune", tuned, "--model_prefix", "enc."), tuned, "begins with 'enc.'")
    assert_one_clear_line(tune("--finetune", tuned, "--model_key", "net"), tuned, "under 'net'", "it has format, model")


def test_a_class_of_val_that_train_lacks(tune, other):
    shutil.copytree(other / "val" / "ant", other / "val" / "dog")
    assert_one_clear_line(tune("--data_path", other), other / "val", "class dog", "3 classes", "ant, bee, cat")


def test_train_without_class_folders(tune, other):
    (other / "train" / "bee" / "01.png").rename(other / "train" / "01.png")
    assert_one_clear_line(tune("--data_path", other), other / "train", "01.png", "one folder a class")


@pytest.mark.parametrize("part", ["train", "val"])
def test_no_train_or_no_val(tune, other, part):
    shutil.rmtree(other / part)
    assert_one_clear_line(
        tune("--data_path", other),
        other / part,
        "no such folder",
        "a folder of images for each class",
        *(["--eval_data_path", "--val_fraction", "--disable_eval"] if part == "val" else []),
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_empty_train_or_val(tune, other, part):
    for path in (other / part).glob("*/*.png"):
        path.unlink()
    assert_one_clear_line(tune("--data_path", other), other / part, "no image there")


@pytest.mark.parametrize("flags", ["--epochs 2", "--eval true"], ids=["train", "eval"])
def test_resume_with_other_classes(tune, tuned, other, flags):
    for part in ("train", "val"):
        (other / part / "bee").rename(other / part / "bug")
    assert_one_clear_line(tune(*flags.split(), "--resume", tuned, "--data_path", other), "bug", "classes")


@pytest.mark.parametrize("flags", ["--epochs 2", "--eval true"], ids=["train", "eval"])
def test_resume_with_another_number_of_classes(tune, tuned, flags):
    result = tune(*flags.split(), "--resume", tuned, "--data_set", "DIGITS", "--data_path=")
    assert_one_clear_line(result, "10", "3")


def test_eval_of_weights_for_another_number_of_classes(tune, tuned, tmp_path):
    torch.save(torch.load(tuned, weights_only=True)["model"], tmp_path / "raw.pth")
    result = tune("--eval", "true", "--resume", tmp_path / "raw.pth", "--data_set", "DIGITS", "--data_path=")
    assert_one_clear_line(result, "raw.pth", "3 classes, the data 10")


def test_eval_of_averaged_weights_that_were_not_kept(tune, tuned):
    result = tune("--eval", "true", "--model_ema_eval", "true", "--resume", tuned)
    assert_one_clear_line(result, tuned, "no EMA weights", "--model_ema true")


@pytest.mark.parametrize("flags", [[], ["--eval", "true"]], ids=["train", "eval"])
def test_a_pretraining_checkpoint_as_resume_points_to_finetune(pretrain, tune, folder, labelled_folder, flags):
    path = folder / "pretrained" / "checkpoint-0.pth"
    if not path.exists():
        small = [*TINY, *"--input_size 64 --decoder_embed_dim 16 --batch_size 11 --epochs 1".split()]
        assert pretrain(*small, "--data_path", labelled_folder, "--output_dir", path.parent).status == 0
    assert_one_clear_line(
        tune(*flags, "--resume", path),
        path,
        "has no head" if flags else "another model",
        "Load a pre-training checkpoint with --finetune",
    )


def test_resume_with_another_optimizer(tune, tuned):
    result = tune("--epochs", 2, "--opt", "sgd", "--resume", tuned)
    assert_one_clear_line(result, tuned, "--opt adamw", "use the same")


def test_resume_with_another_layer_decay(tune, tuned):
    """It makes other groups of parameters, which the optimizer's state does not fit."""
    result = tune("--epochs", 2, "--layer_decay", 0.8, "--resume", tuned)
    assert_one_clear_line(result, tuned, "--layer_decay 1.0", "use the same")


def test_nothing_but_unreadable_images_to_evaluate(tune, other):
    for path in (other / "val").glob("*/*.png"):
        path.write_text("not an image")
    assert_one_clear_line(tune("--data_path", other), other / "val", "none of the first 7 images can be read")


def test_what_is_no_mistake(tune, other):
    """cutmix of 32 pixels, two images a batch, fewer than five classes, of which val lacks one."""
    shutil.rmtree(other / "val" / "bee")
    result = tune("--data_path", other, "--cutmix", 1, "--batch_size", 2, "--warmup_epochs", 3)
    assert result.status == 0 and "top-5 100.00 %" in result.out and "(5 images)" in result.out
