"""Outputs of all images, metrics and probes against scikit-learn, and the pictures of runs."""

import contextlib
import itertools
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomise
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import datasets
import evaluation
import utils
from evaluation import collect, draw_confusion, draw_reconstructions, knn_accuracy, linear_accuracy
from loaders import build_eval_loader
from models import convnextv2
from models.fcmae import FCMAE

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
CPU = torch.device("cpu")


# ---- outputs of all images


def share(rank, world_size, unreadable=3, count=7):
    """A rank's batches of a set of `count` images, whose pixels are their numbers; one of them cannot be read."""
    indices = range(rank, count, world_size)
    batches = [[i for i in indices[first : first + 2] if i != unreadable] for first in range(0, len(indices), 2)]
    names = [
        [f"image {unreadable}"] * (unreadable in indices[first : first + 2]) for first in range(0, len(indices), 2)
    ]
    return [
        SimpleNamespace(
            imgs=torch.tensor(batch).view(-1, 1, 1, 1).expand(-1, 1, 4, 4),
            targets=10 * torch.tensor(batch),
            indices=torch.tensor(batch),
            unreadable=unreadable,
        )
        for batch, unreadable in zip(batches, names, strict=True)
    ]


def collect_on_ranks(world_size, monkeypatch, give_up=lambda rank: False):
    """What `collect` returns on each rank, run one after the other."""

    def run(rank):
        numbers_and_targets = lambda imgs, targets: torch.stack([imgs[:, 0, 0, 0], targets], 1)  # noqa: E731
        loader = share(rank, world_size)
        return collect(numbers_and_targets, loader, CPU, contextlib.nullcontext, give_up=lambda: give_up(rank))

    calls = []  # what each rank gives to all_gather, in turn
    for rank in range(world_size):
        calls.append([])
        monkeypatch.setattr(utils, "all_gather", lambda value: calls[-1].append(value) or [value])
        run(rank)
    results = []
    for rank in range(world_size):
        turns = itertools.count()
        monkeypatch.setattr(
            utils, "all_gather", lambda _, turns=turns: [of_rank[turn] for turn in [next(turns)] for of_rank in calls]
        )
        results.append(run(rank))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_are_in_the_order_of_the_set_on_any_number_of_ranks(monkeypatch, world_size):
    for rows, targets, unreadable in collect_on_ranks(world_size, monkeypatch):
        assert rows.tolist() == [[i, 10 * i] for i in (0, 1, 2, 4, 5, 6)]
        assert targets.tolist() == [0, 10, 20, 40, 50, 60] and unreadable == ["image 3"]


def test_all_ranks_give_up_if_one_does(monkeypatch):
    assert collect_on_ranks(2, monkeypatch, give_up=lambda rank: rank == 1) == [None, None]


def test_a_set_without_a_readable_image_is_an_error():
    empty = torch.empty(0)
    batch = SimpleNamespace(imgs=empty, targets=empty, indices=empty, unreadable=["a.png (OSError: cut short)"])
    with pytest.raises(utils.UserError, match=r"none of the images could be read: a.png \(OSError: cut short\)"):
        collect(None, [batch], CPU, contextlib.nullcontext)


# ---- probes


def digits():
    """Pixels as features: those to fit on and those to test on, half of the set each, with classes."""
    features, targets = load_digits(return_X_y=True)
    features, targets = torch.tensor(features), torch.tensor(targets)
    return features[:900], targets[:900], features[900:], targets[900:]


@pytest.mark.parametrize("k", [1, 20])
def test_k_nearest_neighbors_agree_with_scikit_learn(k):
    train, train_targets, test, test_targets = digits()
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    expected = reference.fit(train, train_targets).score(test, test_targets)
    assert knn_accuracy(*digits(), k=k) == pytest.approx(100 * expected)
    assert 90 < 100 * expected < 100


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_the_linear_probe_agrees_with_scikit_learn(strength):
    train, train_targets, test, test_targets = digits()
    scaler = StandardScaler().fit(train)
    reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaler.transform(train), train_targets)
    expected = reference.score(scaler.transform(test), test_targets)
    assert linear_accuracy(*digits(), strength=strength) == pytest.approx(100 * expected)
    assert 80 < 100 * expected < 100


