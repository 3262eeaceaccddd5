"""A run leaves what it promises, its flags do what they say, and it goes on after a stop as if there had been none."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_weights, log_lines, weights
from PIL import Image

import checkpoints
import main_pretrain
from models.fcmae import FCMAE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def finished(shared, small, pretrain):
    """The folder and the output of one run of 2 epochs with everything on; made once."""
    folder = shared / "finished"
    if not folder.exists():
        result = pretrain(
            *small, "--output_dir", folder, "--print_freq", 2, "--picture_freq", 1, "--save_ckpt_steps", 2
        )
        assert result.status == 0, result.err
        (folder / "stdout.txt").write_text(result.out)
    return folder


# ---------------------------------------------------------------- what a person sees


def test_the_console_reports_configuration_and_progress(finished):
    out = (finished / "stdout.txt").read_text()
    assert "22 images, 5 steps of 4 an epoch, 2 epochs, from the beginning; seed 0" in out
    assert "1 rank on cpu, float32; 0 loader workers each" in out and len(out.partition("epoch 0/2")[0]) < 1500
    assert json.loads((finished / "args.json").read_text())["mask_ratio"] == 0.6
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split("  loss")[0] for line in lines] == [
        f"epoch {epoch}/2  step {step}/5" for epoch in (0, 1) for step in (2, 4, 5)
    ]
    assert all(word in line for line in lines for word in ("lr ", "img/s", "s/batch", "eta "))
    assert "trained 2 epochs in" in out


def test_log_txt_has_a_line_an_epoch(finished):
    lines = [json.loads(line) for line in (finished / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(0.1 < line["train_loss"] < 10 and line["n_parameters"] > 1e4 for line in lines)


def test_tensorboard_holds_scalars_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [400, 800, 1000, 1400, 1800, 2000]
    assert {"train/lr", "train/images_per_second", "epoch/train_loss"} <= set(events.Tags()["scalars"])
    logged = json.loads((finished / "log.txt").read_text().splitlines()[1])["train_loss"]
    assert events.Scalars("epoch/train_loss")[1].value == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in events.Images("reconstruction")] == [1000, 2000]


def test_tensorboard_keeps_what_was_logged_before_a_resume(small, pretrain, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in (1, 2):
        pretrain(*small, "--epochs", epochs, "--output_dir", tmp_path, "--print_freq", 2, "--picture_freq", 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [400, 800, 1000, 1400, 1800, 2000]
    assert [event.step for event in events.Scalars("epoch/train_loss")] == [1000, 2000]
    assert [event.step for event in events.Images("reconstruction")] == [1000, 2000]


def test_pictures_show_visible_patches_as_they_are(finished):
    picture = np.asarray(Image.open(finished / "reconstruction-0001.png")).astype(int)
    side, border = 128, 4  # 32 pixels enlarged four times
    half = 4 * (side + border) + 2 * border
    assert picture.shape == (30 + 4 * (side + border), 2 * half, 3)
    for i in range(8):
        left, top = i // 4 * half + border, 30 + i % 4 * (side + border)
        strip = picture[top : top + side, left:]
        original, masked, reconstruction = (strip[:, j * (side + border) :][:, :side] for j in range(3))
        grey = (masked == 127).all(-1)
        assert 0.5 < grey.mean() < 0.75  # 10 of 16 patches are masked
        assert np.array_equal(original[~grey], masked[~grey]) and np.array_equal(original[~grey], reconstruction[~grey])
        assert not np.array_equal(original[grey], reconstruction[grey])


def test_checkpoints_load_safely_and_the_newest_are_kept(finished):
    assert sorted(path.name for path in finished.glob("*.pth")) == [
        "checkpoint-0-4.pth",
        "checkpoint-0.pth",
        "checkpoint-1-2.pth",
        "checkpoint-1-4.pth",
        "checkpoint-1.pth",
    ]
    checkpoint = torch.load(finished / "checkpoint-1.pth", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["step"] == 0
    assert checkpoint["args"]["model"] == "convnextv2_atto" and isinstance(checkpoint["args"], dict)
    assert not list(finished.glob(".*"))  # no temporary file is left


def test_save_ckpt_num_and_freq(small, pretrain, tmp_path):
    pretrain(
        *small, "--epochs", 5, "--batch_size", 11, "--output_dir", tmp_path, "--save_ckpt_freq", 2, "--save_ckpt_num", 2
    )
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-3.pth", "checkpoint-4.pth"]


def test_nothing_is_written_without_an_output_folder(small, pretrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({}, "checkpoint-0.pth")  # the original would resume from it
    result = pretrain(*small, "--epochs", 1)
    assert result.status == 0 and "neither checkpoints nor logs" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0.pth"]


def test_log_dir_and_save_ckpt(small, pretrain, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    pretrain(*small, "--epochs", 1, "--output_dir", out, "--log_dir", log, "--save_ckpt", "false", "--picture_freq", 0)
    assert sorted(path.name for path in out.iterdir()) == ["args.json", "log.txt", "run.lock"]
    assert list(log.glob("events.*"))


# ---------------------------------------------------------------- stop and resume


def test_resume_between_epochs_and_steps_is_exact(finished, small, pretrain, tmp_path):
    for name in ("checkpoint-0.pth", "checkpoint-0-4.pth", "checkpoint-1-2.pth"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes((finished / name).read_bytes())
        result = pretrain(*small, "--output_dir", folder)
        assert result.status == 0 and f"resuming from {folder / name}" in result.out
        assert_same_weights(weights(folder, "checkpoint-1.pth"), weights(finished, "checkpoint-1.pth"))
        assert log_lines(folder)[-1] == log_lines(finished)[1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished, small, pretrain, tmp_path):
    (tmp_path / "checkpoint-0.pth").write_bytes((finished / "checkpoint-0.pth").read_bytes())
    (tmp_path / "checkpoint-1-2.pth").write_bytes((finished / "checkpoint-1-2.pth").read_bytes()[:100000])
    result = pretrain(*small, "--output_dir", tmp_path)
    assert f"{tmp_path / 'checkpoint-1-2.pth'}: not a whole checkpoint" in result.out
    assert f"resuming from {tmp_path / 'checkpoint-0.pth'}" in result.out
    assert_same_weights(weights(tmp_path, "checkpoint-1.pth"), weights(finished, "checkpoint-1.pth"))


def test_log_txt_has_no_epoch_twice(finished, small, pretrain, tmp_path):
    (tmp_path / "checkpoint-0.pth").write_bytes((finished / "checkpoint-0.pth").read_bytes())
    log = (finished / "log.txt").read_text()  # as if killed after the line for epoch 1
    (tmp_path / "log.txt").write_text("a note\n" + log + "{}\n")
    pretrain(*small, "--output_dir", tmp_path)
    first, second = log.splitlines(keepends=True)
    now = (tmp_path / "log.txt").read_text()
    assert now.startswith("a note\n" + first + '{}\n{"train_loss": ')  # what is not ours stays
    assert now.count("\n") == 4 and json.loads(now.splitlines()[3])["train_loss"] == json.loads(second)["train_loss"]


def test_the_output_folder_wins_over_resume(finished, small, pretrain, tmp_path):
    start = finished / "checkpoint-0-4.pth"
    result = pretrain(*small, "--epochs", 1, "--output_dir", tmp_path, "--resume", start)
    assert f"resuming from {start}: epoch 0, step 4" in result.out
    result = pretrain(*small, "--epochs", 2, "--output_dir", tmp_path, "--resume", start)
    assert f"resuming from {tmp_path / 'checkpoint-0.pth'}: epoch 1, step 0" in result.out
    assert f"changed since {tmp_path / 'checkpoint-0.pth'}: epochs 1 -> 2" in result.out


def test_a_finished_run_says_so(finished, small, pretrain, tmp_path):
    (tmp_path / "checkpoint-1.pth").write_bytes((finished / "checkpoint-1.pth").read_bytes())
    result = pretrain(*small, "--output_dir", tmp_path)
    assert result.status == 0 and "nothing left to do: 2 of 2 epochs are done" in result.out
    result = pretrain(*small, "--output_dir", finished, "--epochs", 1)
    assert "nothing left to do: 2 epochs are done, more than --epochs 1" in result.out


def test_another_batch_size_within_an_epoch_is_refused(finished, small, pretrain):
    result = pretrain(*small, "--batch_size", 2, "--resume", finished / "checkpoint-0-4.pth")
    assert result.status == 2 and "saved with effective batch size 4, not 2; use the same" in result.err
    assert pretrain(*small, "--batch_size", 2, "--epochs", 1, "--resume", finished / "checkpoint-0.pth").status == 0


def test_another_order_of_the_samples_within_an_epoch_is_refused(finished, small, pretrain, tmp_path):
    for name in ("checkpoint-0-4.pth", "checkpoint-0.pth"):
        checkpoint = torch.load(finished / name, weights_only=True)
        del checkpoint["sample_order"]  # as written before the order had a number
        torch.save(checkpoint, tmp_path / name)
    result = pretrain(*small, "--resume", tmp_path / "checkpoint-0-4.pth")
    assert result.status == 2 and "within an epoch: saved with sample order 1, not 2; use" in result.err
    result = pretrain(*small, "--shuffle", "blocks", "--resume", finished / "checkpoint-0-4.pth")
    assert result.status == 2 and "saved with sample order 2, not 3" in result.err
    assert pretrain(*small, "--epochs", 1, "--resume", tmp_path / "checkpoint-0.pth").status == 0


def test_other_images_within_an_epoch_are_refused(finished, small, pretrain, tmp_path, image_folder):
    for path in list(image_folder.glob("*/*.png"))[:-1]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    result = pretrain(*small, "--data_path", tmp_path, "--resume", finished / "checkpoint-0-4.pth")
    assert result.status == 2 and "saved with num images 22, not 21; use the same" in result.err


def test_damaged_checkpoints_alone_do_not_start_a_new_run(small, pretrain, tmp_path):
    (tmp_path / "checkpoint-5.pth").write_bytes(b"")
    (tmp_path / "log.txt").write_text('{"epoch": 5}\n')
    result = pretrain(*small, "--output_dir", tmp_path)
    assert result.status == 2 and "none of its 1 checkpoints is whole" in result.err
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 5}\n'


def test_a_checkpoint_is_never_deleted_for_a_later_one(finished, small, pretrain, tmp_path):
    """Damaged files with higher numbers do not push out what the run writes."""
    (tmp_path / "checkpoint-0.pth").write_bytes((finished / "checkpoint-0.pth").read_bytes())
    for number in (7, 8, 9):
        (tmp_path / f"checkpoint-{number}.pth").write_bytes(b"")
    pretrain(*small, "--output_dir", tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [f"checkpoint-{n}.pth" for n in (0, 1, 7, 8, 9)]


def test_checkpoints_of_another_program_are_not_resumed(small, pretrain, tmp_path):
    torch.save({"model": {}}, tmp_path / "checkpoint-799.pth")
    result = pretrain(*small, "--output_dir", tmp_path)
    assert result.status == 2 and "not of this project: give it as --resume" in result.err


def test_resume_of_another_size_of_model_is_refused(finished, small, pretrain):
    result = pretrain(*small, "--model", "convnextv2_femto", "--resume", finished / "checkpoint-0.pth")
    assert result.status == 2 and "another model" in result.err and "not (48, 3, 1, 1)" in result.err


def test_a_full_disk_keeps_the_old_checkpoint_and_is_tried_again(small, pretrain, tmp_path, monkeypatch):
    """The kernel refuses to write more than 16 KiB to a file during the second of three saves."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, saves = checkpoints.save_model, []

    def save_with_limit(*args, **kwargs):
        saves.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14 if len(saves) == 2 else limits[0], limits[1]))
        try:
            save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoints, "save_model", save_with_limit)
    result = pretrain(*small, "--epochs", 3, "--batch_size", 11, "--output_dir", tmp_path, "--picture_freq", 0)
    assert result.status == 0
    assert "checkpoint not saved" in result.out and "checkpoint-1.pth: File too large" in result.out
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-2.pth"]
    assert not list(tmp_path.glob(".*"))
    checkpoints.load_checkpoint(tmp_path / "checkpoint-0.pth")
    result = pretrain(*small, "--epochs", 2, "--batch_size", 11, "--output_dir", tmp_path / "b", "--resume", "")
    assert result.status == 0
    saves.clear()
    result = pretrain(*small, "--epochs", 2, "--batch_size", 11, "--output_dir", tmp_path / "c")
    assert result.status == 1 and "the last checkpoint could not be saved" in result.err


