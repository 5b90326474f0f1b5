"""What dispatch keeps: what operators decided about lanes, and the credentials of the push services."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from sealpushd.platform.db import Database, load_sql

_FOLDER: Final = Path(__file__).parent

LANE_STATES: Final = load_sql(_FOLDER, "lane_states")
PAUSE_LANE: Final = load_sql(_FOLDER, "pause_lane")
RESUME_LANE: Final = load_sql(_FOLDER, "resume_lane")
PROVIDERS: Final = load_sql(_FOLDER, "providers")
ADD_PROVIDER: Final = load_sql(_FOLDER, "add_provider")
CHANGE_PROVIDER: Final = load_sql(_FOLDER, "change_provider")
REMOVE_PROVIDER: Final = load_sql(_FOLDER, "remove_provider")


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A lane that was paused or resumed at least once."""

    app_id: str
    platform: int
    paused: bool
    detail: str
    resumed_at: datetime | None


@dataclass(frozen=True, slots=True)
class StoredCredential:
    """A lane's credential as stored. Its secret is `secret`, encrypted, or the content of the file named `secret_file`."""

    provider_id: bytes
    app_id: str
    platform: int
    kind: str
    settings: Mapping[str, str]
    secret: bytes | None = field(repr=False)
    secret_file: str
    version: int
    expires_at: datetime | None
    created_at: datetime
    updated_at: datetime


class LaneStore:
    """Statements over the schema `dispatch`. Raises StoreUnavailable; nothing else that a caller must handle."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def lane_states(self) -> list[LaneRow]:
        rows = await self._db.fetch("lane_states", LANE_STATES)
        return [LaneRow(row["app_id"], row["platform"], row["paused"], row["detail"], row["resumed_at"]) for row in rows]

    async def pause(self, app_id: str, platform: int, detail: str, now: datetime) -> None:
        await self._db.execute("pause_lane", PAUSE_LANE, app_id, platform, detail, now)

    async def resume(self, app_id: str, platform: int, detail: str, now: datetime) -> None:
        await self._db.execute("resume_lane", RESUME_LANE, app_id, platform, detail, now)

    async def credentials(self) -> list[StoredCredential]:
        """All that are in use."""
        return [
            StoredCredential(
                row["provider_id"],
                row["app_id"],
                row["platform"],
                row["kind"],
                json.loads(row["settings"]),
                row["secret"],
                row["secret_file"] or "",
                row["version"],
                row["expires_at"],
                row["created_at"],
                row["updated_at"],
            )
            for row in await self._db.fetch("providers", PROVIDERS)
        ]

    async def add(self, new: StoredCredential) -> bool:
        """False: the lane has a credential already."""
        row = await self._db.fetch_one(
            "add_provider",
            ADD_PROVIDER,
            new.provider_id,
            new.app_id,
            new.platform,
            new.kind,
            json.dumps(dict(new.settings)),
            new.secret,
            new.secret_file or None,
            new.expires_at,
            new.created_at,
        )
        return row is not None

    async def change(self, changed: StoredCredential) -> bool:
        """Replace what was read with `changed.version`. False: somebody changed or removed it meanwhile."""
        row = await self._db.fetch_one(
            "change_provider",
            CHANGE_PROVIDER,
            changed.provider_id,
            changed.version,
            changed.kind,
            json.dumps(dict(changed.settings)),
            changed.secret,
            changed.secret_file or None,
            changed.expires_at,
            changed.updated_at,
        )
        return row is not None

    async def remove(self, app_id: str, platform: int, now: datetime) -> bool:
        """False: there was none."""
        return await self._db.fetch_one("remove_provider", REMOVE_PROVIDER, app_id, platform, now) is not None