@pytest.mark.parametrize(("accuracy", "batches"), [(linear_accuracy, 3), (knn_accuracy, 1)])
def test_a_probe_can_be_given_up(accuracy, batches):
    calls = []
    with pytest.raises(InterruptedError):
        accuracy(*digits(), give_up=lambda: calls.append(1) or len(calls) == batches)
    assert len(calls) == batches


def test_a_probe_that_takes_too_long_is_left_out_with_a_line(labelled_folder, capsys):
    """The other ranks wait for it, and would be taken for dead."""
    args = Namespace(in_chans=3, input_size=(32, 32), batch_size=4, num_workers=0, pin_mem=False, max_bad_images=9)
    sets = datasets.build_probe_sets(args, str(labelled_folder))
    loaders = [build_eval_loader(dataset, args, CPU) for dataset in sets]
    accuracies, counts, _ = evaluation.probe(lambda imgs: imgs, loaders, CPU, contextlib.nullcontext, max_seconds=-1)
    assert accuracies == {} and counts == [22, 7] and "probe_linear left out: it takes more" in capsys.readouterr().out


@torch.no_grad()
def test_features_are_pooled_from_whole_images_in_the_order_of_the_set(labelled_folder, monkeypatch):
    """The masked encoder with nothing masked is the dense network."""
    monkeypatch.setattr(evaluation, "knn_accuracy", lambda *tensors, give_up: tensors)
    monkeypatch.setattr(evaluation, "linear_accuracy", lambda *tensors, give_up: 0.0)
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    fcmae = randomise(FCMAE(32, patch_size=8, decoder_embed_dim=16, **small)).eval()
    dense, _ = convnextv2.from_checkpoint({"model": fcmae.state_dict()})
    args = Namespace(in_chans=3, input_size=(32, 32), batch_size=4, num_workers=0, pin_mem=False, max_bad_images=9)
    sets = datasets.build_probe_sets(args, str(labelled_folder))
    loaders = [build_eval_loader(dataset, args, CPU) for dataset in sets]
    measured = []
    for trunk in (fcmae.encode_all, dense.eval().forward_trunk):
        accuracies, counts, unreadable = evaluation.probe(trunk, loaders, CPU, contextlib.nullcontext)
        assert list(accuracies) == list(evaluation.METRICS) and unreadable == []
        measured.append(accuracies["probe_knn"])
    for sparse_tensor, dense_tensor in zip(*measured, strict=True):
        torch.testing.assert_close(sparse_tensor, dense_tensor, rtol=1e-4, atol=1e-5)
    train, train_targets, test, test_targets = measured[0]
    assert train.shape == (22, 32) and test.shape == (7, 32)
    assert train_targets.tolist() == [0] * 8 + [1] * 7 + [2] * 7 and test_targets.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert counts == [22, 7]
    picture = Image.open(min((labelled_folder / "train" / "ant").iterdir())).convert("RGB")
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    image = torch.from_numpy((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).float().permute(2, 0, 1)
    torch.testing.assert_close(train[0], dense.forward_trunk(image[None]).mean((2, 3))[0], rtol=1e-3, atol=1e-4)


# ---- pictures


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_reconstructions_show_visible_patches_as_they_are_and_gray_ones_for_the_masked(in_chans):
    model = FCMAE(16, in_chans, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_embed_dim=8, patch_size=8)
    imgs = torch.randint(0, 100, (3, in_chans, 16, 24), dtype=torch.uint8)
    noise = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7, 0.6]).expand(3, -1)  # visible: patches 0 and 3, below each other
    picture = draw_reconstructions(model, imgs, noise, mask_ratio=0.6)
    enlarge, border, header = 5, 4, 16  # to at least 112 pixels
    half = 3 * (24 * enlarge + border) + 2 * border
    assert picture.size == (2 * half, header + 2 * (16 * enlarge + border)) and model.training
    pixels = np.asarray(picture)[header:, border:]
    original, masked, reconstruction = (pixels[:80, 124 * j : 124 * j + 120] for j in range(3))
    channels = imgs[0, :3] if in_chans >= 3 else imgs[0].expand(3, -1, -1)
    assert np.array_equal(original, channels.permute(1, 2, 0).numpy().repeat(5, 0).repeat(5, 1))
    assert np.array_equal(masked[:, :40], original[:, :40]) and (masked[:, 40:] == 127).all()
    assert np.array_equal(reconstruction[:, :40], original[:, :40])
    assert not np.array_equal(reconstruction[:, 40:], original[:, 40:])


