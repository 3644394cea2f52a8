"""What is known of a model: facts, what a refused turn tries next and learns, and what a list states."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.conversation.effects import Refused
from proxy.conversation.model_facts import (
    Capabilities,
    Seen,
    capabilities,
    describe,
    stated_windows,
    window_of,
    within,
)
from proxy.memory import VMMode
from tests.conversation.player import (
    Message,
    Player,
    call,
    calls,
    check_pairs,
    count_tokens,
    limits_of,
    says,
    script,
)
from tests.conversation.scenario import grown, text_of, tools_of
from tests.examples import examples

MORE = {"role": "user", "content": "and now?"}


def refusal(words: str, status: int = 400) -> Refused:
    return Refused(status, json.dumps({"error": {"message": words}}).encode())


def too_long(limit: int) -> Any:
    """An upstream with a smaller window than anybody knows."""

    def model(request: Message) -> Message | Refused:
        tokens = count_tokens(request)
        if tokens > limit:
            return refusal(
                f"This model's maximum context length is {limit} tokens. However, your messages "
                f"resulted in {tokens} tokens."
            )
        return says("fits")

    return model


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_never_left_its_window_shrinks_to_the_real_one(stream: bool) -> None:
    player = Player(limits_of(100_000))
    messages = [*grown(player, 30), MORE]
    played = player.ask(messages, too_long(2500), stream=stream)
    assert [count_tokens(r) <= 2500 for r in played.requests] == [False, True]
    assert played.requests[0]["messages"] == messages
    assert played.answer.learned == {"window_tokens": 2500}
    assert played.message is not None and played.message["content"] == "fits"


@pytest.mark.parametrize("stream", [False, True])
def test_paged_prompt_shrinks_too_and_is_sent_once_more_only(stream: bool) -> None:
    player = Player(limits_of(3000))
    messages = [*grown(player, 40), MORE]
    played = player.ask(messages, too_long(1200), stream=stream)
    assert len(played.bodies) == 2
    assert count_tokens(played.requests[1]) <= 1200
    assert played.answer.learned == {"window_tokens": 1200}
    check_pairs(played.requests[1])


def test_upstreams_own_count_says_what_its_tokens_are() -> None:
    """It counts each of our tokens as two, so its window is half as large as it says."""

    def model(request: Message) -> Message | Refused:
        tokens = 2 * count_tokens(request)
        if tokens > 5000:
            return refusal(f"prompt is too long: {tokens} tokens > 5000 maximum")
        return says("fits")

    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], model)
    assert len(played.bodies) == 2 and played.answer.refused is None


def test_window_without_a_number_is_guessed_from_what_was_sent() -> None:
    no_number = refusal("Your input exceeds the context window of this model.")
    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], script(no_number, says("fits")))
    first, second = (count_tokens(r) for r in played.requests)
    assert second < 0.8 * first
    assert 0.7 * first < played.answer.learned["window_tokens"] < 0.8 * first


def test_what_never_fits_ends_with_upstreams_first_refusal() -> None:
    never = refusal("This model's maximum context length is 4000 tokens.")
    player = Player(limits_of(100_000))
    played = player.ask([*grown(player, 30), MORE], script(never))
    assert len(played.bodies) == 2 and played.answer.refused == never
    assert played.answer.learned == {}


def test_stream_options_are_left_out_for_who_refuses_them() -> None:
    def picky(request: Message) -> Message | Refused:
        return refusal("Unknown parameter: 'stream_options'.") if "stream_options" in request else says("ok")

    player = Player(limits_of(1500))
    messages = [*grown(player, 12), MORE]
    played = player.ask(messages, picky, stream=True)
    first, second = played.requests
    assert first.pop("stream_options") == {"include_usage": True}
    assert first == second, "the rest of the request is the same"
    assert played.answer.learned == {"stream_usage": False}


def test_system_messages_become_one_for_who_takes_no_second() -> None:
    def picky(request: Message) -> Message | Refused:
        roles = [m["role"] for m in request["messages"]]
        if any(role in ("system", "developer") for role in roles[1:]):
            return refusal("System message must be at the beginning.")
        return says("ok")

    player = Player(limits_of(1500))
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *grown(player, 12), MORE]
    played = player.ask(messages, picky)
    last = played.requests[-1]["messages"]
    assert last[0]["role"] == "system"
    assert last[0]["content"].startswith("Be kind.\n\n<VM:RULES>")
    assert played.answer.learned == {"mid_system": False}


def test_model_without_tools_is_paged_when_the_whole_would_not_fit() -> None:
    def picky(request: Message) -> Message | Refused:
        return refusal("this model does not support tools") if request.get("tools") else says("ok")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky)
    assert len(played.bodies) == 2 and "tools" not in played.requests[1]
    assert count_tokens(played.requests[1]) <= 1500
    assert played.answer.learned == {"tools": False}
    assert played.answer.report.channel == "passive"


def test_model_that_takes_no_tools_beside_json_loses_them_for_json_alone() -> None:
    def picky(request: Message) -> Message | Refused:
        if request.get("tools") and request.get("response_format"):
            return refusal("Function calling with a response mime type: 'application/json' is unsupported")
        return says("{}")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky, response_format={"type": "json_object"})
    assert len(played.bodies) == 2 and "tools" not in played.requests[1]
    assert played.answer.learned == {"tools_with_json": False}
    knowing = Player(limits_of(1500, window_tokens=1600, tools_with_json=False))
    messages = [*grown(knowing, 20), MORE]
    assert "tools" not in knowing.ask(messages, picky, response_format={"type": "json_object"}).requests[0]
    assert "tools" in knowing.ask(messages, picky).requests[0]


@pytest.mark.parametrize("tools", [0, 1])
def test_call_that_stop_cut_is_asked_again_without_vm_tools(tools: int) -> None:
    cut = calls(call("page_fault", '{"page_id": "msg_0', "c1"))
    player = Player(limits_of(1500))
    more = {"tools": tools_of(tools)} if tools else {}
    messages = [*grown(player, 12, **more), MORE]
    played = player.ask(messages, script(cut, says("ok")), stop=["001"], **more)
    assert played.message is not None and played.message["content"] == "ok"
    again = played.requests[1]
    names = [t["function"]["name"] for t in again.get("tools") or ()]
    if tools:
        assert names == [t["function"]["name"] for t in tools_of(1)], "they may still be called"
    else:
        assert again["tool_choice"] == "none"
    assert "c1" not in json.dumps(again["messages"])


def test_one_length_limit_holds_for_all_rounds() -> None:
    fault = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    player = Player(limits_of(1500))
    messages = [*grown(player, 12), MORE]
    for name in ("max_tokens", "max_completion_tokens"):
        played = player.ask(messages, script(fault, says("ok")), **{name: 300})
        assert [r[name] for r in played.requests] == [300, 293]  # a round of the player bills 7


def test_field_that_excludes_tools_makes_its_requests_passive_and_no_others() -> None:
    def picky(request: Message) -> Message | Refused:
        if request.get("tools") and request.get("dry_run"):
            return refusal("tools cannot be combined with dry_run")
        return says("ok")

    player = Player(limits_of(1500, window_tokens=1600))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky, dry_run=True)
    assert [("tools" in r, r["dry_run"]) for r in played.requests] == [(True, True), (False, True)]
    assert played.answer.learned == {"not_with_tools": ["dry_run"]}
    assert played.answer.report.channel == "passive"


def test_template_without_a_system_role_hears_the_memory_from_the_user() -> None:
    def picky(request: Message) -> Message | Refused:
        if any(m["role"] in ("system", "developer") for m in request["messages"]):
            return refusal("System role not supported")
        return says("ok")

    player = Player(limits_of(1500, developer_role="system"))
    played = player.ask([*grown(player, 12), MORE], picky)
    assert len(played.bodies) == 2 and played.answer.learned == {"system_role": False}
    first = played.requests[1]["messages"][0]
    assert first["role"] == "user" and first["content"].startswith("<VM:RULES>")


def test_template_without_a_place_for_calls_gets_pages_as_text() -> None:
    """It counts every message, and a call with its result is no turn of the user's."""

    def picky(request: Message) -> Message | Refused:
        spoken = [m["role"] for m in request["messages"] if m["role"] not in ("system", "developer")]
        if any((role == "user") != (i % 2 == 0) for i, role in enumerate(spoken)):
            return refusal("Conversation roles must alternate user/assistant/user/assistant/...")
        return says("ok") if len(spoken) > 99 or not request.get("tools") else asks

    asks = calls(call("page_fault", {"page_id": "msg_0001"}, "c1"))
    player = Player(limits_of(1500, window_tokens=1600, developer_role="system"))
    messages = [*grown(player, 20), MORE]
    played = player.ask(messages, picky)
    assert played.message is not None and played.message["content"] == "ok"
    assert len(played.bodies) == 3 and played.answer.learned["tools"] is False
    last = played.requests[2]
    assert "tools" not in last and "msg_0001" in last["messages"][-1]["content"]


