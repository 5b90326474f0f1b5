"""What a content may be. Pure. The service refuses what is not, and so does the SDK; a phone shows safely what comes all the same."""

import ipaddress
import json
import re
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

from sealpush.text import is_invisible, shows_something
from sealpush.v1.content_pb2 import Content

CUSTOM_PAYLOAD_BYTES_MAX: Final = 16 * 1024
ACTIONS_MAX: Final = 3
# Longest texts in characters; the proto says them too.
CHARACTERS_MAX: Final = {
    "title": 256,
    "image_url": 2048,
    "deep_link": 2048,
    "replace_key": 64,
    "action_type": 64,
    "resource_id": 128,
    "locale": 35,
    "short_text": 512,
    "template_type": 64,
    "content_url": 2048,
}
ACTION_CHARACTERS_MAX: Final = {"title": 64, "action": 64, "options": 2048}
# What a person reads; each that is given must show something.
_SHOWN: Final = ("title", "body", "short_text")
_URLS: Final = ("image_url", "content_url")

# A host name as it is resolved (RFC 1123, with the underscore that some have), or the letters of other scripts that are encoded for that.
_LABEL = re.compile(r"[^\W_](?:[\w-]{0,61}\w)?|_[\w-]{1,62}")
# RFC 3986 has none of them in a URL, and each has been read in two ways by two parsers.
_NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f\"<>\\^`{|}]")


class ContentRefused(ValueError):
    """A content breaks a rule; `field` names where, `str()` says which and what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def is_https_url(text: str) -> bool:
    """Whether a text is the address of something on the web, by HTTPS and with a host. RFC 3986; no user information."""
    if _NOT_IN_URLS.search(text) is not None or any(map(is_invisible, text)):
        return False
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        return False
    # hostname strips brackets that netloc must have around IPv6 only.
    if url.scheme != "https" or not host or "@" in url.netloc or port == 0:
        return False
    if "[" in url.netloc:
        return _is_address(host)
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdigit():
        return _is_address(host)
    return len(host) <= 253 and all(_LABEL.fullmatch(label) is not None for label in labels)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_json_object(text: str) -> bool:
    """Whether a text is a JSON object (RFC 8259), which NaN and Infinity are no part of."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def check_content(content: Content) -> None:
    """Raises ContentRefused for what no phone could show well: a text over its limit, a link that is none, nothing to see."""
    if not any(getattr(content, field) for field in (*_SHOWN, "content_url")):
        raise ContentRefused("body", "the content is empty: give a title or a body")
    for field in _SHOWN:
        text = getattr(content, field)
        if text and not shows_something(text):
            raise ContentRefused(field, f"{field} shows nothing: it is made of blanks and invisible characters")
    for field, most in CHARACTERS_MAX.items():
        if len(getattr(content, field)) > most:
            raise ContentRefused(field, f"{field} is longer than {most} characters")
    if content.custom_payload:
        if len(content.custom_payload.encode()) > CUSTOM_PAYLOAD_BYTES_MAX:
            raise ContentRefused("custom_payload", f"custom_payload is longer than {CUSTOM_PAYLOAD_BYTES_MAX} bytes")
        if not is_json_object(content.custom_payload):
            raise ContentRefused("custom_payload", 'custom_payload must be a JSON object, such as {"account": 7}')
    for field in _URLS:
        value = getattr(content, field)
        if value and not is_https_url(value):
            raise ContentRefused(field, f"{field} must be an https:// address with a host")
    if len(content.actions) > ACTIONS_MAX:
        raise ContentRefused("actions", f"at most {ACTIONS_MAX} actions")
    for action in content.actions:
        for field, most in ACTION_CHARACTERS_MAX.items():
            if len(getattr(action, field)) > most:
                raise ContentRefused("actions", f"an action's {field} is longer than {most} characters")


def made_safe(content: Content) -> Content:
    """The content as a phone may show it, whoever sealed it: texts cut at their limits, what is no link or no JSON left out.

    A content that keeps the rules comes back as it is.
    """
    try:
        check_content(content)
    except ContentRefused:
        pass
    else:
        return content
    safe = Content()
    safe.CopyFrom(content)
    for field, most in CHARACTERS_MAX.items():
        _cut(safe, field, most)
    for field in _SHOWN:
        if not shows_something(getattr(safe, field)):
            setattr(safe, field, "")
    for field in _URLS:
        if not is_https_url(getattr(safe, field)):
            setattr(safe, field, "")
    if len(safe.custom_payload.encode()) > CUSTOM_PAYLOAD_BYTES_MAX or not is_json_object(safe.custom_payload):
        safe.ClearField("custom_payload")
    del safe.actions[ACTIONS_MAX:]
    for action in safe.actions:
        for field, most in ACTION_CHARACTERS_MAX.items():
            _cut(action, field, most)
    return safe


def _cut(message: Any, field: str, characters_max: int) -> None:
    text: str = getattr(message, field)
    if len(text) > characters_max:
        setattr(message, field, text[:characters_max])