# ---------------------------------------------------------------- flags change what they say


def final_weights(pretrain, small, folder, *flags):
    result = pretrain(*small, "--output_dir", folder, "--picture_freq", 0, *flags)
    assert result.status == 0, result.err
    return weights(folder, "checkpoint-1.pth")


def test_the_same_flags_give_the_same_weights_whatever_is_observed(finished, small, pretrain, tmp_path):
    few = final_weights(pretrain, small, tmp_path / "a", "--print_freq", 1000, "--num_workers", 2)
    assert_same_weights(few, weights(finished, "checkpoint-1.pth"))


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 1",
        "--mask_ratio 0.3",
        "--scale 0.8 1",
        "--hflip 1",
        "--vflip 1",
        "--repeated_sampling 2",
        "--no-norm_pix_loss",
        "--weight_decay 0.5",
        "--blr 1e-3",
        "--lr 1e-3",
        "--min_lr 1e-6",
        "--warmup_epochs 0",
        "--update_freq 2",
        "--use_amp true",
    ],
)
def test_flags_of_the_training_change_the_weights(shared, small, narrow, pretrain, tmp_path, flags):
    changed = final_weights(pretrain, small, tmp_path, *flags.split())
    if not (shared / "narrow").exists():
        final_weights(pretrain, small, shared / "narrow")
    original = weights(shared / "narrow", "checkpoint-1.pth")
    assert changed.keys() == original.keys()
    assert any(not torch.equal(changed[name], original[name]) for name in original)


