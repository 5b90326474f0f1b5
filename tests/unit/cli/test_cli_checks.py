from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sealpushd.cli.checks import check_certificate, check_health, check_port, judge_partitions
from sealpushd.platform.tls import CERTIFICATE_LIFETIME, LocalAuthority
from sealpushd.up.ports import Ports

NOW = datetime(2026, 11, 18, 12, tzinfo=UTC)  # in ISO week 47


@pytest.mark.parametrize(("last", "ok"), [("2026w52", True), ("2026w49", True), ("2026w48", False), ("2026w30", False), (None, False)])
def test_partitions_must_reach_two_weeks_ahead(last: str | None, ok: bool) -> None:
    check = judge_partitions(last, NOW)
    assert check.ok is ok
    assert ok or "sealpush db" in check.text


def test_a_certificate_near_its_end_is_reported(tmp_path: Path) -> None:
    certificate, _ = LocalAuthority(tmp_path).issue("services")
    now = datetime.now(UTC)
    assert check_certificate(certificate, now).ok
    assert not check_certificate(certificate, now + CERTIFICATE_LIFETIME - timedelta(days=5)).ok
    assert not check_certificate(tmp_path / "nothing.pem", now).ok


async def test_a_service_that_is_not_there_fails_its_checks(free_base_port: int) -> None:
    port = Ports(free_base_port).of("fetch", "mesh")
    log = Path("data/log/fetch.log")
    for check in (await check_health("fetch", f"127.0.0.1:{port}", log), await check_port("fetch", "127.0.0.1", port, log)):
        assert not check.ok
        assert str(log) in check.text
