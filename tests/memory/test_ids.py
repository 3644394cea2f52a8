import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.ids import canonical_page_id, make_page_id, media_page_id, parse_page_id
from proxy.memory.models import MEDIA_PART


def test_ids_are_one_based_with_parts_behind_a_dot() -> None:
    assert make_page_id(0) == "msg_0001"
    assert make_page_id(41, 2) == "msg_0042.2"
    assert make_page_id(12_345) == "msg_12346"


@given(st.integers(0, 999_999_998), st.integers(0, MEDIA_PART - 1))
def test_ids_are_read_back(position: int, part: int) -> None:
    assert parse_page_id(make_page_id(position, part)) == (position, part)
    assert canonical_page_id(make_page_id(position, part)) == make_page_id(position, part)


@given(
    st.integers(0, 999_999_998),
    st.integers(1, MEDIA_PART - 1),
    st.sampled_from(["img", "aud", "vid", "file"]),
)
def test_media_ids_are_read_back(position: int, number: int, prefix: str) -> None:
    made = media_page_id(position, number, prefix)
    assert parse_page_id(made) == (position, MEDIA_PART + number)
    assert canonical_page_id(made) == made


def test_media_ids_name_their_kind() -> None:
    assert media_page_id(41, 1, "img") == "img_0042_1"
    assert media_page_id(0, 12, "file") == "file_0001_12"
    assert canonical_page_id("aud_7_03") == "aud_0007_3"
    with pytest.raises(ValueError, match="media_page_id"):
        make_page_id(41, MEDIA_PART + 1)
    for number, prefix in ((0, "img"), (1, "msg")):
        with pytest.raises(ValueError, match="no medium"):
            media_page_id(41, number, prefix)


@pytest.mark.parametrize(
    "text",
    ["", "msg_", "msg_0000", "msg_1.", "msg_1.0", "msg_-1", "msg_1.2.3", "msg_١", "img_0042",
     "msg_1 ", "msg_99999999999999999999", "MSG_1", "msg_1.1048576", "img_0000_1", "img_1_0",
     "img_1_", "img__1", "img_1.1", "pic_1_1", "vid_1_1048576", "summary_seg_03", "claim_0007",
     "file_1_1_1"],
)  # fmt: skip
def test_other_strings_are_no_ids(text: str) -> None:
    assert parse_page_id(text) is None
    if text != "MSG_1":
        assert canonical_page_id(text) == text


def test_zeros_in_front_are_optional() -> None:
    assert parse_page_id("msg_42") == (41, 0)
