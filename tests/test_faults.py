"""Machines that look for faults: damaged files, flags at their limits, checkpoints with one wrong entry.

Whatever goes in, a person gets a result that is right, or one line and exit status 2. `--rounds 10` tries ten times as
much.
"""

import copy
import random
from pathlib import Path

import pytest
import torch
from conftest import TINY

import checkpoints
import main_finetune
import main_pretrain
import schema
import utils
from models import fcmae
from tools import common
from utils import TrainingError, UserError

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune}
SHORT = "--batch_size 8 --epochs 1 --warmup_epochs 0".split()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture
def trained(shared, narrow, labelled_folder, pretrain, finetune):
    """Checkpoints within an epoch, one of each script."""
    flags = [*TINY, "--data_path", labelled_folder, *"--batch_size 4 --epochs 1 --save_ckpt_steps 2".split()]
    flags += "--warmup_epochs 0 --print_freq 1".split()
    small = "--stem_stride 1 --decoder_embed_dim 8 --picture_freq 0".split()
    for name, run, more in (("pretrain", pretrain, small), ("finetune", finetune, ["--model_ema", "true"])):
        if not (shared / name).exists():
            result = run(*flags, *more, "--output_dir", shared / name)
            assert result.status == 0, result.err
    return {name: shared / name / "checkpoint-0-4.pth" for name in MAINS}


def one_line(error):
    return "\n" not in str(error) and len(str(error)) < 1000


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", MAINS)
def test_no_damage_to_a_checkpoint_changes_a_number_unnoticed(trained, tmp_path, name, request):
    """Zeros, noise, a lost end, one flipped bit, at random places."""
    whole = trained[name].read_bytes()
    original = checkpoints.load_checkpoint(trained[name])
    draw = random.Random(name)
    path, refused = tmp_path / "damaged.pth", 0
    for _ in range(250 * request.config.getoption("--rounds")):
        place, length = draw.randrange(len(whole)), draw.choice([1, 8, 100, 4096])
        content = bytearray(whole)
        kind = draw.choice(["zeros", "noise", "end", "bit"])
        if kind == "end":
            del content[place:]
        elif kind == "bit":
            content[place] ^= 1 << draw.randrange(8)
        else:
            content[place : place + length] = bytes(length) if kind == "zeros" else draw.randbytes(length)
        path.write_bytes(content)
        try:
            loaded = checkpoints.load_checkpoint(path)
        except UserError as error:
            assert one_line(error) and str(path) in str(error)
            refused += 1
        else:
            assert same(loaded, original), (kind, place, length)
    assert refused > 150


def test_a_damaged_checkpoint_is_named_and_passed_over(trained, tmp_path, capsys):
    for epoch in (0, 1):
        (tmp_path / f"checkpoint-{epoch}.pth").write_bytes(trained["pretrain"].read_bytes())
    content = bytearray((tmp_path / "checkpoint-1.pth").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)  # a lost block of the disk
    (tmp_path / "checkpoint-1.pth").write_bytes(content)
    assert checkpoints.newest_checkpoint(tmp_path)[1] == tmp_path / "checkpoint-0.pth"
    assert "checkpoint-1.pth: not a whole checkpoint" in capsys.readouterr().out


def test_an_error_of_the_disk_is_no_reason_to_take_an_older_checkpoint(trained, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "verify_checksums", fail)
    with pytest.raises(TrainingError, match="checkpoint-0.*cannot be read: Input/output error. Try again"):
        checkpoints.newest_checkpoint(trained["pretrain"].parent)