def test_facts_come_from_overrides_then_lessons_then_assumptions() -> None:
    known = capabilities(
        {"stream_usage": True, "window_tokens": None},
        {"stream_usage": False, "window_tokens": 9000},
        {"prompt_cache_key": True},
    )
    assert known == Capabilities(prompt_cache_key=True, window_tokens=9000)
    row = describe("m", {"tools": None, "mid_system": True}, {"tools": False}, {"tools": True, "x": 1})
    assert row == {
        "model": "m",
        "mid_system": {"value": True, "from": "override"},
        "tools": {"value": False, "from": "learned"},
        "x": {"value": 1, "from": "assumed"},
    }
    assert capabilities({}, {"window_tokens": 12}, {}) == Capabilities()


def test_limits_within_a_window_keep_room_for_the_answer() -> None:
    limits = limits_of(10_000)
    smaller = within(limits, 2000)
    assert (smaller.working_set.max_l0_tokens, smaller.budget_tokens) == (2000, 1900)
    assert within(limits, 50_000).budget_tokens == limits.budget_tokens


# -- a refusal that nobody understands


ASSUMED: dict[str, Any] = {"window_known": False, "window_tokens": 32_000}
SILENT = Refused(400, b"")


def refusing_above(limit: int, refused: Refused = SILENT) -> Any:
    """An upstream that does not say why it refuses."""
    return lambda request: refused if count_tokens(request) > limit else says("fits")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", [VMMode.RELAXED, VMMode.PASSIVE])
