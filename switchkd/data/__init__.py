"""Data: conversations, their encoding, defect images and the questions made from them."""

from switchkd.lazy import lazily

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

__getattr__ = lazily(
    __name__,
    {
        "Collator": "encoding",
        "Conversation": "conversations",
        "ConversationDataset": "encoding",
        "DefectImage": "defects",
        "box_to_grid": "instruct",
        "check_conversations": "conversations",
        "encode": "encoding",
        "encode_prompt": "encoding",
        "grid_to_box": "instruct",
        "join_turns": "conversations",
        "read_defects": "layouts.read",
        "read_llava": "conversations",
        "read_messages": "conversations",
        "to_conversations": "instruct",
    },
)