def test_pickled_objects_are_called_what_they_are(tmp_path):
    torch.save({"model": {}, "note": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(UserError, match="holds a pathlib.*whose loading could run code"):
        checkpoints.load_checkpoint(tmp_path / "objects.pth")


# ---------------------------------------------------------------- flags


def numeric_flags(module):
    """Flags whose type refuses a word that is no number."""
    for action in module.get_args_parser()._actions:
        if action.type in (int, float) or getattr(action.type, "__qualname__", "").startswith("number."):
            yield action


def count_values(action):
    return action.nargs if isinstance(action.nargs, int) else 1


LIMITS = ["-1", "0", "nan", "inf", "1000000000", "x"]


@pytest.mark.parametrize("name", MAINS)
def test_every_numeric_flag_at_its_limits_is_refused_in_one_line_or_heeded(
    name, request, narrow, labelled_folder, pretrain, finetune
):
    module, run = MAINS[name], {"pretrain": pretrain, "finetune": finetune}[name]
    accepted = []
    more = "--stem_stride 1 --decoder_embed_dim 8" if name == "pretrain" else "--aa none"
    common = [*TINY, *SHORT, "--data_path", labelled_folder, *more.split()]
    for action in numeric_flags(module):
        for value in LIMITS:
            flags = [action.option_strings[0], *[value] * count_values(action)]
            if value in ("nan", "inf", "x"):
                result = run(*common, *flags)
                assert result.status == 2 and len(result.err.splitlines()) == 1, (flags, result.status, result.err)
            else:
                accepted.append(flags)
    random.Random(0).shuffle(accepted)
    rounds = request.config.getoption("--rounds")
    for flags in accepted if rounds > 9 else accepted[: 20 * rounds]:
        result = run(*common, *flags, "--epochs", 1) if "--epochs" not in flags else run(*common, *flags, "--lr", "nan")
        assert result.status in (0, 1, 2) and len(result.err.splitlines()) == (result.status > 0), (flags, result.err)


# ---------------------------------------------------------------- checkpoints with one wrong entry

WRONG = [None, -1, 10**12, 1.5, float("nan"), "x", b"x", [], [1, "a"], {}, {"x": 1}, {1: 2}, torch.zeros(2, 3), True]


def entries(value, depth=2, path=()):
    """Paths to the entries of nested dicts and lists, the first two of a kind."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = list(items)
    if path and path[0] == "args":
        items = [(key, item) for key, item in items if key in ("input_size", "crop_pct", "mask_ratio", "model", "opt")]
    for key, item in items if len(items) < 20 else items[:2]:
        yield (*path, key)
        if depth:
            yield from entries(item, depth - 1, (*path, key))


def draw_cases(content, name, request):
    """(place, value): each entry with one wrong value, with --rounds N with N of them."""
    draw, rounds = random.Random(name), min(request.config.getoption("--rounds"), len(WRONG))
    return [(place, value) for place in entries(content) for value in draw.sample(WRONG, rounds)]


def replaced(content, path, value):
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize("name", MAINS)
def test_every_wrong_entry_of_a_checkpoint_is_refused_in_one_line_or_does_no_harm(
    trained, name, request, narrow, labelled_folder, pretrain, finetune, tmp_path
):
    content = torch.load(trained[name])
    flags = [*TINY, "--data_path", labelled_folder, *"--batch_size 4 --epochs 1 --warmup_epochs 0".split()]
    uses = {"--resume": (finetune, []), "--finetune": (finetune, []), "--eval": (finetune, ["--resume"])}
    if name == "pretrain":
        small = "--stem_stride 1 --decoder_embed_dim 8 --picture_freq 0".split()
        uses = {"--resume": (pretrain, small), "--finetune": (finetune, ["--stem_stride", "1"])}
    path = tmp_path / "wrong.pth"
    for place, value in draw_cases(content, name, request):
        torch.save(replaced(content, place, value), path)
        for use, (run, more) in uses.items():
            command = [*flags, use, path, *more] if use != "--eval" else [*flags, "--eval", "true", *more, path]
            try:
                result = run(*command)
            except Exception as error:
                raise AssertionError((use, place, value)) from error
            expected = {0: 0, 1: 1, 2: 1}.get(result.status)
            assert len(result.err.splitlines()) == expected, (use, place, value, result.err[-2000:])


@pytest.mark.parametrize("name", MAINS)
def test_every_wrong_entry_is_refused_in_one_line_or_does_no_harm_in_the_tools(trained, name, request, tmp_path):
    """What they do with a checkpoint before they read an image."""
    content = torch.load(trained[name])
    path = tmp_path / "wrong.pth"
    for place, value in draw_cases(content, name, request):
        torch.save(replaced(content, place, value), path)
        try:
            model, checkpoint = common.load_network(path, "model|module")
            size = common.choose_input_size(None, checkpoint, 8 * model.config["stem_stride"])
            common.build_transform(checkpoint, size, model.config["in_chans"])
            if name == "pretrain":
                with utils.name_in_errors(path):
                    fcmae.from_checkpoint(checkpoint)
        except UserError as error:
            assert one_line(error), (place, value)
        except Exception as error:
            raise AssertionError((place, value)) from error


def test_the_machine_finds_the_entries_that_matter(trained):
    paths = list(entries(torch.load(trained["pretrain"])))
    for path in (("epoch",), ("args", "input_size"), ("best",), ("optimizer", "param_groups"), ("config", "dims")):
        assert path in paths


@pytest.mark.parametrize("groups", [None, {}, torch.zeros(2, 3), [1], [{"params": torch.zeros(2)}]])
def test_parameter_groups_of_a_wrong_type_are_named_before_they_are_loaded(trained, groups):
    content = replaced(torch.load(trained["finetune"]), ("optimizer", "param_groups"), groups)
    with pytest.raises(UserError, match="optimizer is .* must be the state dict of an optimizer"):
        schema.check_schema(content, "FILE")