@pytest.mark.parametrize("budget", [100_000, 7000], ids=["untouched", "paged"])
def test_large_request_refused_without_a_reason_is_tried_at_half_its_size(
    stream: bool, mode: VMMode, budget: int
) -> None:
    player = Player(limits_of(budget, mode=mode, **ASSUMED))
    player.learned = {}
    messages = [*grown(player, 40), MORE]
    played = player.ask(messages, refusing_above(2000), stream=stream)
    first, second = (count_tokens(r) for r in played.requests)
    assert second <= first / 2
    assert played.message is not None and played.message["content"] == "fits"
    assert played.answer.learned["refused_tokens"] == pytest.approx(first, rel=0.02)
    assert played.answer.learned["window_tokens"] == played.answer.learned["refused_tokens"] // 2
    again = player.ask([*messages, says("fits"), MORE], refusing_above(2000), stream=stream)
    assert len(again.bodies) == 1 and again.answer.refused is None


@pytest.mark.parametrize(
    ("words", "status", "changes"),
    [
        ("", 400, {"window_known": True}),
        ("Incorrect API key provided.", 401, ASSUMED),
        ("Rate limit reached, try again in 2s.", 429, ASSUMED),
        ("You have no credits.", 402, ASSUMED),
    ],
)
def test_what_is_known_or_surely_another_matter_is_not_made_smaller(
    words: str, status: int, changes: dict[str, Any]
) -> None:
    player = Player(limits_of(100_000, **changes))
    played = player.ask([*grown(player, 40), MORE], script(refusal(words, status)))
    assert len(played.bodies) == 1
    assert played.answer.refused == refusal(words, status) and not played.answer.unexplained


