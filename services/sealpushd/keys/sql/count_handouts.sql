-- How many one-time prekeys of devices a sender got lately. In: $1 device ids, $2 sender, $3 count handouts that end after this, and not
-- after $4: those were made by a clock that was ahead, and would count from now on and until a day after the present has come so far.
SELECT device_id, count(*) AS handed_out FROM handouts
WHERE device_id = ANY ($1::uuid[]) AND sender_id = $2 AND expires_at > $3::timestamptz AND expires_at <= $4::timestamptz
GROUP BY device_id
