-- How many one-time prekeys of devices a sender got lately. In: $1 device ids, $2 sender, $3 count handouts that end after this.
SELECT device_id, count(*) AS handed_out FROM handouts
WHERE device_id = ANY ($1::uuid[]) AND sender_id = $2 AND expires_at > $3::timestamptz
GROUP BY device_id
