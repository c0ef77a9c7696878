from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from eval.ten_skills import words, world
from eval.ten_skills.scenes import COLOURS, FAULTS, SHAPES, SIZES, SPRITES, SURFACES
from switchkd.data import encode

ALL = (*world.SKILLS, world.LOCATE)
BINARY = {"existence", "perception"}


def _same(a, b):
    assert a.ids.tolist() == b.ids.tolist()
    for name in ("images", "questions", "answers"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def _of_skill(samples, skill):
    return samples[samples.skills == samples.names.index(skill)]


def test_a_stream_is_the_same_in_any_pieces_and_with_any_other_skills():
    whole = world.make_samples("train", 47, 3, skills=ALL)
    _same(whole[5:31], world.make_samples("train", 26, 3, skills=ALL, first=5))
    _same(_of_skill(whole, "chart"), world.make_samples("train", 5, 3, skills=("chart",))[: (whole.skills == 6).sum()])
    assert whole.ids[0] == "train-3-existence-0"
    assert whole.ids[11] == "train-3-existence-1"


def test_splits_and_seeds_share_no_picture():
    streams = [(split, seed) for split in world.SPLITS for seed in (0, 1, 2)]
    seen = [
        {image.tobytes() for image in world.make_samples(split, 220, seed, skills=ALL, size=32).images}
        for split, seed in streams
    ]
    assert sum(map(len, seen)) == len(set().union(*seen)) > 0.97 * 220 * len(streams)


def test_the_vocabulary_is_closed_and_small():
    assert len(set(world.VOCABULARY)) == len(world.VOCABULARY) <= 128
    samples = world.make_samples("train", 4400, 0, skills=ALL, size=32)
    used = np.unique(np.concatenate([samples.questions.ravel(), samples.answers.ravel()]))
    # every row but the marks is of use
    assert set(range(len(world.VOCABULARY))) - set(used.tolist()) == {words.IMAGE_ID, words.ANSWER_ID}
    lengths = (samples.questions != words.PAD_ID).sum(axis=1), (samples.answers != words.PAD_ID).sum(axis=1)
    assert (lengths[0].max(), lengths[1].max()) == (world.QUESTION_LENGTH, world.ANSWER_LENGTH)
    assert (lengths[0] + 1 + lengths[1]).max() <= world.TEXT_LENGTH
    assert lengths[1][samples.skills < 10].max() == 3


def test_captions_tell_what_the_scene_holds():
    samples = world.make_samples("train", 2200, 0, skills=ALL, size=32)
    scenes, told = samples.scenes, words.captions(samples.scenes)
    assert told.shape == (2200, words.CAPTION_LENGTH)
    kinds = Counter()
    for row in np.flatnonzero(samples.skills != ALL.index(world.LOCATE)):
        if scenes.fault[row] == FAULTS.index("ruined"):
            wanted, kind = ["unanswerable"], "ruined"
        elif scenes.bars[row].any():
            hues = [list(COLOURS)[colour] for colour in scenes.colour[row]]
            bars = zip(hues, scenes.bars[row], strict=True)
            wanted, kind = [f"{hue} {height}" if height else "none" for hue, height in bars], "chart"
        else:
            wanted, kind = [], "objects"
            for cell in range(4):
                sprite = scenes.sprite[row, cell]
                looks = [SIZES[scenes.size[row, cell]], SURFACES[scenes.surface[row, cell]]]
                looks.append(list(COLOURS)[scenes.colour[row, cell]])
                wanted.append(" ".join([*looks, SPRITES[sprite]]) if sprite >= 0 else "none")
        kinds[kind] += 1
        assert world.text_of(told[row]) == " ".join(wanted)
        assert told[row][(told[row] != words.PAD_ID).sum() - 1] == words.END_ID
    assert min(kinds[kind] for kind in ("ruined", "chart", "objects")) > 10
    captioned = np.zeros(len(samples), bool)
    captioned[ALL.index(world.LOCATE)] = True
    with pytest.raises(ValueError, match="a strip of steel has no scene"):
        world.sequences(samples, 16, captioned)


@pytest.fixture(scope="module")
def train():
    return world.make_samples("train", 40000, 0, size=32)


@pytest.fixture(scope="module")
def test():
    return world.make_samples("test", 10000, 0, size=32)


def _answers(samples):
    return [world.text_of(row) for row in samples.answers]


def test_a_predictor_that_sees_the_question_alone_stays_at_the_majority_answer(train, test):
    chances = world.chance(test)
    assert list(chances) == list(world.SKILLS)
    for skill, chance in chances.items():
        known = defaultdict(Counter)
        fit, judged = _of_skill(train, skill), _of_skill(test, skill)
        for question, answer in zip(fit.questions, _answers(fit), strict=True):
            known[question.tobytes()][answer] += 1
        majority = Counter(_answers(fit)).most_common(1)[0][0]
        guesses = [
            known[question.tobytes()].most_common(1)[0][0] if question.tobytes() in known else majority
            for question in judged.questions
        ]
        blind = np.mean([guess == answer for guess, answer in zip(guesses, _answers(judged), strict=True)])
        assert blind < chance + 0.04, (skill, blind, chance)
        assert chance < (0.55 if skill in BINARY else 0.29), (skill, chance)


def _objects(samples, row):
    """The objects of a picture: dicts of words, with the row and column of the cell."""
    scene = samples.scenes[row]
    return [
        {
            "name": SPRITES[scene.sprite[cell]],
            "colour": list(COLOURS)[scene.colour[cell]],
            "surface": SURFACES[scene.surface[cell]],
            "size": SIZES[scene.size[cell]],
            "row": cell // 2,
            "column": cell % 2,
        }
        for cell in range(4)
        if scene.sprite[cell] >= 0
    ]


def _one(objects):
    (found,) = objects
    return found


def _existence(question, objects, scene):
    colour, shape = question[3:5]
    return "yes" if any((o["colour"], o["name"]) == (colour, shape) for o in objects) else "no"


def _perception(question, objects, scene):
    subject = _one(o for o in objects if o["name"] == question[2])
    return "yes" if question[3] in (subject["colour"], subject["surface"], subject["size"]) else "no"


def _choice(question, objects, scene):
    subject = _one(objects)
    options = dict(zip(question[4::2], question[3::2], strict=True))
    return options[subject["name" if question[1] == "shape" else question[1]]]


def _choice_cn(question, objects, scene):
    tables = [(words.COLOURS_CN, COLOURS), (words.SHAPES_CN, SHAPES), (words.SURFACES_CN, SURFACES)]
    tables += [(words.OPTIONS_CN, words.OPTIONS), (("yanse", "xingzhuang", "biaomian"), ("colour", "shape", "surface"))]
    english = {cn: en for cns, ens in tables for cn, en in zip(cns, ens, strict=True)}
    answer = _choice([english.get(word, word) for word in question], objects, scene)
    return words.OPTIONS_CN[words.OPTIONS.index(answer)]


def _attributes(question, objects, scene):
    return _one(o for o in objects if question[4] in (o["name"], o["surface"]))["colour"]


def _relations(question, objects, scene):
    subject = _one(o for o in objects if o["colour"] == question[-3])
    down, across = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[question[2]]
    return _one(o for o in objects if (o["row"], o["column"]) == (subject["row"] + down, subject["column"] + across))[
        "name"
    ]


def _chart(question, objects, scene):
    bars = [(height, colour) for height, colour in zip(scene.bars, scene.colour, strict=True) if height]
    assert not objects
    assert 2 <= len(bars) <= 4
    assert len({height for height, _ in bars}) == len({colour for _, colour in bars}) == len(bars)
    return list(COLOURS)[(max if question[4] == "tallest" else min)(bars)[1]]


def _reasoning(question, objects, scene):
    left, right = (int(o["name"]) for o in sorted(objects, key=lambda o: o["column"]))
    return str(left + right if question[3] == "plus" else left - right)


def _text(question, objects, scene):
    assert objects[0]["row"] == objects[1]["row"]
    return " ".join(o["name"] for o in objects)


def _degraded(question, objects, scene):
    if FAULTS[scene.fault] == "ruined" or _one(objects)["colour"] != question[4]:
        return "unanswerable"
    return objects[0]["name"]


ORACLES = {
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


@pytest.mark.parametrize("skill", world.SKILLS)
def test_the_answer_follows_from_the_scene(test, skill):
    samples = _of_skill(test, skill)[:400]
    for row, answer in enumerate(_answers(samples)):
        question = world.text_of(samples.questions[row]).split()
        assert ORACLES[skill](question, _objects(samples, row), samples.scenes[row]) == answer, samples.ids[row]


def test_a_no_of_existence_shares_colour_or_shape_with_an_object(test):
    samples = _of_skill(test, "existence")
    for row, answer in enumerate(_answers(samples)):
        colour, shape = world.text_of(samples.questions[row]).split()[3:5]
        shares = [(o["colour"] == colour) != (o["name"] == shape) for o in _objects(samples, row)]
        assert any(shares) or answer == "yes"


def test_pictures_show_what_the_scene_says(test):
    """The pixel in the middle of each big, plain square is of its colour, and empty cells are grey."""
    checked = 0
    for row in range(0, 2000):
        scene, pixels = test.scenes[row], test.images[row].astype(int)
        if scene.fault or scene.bars.any():
            continue
        for cell in range(4):
            pixel = pixels[8 + 16 * (cell // 2), 8 + 16 * (cell % 2)]
            if scene.sprite[cell] < 0:
                assert np.ptp(pixel) < 5, test.ids[row]
            elif SPRITES[scene.sprite[cell]] == "square" and scene.size[cell] and not scene.surface[cell]:
                colours = np.array(list(COLOURS.values()))
                nearest = np.abs(pixel / pixel.max() - colours / colours.max(axis=1, keepdims=True)).sum(axis=1)
                assert nearest.argmin() == scene.colour[cell], test.ids[row]
                checked += 1
    assert checked > 100


def test_located_answers_hold_the_box_and_are_scored_by_overlap():
    samples = world.make_samples("validation", 60, 0, skills=(world.LOCATE,), size=64)
    answers = samples.answers
    assert world.located(answers, answers).all()
    none = answers[:, 0] == world.VOCABULARY.index("none")
    assert 0 < none.sum() < 20
    zero = world.VOCABULARY.index("0")
    boxes = answers[~none, :4] - zero
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.max() <= world.GRID

    whole = np.array([[zero, zero, zero + 8, zero + 8, words.END_ID]] * 3)
    half, third, broken = whole.copy(), whole.copy(), whole.copy()
    half[:, 2], third[:, 2], broken[:, 4] = zero + 4, zero + 3, zero
    assert world.located(half, whole).all()
    assert not world.located(third, whole).any()
    assert not world.located(broken, whole).any()
    assert not world.located(whole, answers[none][:3]).any()


def test_sequences_are_what_the_processor_makes_of_the_conversations():
    samples = world.make_samples("train", 22, 0, skills=ALL)
    processor = world.processor(48, 12)
    ids, labels = world.sequences(samples, 16)
    for row, conversation in enumerate(world.conversations(samples)):
        encoded = encode(conversation, processor)
        length = len(encoded["input_ids"])
        assert encoded["input_ids"].tolist() == ids[row, :length].tolist()
        assert encoded["labels"].tolist() == labels[row, :length].tolist()
        assert set(ids[row, length:].tolist()) <= {words.PAD_ID}
        assert set(labels[row, length:].tolist()) <= {-100}
        pixels = torch.from_numpy(samples.images[row]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(encoded["pixel_values"][0], pixels)
        assert conversation.kind == samples.names[samples.skills[row]]


def test_the_tokenizer_refuses_an_unknown_word():
    table = world.tokenizer()
    assert table("what shape ?")["input_ids"] == [world.VOCABULARY.index(word) for word in ("what", "shape", "?")]
    with pytest.raises(Exception, match="UNK"):
        table("what breed is the red one ?")


def test_the_sheet_shows_every_sample():
    samples = world.make_samples("train", 5, 0)
    sheet = np.asarray(world.draw_samples(samples, columns=2, side=96))
    assert sheet.shape[0] % 3 == 0
    tile = np.asarray(samples.images[4].repeat(2, axis=0).repeat(2, axis=1))
    top = sheet.shape[0] // 3 * 2 + 8
    assert np.array_equal(sheet[top : top + 96, 8:104], tile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 1, 0), "unknown split 'dev'; known are train, validation, test"),
        (("train", -1, 0), "count is -1"),
        (("train", 1, 0, ("existence", "vision")), "skills are .*'vision'.*give different ones of existence"),
        (("train", 1, 0, ("text",), 33), "even size of 32 pixels or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    split, count, seed, *rest = arguments
    with pytest.raises(ValueError, match=message):
        world.make_samples(split, count, seed, **dict(zip(("skills", "size"), rest, strict=False)))