def test_flags_of_the_model_change_its_shapes(small, pretrain, tmp_path):
    changed = final_weights(
        pretrain,
        [*small, "--batch_size", 11],
        tmp_path,
        *"--stem_stride 2 --input_size 32 48 --in_chans 1 --decoder_depth 2".split(),
    )
    assert changed["encoder.downsample_layers.0.0.weight"].shape == (8, 1, 2, 2)
    assert changed["pred.weight"].shape == (256, 16, 1, 1) and "decoder.1.norm.weight" in changed


def test_start_epoch_enters_the_schedule_late(small, pretrain, tmp_path):
    result = pretrain(*small, "--start_epoch", 1, "--output_dir", tmp_path)
    assert "epoch 0/2" not in result.out and "epoch 1/2" in result.out


def test_compile_and_amp_dtype_reach_the_model(small, pretrain, monkeypatch):
    compiled, dtypes = [], []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    loss = FCMAE.patch_loss
    monkeypatch.setattr(FCMAE, "patch_loss", lambda *args: dtypes.append(args[1].dtype) or loss(*args))
    monkeypatch.setattr(main_pretrain, "describe_model", lambda args: "")
    flags = "--epochs 1 --use_amp true --amp_dtype float16 --compile --grad_checkpointing"
    result = pretrain(*small, *flags.split())
    assert result.status == 0 and len(compiled) == 1 and set(dtypes) == {torch.float16}
    assert compiled[0].encoder.stages[0].grad_checkpointing


