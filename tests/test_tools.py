"""The tools: pictures from any checkpoint with a decoder, conversion, predictions, and the benchmark's figures."""

import argparse
import json
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import assert_same_weights
from PIL import Image
from safetensors.torch import load_file
from test_models import gap, randomise
from timm.models.convnext import checkpoint_filter_fn

from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tools import benchmark, loaders, predict

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision 0.29

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fcmae_minkowski.safetensors"
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}  # of the fixture


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run `python -m tools.NAME FLAGS` in this process: status, standard output, standard error."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        status = 0
        try:
            runpy.run_module(f"tools.{name}", run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def original(tmp_path):
    """A checkpoint as the original's Minkowski training writes it, flags pickled as a Namespace."""
    state = {k.removeprefix("state."): v for k, v in load_file(FIXTURE).items() if k.startswith("state.")}
    path = tmp_path / "original.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(input_size=128, mask_ratio=0.5)}, path)
    return path


# ---- reconstruct


def test_reconstruct_draws_from_a_checkpoint_of_the_original(tool, original, tmp_path, image_folder):
    images = sorted(image_folder.glob("*/*.png"))[:3]
    picture = tmp_path / "picture.png"
    status, out, _ = tool("reconstruct", "--checkpoint", original, "--images", *images, "--output", picture)
    assert status == 0 and "3 images, mask ratio 0.5" in out
    drawn = np.asarray(Image.open(picture)).astype(int)
    assert drawn.shape == (16 + 2 * 132, 2 * (3 * 132 + 8), 3)  # 128 pixels, 2 rows of 2
    first, masked, reconstruction = (drawn[16:144, 4 + 132 * j :][:, :128] for j in range(3))
    grey = (masked == 127).all(-1)
    assert grey.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(first[~grey], reconstruction[~grey]) and not np.array_equal(first[grey], reconstruction[grey])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--checkpoint /no/such.pth", "/no/such.pth: No such file"),
        ("--images /no/such.jpg", "/no/such.jpg: cannot be read"),
        ("--output /no/such/folder/a.png", "/no/such/folder/a.png: No such file"),
        ("--output /tmp/picture", "/tmp/picture: unknown file extension"),
        ("--input_size 100", "100: must be one or two multiples of 32"),
        ("--mask_ratio 1", "--mask_ratio 1.0: must be between 0 and 1"),
    ],
)
def test_reconstruct_tells_mistakes_in_one_line(tool, original, tmp_path, image_folder, flags, word):
    image = next(image_folder.glob("*/*.png"))
    good = ["--checkpoint", original, "--images", image, "--output", tmp_path / "a.png"]
    status, _, err = tool("reconstruct", *good, *flags.split())
    assert status == 2 and word in err and len(err.splitlines()) == 1


def test_reconstruct_refuses_an_encoder_alone(tool, tmp_path, image_folder):
    path = tmp_path / "encoder.pth"
    torch.save({"model": {"encoder.downsample_layers.0.0.weight": torch.zeros(8, 3, 4, 4)}}, path)
    status, _, err = tool("reconstruct", "--checkpoint", path, "--images", image_folder)
    assert status == 2 and "no proj.weight, mask_token, pred.weight: accepted is an FCMAE with its decoder" in err


# ---- convert


def small_timm(**kwargs):
    return timm.create_model("convnextv2_tiny", **SMALL, **kwargs).eval()


@pytest.fixture
def finetuned(tmp_path):
    """A checkpoint as fine-tuning writes it, with other averaged weights: its path, the model, the averaged model."""
    torch.manual_seed(0)
    models = [randomise(ConvNeXtV2(num_classes=3, **SMALL)).eval() for _ in range(2)]
    path = tmp_path / "checkpoint-best.pth"
    weights = dict(zip(("model", "model_ema"), (model.state_dict() for model in models), strict=True))
    names = ["owl", "newt", "red eel"]
    torch.save({"format": 1, **weights, "epoch": 3, "class_names": names, "args": {"input_size": (32, 32)}}, path)
    return path, *models


