"""Rendered scenes of the ten skills: coloured shapes, letters and digits on a grid of 2 x 2 cells, or a bar chart.

Everything is vectorised over pictures and drawn from a counter: number k of picture i is a hash of (key, i, k), so a
picture is the same whatever the batch it is made in. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

COLOURS = {
    "red": (225, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (240, 230, 40),
    "green": (30, 190, 50),
    "cyan": (40, 215, 225),
    "blue": (40, 70, 240),
    "purple": (165, 45, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SURFACES = ("plain", "striped", "checked", "dotted")
SIZES = ("small", "big")
GLYPHS = {  # five columns, seven rows: the rows as bits
    "0": "0E 11 13 15 19 11 0E",
    "1": "04 0C 04 04 04 04 0E",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "5": "1F 10 1E 01 01 11 0E",
    "6": "06 08 10 1E 11 11 0E",
    "E": "1F 10 10 1E 10 10 1F",
    "H": "11 11 11 1F 11 11 11",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "S": "0F 10 10 0E 01 01 1E",
    "T": "1F 04 04 04 04 04 04",
    "X": "11 11 0A 04 0A 11 11",
    "Z": "1F 01 02 04 08 10 1F",
}
SPRITES = (*SHAPES, *GLYPHS)
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of each cell
FAULTS = ("none", "blurred", "dark", "noisy", "ruined")

_JITTERS = 9  # 3 x 3 places of an object in its cell
_TILES = 128  # of noise
_SHADE = 0.45  # brightness of a surface's dark parts: above the ground's even for white


class Draws:
    """Random numbers of `count` pictures, each a function of (key, number of the picture, number of the draw)."""

    def __init__(self, key: tuple[int, ...], first: int, count: int):
        state = np.uint64(0)
        for part in key:
            state = _mixed(state ^ np.uint64(part))
        self.count = count
        self._rows = _mixed(state + np.arange(first, first + count, dtype=np.uint64))
        self._draw = 0

    def below(self, high: int) -> np.ndarray:
        """Uniform in 0..high-1, [count]."""
        return ((self._bits() >> np.uint64(32)) * np.uint64(high) >> np.uint64(32)).astype(np.int64)

    def other(self, taken: np.ndarray, high: int) -> np.ndarray:
        """Uniform in 0..high-1 without `taken`, [count]."""
        value = self.below(high - 1)
        return value + (value >= taken)

    def order(self, high: int) -> np.ndarray:
        """0..high-1 in random order, [count, high]."""
        return np.argsort(np.stack([self._bits() for _ in range(high)], axis=1), axis=1)

    def _bits(self) -> np.ndarray:
        self._draw += 1
        return _mixed(self._rows + _mixed(np.uint64(self._draw)))


def _mixed(value: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


@dataclass
class Scenes:
    """What N pictures show, by cell; the rest (jitter, brightness, noise) is drawn by `render`.

    sprite, colour, surface, size: [N, 4] places in SPRITES, COLOURS, SURFACES, SIZES; sprite -1 for an empty cell.
    bars: [N, 4] heights 1..4 of a chart's bars from left to right in the colours of `colour`, 0 for none.
    fault: [N] places in FAULTS.
    """

    sprite: np.ndarray
    colour: np.ndarray
    surface: np.ndarray
    size: np.ndarray
    bars: np.ndarray
    fault: np.ndarray

    @classmethod
    def empty(cls, count: int) -> Scenes:
        cells = [np.zeros((count, 4), np.int8) for _ in range(5)]
        cells[0] -= 1
        return cls(*cells, np.zeros(count, np.int8))

    def put(self, cell: np.ndarray, sprite: np.ndarray, colour: np.ndarray, surface=0, size=1, *, where=True) -> None:
        """One object in each picture where `where` holds; all arguments [N], or one value for all."""
        rows = np.arange(len(self.fault))
        for table, value in zip(self._cells(), (sprite, colour, surface, size), strict=True):
            table[rows, cell] = np.where(where, value, table[rows, cell])

    def _cells(self) -> tuple[np.ndarray, ...]:
        return self.sprite, self.colour, self.surface, self.size

    def __getitem__(self, index) -> Scenes:
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def __setitem__(self, index, scenes: Scenes) -> None:
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(scenes, field.name)


def render(scenes: Scenes, draws: Draws, size: int) -> np.ndarray:
    """uint8 pictures [N, size, size, 3]; `size` an even number of 32 pixels or more."""
    count, cell = draws.count, size // 2
    alphas, surfaces, noise = _sprites(cell), _surfaces(cell), _noise(size)
    palette = np.array(list(COLOURS.values()), np.float32)
    pictures = np.empty((count, size, size, 3), np.float32)
    pictures[:] = (20 + draws.below(40)).astype(np.float32)[:, None, None, None]
    for place, (row, column) in enumerate(CELLS):
        jitter, light = draws.below(_JITTERS), 0.8 + draws.below(64) / 320
        shown = np.flatnonzero(scenes.sprite[:, place] >= 0)
        sprite, colour, surface, big = (table[shown, place] for table in scenes._cells())
        paint = (palette[colour] * light[shown, None]).astype(np.float32)
        region = pictures[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        ground = region[shown]
        alpha = alphas[sprite, big, jitter[shown]][..., None]
        region[shown] = ground + alpha * (surfaces[surface][..., None] * paint[:, None, None] - ground)
    _draw_bars(pictures, scenes, palette, draws.below(3))
    grain, ruin = draws.below(_TILES), draws.below(2)
    pictures += 5 * noise[grain][..., None]
    _spoil(pictures, scenes.fault, noise[(grain + 1) % _TILES], ruin)
    return np.clip(pictures, 0, 255).astype(np.uint8)


def _draw_bars(pictures: np.ndarray, scenes: Scenes, palette: np.ndarray, jitter: np.ndarray) -> None:
    """Bars on the lower edge, a quarter of the picture wide each, gaps included; a height is 0.23 of the picture."""
    size = pictures.shape[1]
    chart = np.flatnonzero(scenes.bars.any(axis=1))
    part, gap = pictures[chart], size // 24
    depth = size - np.arange(size)  # pixels from the lower edge
    for column in range(4):
        height = scenes.bars[chart, column]
        top = np.where(height > 0, np.round(0.23 * size * height) + jitter[chart] * size / 48, 0)
        inside = (depth[None, :] <= top[:, None])[:, :, None, None]
        strip = slice(column * size // 4 + gap, (column + 1) * size // 4 - gap)
        part[:, :, strip] = np.where(inside, palette[scenes.colour[chart, column]][:, None, None], part[:, :, strip])
    pictures[chart] = part


def _spoil(pictures: np.ndarray, fault: np.ndarray, noise: np.ndarray, bright: np.ndarray) -> None:
    """Blurs, darkens, covers with noise or ruins the pictures of that fault; a ruined one is all dark or all bright."""
    blurred, dark, noisy, ruined = (np.flatnonzero(fault == FAULTS.index(name)) for name in FAULTS[1:])
    part = pictures[blurred]
    size, reach = pictures.shape[1], pictures.shape[1] // 24
    for axis in (1, 2):
        near = [np.clip(np.arange(size) + shift, 0, size - 1) for shift in range(-reach, reach + 1)]
        part = sum(part.take(pixels, axis) for pixels in near) / len(near)
    pictures[blurred] = part
    pictures[dark] *= 0.35
    pictures[noisy] += 45 * noise[noisy][..., None]
    level = np.where(bright[ruined], 245, 8).astype(np.float32)
    pictures[ruined] = level[:, None, None, None] + 5 * noise[ruined][..., None]


@lru_cache(maxsize=4)
def _noise(size: int) -> np.ndarray:
    """Tiles of grain [_TILES, size, size], sigma 1."""
    return np.random.default_rng(0).standard_normal((_TILES, size, size), np.float32)


@lru_cache(maxsize=4)
def _surfaces(cell: int) -> np.ndarray:
    """Brightness of each surface [4, cell, cell]; a pattern's period is a quarter of the cell."""
    y, x = (np.mgrid[0:cell, 0:cell] + 0.5) / cell * 4 % 1
    wave_y, wave_x = y < 0.5, x < 0.5
    dots = np.hypot(y - 0.5, x - 0.5) < 0.32
    dark = np.stack([np.zeros_like(dots), wave_y, wave_y ^ wave_x, dots])
    return np.where(dark, _SHADE, 1.0).astype(np.float32)


