"""How each of the ten skills draws its scenes, questions and answers (`world` has the list of them). Ours.

A skill is a function of `Draws` that returns the scenes of `draws.count` pictures, their questions [count, T] and their
answers [count, T], ids padded with PAD_ID. The answer is drawn first, so that a question says nothing about it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval.ten_skills.scenes import COLOURS, FAULTS, SHAPES, SIZES, SPRITES, SURFACES, Draws, Scenes
from eval.ten_skills.words import (
    COLOURS_CN,
    LETTERS,
    NUMBERS,
    OPTIONS,
    OPTIONS_CN,
    PAD_ID,
    SHAPES_CN,
    SURFACES_CN,
    closed_up,
    ids_of,
    join,
)

_COLOUR, _SHAPE, _SURFACE, _SIZE = ids_of(tuple(COLOURS)), ids_of(SHAPES), ids_of(SURFACES), ids_of(SIZES)
_NUMBER, _LETTER = ids_of(NUMBERS), ids_of(LETTERS)
_YES_NO = ids_of(("no", "yes"))


def _existence(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One to three objects; yes: the asked one, no: one that shares its colour or its shape. The second shares one of
    them in half of both, the third neither."""
    scenes, cells, objects = Scenes.empty(draws.count), draws.order(4), 1 + draws.below(3)
    colour, shape, yes = draws.below(8), draws.below(6), draws.below(2)
    # what an object shares: 0 the colour, 1 the shape, 2 neither, 3 both
    first = np.where(yes, 3, draws.below(2))
    second = np.minimum(draws.below(4), 2)
    for number, shared in enumerate((first, second, np.full(draws.count, 2))):
        hue = np.where((shared == 0) | (shared == 3), colour, draws.other(colour, 8))
        form = np.where((shared == 1) | (shared == 3), shape, draws.other(shape, 6))
        scenes.put(cells[:, number], form, hue, where=number < objects)
    return scenes, join("is there any", _COLOUR[colour], _SHAPE[shape], "?"), _YES_NO[yes][:, None]


