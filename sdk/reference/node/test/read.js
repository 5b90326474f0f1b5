// Vector files say fields in snake_case and bytes in hex; the code says camelCase and Uint8Array.

import { readFileSync } from 'node:fs';

const folder = new URL('../../../../tests/vectors/', import.meta.url);

export const load = (name) => JSON.parse(readFileSync(new URL(`${name}.json`, folder), 'utf8'));

export const bytes = (text) => Uint8Array.from(Buffer.from(text, 'hex'));

export const contentOf = ({ hex, repeat, length }) => (hex === undefined ? new Uint8Array(length).fill(bytes(repeat)[0]) : bytes(hex));

const BYTES = new Set(
  'device_id identity_public_key public_key private_key content_id envelope_digest sender_id sender_key_id recipient_ref signature challenge registration_id message_id body by_device_id added_head'.split(' '),
);
const BIG = new Set(['serial', 'counter', 'at_ms']);

/** An object of a vector file, with fields turned into what the code takes, lists and nested objects too. */
export function fields(value) {
  if (Array.isArray(value)) return value.map(fields);
  if (value === null || typeof value !== 'object') return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, each]) => {
      const key = name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase());
      if (BYTES.has(name)) return [key, bytes(each)];
      return [key, BIG.has(name) ? BigInt(each) : fields(each)];
    }),
  );
}

/** Randomness that was decided before, its bytes in order. */
export function drawnFrom(data) {
  let position = 0;
  return (length) => data.subarray(position, (position += length));
}
