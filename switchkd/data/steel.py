"""Rendered steel strip with the six defect kinds of NEU-DET and their exact boxes.

A world that anyone can make offline: grey hot-rolled strip with shading, rolling streaks and grain, and up to three
defects whose boxes are measured on the pixels that were drawn. Everything follows from the seed. Ours; only the kinds
and their looks are taken from the NEU surface defect database, none of its pixels.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from switchkd.data.defects import DefectImage

CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")

_COUNT_ODDS = (0.12, 0.4, 0.28, 0.2)  # odds of 0, 1, 2, 3 defects
_SECOND_KIND_ODDS = 0.3
_GAP = 0.03  # least distance between two defects, in image sides


def render_steel(count: int, seed: int, *, size: int = 96, first: int = 0) -> list[DefectImage]:
    """Renders `count` pictures of strip, `size` x `size` pixels, grey in three equal channels.

    Picture i depends on (seed, first + i) alone, so a set can be made in pieces. Boxes are exact: the smallest
    0-based half-open xyxy rectangle around the pixels that a defect changed visibly. About one picture in eight has
    no defect; the others hold one to three, of one or two kinds.
    """
    if count < 0 or size < 32:
        raise ValueError(f"render_steel: count is {count} and size {size}; give count >= 0 and size >= 32 pixels")
    return [_render(seed, first + index, size) for index in range(count)]


def _render(seed: int, index: int, size: int) -> DefectImage:
    rng = np.random.default_rng([seed, index])
    picture = _strip(rng, size)
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[str] = []
    wanted = int(rng.choice(len(_COUNT_ODDS), p=_COUNT_ODDS))
    kinds = rng.permutation(len(CLASSES))[:2]
    for number in range(wanted):
        second = number > 0 and rng.random() < _SECOND_KIND_ODDS
        kind = CLASSES[kinds[1] if second else kinds[0]]
        for _ in range(12):
            width, height = _extent(kind, rng, size)
            x0, y0 = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
            region = (x0, y0, x0 + width, y0 + height)
            if not any(_touch(region, box, _GAP * size) for box in boxes):
                break
        else:
            continue
        change = _DRAW[kind](rng, width, height, size / 96)
        ys, xs = np.nonzero(np.abs(change) > 0.04)
        if len(xs) == 0:
            continue
        picture[y0 : y0 + height, x0 : x0 + width] += change
        boxes.append(tuple(float(v) for v in (x0 + xs.min(), y0 + ys.min(), x0 + xs.max() + 1, y0 + ys.max() + 1)))
        labels.append(kind)
    picture += rng.normal(0.0, rng.uniform(0.008, 0.025), picture.shape)
    grey = (np.clip(picture, 0.0, 1.0) * 255).round().astype(np.uint8)
    return DefectImage(
        image_path=None,
        width=size,
        height=size,
        boxes=tuple(boxes),
        labels=tuple(labels),
        image=Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2)),
        id=f"steel-{seed}-{index}",
    )


def _touch(a: tuple, b: tuple, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise in [-1, 1], [height, width]; a cell is the size of its features in pixels."""
    rows, columns = max(2, round(height / cell_y)), max(2, round(width / cell_x))
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)


def _strip(rng: np.random.Generator, size: int) -> np.ndarray:
    base = rng.uniform(0.4, 0.65)
    shading = rng.uniform(0.02, 0.08) * _noise(rng, size, size, size / 2, size / 2)
    streaks = rng.uniform(0.01, 0.03) * _noise(rng, size, size, size, 2)
    return base + shading + streaks


