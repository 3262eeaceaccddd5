"""What a network makes of a data set: outputs of all images, what they are worth, probes of features, pictures."""

import contextlib
import math
import subprocess
import time

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import utils
from images import denormalize, normalize, to_pillow
from utils import UserError, format_count

METRICS = ("probe_knn", "probe_linear")  # what `probe` measures


# ---------------------------------------------------------------- answers, and what they are worth


class Evaluation:
    """Answers to every readable image of a data set, in the order of the set.

    loss: mean over the images. targets (n,) or (n, K), answers (n, ...): see below. names: of the network's outputs.
    topk: at which k to report, 1 always. unreadable: names of the images left out. That of a task also has `metrics()`,
    numbers by name, `per_class()`, by name (K,) of the outputs, and `describe()`, a line without loss.
    """

    unit = "class"  # what an output is of
    confusion = None  # or a method: (C, C) counts, row = true class, column = most probable class

    def __init__(self, loss, targets, answers, names, topk=(), unreadable=()):
        self.loss, self.targets, self.answers, self.unreadable = loss, targets, answers, unreadable
        self.names, self.topk = names, sorted({1, *topk})

    def __str__(self):
        left_out = f", {len(self.unreadable)} unreadable left out" if self.unreadable else ""
        return f"{self.describe()}  loss {self.loss:.4f}  ({format_count(len(self.targets), 'image')}{left_out})"


class ClassEvaluation(Evaluation):
    """targets (n,): true classes. answers (n, k): the most probable classes, in falling order. loss: cross-entropy."""

    def is_among(self, k):
        """(n,) whether the class of an image is among the k most probable."""
        return (self.answers[:, :k] == self.targets[:, None]).any(1)

    def accuracy(self, k):
        """The percentage of images where it is."""
        return 100 * self.is_among(k).double().mean().item()

    def count(self, classes):
        """(C,) how often each class occurs."""
        return classes.flatten().long().bincount(minlength=len(self.names))

    def metrics(self):
        """By name: loss, and for each k the accuracy and the class means of precision and recall, in per cent."""
        columns = self.per_class()
        has_images = columns.pop("images") > 0  # a class without is left out of the means
        means = {name: 100 * column[has_images].nan_to_num().mean().item() for name, column in columns.items()}
        return {"loss": self.loss} | {f"acc{k}": self.accuracy(k) for k in self.topk} | means

    def per_class(self):
        """By name, for each class (C,): images, and precision and recall at each k; nan for 0 / 0."""
        images = self.count(self.targets)
        columns = {"images": images}
        for k in self.topk:
            correct = self.count(self.targets[self.is_among(k)]).double()
            columns |= {f"precision{k}": correct / self.count(self.answers[:, :k]), f"recall{k}": correct / images}
        return columns

    def confusion(self):
        """(C, C) counts: row = true class, column = most probable class."""
        count = len(self.names)
        pairs = self.targets * count + self.answers[:, 0].long()
        return pairs.bincount(minlength=count**2).view(count, count)

    def describe(self):
        return "  ".join(f"top-{k} {self.accuracy(k):.2f} %" for k in self.topk)


class MultiLabelEvaluation(Evaluation):
    """targets (n, K): 1 for each class of an image. logits (n, K): the answer is yes above 0, probability 0.5."""

    def __init__(self, loss, targets, logits, *options):
        super().__init__(loss, targets > 0.5, logits > 0, *options)
        images, predicted = self.targets.sum(0), self.answers.sum(0)
        correct = (self.answers & self.targets).sum(0).double()
        areas = [average_precision(*pair) for pair in zip(logits.T, self.targets.T, strict=True)]
        self.columns = {"images": images, "average_precision": torch.stack(areas), "precision": correct / predicted}
        self.columns |= {"recall": correct / images, "f1": 2 * correct / (predicted + images)}

    def per_class(self):
        """By name, for each class (K,): images, average precision, and precision, recall and F1; nan for 0 / 0."""
        return self.columns

    def metrics(self):
        """loss; in per cent: mAP and macro F1, means over the classes that occur, and micro F1, of all answers.

        All three are 0 if no class occurs, as scikit-learn's.
        """
        occurs, answers = self.columns["images"] > 0, self.answers.sum() + self.targets.sum()
        means = (self.columns[name][occurs].mean().nan_to_num() for name in ("average_precision", "f1"))
        mean_ap, macro = (100 * mean.item() for mean in means)
        micro = 200 * ((self.answers & self.targets).sum().double() / answers).nan_to_num().item()
        return {"loss": self.loss, "mAP": mean_ap, "f1_macro": macro, "f1_micro": micro}

    def describe(self):
        return "mAP {mAP:.2f} %  F1 macro {f1_macro:.2f} %  micro {f1_micro:.2f} %".format(**self.metrics())


