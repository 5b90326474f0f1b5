// Sealed envelopes. The layout is in docs/device-protocol.md, "The envelope"; names of fields are the ones used there.

import { randomBytes } from 'node:crypto';

import { concat, exactly, hex, Reader, same, sha256, sha512, TIME_MS_MAX, u16, u32, u64, u8, utf8 } from './bytes.js';
import { contentKeyOf, Role, verifyEntry } from './entries.js';
import { EnvelopeRefused, EntryRefused, KeyRefused } from './errors.js';
import { Kind } from './prekeys.js';
import { revokesEntry, revokesKey } from './revocations.js';
import { contentKeyId, sodium, verify } from './signing.js';
import { SUITE_X25519, suiteOf } from './suites.js';

export const CONTENT_BYTES_MAX = 65_535;
export const DEVICES_MAX = 512;
const FLAG_SERVER_SEALED = 1;
const RISE_SKEW_MS = 6 * 60 * 1000; // a sealer's clock may be ahead
const LIFETIME_MS_MAX = 28 * 24 * 3600 * 1000;
const BUCKET_MIN = 256;
const BUCKET_MAX = 65_536;
const HEADER_BYTES = 94;
export const HEAD_BYTES = HEADER_BYTES + 32;
const NONCE_BYTES = 24;
const TAG_BYTES = 16;
const SIGNATURE_BYTES = 64;
const WRAPPED_BYTES_MAX = 2048; // of a suite that is not known here
const ENVELOPE_BYTES_MAX =
  HEADER_BYTES + 32 + 2 + DEVICES_MAX * (24 + WRAPPED_BYTES_MAX) + 4 + NONCE_BYTES + BUCKET_MAX + TAG_BYTES + SIGNATURE_BYTES;

// --- the header ------------------------------------------------------------------------------------------------------

function checkTimes({ createdMs, expiresMs }) {
  if (!(createdMs >= 0 && createdMs < expiresMs && expiresMs <= TIME_MS_MAX)) {
    throw new RangeError('expiresMs must be later than createdMs, both Unix milliseconds');
  }
  if (expiresMs - createdMs > LIFETIME_MS_MAX) throw new RangeError('a message lives 28 days at most');
}

function encodeHeader({ contentId, senderId, senderKeyId, recipientRef, createdMs, expiresMs, flags = 0 }) {
  checkTimes({ createdMs, expiresMs });
  if (flags !== 0 && flags !== FLAG_SERVER_SEALED) throw new RangeError('only bit 0 of flags is known');
  return concat(
    utf8('SPE1'),
    u8(1), // the suite of the content
    u8(flags),
    exactly(16, contentId, 'contentId'),
    exactly(16, senderId, 'senderId'),
    exactly(8, senderKeyId, 'senderKeyId'),
    exactly(32, recipientRef, 'recipientRef'),
    u64(createdMs),
    u64(expiresMs),
  );
}

function readHeader(reader) {
  if (hex(reader.take(4)) !== hex(utf8('SPE1'))) throw new RangeError('not an envelope');
  if (reader.u8() !== 1) throw new RangeError('a content suite that is not known');
  const flags = reader.u8();
  if (flags & ~FLAG_SERVER_SEALED) throw new RangeError('a flag that is not known');
  const header = {
    flags,
    serverSealed: (flags & FLAG_SERVER_SEALED) !== 0,
    contentId: reader.take(16),
    senderId: reader.take(16),
    senderKeyId: reader.take(8),
    recipientRef: reader.take(32),
    createdMs: reader.time(),
    expiresMs: reader.time(),
  };
  checkTimes(header);
  return header;
}

// --- form ------------------------------------------------------------------------------------------------------------

/**
 * The parts of exactly these bytes, every length within its bound; says nothing yet about who signed them.
 * Throws EnvelopeRefused.
 */
export function parse(bytes) {
  try {
    if (bytes.length > ENVELOPE_BYTES_MAX) throw new RangeError('too long');
    return readEnvelope(bytes);
  } catch (cause) {
    if (cause instanceof RangeError) throw new EnvelopeRefused();
    throw cause;
  }
}

