-- $1 device id. The installation as it is, if it was ever registered.
SELECT subscriber_id, app_id, state, identity_public_key, registration_id FROM installations WHERE device_id = $1
