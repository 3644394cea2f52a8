"""Token counts and model cards: how large a text, a message or a tools array is for a model.

Promises: see counter.py (what counts), media.py (the providers' rules for media) and cards.py (what a
model's name says). Only local files are read.
"""

from proxy.tokens.cards import (
    UNKNOWN_WINDOW_TOKENS,
    USUAL_CACHED_PRICE,
    ModelCard,
    Prices,
    Role,
    model_card,
    normal_name,
    parameters_b,
    prices,
)
from proxy.tokens.counter import (
    DEFAULT_ENCODING,
    PER_MESSAGE,
    PER_REPLY,
    TokenCounter,
    encoding_is_known,
    encoding_is_loaded,
    get_counter,
    load,
    tokens_upper_bound,
)

__all__ = [
    "DEFAULT_ENCODING", "PER_MESSAGE", "PER_REPLY", "UNKNOWN_WINDOW_TOKENS", "USUAL_CACHED_PRICE", "ModelCard",
    "Prices", "Role", "TokenCounter", "encoding_is_known", "encoding_is_loaded", "get_counter", "load", "model_card",
    "normal_name", "parameters_b", "prices", "tokens_upper_bound",
]  # fmt: skip
