import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.media.files import MAX_CHARS, MAX_PDF_PAGES, file_text
from tests.media.samples import pdf, png


def test_the_words_of_a_pdf_in_the_order_of_its_pages() -> None:
    data = pdf(["Invoice 42\nTotal 1,299.00", "Signed by Maria Keller"])
    assert file_text(data, "application/pdf", "a.pdf") == (
        "Invoice 42\nTotal 1,299.00\n\nSigned by Maria Keller"
    )
    assert file_text(data, "", None) is not None  # the bytes decide


def test_invariant_10_a_long_pdf_is_read_to_its_limit() -> None:
    words = file_text(pdf([f"page-{n}." for n in range(MAX_PDF_PAGES + 20)]), "", None)
    assert words is not None
    assert f"page-{MAX_PDF_PAGES - 1}." in words and f"page-{MAX_PDF_PAGES}." not in words


@pytest.mark.parametrize(
    ("mime", "name"),
    [
        ("text/plain", None),
        ("text/x-python; charset=utf-8", None),
        ("application/json", None),
        ("application/ld+json", None),
        ("application/octet-stream", "main.rs"),
        ("", "NOTES.MD"),
    ],
)
def test_text_by_its_type_or_its_name(mime: str, name: str | None) -> None:
    assert file_text("größe: 3".encode(), mime, name) == "größe: 3"


def test_other_kinds_have_no_words() -> None:
    assert file_text(png(8, 8), "image/png", "a.png") is None
    assert file_text(b"\x00\x01\x02", "text/plain", "a.txt") is None
    assert file_text(b"  \n", "text/plain", None) is None
    assert file_text(b"PK\x03\x04", "application/zip", "a.zip") is None


def test_utf_16_and_a_text_over_the_limit() -> None:
    assert file_text("naïve".encode("utf-16"), "text/plain", None) == "naïve"
    assert len(file_text(b"x" * (MAX_CHARS + 10), "text/plain", None) or "") == MAX_CHARS


@given(st.binary(max_size=300), st.integers(0, 900))
def test_broken_files_never_raise(noise: bytes, at: int) -> None:
    whole = pdf(["Some words"])
    words = file_text(whole[:at] + noise + whole[at + len(noise) :], "application/pdf", None)
    assert words is None or words.strip()
