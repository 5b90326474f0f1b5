-- $1 app, $2 platform, $3 detail, $4 now. Resumes a lane, also one that was not paused: its breaker closes.
INSERT INTO lane_states (app_id, platform, paused, detail, resumed_at, updated_at) VALUES ($1, $2, false, $3, $4, $4)
ON CONFLICT (app_id, platform) DO UPDATE
SET paused = false, detail = excluded.detail, resumed_at = excluded.resumed_at, updated_at = excluded.updated_at