@torch.no_grad()
def assert_same_logits(model, reference):
    imgs = torch.randn(2, 3, 64, 64)
    assert gap(model(imgs), reference(imgs)) <= 1e-5


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_convert_to_timm_writes_what_timm_loads(tool, finetuned, tmp_path, key):
    path, *models = finetuned
    out_path = tmp_path / "timm.pth"
    status, out, _ = tool("convert", path, out_path, "--to", "timm", *([] if key == "model" else ["--model_key", key]))
    assert status == 0
    assert f"depths [1, 1, 2, 1], dims [8, 16, 24, 32], a head, 0 of a decoder left out: {out_path}" in out
    assert_same_logits(small_timm(num_classes=3, checkpoint_path=str(out_path)), models[key == "model_ema"])


def test_convert_to_original_writes_what_readers_of_the_originals_files_load(tool, finetuned, tmp_path):
    path, model, _ = finetuned
    assert tool("convert", path, tmp_path / "original.pth", "--to", "original")[0] == 0
    written = torch.load(tmp_path / "original.pth", weights_only=True)
    assert list(written) == ["model"]
    assert_same_weights(written["model"], model.state_dict())
    reference = small_timm(num_classes=3)
    reference.load_state_dict(checkpoint_filter_fn(written, reference), strict=True)
    assert_same_logits(reference, model)


def test_convert_from_timm_to_original_gives_the_originals_names_and_shapes(tool, tmp_path):
    torch.manual_seed(0)
    narrow = {"dims": SMALL["dims"], "num_classes": 3}
    reference = randomise(timm.create_model("convnextv2_atto", **narrow)).eval()
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    assert tool("convert", tmp_path / "timm.pth", tmp_path / "original.pth", "--to", "original")[0] == 0
    model = ConvNeXtV2(depths=(2, 2, 6, 2), **narrow).eval()
    model.load_state_dict(torch.load(tmp_path / "original.pth", weights_only=True)["model"], strict=True)
    assert_same_logits(model, reference)


@pytest.fixture
def pretrained(tmp_path):
    """A checkpoint as pre-training writes it: its path, and the state dict of its encoder."""
    torch.manual_seed(0)
    model = randomise(FCMAE(64, decoder_embed_dim=16, **SMALL))
    torch.save({"format": 1, "model": model.state_dict(), "epoch": 1}, tmp_path / "checkpoint-0.pth")
    return tmp_path / "checkpoint-0.pth", model.encoder.state_dict()


def test_convert_of_pre_training_to_original_writes_the_encoder_alone(tool, pretrained, tmp_path):
    path, encoder = pretrained
    status, out, _ = tool("convert", path, tmp_path / "out.pth", "--to", "original")
    assert status == 0 and "no head" in out and "15 of a decoder left out" in out
    assert_same_weights(torch.load(tmp_path / "out.pth", weights_only=True)["model"], encoder)


def test_convert_of_the_originals_pre_training_gives_dense_names_and_shapes(tool, original, tmp_path):
    assert tool("convert", original, tmp_path / "out.pth", "--to", "original")[0] == 0
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    missing, unexpected = ConvNeXtV2(**SMALL).load_state_dict(written, strict=False)
    assert missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"] and not unexpected


