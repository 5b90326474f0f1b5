"""Every RPC and every field of the protos says what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))

_BLOCK = re.compile(r"(message|enum|oneof|service)\s+(\w+)\s*\{(\s*\})?")
_RPC = re.compile(r"rpc\s+(\w+)")
# A type, perhaps with a label or a map's two types, then name and number.
_FIELD = re.compile(r"[\w.<>, ]+\s(\w+)\s*=\s*\d+\s*[;\[]")


def uncommented(text: str) -> list[str]:
    """RPCs and fields without a comment on the line above, as "line: owner.name". Enum values may be explained by their enum."""
    found = []
    blocks: list[tuple[str, str]] = []
    above = ""
    for n, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if block := _BLOCK.match(line):
            if not block[3]:
                blocks.append((block[1], block[2]))
        elif line == "}" and blocks:
            blocks.pop()
        elif blocks and blocks[-1][0] != "enum" and (named := _RPC.match(line) or _FIELD.match(line)) and not above.startswith("//"):
            owner = next(name for kind, name in reversed(blocks) if kind != "oneof")
            found.append(f"{n}: {owner}.{named[1]}")
        above = line
    return found


def test_the_protos_are_found() -> None:
    assert {path.parent.parent.name for path in PROTOS} == {"sealpush", "sealpushd"}


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_rpc_and_field_is_commented(path: Path) -> None:
    assert [f"{path.relative_to(ROOT)}:{place}" for place in uncommented(path.read_text(encoding="utf-8"))] == []


def test_what_lacks_a_comment_is_named() -> None:
    text = """
service Mail {
  rpc Send(SendRequest) returns (SendResponse);
  // Says why.
  rpc Stop(stream StopRequest) returns (stream StopResponse) {}
}
message SendResponse {}
message SendRequest {
  // 16 bytes.
  bytes message_id = 1;
  optional string tag = 2;
  oneof content {
    pkg.Content plain = 3 [deprecated = true];
  }

  map<string, string> headers = 4;
}
enum Kind {
  KIND_UNSPECIFIED = 0;
}
"""
    assert uncommented(text) == ["3: Mail.Send", "11: SendRequest.tag", "13: SendRequest.plain", "16: SendRequest.headers"]
