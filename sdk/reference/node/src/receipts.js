// Receipts: what anybody can verify about a message, also when its content is gone. The format is in docs/receipts.md.

import { concat, demand, same, sha256, sha512, utf8 } from './bytes.js';
import { contentKeyOf, Role, verifyEntry } from './entries.js';
import { evidenceOf, headerOf, HEAD_BYTES, parse } from './envelope.js';
import { EntryRefused, EnvelopeRefused, ReceiptRefused } from './errors.js';
import { acknowledgementStatement, NO_DIGEST, Outcome } from './proofs.js';
import { revokesEntry, revokesKey } from './revocations.js';
import { contentKeyId, verify } from './signing.js';

/** What became of a claim. UNPROVEN: nothing that was signed says so. FAILED: what is there to prove it does not verify. */
export const Finding = Object.freeze({ PROVEN: 'proven', UNPROVEN: 'unproven', FAILED: 'failed' });

const RECEIPT_BYTES_MAX = 1024 * 1024;
const EVIDENCE_BYTES = HEAD_BYTES + 64 + 64;
const ENTRY_BYTES_MAX = 1009;
const DELIVERIES_MAX = 512;
const ACKNOWLEDGEMENTS_MAX = 3;
// The platform judges an entry by its own clock, from which the creation time may differ by so much.
const CREATED_SKEW_MS = 5 * 60 * 1000;
const DELIVERED = 4; // the only state that nothing but an acknowledgement brings about
// Outcome: the claim that it makes, and the state that it brings about, if any.
const CLAIMS = new Map([
  [Outcome.DELIVERED, { name: 'delivered', state: DELIVERED }],
  [Outcome.UNDELIVERED, { name: 'undelivered', state: 5 }],
  [Outcome.BLOCKED, { name: 'blocked', state: 6 }],
  [Outcome.READ, { name: 'read' }],
]);
const UNREADABLE = 'unreadable'; // of UNDELIVERED over no envelope

// --- reading ---------------------------------------------------------------------------------------------------------

/** The receipt in the text of a file: ids, keys and signatures as Uint8Array, times as BigInt. Throws ReceiptRefused. */
export function readReceipt(text) {
  try {
    if (text.length > RECEIPT_BYTES_MAX) throw new RangeError('too long');
    const document = JSON.parse(text);
    demand(document?.format === 'sealpush-receipt', 'not a receipt');
    demand(document.version === 1, 'a version that is not known');
    // No name twice, nothing escaped, no fractions: then it is what a plain writer gives.
    demand(text.replace(/[ \t\r\n]/g, '') === JSON.stringify(document), 'not written plainly');
    return receiptOf(document);
  } catch (cause) {
    if (cause instanceof RangeError || cause instanceof SyntaxError) throw new ReceiptRefused(`not a receipt: ${cause.message}`);
    throw cause;
  }
}

function receiptOf(document) {
  only(document, 'format version message_id sender_id content_id evidence sender_entry platform_entry deliveries');
  const receipt = {
    messageId: bytes(document.message_id, 16),
    senderId: bytes(document.sender_id, 16),
    contentId: bytes(document.content_id, 16),
    evidence: bytes(document.evidence, 0, EVIDENCE_BYTES),
    senderEntry: bytes(document.sender_entry),
    platformEntry: bytes(document.platform_entry),
    deliveries: list(document.deliveries, 1, DELIVERIES_MAX).map(deliveryOf),
  };
  demand(Math.max(receipt.senderEntry.length, receipt.platformEntry.length) <= ENTRY_BYTES_MAX, 'an entry that is too long');
  const devices = document.deliveries.map((delivery) => delivery.device_id);
  demand(new Set(devices).size === devices.length, 'a device twice');
  return receipt;
}

function deliveryOf(document) {
  only(document, 'device_id identity_public_key state reason_code acknowledgements');
  return {
    deviceId: bytes(document.device_id, 16),
    identityPublicKey: bytes(document.identity_public_key, 0, 32),
    state: number(document.state),
    reasonCode: number(document.reason_code),
    acknowledgements: list(document.acknowledgements, 0, ACKNOWLEDGEMENTS_MAX).map(acknowledgementOf),
  };
}