def test_small_request_is_not_made_smaller() -> None:
    player = Player(limits_of(100_000, **ASSUMED))
    assert len(player.ask([*grown(player, 4), MORE], script(SILENT)).bodies) == 1


def test_size_that_has_passed_is_not_what_is_refused() -> None:
    player = Player(limits_of(100_000, **ASSUMED))
    messages = [*grown(player, 40), MORE]
    player.seen = Seen(passed_tokens=50_000)
    played = player.ask(messages, script(SILENT))
    assert len(played.bodies) == 1 and played.answer.unexplained


def test_what_has_passed_is_the_window_when_more_is_refused() -> None:
    """A conversation that grows finds the true window, not half of it."""
    player = Player(limits_of(100_000, **ASSUMED))
    messages = [*grown(player, 40), MORE]
    player.seen = Seen(passed_tokens=6000)
    played = player.ask(messages, refusing_above(6100))
    assert len(played.bodies) == 2 and played.answer.learned["window_tokens"] == 6000


def test_when_nothing_helps_the_first_refusal_counts_and_nothing_is_learned() -> None:
    player = Player(limits_of(5000, **ASSUMED))
    messages = [*grown(player, 40), MORE]
    refusals = [Refused(400, b"%d" % n) for n in range(9)]
    played = player.ask(messages, script(*refusals))
    assert len(played.bodies) == 3
    assert played.requests[2]["messages"] == messages, "the last one is the client's own (invariant 1)"
    assert played.answer.refused == refusals[0]
    assert played.answer.learned == {} and played.answer.unexplained


def test_invariant_01_smaller_request_that_fails_leaves_the_unchanged_one_its_try() -> None:
    """It was something of ours, in words that nobody knows."""

    def picky(request: Message) -> Message | Refused:
        return refusal("nein") if request.get("tools") else says("ja")

    player = Player(limits_of(5000, **ASSUMED))
    played = player.ask([*grown(player, 40), MORE], picky)
    assert len(played.bodies) == 3 and played.answer.refused is None
    assert "window_tokens" not in played.answer.learned


def test_after_a_failure_the_next_try_is_smaller() -> None:
    player = Player(limits_of(100_000, **ASSUMED))
    messages = [*grown(player, 60), MORE]
    sizes = []
    for failures in (0, 1, 2, 9):
        player.seen = Seen(0, failures)
        played = player.ask(messages, script(SILENT))
        sizes.append(count_tokens(played.requests[1]))
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


@pytest.mark.parametrize("doubted", [False, True])
@pytest.mark.parametrize("status", [400, 408, 500, 502, 503])
def test_what_may_have_been_the_servers_trouble_is_learned_when_it_shows_twice(
    status: int, doubted: bool
) -> None:
    player = Player(limits_of(100_000, **ASSUMED))
    messages = [*grown(player, 40), MORE]
    player.seen = Seen(doubted=doubted)
    played = player.ask(messages, refusing_above(2500, Refused(status, b"")))
    assert played.answer.refused is None and len(played.bodies) == 2
    learned = status in (400, 500) or doubted  # a server of ours that knows no better says 500
    assert ("window_tokens" in played.answer.learned) is learned
    assert bool(played.answer.doubted_tokens) is not learned


