"""Contact sheets: a grid of images with captions."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

CELL = 176  # pixels, width of a column
GAP = 12
LINE = 14
FONT_SIZE = 11
MAX_LINES = 5  # wrapped lines per line of a caption


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8) -> Image.Image:
    """Arrange images in a grid; long captions are wrapped and truncated.

    Images are resized so that their longer side is the column width, and are centred in their cells.
    """
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=FONT_SIZE)
    characters = CELL // 6
    texts = [
        [
            part
            for line in caption.splitlines()
            for part in wrap(line, characters, max_lines=MAX_LINES, placeholder=" ...")
        ]
        for caption in captions
    ]
    cell_height = CELL + max(len(lines) for lines in texts) * LINE + 2 * GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left = GAP + (index % columns) * (CELL + GAP)
        top = GAP + (index // columns) * cell_height
        width, height = (max(1, round(CELL * side / max(image.size))) for side in image.size)
        place = (left + (CELL - width) // 2, top + (CELL - height) // 2)
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
        draw.multiline_text((left, top + CELL + 4), "\n".join(lines), fill="black", font=font)
    return sheet
