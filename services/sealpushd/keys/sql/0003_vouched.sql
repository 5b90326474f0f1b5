-- Devices vouch for each other from now on. What the log says of each device in a list stands beside it, for senders to be told.
ALTER TABLE devices ADD COLUMN recovered boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN devices.recovered IS
    'Of a device in a list: it came after the first one of its log, and none that is trusted has vouched for it.';

UPDATE devices d SET recovered = true
WHERE d.removed_at IS NULL AND (
    SELECT get_byte(l.entry, 5) & 1 = 1 FROM device_log l
    WHERE l.subscriber_id = d.subscriber_id AND get_byte(l.entry, 4) = 1 AND substring(l.entry FROM 7 FOR 16) = uuid_send(d.device_id)
    ORDER BY l.seq DESC LIMIT 1
);

COMMENT ON COLUMN device_log.entry IS 'Its layout stands in sealpush/devicelog.py.';
