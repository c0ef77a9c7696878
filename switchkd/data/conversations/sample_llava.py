"""A small copy of LLaVA's two training sets in their real layouts: for rehearsals and tests.

Records, image paths and their oddities are as in `blip_laion_cc_sbu_558k.json` (LCS-558K) and
`llava_v1_5_mix665k.json`: 364,100 records of COCO pictures, 86,417 of Visual Genome, 80,000 of OCR-VQA, 72,140 of GQA,
21,953 of TextVQA and 40,688 without (LLaVA issue 657). The pictures and the texts are ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CAPTIONS, INSTRUCTIONS = "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"
PICTURE_FOLDERS = (  # of the instructions
    "coco/train2017",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
)
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (220, 200, 40)}
FORMS = ("square", "disc")
ONE_WORD = "Answer the question using a single word or phrase."


def write_llava_sample(folder: Path, seed: int = 0) -> None:
    """Writes both JSON files, a dozen records each, and their pictures of about 64 pixels, the same for the same seed.
    The captions' pictures lie in `folder/images`, which is the root of their paths; `folder` is that of the others.

    Captions: one turn, the image mark before or after the question. Instructions: questions of several turns, a mark
    at the end, two records of one id, a number as id, text-only records that begin with an answer, and one of two
    pictures, which the original does not have.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    captions = [_caption(folder, rng, number) for number in range(12)]
    _write(folder / CAPTIONS, captions)
    turns = [_questions(folder, rng, number) for number in range(9)]
    turns[1]["id"] = turns[0]["id"]
    turns[2]["id"] = int(turns[2]["id"])
    first = turns[3]["conversations"][0]
    first["value"] = first["value"].removeprefix("<image>\n") + "\n<image>"
    _write(folder / INSTRUCTIONS, [*turns, _two_pictures(folder, rng), _text_only(0), _text_only(1)])


def _caption(folder: Path, rng: np.random.Generator, number: int) -> dict:
    identity = f"{4539375 + 10037 * number:09d}"
    name = f"{identity[:5]}/{identity}.jpg"
    colour, form = _draw(folder / "images" / name, rng)
    ask = ("Say briefly what is shown.", "What is in the picture?", "Give a short caption.")[number % 3]
    value = f"<image>\n{ask}" if number % 2 else f"{ask}\n<image>"
    return {"id": identity, "image": name, "conversations": _turns(value, f"a {colour} {form} on a grey ground")}


def _questions(folder: Path, rng: np.random.Generator, number: int) -> dict:
    identity = f"{100000 + 37 * number:012d}"
    name = f"{PICTURE_FOLDERS[number % len(PICTURE_FOLDERS)]}/{identity}.jpg"
    colour, form = _draw(folder / name, rng)
    other = FORMS[1 - FORMS.index(form)]
    said = [f"<image>\nWhich colour is the {form}?\n{ONE_WORD}", colour.capitalize()]
    said += [f"Is there a {other}?", "No", "Which form is it then?", f"It is a {form}."][: 2 * (number % 3)]
    return {"id": identity, "image": name, "conversations": _turns(*said)}


def _two_pictures(folder: Path, rng: np.random.Generator) -> dict:
    names = [f"coco/train2017/{200000 + number:012d}.jpg" for number in range(2)]
    (first, _), (second, _) = (_draw(folder / name, rng) for name in names)
    turns = _turns("Compare <image> with <image>: do their colours agree?", "Yes" if first == second else "No")
    return {"id": "200000", "image": names, "conversations": turns}


def _text_only(number: int) -> dict:
    said = ["Good to see you again.", "What is three plus four?", "Three plus four is seven.", "Thanks!", "Any time."]
    turns = _turns(*said[: 3 + 2 * number], first="gpt")
    return {"id": f"share{number}_0", "model": "", "conversations": turns}


def _turns(*texts: str, first: str = "human") -> list[dict]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[place % 2], "value": text} for place, text in enumerate(texts)]


def _draw(path: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Renders a form on grey noise; its colour and form."""
    colour, form = str(rng.choice(list(COLOURS))), str(rng.choice(FORMS))
    width, height = (int(side) for side in rng.integers(56, 73, 2))
    noise = rng.integers(110, 146, (height, width, 1), dtype=np.uint8)
    picture = Image.fromarray(np.repeat(noise, 3, axis=2))
    left, top, size = (int(each) for each in rng.integers((4, 4, 20), (16, 16, 34)))
    pen = ImageDraw.Draw(picture)
    (pen.rectangle if form == "square" else pen.ellipse)((left, top, left + size, top + size), COLOURS[colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)
    return colour, form


def _write(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