function readEnvelope(bytes) {
  const reader = new Reader(bytes);
  const header = readHeader(reader);
  const commit = reader.take(32);
  const count = reader.u16();
  if (count > DEVICES_MAX) throw new RangeError('too many stanzas');
  const stanzas = Array.from({ length: count }, () => readStanza(reader));
  if (new Set(stanzas.map((stanza) => hex(stanza.deviceId))).size !== count) throw new RangeError('a device twice');
  const contentStart = reader.position;
  const sealedBytes = reader.u32();
  const paddedBytes = sealedBytes - NONCE_BYTES - TAG_BYTES;
  if (!isBucket(paddedBytes)) throw new RangeError('a length that no padding has');
  const nonce = reader.take(NONCE_BYTES);
  const ciphertext = reader.take(paddedBytes + TAG_BYTES);
  const content = bytes.subarray(contentStart, reader.position);
  const signature = reader.take(SIGNATURE_BYTES);
  if (reader.left !== 0) throw new RangeError('bytes after the end');
  return { header, headerBytes: bytes.subarray(0, HEADER_BYTES), commit, stanzas, content, nonce, ciphertext, signature };
}

function readStanza(reader) {
  const start = { deviceId: reader.take(16), suite: reader.u8(), prekeyId: reader.u32(), kind: reader.u8() };
  const length = reader.u16();
  const suite = suiteOf(start.suite);
  const fits = suite ? length === suite.wrappedBytes : length >= 1 && length <= WRAPPED_BYTES_MAX;
  if (start.suite === 0 || (start.kind !== Kind.SIGNED && start.kind !== Kind.ONE_TIME) || !fits) throw new RangeError('a bad stanza');
  return { ...start, wrapped: reader.take(length) };
}

const encodeStanza = ({ deviceId, suite, prekeyId, kind, wrapped }) =>
  concat(deviceId, u8(suite), u32(prekeyId), u8(kind), u16(wrapped.length), wrapped);

/** The bytes of parsed or sealed parts: `encode(parse(bytes))` gives `bytes` again. */
export function encode({ headerBytes, commit, stanzas, content, signature }) {
  return concat(headerBytes, commit, u16(stanzas.length), ...stanzas.map(encodeStanza), content, signature);
}

/** The same envelope with one device's stanza only, as that device gets it. */
export function forDevice(envelope, deviceId) {
  const stanza = stanzaOf(envelope, deviceId);
  if (!stanza) throw new EnvelopeRefused();
  return encode({ ...envelope, stanzas: [stanza] });
}

const stanzaOf = ({ stanzas }, deviceId) => stanzas.find((stanza) => same(stanza.deviceId, deviceId));

// --- padding ---------------------------------------------------------------------------------------------------------

const isBucket = (length) => length >= BUCKET_MIN && length <= BUCKET_MAX && Number.isInteger(Math.log2(length));

function pad(content) {
  if (content.length > CONTENT_BYTES_MAX) throw new RangeError(`content may have ${CONTENT_BYTES_MAX} bytes; send a link to the rest`);
  let bucket = BUCKET_MIN;
  while (bucket < content.length + 1) bucket *= 2; // one byte more, for the mark
  const padded = new Uint8Array(bucket);
  padded.set(content);
  padded[content.length] = 0x80;
  return padded;
}

function unpad(padded) {
  let end = padded.length - 1;
  while (end >= 0 && padded[end] === 0) end--;
  if (end < 0 || padded[end] !== 0x80) throw new EnvelopeRefused();
  // Content that a smaller bucket would have held has been padded by somebody else's rules.
  if (padded.length > BUCKET_MIN && end + 1 <= padded.length / 2) throw new EnvelopeRefused();
  return padded.subarray(0, end);
}

// --- the three hashes that hold it together --------------------------------------------------------------------------

const commitTo = (contentKey, headerBytes) => sha256(utf8('SPE1-commit'), contentKey, headerBytes);

