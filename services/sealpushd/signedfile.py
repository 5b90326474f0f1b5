"""What a root signed, as a file between its people and the operators who publish it: JSON that names kind and root.

The root's public key in the file says whom to ask, not whom to trust: accounts takes what a root of its apps signed, and
phones what the root signed that they pin.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Final

from sealpush.errors import EntryRefused
from sealpush.keys import TAG_ENTRY, EntryRole, RootKey, SenderEntry, sign_sender_entry, signed_body
from sealpush.revocations import REVOCATIONS_BYTES_MAX, RevocationList, sign_revocations, verify_revocations

# The longest list in hex, and what stands around it.
FILE_BYTES_MAX: Final = 2 * REVOCATIONS_BYTES_MAX + 1024

_FORMAT: Final = "sealpush signed"
_VERSION: Final = 1


class Kind(Enum):
    """What was signed."""

    SENDER_ENTRY = "sender entry"
    PLATFORM_ENTRY = "platform entry"
    REVOCATIONS = "revocation list"


_KINDS: Final = {EntryRole.SENDER: Kind.SENDER_ENTRY, EntryRole.PLATFORM: Kind.PLATFORM_ENTRY}


@dataclass(frozen=True, slots=True)
class SignedFile:
    """A signed blob and whose it is, as the file says: nothing of it is verified before `entry()` or `revocations()`."""

    kind: Kind
    root_public_key: bytes
    signed: bytes

    @classmethod
    def of_entry(cls, root: RootKey, entry: SenderEntry) -> SignedFile:
        """An entry, signed now."""
        return cls(_KINDS[entry.role], root.public_key, sign_sender_entry(root, entry))

    @classmethod
    def of_revocations(cls, root: RootKey, revocations: RevocationList) -> SignedFile:
        """A revocation list, signed now."""
        return cls(Kind.REVOCATIONS, root.public_key, sign_revocations(root, revocations))

    def entry(self) -> SenderEntry:
        """The entry, signed by the root that the file names, whether or not it is in time. Raises EntryRefused."""
        body = signed_body(self.root_public_key, TAG_ENTRY, self.signed)
        if body is None:
            raise EntryRefused("the entry is not signed by the root that the file names")
        try:
            entry = SenderEntry.decode(body)
        except ValueError as e:
            raise EntryRefused(f"the entry is malformed: {e}") from None
        if _KINDS[entry.role] is not self.kind:
            raise EntryRefused(f"the file says that it holds a {self.kind.value}, and holds another entry")
        return entry

    def revocations(self) -> RevocationList:
        """The list, signed by the root that the file names. Raises RevocationsRefused."""
        return verify_revocations(self.root_public_key, self.signed)

    def encode(self) -> bytes:
        """As JSON."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": self.kind.value,
            "root_public_key": self.root_public_key.hex(),
            "signed": self.signed.hex(),
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> SignedFile:
        """What a file's content says. Raises ValueError, without the content: it may be another file, and secret."""
        try:
            if len(content) > FILE_BYTES_MAX:
                raise ValueError
            document = json.loads(content.decode())
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError
            made = cls(Kind(document["kind"]), bytes.fromhex(document["root_public_key"]), bytes.fromhex(document["signed"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("it holds nothing that `sealpush root` signed") from None
        return made
