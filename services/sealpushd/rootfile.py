"""The platform's root in a file that any two of its people open together, and none of them alone.

Each person has a passphrase and a salt. For each two people the root's 32-byte seed lies in the file once more, encrypted
under a key that both passphrases make:

    k(person)  = Argon2id(passphrase in NFC and UTF-8, salt16), 32 bytes; its cost is written in the file
    pair key   = SHA-256("SPR1-pair" | k(first) | k(second)), first and second in the order of their names' bytes
    sealed     = XChaCha20-Poly1305(pair key, nonce24, seed, AAD = "SPR1" | root public key32 | len1 name | len1 name)

So whoever has the file and one passphrase still has to guess the other one, at the cost of Argon2id a guess; whoever has the
file alone has to guess two at once. Nothing in the file says of one passphrase alone whether it is right. With three people or
more one may be lost. The file is JSON. Nothing here reads or writes it: this module is values in, values out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import nacl.utils
from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.pwhash import argon2id

from sealpush.keys import RootKey

PEOPLE_MIN: Final = 2
# Each two of them have a copy of the seed, 28 then; more people are a list, not a few who answer for the root.
PEOPLE_MAX: Final = 8
NAME_BYTES_MAX: Final = 64
PASSPHRASE_CHARACTERS_MIN: Final = 12
PASSPHRASE_BYTES_MAX: Final = 1024
FILE_BYTES_MAX: Final = 64 * 1024

_VERSION: Final = 1
_FORMAT: Final = "sealpush root"
_TAG_PAIR: Final = b"SPR1-pair"
_TAG_SEAL: Final = b"SPR1"
_SEED_BYTES: Final = 32
_SEALED_BYTES: Final = _SEED_BYTES + bindings.crypto_aead_xchacha20poly1305_ietf_ABYTES
_NONCE_BYTES: Final = bindings.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES


class RootFileError(ValueError):
    """The file, a name or a passphrase cannot be used. The message says what to do, and holds no secret."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one guess at a passphrase costs. Raises RootFileError for what libsodium cannot do, or would take too long."""

    operations: int
    memory_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.operations <= 16 or not argon2id.MEMLIMIT_MIN <= self.memory_bytes <= 4 * 1024**3:
            raise RootFileError("the cost of Argon2id in the file is out of bounds (16 operations, 4 GiB): restore the file from a copy")


# libsodium's "sensitive": 1 GiB and some seconds a passphrase. The root is used a few times a year.
SENSITIVE: Final = Cost(argon2id.OPSLIMIT_SENSITIVE, argon2id.MEMLIMIT_SENSITIVE)


@dataclass(frozen=True, slots=True)
class Sealed:
    """The seed, encrypted for two people."""

    nonce: bytes
    ciphertext: bytes


Pair = tuple[str, str]  # names in the order of their bytes


@dataclass(frozen=True, slots=True)
class RootFile:
    """What the file holds: nothing that is of use without two passphrases."""

    root_public_key: bytes
    cost: Cost
    salts: Mapping[str, bytes]
    seals: Mapping[Pair, Sealed]

    @property
    def people(self) -> tuple[str, ...]:
        """Their names, in the order of their bytes."""
        return tuple(sorted(self.salts, key=str.encode))

    def encode(self) -> bytes:
        """As JSON, for people to look at too."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "root_public_key": self.root_public_key.hex(),
            "argon2id": {"operations": self.cost.operations, "memory_bytes": self.cost.memory_bytes},
            "people": {name: {"salt": self.salts[name].hex()} for name in self.people},
            "pairs": [
                {"people": list(pair), "nonce": self.seals[pair].nonce.hex(), "sealed_seed": self.seals[pair].ciphertext.hex()}
                for pair in _pairs(self.people)
            ],
        }
        return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> RootFile:
        """The root in a file's content. Raises RootFileError."""
        try:
            return cls._decode(content)
        except RootFileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # Whatever it is, its content stays out of the message: a file named by mistake may hold a secret.
            raise RootFileError("this is no root as `sealpush root create` writes it, or it is damaged: restore it from a copy") from None

    @classmethod
    def _decode(cls, content: bytes) -> RootFile:
        if len(content) > FILE_BYTES_MAX:
            raise ValueError
        document = json.loads(content.decode())
        if document["format"] != _FORMAT:
            raise ValueError
        if document["version"] != _VERSION:
            raise RootFileError("only version 1 of a root's file is known: use the Sealpush that wrote it, or a newer one")
        cost = Cost(_number(document["argon2id"]["operations"]), _number(document["argon2id"]["memory_bytes"]))
        salts = {name: _bytes(each["salt"], argon2id.SALTBYTES) for name, each in document["people"].items()}
        people = check_people(list(salts))
        seals: dict[Pair, Sealed] = {}
        for each in document["pairs"]:
            first, second = each["people"]
            seals[first, second] = Sealed(_bytes(each["nonce"], _NONCE_BYTES), _bytes(each["sealed_seed"], _SEALED_BYTES))
        if set(people) != set(salts) or set(seals) != set(_pairs(people)):
            raise ValueError
        return cls(_bytes(document["root_public_key"], 32), cost, salts, seals)


