-- What was given up for push until an operator requeues it: `open_deliveries.quarantined`. Few rows or none: all that other writes pay is a
-- look at the condition, half a percent. Without the index, counting and requeuing them would read the whole table.
CREATE INDEX open_deliveries_quarantined ON open_deliveries (app_id, platform, device_id, message_id) WHERE quarantined;
