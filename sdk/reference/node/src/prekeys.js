// Prekeys: what a device signs for each, what a sender checks before it seals to one, and which of two it takes.

import { concat, exactly, TIME_MS_MAX, u16, u32, u64, u8, utf8 } from './bytes.js';
import { KeyRefused } from './errors.js';
import { verify } from './signing.js';
import { SUITE_X25519, suiteOf } from './suites.js';

export const Kind = Object.freeze({ SIGNED: 1, ONE_TIME: 2 });

const LIFETIME_MS_MAX = 90 * 24 * 3600 * 1000;
const SKEW_MS = 5 * 60 * 1000;

/** The bytes that a device's identity signs for one prekey. Throws RangeError for a field out of bounds. */
export function prekeyStatement({ suite, prekeyId, kind, publicKey, createdMs, expiresMs }, deviceId, minSuite) {
  if (suite < 1 || minSuite < 1) throw new RangeError('suites are 1 to 255');
  if (kind !== Kind.SIGNED && kind !== Kind.ONE_TIME) throw new RangeError('the kind of a prekey is 1 or 2');
  if (!(createdMs < expiresMs && expiresMs <= TIME_MS_MAX)) throw new RangeError('a prekey must expire after it is created');
  if (publicKey.length < 1 || publicKey.length > 2048) throw new RangeError('a public key has 1 to 2048 bytes');
  return concat(
    utf8('SPE1-prekey'),
    exactly(16, deviceId, 'deviceId'),
    u8(minSuite),
    u8(suite),
    u32(prekeyId),
    u8(kind),
    u64(createdMs),
    u64(expiresMs),
    u16(publicKey.length),
    publicKey,
  );
}

/** Return only if this prekey may be sealed to now; else throw KeyRefused. */
export function verifyPrekey(prekey, { deviceId, identityPublicKey, minSuite = SUITE_X25519, nowMs }) {
  let statement;
  try {
    statement = prekeyStatement(prekey, deviceId, minSuite);
  } catch (cause) {
    throw new KeyRefused(`the prekey is malformed: ${cause.message}`);
  }
  if (prekey.suite < minSuite) throw new KeyRefused('the prekey is weaker than its device allows');
  if (suiteOf(prekey.suite)?.isUsable(prekey.publicKey) === false) throw new KeyRefused('the prekey is not a usable key of its suite');
  if (prekey.expiresMs - prekey.createdMs > LIFETIME_MS_MAX) throw new KeyRefused('the prekey lives longer than 90 days');
  if (prekey.createdMs > nowMs + SKEW_MS) throw new KeyRefused('the prekey is from the future; compare the clocks');
  if (prekey.expiresMs <= nowMs) throw new KeyRefused('the prekey has expired');
  if (!verify(identityPublicKey, statement, prekey.signature)) throw new KeyRefused('the prekey is not signed by this device');
}

/**
 * The verified prekey of a device to seal to: `{ deviceId, identityPublicKey, minSuite, signedPrekey, oneTimePrekey }`.
 *
 * An expired one-time prekey counts as none. A bad one refuses the device: falling back to the signed prekey would let
 * whoever stands in between take away forward secrecy.
 */
export function choosePrekey(device, nowMs) {
  const oneTime = device.oneTimePrekey;
  if (oneTime && oneTime.kind !== Kind.ONE_TIME) throw new KeyRefused('the one-time prekey is of another kind');
  const takesOneTime = oneTime && oneTime.expiresMs > nowMs;
  const prekey = takesOneTime ? oneTime : device.signedPrekey;
  if (!takesOneTime && prekey.kind !== Kind.SIGNED) throw new KeyRefused('the signed prekey is of another kind');
  const { deviceId, identityPublicKey, minSuite } = device;
  verifyPrekey(prekey, { deviceId, identityPublicKey, minSuite, nowMs });
  if (!suiteOf(prekey.suite)) throw new KeyRefused(`suite ${prekey.suite} is not known to this code`);
  return prekey;
}

/** A device as `seal()` takes it, after its prekey was verified. */
export function recipientOf(device, nowMs) {
  const { suite, prekeyId, kind, publicKey } = choosePrekey(device, nowMs);
  return { deviceId: device.deviceId, suite, prekeyId, kind, publicKey };
}
