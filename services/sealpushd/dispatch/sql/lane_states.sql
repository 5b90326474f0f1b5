-- What operators decided about lanes.
SELECT app_id, platform, paused, detail, resumed_at FROM lane_states
