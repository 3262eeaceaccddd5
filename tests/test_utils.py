"""The schedule, the parameter groups and the files, against values worked out by hand."""

import argparse

import pytest
import torch

import utils
from models.fcmae import FCMAE
from optim_factory import get_parameter_groups


def test_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": 0.5}], lr=9.0)
    args = argparse.Namespace(lr=1.0, min_lr=0.2, warmup_epochs=10, epochs=50)
    by_hand = {0: 0.0, 2.5: 0.25, 10: 1.0, 20: 0.2 + 0.8 * 0.8535534, 30: 0.6, 50: 0.2}
    for epoch, lr in by_hand.items():
        assert utils.adjust_learning_rate(optimizer, epoch, args) == pytest.approx(lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr / 2])


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


def test_the_optimizer_is_the_papers(pretrain, image_folder, tmp_path):
    """AdamW (.9, .95), lr = blr x effective batch size / 256."""
    from conftest import SMALL

    flags = "--batch_size 4 --update_freq 2 --epochs 1 --warmup_epochs 0 --blr 0.0064 --picture_freq 0".split()
    assert pretrain(*SMALL, "--data_path", image_folder, *flags, "--output_dir", tmp_path).status == 0
    checkpoint = utils.load_checkpoint(tmp_path / "checkpoint-0.pth")
    assert checkpoint["args"]["lr"] == pytest.approx(0.0064 * 8 / 256)
    for group, decay in zip(checkpoint["optimizer"]["param_groups"], (0.05, 0.0), strict=True):
        assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == decay and group["decoupled_weight_decay"]


def test_seeds_of_different_keys_differ():
    keys = [(0,), (0, 0), (0, 5), (0, 5, 0), (5, 0), (0, 0, 5), (1, 5)]
    assert len({utils.derive_seed(*key) for key in keys}) == len(keys)
    assert utils.derive_seed(0, 5) == utils.derive_seed(0, 5)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint-0.pth"
    utils.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        utils.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_its_own_half_written_files_are_removed(tmp_path):
    for name in (".checkpoint-3.pth-abc.tmp", ".log.txt-abc.tmp", ".mine.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    utils.remove_half_written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "notes.tmp"]
