-- $1 device id that becomes primary, $2 its subscriber, $3 its app.
UPDATE installations SET is_primary = false WHERE subscriber_id = $2 AND app_id = $3 AND is_primary AND device_id <> $1
