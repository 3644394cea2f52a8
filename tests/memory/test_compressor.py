
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory import CompressionLevel
from proxy.memory.compressor import ABSTRACT_TOKENS, REFERENCE_TOKENS, clip, compress_text, hint
from tests.cpu import cpu_within

TEXT = (
    "Thanks for the summary, that helps a lot. I looked at the two options again over lunch. "
    "We decided to use PostgreSQL 16 for the billing service because of row level security. "
    "It was a nice day and everybody was in a good mood. The sun was out for once. "
    "The function parse_invoice in billing/core.py must never round before 2027. "
    "Some people had coffee, some had tea, and there was cake as well. "
    "Maria Keller owns the migration, and the deadline is 14 March. "
    "After that we talked about this and that for a while. It was fun, as it always is there. "
    "Then most of us walked home along the river, slowly, and some of us stayed a bit longer."
)


def count(text: str) -> int:
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


def test_level_0_is_the_text_whatever_the_limit() -> None:
    assert compress_text(TEXT, 0, 1, count) == TEXT


def test_level_1_keeps_numbers_names_identifiers_and_decisions() -> None:
    reduced = compress_text(TEXT, CompressionLevel.REDUCED, None, count)
    assert len(reduced) <= 0.4 * len(TEXT)
    for kept in ("PostgreSQL 16", "parse_invoice", "decided", "Maria Keller", "14 March"):
        assert kept in reduced
    for filler in ("cake", "sun", "lunch", "river"):
        assert filler not in reduced


def test_pieces_stay_in_their_order_and_are_the_pages_own_words() -> None:
    reduced = compress_text(TEXT, 1, None, count)
    sentences = [sentence.strip(" .") for sentence in reduced.split(". ")]
    places = [TEXT.find(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert -1 not in places


def test_what_is_said_twice_is_kept_once() -> None:
    for level in (1, 2):
        assert compress_text(TEXT * 3, level, None, count).count("parse_invoice") == 1


def test_the_topic_of_a_text_does_not_crowd_out_its_decision() -> None:
    chat = "The billing service talks to the billing database of the billing team. " * 2
    decided = "Ada must sign by 9 May."
    text = (
        chat + "The billing service is a billing thing for billing. " + decided + " " + chat.lower()
    )
    assert decided in compress_text(text, 1, None, count)


def test_the_levels_get_shorter() -> None:
    sizes = [count(compress_text(TEXT, level, None, count)) for level in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < sizes[3] <= REFERENCE_TOKENS < sizes[2] <= ABSTRACT_TOKENS


def test_level_3_is_a_list_of_topics() -> None:
    tags = compress_text(
        "We use JWT. JWT tokens live 15 minutes. Refresh tokens rotate.", 3, 12, count
    )
    assert "JWT" in tags
    assert ", " in tags


@given(
    st.text(max_size=800) | st.text(alphabet="ab1A .\n👍汉", max_size=800),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 100),
)
def test_invariant_03_no_level_exceeds_its_limit(text: str, level: int, max_tokens: int) -> None:
    short = compress_text(text, level, max_tokens, count)
    assert count(short) <= max_tokens
    assert len(short) <= max(len(text), 4)


@given(st.text(max_size=400), st.sampled_from(CompressionLevel))
def test_invariant_07_compression_is_deterministic(text: str, level: CompressionLevel) -> None:
    assert compress_text(text, level, 40, count) == compress_text(text, level, 40, count)


@pytest.mark.parametrize("text", ["x" * 200_000, "{}," * 60_000, "\n" * 100_000, "汉" * 100_000])
def test_invariant_10_only_the_short_result_is_counted(text: str) -> None:
    counted = 0

    def counting(part: str) -> int:
        nonlocal counted
        counted += len(part)
        return count(part)

    for level in (1, 2, 3):
        compress_text(text, level, 64, counting)
    assert counted < 10_000


@given(st.text(max_size=300), st.integers(0, 40))
def test_clip_is_a_start_of_the_text_within_the_limit(text: str, max_tokens: int) -> None:
    clipped = clip(text, max_tokens, count)
    assert text.startswith(clipped)
    assert count(clipped) <= max_tokens


@given(st.text(max_size=1000))
def test_a_hint_is_one_short_line(text: str) -> None:
    line = hint(text)
    assert len(line) <= 91
    assert line.splitlines() in ([], [line])


def test_a_hint_says_what_it_is_about() -> None:
    assert hint("Hey Mel!  The  pottery\nclass is on Friday") == "The pottery class is on Friday"
    assert hint("one two three four", max_words=2) == "one two…"
    assert hint("Great!") == "Great!"
    assert hint("") == ""


def test_invariant_10_a_text_of_megabytes_costs_no_more_than_its_beginning() -> None:
    text = "Some words that say a thing. And 42 more! " * 100_000
    with cpu_within(2):  # measured 0.3; all of it takes 4
        for level in (1, 2, 3):
            assert text.startswith(compress_text(text, level, 100, count)[:20]) or level == 3
