"""The library: the proxy's memory for programs that call the model themselves.

`SessionManager` keeps a conversation, `MemoryManager` its memory under the guide's names; both stand on
the same turns as the proxy, so that what they build is what the proxy would send. `WorkingSetManager`
is a view of any page table.
"""

from proxy.library.manager import MemoryManager
from proxy.library.session import SessionManager
from proxy.library.working_set import WorkingSetManager, WorkingSetStats

__all__ = ["MemoryManager", "SessionManager", "WorkingSetManager", "WorkingSetStats"]
