"""Other people's clients against llm-pager."""

import pytest

pytest.register_assert_rewrite("tests.clients.stage")  # its differences are worth reading
