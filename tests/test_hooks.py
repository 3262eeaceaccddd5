"""Hooks see a run and do not change it: each keeps its promise in a real short run, and none moves a weight."""

import contextlib
import errno
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, TINY, Fork, assert_same_weights, finish, log_lines, weights
from PIL import Image
from tensorboard.summary.writer import event_file_writer

import evaluation
import hooks
import main_finetune
import main_pretrain
import resume
import utils
from models.fcmae import FCMAE
from models.weights import split_decoder
from run import Run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def everything(small, labelled_folder):
    """All that observes pre-training."""
    flags = f"--probe_freq 1 --probe_data_path {labelled_folder} --picture_freq 1 --profile_steps 1:3 --print_freq 2"
    return [*small, *flags.split(), "--watch", "probe_linear"]


@pytest.fixture
def observed(shared, everything, pretrain):
    """The folder and the output of a run with all observers; made once."""
    folder = shared / "observed"
    if not folder.exists():
        result = pretrain(*everything, "--output_dir", folder)
        assert result.status == 0, result.err
        (folder / "stdout.txt").write_text(result.out)
    return folder


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


# ---------------------------------------------------------------- observers change nothing


def test_no_observer_and_no_order_of_them_changes_a_weight(
    observed, everything, small, pretrain, tmp_path, monkeypatch
):
    build = main_pretrain.build_hooks

    def backwards(*args):
        built = build(*args)
        built.hooks = built.hooks[-3::-1] + built.hooks[-2:]  # those that save stay last
        return built

    monkeypatch.setattr(main_pretrain, "build_hooks", backwards)
    pretrain(*everything, "--output_dir", tmp_path / "backwards")
    monkeypatch.setattr(main_pretrain, "build_hooks", lambda *_: hooks.Hooks([resume.Checkpointer()]))
    pretrain(*small, "--output_dir", tmp_path / "none")
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == [
        "checkpoint-0.pth",
        "checkpoint-1.pth",
        "run.lock",
    ]
    for folder in ("backwards", "none"):
        assert_same_weights(weights(tmp_path / folder, "checkpoint-1.pth"), weights(observed, "checkpoint-1.pth"))
    assert log_lines(tmp_path / "backwards") == log_lines(observed)


def test_nor_in_fine_tuning(labelled_folder, narrow, finetune, tmp_path, monkeypatch):
    flags = [*TINY, *"--batch_size 4 --epochs 2 --warmup_epochs 1 --model_ema true".split()]
    flags += ["--data_path", labelled_folder]
    finetune(*flags, "--output_dir", tmp_path / "all", "--profile_steps", "2:4")

    def build(args):
        return hooks.Hooks([hooks.UpdateEMA(), resume.Checkpointer()])

    monkeypatch.setattr(main_finetune, "build_hooks", build)
    finetune(*flags, "--output_dir", tmp_path / "few", "--disable_eval", "true")
    few, all_of_them = (torch.load(tmp_path / name / "checkpoint-1.pth") for name in ("few", "all"))
    assert_same_weights(few["model"], all_of_them["model"])
    assert_same_weights(few["model_ema"], all_of_them["model_ema"])


# ---------------------------------------------------------------- a new hook


def hook_of_the_readme():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "class GradientNorm" in block)
    names = {"hooks": hooks, "torch": torch}
    exec(code, names)
    return names["GradientNorm"]()


def with_hook(monkeypatch, hook):
    build = main_pretrain.build_hooks

    def build_with_it(*args):
        built = build(*args)
        built.hooks.insert(0, hook)
        return built

    monkeypatch.setattr(main_pretrain, "build_hooks", build_with_it)


