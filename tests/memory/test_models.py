import pytest
from pydantic import ValidationError

from proxy.memory import CompressionLevel, MemoryPage, Modality, StorageTier


def test_a_page_has_the_seeds_fields_and_defaults() -> None:
    page = MemoryPage(
        page_id="msg_001",
        modality=Modality.TEXT,
        content="What's the weather like?",
        storage_tier=StorageTier.L0,
        metadata={"role": "user"},
    )
    assert page.compression_level is CompressionLevel.FULL
    assert page.size_tokens is None
    assert page.estimate_tokens() == 6  # 24 bytes
    assert page.model_copy(update={"size_tokens": 9}).estimate_tokens() == 9


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, ""), ("as is", "as is"), ({"a": ["ü", 1]}, '{"a":["ü",1]}')],
)
def test_any_content_has_a_text(content: object, text: str) -> None:
    page = MemoryPage(page_id="p", content=content)
    assert page.text() == text
    assert page.estimate_tokens() >= 0


def test_values_out_of_range_and_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        MemoryPage(page_id="p", importance=1.5)
    with pytest.raises(ValidationError):
        MemoryPage.model_validate({"page_id": "p", "colour": "red"})


def test_levels_are_ordered_numbers() -> None:
    assert [int(level) for level in CompressionLevel] == [0, 1, 2, 3]


def test_a_version_is_the_contents() -> None:
    page = MemoryPage(page_id="p", content={"a": [1]})
    same = MemoryPage(page_id="q", content={"a": [1]}, storage_tier=StorageTier.L3, importance=0.9)
    assert page.version == same.version and len(page.version) == 16
    others = [MemoryPage(page_id="p", content=c) for c in ('{"a":[1]}', "a", "b", None, {"a": [2]}, "\ud83d")]
    assert len({page.version, *(other.version for other in others)}) == 7