@torch.no_grad()
def test_convert_of_pre_training_to_timm_loads_into_a_model_without_classes(tool, pretrained, tmp_path):
    path, encoder = pretrained
    status, out, _ = tool("convert", path, tmp_path / "timm.pth", "--to", "timm")
    assert status == 0 and "timm: num_classes=0" in out
    reference = small_timm(num_classes=0, checkpoint_path=str(tmp_path / "timm.pth"))
    model = ConvNeXtV2(**SMALL)
    model.load_state_dict(encoder, strict=False)
    model.norm = torch.nn.Identity()  # not pre-trained
    imgs = torch.randn(2, 3, 64, 64)
    assert gap(model.forward_features(imgs), reference.forward_features(imgs).mean((2, 3))) <= 1e-5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("IN FOLDER/no/such/out.pth", "FOLDER/no/such/out.pth: No such file or directory"),
        ("IN FOLDER", "FOLDER: Is a directory"),
        ("IN IN", "FOLDER/checkpoint-best.pth: is the same file as IN"),
        ("IN FOLDER/link.pth", "FOLDER/link.pth: is the same file as IN"),
        ("FOLDER/none.pth out.pth", "FOLDER/none.pth: No such file or directory"),
        ("FOLDER/none.pth IN", "FOLDER/none.pth: No such file or directory"),
        ("FOLDER/other.pth FOLDER/out.pth", "accepted is a ConvNeXt V2"),
        ("FOLDER/text.pth FOLDER/out.pth", "FOLDER/text.pth: not a whole checkpoint"),
        ("IN FOLDER/out.pth --model_key ema", "holds no weights; accepted is a dict of tensors by name"),
    ],
)
def test_convert_tells_mistakes_in_one_line_and_leaves_the_input(tool, finetuned, tmp_path, flags, words):
    path, *_ = finetuned
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    torch.save({"model": {"conv1.weight": torch.ones(8, 3, 7, 7)}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    files = sorted(tmp_path.iterdir())

    flags = [str(path) if flag == "IN" else flag.replace("FOLDER", str(tmp_path)) for flag in flags.split()]
    status, _, err = tool("convert", *flags, "--to", "timm")
    assert status == 2 and words.replace("FOLDER", str(tmp_path)) in err and len(err.splitlines()) == 1
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("size", [2**12, 2**17])  # torch reports the same failure otherwise once it has written much
def test_convert_tells_a_full_disk_in_one_line_and_leaves_nothing(tool, finetuned, tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        status, _, err = tool("convert", finetuned[0], tmp_path / "out.pth", "--to", "timm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and f"{tmp_path / 'out.pth'}: File too large" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [finetuned[0]]


# ---- predict


def predictor(path, names=("owl", "newt", "red eel"), **kwargs):
    """A checkpoint whose classifier always answers with the probabilities 0.2, 0.5 and 0.3, averaged 0.1, 0.1, 0.8."""
    model = ConvNeXtV2(num_classes=3, **SMALL | kwargs).eval()
    torch.nn.init.zeros_(model.head.weight)
    plain, averaged = (
        model.state_dict() | {"head.bias": torch.tensor(probabilities).log()}
        for probabilities in ((0.2, 0.5, 0.3), (0.1, 0.1, 0.8))
    )
    flags = {"input_size": (32, 32), "crop_pct": None, "imagenet_default_mean_and_std": True}
    checkpoint = {"format": 1, "model": plain, "model_ema": averaged, "epoch": 3, "args": flags}
    torch.save(checkpoint | ({"class_names": list(names)} if names else {}), path)
    return path


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("", "newt 50.0 %, red eel 30.0 %, owl 20.0 %"),
        ("--topk 1", "newt 50.0 %"),
        ("--topk 9", "newt 50.0 %, red eel 30.0 %, owl 20.0 %"),
        ("--model_key model_ema --topk 1", "red eel 80.0 %"),
        ("--input_size 64 96 --topk 1", "newt 50.0 %"),
    ],
)
def test_predict_prints_the_likeliest_classes_of_each_image_by_name(tool, tmp_path, image_folder, flags, line):
    path = predictor(tmp_path / "checkpoint-best.pth")
    images = sorted(image_folder.glob("*/*.png"))
    status, out, _ = tool("predict", "--checkpoint", path, images[5], image_folder / "class0", *flags.split())
    assert status == 0 and out.splitlines() == [f"{image}: {line}" for image in [images[5], *images[:11]]]


def test_predict_counts_the_classes_of_a_checkpoint_without_names_and_reads_its_channels(tool, tmp_path, image_folder):
    path = predictor(tmp_path / "checkpoint-best.pth", names=None, in_chans=1)
    image = next(image_folder.glob("*/*.png"))
    status, out, _ = tool("predict", "--checkpoint", path, image)
    assert (status, out) == (0, f"{image}: class 1 50.0 %, class 2 30.0 %, class 0 20.0 %\n")


@torch.no_grad()
def test_predict_takes_the_size_that_is_asked_for_whatever_the_training_evaluated_at():
    trained = {"input_size": [64, 96], "eval_size": [128, 128], "imagenet_default_mean_and_std": False}
    image = Image.new("RGB", (300, 200), (255, 0, 255))
    for asked, size in ((None, (64, 96)), ([160], (160, 160)), ([32, 64], (32, 64))):
        pixels = predict.build_eval_transform(argparse.Namespace(input_size=asked), trained, 3)(image)
        assert pixels.shape == (3, *size) and pixels[:, 0, 0].tolist() == [1, -1, 1]  # Inception's mean and deviation


def test_predict_sees_the_image_as_evaluation_does(tool, finetuned, tmp_path):
    path, model, _ = finetuned
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]
    by_hand = dict(zip(("owl", "newt", "red eel"), model(image).softmax(1)[0].tolist(), strict=True))
    ranked = sorted(by_hand, key=by_hand.get, reverse=True)
    status, out, _ = tool("predict", "--checkpoint", path, tmp_path / "a.png")
    assert out.split(": ")[1] == ", ".join(f"{name} {100 * by_hand[name]:.1f} %" for name in ranked) + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("FOLDER/text.png", "IMAGE FOLDER/text.png: cannot be read"),
        ("FOLDER/none.png", "IMAGE FOLDER/none.png: cannot be read"),
        ("FOLDER/empty", "IMAGE FOLDER/empty: no image there"),
        ("FOLDER/a.png --topk 0", "--topk 0: must be at least 1"),
        ("FOLDER/a.png --input_size 16", "--input_size 16: must be one or two numbers from 32 on"),
        ("FOLDER/a.png --checkpoint FOLDER/none.pth", "FOLDER/none.pth: No such file"),
        ("FOLDER/a.png --checkpoint FOLDER/original.pth", "original.pth: no head.weight: accepted is a classifier"),
        ("FOLDER/a.png --checkpoint FOLDER/deep.pth", "deep.pth: Error(s) in loading state_dict"),
    ],
)
def test_predict_tells_mistakes_in_one_line(tool, original, tmp_path, flags, words):
    path = predictor(tmp_path / "checkpoint-best.pth")
    state = torch.load(path, weights_only=True)["model"]
    del state["stages.2.1.grn.gamma"]
    torch.save({"model": state}, tmp_path / "deep.pth")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (48, 40)).save(tmp_path / "a.png")
    status, _, err = tool("predict", "--checkpoint", path, *flags.replace("FOLDER", str(tmp_path)).split())
    assert status == 2 and words.replace("FOLDER", str(tmp_path)) in err and len(err.splitlines()) == 1


