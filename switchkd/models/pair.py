"""What a student and a teacher that read the same encoded samples must agree on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import LlavaProcessor, PreTrainedTokenizerBase

from switchkd.data.conversations.tokens import special_tokens, text_ids
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.image_processors import image_settings
from switchkd.models.load import load_processor
from switchkd.models.templates import IMAGE_TOKEN, PROBE, render
from switchkd.models.tiny import TEACHER


def shared_vocab(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of leading vocabulary rows that mean the same token to student and teacher.

    Token-to-id maps are compared, not sizes: Qwen2.5 models share 151,665 tokens while their heads have 151,936 or
    152,064 rows. Samples are encoded by the student, and logits are cut to the shared rows. So behind those the
    teacher may have any tokens (Qwen3's `<think>` with a Qwen2.5 student), and the student `<image>`, at another id
    than the teacher's, and special tokens that its chat template does not write, such as padding: `encode` refuses
    text that holds them. Raises ValueError naming both tokenizers and the first other token of the student there.
    """
    student, teacher = (
        {row: token for token, row in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    rows = max(student.keys() | teacher.keys()) + 1
    shared = next((row for row in range(rows) if student.get(row) != teacher.get(row)), rows)
    unread = special_tokens(student_tokenizer).keys() - _written(student_tokenizer)
    for row in sorted(row for row in student if row >= shared):
        token = student[row]
        if token != IMAGE_TOKEN and row not in unread:
            raise ValueError(
                f"the tokenizers of student {student_tokenizer.name_or_path!r} and teacher "
                f"{teacher_tokenizer.name_or_path!r} differ: {token!r} has id {row} in the student and "
                f"{teacher_tokenizer.get_vocab().get(token)} in the teacher, and they share the first {shared} rows; "
                "distil between models of one vocabulary"
            )
    return shared


def _written(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that a probe of the chat template holds, with what the tokenizer itself sets before a text."""
    if tokenizer.chat_template is None:
        return set()
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    ids: set[int] = set()
    for messages in (PROBE, [*PROBE, PROBE[0]], [system, *PROBE]):
        ids.update(text_ids(render(tokenizer, tokenizer.chat_template, messages), tokenizer)[0])
    return ids


def same_inputs(student_processor: LlavaProcessor, teacher_processor: LlavaProcessor) -> None:
    """Checks that both processors make the same picture and the same text of one conversation.

    One encoding, the student's, is read by student and teacher. Raises ValueError naming the first difference and
    both values: size, resampling, crop, padding, rescaling, mean or deviation of the pictures, or the text that the
    chat templates write for two turns about one image.
    """
    pictures = [image_settings(processor.image_processor) for processor in (student_processor, teacher_processor)]
    for name, student in pictures[0].items():
        if student != (teacher := pictures[1].get(name)):
            raise ValueError(
                f"{name} of the image processor is {student} in the student and {teacher} in the teacher: one encoded "
                "picture is read by both, so give the student the teacher's image_processor, or take a vision tower "
                "that sees pictures as the teacher does"
            )
    messages = [*PROBE, *({**message, "content": message["content"][-1:]} for message in PROBE)]
    student, teacher = (
        render(processor.tokenizer, processor.chat_template, messages) if processor.chat_template else ""
        for processor in (student_processor, teacher_processor)
    )
    if student != teacher:
        raise ValueError(
            f"the chat template writes two turns as {student!r} in the student and as {teacher!r} in the teacher: one "
            "encoded conversation is read by both, so pass the teacher's as chat_template (student.chat_template)"
        )


def teacher_processor(teacher: TeacherConfig, *, local_files_only: bool = False) -> LlavaProcessor | None:
    """The teacher's processor with the chat template that the configuration names for it, without a weight.

    None where `teacher.made_by` is still to make it; local_files_only: also where it is not on this disk.
    """
    path = teacher.path or TEACHER
    if teacher.made_by and not Path(path).exists():
        return None
    try:
        return load_processor(
            path, "teacher.path", chat_template=teacher.chat_template, local_files_only=local_files_only
        )
    except OSError:
        if local_files_only:
            return None
        raise


def as_teacher_reads(student: StudentConfig, teacher: TeacherConfig, processor: LlavaProcessor | None) -> StudentConfig:
    """The student with its teacher's chat template and choice of visual tokens: one encoding is read by both.

    processor: the teacher's, None where it is not at hand. A whole student, and what the configuration says itself,
    stay as they are.
    """
    if student.path or not teacher.path:
        return student
    template = student.chat_template or (processor.chat_template if processor else teacher.chat_template)
    strategy = student.vision_feature_select_strategy
    if strategy is None and processor is not None:
        strategy = processor.vision_feature_select_strategy
    return replace(student, chat_template=template, vision_feature_select_strategy=strategy)