def _perception(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One or two objects of different shapes; the first is asked about its colour, surface or size. The second has what
    is asked about in half of the pictures, for a yes as for a no."""
    scenes, cells, shapes = Scenes.empty(draws.count), draws.order(4), draws.order(6)
    yes, asked, second = draws.below(2), draws.below(3), draws.below(2)
    question = np.zeros((3, draws.count), np.int64)
    has = np.zeros((2, 3, draws.count), np.int64)
    for kind, high in enumerate((8, 4, 2)):
        value = draws.below(high)
        question[kind] = value
        has[0, kind] = np.where(yes, value, draws.other(value, high))
        has[1, kind] = np.where(draws.below(2), value, draws.other(value, high))
    for number in range(2):
        scenes.put(cells[:, number], shapes[:, number], *has[number], where=number <= second)
    word = np.choose(asked, [_COLOUR[question[0]], _SURFACE[question[1]], _SIZE[question[2]]])
    return scenes, join("is the", _SHAPE[shapes[:, 0]], word, "?"), _YES_NO[yes][:, None]


def _choice(draws: Draws, cn: bool = False) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One object; its colour, shape or surface is one of four options."""
    scenes = Scenes.empty(draws.count)
    colours, shapes, surfaces = draws.order(8)[:, :4], draws.order(6)[:, :4], draws.order(4)
    asked, right = draws.below(3), draws.below(4)
    rows = np.arange(draws.count)
    scenes.put(draws.below(4), shapes[rows, right], colours[rows, right], surfaces[rows, right])
    colour_words, shape_words, surface_words = (
        (COLOURS_CN, SHAPES_CN, SURFACES_CN) if cn else (COLOURS, SHAPES, SURFACES)
    )
    options = np.where(
        (asked == 0)[:, None],
        ids_of(tuple(colour_words))[colours],
        np.where((asked == 1)[:, None], ids_of(shape_words)[shapes], ids_of(surface_words)[surfaces]),
    )
    kinds = ids_of(("yanse", "xingzhuang", "biaomian") if cn else ("colour", "shape", "surface"))[asked]
    marks = ids_of(OPTIONS_CN if cn else OPTIONS)
    pairs = [part for place in range(4) for part in (marks[place], options[:, place])]
    return scenes, join("nage" if cn else "which", kinds, "?", *pairs), marks[right][:, None]


def _choice_cn(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    return _choice(draws, cn=True)


def _attributes(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One to three objects of different shapes and surfaces; one is named by either and asked for its colour."""
    scenes, cells, objects = Scenes.empty(draws.count), draws.order(4), 1 + draws.below(3)
    shapes, surfaces, colours = draws.order(6), draws.order(4), draws.order(8)
    for number in range(3):
        table = (shapes, colours, surfaces)
        scenes.put(cells[:, number], *(each[:, number] for each in table), where=number < objects)
    by_shape = draws.below(2) == 1
    name = np.where(by_shape, _SHAPE[shapes[:, 0]], _SURFACE[surfaces[:, 0]])
    one = np.where(by_shape, PAD_ID, ids_of("one"))
    question = join("what colour is the", name, one, "?")
    return scenes, closed_up(question), _COLOUR[colours[:, 0]][:, None]


def _relations(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """A named object and the asked one beside, above or below it; in half of the pictures a third one on its other
    side. Colours and shapes are all different."""
    scenes, shapes, colours = Scenes.empty(draws.count), draws.order(6), draws.order(8)
    row, column = draws.below(2), draws.below(2)
    upright, third = draws.below(2), draws.below(2)
    for number, (y, x) in enumerate(((row, column), (row, 1 - column), (1 - row, column))):
        there = (number == 0) | (number == 1 + upright) | (third == 1)
        scenes.put(2 * y + x, shapes[:, number], colours[:, number], where=there)
    sideways = np.where(column == 1, ids_of("left"), ids_of("right"))
    place = np.where(upright, np.where(row == 1, ids_of("above"), ids_of("below")), sideways)
    of = np.where(upright, PAD_ID, ids_of("of"))
    question = join("what is", place, of, "the", _COLOUR[colours[:, 0]], "one ?")
    return scenes, closed_up(question), _SHAPE[np.where(upright, shapes[:, 2], shapes[:, 1])][:, None]


def _chart(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """Two to four bars of different heights and colours; the tallest or the shortest is asked for its colour."""
    scenes, heights, colours = Scenes.empty(draws.count), draws.order(4) + 1, draws.order(8)
    shown = draws.order(4) < (2 + draws.below(3))[:, None]
    scenes.bars[:] = np.where(shown, heights, 0)
    scenes.colour[:] = colours[:, :4]
    tallest = draws.below(2) == 1
    bar = np.where(tallest, scenes.bars.argmax(axis=1), np.where(shown, heights, 9).argmin(axis=1))
    which = np.where(tallest, ids_of("tallest"), ids_of("shortest"))
    answer = _COLOUR[colours[np.arange(draws.count), bar]]
    return scenes, join("what colour is the", which, "bar ?"), answer[:, None]


def _reasoning(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """Two digits side by side, to be added or the right one taken from the left one: 1 to 6 either way."""
    scenes, result, plus = Scenes.empty(draws.count), 1 + draws.below(6), draws.below(2)
    spare = draws.below(420)  # a multiple of 2 to 7, so that each way to a result is as likely
    right = np.where(plus, spare % (result + 1), spare % (7 - result))
    left = np.where(plus, result - right, result + right)
    row = draws.below(2)
    for column, digit in enumerate((left, right)):
        scenes.put(2 * row + column, SPRITES.index("0") + digit, draws.below(8))
    sign = np.where(plus, ids_of("plus"), ids_of("minus"))
    return scenes, join("what is left", sign, "right ?"), _NUMBER[result][:, None]


def _text(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """A word of two letters on one line, each in a colour of its own."""
    scenes, row = Scenes.empty(draws.count), draws.below(2)
    letters = [draws.below(8), draws.below(8)]
    for column, letter in enumerate(letters):
        scenes.put(2 * row + column, SPRITES.index("E") + letter, draws.below(8))
    answer = np.stack([_LETTER[letter] for letter in letters], axis=1)
    return scenes, join("what does the sign say ?"), answer


def _degraded(draws: Draws) -> tuple[Scenes, np.ndarray, np.ndarray]:
    """One object in a blurred, dark or noisy picture. A fifth is unanswerable: the picture is ruined, or its object
    has another colour than the asked."""
    scenes, shape, colour = Scenes.empty(draws.count), draws.below(6), draws.below(8)
    ruined = draws.below(10) == 0
    absent = ~ruined & (draws.below(9) == 0)
    scenes.put(draws.below(4), shape, np.where(absent, draws.other(colour, 8), colour))
    scenes.fault[:] = np.where(ruined, FAULTS.index("ruined"), draws.below(4))
    answer = np.where(ruined | absent, ids_of("unanswerable"), _SHAPE[shape])
    return scenes, join("what shape is the", _COLOUR[colour], "one ?"), answer[:, None]


BY_NAME: dict[str, Callable[[Draws], tuple[Scenes, np.ndarray, np.ndarray]]] = {
    "existence": _existence,
    "perception": _perception,
    "choice": _choice,
    "choice_cn": _choice_cn,
    "attributes": _attributes,
    "relations": _relations,
    "chart": _chart,
    "reasoning": _reasoning,
    "text": _text,
    "degraded": _degraded,
}
