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
        "Collator": "conversations.encoding",
        "Conversation": "conversations.conversation",
        "ConversationDataset": "conversations.encoding",
        "DefectImage": "defects",
        "box_to_grid": "conversations.instruct",
        "check_conversations": "conversations.conversation",
        "encode": "conversations.encoding",
        "encode_prompt": "conversations.encoding",
        "grid_to_box": "conversations.instruct",
        "join_turns": "conversations.turns",
        "read_defects": "layouts.read",
        "read_llava": "conversations.llava",
        "read_messages": "conversations.messages",
        "to_conversations": "conversations.instruct",
    },
)
