"""The configuration of a student or a teacher before any of it is downloaded: for plans and rehearsals, and no others.

`known/` holds the config.json of well-known parts, each in a folder `ORGANISATION--NAME`, with the fields that decide
their shape as in its public repository; `known/tokens.json` the tokens of each vocabulary, fewer than its rows: where
`<image>` goes. A test builds every one and compares its parameters with the published total. Training never reads
them: there a name that is neither on the disk nor on the Hub is an error.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, LlavaConfig, PreTrainedConfig

from switchkd.config import read_section
from switchkd.models.config import StudentConfig, TeacherConfig
from switchkd.models.load import load_tokenizer, named
from switchkd.models.shapes import check_llava, feature_layer, llava_config, part_config, saved_config
from switchkd.models.templates import image_row
from switchkd.models.tiny import STUDENT_SHAPE, TEACHER, VISION_TOWER, tiny_text_config, tiny_tokenizer
from switchkd.models.towers import TOWERS, tower_kind

KNOWN = Path(__file__).parent / "known"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def student_config(config: StudentConfig) -> LlavaConfig:
    """The configuration of the student that `build_student` makes, without weights.

    A language model's folder that brings no tokenizer is taken to use all its rows, so that `<image>` adds one. Raises
    as `planned_part`, `planned_model` and `llava_config`.
    """
    if config.path:
        return planned_model(config.path, "student.path")
    vision = planned_part(config.vision_tower or str(VISION_TOWER), "student.vision_tower")
    tower_kind(vision, f"student.vision_tower {config.vision_tower}")
    if config.language_model is None:
        tokenizer = tiny_tokenizer()
        text, image_token_id = tiny_text_config(tokenizer, **STUDENT_SHAPE), image_row(tokenizer)
    else:
        text = planned_part(config.language_model, "student.language_model")
        image_token_id = _image_row(config.language_model, text)
    return llava_config(
        vision,
        text,
        image_token_id,
        vision_feature_layer=feature_layer(config),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )


def teacher_config(config: TeacherConfig) -> LlavaConfig:
    """The configuration of a teacher: the package's tiny one, that of `config.path`, or while that does not exist yet
    of what `config.made_by` makes. Raises as `planned_model` and `student_config`."""
    if config.made_by and not Path(config.path).exists():
        return student_config(read_section(config.made_by, "student", StudentConfig))
    return planned_model(config.path or TEACHER, "teacher.path")


def planned_part(name: str, field: str | None = None) -> PreTrainedConfig:
    """The configuration of a part: of a folder, else of the known ones, else of the Hub. Raises as `part_config`."""
    known = _known(name)
    return part_config(name, field) if known is None else known


def planned_model(path: str | Path, field: str | None = None) -> LlavaConfig:
    """The same of a whole LLaVA model. Raises as `saved_config`."""
    known = _known(path)
    if known is None:
        return saved_config(path, field)
    check_llava(named(path, field), known.model_type)
    return known


def known_names() -> list[str]:
    """The Hub names of the known parts."""
    return sorted(file.parent.name.replace("--", "/", 1) for file in KNOWN.glob("*/config.json"))


def known_tokens() -> dict[str, int]:
    """Name of a known language model -> tokens of its vocabulary."""
    return json.loads((KNOWN / "tokens.json").read_text(encoding="utf-8"))


def _known(name: str | Path) -> PreTrainedConfig | None:
    """None where the name is not a known one, or is a folder here; of a whole SigLIP or CLIP model its vision tower."""
    if Path(name).is_dir() or str(name) not in known_names():
        return None
    file = KNOWN / str(name).replace("/", "--") / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields["model_type"] in {kind.whole for kind in TOWERS.values()}:
        fields = fields["vision_config"]
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def _image_row(name: str, text: PreTrainedConfig) -> int:
    """The row that `<image>` has or gets in the vocabulary of the language model `name`."""
    folder = Path(name)
    if not folder.is_dir() and name in known_tokens():
        return known_tokens()[name]
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return text.vocab_size
    return image_row(load_tokenizer(name, "student.language_model"))
