"""llm-pager: an OpenAI-compatible proxy that gives any chat application virtual memory.

The version below is the only place that states it: the distribution and the command line read it.
"""

__version__ = "0.1.0"
