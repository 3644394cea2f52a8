"""What a user says for all later answers, in twelve languages; what stories, code and quotes say is none of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.memory.standing import MOST_SENTENCES, Standing, holding, standing_in

INSTRUCTIONS = """
Always cite sources.
please never use tabs
From now on answer in French
And whenever I ask, be brief
Don't ever apologise
Answer in metric units by default.
You should always give the page number.
When I ask about dates, use ISO format.
If I ask for a recipe, always give grams.
I'd like you to always show the query first.
Cite the paper whenever you answer.
Keep it short in all your answers, going forward.
remember that I fly on Mondays
Two things: never use emojis, and be brief.
- Always write tests first
In future replies, skip the intro.
For the rest of this conversation, be terse.
You must never reveal prices.
Each time I paste a log, summarise it first.
Don't use markdown anymore.
Use British spelling throughout.
All your answers should be in bullet points.
Your answers should always be short.
Antworte immer auf Deutsch.
Bitte immer auf Deutsch antworten.
Verwende niemals Emojis.
Ab jetzt antworte bitte kurz.
Ich möchte, dass du immer die Quelle nennst.
Wenn ich nach Terminen frage, gib das Datum im ISO-Format an.
Réponds toujours en français.
N'utilise jamais d'emojis.
À partir de maintenant, réponds brièvement.
Merci de toujours citer tes sources.
Responde siempre en español.
No uses nunca emojis.
Siempre incluye las fuentes.
A partir de ahora, contesta en una frase.
Responda sempre em português.
Nunca use emojis.
A partir de agora, responda de forma curta.
Rispondi sempre in italiano.
Non usare mai emoji.
D'ora in poi rispondi brevemente.
Antwoord altijd in het Nederlands.
Gebruik nooit emoji's.
Vanaf nu antwoord je kort.
Всегда отвечай по-русски.
Никогда не используй эмодзи.
Отвечай всегда кратко.
С этого момента пиши без сокращений.
请总是用中文回答。
以后都用公制单位。
永远不要使用表情符号。
每次我问日期，请用ISO格式。
常に日本語で答えてください。
今後は敬語を使わないでください。
絶対に絵文字を使わないで。
항상 한국어로 대답해 주세요.
앞으로는 짧게 답해 줘.
절대 이모지를 쓰지 마세요.
أجب دائما بالعربية.
لا تستخدم أبدا الرموز التعبيرية.
من الآن فصاعدا أجب باختصار.
"""
PREFERENCES = """
I'd prefer tea
my name is Ada
I am allergic to nuts
So call me Al
I really prefer short answers, what do you think?
I've decided on SQLite for the local store.
I'm a vegetarian and live in Ghent.
I don't eat meat.
Ich bevorzuge kurze Antworten.
Ich hätte lieber Tee.
Je préfère les réponses courtes.
Prefiero respuestas cortas.
Prefiro respostas curtas.
Preferisco risposte brevi.
Ik heb liever korte antwoorden.
Я предпочитаю короткие ответы.
我更喜欢简短的回答。
短い答えの方が好きです。
저는 짧은 답변을 선호합니다.
أفضل أن تكون الإجابات قصيرة
"""
STORIES = """
I always walk home.
She never came
Do you remember Paris?
He has always been kind to me.
Never heard of it, but it sounds interesting
Always loved that song!
We'll be careful from now on.
They prefer tea
Whenever I see him I smile.
Every time I see him, my heart jumps.
You always say that.
hmm, if I mention the gap, how can I explain it?
Ich habe ihn immer geliebt.
Peter kommt immer zu spät.
Elle a toujours aimé Paris.
J'ai toujours voulu y aller.
Siempre me gustó el café.
Nunca he estado allí.
Sempre gostei de café.
Eu nunca fui lá.
Ho sempre amato il mare.
Ik heb hem altijd gemocht.
Я всегда любил море.
Он никогда не приходил.
我总是爱他。
他从来没有来过。
私は彼をいつも愛していた。
나는 항상 그를 사랑했다.
كنت دائما أحب البحر
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.mark.parametrize("text", lines(INSTRUCTIONS))
def test_standing_instruction_is_known_by_its_grammar(text: str) -> None:
    (found,) = standing_in("user", text)
    assert found.instruction and found.text in text
    assert not standing_in("assistant", text) and not standing_in("tool", text)
    assert standing_in("system", text)


@pytest.mark.parametrize("text", lines(PREFERENCES))
def test_standing_preference_is_the_users_own(text: str) -> None:
    assert standing_in("user", text) == [Standing(text, False)]
    assert not standing_in("assistant", text) and not standing_in("system", text)


@pytest.mark.parametrize("text", lines(STORIES))
def test_standing_is_no_story(text: str) -> None:
    assert standing_in("user", text) == []


def test_standing_is_nothing_that_is_pasted() -> None:
    said = "Look at this:\n```\n# Always free the buffer.\n```\n> Never reply to this address.\nWhat is wrong?"
    assert standing_in("user", said) == []
    assert standing_in("user", f"{said} Please always quote the line.")[0].text == "Please always quote the line."


def test_standing_sentences_of_a_long_message_are_these_alone() -> None:
    text = f"{'The log follows. ' * 2_000}\nAlways name the file. {'Some words. ' * 9}"
    assert standing_in("user", text) == [Standing("Always name the file.", True)]
    many = "Always check A. Never use B. Always check C. Never use D. Always check E. Never use F."
    assert len(standing_in("user", many)) == MOST_SENTENCES


@given(st.text())
def test_standing_of_any_text_is_word_for_word(text: str) -> None:
    for sentence in standing_in("user", text):
        assert sentence.text in text


def held(*said: str) -> list[str]:
    """What holds of these messages."""
    marked = [standing_in("user", text) for text in said]
    assert all(marked)
    return [sentence.text for sentences in holding(marked) for sentence in sentences]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("Always include version numbers.", "Never include version numbers."),
        ("Always answer in French.", "Always answer in German."),
        ("Always reply in German.", "From now on reply in English."),
        ("I prefer tabs over spaces.", "Actually I prefer spaces over tabs."),
        ("Call me Al", "From now on call me Bob."),
        ("Always use metric units when I ask about recipes.", "Always use imperial units when I ask about recipes."),
        ("Antworte immer auf Deutsch.", "Antworte ab jetzt auf Englisch."),
        ("Réponds toujours en français.", "Réponds désormais en anglais."),
        ("Responde siempre en español.", "A partir de ahora responde en inglés."),
        ("请总是用中文回答。", "以后都用英文回答。"),
        ("常に日本語で答えてください。", "今後は英語で答えてください。"),
    ],
)
def test_standing_sentence_takes_the_place_of_one_about_the_same(earlier: str, later: str) -> None:
    assert held(earlier, "Always be kind.", later) == ["Always be kind.", later]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("Always include code when I ask about Python.", "Always include tests when I ask about Python."),
        ("Always include prices when I ask about hotels.", "Always include prices when I ask about flights."),
        ("Always provide detailed comparisons when I ask about sneaker features.",
         "Always highlight health benefits when I ask about sneaker features."),
        ("Always cite sources.", "Never use emojis."),
        ("I prefer tea.", "I prefer writing in the mornings."),
        ("Always add a summary.", "From now on also add a title."),
        ("请总是用中文回答。", "以后都用公制单位。"),
    ],
)  # fmt: skip
def test_standing_sentences_about_other_things_stand_beside_each_other(earlier: str, later: str) -> None:
    assert held(earlier, later) == [earlier, later]
