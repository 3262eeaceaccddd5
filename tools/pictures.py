"""The pictures that runs and tools draw, with Pillow alone."""

import torch
from PIL import Image, ImageDraw

from datasets import denormalize, normalize


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio, noise=None):
    """A Pillow image with a row original | masked | reconstruction for each image of imgs (N, C, H, W) uint8."""
    was_training = model.training
    model.eval()
    normal = normalize(imgs)
    _, pred, mask = model(normal, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    reconstruction = denormalize(model.reconstruct(normal, pred.float(), mask))
    removed = model.unpatchify(
        mask[:, :, None].expand(-1, -1, model.patch_size**2 * model.in_chans),
        tuple(size // model.patch_size for size in imgs.shape[2:]),
    )
    masked = torch.where(removed.bool(), torch.full_like(imgs, 127), imgs)
    return draw_table(["original", "masked", "reconstruction"], [imgs, masked, reconstruction])


def draw_table(titles, columns, border=4, smallest=112, header=16):
    """A Pillow RGB image of images (N, C, H, W) uint8 in columns under their titles.

    The second half of N stands beside the first. Images less than `smallest` pixels wide are enlarged.
    """
    n, channels, height, width = columns[0].shape
    rows = -(-n // 2)
    enlarge = -(-smallest // width)
    width, height = width * enlarge, height * enlarge
    half = len(columns) * (width + border) + 2 * border
    table = Image.new("RGB", (half * (2 if n > 1 else 1), header + rows * (height + border)), "white")
    for j, (title, images) in enumerate(zip(titles, columns, strict=True)):
        images = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            left, top = i // rows * half + border + j * (width + border), header + i % rows * (height + border)
            if i % rows == 0:
                ImageDraw.Draw(table).text((left, 2), title, fill="black")
            table.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
    return table


def draw_confusion(matrix, names, width=800):
    """A Pillow RGB image of a confusion matrix (K, K), a row a true class: the darker, the larger part of its images.

    With few classes each cell shows its count, and names stand beside rows and above columns.
    """
    count = len(matrix)
    cell = min(max(width // count, 1), 48)
    names = [name[:24] for name in names]
    margin = 40 + 6 * max(map(len, names)) if cell >= 12 else 40
    part = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    shade = 1 - part[:, :, None] * torch.tensor([0.88, 0.62, 0.35])  # white to blue
    heat = Image.fromarray((shade * 255).round().to(torch.uint8).numpy())
    picture = Image.new("RGB", (margin + cell * count + 8, margin + cell * count + 8), "white")
    picture.paste(heat.resize((cell * count,) * 2, Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((margin - 1, margin - 1, margin + cell * count, margin + cell * count), outline="lightgrey")
    draw.text((margin + 4, 4), "predicted", fill="grey")
    upright = Image.new("RGB", (margin - 20, cell * count), "white")  # the columns' names, before they are turned
    for i, name in enumerate(names if cell >= 12 else []):
        at = cell * i + cell // 2
        draw.text((margin - 6, margin + at), name, fill="black", anchor="rm")
        ImageDraw.Draw(upright).text((6, at), name, fill="black", anchor="lm")
        for j in range(count if cell >= 24 else 0):
            if matrix[i, j]:
                where, colour = (margin + cell * j + cell // 2, margin + at), "white" if part[i, j] > 0.5 else "black"
                draw.text(where, str(matrix[i, j].item()), fill=colour, anchor="mm")
    picture.paste(upright.rotate(90, expand=True), (margin, 20))
    draw.text((4, margin + 4 if cell < 12 else margin - 16), "true", fill="grey")
    return picture
