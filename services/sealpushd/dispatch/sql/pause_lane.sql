-- $1 app, $2 platform, $3 detail, $4 now. Pauses a lane; one that is paused already stays so.
INSERT INTO lane_states (app_id, platform, paused, detail, updated_at) VALUES ($1, $2, true, $3, $4)
ON CONFLICT (app_id, platform) DO UPDATE SET paused = true, detail = excluded.detail, updated_at = excluded.updated_at
WHERE NOT lane_states.paused
