"""What dispatch keeps: what operators decided about lanes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sealpushd.platform.db import Database, load_sql

_FOLDER: Final = Path(__file__).parent

LANE_STATES: Final = load_sql(_FOLDER, "lane_states")
PAUSE_LANE: Final = load_sql(_FOLDER, "pause_lane")
RESUME_LANE: Final = load_sql(_FOLDER, "resume_lane")


@dataclass(frozen=True, slots=True)
class LaneRow:
    """A lane that was paused or resumed at least once."""

    app_id: str
    platform: int
    paused: bool
    detail: str
    resumed_at: datetime | None


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
