// What a device signs with its identity, besides prekeys. Only the signature travels; both sides build these bytes.

import { concat, exactly, sha256, u16, u64, u8, utf8 } from './bytes.js';

export const Outcome = Object.freeze({ DELIVERED: 1, UNDELIVERED: 2, BLOCKED: 3, READ: 4 });

const statement = (tag, ...fields) => concat(utf8(tag), u8(1), ...fields);

/** Bytes behind their length in `width` (u8 or u16), of at least `min` and at most `max`. */
function counted(width, bytes, min, max, name) {
  if (bytes.length < min || bytes.length > max) throw new RangeError(`${name} must be ${min} to ${max} bytes`);
  return concat(width(bytes.length), bytes);
}

/** The answer to `GetChallenge`, for `Authenticate`. */
export function challengeStatement({ deviceId, challenge }) {
  return statement('SPP1-challenge', exactly(16, deviceId, 'deviceId'), counted(u16, challenge, 16, 512, 'challenge'));
}

/** The proof of `ConfirmRegistration`. An app id has 1 to 64 characters of a-z 0-9 - . */
export function registrationStatement({ registrationId, identityPublicKey, appId }) {
  if (!/^[a-z0-9.-]{1,64}$/.test(appId)) throw new RangeError('appId must be 1 to 64 characters of a-z 0-9 - .');
  return statement(
    'SPP1-register',
    exactly(16, registrationId, 'registrationId'),
    exactly(32, identityPublicKey, 'identityPublicKey'),
    counted(u16, utf8(appId), 1, 64, 'appId'),
  );
}

/** In place of an envelope's digest, where what came could not be read so far: with UNDELIVERED only. */
export const NO_DIGEST = new Uint8Array(32);

/** What became of a message, that is of the envelope with this digest (`digestOf`). `atMs` is a number or a BigInt. */
export function acknowledgementStatement({ messageId, contentId, envelopeDigest, deviceId, outcome, reasonCode, atMs }) {
  if (!Object.values(Outcome).includes(outcome)) throw new RangeError('outcome is 1 to 4');
  return statement(
    'SPP1-ack',
    exactly(16, messageId, 'messageId'),
    exactly(16, contentId, 'contentId'),
    exactly(32, envelopeDigest, 'envelopeDigest'),
    exactly(16, deviceId, 'deviceId'),
    u8(outcome),
    u16(reasonCode),
    u64(atMs),
  );
}

/** One change: `body` are the change bytes exactly as sent, `counter` (number or BigInt) is 1 or more and rises. */
export function changeStatement({ deviceId, counter, method, body }) {
  if (BigInt(counter) < 1n) throw new RangeError('counter begins at 1');
  if (!/^[!-~]+$/.test(method)) throw new RangeError('method must be printable ASCII without spaces');
  return statement(
    'SPP1-change',
    exactly(16, deviceId, 'deviceId'),
    u64(counter),
    counted(u8, utf8(method), 1, 100, 'method'),
    sha256(body),
  );
}

/** The vouch of one device for another: `addedHead` is the head of the device log right after the entry that added it. */
export function vouchStatement({ deviceId, identityPublicKey, byDeviceId, addedHead }) {
  return statement(
    'SPP1-vouch',
    exactly(16, deviceId, 'deviceId'),
    exactly(32, identityPublicKey, 'identityPublicKey'),
    exactly(16, byDeviceId, 'byDeviceId'),
    exactly(32, addedHead, 'addedHead'),
  );
}
