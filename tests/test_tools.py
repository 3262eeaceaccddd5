"""The tools: pictures from any checkpoint with a decoder, conversion, predictions, probes, the benchmark's figures."""

import argparse
import contextlib
import importlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import assert_same_weights, finish, gap, randomise, run_script_here, start_ranks
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment
from timm.models.convnext import checkpoint_filter_fn

import augmentations
import datasets
import evaluation
import main_finetune
from loaders import build_eval_loader
from models.convnextv2 import ConvNeXtV2
from models.fcmae import FCMAE
from tools import benchmark, common, contestants, loaders, probe

pytestmark = [
    pytest.mark.usefixtures("seed_and_one_thread"),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),  # torchvision 0.29
]
ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fcmae_minkowski.safetensors"
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}  # of the fixture


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(NAME, *flags): `python -m tools.NAME FLAGS` in this process, see `run_script_here`."""
    return lambda name, *flags: run_script_here(importlib.import_module(f"tools.{name}"), flags, monkeypatch, capsys)


@pytest.fixture
def original(tmp_path):
    """A checkpoint as the original's Minkowski training writes it, flags pickled as a Namespace."""
    state = {k.removeprefix("state."): v for k, v in load_file(FIXTURE).items() if k.startswith("state.")}
    path = tmp_path / "original.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(input_size=128, mask_ratio=0.5)}, path)
    return path


@pytest.fixture
def finetuned(tmp_path):
    """A checkpoint as fine-tuning writes it, with other EMA weights: its path, the model, the EMA model."""
    model, model_ema = (randomise(ConvNeXtV2(num_classes=3, **SMALL)).eval() for _ in range(2))
    content = {"format": 2, "config": model.config, "epoch": 3, "args": {"input_size": (32, 32)}}
    content |= {"model": model.state_dict(), "model_ema": model_ema.state_dict(), "class_names": CLASS_NAMES}
    torch.save(content, tmp_path / "checkpoint-best.pth")
    return tmp_path / "checkpoint-best.pth", model, model_ema


@pytest.fixture
def pretrained(tmp_path):
    """A checkpoint as pre-training on images of 32 pixels writes it: its path and the model."""
    model = randomise(FCMAE(32, decoder_embed_dim=16, patch_size=8, **SMALL)).eval()
    content = {"format": 2, "model": model.state_dict(), "config": model.config, "epoch": 1}
    torch.save(content | {"args": {"input_size": [32, 32]}}, tmp_path / "checkpoint-0.pth")
    return tmp_path / "checkpoint-0.pth", model


CLASS_NAMES = ["owl", "newt", "red eel"]


def assert_fails(result, words):
    assert result.status == 2 and words in result.err and len(result.err.splitlines()) == 1, result.err