function acknowledgementOf(document) {
  only(document, 'outcome reason_code at_ms signature');
  demand(typeof document.at_ms === 'string' && /^(0|[1-9][0-9]{0,19})$/.test(document.at_ms), 'a time that is no decimal text');
  const atMs = BigInt(document.at_ms);
  demand(atMs < 1n << 64n, 'a time of more than 64 bits');
  demand(CLAIMS.has(document.outcome), 'an outcome that is not known');
  return { outcome: document.outcome, reasonCode: number(document.reason_code), atMs, signature: bytes(document.signature, 64) };
}

function only(document, names) {
  demand(document !== null && typeof document === 'object' && !Array.isArray(document), 'no object where one belongs');
  demand(Object.keys(document).sort().join(' ') === names.split(' ').sort().join(' '), `here belong ${names}, and nothing else`);
}

/** Bytes of lower-case hex; of one of these lengths, if any is given. */
function bytes(text, ...lengths) {
  demand(typeof text === 'string' && /^([0-9a-f]{2})*$/.test(text), 'no lower-case hex where it belongs');
  const read = Uint8Array.from(Buffer.from(text, 'hex'));
  demand(lengths.length === 0 || lengths.includes(read.length), 'bytes of another length');
  return read;
}

function number(value) {
  demand(Number.isInteger(value) && value >= 0 && value < 65_536, 'no number of 16 bits where one belongs');
  return value;
}

function list(value, min, max) {
  demand(Array.isArray(value) && value.length >= min && value.length <= max, `no list of ${min} to ${max} where one belongs`);
  return value;
}

// --- verifying -------------------------------------------------------------------------------------------------------

/**
 * What a receipt proves to whoever trusts this root: `{ claims, failed, senderProven, deliveredTo }`. A claim is
 * `{ name, finding }` and, about a delivery, its `deviceId`; docs/receipts.md says what each means.
 *
 * Where `failed` is true, believe none of it. `envelope`: the whole one, if somebody kept it; it is compared. `revocations`: the root's
 * newest list, as `verifyRevocations` gives it; what it takes back fails, whenever the content was made.
 */
export function verifyReceipt(receipt, rootPublicKey, { envelope = null, revocations = null } = {}) {
  const claims = [...senderClaims(receipt, rootPublicKey, revocations), contentClaim(receipt, envelope)];
  const signed = receipt.deliveries.flatMap((delivery) => deliveryClaims(receipt, delivery));
  // What could not be read was no envelope that the device knows of.
  const linked = signed.some(({ name, finding }) => !['state', UNREADABLE].includes(name) && finding === Finding.PROVEN);
  claims.push(
    ...signed,
    claim('message', linked ? Finding.PROVEN : Finding.UNPROVEN),
    claim('acceptance', Finding.UNPROVEN),
    claim('recipient', Finding.UNPROVEN),
  );
  const failed = claims.some(({ finding }) => finding === Finding.FAILED);
  const proven = (wanted) => (failed ? [] : claims.filter(({ name, finding }) => name === wanted && finding === Finding.PROVEN));
  return {
    claims,
    failed,
    senderProven: proven('content_signature').length > 0,
    deliveredTo: proven('delivered').map(({ deviceId }) => deviceId),
  };
}

const claim = (name, finding) => ({ name, finding });

function senderClaims({ evidence, senderId, contentId, senderEntry, platformEntry }, rootPublicKey, revocations) {
  if (evidence.length === 0) return [claim('content_signature', Finding.UNPROVEN)];
  const header = orNull(() => headerOf(evidence), EnvelopeRefused);
  if (!header) return [claim('header', Finding.FAILED)];
  const claims = [];
  if (!same(header.senderId, senderId) || !same(header.contentId, contentId)) claims.push(claim('header', Finding.FAILED));

  const entryClaim = (name, blob, role, isRight) => {
    const entry = blob.length > 0 ? orNull(() => entryThen(rootPublicKey, blob, header.createdMs, role), EntryRefused) : null;
    const holds = entry !== null && isRight(entry);
    claims.push(claim(name, holds ? Finding.PROVEN : blob.length > 0 ? Finding.FAILED : Finding.UNPROVEN));
    return holds ? entry : null;
  };
  const sender = entryClaim('sender_entry', senderEntry, Role.SENDER, (entry) => same(entry.senderId, header.senderId));
  let platform = null;
  if (header.serverSealed) platform = entryClaim('platform_entry', platformEntry, Role.PLATFORM, () => true);
  else if (platformEntry.length > 0) claims.push(claim('platform_entry', Finding.FAILED));

  const signature = signatureFinding(evidence, header, sender, platform);
  claims.push(claim('content_signature', signature));
  if (signature === Finding.PROVEN) claims.push(claim('not_revoked', revocationFinding(revocations, header, sender, platform)));
  return claims;
}