def check_people(names: Sequence[str]) -> tuple[str, ...]:
    """The people of a root in the order of their names' bytes. Raises RootFileError for too few, too many, or one of them twice."""
    people = [check_name(name) for name in names]
    if len({name.casefold() for name in people}) != len(people):
        raise RootFileError("the same person stands there twice: name different people")
    if not PEOPLE_MIN <= len(people) <= PEOPLE_MAX:
        raise RootFileError(f"a root has {PEOPLE_MIN} to {PEOPLE_MAX} people, any two of whom use it together")
    return tuple(sorted(people, key=str.encode))


def check_name(name: str) -> str:
    """A person's name as it is written in the file. Raises RootFileError."""
    name = unicodedata.normalize("NFC", name)
    if not name.isprintable() or name != name.strip() or "=" in name or not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise RootFileError(f"a person's name is 1 to {NAME_BYTES_MAX} bytes of printable text, without spaces around it and without =")
    return name


def check_passphrase(name: str, passphrase: str) -> bytes:
    """The bytes that a passphrase stands for. Raises RootFileError that names the person."""
    text = unicodedata.normalize("NFC", passphrase)
    # What a terminal gave that is no UTF-8 counts as nothing: an error of the codec would quote it.
    written = text.encode(errors="ignore")
    if len(text) < PASSPHRASE_CHARACTERS_MIN or len(written) > PASSPHRASE_BYTES_MAX or written.decode() != text:
        raise RootFileError(
            f"the passphrase of {name} must have {PASSPHRASE_CHARACTERS_MIN} characters or more, and {PASSPHRASE_BYTES_MAX} bytes of UTF-8"
            " at most"
        )
    return written


def create(root: RootKey, passphrases: Mapping[str, str], *, cost: Cost = SENSITIVE) -> RootFile:
    """The root as any two of these people, by name, can use it. Raises RootFileError for people or passphrases that will not do."""
    people = check_people(list(passphrases))
    written = {check_name(name): check_passphrase(name, passphrase) for name, passphrase in passphrases.items()}
    if len(set(written.values())) != len(written):
        raise RootFileError("two people gave the same passphrase: each needs one that the others do not know")
    salts = {name: nacl.utils.random(argon2id.SALTBYTES) for name in people}
    keys = {name: _derive(written[name], salts[name], cost) for name in people}
    seals = {}
    for pair in _pairs(people):
        nonce = nacl.utils.random(_NONCE_BYTES)
        associated = _associated(root.public_key, pair)
        ciphertext = bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(root.seed, associated, nonce, _pair_key(keys, pair))
        seals[pair] = Sealed(nonce, ciphertext)
    return RootFile(root.public_key, cost, salts, seals)


def check_pair(file: RootFile, names: Sequence[str]) -> Pair:
    """Two different people of this root, in the order of their names' bytes. Raises RootFileError."""
    named = [check_name(name) for name in names]
    unknown = [name for name in named if name not in file.salts]
    if unknown:
        raise RootFileError(f"{unknown[0]} is nobody of this root; its people are {', '.join(file.people)}")
    if len(named) != 2 or len(set(named)) != 2:
        raise RootFileError(f"two different people use a root together: name two of {', '.join(file.people)}")
    first, second = sorted(named, key=str.encode)
    return first, second


def open_root(file: RootFile, passphrases: Mapping[str, str]) -> RootKey:
    """The root, by the passphrases of two of its people. Raises RootFileError, the same whichever passphrase is wrong."""
    pair = check_pair(file, list(passphrases))
    written = {check_name(name): check_passphrase(name, passphrase) for name, passphrase in passphrases.items()}
    keys = {name: _derive(written[name], file.salts[name], file.cost) for name in pair}
    sealed = file.seals[pair]
    try:
        seed = bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed.ciphertext, _associated(file.root_public_key, pair), sealed.nonce, _pair_key(keys, pair)
        )
    except CryptoError:
        raise RootFileError(
            "these two passphrases do not open the root: one of them is wrong, which cannot be told, or the file was changed"
        ) from None
    return RootKey.from_seed(seed)


def _pairs(people: Sequence[str]) -> Iterator[Pair]:
    return itertools.combinations(people, 2)


def _derive(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    try:
        return argon2id.kdf(32, passphrase, salt, opslimit=cost.operations, memlimit=cost.memory_bytes)
    except CryptoError as e:
        raise RootFileError(f"Argon2id needs {cost.memory_bytes >> 20} MiB of free memory: close other programs") from e


def _pair_key(keys: Mapping[str, bytes], pair: Pair) -> bytes:
    return hashlib.sha256(_TAG_PAIR + keys[pair[0]] + keys[pair[1]]).digest()


def _associated(root_public_key: bytes, pair: Pair) -> bytes:
    names = b"".join(bytes((len(name.encode()),)) + name.encode() for name in pair)
    return _TAG_SEAL + root_public_key + names


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _bytes(value: Any, length: int) -> bytes:
    data = bytes.fromhex(value)
    if len(data) != length:
        raise ValueError
    return data