def average_precision(scores, is_true):
    """The area below precision over recall, in steps, as scikit-learn's; scores, truths (n,). nan without a truth."""
    order = scores.argsort(descending=True)
    scores, correct = scores[order], is_true[order].cumsum(0).double()
    is_threshold = scores.diff(append=scores.new_full((1,), -torch.inf)) != 0  # equal scores are one
    correct, retrieved = correct[is_threshold], is_threshold.nonzero().flatten() + 1
    return (correct / retrieved * correct.diff(prepend=correct.new_zeros(1))).sum() / correct[-1]


class RegressionEvaluation(Evaluation):
    """targets and answers (n, K), float64, in the units of the labels."""

    unit = "target"

    def per_class(self):
        """By name, for each target (K,): mean absolute error, and R2 = 1 - squared errors / squares from the mean.

        As scikit-learn's: R2 of a target that is the same in all images is 1 if it is predicted exactly, else 0.
        """
        errors, spread = self.answers - self.targets, self.targets - self.targets.mean(0)
        squares, same = errors.square().sum(0), self.targets.amin(0) == self.targets.amax(0)
        r2 = torch.where(same, squares == 0, 1 - squares / spread.square().sum(0))
        return {"mae": errors.abs().mean(0), "r2": r2}

    def metrics(self):
        """loss; R2 and MAE, means over the targets."""
        return {"loss": self.loss} | {name: self.per_class()[name].mean().item() for name in ("r2", "mae")}

    def describe(self):
        errors = zip(self.names, self.per_class()["mae"].tolist(), strict=True)
        return f"R2 {self.metrics()['r2']:.4f}  MAE " + ", ".join(f"{name} {error:.4g}" for name, error in errors)


# ---------------------------------------------------------------- outputs of all images


def pool_features(maps):
    """The features of images: the mean over all sites of their maps (N, C, h, w) -> (N, C), float32."""
    return maps.float().mean((2, 3))


@torch.no_grad()
def collect(function, loader, device, autocast, divided=True, give_up=lambda: False, gather=None):
    """function(uint8 imgs, targets) -> (n, D) of all images: rows (n, D), targets (n,), names of unreadable images.

    In the order of the set, on the CPU, the same on all ranks. divided: each rank's loader yields its share; False: the
    whole set. gather: `utils.gather_to_main` brings large rows to the main rank only, the others get them empty; None:
    `utils.all_gather`. Returns None once give_up() is true on any rank. Raises UserError if no image could be read.
    """
    parts, unreadable, given_up = [], [], False
    for batch in loader:
        given_up = give_up()
        if given_up:
            break
        unreadable += batch.unreadable
        if len(batch.imgs):
            inputs = (tensor.to(device, non_blocking=True) for tensor in (batch.imgs, batch.targets))
            with autocast():
                parts.append((function(*inputs).cpu(), batch.targets, batch.indices))
    all_gather = utils.all_gather if divided else lambda value: [value]
    outcomes = all_gather((given_up, bool(parts)))
    if any(given_up for given_up, _ in outcomes):
        return None
    parts, unreadable = (sum((gather or all_gather)(items), []) for items in (parts, unreadable))
    if not any(has_rows for _, has_rows in outcomes):
        raise UserError(f"none of the images could be read: {next(iter(unreadable), 'see the main rank')}")
    if not parts:  # they are on the main rank
        return torch.empty(0), torch.empty(0, dtype=torch.long), []
    rows, targets, indices = map(torch.cat, zip(*parts, strict=True))
    order = indices.argsort()  # so that sums do not depend on how the set was divided
    return rows[order], targets[order], unreadable