@lru_cache(maxsize=4)
def _sprites(cell: int) -> np.ndarray:
    """Opacity of each sprite, size and place [21, 2, 9, cell, cell], smoothed by 4 x 4 points a pixel."""
    fine = (np.arange(4 * cell) + 0.5) / (4 * cell) * 2 - 1
    table = np.empty((len(SPRITES), 2, _JITTERS, cell, cell), np.float32)
    for place in range(_JITTERS):
        shift = (np.array(divmod(place, 3)) - 1) * 0.06
        for size, radius in enumerate((0.6, 0.88)):
            y, x = np.meshgrid((fine - shift[0]) / radius, (fine - shift[1]) / radius, indexing="ij")
            for sprite, name in enumerate(SPRITES):
                inside = _glyph(name, y, x) if name in GLYPHS else _shape(name, y, x)
                table[sprite, size, place] = inside.reshape(cell, 4, cell, 4).mean(axis=(1, 3))
    return table


def _shape(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which points of the square -1..1 a shape covers."""
    far = np.hypot(y, x)
    if name == "circle":
        return far < 1
    if name == "square":
        return np.maximum(abs(y), abs(x)) < 0.88
    if name == "triangle":
        return (abs(x) < (y + 1) / 2) & (y < 0.9)
    if name == "cross":
        return (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 1)
    if name == "ring":
        return (far < 1) & (far > 0.55)
    return abs(y) + abs(x) < 1


def _glyph(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    rows = [int(row, 16) for row in GLYPHS[name].split()]
    bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], bool)
    row, column = np.floor((y + 1) * 3.5).astype(int), np.floor((x / 0.78 + 1) * 2.5).astype(int)
    inside = (row >= 0) & (row < 7) & (column >= 0) & (column < 5)
    return inside & bits[np.clip(row, 0, 6), np.clip(column, 0, 4)]
