"""TLS of the public listeners, and a certificate authority for one machine."""

from __future__ import annotations

import ipaddress
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sealpushd.platform.clock import Clock, SystemClock

CA_LIFETIME = timedelta(days=3650)
# Browsers and Apple's stacks refuse server certificates that live longer than 398 days.
CERTIFICATE_LIFETIME = timedelta(days=397)
RENEW_BEFORE = timedelta(days=30)


def server_credentials(certificate: Path, private_key: Path) -> grpc.ServerCredentials:
    """Credentials of a listener; raises ValueError that names the file that cannot be used."""
    try:
        chain, key = certificate.read_bytes(), private_key.read_bytes()
        x509.load_pem_x509_certificates(chain)
        load_pem_private_key(key, None)
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{certificate} and {private_key} are no TLS certificate and key (PEM): {e}") from e
    return grpc.ssl_server_credentials([(key, chain)])


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


_AUTHORITY_NAME: Final = "Sealpush local authority"


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _in_force(certificate: x509.Certificate, now: datetime) -> bool:
    """Not one that begins in the future, because the clock was ahead when it was made: nobody would take it until then."""
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


class LocalAuthority:
    """A certificate authority in a folder: `ca.pem` to hand out, `ca.key` to keep. Made when it is not there, or not in force."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self.certificate_path = folder / "ca.pem"
        self._folder = folder
        key_path = folder / "ca.key"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The key is written before the certificate: a certificate on disk always has its key.
        now = self._clock.now()
        present = x509.load_pem_x509_certificate(self.certificate_path.read_bytes()) if self.certificate_path.exists() else None
        if present is not None and _in_force(present, now):
            loaded = load_pem_private_key(key_path.read_bytes(), None)
            if not isinstance(loaded, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key_path} is not the key of this authority; remove {folder} to make a new one")
            self._key = loaded
            self._certificate = present
            return
        self.certificate_path.unlink(missing_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name(_AUTHORITY_NAME)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_secret(key_path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        write_secret(self.certificate_path, self._certificate.public_bytes(Encoding.PEM))

    def _issued(self, certificate: x509.Certificate) -> bool:
        # By the signature: an authority that was made anew has the same name.
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files for a server on this machine's loopback, made where they are not there.

        A certificate of this authority is made anew when it ends within 30 days, for the same key. One that somebody else issued stays,
        whatever it says. Raises ValueError for a certificate without its key, and for a key that no certificate can have.
        """
        certificate_path, key_path = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        now = self._clock.now()
        if certificate_path.exists():
            if not key_path.exists():
                raise ValueError(f"{certificate_path} has no {key_path.name} beside it")
            present = x509.load_pem_x509_certificate(certificate_path.read_bytes())
            is_ours = present.issuer == _name(_AUTHORITY_NAME)
            if not is_ours or (self._issued(present) and _in_force(present, now) and present.not_valid_after_utc - now > RENEW_BEFORE):
                return certificate_path, key_path
        key = self._key_of(key_path)
        names = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(f"sealpush {name}"))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + CERTIFICATE_LIFETIME)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        write_secret(certificate_path, certificate.public_bytes(Encoding.PEM))
        return certificate_path, key_path

    @staticmethod
    def _key_of(path: Path) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
        """The private key in a file, made when there is none. Raises ValueError when it is no key for a certificate."""
        if not path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            return key
        loaded = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise ValueError(f"{path} holds a key of a kind that TLS clients do not take")
        return loaded
