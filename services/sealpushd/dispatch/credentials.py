"""The lanes' credentials: read from the store and from mounted files, taken over without a restart, tested before they are stored."""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import Gauge

from sealpush.ids import uuid7
from sealpushd.dispatch.lanes import LaneKey, LaneSet
from sealpushd.dispatch.makers import Config, CredentialError, PushServices, make, receipt_key_of
from sealpushd.dispatch.providers.base import Probed, Provider, accepts
from sealpushd.dispatch.receipts import ReceiptKey
from sealpushd.dispatch.store import LaneStore, StoredCredential
from sealpushd.platform.clock import Clock
from sealpushd.platform.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidRequest, NotFound
from sealpushd.platform.metrics import platform_label
from sealpushd.platform.vault import Vault, VaultError

log = structlog.get_logger()

# Somebody waits for the verdict, in a call that lasts 10 s at the most, and there may be two steps.
PROBE_STEP: Final = timedelta(seconds=4)
# A changed file that was refused is tried again: perhaps the console of the vendor comes after the file.
REFUSED_RETRY: Final = timedelta(minutes=1)
SECRET_BYTES_MAX: Final = 64 * 1024
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9._\-]{0,127}")

_EXPIRES = Gauge(
    "sealpush_credential_expires_timestamp_seconds", "When the credential of a lane ends; +Inf: nobody said.", ["app", "platform"]
)
_USABLE = Gauge("sealpush_credential_usable", "1: the stored credential of a lane is in use; 0: it cannot be used.", ["app", "platform"])


