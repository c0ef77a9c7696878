"""What a student and a teacher must share: the rows of the vocabulary, pictures, and prompts."""

import pytest
from tokenizers import AddedToken
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from switchkd.models import same_inputs, shared_vocab
from switchkd.models.tiny import CHAT_TEMPLATE, tiny_llama_tokenizer, tiny_processor, tiny_tokenizer

ROWS = len(tiny_llama_tokenizer())


def with_tokens(*words, special=("<image>",), name="one"):
    """The Llama-style tokenizer with `words` behind its own, those in `special` as special tokens."""
    tokenizer = tiny_llama_tokenizer()
    tokenizer.name_or_path = name
    tokenizer.add_tokens([AddedToken(word, special=word in special) for word in words])
    return tokenizer


def test_one_vocabulary_is_shared_whole():
    assert shared_vocab(tiny_tokenizer(), tiny_tokenizer()) == len(tiny_tokenizer())  # <image> among the first rows
    assert shared_vocab(with_tokens("<image>"), with_tokens("<image>")) == ROWS + 1


@pytest.mark.parametrize(
    ("student", "teacher", "rows"),
    [
        (["<image>"], ["<think>", "</think>", "<image>"], ROWS),  # Qwen2.5 beside Qwen3
        (["<image>"], [], ROWS),
        (["mot-un", "<image>"], ["mot-un", "<pad>", "<image>"], ROWS + 1),
        (["<pad>", "<image>"], ["<image>", "<pad>"], ROWS),
        (["<filler>", "<pad>", "<image>"], ["<image>"], ROWS),
    ],
)
def test_image_and_padding_tokens_may_lie_elsewhere(student, teacher, rows):
    special = ("<image>", "<pad>", "<filler>")
    assert shared_vocab(with_tokens(*student, special=special), with_tokens(*teacher, special=special)) == rows


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (["<think>", "<image>"], ["<image>"], f"'<think>' has id {ROWS} in the student and None in the teacher"),
        (
            ["mot-un", "mot-deux"],
            ["mot-deux", "mot-un"],
            f"'mot-un' has id {ROWS} in the student and {ROWS + 1} in the teacher",
        ),
        (
            ["<image>", "mot-un"],
            ["mot-un", "<image>"],
            f"'mot-un' has id {ROWS + 1} in the student and {ROWS} in the teacher",
        ),
    ],
)
def test_words_of_the_student_must_be_the_teachers(student, teacher, said):
    pair = with_tokens(*student, name="small"), with_tokens(*teacher, name="big")
    with pytest.raises(ValueError, match=f"student 'small' and teacher 'big' differ: {said}, and they share .* {ROWS}"):
        shared_vocab(*pair)


def test_a_special_token_that_the_student_writes_must_be_the_teachers():
    teacher, special = with_tokens("<image>"), ("<end>", "<image>")
    student = with_tokens("<end>", "<image>", special=special)
    assert shared_vocab(student, teacher) == ROWS
    student.chat_template = student.chat_template.replace("</s>", "<end>")
    with pytest.raises(ValueError, match=f"'<end>' has id {ROWS} in the student and None"):
        shared_vocab(student, teacher)
    # not in the template: the tokenizer itself begins a text with it
    begins = with_tokens("<begin>", special=("<begin>",))
    begins.bos_token = "<begin>"
    begins.backend_tokenizer.post_processor = type(begins.backend_tokenizer.post_processor)(
        single="<begin> $A", special_tokens=[("<begin>", ROWS)]
    )
    with pytest.raises(ValueError, match=f"'<begin>' has id {ROWS} in the student and None"):
        shared_vocab(begins, teacher)


def test_other_families_are_refused():
    with pytest.raises(ValueError, match="share the first 0 rows; distil between models of one vocabulary"):
        shared_vocab(tiny_tokenizer(), tiny_llama_tokenizer())


def test_equal_inputs_pass():
    same_inputs(tiny_processor(32, 8), tiny_processor(32, 8))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "size",
            {"height": 64, "width": 32},
            "size .* is {'height': 64, 'width': 32} in the student and {'height': 32, ",
        ),
        (
            "size",
            {"shortest_edge": 32},
            "size .* is {'shortest_edge': 32} in the student and {'height': 32, 'width': 32}",
        ),
        ("resample", 2, "resample of the image processor is 2 in the student and 3 in the teacher"),
        ("do_center_crop", True, "do_center_crop .* is True in the student and False in the teacher"),
        ("do_pad", True, "do_pad .* is True in the student and False in the teacher"),
        ("do_resize", False, "do_resize .* is False in the student and True"),
        ("rescale_factor", 1.0, r"rescale_factor .* is 1\.0 in the student and 0\.0039"),
        ("do_rescale", False, "do_rescale .* is False in the student and True"),
        (
            "image_mean",
            (0.5, 0.5, 0.4),
            r"image_mean .* is \[0\.5, 0\.5, 0\.4\] in the student and \[0\.5, 0\.5, 0\.5\]",
        ),
        ("image_std", (1, 1, 1), r"image_std .* is \[1, 1, 1\] in the student and \[0\.5, 0\.5, 0\.5\] in the teacher"),
        ("do_normalize", False, "do_normalize .* is False in the student and True"),
    ],
)
def test_pictures_that_student_and_teacher_would_see_differently(name, value, said):
    settings = {"size": {"height": 32, "width": 32}, name: value}
    if name == "do_center_crop":
        settings["crop_size"] = {"height": 16, "width": 16}
    student, teacher = tiny_processor(32, 8), tiny_processor(32, 8)
    student.image_processor = SiglipImageProcessorPil(**settings)
    with pytest.raises(ValueError, match=said):
        same_inputs(student, teacher)


def test_crops_of_other_sizes():
    pair = [tiny_processor(32, 8), tiny_processor(32, 8)]
    for processor, side in zip(pair, (32, 24), strict=True):
        crop = {"height": side, "width": side}
        processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop)
    with pytest.raises(
        ValueError, match="crop_size .* is {'height': 32, 'width': 32} in the student and {'height': 24"
    ):
        same_inputs(*pair)
    pair[1].image_processor.crop_size = pair[0].image_processor.crop_size
    same_inputs(*pair)
    for processor in pair:  # a crop that is not done
        processor.image_processor.do_center_crop = False
    pair[1].image_processor.crop_size = None
    same_inputs(*pair)


def test_prompts_that_student_and_teacher_would_read_differently():
    student, teacher = tiny_processor(32, 8), tiny_processor(32, 8)
    teacher.chat_template = CHAT_TEMPLATE.replace("{% for m in messages %}", "You look.{% for m in messages %}")
    with pytest.raises(
        ValueError, match="two turns as '<.im_start.>user.* and as 'You look.<.im_start.>user.*chat_templ"
    ):
        same_inputs(student, teacher)
    teacher.chat_template = None
    with pytest.raises(
        ValueError, match="in the student and as '' in the teacher: .* pass the teacher's as chat_template"
    ):
        same_inputs(student, teacher)
    # other text, same turns
    teacher.chat_template = CHAT_TEMPLATE + "{# the same #}"
    same_inputs(student, teacher)
