"""Mistakes that people make end with one line that names what was given and what is accepted, and status 2."""

import pytest
import torch
from conftest import SMALL

DIGITS = [*SMALL, "--data_set", "DIGITS"]


def assert_one_clear_line(result, *words):
    assert result.status == 2
    lines = result.err.strip().splitlines()
    assert lines[-1].startswith("main_pretrain.py: error: ")
    assert "Traceback" not in result.err + result.out
    assert len(lines) == 1 or lines[0].startswith("usage:")  # argparse shows the usage first
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
        ("--use_amp maybe", ["maybe", "neither true nor false"]),
        ("--amp_dtype float8", ["float8", "bfloat16"]),
        ("--data_set IMAGENET", ["IMAGENET", "DIGITS"]),
        ("--resume /no/such.pth", ["/no/such.pth", "No such file"]),
        ("--output_dir /dev/null/run", ["/dev/null/run", "cannot be written"]),
        ("@/no/such.args", ["/no/such.args"]),
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