def test_guessed_window_grows_while_requests_that_fill_it_pass() -> None:
    """An accident costs memory for a while, not for ever; below what was refused it stays."""
    player = Player(limits_of(12_000, **ASSUMED))
    player.learned = {"window_tokens": 3000, "refused_tokens": 6000}
    messages = grown(player, 60)
    assert player.learned["window_tokens"] > 4000
    grown(player, 150)
    assert player.learned == {"window_tokens": 5999, "refused_tokens": 6000}
    played = player.ask([*messages, MORE], refusing_above(4000))
    assert played.answer.refused is None


def test_numbers_in_words_that_nobody_knows_are_a_better_guess_than_half() -> None:
    """And no more than a guess: they may have been about something else."""

    def upstream(request: Message) -> Message | Refused:
        tokens = count_tokens(request)
        return refusal(f"longueur {tokens}, permise 3900") if tokens > 3900 else says("fits")

    player = Player(limits_of(100_000, **ASSUMED))
    messages = [*grown(player, 60), MORE]
    played = player.ask(messages, upstream)
    assert played.answer.refused is None and len(played.bodies) == 2
    assert played.answer.learned["window_tokens"] == 3900
    assert played.answer.learned["refused_tokens"] == count_tokens(played.requests[0])


def test_upstreams_words_end_the_guessing() -> None:
    player = Player(limits_of(12_000, **ASSUMED))
    player.learned = {"window_tokens": 9000, "refused_tokens": 12_000}
    messages = [*grown(player, 60), MORE]
    played = player.ask(messages, too_long(4000))
    assert played.answer.learned == {"window_tokens": 4000, "refused_tokens": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_conversation_that_grows_past_an_unknown_window_is_always_answered(stream: bool) -> None:
    """Assumed 12,000, in truth 5,000, and never a word."""
    player = Player(limits_of(12_000, **ASSUMED))
    player.learned = {}
    upstream = refusing_above(5000)
    messages: list[Message] = []
    refused = 0
    for i in range(60):
        messages.append({"role": "user", "content": text_of(random.Random(i), 60, f"user{i}x")})
        played = player.ask(messages, upstream, stream=stream)
        assert played.answer.refused is None, i
        refused += len(played.bodies) - 1
        messages.append(says(text_of(random.Random(-i), 60, f"answer{i}x")) | {"content": "fits"})
        player.seen = Seen(max(player.seen.passed_tokens, count_tokens(played.requests[-1])))
    assert 1 <= refused <= 6, "it is not paid in every turn"


WORDLESS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(str.encode),
    st.integers(0, 10**6).map(lambda n: b'{"error": {"message": "E%d"}}' % n),
    st.sampled_from([b"x" * 100_000, b"null", b"[]", "长度超限".encode(), b"<html>413</html>", b'{"code": 400}']),
)


@cache
def long_history() -> tuple[Message, ...]:
    return tuple(grown(Player(limits_of(100_000)), 40))


@given(
    st.integers(400, 599), st.lists(WORDLESS, min_size=1, max_size=4), st.integers(600, 9000),
    st.booleans(), st.sampled_from([3000, 6000, 100_000]), st.sampled_from(list(VMMode)),
)  # fmt: skip
@examples(20)
def test_too_large_a_request_is_answered_within_two_further_calls_or_ends_with_upstreams_words(
    status: int, texts: list[bytes], limit: int, stream: bool, budget: int, mode: VMMode
) -> None:
    refusals = [Refused(status, text) for text in texts]
    calls_made = 0

    def upstream(request: Message) -> Message | Refused:
        nonlocal calls_made
        calls_made += 1
        if count_tokens(request) <= limit:
            return says("fits")
        return refusals[min(calls_made, len(refusals)) - 1]

    player = Player(limits_of(budget, mode=mode, **ASSUMED))
    messages = [*long_history(), MORE]
    played = player.ask(messages, upstream, stream=stream)
    assert len(played.bodies) <= 3
    if played.answer.refused is not None:
        assert played.answer.refused in refusals
    else:
        assert played.message is not None and played.message["content"] == "fits"
    first = count_tokens(played.requests[0])
    if status in (400, 413, 422, 500) and len(texts) == 1 and texts[0] == b"" and limit >= first / 2:
        assert played.answer.refused is None