def test_the_hook_of_the_readme_logs_the_norm_of_the_gradients_everywhere(small, pretrain, tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    with_hook(monkeypatch, hook_of_the_readme())
    out = pretrain(*small, "--output_dir", tmp_path, "--picture_freq", 0, "--clip_grad", 100, "--print_freq", 5).out
    means = [sum(norms[epoch : epoch + 5]) / 5 for epoch in (0, 5)]
    assert [line["train_grad_norm"] for line in log_lines(tmp_path)] == pytest.approx(means, rel=1e-5)
    assert f"  grad_norm {means[1]:.4g}  " in out
    for tag in ("train/grad_norm", "epoch/train_grad_norm"):
        assert [event.value for event in events(tmp_path).Scalars(tag)] == pytest.approx(means, rel=1e-5)


def test_what_a_hook_measures_at_the_end_of_an_epoch_is_logged_everywhere(small, pretrain, tmp_path, monkeypatch):
    class WeightNorm(hooks.Hook):
        def on_evaluate(self, run):
            run.metrics["weight_norm"] = torch.nn.utils.get_total_norm(run.model.parameters()).item()

    with_hook(monkeypatch, WeightNorm())
    out = pretrain(*small, "--output_dir", tmp_path, "--picture_freq", 0).out
    norms = [line["weight_norm"] for line in log_lines(tmp_path)]
    final = torch.nn.utils.get_total_norm(weights(tmp_path, "checkpoint-1.pth").values()).item()
    assert len(norms) == 2 and norms[1] == pytest.approx(final) and f"weight_norm {final:.4g}" in out
    assert [event.value for event in events(tmp_path).Scalars("epoch/weight_norm")] == pytest.approx(norms)


def test_terms_of_a_loss_are_summed_and_logged_by_name(small, pretrain, tmp_path, monkeypatch):
    forward_loss = FCMAE.forward_loss

    def two_terms(model, imgs, pred, *args):
        return {"reconstruction": forward_loss(model, imgs, pred, *args), "penalty": 0.01 * pred.square().mean() + 2}

    monkeypatch.setattr(FCMAE, "forward_loss", two_terms)
    flags = [*small, "--output_dir", tmp_path, "--picture_freq", 0, "--save_ckpt_steps", 2]
    result = pretrain(*flags)
    assert result.status == 0 and "  penalty 2" in result.out, result.err
    for line in log_lines(tmp_path):
        assert line["train_penalty"] >= 2
        assert line["train_loss"] == pytest.approx(line["train_reconstruction"] + line["train_penalty"], rel=1e-5)
    assert len(events(tmp_path).Scalars("train/penalty")) == 2
    expected = log_lines(tmp_path)[1]
    for name in ("checkpoint-1.pth", "checkpoint-1-4.pth"):  # resumes from step 2 of epoch 1, with its terms
        (tmp_path / name).unlink()
    assert pretrain(*flags).status == 0 and log_lines(tmp_path)[1] == expected


def test_a_hook_may_keep_a_state_in_the_checkpoint(small, pretrain, tmp_path, monkeypatch):
    counts = []

    class Count(hooks.Hook):
        steps = 0

        def on_step(self, run):
            self.steps += 1

        def on_end(self, run):
            counts.append(self.steps)

        def state_dict(self):
            return self.steps

        def load_state_dict(self, state):
            self.steps = state

    with monkeypatch.context() as patch:
        with_hook(patch, Count())
        pretrain(*small, "--epochs", 1, "--output_dir", tmp_path, "--picture_freq", 0)
    with_hook(monkeypatch, Count())
    pretrain(*small, "--output_dir", tmp_path, "--picture_freq", 0)
    assert counts == [5, 10]


def test_a_hook_is_called_at_its_points_in_their_order(small, pretrain, monkeypatch):
    calls = []

    class Note(hooks.Hook):
        def on_gradients(self, run):
            calls.append("gradients" if all(p.grad is not None for p in run.model.parameters()) else "no gradients")

        def on_log(self, run):
            calls.append("log")

        def on_step(self, run):
            calls.append(f"step {run.epoch}:{run.step}")

    for point in ("start", "epoch_start", "evaluate", "epoch_end", "end"):
        setattr(Note, f"on_{point}", lambda self, state, point=point: calls.append(point))
    with_hook(monkeypatch, Note())
    pretrain(*small, "--batch_size", 11, "--print_freq", 2)

    def epoch(number):
        steps = ["gradients", f"step {number}:1", "gradients", "log", f"step {number}:2"]
        return ["epoch_start", *steps, "evaluate", "epoch_end"]

    assert calls == ["start", *epoch(0), *epoch(1), "end"]


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            "class Broken(hooks.Hook):\n"
            "    def on_step(self, state):\n"
            "        1 / 0\n"
            "main_pretrain.build_hooks = lambda *_: hooks.Hooks([Broken()])\n",
            "RuntimeError: hook Broken failed (on_step, epoch 0, step 1): ZeroDivisionError('division by zero')",
        ),
        (
            "def save_model(*args, **state):\n    raise OSError('disk full')\ncheckpoints.save_model = save_model\n",
            "error: the last checkpoint could not be saved: disk full",
        ),
    ],
    ids=["hook", "save"],
)
def test_an_error_ends_the_run_with_its_workers(small, tmp_path, lines, message):
    """The loader's workers ignore SIGTERM, so a run that left them to Python's end would wait for them for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import flags, checkpoints, hooks, main_pretrain\n"
        f"{lines}"
        "flags.run_script(main_pretrain.main, main_pretrain.get_args_parser(), '\\n')\n"
    )
    command = [sys.executable, script, *small, "--num_workers", "2", "--epochs", 1, "--output_dir", tmp_path / "out"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(message)


class Failing(hooks.Hook):
    def __init__(self, error, main_only=False):
        self.error, self.main_only = error, main_only

    def on_log(self, run):
        raise self.error


@pytest.fixture
def run():
    args = main_pretrain.get_args_parser().parse_args([*map(str, SMALL)])
    return Run(args, torch.nn.Linear(2, 2), torch.device("cpu"))


def test_a_file_that_cannot_be_written_stops_no_run_but_a_hook_of_all_ranks_does(run, capsys):
    hooks.Hooks([Failing(OSError("disk full"), main_only=True)])("on_log", run)
    assert "Failing failed: disk full. Training continues." in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="hook Failing failed .*disk full"):
        hooks.Hooks([Failing(OSError("disk full"))])("on_log", run)
    with pytest.raises(utils.UserError, match="^one line$"):
        hooks.Hooks([Failing(utils.UserError("one line"), main_only=True)])("on_log", run)


def test_a_hook_is_called_on_every_rank_unless_it_says_main_only(run, monkeypatch):
    """So that a collective operation within it finds the other ranks."""
    calls = []

    class Everywhere(hooks.Hook):
        def on_step(self, run):
            dist.all_reduce(torch.ones(1))
            calls.append("everywhere")

    class Main(hooks.Hook):
        main_only = True

        def on_step(self, run):
            calls.append("main")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for rank, expected in ((0, ["everywhere", "main"]), (1, ["everywhere"])):
            monkeypatch.setattr(utils, "get_rank", lambda rank=rank: rank)
            hooks.Hooks([Everywhere(), Main()])("on_step", run)
            assert calls == expected
            calls.clear()
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- probes


def test_probes_are_logged_beside_the_loss(observed):
    lines, logged = log_lines(observed), events(observed)
    for name in evaluation.METRICS:
        values = [line[name] for line in lines]
        assert len(values) == 2 and all(0 <= value <= 100 for value in values)
        scalars = logged.Scalars(name.replace("_", "/"))
        assert [event.step for event in scalars] == [1000, 2000]
        assert [event.value for event in scalars] == pytest.approx(values)
    out = (observed / "stdout.txt").read_text()
    assert f"probe_knn {lines[1]['probe_knn']:.4g}  probe_linear" in out
    before, _, training = out.partition("untrained encoder: probe_knn ")
    assert "probe: fits on 22 images, tests on 7; features of" in before and "img/s" not in before and training


def test_probe_freq_is_in_epochs_with_the_first_and_the_last(small, labelled_folder, pretrain, tmp_path):
    flags = ["--epochs", 5, "--batch_size", 11, "--probe_freq", 3, "--probe_data_path", labelled_folder]
    pretrain(*small, *flags, "--output_dir", tmp_path, "--picture_freq", 0, "--save_ckpt_freq", 9)
    assert [line["epoch"] for line in log_lines(tmp_path) if "probe_knn" in line] == [0, 2, 4]


# ---------------------------------------------------------------- profiler


def test_the_trace_opens_and_holds_the_steps_that_were_asked_for(observed):
    with gzip.open(observed / "profile-1-3.pt.trace.json.gz") as file:
        trace = json.load(file)["traceEvents"]
    names = [event["name"] for event in trace if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2 and "aten::addmm" in names
    out = (observed / "stdout.txt").read_text()
    assert "steps 1 to 2, traced in" in out and "Self CPU %" in out and "aten::" in out


def test_steps_that_do_not_come_are_reported(small, pretrain, tmp_path):
    flags = [*small, "--epochs", 1, "--picture_freq", 0, "--output_dir", tmp_path, "--profile_steps"]
    assert "--profile_steps 7:9: nothing traced, there were 5 steps" in pretrain(*flags, "7:9").out
    (tmp_path / "checkpoint-0.pth").unlink()
    assert "steps 3 to 4, traced in" in pretrain(*flags, "3:9").out


# ---------------------------------------------------------------- the best, and the end


def test_the_best_checkpoint_is_that_of_the_watched_metric_with_its_encoder(observed, small, pretrain, tmp_path):
    values = [line["probe_linear"] for line in log_lines(observed)]
    best = values.index(max(values))
    state = weights(observed, "checkpoint-best.pth")
    assert_same_weights(state, weights(observed, f"checkpoint-{best}.pth"))
    encoder, _ = split_decoder(state)
    assert_same_weights(weights(observed, "encoder-best.pth"), encoder)
    pretrain(*small, "--output_dir", tmp_path, "--watch", "train_loss", "--picture_freq", 0)
    losses = [line["train_loss"] for line in log_lines(tmp_path)]
    last = torch.load(tmp_path / "checkpoint-1.pth")
    assert last["best"]["train_loss"] == [min(losses), losses.index(min(losses)), 1 - losses.index(min(losses))]


@pytest.mark.parametrize("file", ["checkpoint-best", "encoder-best", "checkpoint-best-ema", "encoder-best-ema"])
def test_best_files_and_the_record_of_the_best_agree_when_a_disk_is_full(
    labelled_folder, narrow, finetune, tmp_path, monkeypatch, file
):
    """Or a worse epoch would replace a file that the record does not know of."""
    flags = "--model_ema true --model_ema_eval true --batch_size 4 --watch test_loss --lr 1e-3 --head_init_scale 1"
    flags += " --epochs 2 --warmup_epochs 0 --save_ckpt_freq 9"
    save, failed = torch.save, []

    def fail_once(content, handle):
        if f".{file}.pth-" in os.readlink(f"/proc/self/fd/{handle.fileno()}") and not failed:
            failed.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, handle)

    monkeypatch.setattr(torch, "save", fail_once)
    result = finetune(*TINY, "--data_path", labelled_folder, "--output_dir", tmp_path, *flags.split())
    assert failed and f"{file}.pth: No space left on device. Earlier ones are kept" in result.out
    saved = {path.name: torch.load(path) for path in tmp_path.glob("*-best*")}
    assert len(saved) == 4 and saved["checkpoint-best.pth"]["epoch"] == saved["checkpoint-best-ema.pth"]["epoch"] == 2
    last = log_lines(tmp_path)[1]  # the first epoch counts for nothing: none of its files was written
    best = {name: [last[name], 1, 0] for name in ("test_loss", "test_loss_ema")}
    assert torch.load(tmp_path / "checkpoint-1.pth")["best"] == best
    assert not list(tmp_path.glob(".*.tmp"))


def test_where_only_the_best_checkpoint_was_kept_the_run_resumes_from_it(observed, everything, pretrain, tmp_path):
    """Else a new run would overwrite it with worse weights."""
    shutil.copy(observed / "checkpoint-best.pth", tmp_path)
    shutil.copy(observed / "log.txt", tmp_path)
    result = pretrain(*everything, "--output_dir", tmp_path, "--auto_resume", "false")
    assert result.status == 2 and "holds the checkpoints of a run" in result.err
    best = torch.load(tmp_path / "checkpoint-best.pth")["epoch"]
    result = pretrain(*everything, "--output_dir", tmp_path, "--epochs", best)
    assert result.status == 0 and f"nothing left to do: {best} of {best} epochs are done" in result.out
    assert (tmp_path / "log.txt").read_bytes() == (observed / "log.txt").read_bytes()


def test_tensorboard_loses_no_scalar_to_a_full_disk(tmp_path, monkeypatch):
    # Files of the same second are read in the order of their names, where a process's tenth comes before its ninth
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    run = types.SimpleNamespace(evaluating=False, epochs_done=0.0, lap={"loss": 0.5}, lr=0.1)
    board = hooks.TensorBoard(tmp_path)
    board.on_start(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for epochs_done in (0.25, 0.5, 0.75):
        run.epochs_done = epochs_done
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if epochs_done == 0.5 else limits[0], limits[1]))
        try:
            with pytest.raises(OSError) if epochs_done == 0.5 else contextlib.nullcontext():
                board.on_log(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    board.on_end(run)
    assert [scalar.step for scalar in events(tmp_path).Scalars("train/loss")] == [250, 500, 750]


def test_a_picture_that_cannot_be_written_leaves_no_empty_file(run, tmp_path):
    run.args = run.args.replace(output_dir=str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError):
            hooks.save_picture(run, "reconstruction-0000", Image.new("RGB", (8, 8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_log_lines_are_json_whatever_was_measured(run, tmp_path):
    run.metrics = {"test_loss": float("inf"), "test_mAP": float("nan"), "train_loss": 0.5}
    hooks.LogFile(tmp_path).on_epoch_end(run)
    line = json.loads((tmp_path / "log.txt").read_text(), parse_constant=pytest.fail)
    assert line == {"test_loss": None, "test_mAP": None, "train_loss": 0.5, "epoch": 0, "n_parameters": 6}


def test_the_best_value_is_the_first_of_equals_and_never_nan(run):
    def judge(watch, *values):
        run.watched, run.best = [watch], {}
        for run.epoch, value in enumerate(values):
            run.metrics = {watch: value}
            run.close_epoch()
        return run.best[watch]

    assert judge("test_acc1", 0.0, 3.0, 3.0, 2.0) == [3.0, 1, 2]
    assert judge("test_loss", 2.0, 1.0, 1.5) == [1.0, 1, 1]
    assert judge("test_loss", float("nan"), 2.0, float("nan")) == [2.0, 1, 1]


def test_the_exported_encoder_starts_a_fine_tuning(observed, labelled_folder, finetune, tmp_path):
    flags = [*TINY, "--stem_stride", 1, "--data_path", labelled_folder, "--batch_size", 4, "--epochs", 1]
    result = finetune(*flags, "--disable_eval", "true", "--finetune", observed / "encoder-best.pth")
    assert result.status == 0 and "newly initialized: norm and head" in result.out


def test_a_plateau_ends_the_run_for_good(labelled_folder, finetune, tmp_path):
    flags = [*TINY, *"--batch_size 11 --lr 0 --min_lr 0 --epochs 6 --warmup_epochs 0 --early_stop 2".split()]
    flags += ["--data_path", labelled_folder, "--output_dir", tmp_path, "--save_ckpt_freq", 10]
    result = finetune(*flags)
    assert result.status == 0 and "trained 3 epochs" in result.out
    assert "stopped early: no better test_acc1" in result.out
    assert len(log_lines(tmp_path)) == 3 and (tmp_path / "confusion.csv").exists()
    assert torch.load(tmp_path / "checkpoint-2.pth")["best"]["test_acc1"][1:] == [0, 2]
    assert "nothing left to do: 3 of 6 epochs are done" in finetune(*flags).out
    finetune(*flags, "--early_stop", 3)
    assert len(log_lines(tmp_path)) == 4


def test_a_run_whose_hooks_have_workers_of_their_own_ends(small, labelled_folder, tmp_path):
    """Python would end what something still holds by SIGTERM, which the workers ignore."""
    probes = ["--probe_freq", 1, "--probe_data_path", labelled_folder, "--num_workers", 1]
    finish(Fork(main_pretrain, [*small, "--epochs", 1, "--picture_freq", 0, *probes]))


def test_a_rank_that_leaves_alone_reports_a_loss_without_the_others(run, monkeypatch):
    def wait(value):
        raise AssertionError("the others may never come")

    monkeypatch.setattr(utils, "all_gather", wait)
    monkeypatch.setattr(utils, "on_main_rank", wait)
    run.add_losses({"loss": torch.tensor(torch.inf)})
    run.end_step()
    run.images, run.sampler = types.SimpleNamespace(name=str), types.SimpleNamespace(batch_indices=lambda *_: [7, 8])
    with pytest.raises(utils.TrainingError, match="loss is inf in epoch 0, step .* Batch: 7, 8$"):
        run.read_losses(alone=True)