def test_reconstructions_of_normalized_patches_are_drawn_with_and_without_the_true_statistics():
    model = FCMAE(16, 1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_embed_dim=8, patch_size=8, norm_pix_loss=True)
    torch.nn.init.zeros_(model.pred.weight)  # predicts the mean of every patch
    imgs = torch.arange(0, 240, 60).repeat_interleave(64).view(1, 4, 8, 8).to(torch.uint8)  # patches of one gray each
    imgs = model.unpatchify(imgs.flatten(2).float()).byte()
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.2]])  # visible: gray 0 and 180
    pixels = np.asarray(draw_reconstructions(model, imgs, noise, mask_ratio=0.5))[30:, 4:]
    columns = [pixels[: 16 * 7, 116 * j :][:, :112, 0] for j in range(4)]
    corners = [column[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() for column in columns]
    assert corners == [[0, 60, 120, 180], [0, 127, 127, 180], [0, 60, 120, 180], [0, 90, 90, 180]]


def test_confusion_is_darker_for_a_larger_share_of_the_true_class():
    matrix = torch.tensor([[90, 10, 0], [1, 1, 0], [0, 0, 0]])
    pixels = np.asarray(draw_confusion(matrix, ["a", "b", "a very long name of a class"]).convert("L"))
    cell = 48
    margin = len(pixels) - 3 * cell - 8
    assert pixels.shape[1] == len(pixels) and 100 < margin < 200  # room for 24 letters
    shades = pixels[margin + 2 :: cell, margin + 2 :: cell][:3, :3]  # beside the counts
    assert shades[0, 0] < shades[1, 0] == shades[1, 1] < shades[0, 1] < shades[0, 2] == shades[2, 2] == 255
    counts = pixels[margin : margin + 3 * cell, margin : margin + 3 * cell].reshape(3, cell, 3, cell)
    has_text = counts.max((1, 3)) != counts.min((1, 3))
    assert has_text.tolist() == (matrix > 0).tolist()
    assert (pixels[margin:, 20 : margin - 4] < 128).any() and (pixels[24 : margin - 4, margin:] < 128).any()  # names


@pytest.mark.parametrize("names", [["кошка", "собака"], ["猫", "犬"], ["\U000e0001", "b"]])
def test_confusion_draws_names_of_any_alphabet(names):
    """By a font that has them, else as numbers: never as the box of a missing character."""
    font = evaluation.find_font("".join(names))
    if font is None:
        expected = draw_confusion(torch.eye(2, dtype=torch.long), ["class 0", "class 1"])
        assert draw_confusion(torch.eye(2, dtype=torch.long), names).tobytes() == expected.tobytes()
    else:
        missing = bytes(font.getmask("\U0010ffff"))
        assert all(bytes(font.getmask(character)) != missing for character in "".join(names))
    assert draw_confusion(torch.eye(2, dtype=torch.long), names).width > 100


def test_confusion_of_many_classes_has_a_pixel_a_cell_and_no_names():
    assert draw_confusion(torch.eye(1000, dtype=torch.long), ["name"] * 1000).size == (1048, 1048)
