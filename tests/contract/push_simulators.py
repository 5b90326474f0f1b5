"""What the tests of the simulated push services share: certificates for any name, raw clients, and a way for unmodified libraries."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Certificates:
    """A throw-away authority and a server certificate of it."""

    ca: Path
    certificate: Path
    private_key: Path

    @classmethod
    def make(cls, folder: Path, names: Sequence[str]) -> Certificates:
        """Files for a server that has these names."""
        now = datetime.now(UTC)
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

        def certificate(subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, is_ca: bool) -> x509.CertificateBuilder:
            return (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(ca_name)
                .public_key(public_key)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(hours=1))
                .not_valid_after(now + timedelta(days=2))
                .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            )

        server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test server")])
        server = certificate(server_name, key.public_key(), is_ca=False)
        server = server.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        server = server.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        authority = certificate(ca_name, ca_key.public_key(), is_ca=True)
        found = cls(folder / "ca.pem", folder / "server.pem", folder / "server.key")
        found.ca.write_bytes(authority.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
        found.certificate.write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
        found.private_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return found

    def trust(self) -> ssl.SSLContext:
        """What a client of these servers trusts."""
        return ssl.create_default_context(cafile=str(self.ca))


def raw_client(certificates: Certificates, port: int, *, http2: bool) -> httpx.AsyncClient:
    """A client of another make than the provider's, over the HTTP that is asked for."""
    return httpx.AsyncClient(
        base_url=f"https://localhost:{port}", verify=certificates.trust(), http1=not http2, http2=http2, trust_env=False, timeout=5
    )


@asynccontextmanager
async def connect_proxy(routes: Mapping[str, int]) -> AsyncIterator[str]:
    """A CONNECT proxy that leads these hosts (port 443) to ports of loopback, and no others; gives its URL."""
    tunnels: set[asyncio.Task[None]] = set()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        host, _, port = asked.split(b" ")[1].decode("ascii").partition(":")
        if host not in routes or port != "443":
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            writer.close()
            return
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", routes[host])
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        finally:
            writer.close()
            inner_writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tunnels.add(task)
        task.add_done_callback(tunnels.discard)
        with suppress(ConnectionError, asyncio.CancelledError):
            await tunnel(reader, writer)

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    finally:
        proxy.close()
        for task in list(tunnels):
            task.cancel()
        await asyncio.gather(*tunnels, return_exceptions=True)
        await proxy.wait_closed()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()