# -- an upstream's list of models


def listed(*models: dict[str, Any]) -> bytes:
    return json.dumps({"object": "list", "data": list(models)}).encode()


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"max_model_len": 16384, "created": 1_700_000_000}, 16384),  # vLLM
        ({"meta": {"n_ctx": 8192, "n_ctx_train": 131072, "n_vocab": 128256, "n_params": 8_030_000_000}}, 8192),
        ({"meta": {"n_ctx_train": 131072, "n_embd": 4096, "size": 4_900_000_000}}, None),  # llama.cpp, older
        ({"context_window": 131072, "max_completion_tokens": 32768}, 131072),  # Groq
        ({"max_context_length": 32768, "capabilities": {"completion_chat": True}}, 32768),  # Mistral
        (
            {"context_length": 200_000, "pricing": {"prompt": "0.1"}, "per_request_limits": {"prompt_tokens": 900},
             "top_provider": {"context_length": 128_000, "max_completion_tokens": 8192}},
            128_000,
        ),  # OpenRouter
        (
            {"capabilities": {"limits": {"max_context_window_tokens": 128_000, "max_prompt_tokens": 64_000,
             "max_output_tokens": 16_384}}},
            64_000,
        ),  # Copilot
        ({"inputTokenLimit": 1_048_576, "outputTokenLimit": 65_536}, 1_048_576),  # Gemini
        ({"loaded_context_length": 4096, "max_context_length": 131_072}, 4096),  # LM Studio
        ({"metadata": {"context_length": 40_960, "max_tokens": 40_960}}, 40_960),  # DeepInfra
        ({"providers": [{"context_length": 65_536}, {"context_length": 131_072}]}, 65_536),  # Hugging Face
        ({"limits": {"max_input_tokens": 9000}}, 9000),
        ({"owned_by": "openai", "created": 1_715_367_049}, None),
        ({"context_length": None, "context_window": True, "max_model_len": 0}, None),
    ],
)
def test_stated_window_is_what_the_keys_speak_of(fields: dict[str, Any], window: int | None) -> None:
    stated = stated_windows(listed({"id": "Org/Some-Model", **fields}, {"id": "another"}))
    assert window_of("Org/Some-Model", stated) == window


def test_stated_window_is_found_by_a_models_name_its_alias_or_as_the_only_one() -> None:
    stated = stated_windows(listed({"id": "openai/gpt-4o", "context_length": 9000}, {"id": "m", "context_length": 8000, "aliases": ["n"]}))
    assert [window_of(n, stated) for n in ("openai/gpt-4o", "openai/gpt-4o:online", "GPT-4o", "m", "n", "o")] == [
        9000, 9000, 9000, 8000, 8000, None,
    ]  # fmt: skip
    alone = stated_windows(b'{"models": [{"name": "/models/a.gguf", "meta": {"n_ctx": 4096}}]}')
    assert window_of("gpt-3.5-turbo", alone) == 4096
    assert window_of("x", stated_windows(b'[{"id": "x", "context_length": 4096}, {"id": "y"}]')) == 4096


def test_stated_windows_of_names_alike_are_the_smallest_window_but_for_the_exact_one() -> None:
    stated = stated_windows(listed({"id": "a/m", "max_model_len": 9000}, {"id": "b/m", "max_model_len": 4000}))
    assert [window_of(n, stated) for n in ("a/m", "b/m", "m")] == [9000, 4000, 4000]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "data", "context_length", "meta"]), inner, max_size=4),
)


@given(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_stated_windows_are_read_from_any_body_without_a_failure(body: bytes) -> None:
    assert all(isinstance(window, int) and window >= 512 for window in stated_windows(body).values())