# ---- benchmark


def check_timed(out, contestants):
    report = json.loads(out)
    rows = {row["contestant"]: row for row in report["models"][0]["contestants"]}
    assert list(rows)[:3] == contestants and rows[contestants[0]][f"times_{contestants[0]}"] == 1
    assert not any("error" in row for row in rows.values()), rows
    assert all(len(row["times_ms"]) == 1 and row["times_ms"][0] > 1 for row in rows.values())
    assert all(row["peak_mib"] > 1 for row in rows.values())
    assert all(value > 0 for value in report["ceilings"].values()) and len(report["ceilings"]) == 2


BENCHMARK = "--model convnextv2_atto --batch_size 1 --input_size 64 --rounds 1 --device cpu --json --part".split()


def test_benchmark_measures_memory_in_a_process_of_its_own():
    command = [sys.executable, "-m", "tools.benchmark", *BENCHMARK, "step", "--only", "packed"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    check_timed(out, ["packed"])


@pytest.mark.parametrize(
    "part, contestants",
    [("step", ["packed", "dense masked", "dense unmasked"]), ("finetune", ["dense", "timm", "timm channels last"])],
)
def test_benchmark_times_every_contestant(part, contestants, monkeypatch, capsys, seed_and_one_thread):
    monkeypatch.setattr(benchmark, "memory_alone", lambda *_: dict(peak_mib=2))  # measured in the test above
    monkeypatch.setattr(sys, "argv", ["benchmark", *BENCHMARK, part])
    benchmark.main()
    check_timed(capsys.readouterr().out, contestants)


def test_classifiers_of_the_benchmark_have_the_same_weights(seed_and_one_thread):
    dense, theirs = (benchmark.build_classifier("convnextv2_atto", which) for which in ("dense", "timm"))
    assert gap(theirs(torch.ones(1, 3, 32, 32)), dense(torch.ones(1, 3, 32, 32))) < 1e-5


def test_benchmark_times_loaders(tool, monkeypatch, seed_and_one_thread):
    monkeypatch.setattr(loaders, "COUNTS", {(50, 40): 8, (100, 80): 4})
    status, out, _ = tool("benchmark", *"--part loader --input_size 64 --rounds 3 --json".split())
    results = json.loads(out)["files"]
    names = [f"{training}, JPEGs of {size}" for size in ("50 x 40", "100 x 80") for training in loaders.MAKE_STEPS]
    assert status == 0 and [result["files"] for result in results] == names
    for result, count in zip(results, (8, 8, 4, 4), strict=True):
        original, *others = result["contestants"]
        assert original["times_original"] == 1 and len(others) == 2 - result["files"].startswith("fine")
        for row in (original, *others):
            ratios = [a / b for a, b in zip(original["times_ms"], row["times_ms"], strict=True)]
            assert row["times_original"] == pytest.approx(sorted(ratios)[1], abs=0.01)
            assert row["images_per_s"] == pytest.approx(1e3 * count / sorted(row["times_ms"])[1], rel=0.01)
    status, out, _ = tool("benchmark", *"--part loader --input_size 64 --rounds 1".split())
    assert status == 0 and "fine-tuning, JPEGs of 50 x 40, batch size 8" in out and "x original" in out


def test_loaders_of_the_benchmark_deliver_as_many_images(tmp_path, monkeypatch):
    loaders.draw_jpegs(tmp_path / "photographs", 8, (50, 40))
    for transform in (loaders.original(64), loaders.original_finetuning(64)):
        ((imgs, _),) = loaders.whole_batch(tmp_path, transform)
        assert imgs.shape == (8, 3, 64, 64) and imgs.dtype == torch.float32 and imgs.min() < 0
    (batch,) = loaders.own_finetuning(tmp_path, 64)
    assert batch.imgs.shape == (8, 3, 64, 64) and batch.imgs.dtype == torch.uint8
    for repeats in (1, 4):
        loader = loaders.own(tmp_path, 32, repeats)
        (batch,) = loader
        assert batch.imgs.shape == (8, 3, 32, 32) and batch.imgs.dtype == torch.uint8
        (keys,) = loader.batch_sampler
        assert len({index for _, index, *_ in keys}) == 8 // repeats


def test_benchmark_tells_mistakes_in_one_line(tool):
    for flags in (
        "--input_size 100",
        "--rounds 0",
        "--mask_ratio 1",
        "--batch_size 1 2 3",
        "--triton --device cpu",
        "--only ours",
    ):
        status, _, err = tool("benchmark", *flags.split())
        assert status == 2 and flags.split()[0] in err.splitlines()[-1]
