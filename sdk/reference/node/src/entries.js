// Sender entries: who may speak as a sender, with which keys, and who may seal for it. Signed by the root that apps pin.

import { demand, hex, Reader, same, utf8 } from './bytes.js';
import { EntryRefused, EnvelopeRefused } from './errors.js';
import { contentKeyId, isUsablePublicKey, signedBody } from './signing.js';

export const Role = Object.freeze({ SENDER: 1, PLATFORM: 2 });
export const Mode = Object.freeze({ END_TO_END: 1, SERVER: 2 });

const NAME_BYTES_MAX = 128;
const KEYS_MAX = 16;

/** The entry in `blob`, if the root signed it, `nowMs` lies in its time and it has this role; else EntryRefused. */
export function verifyEntry(rootPublicKey, blob, nowMs, role = Role.SENDER) {
  const body = signedBody(rootPublicKey, 'SPC1-entry', blob);
  if (!body) throw new EntryRefused('the entry is not signed by the pinned root');
  let entry;
  try {
    entry = readEntry(body);
  } catch (cause) {
    throw new EntryRefused(`the entry is malformed: ${cause.message}`);
  }
  if (entry.role !== role) throw new EntryRefused('the entry certifies another role');
  if (nowMs < entry.notBeforeMs || nowMs >= entry.notAfterMs) throw new EntryRefused('the entry is outside its time');
  return entry;
}

function readEntry(body) {
  const reader = new Reader(body);
  demand(hex(reader.take(4)) === hex(utf8('SPCE')), 'not an entry');
  const entry = { version: reader.u8(), role: reader.u8(), modes: reader.u8(), senderId: reader.take(16), serial: reader.u64() };
  Object.assign(entry, readWindow(reader));
  entry.displayName = readName(reader.take(reader.u8()));
  const count = reader.u8();
  entry.keys = [];
  for (let index = 0; index < count; index++) entry.keys.push({ publicKey: reader.take(32), ...readWindow(reader) });
  demand(reader.left === 0, 'bytes after the end');
  demand(entry.version === 1, 'a version that is not known');
  demand(entry.role === Role.SENDER || entry.role === Role.PLATFORM, 'a role that is not known');
  demand(entry.modes >= 1 && entry.modes <= 3, 'modes that are not known');
  demand(entry.role === Role.SENDER || entry.modes === Mode.SERVER, 'the platform only has the mode server');
  const needsKey = entry.role === Role.PLATFORM || (entry.modes & Mode.END_TO_END) !== 0;
  demand(count <= KEYS_MAX && (count > 0 || !needsKey), 'too few or too many keys');
  demand(entry.keys.every((key) => isUsablePublicKey(key.publicKey)), 'a key that is no usable Ed25519 key');
  demand(new Set(entry.keys.map((key) => hex(key.publicKey))).size === count, 'a key twice');
  return entry;
}

function readWindow(reader) {
  const window = { notBeforeMs: reader.time(), notAfterMs: reader.time() };
  demand(window.notBeforeMs < window.notAfterMs, 'a time that ends before it begins');
  return window;
}

/** Only a name that shows as it is written: nothing invisible, no change of direction, no space but U+0020 inside. */
function readName(bytes) {
  demand(bytes.length >= 1 && bytes.length <= NAME_BYTES_MAX, 'a name of 1 to 128 bytes');
  // Without ignoreBOM the decoder would silently drop a byte order mark.
  const name = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  // U+2800 is a symbol without a mark on it; the others that fonts draw as nothing have the property.
  demand(!/[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800]/u.test(name.replaceAll(' ', '')), 'a name with characters that do not show');
  demand(!name.startsWith(' ') && !name.endsWith(' '), 'a name with spaces around it');
  demand(name === name.normalize('NFC'), 'a name that is not in normal form C');
  return name;
}

/**
 * The key that must have signed an envelope with this header; else EnvelopeRefused. Both entries were verified, the
 * platform's (or null) with its own role.
 */
export function contentKeyOf(header, senderEntry, platformEntry) {
  if (senderEntry.role !== Role.SENDER || !same(senderEntry.senderId, header.senderId)) throw new EnvelopeRefused();
  const mode = header.serverSealed ? Mode.SERVER : Mode.END_TO_END;
  const holder = header.serverSealed ? platformEntry : senderEntry;
  if ((senderEntry.modes & mode) === 0 || !holder) throw new EnvelopeRefused();
  if (header.serverSealed && holder.role !== Role.PLATFORM) throw new EnvelopeRefused();
  const key = holder.keys.find(
    ({ publicKey, notBeforeMs, notAfterMs }) =>
      same(contentKeyId(publicKey), header.senderKeyId) && notBeforeMs <= header.createdMs && header.createdMs < notAfterMs,
  );
  if (!key) throw new EnvelopeRefused();
  return key.publicKey;
}
