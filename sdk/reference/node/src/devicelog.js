// The log of a person's devices: a hash chain that a phone follows, and what it may say. Fingerprints for people to compare.

import { concat, exactly, hex, Reader, same, sha256, sha512, u64, u8, utf8 } from './bytes.js';
import { DeviceLogBroken } from './errors.js';
import { vouchStatement } from './proofs.js';
import { verify } from './signing.js';

export const EntryKind = Object.freeze({ ADDED: 1, REMOVED: 2, VOUCHED: 3 });

const MAGIC = 'SPL1';
const RECOVERED = 1;
const HASHES = 5200;

/** The bytes of `{ kind, recovered, deviceId, identityPublicKey, timeMs, byDeviceId, signature }`; the last two for VOUCHED only. */
export function encodeEntry({ kind, recovered, deviceId, identityPublicKey, timeMs, byDeviceId, signature }) {
  const entry = concat(
    utf8(MAGIC),
    u8(kind),
    u8(recovered ? RECOVERED : 0),
    exactly(16, deviceId, 'deviceId'),
    exactly(32, identityPublicKey, 'identityPublicKey'),
    u64(timeMs),
  );
  if (kind !== EntryKind.VOUCHED) return entry;
  return concat(entry, exactly(16, byDeviceId, 'byDeviceId'), exactly(64, signature, 'signature'));
}

/** What exactly these bytes say; throws RangeError. */
export function decodeEntry(bytes) {
  const reader = new Reader(bytes);
  const magic = reader.take(4);
  const kind = reader.u8();
  const flags = reader.u8();
  if (!same(magic, utf8(MAGIC)) || !Object.values(EntryKind).includes(kind) || flags & ~RECOVERED) {
    throw new RangeError('not an entry of a device log that this code knows');
  }
  const entry = { kind, recovered: flags === RECOVERED, deviceId: reader.take(16), identityPublicKey: reader.take(32), timeMs: reader.time() };
  if (kind === EntryKind.VOUCHED) Object.assign(entry, { byDeviceId: reader.take(16), signature: reader.take(64) });
  if (reader.left) throw new RangeError('bytes after the end of an entry');
  return entry;
}

/** A log without entries: `{ seq, head, devices }`, the devices of the list by id in hex, oldest first. */
export function startLog(subscriberId) {
  return Object.freeze({ seq: 0, head: sha256(utf8('SPL1-start'), exactly(16, subscriberId, 'subscriberId')), devices: new Map() });
}

/** The log with one more entry; throws DeviceLogBroken for one that it cannot go on with. */
export function nextLog(log, bytes) {
  let entry;
  try {
    entry = decodeEntry(bytes);
  } catch (cause) {
    throw new DeviceLogBroken(`an entry cannot be read: ${cause.message}`);
  }
  const head = sha256(utf8('SPL1-log'), log.head, bytes);
  const devices = new Map(log.devices);
  const name = hex(entry.deviceId);
  const listed = devices.get(name);
  if (entry.kind === EntryKind.ADDED) {
    if (listed || entry.recovered !== log.seq > 0) throw new DeviceLogBroken('a device that is there, or hides that nobody vouches for it');
    const { deviceId, identityPublicKey, timeMs, recovered } = entry;
    devices.set(name, { deviceId, identityPublicKey, addedMs: timeMs, addedHead: head, vouched: !recovered });
  } else {
    if (!listed || entry.recovered || !same(listed.identityPublicKey, entry.identityPublicKey)) {
      throw new DeviceLogBroken('a device that is not there');
    }
    if (entry.kind === EntryKind.REMOVED) devices.delete(name);
    else {
      checkVouch(log, listed, entry);
      devices.set(name, { ...listed, vouched: true });
    }
  }
  return Object.freeze({ seq: log.seq + 1, head, devices });
}

/** Only a device of the list that is trusted itself vouches, for one that is not, by a signature over this very addition. */
function checkVouch(log, listed, { byDeviceId, signature }) {
  const by = log.devices.get(hex(byDeviceId));
  if (listed.vouched || !by || !by.vouched) throw new DeviceLogBroken('a vouch that is not needed, or of a device that cannot vouch');
  if (!verify(by.identityPublicKey, vouchStatement({ ...listed, byDeviceId }), signature)) {
    throw new DeviceLogBroken('a vouch that is not signed by the device that it names');
  }
}

/** 60 digits, in 12 groups of 5, for these `{ deviceId, identityPublicKey }`; their order does not matter. Takes milliseconds. */
export function fingerprint(devices) {
  const pairs = devices.map(({ deviceId, identityPublicKey }) =>
    concat(exactly(16, deviceId, 'deviceId'), exactly(32, identityPublicKey, 'identityPublicKey')),
  );
  if (!pairs.length || new Set(pairs.map((pair) => hex(pair.subarray(0, 16)))).size !== pairs.length) {
    throw new RangeError('a fingerprint is of at least one device, and of each device once');
  }
  let digest = sha512(utf8('SPF1'), u8(1), ...pairs.sort(Buffer.compare));
  for (let hashes = 1; hashes < HASHES; hashes++) digest = sha512(digest);
  const groups = Array.from({ length: 12 }, (_, index) => Buffer.from(digest).readUIntBE(5 * index, 5) % 100_000);
  return groups.map((group) => String(group).padStart(5, '0')).join(' ');
}