def _extent(kind: str, rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Width and height of a defect's region in pixels."""
    low_w, high_w, low_h, high_h = _EXTENT[kind]
    width, height = rng.uniform(low_w, high_w) * size, rng.uniform(low_h, high_h) * size
    if kind == "scratches" and rng.random() < 0.4:
        width, height = height, width
    return max(4, int(width)), max(4, int(height))


_EXTENT = {  # least and greatest width, least and greatest height, in image sides
    "crazing": (0.3, 0.5, 0.3, 0.5),
    "inclusion": (0.06, 0.13, 0.2, 0.42),
    "patches": (0.2, 0.42, 0.2, 0.42),
    "pitted_surface": (0.25, 0.5, 0.25, 0.5),
    "rolled-in_scale": (0.25, 0.45, 0.18, 0.35),
    "scratches": (0.05, 0.2, 0.35, 0.75),
}


def _disc(height: int, width: int) -> np.ndarray:
    """1 in the middle, 0 on the ellipse that touches the region's sides, negative outside."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return 1 - np.hypot(*np.meshgrid(y, x, indexing="ij"))


def _crazing(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """A net of fine dark cracks: the borders between the cells of scattered points."""
    cells = max(6, int(width * height / (70 * scale**2)))
    points = rng.uniform(0, 1, (cells, 2)) * (height, width)
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.partition(distance, 1, axis=-1)
    border = np.clip(1.3 * scale - (nearest[..., 1] - nearest[..., 0]), 0, 1)
    return -rng.uniform(0.16, 0.32) * border * (_disc(height, width) > 0.02)


def _inclusion(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """One dark, long, ragged speck along the rolling direction."""
    shape = _disc(height, width) + 0.35 * _noise(rng, height, width, 5 * scale, 2 * scale)
    return -rng.uniform(0.22, 0.42) * np.clip(3 * shape, 0, 1)


def _patches(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """One pale blotch with a ragged rim."""
    shape = _disc(height, width) + 0.3 * _noise(rng, height, width, 8 * scale, 8 * scale)
    mottle = 0.85 + 0.15 * _noise(rng, height, width, 4 * scale, 4 * scale)
    return rng.uniform(0.12, 0.26) * np.clip(5 * shape, 0, 1) * mottle


def _pitted_surface(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """A swarm of small dark pits."""
    pits = max(8, int(width * height / (45 * scale**2)))
    radius, angle = np.sqrt(rng.uniform(0, 1, pits)), rng.uniform(0, 2 * math.pi, pits)
    cy, cx = (radius * np.sin(angle) + 1) / 2 * (height - 1), (radius * np.cos(angle) + 1) / 2 * (width - 1)
    y, x = np.mgrid[0:height, 0:width]
    nearest = np.hypot(y[..., None] - cy, x[..., None] - cx).min(axis=-1)
    return -rng.uniform(0.2, 0.38) * np.clip(1.7 * scale - nearest, 0, 1)


def _rolled_in_scale(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """Dark flakes pressed in across the rolling direction, each with a pale edge."""
    flakes = _noise(rng, height, width, 3.2 * scale, 11 * scale)
    inside = _disc(height, width) > 0
    depth = rng.uniform(0.2, 0.36)
    return (0.4 * depth * np.clip(4 * flakes - 0.8, 0, 1) - depth * np.clip(-4 * flakes - 0.4, 0, 1)) * inside


def _scratches(rng: np.random.Generator, width: int, height: int, scale: float) -> np.ndarray:
    """One bright, thin, slightly bowed line from side to side of its region."""
    long, short = (height, width) if height >= width else (width, height)
    t = np.linspace(0, 1, long)
    lean = t if rng.random() < 0.5 else 1 - t
    centre = np.clip((short - 1) * (lean + rng.uniform(-0.15, 0.15) * np.sin(math.pi * t)), 0, short - 1)
    distance = np.abs(np.arange(short)[None, :] - centre[:, None])
    line = np.clip(rng.uniform(1.0, 1.7) * scale - distance, 0, 1) * rng.uniform(0.7, 1.0, (long, 1))
    return rng.uniform(0.18, 0.38) * (line if height >= width else line.T)


_DRAW = {
    "crazing": _crazing,
    "inclusion": _inclusion,
    "patches": _patches,
    "pitted_surface": _pitted_surface,
    "rolled-in_scale": _rolled_in_scale,
    "scratches": _scratches,
}
