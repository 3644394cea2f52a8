"""Names in front of what is said."""

from __future__ import annotations

import pytest

from proxy.search.speakers import speaker_label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Ann: we sailed", "Ann"),
        ("Dr. Marie O'Neil: yes", "Dr. Marie O'Neil"),
        ("李雷: 你好", "李雷"),
        ("Ann said: we sailed", ""),
        ("here it is: a ship", ""),
        ("https://example.com", ""),
        ("12: noon", ""),
        ("We sailed. Ann: no", ""),
        ("", ""),
    ],
)
def test_a_label_is_told_by_its_form(text: str, label: str) -> None:
    assert speaker_label(text) == label