# ---------------------------------------------------------------- probes of features


def knn_accuracy(train, train_targets, test, test_targets, k=20, temperature=0.07, give_up=lambda: False):
    """Top-1 accuracy in per cent of k nearest neighbors by cosine, weighted by exp(cosine / temperature).

    Wu et al., 2018. train (n, C), test (m, C): features; targets (n,), (m,): classes. Raises InterruptedError once
    give_up() is true.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    correct, rows = 0, min(1024, 2**27 // len(train) + 1)  # at most 0.5 GB of cosines at a time
    for queries, targets in zip(test.split(rows), test_targets.split(rows), strict=True):
        if give_up():
            raise InterruptedError
        nearest = (queries @ train.T).topk(min(k, len(train)))
        weights = ((nearest.values - 1) / temperature).exp()
        votes = weights.new_zeros(len(queries), train_targets.max() + 1)
        votes.scatter_add_(1, train_targets[nearest.indices], weights)
        correct += (votes.argmax(1) == targets).sum().item()
    return 100 * correct / len(test)


def linear_accuracy(train, train_targets, test, test_targets, strength=1.0, give_up=lambda: False):
    """Top-1 accuracy in per cent of logistic regression on standardized features. Raises as `knn_accuracy`."""
    train, test = train.double(), test.double()
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-12)
    train, test = (train - mean) / std, (test - mean) / std
    weight = train.new_zeros(train_targets.max() + 1, train.shape[1], requires_grad=True)
    bias = train.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-7, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        if give_up():
            raise InterruptedError
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight.T + bias, train_targets)
        loss = loss + weight.square().sum() / (2 * strength * len(train))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return 100 * ((test @ weight.T + bias).argmax(1) == test_targets).double().mean().item()


def probe(trunk, loaders, device, autocast, give_up=lambda: False, max_seconds=math.inf, statistics=None):
    """Classify frozen features, trunk(imgs) -> (N, C, h, w) averaged over all sites, by two simple classifiers.

    loaders: of the images to fit on and of those to test on. Features are gathered on the main rank, which classifies
    while the others wait: for at most max_seconds, then the accuracy that is not known yet is left out. statistics:
    see `normalize`. Returns ({metric of METRICS: per cent}, [images fitted on, images tested on], names of unreadable
    images), the same on all ranks but for the names; None if any gives up. Raises as `collect` does.
    """

    def mean_features(imgs, _):
        return pool_features(trunk(normalize(imgs, statistics)))

    tensors, unreadable = [], []  # tensors: features and targets to fit on, features and targets to test on
    for loader in loaders:
        collected = collect(mean_features, loader, device, autocast, give_up=give_up, gather=utils.gather_to_main)
        if collected is None:
            return None
        tensors += collected[:2]
        unreadable += collected[2]

    def classify():
        end = time.monotonic() + max_seconds
        sets, accuracies = [tensor.to(device) for tensor in tensors], {}
        for name, accuracy in zip(METRICS, (knn_accuracy, linear_accuracy), strict=True):
            try:
                accuracies[name] = accuracy(*sets, give_up=lambda: give_up() or time.monotonic() > end)
            except InterruptedError:
                if give_up():
                    return None
                utils.log(f"{name} left out: it takes more than {max_seconds:g} s; fit on fewer images of each class")
        return accuracies, [len(tensors[0]), len(tensors[2])]

    result = utils.on_main_rank(classify)
    return None if result is None else (*result, unreadable)


# ---------------------------------------------------------------- pictures


@torch.no_grad()
def draw_reconstructions(model, imgs, noise=None, mask_ratio=None, statistics=None):
    """A picture: original | masked | reconstruction of imgs (N, C, H, W) uint8, masked by noise (N, L) or drawn.

    With norm_pix_loss the reconstruction is drawn twice: with each patch's true mean and deviation given back, which
    looks better than the network knows, and with those of the visible patches, which is what it knows. statistics: see
    `normalize`.
    """
    was_training = model.training
    model.eval()
    inputs = normalize(imgs, statistics)
    _, pred, mask = model(inputs, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    titles = {"reconstruction": True}
    if model.norm_pix_loss:
        titles = {"with each patch's\ntrue mean and std": True, "with mean and std\nof visible patches": False}
    grid = mask.float().view(-1, 1, *(side // model.patch_size for side in imgs.shape[2:]))
    is_masked = F.interpolate(grid, imgs.shape[2:]).bool()  # (N, 1, H, W)
    columns = {"original": imgs, "masked": imgs.masked_fill(is_masked, 127)}
    for title, given in titles.items():
        reconstruction = model.reconstruct(inputs, pred.float(), mask, true_statistics=given)
        columns[title] = denormalize(reconstruction, statistics)
    return draw_table(columns)


def to_picture(pixels):
    """uint8 (C, H, W) as a Pillow image: the first three channels are colors, the first of fewer is gray."""
    return to_pillow(pixels[: 3 if len(pixels) >= 3 else 1].cpu())


def draw_table(columns, border=4, min_width=112):
    """A Pillow image of {title: images (N, C, H, W) uint8}, a column each; the second half of N beside the first."""
    header = 2 + 14 * max(title.count("\n") + 1 for title in columns)
    n, _, height, width = next(iter(columns.values())).shape
    rows, factor = -(-n // 2), -(-min_width // width)
    width, height = width * factor, height * factor
    half = len(columns) * (width + border) + 2 * border
    table = Image.new("RGB", (half * min(n, 2), header + rows * (height + border)), "white")
    for j, (title, images) in enumerate(columns.items()):
        for i, pixels in enumerate(images):
            left, top = i // rows * half + border + j * (width + border), header + i % rows * (height + border)
            if i % rows == 0:
                ImageDraw.Draw(table).text((left, 2), title, fill="black")
            table.paste(to_picture(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
    return table


def find_font(text):
    """A font that has all of these characters: Pillow's own for ASCII, else one that fontconfig finds, or None."""
    if text.isascii():
        return ImageFont.load_default()
    codes = " ".join(f"{ord(character):x}" for character in sorted(set(text)))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["fc-list", f":charset={codes}", "--format", "%{file}\\n"]
        files = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        if files:
            return ImageFont.truetype(min(files, key=lambda file: ("Bold" in file, "Sans" not in file, file)), 11)
    return None