def test_a_flag_file_is_read_and_later_flags_win(small, pretrain, tmp_path):
    recipe = tmp_path / "recipe.args"
    recipe.write_text("# a comment\n--mask_ratio 0.5 --epochs 7  # two\n\n--seed 3\n")
    pretrain(*small, f"@{recipe}", "--epochs", 1, "--output_dir", tmp_path / "out", "--save_ckpt", "false")
    read = json.loads((tmp_path / "out" / "args.json").read_text())
    assert (read["mask_ratio"], read["epochs"], read["seed"]) == (0.5, 1, 3)


def test_help_shows_groups_and_every_default(pretrain):
    text = pretrain("--help").out
    assert "training:" in text and "checkpoints:" in text
    flags = [line for line in text.split("\n  --")[1:]]
    assert len(flags) > 40 and all("default:" in " ".join(flag.split()) for flag in flags)


# ---------------------------------------------------------------- trouble on the way


def test_unreadable_images_are_named_counted_and_left_out(small, pretrain, tmp_path, image_folder):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in image_folder.glob("*/*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    (folder / "zz.jpg").write_text("not an image")
    flags = [*small, "--data_path", folder, "--batch_size", 23]
    result = pretrain(*flags)
    assert result.status == 0
    assert result.out.count("unreadable image") == 2  # once each, not once an epoch
    assert str(folder / "03.png") in result.out and str(folder / "zz.jpg") in result.out
    result = pretrain(*flags, "--max_bad_images", 1)
    assert result.status == 2 and "2 images could not be read, --max_bad_images is 1" in result.err


def test_a_loss_that_is_not_finite_stops_the_run(small, pretrain, tmp_path):
    result = pretrain(*small, "--epochs", 4, "--lr", 1e18, "--output_dir", tmp_path)
    assert result.status == 1
    assert "error: loss is nan in epoch" in result.err and len(result.err.strip().splitlines()) == 1


def test_weights_that_are_not_finite_are_not_saved(small, pretrain, tmp_path, monkeypatch):
    """A bad update is not in the losses yet: they were computed before it."""

    def spoil(_, run):
        if run.step == 2:
            run.model.mask_token.data.fill_(float("nan"))

    monkeypatch.setattr("hooks.Console.on_log", spoil)
    result = pretrain(*small, "--output_dir", tmp_path, "--print_freq", 1, "--save_ckpt_steps", 1)
    assert result.status == 1 and "error: weights are not finite after step 2 of epoch 0" in result.err
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint-0-1.pth"]


def test_ctrl_c_ends_in_one_line(small, pretrain, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hooks.Console.on_log", interrupt)
    result = pretrain(*small)
    assert result.status == 130 and result.out.endswith("nothing more was saved\n") and not result.err


def test_the_loss_falls(pretrain, narrow, tmp_path):
    flags = [
        *SMALL,
        "--data_set",
        "DIGITS",
        "--in_chans",
        1,
        "--decoder_embed_dim",
        64,
        "--epochs",
        1,
        "--batch_size",
        32,
    ]
    result = pretrain(*flags, "--warmup_epochs", 0, "--lr", 3e-3, "--output_dir", tmp_path, "--print_freq", 11)
    assert result.status == 0
    losses = [float(line.split("loss ")[1].split()[0]) for line in result.out.splitlines() if line.startswith("epoch ")]
    assert losses[-1] < losses[0] - 0.1


def test_sparse_backends_train_alike(small, narrow, pretrain, tmp_path):
    """To float32 rounding, over ten steps."""
    if not os.environ.get("REQUIRE_MINKOWSKI"):
        pytest.importorskip("models.convnextv2_minkowski", exc_type=ImportError)
    packed = final_weights(pretrain, small, tmp_path / "packed")
    minkowski = final_weights(pretrain, small, tmp_path / "minkowski", "--sparse_backend", "minkowski")
    assert any(not torch.equal(value, minkowski[name]) for name, value in packed.items())  # it was used
    for name, value in packed.items():
        assert torch.allclose(value, minkowski[name], atol=2e-5), name