@dataclass(frozen=True, slots=True)
class NewCredential:
    """What an operator puts. None and empty: as before, when it replaces one."""

    app_id: str
    platform: int
    kind: str
    values: Mapping[str, str]
    secret: bytes | None = field(repr=False)
    secret_file: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A stored credential as operators see it: a fingerprint instead of the secret, and why it is not in use."""

    stored: StoredCredential
    fingerprint: str
    problem: str


# What a provider was made from (row, its version, its file): when it changes, another one is made. A row that was removed and put anew
# has the old one's version and another id.
_Source = tuple[bytes, int, tuple[int, int, int] | None]


class Credentials:
    """Keeps the lanes' providers in step with what is stored. `refresh` often; `aclose` at the end."""

    def __init__(self, store: LaneStore, vault: Vault, lanes: LaneSet, services: PushServices, folder: Path | None, clock: Clock) -> None:
        """`folder` holds mounted credential files; None: there are none."""
        self._store = store
        self._vault = vault
        self._lanes = lanes
        self._services = services
        self._asking = replace(services, http=replace(services.http, total_timeout=PROBE_STEP, connect_timeout=PROBE_STEP))
        self._folder = folder
        self._clock = clock
        self._sources: dict[LaneKey, _Source] = {}
        # What a push service refused, and when, by the steady clock, it is asked again.
        self._refused: dict[LaneKey, tuple[_Source, float]] = {}
        self._receipt_keys: dict[LaneKey, ReceiptKey] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> None:
        """Take over what changed, of credentials and of what operators decided about lanes. Raises StoreUnavailable.

        A credential that cannot be used leaves the one before in use.
        """
        async with self._refreshing:
            stored = {(row.app_id, row.platform): row for row in await self._store.credentials()}
            states = await self._store.lane_states()
            changed = False
            for key, row in stored.items():
                changed = await self._take_over(key, row) or changed
            for lane in [lane for lane in self._lanes if lane.key not in stored]:
                self._close_later(self._lanes.remove(lane))
                for kept in (self._sources, self._refused, self._receipt_keys):
                    kept.pop(lane.key, None)
                for gauge in (_EXPIRES, _USABLE):
                    gauge.remove(*_labels(lane.key))
                log.info("a credential was removed", app=lane.app_id, platform=lane.platform)
            # At once, so that a lane that is paused never pushes because it is new here.
            self._lanes.apply(states)
            if changed:
                self._lanes.on_change()

    async def put(self, new: NewCredential, *, replace_present: bool, untested: bool) -> tuple[Provider, Sequence[Probed]]:
        """Store a credential and use it at once; gives what the push service thinks of it, see `test`.

        Raises InvalidRequest when it cannot be used, AlreadyExists or NotFound, FailedPrecondition when the push service
        refuses it or cannot be asked (not with `untested`), Aborted when somebody else changed it meanwhile.
        """
        present = await self._find(new.app_id, new.platform)
        if replace_present and present is None:
            raise NotFound("the lane has no credential yet: `sealpush providers add`")
        if not replace_present and present is not None:
            raise AlreadyExists("the lane has a credential already: `sealpush providers rotate`")
        now = self._clock.now()
        row = self._merge(present, new, now)
        secret = new.secret
        try:
            config = Config(row.kind, row.settings, secret if secret is not None else self._read(row))
            provider = make(config, self._asking, self._clock)
        except CredentialError as e:
            raise InvalidRequest(str(e), field=e.field) from e
        try:
            probes = [] if untested else await provider.probe()
            if not untested and not accepts(probes):
                raise FailedPrecondition(_refusal(provider, probes))
        finally:
            await provider.aclose()
        if secret is not None:
            row = replace(row, secret=self._vault.encrypt(secret, _context(row)))
        if present is None:
            if not await self._store.add(row):
                raise AlreadyExists("the lane has a credential already: `sealpush providers rotate`")
        elif not await self._store.change(row):
            raise Aborted("somebody else changed the credential at the same time: look at `sealpush providers list` and try again")
        await self.refresh()
        return provider, probes

    async def test(self, app_id: str, platform: int) -> tuple[Provider, Sequence[Probed]]:
        """What the push service thinks of a stored credential. Raises NotFound, FailedPrecondition when it cannot be used.

        The provider is closed already; it still gives advice.
        """
        row = await self._find(app_id, platform)
        if row is None:
            raise NotFound("the lane has no credential; `sealpush providers list` shows those there are")
        try:
            secret = self._read(row)
            provider = make(Config(row.kind, row.settings, secret), self._asking, self._clock)
        except CredentialError as e:
            raise FailedPrecondition(str(e)) from e
        try:
            return provider, await provider.probe()
        finally:
            await provider.aclose()

    async def remove(self, app_id: str, platform: int) -> None:
        """Raises NotFound."""
        # Looked for first: what no row can have is no value for a statement.
        if await self._find(app_id, platform) is None or not await self._store.remove(app_id, platform, self._clock.now()):
            raise NotFound("the lane has no credential; `sealpush providers list` shows those there are")
        await self.refresh()

    async def list(self) -> list[Shown]:
        shown = []
        for row in await self._store.credentials():
            try:
                secret = self._read(row)
                fingerprint = self._vault.lookup(secret, "providers.fingerprint").hex()[:12]
            except CredentialError:
                fingerprint = ""
            lane = self._lanes.get(row.app_id, row.platform)
            shown.append(Shown(row, fingerprint, lane.problem if lane is not None else ""))
        return shown

    def receipt_key(self, app_id: str) -> tuple[LaneKey, ReceiptKey] | None:
        """The lane of the app whose push service sends receipts, and what signs them; None: none are expected."""
        return next(((key, receipt_key) for key, receipt_key in self._receipt_keys.items() if key[0] == app_id), None)

    async def aclose(self) -> None:
        """Close every provider at once. Idempotent."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        providers = [lane.lose("the service ends") for lane in self._lanes]
        await asyncio.gather(*(provider.aclose() for provider in providers if provider is not None))

    # Taking over

    async def _take_over(self, key: LaneKey, row: StoredCredential) -> bool:
        """Use the credential if it is another one than before; returns whether it is."""
        lane = self._lanes.put(row.app_id, row.platform)
        labels = _labels(key)
        _EXPIRES.labels(*labels).set(row.expires_at.timestamp() if row.expires_at is not None else float("inf"))
        try:
            # A look at the file, before it is read: what changes in between is seen the next time.
            source: _Source = (row.provider_id, row.version, self._stat(row))
            in_use = self._sources.get(key)
            if in_use == source:
                # Also when a file that was gone, or another one, is the old one again.
                lane.problem = ""
                _USABLE.labels(*labels).set(1)
                return False
            refused, until = self._refused.get(key, (None, 0.0))
            if refused == source and self._clock.monotonic() < until:
                return False
            config = Config(row.kind, row.settings, self._read(row))
            if in_use is not None and in_use[:2] == source[:2] and lane.provider is not None:
                # Nobody tried it: a mounted file was replaced.
                await self._try(config, key, source)
            provider = make(config, self._services, self._clock)
        except CredentialError as e:
            if lane.problem != str(e):
                log.error("a stored credential cannot be used", app=row.app_id, platform=row.platform, problem=str(e))
            if lane.provider is None:
                lane.lose(str(e))
            else:
                lane.problem = str(e)
            _USABLE.labels(*labels).set(0)
            return False
        self._sources[key] = source
        self._refused.pop(key, None)
        self._receipt_keys.pop(key, None)
        if (receipt_key := receipt_key_of(config)) is not None:
            self._receipt_keys[key] = receipt_key
        self._close_later(lane.use(provider))
        _USABLE.labels(*labels).set(1)
        log.info("a credential is in use", app=row.app_id, platform=row.platform, push_service=row.kind, version=row.version)
        return True

    async def _try(self, config: Config, key: LaneKey, source: _Source) -> None:
        """Raises CredentialError when the push service refuses a credential; one that cannot be asked is taken."""
        provider = make(config, self._asking, self._clock)
        try:
            probes = await provider.probe()
        finally:
            await provider.aclose()
        if not accepts(probes) and any(probed.is_good is False for probed in probes):
            self._refused[key] = source, self._clock.monotonic() + REFUSED_RETRY.total_seconds()
            raise CredentialError(f"{config.kind} does not take the new file. {_told(provider, probes)}")

    def _close_later(self, provider: Provider | None) -> None:
        """Close it once the sends that are under way have ended."""
        if provider is None:
            return

        async def close() -> None:
            try:
                await asyncio.sleep(self._services.http.total_timeout.total_seconds() + 1)
            finally:
                await provider.aclose()

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # Secrets

    def _merge(self, present: StoredCredential | None, new: NewCredential, now: datetime) -> StoredCredential:
        """What is to be stored; a new secret is not in it yet."""
        if new.secret is not None and len(new.secret) > SECRET_BYTES_MAX:
            raise InvalidRequest(f"a credential has at most {SECRET_BYTES_MAX} bytes", field="secret")
        if new.expires_at is not None and new.expires_at <= now:
            raise InvalidRequest("the credential has ended already", field="expires_at")
        if present is None:
            if new.secret is None and not new.secret_file:
                raise InvalidRequest("a new credential needs its secret, or the file it is in", field="credential")
            return StoredCredential(
                uuid7(), new.app_id, new.platform, new.kind, dict(new.values), None, new.secret_file, 1, new.expires_at, now, now
            )
        if new.kind and new.kind != present.kind:
            raise InvalidRequest(
                f"the lane pushes with {present.kind}: remove its credential before you add one of {new.kind}", field="push_service"
            )
        has_new_secret = new.secret is not None or bool(new.secret_file)
        return replace(
            present,
            settings=dict(present.settings) | dict(new.values),
            secret=None if has_new_secret else present.secret,
            secret_file=new.secret_file if has_new_secret else present.secret_file,
            # The end of the old secret says nothing of the new one.
            expires_at=new.expires_at if new.expires_at is not None or has_new_secret else present.expires_at,
            updated_at=now,
        )

    def _read(self, row: StoredCredential) -> bytes:
        """The secret. Raises CredentialError."""
        if row.secret is not None:
            try:
                return self._vault.decrypt(row.secret, _context(row))
            except VaultError as e:
                raise CredentialError(f"{e}; put it anew with `sealpush providers rotate`") from e
        self._stat(row)
        path = self._path(row.secret_file)
        try:
            with path.open("rb") as file:
                secret = file.read(SECRET_BYTES_MAX + 1)
        except OSError as e:
            raise _unreadable(path, e) from e
        if len(secret) > SECRET_BYTES_MAX:
            raise CredentialError(f"the credential file {path} has more than {SECRET_BYTES_MAX} bytes", field="secret_file")
        return secret

    def _stat(self, row: StoredCredential) -> tuple[int, int, int] | None:
        """What changes when the credential's file does; None: it lies in the store."""
        if row.secret is not None:
            return None
        path = self._path(row.secret_file)
        try:
            seen = path.stat()
        except OSError as e:
            raise _unreadable(path, e) from e
        if not stat.S_ISREG(seen.st_mode) and not stat.S_ISDIR(seen.st_mode):
            # Whoever opens a pipe waits for its other end, and everything else with him.
            raise CredentialError(f"{path} is no file", field="secret_file")
        return seen.st_mtime_ns, seen.st_size, seen.st_ino

    def _path(self, name: str) -> Path:
        if not _FILE_NAME.fullmatch(name):
            raise CredentialError(
                "secret_file is the name of a file in the folder SEALPUSH_CREDENTIALS: letters, digits, dots, - and _", field="secret_file"
            )
        if self._folder is None:
            raise CredentialError(
                "the credential is a mounted file, but SEALPUSH_CREDENTIALS names no folder: set it for every dispatch", field="secret_file"
            )
        return self._folder / name

    async def _find(self, app_id: str, platform: int) -> StoredCredential | None:
        return next((row for row in await self._store.credentials() if (row.app_id, row.platform) == (app_id, platform)), None)


def _unreadable(path: Path, error: OSError) -> CredentialError:
    return CredentialError(
        f"the credential file {path} cannot be read ({error.strerror}): mount it where every dispatch runs", field="secret_file"
    )


def _context(row: StoredCredential) -> str:
    return f"providers.secret {row.provider_id.hex()}"


def _labels(key: LaneKey) -> tuple[str, str]:
    return key[0], platform_label(key[1])


def _refusal(provider: Provider, probes: Sequence[Probed]) -> str:
    told = _told(provider, probes)
    return f"nothing was stored, because {provider.name} does not take the credential. {told}. To store it nevertheless: --untested"


def _told(provider: Provider, probes: Sequence[Probed]) -> str:
    """What became of the probes that were not good, and what to do about each."""
    return "; ".join(
        f"{probed.what}: {'refused' if probed.is_good is False else 'cannot be asked'} ({probed.outcome.reason}), "
        f"{provider.advise(probed.outcome.reason)}"
        for probed in probes
        if not probed.is_good
    )
