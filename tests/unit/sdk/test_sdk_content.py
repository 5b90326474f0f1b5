"""What a content may be, and what a text shows."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sealpush.content import ContentRefused, check_content, is_https_url, is_json_object, made_safe
from sealpush.text import is_invisible, shows_as_written, shows_something
from sealpush.v1.content_pb2 import Action, Content

INVISIBLE = [
    "\u00ad",
    "\u034f",
    "\u061c",
    "\u115f",
    "\u17b4",
    "\u180e",
    "\u200b",
    "\u2028",
    "\u2800",
    "\u3164",
    "\ufe0f",
    "\ufeff",
    "\uffa0",
]
INVISIBLE += ["\U0001bca0", "\U0001d173", "\U000e0001", "\U000e0100", "\t", "\n", "\u00a0", "\u3000"]


@pytest.mark.parametrize("character", INVISIBLE)
def test_a_character_that_nobody_sees_is_in_no_name_and_makes_no_title(character: str) -> None:
    assert is_invisible(character)
    assert not shows_as_written(f"Ba{character}nk")
    assert not shows_something(f" {character} ")
    with pytest.raises(ContentRefused, match="title shows nothing") as refused:
        check_content(Content(title=character * 3, body="text"))
    assert refused.value.field == "title"


@pytest.mark.parametrize("name", ["Bank", "Банк «Тест»", "Big Bank", "銀行", "बैंक", "بنك", "Ñandú", "O'Neil & Co."])
def test_a_name_of_any_script_shows_as_written(name: str) -> None:
    assert shows_as_written(name)
    assert shows_something(name)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org",
        "HTTPS://Example.org/a",
        "https://example.org:8443/a?b=c#d",
        "https://приклад.укр/шлях",
        "https://xn--80aikifvh.xn--j1amh/",
        "https://[2001:db8::1]/a",
        "https://192.0.2.1/a",
        "https://a_b.example.org/",
        "https://example.org./",
    ],
)
def test_an_address_on_the_web_is_one(url: str) -> None:
    assert is_https_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://",
        "https:///a",
        "https://exa mple",
        "https://example.org/a b",
        "https://example.org/a\nb",
        " https://example.org",
        "http://example.org",
        "https:example.org",
        "//example.org",
        "javascript:alert(1)//https://example.org",
        "https://user:secret@example.org/",
        "https://bank.example@evil.example/",
        "https://bank.example\\@evil.example/",
        "https://example.org:99999/",
        "https://example.org:0/",
        "https://example..org/",
        "https://-example.org/",
        "https://[::1/",
        "https://[example.org]/",
        "https://192.0.2.999/",
        "https://exam\u200bple.org/",
        "https://exam\u3164ple.org/",
        f"https://{'a' * 64}.org/",
    ],
)
def test_what_is_no_address_on_the_web_is_none(url: str) -> None:
    assert not is_https_url(url)


@given(st.text(max_size=60))
@example("https://[")
@example("https://a:b")
@example("https://\udcff")
def test_any_text_is_an_address_or_not(text: str) -> None:
    is_https_url(text)
    is_https_url("https://" + text)


@pytest.mark.parametrize("text", ["{}", '{"account": 7}', ' {"a": [1, null]} '])
def test_a_json_object_is_one(text: str) -> None:
    assert is_json_object(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '"a"', "{a: 1}", '{"a": NaN}', '{"a": -Infinity}', "{} {}", "[" * 100_000, '{"a":' * 50_000]
)
def test_what_is_no_json_object_is_none(text: str) -> None:
    assert not is_json_object(text)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (Content(), "body"),
        (Content(title="t" * 257), "title"),
        (Content(body="b", image_url="http://example.org/a.png"), "image_url"),
        (Content(content_url="https://"), "content_url"),
        (Content(body="b", custom_payload="not json"), "custom_payload"),
        (Content(body="b", custom_payload=json.dumps({"a": "я" * 8_192}, ensure_ascii=False)), "custom_payload"),
        (Content(body="b", actions=[Action(title="a")] * 4), "actions"),
        (Content(body="b", actions=[Action(title="a" * 65)]), "actions"),
        (Content(body="b", locale="u" * 36), "locale"),
    ],
)
def test_a_content_that_breaks_a_rule_is_refused_by_field_and_made_safe_on_a_phone(content: Content, field: str) -> None:
    with pytest.raises(ContentRefused) as refused:
        check_content(content)
    assert refused.value.field == field
    safe = made_safe(content)
    if safe.title or safe.body or safe.content_url:
        check_content(safe)
    # Nothing is left to show of a content that showed nothing; a phone shows the sender's name then.
    assert safe.body == content.body


contents = st.builds(
    Content,
    title=st.text(max_size=300),
    body=st.text(max_size=40),
    short_text=st.text(max_size=520),
    image_url=st.sampled_from(["", "https://example.org/a", "http://example.org", "https://"]) | st.text(max_size=30),
    content_url=st.sampled_from(["", "https://example.org/a", "javascript:1"]),
    custom_payload=st.sampled_from(["", "{}", "[]", "x"]),
    actions=st.lists(st.builds(Action, title=st.text(max_size=70)), max_size=5),
    locale=st.text(max_size=40),
)


def problem(content: Content) -> str:
    try:
        check_content(content)
    except ContentRefused as refused:
        return str(refused)
    return ""


@given(contents)
def test_what_a_phone_shows_keeps_the_rules_or_shows_nothing(content: Content) -> None:
    safe = made_safe(content)
    assert problem(safe) in ("", "the content is empty: give a title or a body")
    assert problem(content) or safe == content
