"""Contact sheets: a grid of images with captions below a head."""

from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 176  # pixels, width of a column in which a caption can be read; smaller images are enlarged
MAX_WIDTH = 4096  # of a sheet; larger images are reduced
GAP = 12
LINE = 14
FONT_SIZE = 11
LETTER = 6  # pixels, mean width of a letter
MAX_LINES = 5  # wrapped lines per line of a caption
EDGE = "#b0b0b0"  # around each image, whose own edge may be white


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8, head: Sequence[str] = ()
) -> Image.Image:
    """Arrange images in a grid below the lines of `head`; long captions are wrapped and truncated.

    Images are shown at their size, except that those smaller than MIN_CELL are enlarged by a whole number, and that a
    sheet is at most MAX_WIDTH wide. They are centred in their cells.
    """
    columns = min(columns, len(images))
    longest = max(max(image.size) for image in images)
    scale: float = -(-MIN_CELL // longest)
    if columns * (scale * longest + GAP) + GAP > MAX_WIDTH:
        scale = ((MAX_WIDTH - GAP) / columns - GAP) / longest
    cell = max(round(scale * longest), MIN_CELL)
    font = ImageFont.load_default(size=FONT_SIZE)
    width = columns * (cell + GAP) + GAP
    texts = [
        [
            part
            for line in caption.splitlines()
            for part in wrap(line, cell // LETTER, max_lines=MAX_LINES, placeholder=" ...")
        ]
        for caption in captions
    ]
    head = [part for line in head for part in wrap(line, (width - 2 * GAP) // LETTER)]
    top_of_grid = GAP + (len(head) * LINE + GAP if head else 0)
    cell_height = cell + max(len(lines) for lines in texts) * LINE + 2 * GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width, top_of_grid + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), "\n".join(head), fill="black", font=font)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left = GAP + (index % columns) * (cell + GAP)
        top = top_of_grid + (index // columns) * cell_height
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        place = (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2)
        resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(image if size == image.size else image.resize(size, resampling), place)
        draw.rectangle((place[0] - 1, place[1] - 1, place[0] + size[0], place[1] + size[1]), outline=EDGE)
        draw.multiline_text((left, top + cell + 4), "\n".join(lines), fill="black", font=font)
    return sheet
