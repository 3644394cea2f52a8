"""The library: the proxy's memory for programs that call the model themselves.

`SessionManager` keeps a conversation, `MemoryManager` its memory under the guide's names; both stand on
the same turns as the proxy, so that what they build is what the proxy would send.
"""

from proxy.library.manager import MemoryManager
from proxy.library.session import SessionManager

__all__ = ["MemoryManager", "SessionManager"]
