"""How many training samples a stage has and how long they are, as far as it can be known before training.

Where the data and the tokenizer are on the disk, samples are encoded and counted. Else what is public of well-known
sets is taken, and lengths are assumptions that a plan shows as such.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import LlavaProcessor

from switchkd.config import filled_in
from switchkd.data import ConversationDataset
from switchkd.data.config import DataConfig
from switchkd.data.sources import load_conversations
from switchkd.models.config import StudentConfig
from switchkd.models.students import build_processor

MEASURED = 1000  # samples of a set that are encoded for their lengths
LONGEST = 2048  # tokens of the longest sample where nothing says so: LLaVA's max_length


@dataclass(frozen=True)
class Texts:
    """Text tokens of a set's samples, assumed: their mean, of these the answers' tokens, and the longest, None: as long
    as `data.max_length` allows. `padding`: share of a batch of random samples that is padding."""

    text: int
    answers: int
    longest: int | None
    padding: float


@dataclass(frozen=True)
class KnownSet:
    samples: int
    texts: Texts


# The numbers of samples are the published ones. The lengths are ours: one caption a picture; several short questions
# and some long talks a picture, of which about a quarter of a random batch was padding in our measured step.
CAPTIONS = Texts(text=45, answers=15, longest=150, padding=0.02)
TALKS = Texts(text=250, answers=120, longest=None, padding=0.25)
KNOWN_SETS = {
    "blip_laion_cc_sbu_558k": KnownSet(558_128, CAPTIONS),
    "llava_v1_5_mix665k": KnownSet(665_298, TALKS),
}


@dataclass(frozen=True)
class Survey:
    """samples: None where nothing says how many. tokens: mean of a sample, its visual tokens counted; padded: the
    same with the padding of its batch; longest: of the longest sample; answers: mean number of answer tokens.
    assumed: what of this is not read from the data, as text. faults: what is wrong with the data, by field."""

    samples: int | None
    tokens: int
    padded: int
    longest: int
    answers: int
    assumed: str = ""
    faults: list[tuple[str, str]] = field(default_factory=list)


def survey(
    data: DataConfig,
    processor: LlavaProcessor | None,
    visual_tokens: int,
    *,
    field: str = "data",
    batch_size: int = 1,
    group_by_length: bool = False,
) -> Survey:
    """Of the samples of one stage; `field` is where they stand ("pretrain.data"), `processor` None where the student's
    is not on this disk."""
    missing = _missing(data, field)
    if missing or processor is None:
        return _assumed(data, visual_tokens, group_by_length, missing or "the student's tokenizer is not on this disk")
    # Rendered pictures are alike: a few of them tell the lengths of all.
    rendered = data.source == "steel" and data.train_images is not None
    sample = replace(data, test_split=None, train_images=min(data.train_images, 200) if rendered else data.train_images)
    try:
        conversations = load_conversations(sample).train
        samples = len(conversations) * data.train_images // sample.train_images if rendered else len(conversations)
        if len(conversations) > MEASURED:
            conversations = random.Random(0).sample(conversations, MEASURED)
        found = ConversationDataset(conversations, processor, data.max_length, max_bad_rate=1.0)
    except (ValueError, FileNotFoundError) as error:
        assumed = _assumed(data, visual_tokens, group_by_length, "cannot be read")
        return replace(assumed, faults=[(field, str(error))])
    faults, bad = [], len(conversations) - len(found)
    if bad > data.max_bad_rate * len(conversations):
        faults.append(
            (
                f"{field}.max_bad_rate",
                f"{bad} of {len(conversations):,} samples read are bad, more than the rate {data.max_bad_rate}: "
                "switchkd inspect names them",
            )
        )
    if found.cut:
        faults.append(
            (
                f"{field}.max_length",
                f"{data.max_length} cuts {found.cut} of {len(found):,} samples read: their last answers are not learnt "
                "whole; raise it",
            )
        )
    if not len(found):
        return replace(_assumed(data, visual_tokens, group_by_length, "has no good sample"), faults=faults)
    return Survey(
        samples=round(samples * len(found) / len(conversations)),
        tokens=round(sum(found.lengths) / len(found)),
        padded=round(_padded(found.lengths, batch_size, group_by_length)),
        longest=max(found.lengths),
        answers=max(round(sum(found.answer_lengths) / len(found)), 1),
        faults=faults,
    )


def local_processor(student: StudentConfig) -> LlavaProcessor | None:
    """The processor that `build_student` gives, without a weight; None where its tokenizer is not on this disk."""
    try:
        return build_processor(student, local_files_only=True)
    except OSError:
        return None
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # picture settings that are not on this disk
            return None
        raise


def _missing(data: DataConfig, field: str) -> str:
    """Why the training data cannot be read here; empty where it can."""
    if data.source == "steel":
        return ""
    sources = [(field, data.root, data.train_split, data.source)]
    sources += [(f"{field}.mixture[{i}]", each.root, each.split, each.source) for i, each in enumerate(data.mixture)]
    for where, root, split, source in sources:
        for value in [root] if source == "voc" else [root, split]:
            try:
                if value is None or not filled_in(value, where).exists():
                    return f"{value} is not on this disk"
            except ValueError:
                return f"{value} has a variable that is not set"
    return ""


def _assumed(data: DataConfig, visual_tokens: int, group_by_length: bool, why: str) -> Survey:
    known = KNOWN_SETS.get(Path(data.train_split).stem)
    samples = known.samples if known else None
    if samples is not None and data.train_images is not None:
        samples = min(samples, data.train_images)
    for each in data.mixture:
        further = KNOWN_SETS.get(Path(each.split).stem)
        samples = samples + round(further.samples * each.weight) if samples and further else None
    texts = known.texts if known else TALKS
    longest = min(data.max_length or LONGEST, visual_tokens + (texts.longest or LONGEST))
    tokens = min(visual_tokens + texts.text, longest)
    padding = 0.02 if group_by_length else texts.padding
    count = f"{samples:,} samples, as published" if samples else "number of samples unknown"
    return Survey(
        samples=samples,
        tokens=tokens,
        padded=min(round(tokens / (1 - padding)), longest),
        longest=longest,
        answers=texts.answers,
        assumed=f"{why}: {count}; assumed {texts.text} text tokens a sample, {texts.answers} of them in answers, at "
        f"most {longest:,} with the image, {padding:.0%} padding",
    )


def _padded(lengths: list[int], batch_size: int, group_by_length: bool) -> float:
    """Mean length of a sample with the padding of its batch."""
    order = sorted(lengths) if group_by_length else random.Random(0).sample(lengths, len(lengths))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return sum(max(batch) * len(batch) for batch in batches) / len(order)
