"""All checks: importing this registers them."""

from tests.contract import (
    checks_answers,
    checks_calls,
    checks_errors,
    checks_fields,
    checks_formats,
    checks_framing,
    checks_headers,
    checks_history,
    checks_identity,
    checks_isolation,
    checks_live,
    checks_loop,
    checks_messages,
    checks_network,
    checks_overflow,
    checks_paths,
    checks_refusals,
    checks_sdk,
    checks_sizes,
    checks_streams,
    checks_tools,
    checks_usage,
)
from tests.contract.model import cases

MODULES = (
    checks_answers,
    checks_calls,
    checks_errors,
    checks_fields,
    checks_formats,
    checks_framing,
    checks_headers,
    checks_history,
    checks_identity,
    checks_isolation,
    checks_live,
    checks_loop,
    checks_messages,
    checks_network,
    checks_overflow,
    checks_paths,
    checks_refusals,
    checks_sdk,
    checks_sizes,
    checks_streams,
    checks_tools,
    checks_usage,
)

__all__ = ["MODULES", "cases"]
