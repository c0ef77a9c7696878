"""Data: conversations, their encoding, defect images and the questions made from them."""

from switchkd.data.conversations import (
    Conversation,
    check_conversations,
    join_turns,
    read_llava,
    read_messages,
)
from switchkd.data.defects import DefectImage, read_defects
from switchkd.data.encoding import Collator, ConversationDataset, encode, encode_prompt
from switchkd.data.instruct import box_to_grid, grid_to_box, to_conversations

__all__ = [
    "Collator",
    "Conversation",
    "ConversationDataset",
    "DefectImage",
    "box_to_grid",
    "check_conversations",
    "encode",
    "encode_prompt",
    "grid_to_box",
    "join_turns",
    "read_defects",
    "read_llava",
    "read_messages",
    "to_conversations",
]