const bindingOf = (headerBytes, { deviceId, prekeyId, kind }) => sha256(headerBytes, deviceId, u32(prekeyId), u8(kind));

const signedBytes = ({ headerBytes, commit, content }) => concat(utf8('SPE1-sig'), sha512(headerBytes, commit, sha512(content)));

// --- what is left without the content ---------------------------------------------------------------------------------

/** Head, SHA-512 of the content and signature of a parsed envelope: all that the signature covers. */
export const evidenceOf = ({ headerBytes, commit, content, signature }) => concat(headerBytes, commit, sha512(content), signature);

/** The digest of a parsed envelope, which names it in acknowledgements; the same for each device, as stanzas do not count. */
export const digestOf = (envelope) => sha256(evidenceOf(envelope));

/** The header at the beginning of these bytes. Throws EnvelopeRefused. */
export function headerOf(bytes) {
  try {
    return readHeader(new Reader(bytes));
  } catch (cause) {
    if (cause instanceof RangeError) throw new EnvelopeRefused();
    throw cause;
  }
}

// --- sealing ---------------------------------------------------------------------------------------------------------

/**
 * The content sealed to the recipients (see `recipientOf`) and signed: the bytes of an envelope.
 *
 * `header`: contentId, senderId, recipientRef, createdMs, expiresMs; `senderKeyId` follows from `signer` when left out.
 * `signer`: a `signingKey()` whose public key stands in the sender's entry. Keep the result and send it again on a
 * retry: sealing twice makes two messages. `random` is for test vectors only.
 *
 * Throws RangeError for arguments that cannot be right, KeyRefused for a key that cannot be sealed to.
 */
export function seal({ content, header, recipients, signer, random }) {
  const keyId = contentKeyId(signer.publicKey);
  if (header.senderKeyId && !same(header.senderKeyId, keyId)) throw new RangeError('the header names another key than the signer');
  if (recipients.length > DEVICES_MAX) throw new RangeError(`an envelope holds ${DEVICES_MAX} devices at most`);
  for (const { deviceId } of recipients) exactly(16, deviceId, 'deviceId');
  if (new Set(recipients.map(({ deviceId }) => hex(deviceId))).size !== recipients.length) throw new RangeError('a device twice');
  const padded = pad(content);
  const headerBytes = encodeHeader({ ...header, senderKeyId: keyId });

  const draw = random ?? ((length) => new Uint8Array(randomBytes(length)));
  const contentKey = draw(32);
  const nonce = draw(NONCE_BYTES);
  const ciphertext = sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(padded, headerBytes, null, nonce, contentKey);
  const parts = {
    headerBytes,
    commit: commitTo(contentKey, headerBytes),
    content: concat(u32(NONCE_BYTES + ciphertext.length), nonce, ciphertext),
  };
  const signature = signer.sign(signedBytes(parts));
  const stanzas = recipients.map((recipient) => ({ ...recipient, wrapped: wrap(contentKey, headerBytes, recipient, random) }));
  return encode({ ...parts, stanzas, signature });
}

function wrap(contentKey, headerBytes, recipient, random) {
  const suite = suiteOf(recipient.suite);
  if (!suite) throw new KeyRefused(`suite ${recipient.suite} is not known to this code`);
  if (!suite.isUsable(recipient.publicKey)) throw new KeyRefused('the prekey is not a usable key of its suite');
  return suite.wrap(concat(contentKey, bindingOf(headerBytes, recipient)), recipient.publicKey, random);
}

// --- opening ---------------------------------------------------------------------------------------------------------

/**
 * The content, after all checks of a device in their order. Throws EnvelopeRefused, always the same.
 *
 * `device`: deviceId, `prekeys`, a list of `{ suite, prekeyId, kind, publicKey, privateKey }`, `minSuite`, and when it was raised to that,
 * `raisedAtMs` by the server's time (left out: before anything that still lives).
 * `trust`: rootPublicKey, as blobs senderEntry and platformEntry (each null if none), and `revocations`, the newest list that
 * `verifyRevocations` gave (null if none).
 * `nowMs` is the server's time, `skewMs` how far it may be off; `seen(senderId, contentId)` tells repetitions. An
 * application treats those two more finely: it holds a message from the future, and acknowledges a repeated one again if
 * its `digestOf` is that of the one it has.
 *
 * `onStage(name)` is told before each check, for tests. Never let it reach a log or the network.
 */
