"""Rendered text: whole pages in four rotations and single lines, as input for the document models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["ROTATIONS", "line", "orientation_input", "page", "pages", "recognition_input"]

ROTATIONS = (0, 90, 180, 270)

TEXT = """
    the quick harbour lamp under seven winters kept a letter for every sailor who asked about rope paper
    silver bread morning wind and the price of salt in towns along this river where nobody counts boats
    because each spring brings more of them than any clerk could write into his large blue book
"""
MEAN = np.array((0.485, 0.456, 0.406), dtype=np.float32)
STD = np.array((0.229, 0.224, 0.225), dtype=np.float32)


def sentence(seed: int, words: int) -> str:
    """Words drawn with `seed`, capitalised, with a full stop."""
    drawn = np.random.default_rng(seed).choice(TEXT.split(), words)
    return " ".join(drawn).capitalize() + "."


def page(seed: int, rotation: int = 0, width: int = 600, height: int = 800) -> Image.Image:
    """A white page of black sentences, turned clockwise by `rotation` degrees."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    size = 18 + seed % 5 * 2
    font = ImageFont.load_default(size)
    for row, top in enumerate(range(40, height - 40, int(size * 1.6))):
        draw.text((40, top), sentence(seed * 1000 + row, 5 + (seed + row) % 3), fill="black", font=font)
    return image.rotate(-rotation, expand=True)


def pages(count: int) -> Iterator[tuple[Image.Image, int]]:
    """`count` different pages, each in its four rotations."""
    for seed in range(count):
        for rotation in ROTATIONS:
            yield page(seed, rotation), rotation


def line(seed: int, size: int = 34, height: int = 48) -> tuple[Image.Image, str]:
    """One line of text, `height` pixels high and as wide as it needs, and the text."""
    text = sentence(seed, 4)
    font = ImageFont.load_default(size)
    width = int(font.getlength(text)) + 20
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((10, height // 2), text, fill="black", font=font, anchor="lm")
    return image, text


def orientation_input(image: Image.Image, size: int = 224) -> NDArray[np.float32]:
    """The centre of a page scaled to 256 on its shorter side, ImageNet-normalised: [1, 3, size, size]."""
    scale = 256 / min(image.size)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    pixels = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    normalised = (pixels - MEAN) / STD
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def recognition_input(image: Image.Image) -> NDArray[np.float32]:
    """A line of text as the recognition models take it: [1, 3, 48, width], values in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
