"""Questions to several models: side by side, one model in memory at a time, bad requests refused before loading."""

from __future__ import annotations

import io
import weakref

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from switchkd import ask as module
from switchkd.ask import Reply, ask, check_save, model_path, show
from switchkd.cli import app
from switchkd.data import Conversation
from switchkd.data.steel import render_steel
from switchkd.evaluation import Answer, generate_answers
from switchkd.evaluation.drawing import ANSWER
from switchkd.models import load_llava
from switchkd.models.tiny import TEACHER, VISION_TOWER

QUESTION = "Which defect is in the image?"


def call(*words):
    # Wide, so that a long path stays on one line.
    return CliRunner().invoke(app, ["ask", *map(str, words)], prog_name="switchkd", env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def steel(tmp_path_factory):
    """A picture of two crazings that the package's teacher finds."""
    path = tmp_path_factory.mktemp("pictures") / "steel.png"
    render_steel(1, seed=1, first=2)[0].image.save(path)
    return path


@pytest.fixture
def small(student, processor, tmp_path):
    """The folder of a model with random weights."""
    student.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(module, "load_llava", load)


def printed(replies):
    console = Console(width=100, file=io.StringIO())
    show(replies, console)
    return console.file.getvalue()


def test_answers_are_those_of_the_models_in_order(small, steel):
    replies = ask([str(small), str(TEACHER)], steel, QUESTION, max_new_tokens=12)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    asked = Conversation("q", [{"role": "user", "content": content}], [steel])
    wanted = [
        generate_answers(*load_llava(path), [asked], max_new_tokens=12, progress=False)[0] for path in (small, TEACHER)
    ]
    assert [reply.answer for reply in replies] == wanted
    assert [reply.model for reply in replies] == [str(small), str(TEACHER)]
    assert replies[1].answer.text == "crazing"
    given = wanted[0].probabilities
    assert replies[0].probability == pytest.approx(sum(given) / len(given))
    assert all(reply.seconds > 0 for reply in replies)


def test_one_model_is_in_memory_at_a_time(small, steel, monkeypatch):
    alive = []

    def load(path, dtype):
        assert [each() for each in alive] == [None] * len(alive)
        model, processor = load_llava(path, dtype)
        alive.append(weakref.ref(model))
        return model, processor

    monkeypatch.setattr(module, "load_llava", load)
    ask([str(small)] * 3, steel, QUESTION, max_new_tokens=1)
    assert len(alive) == 3


@pytest.mark.parametrize("task", ["detector", "classifier"])
def test_a_run_of_another_task_is_refused_by_its_name(tmp_path, task):
    (tmp_path / "config.yaml").write_text(f"name: a\ntask: {task}\n")
    (tmp_path / "student").mkdir()
    with pytest.raises(ValueError, match=f"is a run of the task {task}, whose models answer no questions"):
        model_path(str(tmp_path))


def test_a_run_folder_stands_for_its_student(small, steel, tmp_path):
    run = tmp_path / "runs/plate"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(ValueError, match="plate is a run without a finished student"):
        model_path(str(run))
    small.rename(run / "student")
    assert model_path(str(run)) == str(run / "student")
    ran = call(run, steel, QUESTION, "--max-new-tokens", 2)
    assert ran.exit_code == 0, ran.stderr
    assert f" {run} " in ran.stdout


def test_a_table_shows_what_was_said():
    text = printed(
        [
            Reply("runs/a", Answer("[bold]no[/bold] \x1b[31m", (), (0.5, 1.0)), 1.234),
            Reply("a/" + "long/" * 40 + "name", Answer("", (), ()), 0.5),
        ]
    )
    assert "[bold]no[/bold] \\x1b[31m" in text
    assert "0.750" in text
    assert "1.23" in text
    assert "no answer" in text
    assert text.replace("│", "").replace("\n", "").count("long") > 35  # folded, not cut


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{teacher}", "gone.png", "q"), "gone.png: no such picture; give MODEL..., IMAGE and the question in quotes"),
        (("{teacher}", "{folder}/notes.png", "q"), "notes.png: cannot be read as an image"),
        (("{teacher}", "{steel}", " "), "the question is ' '"),
        (("{teacher}", "{steel}", "<image> q"), "write it without <image>"),
        (("{teacher}", "{folder}", "{steel}", "q"), "has no config.json: give the folder of a saved LLaVA model"),
        (("{teacher}", "./gone", "{steel}", "q"), "gone does not exist"),
        (("{teacher}", "{tower}", "{steel}", "q"), "holds a model of type 'siglip_vision_model', not 'llava'"),
        (("{teacher}", "{steel}", "q", "--save", "a.txt"), "--save is a.txt: name a file that ends in .png"),
        (("{teacher}", "{steel}", "q", "--save", "no/a.png"), "no is not a folder"),
        (("{teacher}", "{steel}", "q", "--save", "{steel}"), "the picture that is asked about"),
        (("{teacher}", "{steel}", "q", "--save", "{folder}/notes.png"), "which exists and is no picture"),
        (("{teacher}", "{steel}", "q", "--save", "{folder}/dir.png"), "which exists and is no picture"),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_line_before_any_model_is_loaded(unloaded, steel, tmp_path, words, message):
    (tmp_path / "notes.png").write_text("notes")
    (tmp_path / "dir.png").mkdir()
    places = {"teacher": TEACHER, "tower": VISION_TOWER, "steel": steel, "folder": tmp_path}
    before = steel.read_bytes()
    ran = call(*(word.format(**places) for word in words))
    assert ran.exit_code == 2
    assert ran.stderr.startswith("switchkd ask: error: ")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert steel.read_bytes() == before
    assert (tmp_path / "notes.png").read_text() == "notes"


def test_a_name_that_the_hub_does_not_give_is_named(unloaded, steel, monkeypatch):
    def saved_config(path):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(module, "saved_config", saved_config)
    ran = call("runs/plaet", steel, "q")
    assert ran.exit_code == 2
    assert ran.stderr == ("switchkd ask: error: runs/plaet is no folder here, and as a Hub name: We couldn't connect\n")


def test_boxes_are_drawn_a_panel_a_model(steel, small, tmp_path):
    file, before = tmp_path / "boxes.png", steel.read_bytes()
    Image.new("RGB", (1, 1)).save(file)  # an older picture may go
    ran = call(TEACHER, small, steel, "Locate every defect.", "--save", file, "--max-new-tokens", 100)
    assert ran.exit_code == 0, ran.stderr
    assert f"drawn: {file}\n" in ran.stdout
    sheet = Image.open(file).convert("RGB")
    assert sheet.width == 2 * 480 + 3 * 6
    found = [x for x in range(sheet.width) for y in range(0, sheet.height, 2) if sheet.getpixel((x, y)) == ANSWER]
    assert found  # of the teacher, in its panel; the other has random weights
    assert max(found) < 6 + 480
    assert steel.read_bytes() == before


def test_a_located_answer_says_which_option_draws_it(steel):
    hint = "1 of 1 answers hold boxes: --save FILE.png draws them on the picture"
    ran = call(TEACHER, steel, "Locate every defect.")
    assert hint in ran.stdout
    assert '"label": "crazing"' in ran.stdout
    assert "--save" not in call(TEACHER, steel, QUESTION).stdout


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "A.JPEG"])
def test_pictures_of_both_kinds_can_be_written(steel, tmp_path, name):
    check_save(tmp_path / name, steel)
    module.save_picture([Reply("m", Answer("crazing", (), ()), 0.1)], steel, tmp_path / name)
    assert Image.open(tmp_path / name).size[0] == 480 + 2 * 6
    check_save(tmp_path / name, steel)