export function open(bytes, { device, trust, nowMs, skewMs, seen = () => false, onStage = () => {} }) {
  onStage('parse');
  const envelope = parse(bytes);
  const { header } = envelope;
  onStage('stanza');
  ownStanza(envelope, device);
  onStage('times');
  if (header.createdMs > nowMs + skewMs || nowMs >= header.expiresMs + skewMs) throw new EnvelopeRefused();
  onStage('seen');
  if (seen(header.senderId, header.contentId)) throw new EnvelopeRefused();
  onStage('entry');
  const senderPublicKey = trustedKey(header, trust, nowMs);
  return openSignedBy(envelope, { device, senderPublicKey, onStage });
}

function trustedKey(header, { rootPublicKey, senderEntry, platformEntry, revocations = null }, nowMs) {
  if (!senderEntry) throw new EnvelopeRefused();
  try {
    const sender = verifyEntry(rootPublicKey, senderEntry, nowMs);
    const needsPlatform = header.serverSealed && platformEntry;
    const platform = needsPlatform ? verifyEntry(rootPublicKey, platformEntry, nowMs, Role.PLATFORM) : null;
    const publicKey = contentKeyOf(header, sender, platform);
    if (revocations) {
      const entries = platform ? [sender, platform] : [sender];
      if (entries.some((entry) => revokesEntry(revocations, entry)) || revokesKey(revocations, publicKey)) throw new EnvelopeRefused();
    }
    return publicKey;
  } catch (cause) {
    if (cause instanceof EntryRefused) throw new EnvelopeRefused();
    throw cause;
  }
}

function ownStanza(envelope, { deviceId, minSuite = SUITE_X25519, raisedAtMs = -Infinity }) {
  const stanza = stanzaOf(envelope, deviceId);
  if (!stanza || !suiteOf(stanza.suite)) throw new EnvelopeRefused();
  // What was sealed before the device went up may be on its way.
  const isLate = envelope.header.createdMs > raisedAtMs + RISE_SKEW_MS;
  if (stanza.suite < minSuite && isLate) throw new EnvelopeRefused();
  return stanza;
}

/** The second half of `open()`: from a parsed envelope and the key that must have signed it. */
export function openSignedBy(envelope, { device, senderPublicKey, onStage = () => {} }) {
  const { header, headerBytes, commit, nonce, ciphertext, signature } = envelope;
  const stanza = ownStanza(envelope, device);
  onStage('signature');
  if (!same(contentKeyId(senderPublicKey), header.senderKeyId)) throw new EnvelopeRefused();
  if (!verify(senderPublicKey, signedBytes(envelope), signature)) throw new EnvelopeRefused();
  onStage('unwrap');
  const payload = unwrap(stanza, device);
  const contentKey = payload.subarray(0, 32);
  onStage('binding');
  if (!same(payload.subarray(32), bindingOf(headerBytes, stanza))) throw new EnvelopeRefused();
  onStage('commit');
  if (!same(commit, commitTo(contentKey, headerBytes))) throw new EnvelopeRefused();
  onStage('open');
  const padded = orRefused(() => sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(null, ciphertext, headerBytes, nonce, contentKey));
  onStage('unpad');
  return unpad(padded);
}

function unwrap({ suite, prekeyId, kind, wrapped }, { prekeys }) {
  const prekey = prekeys.find((each) => each.suite === suite && each.prekeyId === prekeyId && each.kind === kind);
  if (!prekey) throw new EnvelopeRefused();
  return orRefused(() => suiteOf(suite).unwrap(wrapped, prekey));
}

/** What does not open throws. */
function orRefused(action) {
  try {
    return action();
  } catch {
    throw new EnvelopeRefused();
  }
}
