"""sealpushd.rootfile: any two of the people open the root, nobody else and nobody alone."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealpush.keys import RootKey
from sealpushd import rootfile
from sealpushd.rootfile import Cost, RootFile, RootFileError, create, open_root

CHEAP = Cost(1, 8192)
ROOT = RootKey.from_seed(b"\x07" * 32)
PASSPHRASES = {"Anna": "the first of them", "Borys": "the second of them", "Vira": "the third of them"}
FILE = create(ROOT, PASSPHRASES, cost=CHEAP)


def of(*names: str) -> dict[str, str]:
    return {name: PASSPHRASES[name] for name in names}


@pytest.mark.parametrize("pair", list(itertools.permutations(PASSPHRASES, 2)))
def test_any_two_open_it_in_either_order_also_after_it_was_written_and_read(pair: tuple[str, str]) -> None:
    for file in (FILE, RootFile.decode(FILE.encode())):
        opened = open_root(file, of(*pair))
        assert (opened.seed, opened.public_key) == (ROOT.seed, ROOT.public_key)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text("абвгaбc ї", min_size=1, max_size=8).filter(lambda text: text == text.strip()),
        st.text(st.characters(codec="utf-8", categories=("Lu", "Ll", "Nd", "Po", "So")), min_size=30, max_size=40),
        min_size=2,
        max_size=5,
    ).filter(lambda people: len(set(people.values())) == len(people))
)
def test_every_pair_of_any_people_opens_it(passphrases: dict[str, str]) -> None:
    file = RootFile.decode(create(ROOT, passphrases, cost=CHEAP).encode())
    assert len(file.seals) == len(passphrases) * (len(passphrases) - 1) // 2
    for pair in itertools.combinations(passphrases, 2):
        assert open_root(file, {name: passphrases[name] for name in pair}).seed == ROOT.seed


def test_a_wrong_passphrase_is_one_error_whosever_it_is() -> None:
    told = set()
    for wrong in ({"Anna": "not the first of them"}, {"Borys": PASSPHRASES["Anna"]}, {"Anna": PASSPHRASES["Borys"], "Borys": "x" * 12}):
        with pytest.raises(RootFileError, match="one of them is wrong") as caught:
            open_root(FILE, {**of("Anna", "Borys"), **wrong})
        told.add(str(caught.value))
    assert len(told) == 1
    with pytest.raises(RootFileError, match="one of them is wrong"):
        open_root(FILE, {"Anna": PASSPHRASES["Borys"], "Borys": PASSPHRASES["Anna"]})


@pytest.mark.parametrize("passphrases", [{}, of("Anna"), of("Anna", "Borys", "Vira")])
def test_one_alone_can_do_nothing(passphrases: dict[str, str]) -> None:
    with pytest.raises(RootFileError, match="two different people"):
        open_root(FILE, passphrases)


def test_the_same_person_twice_and_a_stranger_are_refused_by_name() -> None:
    with pytest.raises(RootFileError, match="two different people"):
        rootfile.check_pair(FILE, ["Anna", "Anna"])
    with pytest.raises(RootFileError, match="Maks is nobody of this root; its people are Anna, Borys, Vira"):
        rootfile.check_pair(FILE, ["Anna", "Maks"])
    assert rootfile.check_pair(FILE, ["Vira", "Anna"]) == ("Anna", "Vira")


def test_a_passphrase_means_the_same_however_a_keyboard_composes_it() -> None:
    file = create(ROOT, {"Anna": "пароль Й пароль", "Borys": "the second of them"}, cost=CHEAP)
    assert open_root(file, {"Anna": "пароль И\u0306 пароль", "Borys": "the second of them"}) == ROOT


@pytest.mark.parametrize(
    ("passphrases", "words"),
    [
        (of("Anna"), "2 to 8 people"),
        ({f"person {n}": f"a passphrase {n}" for n in range(9)}, "2 to 8 people"),
        ({"Anna": "the first of them", "anna": "the second of them"}, "twice"),
        ({"Anna": "the first of them", "Borys": "the first of them"}, "same passphrase"),
        ({"Anna": "the first of them", "Borys": "elevenchars"}, "passphrase of Borys must have 12"),
        ({"Anna": "the first of them", "Borys": "x" * 1025}, "passphrase of Borys must have 12"),
        ({"Anna": "the first of them", "Borys": "not UTF-8 \udcff at all"}, "passphrase of Borys must have 12"),
        ({"Anna": "the first of them", "Bor\udcffys": "the second of them"}, "a person's name"),
        ({"Anna": "the first of them", " Borys": "the second of them"}, "a person's name"),
        ({"Anna": "the first of them", "Bo=rys": "the second of them"}, "a person's name"),
        ({"Anna": "the first of them", "": "the second of them"}, "a person's name"),
        ({"Anna": "the first of them", "B" * 65: "the second of them"}, "a person's name"),
    ],
)
def test_people_and_passphrases_that_will_not_do_are_refused(passphrases: dict[str, str], words: str) -> None:
    with pytest.raises(RootFileError, match=words):
        create(ROOT, passphrases, cost=CHEAP)


def change(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    *parents, last = path
    place = document
    for each in parents:
        place = place[each]
    place[last] = value
    return document


def flip(text: str) -> str:
    return format(int(text[0], 16) ^ 1, "x") + text[1:]


DOCUMENT = json.loads(FILE.encode())


@pytest.mark.parametrize(
    "path",
    [
        ("root_public_key",),
        ("people", "Anna", "salt"),
        ("pairs", 0, "nonce"),
        ("pairs", 0, "sealed_seed"),
    ],
)
def test_a_file_that_was_tampered_with_does_not_open(path: tuple[Any, ...]) -> None:
    document = json.loads(FILE.encode())
    place: Any = document
    for each in path:
        place = place[each]
    tampered = RootFile.decode(json.dumps(change(document, path, flip(place))).encode())
    with pytest.raises(RootFileError, match="or the file was changed"):
        open_root(tampered, of("Anna", "Borys"))


def test_seals_of_other_pairs_cannot_be_put_in_the_place_of_ones_own() -> None:
    seals = dict(FILE.seals)
    seals["Anna", "Borys"] = seals["Anna", "Vira"]
    with pytest.raises(RootFileError, match="or the file was changed"):
        open_root(dataclasses.replace(FILE, seals=seals), of("Anna", "Borys"))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "only version 1"),
        (("format",), "something else", "damaged"),
        (("argon2id", "operations"), 17, "out of bounds"),
        (("argon2id", "operations"), True, "damaged"),
        (("argon2id", "memory_bytes"), 2**40, "out of bounds"),
        (("argon2id", "memory_bytes"), 0, "out of bounds"),
        (("people", "Anna", "salt"), "00", "damaged"),
        (("people", "Anna"), None, "damaged"),
        (("people", "Dana"), {"salt": "00" * 16}, "damaged"),
        (("people",), {"Anna": {"salt": "00" * 16}}, "2 to 8 people"),
        (("pairs", 0, "people"), ["Borys", "Anna"], "damaged"),
        (("pairs", 0, "people"), ["Anna"], "damaged"),
        (("pairs", 0, "people"), ["Anna", "Vira"], "damaged"),
        (("pairs", 0, "nonce"), "zz", "damaged"),
        (("pairs",), {}, "damaged"),
        (("root_public_key",), 5, "damaged"),
    ],
)
def test_what_is_no_root_file_is_refused_when_it_is_read(path: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(RootFileError, match=words):
        RootFile.decode(json.dumps(change(json.loads(FILE.encode()), path, value)).encode())


@given(st.binary(max_size=300))
def test_other_files_are_refused_without_their_content(content: bytes) -> None:
    with pytest.raises(RootFileError, match="damaged"):
        RootFile.decode(content)


def test_a_file_without_end_and_one_nested_without_end_are_refused() -> None:
    for content in (FILE.encode() + b" " * rootfile.FILE_BYTES_MAX, b"[" * 60_000):
        with pytest.raises(RootFileError, match="damaged"):
            RootFile.decode(content)


def test_neither_the_file_nor_any_repr_shows_the_seed_or_a_passphrase() -> None:
    opened = open_root(FILE, of("Anna", "Borys"))
    shown = f"{FILE!r} {opened!r} {FILE.encode().decode()}"
    assert ROOT.seed.hex() not in shown
    assert not any(passphrase in shown for passphrase in PASSPHRASES.values())


def test_two_roots_with_the_same_passphrases_share_nothing() -> None:
    other = create(ROOT, PASSPHRASES, cost=CHEAP)
    assert set(other.salts.values()).isdisjoint(FILE.salts.values())
    assert {each.ciphertext for each in other.seals.values()}.isdisjoint({each.ciphertext for each in FILE.seals.values()})


def test_what_is_written_for_real_costs_a_gibibyte_a_guess() -> None:
    assert (rootfile.SENSITIVE.operations, rootfile.SENSITIVE.memory_bytes) == (4, 1024**3)
