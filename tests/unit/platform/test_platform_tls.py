"""The local authority: what it issues is served and trusted, and what another issued is not kept."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from sealpushd.platform.tls import CERTIFICATE_LIFETIME, LocalAuthority, server_credentials, write_secret


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    authority = LocalAuthority(tmp_path / "tls")
    _, key = authority.issue("fetch")
    for path in (key, tmp_path / "tls" / "ca.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list((tmp_path / "tls").glob(".*"))


def test_an_authority_and_its_certificates_are_kept(tmp_path: Path) -> None:
    first = LocalAuthority(tmp_path)
    issued = [path.read_bytes() for path in first.issue("fetch")]
    assert [path.read_bytes() for path in LocalAuthority(tmp_path).issue("fetch")] == issued


def test_a_certificate_lives_no_longer_than_phones_accept_and_is_no_authority(tmp_path: Path) -> None:
    certificate = x509.load_pem_x509_certificate(LocalAuthority(tmp_path).issue("fetch")[0].read_bytes())
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 398
    assert CERTIFICATE_LIFETIME.days < 398
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_certificate_of_a_lost_authority_is_made_anew(tmp_path: Path) -> None:
    LocalAuthority(tmp_path).issue("fetch")
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).unlink()
    anew = LocalAuthority(tmp_path)
    certificate = x509.load_pem_x509_certificate(anew.issue("fetch")[0].read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(anew.certificate_path.read_bytes()))


async def check(channel: grpc.aio.Channel) -> health_pb2.HealthCheckResponse:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer: health_pb2.HealthCheckResponse = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
    return answer


async def test_a_client_that_trusts_the_authority_reaches_a_listener_and_another_does_not(tmp_path: Path) -> None:
    authority, stranger = LocalAuthority(tmp_path / "a"), LocalAuthority(tmp_path / "b")
    server = grpc.aio.server()
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(*authority.issue("fetch")))
    await server.start()
    try:
        for name in ("127.0.0.1", "localhost"):
            trusting = grpc.ssl_channel_credentials(authority.certificate_path.read_bytes())
            async with grpc.aio.secure_channel(f"{name}:{port}", trusting) as channel:
                answer = await check(channel)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        distrusting = grpc.ssl_channel_credentials(stranger.certificate_path.read_bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", distrusting) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(None)


def test_files_that_are_no_certificate_and_key_are_named(tmp_path: Path) -> None:
    certificate, key = LocalAuthority(tmp_path).issue("fetch")
    for wrong in ((key, key), (certificate, certificate), (certificate, tmp_path / "none")):
        with pytest.raises(ValueError, match="no TLS certificate and key"):
            server_credentials(*wrong)


def test_a_secret_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"first, and longer")
    write_secret(path, b"second")
    assert path.read_bytes() == b"second"
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]