def test_help_waits_for_no_heavy_import():
    names = "benchmark collapse convert index neighbours plot predict probe reconstruct statistics".split()
    heavy = ["timm", "torchvision", "sklearn", "matplotlib", "triton", "torch._dynamo"]
    code = f"""if True:
        import importlib, sys, utils
        from flags import FlagParser
        for name in {names}:
            parser = importlib.import_module(f"tools.{{name}}").get_args_parser()
            assert "--" in FlagParser(parents=[parser]).format_help()
        print([name for name in {heavy} if name in sys.modules])
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True).stdout == b"[]\n"


# ---- statistics


def read_flags(line):
    """{name: values} of a printed command line."""
    flags = [part.split() for part in line.split("--")[1:]]
    return {name: [float(value) for value in values] for name, *values in flags}


@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_numpys_and_every_image_counts_the_same(tool, tmp_path, workers):
    rng, decoded = np.random.default_rng(0), []
    (tmp_path / "train").mkdir()
    for number in range(21):
        image = rng.integers(900, 5000, (20 + number, 30, 5), dtype=np.uint16) // [1, 2, 3, 1, 4]
        np.save(tmp_path / "train" / f"{number:02}.npy", image.astype(np.uint16))
        decoded.append(np.rint((image.clip(1000, 4000) - 1000) * (255 / 3000)) / 255)
    (tmp_path / "train" / "99.npy").write_bytes(b"no image")
    flags = ["--num_workers", workers, *"--in_chans 5 --pixel_range 1000 4000".split()]
    result = tool("statistics", "--data_path", tmp_path, *flags)
    *lines, printed = result.out.splitlines()
    assert result.status == 0 and "99.npy" in lines[0] and lines[1] == "21 images:"
    mean = np.mean([image.mean((0, 1)) for image in decoded], 0)
    std = np.sqrt(np.mean([((image - mean) ** 2).mean((0, 1)) for image in decoded], 0))
    found = read_flags(printed)
    assert np.allclose(found["mean"], mean, rtol=1e-5) and np.allclose(found["std"], std, rtol=1e-5)


def test_statistics_of_the_training_part_of_any_data_set(tool, labelled_folder, tmp_path):
    def pixels(paths):
        return np.stack([np.asarray(Image.open(path), dtype=float) / 255 for path in paths])

    expected = pixels(labelled_folder.glob("train/*/*.png"))
    printed = read_flags(tool("statistics", "--data_path", labelled_folder, "--num_workers", 0).out.splitlines()[-1])
    assert np.allclose(printed["mean"], expected.mean((0, 1, 2)), rtol=1e-5)
    assert np.allclose(printed["std"], expected.std((0, 1, 2)), rtol=1e-5)
    paths = sorted((labelled_folder / "train").glob("*/*.png"))
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{path},{i}\n" for i, path in enumerate(paths)))
    for part in (["--data_path", labelled_folder / "train"], ["--data_path", tmp_path / "a.csv", "--loss", "mse"]):
        part += ["--val_fraction", 0.5, "--num_workers", 0]
        held_out = tool("statistics", *part).out.splitlines()
        args = main_finetune.get_args_parser().parse_args([*map(str, part), "--model", "convnextv2_atto"])
        chosen = datasets.build_labelled_images(True, args)
        expected = pixels(chosen.name(i) for i in range(len(chosen)))
        assert held_out[0] == f"{len(chosen)} images:" and 5 < len(chosen) < 15
        assert np.allclose(read_flags(held_out[1])["mean"], expected.mean((0, 1, 2)), rtol=1e-5)


def test_statistics_log_their_rate(labelled_folder, monkeypatch, capsys):
    from tools import statistics

    clock = iter(range(0, 9999, 3)).__next__
    monkeypatch.setattr(statistics, "time", argparse.Namespace(monotonic=clock))
    args = statistics.get_args_parser().parse_args(["--data_path", str(labelled_folder), "--num_workers", "0"])
    statistics.main(args)
    assert "16 of 22 images, 5 images/s, about 1 s left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_path FOLDER/nothing", "--data_path FOLDER/nothing: no such folder"),
        ("--data_path FOLDER --pixel_range 2 1", "--pixel_range 2 1: give the smaller first"),
        ("--data_path FOLDER", "--data_path: channel 1 is 0.0588235 in all pixels: leave it out"),
        ("--data_path FOLDER --in_chans 5", "none of the first 1 images can be read"),
        ("--data_path FOLDER --shuffle blocks", "unrecognized arguments: --shuffle"),  # no effect there
    ],
)
def test_mistakes_in_statistics_are_one_line(tool, tmp_path, flags, words):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    pixels[:, :, 1] = 15
    Image.fromarray(pixels).save(tmp_path / "a.png")
    flags = flags.replace("FOLDER", str(tmp_path)).split()
    assert_fails(tool("statistics", "--num_workers", 0, *flags), words.replace("FOLDER", str(tmp_path)))


# ---- reconstruct


def test_reconstruct_draws_from_a_checkpoint_of_the_original(tool, original, tmp_path, image_folder):
    images = sorted(image_folder.glob("*/*.png"))[:3]
    picture = tmp_path / "picture.png"
    result = tool("reconstruct", "--checkpoint", original, "--images", *images, "--output", picture)
    assert result.status == 0 and "3 images, mask ratio 0.5" in result.out
    drawn = np.asarray(Image.open(picture)).astype(int)
    assert drawn.shape == (30 + 2 * 132, 2 * (4 * 132 + 8), 3)  # 128 pixels, 2 rows of 2
    first, masked, reconstruction = (drawn[30:158, 4 + 132 * j :][:, :128] for j in range(3))
    gray = (masked == 127).all(-1)
    assert gray.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(first[~gray], reconstruction[~gray]) and not np.array_equal(first[gray], reconstruction[gray])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint /no/such.pth", "/no/such.pth: No such file"),
        ("--checkpoint FOLDER/encoder.pth", "no proj.weight, mask_token, pred.weight"),
        ("--images /no/such.jpg", "/no/such.jpg: cannot be read"),
        ("--output /no/such/folder/a.png", "/no/such/folder/a.png: No such file"),
        ("--output /tmp/picture", "/tmp/picture: unknown file extension"),
        ("--output IMAGE", "is one of the images"),
        ("--input_size 100", "--input_size 100: must be one or two multiples of 32"),
        ("--mask_ratio 1", "--mask_ratio 1: must be from 0 to below 1"),
        ("--mask_ratio 0.99", "mask_ratio 0.99 leaves 0 of 16 patches"),
    ],
)
def test_reconstruct_reports_mistakes_in_one_line(tool, original, tmp_path, image_folder, flags, words):
    image = next(image_folder.glob("*/*.png"))
    torch.save({"model": {"encoder.downsample_layers.0.0.weight": torch.zeros(8, 3, 4, 4)}}, tmp_path / "encoder.pth")
    good = ["--checkpoint", original, "--images", image, "--output", tmp_path / "a.png"]
    flags = flags.replace("FOLDER", str(tmp_path)).replace("IMAGE", str(image))
    assert_fails(tool("reconstruct", *good, *flags.split()), words)


# ---- convert


def small_timm(**kwargs):
    return timm.create_model("convnextv2_tiny", **SMALL, **kwargs).eval()


@torch.no_grad()
def assert_same_logits(model, reference):
    imgs = torch.randn(2, 3, 64, 64)
    assert gap(model(imgs), reference(imgs)) <= 1e-5


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_convert_to_timm_writes_what_timm_loads(tool, finetuned, tmp_path, key):
    path, *models = finetuned
    output = tmp_path / "timm.pth"
    result = tool("convert", path, output, "--to", "timm", *([] if key == "model" else ["--model_key", key]))
    assert result.status == 0
    assert f"depths [1, 1, 2, 1], dims [8, 16, 24, 32], a head, 0 of a decoder left out: {output}" in result.out
    assert_same_logits(small_timm(num_classes=3, checkpoint_path=str(output)), models[key == "model_ema"])


def test_convert_to_original_writes_what_readers_of_the_originals_files_load(tool, finetuned, tmp_path):
    path, model, _ = finetuned
    assert tool("convert", path, tmp_path / "original.pth", "--to", "original").status == 0
    written = torch.load(tmp_path / "original.pth", weights_only=True)
    assert list(written) == ["model"]
    assert_same_weights(written["model"], model.state_dict())
    reference = small_timm(num_classes=3)
    reference.load_state_dict(checkpoint_filter_fn(written, reference), strict=True)
    assert_same_logits(reference, model)


def test_convert_from_timm_to_original_gives_the_originals_names_and_shapes(tool, tmp_path):
    narrow = {"dims": SMALL["dims"], "num_classes": 3}
    reference = randomise(timm.create_model("convnextv2_atto", **narrow)).eval()
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    assert tool("convert", tmp_path / "timm.pth", tmp_path / "original.pth", "--to", "original").status == 0
    model = ConvNeXtV2(depths=(2, 2, 6, 2), **narrow).eval()
    model.load_state_dict(torch.load(tmp_path / "original.pth", weights_only=True)["model"], strict=True)
    assert_same_logits(model, reference)


def test_convert_of_pre_training_to_original_writes_the_encoder_alone(tool, pretrained, tmp_path):
    path, model = pretrained
    result = tool("convert", path, tmp_path / "out.pth", "--to", "original")
    assert result.status == 0 and "no head" in result.out and "15 of a decoder left out" in result.out
    assert_same_weights(torch.load(tmp_path / "out.pth", weights_only=True)["model"], model.encoder.state_dict())


def test_convert_of_the_originals_pre_training_gives_dense_names_and_shapes(tool, original, tmp_path):
    assert tool("convert", original, tmp_path / "out.pth", "--to", "original").status == 0
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    missing, unexpected = ConvNeXtV2(**SMALL).load_state_dict(written, strict=False)
    assert missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"] and not unexpected


@torch.no_grad()
def test_convert_of_pre_training_to_timm_loads_into_a_model_without_classes(tool, tmp_path):
    encoder = randomise(FCMAE(64, decoder_embed_dim=16, **SMALL)).encoder.state_dict()
    torch.save({"model": {f"encoder.{name}": value for name, value in encoder.items()}}, tmp_path / "in.pth")
    result = tool("convert", tmp_path / "in.pth", tmp_path / "timm.pth", "--to", "timm")
    assert result.status == 0 and "timm: num_classes=0" in result.out
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
        ("FOLDER/other.pth FOLDER/out.pth", "FOLDER/other.pth: no downsample_layers.0.0.weight"),
        ("FOLDER/text.pth FOLDER/out.pth", "FOLDER/text.pth: not a whole checkpoint"),
        ("FOLDER/stem.pth FOLDER/out.pth", "FOLDER/stem.pth --to timm: stem stride 1: timm's ConvNeXt V2 has 4 only"),
        ("FOLDER/block.pth FOLDER/out.pth", "FOLDER/block.pth: a network with options {'norm': 'batch'}"),
        ("IN FOLDER/out.pth --model_key ema", "FOLDER/checkpoint-best.pth: holds no weights"),
    ],
)
def test_convert_reports_mistakes_in_one_line_and_leaves_the_input(tool, finetuned, tmp_path, flags, words):
    path, model, _ = finetuned
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    torch.save({"model": {"conv1.weight": torch.ones(8, 3, 7, 7)}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save({"model": ConvNeXtV2(stem_stride=1, **SMALL).state_dict()}, tmp_path / "stem.pth")
    torch.save({"model": model.state_dict(), "config": model.config | {"norm": "batch"}}, tmp_path / "block.pth")
    files = sorted(tmp_path.iterdir())

    flags = [str(path) if flag == "IN" else flag.replace("FOLDER", str(tmp_path)) for flag in flags.split()]
    assert_fails(tool("convert", *flags, "--to", "timm"), words.replace("FOLDER", str(tmp_path)))
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("size", [2**12, 2**17])  # torch reports the same failure differently once it has written much
def test_convert_reports_a_full_disk_in_one_line_and_leaves_nothing(tool, finetuned, tmp_path, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = tool("convert", finetuned[0], tmp_path / "out.pth", "--to", "timm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_fails(result, f"{tmp_path / 'out.pth'}: File too large")
    assert list(tmp_path.iterdir()) == [finetuned[0]]


# ---- predict


@pytest.fixture
def predictor(tmp_path):
    """predictor(...): a classifier that always answers with the probabilities 0.2, 0.5, 0.3, by EMA 0.1, 0.1, 0.8."""

    def save(class_names=tuple(CLASS_NAMES), **kwargs):
        model = ConvNeXtV2(num_classes=3, **SMALL | kwargs).eval()
        torch.nn.init.zeros_(model.head.weight)
        plain, ema = (
            model.state_dict() | {"head.bias": torch.tensor(probabilities).log()}
            for probabilities in ((0.2, 0.5, 0.3), (0.1, 0.1, 0.8))
        )
        flags = {"input_size": (32, 32), "crop_pct": None, "imagenet_default_mean_and_std": True}
        content = {"format": 2, "model": plain, "model_ema": ema, "config": model.config, "epoch": 3, "args": flags}
        path = tmp_path / "checkpoint-best.pth"
        torch.save(content | ({"class_names": list(class_names)} if class_names else {}), path)
        return path

    return save


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
def test_predict_prints_the_most_probable_classes_of_each_image_by_name(tool, predictor, image_folder, flags, line):
    images = sorted(image_folder.glob("*/*.png"))
    result = tool("predict", "--checkpoint", predictor(), images[5], image_folder / "class0", *flags.split())
    assert result.status == 0 and result.out.splitlines() == [f"{image}: {line}" for image in [images[5], *images[:11]]]


def test_predict_numbers_classes_without_names_and_reads_images_with_the_networks_channels(
    tool, predictor, image_folder
):
    image = next(image_folder.glob("*/*.png"))
    result = tool("predict", "--checkpoint", predictor(class_names=None, in_chans=1), image)
    assert (result.status, result.out) == (0, f"{image}: class 1 50.0 %, class 2 30.0 %, class 0 20.0 %\n")


@torch.no_grad()
def test_images_have_the_requested_size_whatever_the_training_evaluated_at():
    flags = {"input_size": [64, 96], "eval_size": [128, 128], "imagenet_default_mean_and_std": False}
    image = Image.new("RGB", (300, 200), (255, 0, 255))
    for requested, size in ((None, (64, 96)), ((160, 160), (160, 160)), ((32, 64), (32, 64))):
        chosen = common.choose_input_size(requested, {"args": flags}, total_stride=32)
        pixels = common.build_transform({"args": flags}, chosen, in_chans=3)(image)
        assert pixels.shape == (3, *size) and pixels[:, 0, 0].tolist() == [1, -1, 1]  # Inception's mean and deviation


def test_predict_sees_the_image_as_evaluation_does(tool, finetuned, tmp_path):
    path, model, _ = finetuned
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]
    by_hand = dict(zip(CLASS_NAMES, model(image).softmax(1)[0].tolist(), strict=True))
    ranked = sorted(by_hand, key=by_hand.get, reverse=True)
    result = tool("predict", "--checkpoint", path, tmp_path / "a.png")
    assert result.out.split(": ")[1] == ", ".join(f"{name} {100 * by_hand[name]:.1f} %" for name in ranked) + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("FOLDER/text.png", "none of the 1 images can be read: UnidentifiedImageError"),
        ("FOLDER/none.png", "IMAGE FOLDER/none.png: No such file or folder"),
        ("FOLDER/empty", "IMAGE FOLDER/empty: no image there"),
        ("FOLDER/a.png --topk 0", "--topk 0: must be a whole number, at least 1"),
        ("FOLDER/a.png --input_size 16", "--input_size 16: must be one or two numbers from 32 on"),
        ("FOLDER/a.png --input_size 64 64 64", "--input_size 64 64 64: must be one or two numbers"),
        ("FOLDER/a.png --checkpoint FOLDER/none.pth", "FOLDER/none.pth: No such file"),
        ("FOLDER/a.png --checkpoint FOLDER/original.pth", "original.pth: no head.weight: accepted is a classifier"),
        ("FOLDER/a.png --checkpoint FOLDER/deep.pth", "stages.2.1.grn.gamma is missing"),
    ],
)
def test_predict_reports_mistakes_in_one_line(tool, original, predictor, tmp_path, flags, words):
    path = predictor()
    state = torch.load(path, weights_only=True)["model"]
    del state["stages.2.1.grn.gamma"]
    torch.save({"model": state}, tmp_path / "deep.pth")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (48, 40)).save(tmp_path / "a.png")
    result = tool("predict", "--checkpoint", path, *flags.replace("FOLDER", str(tmp_path)).split())
    assert_fails(result, words.replace("FOLDER", str(tmp_path)))


# ---- probe


def test_probe_prints_the_same_on_one_and_on_two_processes(tool, pretrained, labelled_folder):
    path, model = pretrained
    flags = ["--data_path", labelled_folder, "--batch_size", 3, "--num_workers", 0, "--device", "cpu"]
    out = tool("probe", "--checkpoint", path, *flags).out
    args = argparse.Namespace(
        in_chans=3, input_size=(32, 32), batch_size=64, num_workers=0, pin_mem=False, max_bad_images=9
    )
    cpu = torch.device("cpu")
    sets = datasets.build_probe_sets(args, str(labelled_folder))
    batches = [build_eval_loader(dataset, args, cpu) for dataset in sets]
    accuracies, *_ = evaluation.probe(model.encode_all, batches, cpu, contextlib.nullcontext)
    knn, linear = accuracies.values()
    line = f"{path}: k-nearest-neighbor {knn:.2f} %  linear {linear:.2f} %  (22 and 7 images)"
    assert out.splitlines() == [line]
    assert line in finish(start_ranks(probe, "--checkpoint", path, *flags)[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--checkpoint /no/such.pth", "/no/such.pth: No such file"),
        ("--data_path /no/such/folder", "--data_path /no/such/folder: no such folder"),
        ("--images_per_class -1", "--images_per_class -1: must be a whole number, at least 0"),
        ("--input_size 4", "--input_size 4: must be one or two numbers from 8 on"),
    ],
)
def test_probe_reports_mistakes_in_one_line(tool, pretrained, flags, words):
    good = ["--checkpoint", pretrained[0], "--data_path", "DIGITS", "--device", "cpu", "--num_workers", 0]
    assert_fails(tool("probe", *good, *flags.split()), words)


# ---- benchmark

BENCHMARK = "--model convnextv2_atto --batch_size 1 --input_size 64 --rounds 1 --device cpu --json --part".split()


def make_row(model, name, *_):
    """A row without its memory, which takes a process."""
    return dict(contestant=name, times_ms=[], peak_mib=2)


def check_report(out, names):
    report = json.loads(out)
    rows = {row["contestant"]: row for row in report["models"][0]["contestants"]}
    assert list(rows)[: len(names)] == names and rows[names[0]][f"times_{names[0]}"] == 1
    assert not any("error" in row for row in rows.values()), rows
    assert all(len(row["times_ms"]) == 1 and row["times_ms"][0] > 1 for row in rows.values())
    assert all(row["peak_mib"] > 1 for row in rows.values())


def test_benchmark_measures_memory_in_a_fresh_process():
    command = [sys.executable, "-m", "tools.benchmark", *BENCHMARK, "step", "--only", "packed"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    check_report(out, ["packed"])
    assert len(json.loads(out)["ceilings"]) == 2 and all(value > 0 for value in json.loads(out)["ceilings"].values())


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("encoder", ["packed", "dense masked", "dense unmasked"]),
        ("step", ["packed", "dense masked", "dense unmasked"]),
        ("finetune", ["dense", "timm", "timm channels last"]),
    ],
)
def test_benchmark_times_every_contestant(tool, part, names, monkeypatch):
    monkeypatch.setattr(benchmark, "make_row_in_fresh_process", make_row)  # in the test above
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda _: {})
    check_report(tool("benchmark", *BENCHMARK, part).out, names)


def test_classifiers_of_the_benchmark_have_the_same_weights():
    dense, timms = (contestants.build_classifier("convnextv2_atto", name) for name in ("dense", "timm"))
    assert gap(timms(torch.ones(1, 3, 32, 32)), dense(torch.ones(1, 3, 32, 32))) < 1e-5


def test_a_contestant_that_fails_says_so_in_its_row_and_the_others_continue(tool, monkeypatch):
    def make_step(model, name, *_):
        return (lambda: 1 / 0) if name == "timm" else (lambda: time.sleep(0.001))

    monkeypatch.setattr(benchmark, "make_row_in_fresh_process", make_row)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda _: {})
    monkeypatch.setattr(contestants, "make_step", make_step)
    out = tool("benchmark", *BENCHMARK, "finetune", "--json", "false").out
    assert "failed: ZeroDivisionError: division by zero" in out and "x dense" in out and "channels last" in out


def test_benchmark_times_loaders(tool, monkeypatch):
    monkeypatch.setattr(loaders, "COUNTS", {(50, 40): 8})
    flags = "--part loader --input_size 64 --rounds 3".split()
    results = json.loads(tool("benchmark", *flags, "--json").out)["files"]
    assert [result["files"] for result in results] == [
        f"{name}, JPEGs of 50 x 40" for name in ("pre-training", "fine-tuning")
    ]
    for result in results:
        original, *others = result["contestants"]
        assert original["times_original"] == 1 and len(others) == 2
        for row in (original, *others):
            ratios = [a / b for a, b in zip(original["times_ms"], row["times_ms"], strict=True)]
            assert row["times_original"] == pytest.approx(sorted(ratios)[1], abs=0.01)
            assert row["images_per_s"] == pytest.approx(1e3 * 8 / sorted(row["times_ms"])[1], rel=0.01)
    out = tool("benchmark", *flags, "--rounds", 1).out
    assert "fine-tuning, JPEGs of 50 x 40, batch size 8" in out and "x original" in out


def test_loaders_of_the_benchmark_deliver_as_many_images(tmp_path, monkeypatch):
    monkeypatch.setitem(auto_augment.NAME_TO_OP, "PosterizeIncreasing", None)  # the original's needs a working one too
    loaders.draw_jpegs(tmp_path / "photographs", 8, (50, 40))
    for transform in (loaders.pretrain_transform(64), loaders.finetune_transform(64)):
        ((imgs, _),) = loaders.original_loader(tmp_path, transform)
        assert imgs.shape == (8, 3, 64, 64) and imgs.dtype == torch.float32 and imgs.min() < 0
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is augmentations.posterize_image
    (batch,) = loaders.project_loader("fine-tuning", tmp_path, 64)
    assert batch.imgs.shape == (8, 3, 64, 64) and batch.imgs.dtype == torch.uint8
    for repeats in (1, 4):
        loader = loaders.project_loader("pre-training", tmp_path, 32, repeats)
        (batch,) = loader
        assert batch.imgs.shape == (8, 3, 32, 32) and batch.imgs.dtype == torch.uint8
        (keys,) = loader.batch_sampler
        assert len({index for _, index, *_ in keys}) == 8 // repeats


@pytest.mark.parametrize(
    "flags", ["--input_size 100", "--rounds 0", "--mask_ratio 1", "--batch_size 1 2 3", "--only packet"]
)
def test_benchmark_reports_mistakes_in_one_line(tool, flags):
    assert_fails(tool("benchmark", *flags.split(), "--device", "cpu"), flags.split()[0])


# ---- index


def test_index_lists_ahead_of_a_job(tool, labelled_folder, tmp_path):
    shutil.copytree(labelled_folder, tmp_path / "data")
    result = tool("index", tmp_path / "data")
    assert result.status == 0 and "22 images, 3 classes; index in" in result.out and "7 images" in result.out
    assert len(list(tmp_path.glob("data/*/.index/*/meta.json"))) == 2
    assert_fails(tool("index", tmp_path / "nothing"), "nothing: no such folder, archive, list or table")
    (tmp_path / "empty").mkdir()
    assert_fails(tool("index", tmp_path / "empty"), "no image there")
