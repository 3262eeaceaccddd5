"""Contact sheets: small pictures in rows, each with a caption."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from evaluation import to_picture
from tools.common import write_output
from utils import UserError


def check_picture(flag, output):
    """The Pillow format of a picture's name. Raises UserError for an unknown ending."""
    Image.init()
    file_format = Image.registered_extensions().get(Path(output).suffix.lower())
    if file_format not in Image.SAVE:
        raise UserError(f"{flag} {output}: unknown file extension; .png and .jpg are known")
    return file_format


def draw_sheet(rows, side=104, border=6, line=13):
    """A Pillow image of rows of (pixels uint8 (C, H, W), caption of lines, color of the frame or None).

    Pictures keep their shape within a square of `side` pixels.
    """
    lines = max(caption.count("\n") + 1 for row in rows for _, caption, _ in row)
    width, height = side + 2 * border, side + 2 * border + lines * line
    sheet = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (pixels, caption, color) in enumerate(row):
            left, top = j * width + border, i * height + border
            picture = to_picture(pixels)
            scale = side / max(picture.size)  # small ones are enlarged without blur
            size = [max(1, round(scale * length)) for length in picture.size]
            picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            if color:
                box = (left - 3, top - 3, left + picture.width + 2, top + picture.height + 2)
                draw.rectangle(box, outline=color, width=3)
            sheet.paste(picture, (left, top))
            caption = "\n".join(part[: side // 6] for part in caption.split("\n"))
            draw.multiline_text((left, top + side + 3), caption, fill="black", spacing=2)
    return sheet


def save_sheet(flag, output, rows):
    """Draw a sheet into a file. Raises UserError if it cannot be written."""
    file_format = check_picture(flag, output)
    write_output(output, lambda file: draw_sheet(rows).save(file, file_format), flag)


def read_pixels(dataset, index):
    """The pixels (C, H, W) uint8 that the network sees of an image, gray if it cannot be read."""
    pixels = dataset[index][0]
    return torch.full((1, 8, 8), 200, dtype=torch.uint8) if pixels is None else pixels
