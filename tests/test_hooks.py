"""Hooks see a run and do not change it: each keeps its promise in a real short run, and none moves a weight."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, TINY, assert_same_weights, log_lines, run_here, weights
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import hooks
import main_finetune
import main_pretrain
import utils
from models import convnextv2
from models.checkpoints import split_decoder
from tools import probe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def small(image_folder):
    """5 steps an epoch: 22 images in batches of 4."""
    return [*SMALL, "--data_path", image_folder, "--batch_size", 4, "--warmup_epochs", 1, "--epochs", 2]


@pytest.fixture
def everything(small, labelled_folder):
    """All that observes pre-training."""
    flags = f"--probe_freq 1 --probe_data_path {labelled_folder} --picture_freq 1 --profile_steps 1:3 --print_freq 2"
    return [*small, *flags.split(), "--watch", "probe_linear"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("hooks")


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

    def backwards(args, dataset):
        built = build(args, dataset)
        built.hooks = built.hooks[-3::-1] + built.hooks[-2:]  # those that save stay last
        return built

    monkeypatch.setattr(main_pretrain, "build_hooks", backwards)
    pretrain(*everything, "--output_dir", tmp_path / "backwards")
    monkeypatch.setattr(main_pretrain, "build_hooks", lambda args, _: hooks.Hooks([hooks.Checkpointer()]))
    pretrain(*small, "--output_dir", tmp_path / "none")
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == [
        "checkpoint-0.pth",
        "checkpoint-1.pth",
        "run.lock",
    ]
    for folder in ("backwards", "none"):
        assert_same_weights(weights(tmp_path / folder, "checkpoint-1.pth"), weights(observed, "checkpoint-1.pth"))
    assert log_lines(tmp_path / "backwards") == log_lines(observed)


def test_nor_in_fine_tuning(labelled_folder, finetune, tmp_path, monkeypatch):
    flags = [*TINY, *"--batch_size 4 --epochs 2 --warmup_epochs 1 --model_ema true".split()]
    flags += ["--data_path", labelled_folder]
    finetune(*flags, "--output_dir", tmp_path / "all", "--profile_steps", "2:4")

    def build(args, state):
        return hooks.Hooks([hooks.AveragedWeights(), hooks.Checkpointer()])

    monkeypatch.setattr(main_finetune, "build_hooks", build)
    finetune(*flags, "--output_dir", tmp_path / "few", "--disable_eval", "true")
    few, all_of_them = (torch.load(tmp_path / name / "checkpoint-1.pth") for name in ("few", "all"))
    assert_same_weights(few["model"], all_of_them["model"])
    assert_same_weights(few["model_ema"], all_of_them["model_ema"])


# ---------------------------------------------------------------- a hook of one's own


def hook_of_the_readme():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {"hooks": hooks, "torch": torch}
    exec(code, names)
    return names["WeightNorm"]()


def with_hook(monkeypatch, hook):
    build = main_pretrain.build_hooks

    def build_with_it(args, dataset):
        built = build(args, dataset)
        built.hooks.insert(0, hook)
        return built

    monkeypatch.setattr(main_pretrain, "build_hooks", build_with_it)


def test_what_a_hook_measures_is_logged_everywhere(small, pretrain, tmp_path, monkeypatch):
    with_hook(monkeypatch, hook_of_the_readme())
    out = pretrain(*small, "--output_dir", tmp_path, "--picture_freq", 0).out
    norms = [line["weight_norm"] for line in log_lines(tmp_path)]
    final = torch.nn.utils.get_total_norm(weights(tmp_path, "checkpoint-1.pth").values()).item()
    assert len(norms) == 2 and norms[1] == pytest.approx(final) and f"weight_norm {final:.4g}" in out
    assert [event.value for event in events(tmp_path).Scalars("epoch/weight_norm")] == pytest.approx(norms)


def test_a_hook_is_called_at_its_points_in_their_order(small, pretrain, monkeypatch):
    calls = []

    class Note(hooks.Hook):
        def on_log(self, state):
            calls.append("log")

        def on_step(self, state):
            calls.append(f"step {state.epoch}:{state.step}")

    for point in ("start", "epoch_start", "evaluate", "epoch_end", "end"):
        setattr(Note, f"on_{point}", lambda self, state, point=point: calls.append(point))
    with_hook(monkeypatch, Note())
    pretrain(*small, "--batch_size", 11, "--print_freq", 2)

    def epoch(number):
        return ["epoch_start", f"step {number}:1", "log", f"step {number}:2", "evaluate", "epoch_end"]

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
            "def save_model(*args, **which):\n    raise OSError('disk full')\nutils.save_model = save_model\n",
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
        "import utils, hooks, main_pretrain\n"
        f"{lines}"
        "utils.run_script(main_pretrain.main, utils.FlagParser(parents=[main_pretrain.get_args_parser()]))\n"
    )
    command = [sys.executable, script, *small, "--num_workers", "2", "--epochs", 1, "--output_dir", tmp_path / "out"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(message)


class Failing(hooks.Hook):
    def __init__(self, error, everywhere=False):
        self.error, self.everywhere = error, everywhere

    def on_log(self, state):
        raise self.error


@pytest.fixture
def state(image_folder):
    args = main_pretrain.get_args_parser().parse_args([*map(str, SMALL)])
    return hooks.RunState(args, torch.nn.Linear(2, 2))


def test_a_file_that_cannot_be_written_stops_no_run_but_a_hook_that_others_wait_for_does(state, capsys):
    hooks.Hooks([Failing(OSError("disk full"))])("on_log", state)
    assert "Failing failed: disk full. Training goes on." in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="hook Failing failed .*disk full"):
        hooks.Hooks([Failing(OSError("disk full"), everywhere=True)])("on_log", state)
    with pytest.raises(utils.UserError, match="^one line$"):
        hooks.Hooks([Failing(utils.UserError("one line"))])("on_log", state)


@pytest.mark.parametrize(
    "collective",
    [
        lambda: dist.all_reduce(torch.ones(1)),
        lambda: dist.barrier(),
        lambda: dist.all_gather_object([None], "a"),
        lambda: dist.broadcast_object_list(["a"]),
    ],
)
def test_a_hook_of_the_main_process_cannot_wait_for_the_others(state, collective):
    class Waiting(hooks.Hook):
        def on_step(self, state):
            collective()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="hook Waiting failed .*on the main process alone"):
            hooks.Hooks([Waiting()])("on_step", state)
        Waiting.everywhere = True
        hooks.Hooks([Waiting()])("on_step", state)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- probes


def test_probes_are_logged_beside_the_loss(observed):
    lines, logged = log_lines(observed), events(observed)
    for name in probe.METRICS:
        values = [line[name] for line in lines]
        assert len(values) == 2 and all(0 <= value <= 100 for value in values)
        scalars = logged.Scalars(name.replace("_", "/"))
        assert [event.step for event in scalars] == [1000, 2000]
        assert [event.value for event in scalars] == pytest.approx(values)
    assert f"probe_knn {lines[1]['probe_knn']:.4g}  probe_linear" in (observed / "stdout.txt").read_text()


def test_probe_freq_is_in_epochs_with_the_first_and_the_last(small, labelled_folder, pretrain, tmp_path):
    flags = ["--epochs", 5, "--batch_size", 11, "--probe_freq", 3, "--probe_data_path", labelled_folder]
    pretrain(*small, *flags, "--output_dir", tmp_path, "--picture_freq", 0, "--save_ckpt_freq", 9)
    assert [line["epoch"] for line in log_lines(tmp_path) if "probe_knn" in line] == [0, 2, 4]


def digits():
    """Pixels as features: training and test, half of the set each, with classes."""
    features, targets = load_digits(return_X_y=True)
    features, targets = torch.tensor(features), torch.tensor(targets)
    return features[:900], targets[:900], features[900:], targets[900:]


@pytest.mark.parametrize("k", [1, 20])
def test_k_nearest_neighbours_agree_with_scikit_learn(k):
    train, train_targets, test, test_targets = digits()
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    expected = reference.fit(train, train_targets).score(test, test_targets)
    assert probe.knn_accuracy(*digits(), k=k) == pytest.approx(100 * expected)
    assert 90 < 100 * expected < 100


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_the_linear_probe_agrees_with_scikit_learn(strength):
    train, train_targets, test, test_targets = digits()
    scaler = StandardScaler().fit(train)
    reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaler.transform(train), train_targets)
    expected = reference.score(scaler.transform(test), test_targets)
    assert probe.linear_accuracy(*digits(), strength=strength) == pytest.approx(100 * expected)
    assert 80 < 100 * expected < 100


def test_features_are_pooled_from_whole_images_in_the_order_of_the_set(observed, labelled_folder, monkeypatch):
    """The masked encoder with nothing masked is the dense network."""
    seen = []
    monkeypatch.setattr(probe, "knn_accuracy", lambda *parts: seen.append(parts) or 0.0)
    args = main_pretrain.get_args_parser().parse_args([*map(str, SMALL)])
    args.input_size, args.num_patches, args.probe_freq = (32, 32), 16, 1
    args.probe_data_path, args.probe_images_per_class = str(labelled_folder), 0
    state = hooks.RunState(args, main_pretrain.build_model(args))
    state.model.load_state_dict(weights(observed, "checkpoint-1.pth"))
    probe.Probe(args).on_evaluate(state)
    dense, _ = convnextv2.from_checkpoint(torch.load(observed / "checkpoint-1.pth"), "file")
    loaders = probe.build_loaders(args, str(labelled_folder))
    _, _, unreadable = probe.probe(dense.eval().forward_trunk, loaders, args)
    assert unreadable == []
    for ours, reference in zip(*seen, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    train, train_targets, test, test_targets = seen[0]
    picture = Image.open(sorted((labelled_folder / "train" / "ant").iterdir())[0]).convert("RGB")
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    image = torch.from_numpy((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).float().permute(2, 0, 1)
    with torch.no_grad():
        torch.testing.assert_close(train[0], dense.forward_trunk(image[None]).mean((2, 3))[0], rtol=1e-3, atol=1e-4)
    assert train.shape == (22, 320) and test.shape == (7, 320) and state.model.training
    assert train_targets.tolist() == sorted(train_targets.tolist()) and set(test_targets.tolist()) == {0, 1, 2}


def test_tools_probe_repeats_what_training_logged_on_any_number_of_processes(
    observed, labelled_folder, monkeypatch, capsys
):
    flags = ["--checkpoint", observed / "checkpoint-1.pth", "--data_path", labelled_folder, "--batch_size", 3]
    flags += ["--num_workers", 0, "--device", "cpu"]
    parser = utils.FlagParser(prog="tools.probe", parents=[probe.get_args_parser()])
    alone = run_here(lambda: utils.run_script(probe.main, parser), ["probe", *flags], monkeypatch, capsys)
    line = log_lines(observed)[1]
    expected = f"k-nearest-neighbour {line['probe_knn']:.2f} %  linear {line['probe_linear']:.2f} %  (22 and 7 images)"
    assert expected in alone.out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = [*map(str, [*torchrun, "tools.probe", *flags])]
    assert expected in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout


# ---------------------------------------------------------------- profiler


def test_the_trace_opens_and_holds_the_steps_that_were_asked_for(observed):
    with gzip.open(observed / "profile-1-3.pt.trace.json.gz") as file:
        trace = json.load(file)["traceEvents"]
    names = [event["name"] for event in trace if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2 and "aten::addmm" in names
    out = (observed / "stdout.txt").read_text()
    assert "steps 1 to 2, traced in" in out and " x  aten::addmm" in out


def test_steps_that_do_not_come_are_told(small, pretrain, tmp_path):
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


def test_a_best_checkpoint_that_could_not_be_saved_leaves_the_one_before_the_best(
    small, pretrain, tmp_path, monkeypatch
):
    save, failed = utils.save_model, []

    def fail_once(*args, name=None, **which):
        if name == "best" and args[1] == 0:
            failed.append(1)
            raise OSError("disk full")
        save(*args, name=name, **which)

    monkeypatch.setattr(utils, "save_model", fail_once)
    result = pretrain(*small, "--output_dir", tmp_path, "--watch", "train_loss", "--picture_freq", 0)
    assert failed == [1] and "checkpoint not saved: disk full" in result.out
    assert torch.load(tmp_path / "checkpoint-0.pth")["best"] == {}
    loss = log_lines(tmp_path)[1]["train_loss"]
    assert torch.load(tmp_path / "checkpoint-best.pth")["best"] == {"train_loss": [loss, 1, 0]}


def test_what_is_the_best(state):
    def judge(watch, *values):
        state.args.watch, state.best = watch, {}
        for state.epoch, value in enumerate(values):
            state.metrics = {watch: value}
            state.sum_up()
        return state.best[watch]

    assert judge("test_acc1", 0.0, 3.0, 3.0, 2.0) == [3.0, 1, 2]
    assert judge("test_loss", 2.0, 1.0, 1.5) == [1.0, 1, 1]
    assert judge("test_loss", float("nan"), 2.0, float("nan")) == [2.0, 1, 1]


def test_the_exported_encoder_starts_a_fine_tuning(observed, labelled_folder, finetune, tmp_path):
    flags = [*TINY, "--stem_stride", 1, "--data_path", labelled_folder, "--batch_size", 4, "--epochs", 1]
    result = finetune(*flags, "--disable_eval", "true", "--finetune", observed / "encoder-best.pth")
    assert result.status == 0 and "initialised anew: norm and head" in result.out


def test_a_plateau_ends_the_run_for_good(labelled_folder, finetune, tmp_path):
    flags = [*TINY, *"--batch_size 11 --lr 0 --min_lr 0 --epochs 6 --warmup_epochs 0 --early_stop 2".split()]
    flags += ["--data_path", labelled_folder, "--output_dir", tmp_path, "--save_ckpt_freq", 10]
    result = finetune(*flags)
    assert result.status == 0 and "trained 3 epochs" in result.out
    assert "ended early: no better test_acc1" in result.out
    assert len(log_lines(tmp_path)) == 3 and (tmp_path / "confusion.csv").exists()
    assert torch.load(tmp_path / "checkpoint-2.pth")["best"]["test_acc1"][1:] == [0, 2]
    assert "nothing left to do: 3 of 6 epochs are done" in finetune(*flags).out
    finetune(*flags, "--early_stop", 3)
    assert len(log_lines(tmp_path)) == 4
