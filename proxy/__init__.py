"""llm-pager: an OpenAI-compatible proxy that gives any chat application virtual memory.

The version below is the only place that states it: the distribution and the command line read it.
`from proxy import SessionManager` is the library's door; it is loaded when it is asked for.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from proxy.library import SessionManager

__all__ = ["SessionManager", "__version__"]


def __getattr__(name: str) -> object:
    if name == "SessionManager":
        from proxy.library import SessionManager

        return SessionManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
