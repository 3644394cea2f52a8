"""Token counts and model cards: how large a text, a message or a tools array is for a model.

Promises: see counter.py (what counts), images.py, media.py and tools.py (the providers' rules),
cards.py (windows). Only local files are read.
"""

from proxy.tokens.cards import UNKNOWN_WINDOW_TOKENS, ModelCard, Role, model_card
from proxy.tokens.counter import (
    DEFAULT_ENCODING,
    PER_MESSAGE,
    PER_REPLY,
    TokenCounter,
    encoding_is_known,
    encoding_of,
    get_counter,
    tokens_upper_bound,
)
from proxy.tokens.names import normal_name

__all__ = [
    "DEFAULT_ENCODING",
    "PER_MESSAGE",
    "PER_REPLY",
    "UNKNOWN_WINDOW_TOKENS",
    "ModelCard",
    "Role",
    "TokenCounter",
    "encoding_is_known",
    "encoding_of",
    "get_counter",
    "model_card",
    "normal_name",
    "tokens_upper_bound",
]