/** The entry, if it was in force when the content was created, to within the skew; else EntryRefused. */
function entryThen(rootPublicKey, blob, createdMs, role) {
  for (const atMs of [createdMs, createdMs - CREATED_SKEW_MS]) {
    const entry = orNull(() => verifyEntry(rootPublicKey, blob, atMs, role), EntryRefused);
    if (entry) return entry;
  }
  return verifyEntry(rootPublicKey, blob, createdMs + CREATED_SKEW_MS, role);
}

function signatureFinding(evidence, header, sender, platform) {
  if (!sender || (header.serverSealed && !platform)) return Finding.UNPROVEN;
  const publicKey = orNull(() => contentKeyOf(header, sender, platform), EnvelopeRefused);
  if (!publicKey || !same(contentKeyId(publicKey), header.senderKeyId)) return Finding.FAILED;
  const signed = concat(utf8('SPE1-sig'), sha512(evidence.subarray(0, -64)));
  return verify(publicKey, signed, evidence.subarray(-64)) ? Finding.PROVEN : Finding.FAILED;
}

function revocationFinding(revocations, header, sender, platform) {
  if (!revocations) return Finding.UNPROVEN;
  const entries = platform ? [sender, platform] : [sender];
  const isKeyRevoked = revokesKey(revocations, contentKeyOf(header, sender, platform));
  return isKeyRevoked || entries.some((entry) => revokesEntry(revocations, entry)) ? Finding.FAILED : Finding.PROVEN;
}

function contentClaim({ evidence }, envelope) {
  if (envelope === null || evidence.length === 0) return claim('content', Finding.UNPROVEN);
  const parsed = orNull(() => parse(envelope), EnvelopeRefused);
  return claim('content', parsed && same(evidenceOf(parsed), evidence) ? Finding.PROVEN : Finding.FAILED);
}

function deliveryClaims(receipt, delivery) {
  const { deviceId, state, reasonCode, acknowledgements } = delivery;
  const claims = [];
  const ends = [];
  for (const acknowledgement of acknowledgements) {
    const { name, finding } = acknowledgementClaim(receipt, delivery, acknowledgement);
    claims.push({ ...claim(name, finding), deviceId });
    if (CLAIMS.get(acknowledgement.outcome).state === state && acknowledgement.reasonCode === reasonCode) ends.push(finding);
  }
  let said = Finding.UNPROVEN;
  if (ends.includes(Finding.PROVEN)) said = Finding.PROVEN;
  else if (state === DELIVERED && ends.length === 0) said = Finding.FAILED;
  return [...claims, { ...claim('state', said), deviceId }];
}

/** Signed over the receipt's own envelope, or, where the device could not read what came, over none. */
function acknowledgementClaim({ messageId, contentId, evidence }, { deviceId, identityPublicKey }, acknowledgement) {
  const { name } = CLAIMS.get(acknowledgement.outcome);
  if (evidence.length === 0 || identityPublicKey.length === 0) return claim(name, Finding.UNPROVEN);
  const isSigned = (envelopeDigest) => {
    const statement = acknowledgementStatement({ messageId, contentId, envelopeDigest, deviceId, ...acknowledgement });
    return verify(identityPublicKey, statement, acknowledgement.signature);
  };
  if (isSigned(sha256(evidence))) return claim(name, Finding.PROVEN);
  if (acknowledgement.outcome === Outcome.UNDELIVERED && isSigned(NO_DIGEST)) return claim(UNREADABLE, Finding.PROVEN);
  return claim(name, Finding.FAILED);
}

function orNull(action, refused) {
  try {
    return action();
  } catch (cause) {
    if (cause instanceof refused) return null;
    throw cause;
  }
}
