"""Every secret of an installation, made once, in files that only their owner reads.

    keys/<service>.key      Ed25519 key of each service and of the operator, 64 hex digits
    trust.json              the public halves, for all
    vault.key               wraps the data keys in PostgreSQL
    platform.key            the platform seals with it when a sender does not seal by itself
    role-passwords.json     PostgreSQL's login roles
    tls/                    a certificate authority of this machine, and the services' certificates
    demo/…                  for the show only, see `up.demo`
    complete                says that all of the above were there once

One machine holds them all here, because one machine is one trust domain. In a mesh each process gets its own and no other:
`sealpush prepare` makes them as files to hand out. The platform's root key, which the demo keeps beside them, belongs offline.

What is missing before `complete` was written is made; what is missing afterwards was lost, and is never made anew: a new vault
key would turn every stored secret into noise. What is there is never replaced, except a certificate of this machine's own authority that
ends soon: a second key in trust.json, or a certificate from elsewhere, is somebody's work.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sealpush.keys import RootKey
from sealpushd.platform.access import OPERATOR
from sealpushd.platform.migrate import MAINTENANCE_ROLE, SERVICES
from sealpushd.platform.tls import LocalAuthority, write_secret
from sealpushd.platform.tokens import ServiceKey, TokenVerifier
from sealpushd.up.errors import UpError

_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Secrets:
    """Where the secrets are, and those that the supervisor itself uses."""

    folder: Path
    trust: Path
    vault_key: Path
    platform_key: Path
    ca: Path
    role_passwords: dict[str, str]

    def service_key(self, service: str) -> Path:
        return self.folder / "keys" / f"{service}.key"

    def certificate(self, name: str) -> tuple[Path, Path]:
        """Certificate and private key of a listener."""
        return self.folder / "tls" / f"{name}.pem", self.folder / "tls" / f"{name}.key"


def prepare(folder: Path, certificates: Sequence[str]) -> Secrets:
    """Make what is missing and renew certificates of this machine that end soon. Only one process at a time may prepare a folder.

    Killed half-way it leaves whole files, and the next run makes the rest. Raises UpError when something is damaged or was lost.
    """
    try:
        return _prepare(folder, certificates)
    except OSError as e:
        raise UpError(f"cannot use {e.filename or folder}: {e.strerror}. Choose another --data-dir.") from e


def _prepare(folder: Path, certificates: Sequence[str]) -> Secrets:
    for part in (folder, folder / "keys", folder / "tls"):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    complete = folder / "complete"
    once = _Once(made_before=complete.exists())

    own = {}
    for name in (*SERVICES, OPERATOR):
        path = folder / "keys" / f"{name}.key"
        once.make(path, _random_key, _check_key)
        own[name] = _load_service_key(name, path).public_key.hex()
    once.make(folder / "vault.key", _random_key, _check_key)
    once.make(folder / "platform.key", _random_key, _check_key)
    once.make(folder / "role-passwords.json", _random_passwords, _check_passwords)
    _trust(folder / "trust.json", own)
    try:
        authority = LocalAuthority(folder / "tls")
        for name in certificates:
            authority.issue(name)
    except (ValueError, FileNotFoundError) as e:
        # Certificates protect nothing that is stored: new ones are as good.
        raise UpError(f"{folder / 'tls'} is damaged ({e}). Remove it: new certificates are made at the next start.") from e
    if not once.made_before:
        write_secret(complete, b"1\n")
        _sync(folder)
    return Secrets(
        folder=folder,
        trust=folder / "trust.json",
        vault_key=folder / "vault.key",
        platform_key=folder / "platform.key",
        ca=authority.certificate_path,
        role_passwords=json.loads((folder / "role-passwords.json").read_text()),
    )


def _trust(path: Path, own: dict[str, str]) -> None:
    """See that the file trusts these keys. Others in it stay: while a key is rotated there are two."""
    trusted: dict[str, list[str]] = {}
    if path.exists():
        try:
            TokenVerifier.load(path)
        except ValueError as e:
            raise UpError(f"{e}. Restore it from a back-up, or remove it: it is made anew from keys/.") from e
        trusted = json.loads(path.read_text())
    missing = {name: key for name, key in own.items() if key not in trusted.get(name, ())}
    if missing:
        for name, key in missing.items():
            trusted[name] = [*trusted.get(name, ()), key]
        write_secret(path, json.dumps(trusted, indent=1).encode())


class _Once:
    """Makes files that were never made before, and refuses to replace those that were."""

    def __init__(self, *, made_before: bool) -> None:
        self.made_before = made_before

    def make(self, path: Path, content: Callable[[], bytes], check: Callable[[bytes], None]) -> None:
        if not path.exists():
            if self.made_before:
                raise UpError(
                    f"{path} is missing. Restore it from a back-up of the data directory; what it protects cannot be read without."
                )
            write_secret(path, content())
            _sync(path.parent)
        try:
            check(path.read_bytes())
        except ValueError as e:
            raise UpError(f"{path} is damaged ({e}). Restore it from a back-up of the data directory.") from e


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_key() -> bytes:
    return secrets.token_hex(_KEY_BYTES).encode() + b"\n"


def _check_key(content: bytes) -> None:
    # The error names no content.
    try:
        key = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ValueError("it does not hold 64 hex digits")


def _load_service_key(name: str, path: Path) -> ServiceKey:
    try:
        return ServiceKey.load(name, path)
    except ValueError as e:
        raise UpError(str(e)) from e


def _random_passwords() -> bytes:
    roles = (*(f"{service}_app" for service in SERVICES), MAINTENANCE_ROLE)
    # Hex needs no quoting in a URL.
    return json.dumps({role: secrets.token_hex(24) for role in roles}, indent=1).encode()


def _check_passwords(content: bytes) -> None:
    document = json.loads(content)
    if not isinstance(document, dict) or not {*(f"{service}_app" for service in SERVICES), MAINTENANCE_ROLE} <= document.keys():
        raise ValueError("it does not name every role")


def load_root(path: Path) -> RootKey:
    """A platform root key in a file, made when it is not there. For one machine: a real one never lies on a server."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(path, _random_key())
    try:
        _check_key(path.read_bytes())
    except ValueError as e:
        raise UpError(f"{path} is damaged ({e}). Restore it from a back-up of the data directory.") from e
    return RootKey.from_seed(bytes.fromhex(path.read_text().strip()))
