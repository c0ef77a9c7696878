"""One question about one picture, put to several models: `switchkd ask`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchkd.config_file import read_yaml
from switchkd.data.conversations.conversation import IMAGE_MARK, Conversation
from switchkd.data.images import check_image, load_image
from switchkd.evaluation import Answer, generate_answers, parse_boxes
from switchkd.evaluation.drawing import draw_asked
from switchkd.models import load_llava
from switchkd.models.shapes import saved_config
from switchkd.terminal import printable

PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Reply:
    """What one model said.

    model: as it was named. seconds: to read the picture and the question and to write the answer, loading apart.
    """

    model: str
    answer: Answer
    seconds: float

    @property
    def probability(self) -> float | None:
        """The mean probability of the answer's tokens, its end apart; None for an empty answer."""
        given = self.answer.probabilities
        return sum(given) / len(given) if given else None


def ask(models: Sequence[str], image: str | Path, question: str, *, max_new_tokens: int = 256) -> list[Reply]:
    """Every model's greedy answer to `question` about the picture file `image`, in order.

    models: folders or Hub names of LLaVA models, or run folders, whose student answers. They are loaded one after the
    other, each freed before the next; on a GPU in bfloat16 where there is one, else on the CPU in float32.
    Raises, before a model is loaded, ValueError for a question that is empty or holds an image mark, FileNotFoundError
    for a missing picture, and as `model_path`; later ValueError for a question that holds a special token of a model.
    """
    if not question.strip() or IMAGE_MARK in question:
        raise ValueError(f"the question is {question!r}: write it without {IMAGE_MARK}, the picture is put before it")
    if not Path(image).is_file():
        raise FileNotFoundError(
            f"{image}: no such picture; give MODEL..., IMAGE and the question in quotes, in this order"
        )
    picture = load_image(image)
    paths = [model_path(name) for name in models]
    content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
    asked = Conversation(Path(image).name, [{"role": "user", "content": content}], [picture])
    replies = []
    for name, path in zip(models, paths, strict=True):
        replies.append(_reply(name, path, asked, max_new_tokens))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return replies


def model_path(name: str) -> str:
    """The folder or Hub name of the LLaVA model that `name` names: for a run folder that of its student.

    Only its configuration is read. Raises ValueError for a run without a finished student, OSError for a Hub name that
    cannot be had, and as `saved_config` for a folder of something else.
    """
    folder = Path(name)
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        task = read_yaml(folder / "config.yaml").get("task", "vlm")
        if task != "vlm":
            raise ValueError(f"{name} is a run of the task {task}, whose models answer no questions: give one of vlm")
        folder = folder / "student"
        if not folder.is_dir():
            raise ValueError(f"{name} is a run without a finished student: resume it, or give one of its other models")
        name = str(folder)
    try:
        saved_config(name)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or folder.is_dir():
            raise
        raise OSError(f"{name} is no folder here, and as a Hub name: {error}") from error
    return name


def check_save(save: Path, image: Path) -> None:
    """Whether a picture about `image` may be written to `save`: a new file, or over an older picture.

    Raises ValueError for another kind of file and for `image` itself, FileNotFoundError for a missing folder.
    """
    if save.suffix.lower() not in PICTURES:
        raise ValueError(f"--save is {save}: name a file that ends in {', '.join(PICTURES)}")
    if not save.parent.is_dir():
        raise FileNotFoundError(f"--save is {save}, but {save.parent} is not a folder: make it, or name another one")
    if not save.exists():
        return
    if image.exists() and save.samefile(image):
        raise ValueError(f"--save is {save}, the picture that is asked about: name another file, it is not overwritten")
    try:
        check_image(save)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--save is {save}, which exists and is no picture: name another file") from error


def show(replies: Sequence[Reply], console: Console) -> None:
    """A table, a row a model: its name, its answer, the mean probability of its tokens, its seconds."""
    table = Table(show_lines=len(replies) > 1)
    for name in ("model", "answer"):
        table.add_column(name, overflow="fold")
    table.add_column("mean token\nprobability", justify="right")
    table.add_column("seconds", justify="right")
    for reply in replies:
        sure = "-" if reply.probability is None else f"{reply.probability:.3f}"
        text = printable(reply.answer.text.strip())
        answer = Text(text) if text else Text("no answer", style="dim italic")
        table.add_row(Text(reply.model), answer, sure, f"{reply.seconds:.2f}")
    console.print(table)


def located(replies: Sequence[Reply]) -> int:
    """How many of the answers hold boxes."""
    return sum(bool(parse_boxes(reply.answer.text)) for reply in replies)


def save_picture(replies: Sequence[Reply], image: str | Path, save: Path) -> None:
    """Writes the picture with every model's boxes, one panel a model; see `draw_asked`."""
    panels = [(reply.model, reply.answer) for reply in replies]
    draw_asked(load_image(image), panels).save(save)


def _reply(name: str, path: str, asked: Conversation, max_new_tokens: int) -> Reply:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, processor = load_llava(path, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model.to(device)
    started = time.perf_counter()
    (answer,) = generate_answers(model, processor, [asked], max_new_tokens=max_new_tokens, progress=False)
    return Reply(name, answer, time.perf_counter() - started)
