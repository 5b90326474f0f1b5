-- The default topic of an app stands with its push credential, in dispatch.
ALTER TABLE apps DROP COLUMN apns_topic;
