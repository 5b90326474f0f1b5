"""The vault: only the same key and context open what was stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealpushd.platform.vault import FileKeyWrapper, Vault, VaultError

VAULT, OTHER = Vault(b"a" * 32, b"b" * 32), Vault(b"c" * 32, b"d" * 32)


@given(st.binary(max_size=100), st.text(max_size=20))
def test_what_was_encrypted_is_decrypted_and_never_stored_alike(plain: bytes, context: str) -> None:
    stored = VAULT.encrypt(plain, context)
    assert VAULT.decrypt(stored, context) == plain
    assert VAULT.encrypt(plain, context) != stored
    assert len(plain) < 8 or plain not in stored


def test_another_key_or_context_opens_nothing() -> None:
    stored = VAULT.encrypt(b"+380501234567", "phone")
    for vault, context in ((OTHER, "phone"), (VAULT, "token"), (VAULT, "")):
        with pytest.raises(VaultError) as caught:
            vault.decrypt(stored, context)
        assert "380501234567" not in str(caught.value)


@given(st.integers(min_value=0), st.integers(1, 255))
def test_a_changed_byte_anywhere_is_refused(position: int, change: int) -> None:
    stored = bytearray(VAULT.encrypt(b"a push token", "token"))
    stored[position % len(stored)] ^= change
    with pytest.raises(VaultError):
        VAULT.decrypt(bytes(stored), "token")


@given(st.integers(0, 52))
def test_a_stored_value_cut_short_is_refused(length: int) -> None:
    with pytest.raises(VaultError):
        VAULT.decrypt(VAULT.encrypt(b"a push token", "token")[:length], "token")


def test_a_lookup_finds_the_same_value_in_the_same_context_of_the_same_vault_only() -> None:
    assert VAULT.lookup(b"value", "phone") == VAULT.lookup(b"value", "phone")
    # The label's length goes first: it cannot run over into the value.
    found = {
        VAULT.lookup(b"value", "phone"),
        OTHER.lookup(b"value", "phone"),
        VAULT.lookup(b"value", "phon"),
        VAULT.lookup(b"evalue", "phon"),
        VAULT.lookup(b"Value", "phone"),
    }
    assert len(found) == 5
    assert all(len(each) == 32 for each in found)


async def test_a_wrapped_key_opens_with_its_file_and_context_only(tmp_path: Path) -> None:
    (tmp_path / "one.key").write_text("11" * 32 + "\n")
    (tmp_path / "two.key").write_text("22" * 32)
    one, two = FileKeyWrapper(tmp_path / "one.key"), FileKeyWrapper(tmp_path / "two.key")
    wrapped = await one.wrap(b"k" * 32, b"context")
    assert await one.unwrap(wrapped, b"context") == b"k" * 32
    for wrapper, context in ((two, b"context"), (one, b"other")):
        with pytest.raises(VaultError):
            await wrapper.unwrap(wrapped, context)


@pytest.mark.parametrize("content", [b"", b"11" * 31, b"11" * 33, b"zz" * 32, b"\xff" * 64])
def test_a_file_that_holds_no_key_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vault.key").write_bytes(content)
    with pytest.raises(VaultError, match=r"vault\.key") as caught:
        FileKeyWrapper(tmp_path / "vault.key")
    assert "11" * 8 not in str(caught.value)
