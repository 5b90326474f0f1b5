// Revocation lists: what the root took back before its time. Signed by the root that apps pin.

import { demand, hex, Reader, utf8 } from './bytes.js';
import { RevocationsRefused } from './errors.js';
import { signedBody } from './signing.js';

export const REVOCATIONS_MAX = 4096;

const KIND_ENTRIES = 1;
const KIND_KEY = 2;

/**
 * The list in `blob`, if the root signed it; else RevocationsRefused: ignore it then, and go on with the list you have.
 *
 * Keep the blob with the highest `serial`, and never go back to a lower one.
 */
export function verifyRevocations(rootPublicKey, blob) {
  const body = signedBody(rootPublicKey, 'SPC1-revoked', blob);
  if (!body) throw new RevocationsRefused('the list is not signed by the pinned root');
  try {
    return readList(body);
  } catch (cause) {
    throw new RevocationsRefused(`the list is malformed: ${cause.message}`);
  }
}

function readList(body) {
  const reader = new Reader(body);
  demand(hex(reader.take(4)) === hex(utf8('SPRL')), 'not a revocation list');
  demand(reader.u8() === 1, 'a version that is not known');
  const list = { serial: reader.u64(), issuedMs: reader.time(), items: [] };
  demand(list.serial >= 1n, 'a serial of 0');
  const count = reader.u16();
  demand(count <= REVOCATIONS_MAX, 'too many items');
  let before = '';
  for (let index = 0; index < count; index++) {
    const item = readItem(reader);
    // In hex, text rises as the bytes do. The serial is no part: a sender stands in a list once.
    const subject = hex(item.senderId ?? item.publicKey);
    demand(before < `${item.kind} ${subject}`, 'items that do not rise');
    before = `${item.kind} ${subject}`;
    list.items.push(item);
  }
  demand(reader.left === 0, 'bytes after the end');
  return list;
}

function readItem(reader) {
  const kind = reader.u8();
  if (kind === KIND_ENTRIES) return { kind, senderId: reader.take(16), serial: reader.u64() };
  demand(kind === KIND_KEY, 'a kind that is not known');
  return { kind, publicKey: reader.take(32) };
}

/** Whether a verified list revokes this verified entry, a sender's or the platform's, as a whole. */
export const revokesEntry = (list, entry) =>
  list.items.some((item) => item.kind === KIND_ENTRIES && hex(item.senderId) === hex(entry.senderId) && entry.serial <= item.serial);

/** Whether a verified list revokes this content-signing key, in whatever entry it stands. */
export const revokesKey = (list, publicKey) => list.items.some((item) => item.kind === KIND_KEY && hex(item.publicKey) === hex(publicKey));