def draw_confusion(matrix, names, width=800):
    """A Pillow RGB image of confusion counts (C, C), rows = true classes; darker = a larger share of the row.

    Where no font has the names' characters, the classes' numbers stand for them.
    """
    count = len(matrix)
    cell = min(max(width // count, 1), 48)  # pixels; from 12 on there is room for names, from 24 for counts
    names, font = [name[:24] for name in names], find_font("".join(names))
    if font is None:
        names, font = [f"class {number}" for number in range(count)], ImageFont.load_default()
    margin = 40 + math.ceil(max(map(font.getlength, names))) if cell >= 12 else 40
    side = cell * count
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    color = 1 - share * torch.tensor([0.88, 0.62, 0.35])[:, None, None]  # white to blue
    picture = Image.new("RGB", (margin + side + 8, margin + side + 8), "white")
    cells = to_picture((color * 255).round().to(torch.uint8)).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(cells, (margin, margin))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline="lightgray")
    draw.text((margin + 4, 4), "predicted", fill="gray")
    draw.text((4, margin - 16 if cell >= 12 else margin + 4), "true", fill="gray")
    if cell < 12:
        return picture
    headings = Image.new("RGB", (margin - 20, side), "white")  # names of columns, before they are turned
    for i, name in enumerate(names):
        y = cell * i + cell // 2
        draw.text((margin - 6, margin + y), name, fill="black", anchor="rm", font=font)
        ImageDraw.Draw(headings).text((6, y), name, fill="black", anchor="lm", font=font)
        for j in matrix[i].nonzero().flatten().tolist() if cell >= 24 else ():
            center = margin + cell * j + cell // 2, margin + y
            fill = "white" if share[i, j] > 0.5 else "black"
            draw.text(center, str(matrix[i, j].item()), fill=fill, anchor="mm")
    picture.paste(headings.rotate(90, expand=True), (margin, 19))
    return picture
