// A message from a bank to a phone, without a server: what each side does, in order. `npm run example`

import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';

import sodium from 'libsodium-wrappers';
import { Kind, open, prekeyStatement, recipientOf, seal, signingKey, SUITE_X25519 } from 'sealpush-reference';

import { signEntry } from './root.js';

const DAY_MS = 24 * 3600 * 1000;
const nowMs = Date.now();
await sodium.ready;

// Once: the platform's root signs who the bank is. The bank keeps its key, apps pin the root.
const root = signingKey(randomBytes(32));
const bank = { senderId: randomBytes(16), key: signingKey(randomBytes(32)) };
const senderEntry = signEntry(root, { senderId: bank.senderId, displayName: 'Test Bank', publicKey: bank.key.publicKey, nowMs });

// The phone: an identity, and a prekey signed by it. The private half stays there.
const identity = signingKey(randomBytes(32));
const deviceId = randomBytes(16);
const pair = sodium.crypto_box_keypair();
const prekey = {
  suite: SUITE_X25519,
  prekeyId: 1,
  kind: Kind.SIGNED,
  publicKey: pair.publicKey,
  createdMs: nowMs,
  expiresMs: nowMs + 90 * DAY_MS,
};
prekey.signature = identity.sign(prekeyStatement(prekey, deviceId, 1));

// The bank: this is an element of `RecipientKeys.devices`, with the names of its fields in camelCase.
const device = { deviceId, identityPublicKey: identity.publicKey, minSuite: 1, signedPrekey: prekey, oneTimePrekey: null };
const envelope = seal({
  content: new TextEncoder().encode('a serialised sealpush.v1.Content'),
  header: {
    contentId: randomBytes(16), // a new one whenever something is sealed
    senderId: bank.senderId,
    recipientRef: randomBytes(32), // `RecipientKeys.recipient_ref`
    createdMs: nowMs,
    expiresMs: nowMs + DAY_MS,
  },
  recipients: [recipientOf(device, nowMs)],
  signer: bank.key,
});

// The phone again, with what it pinned and fetched.
const content = open(envelope, {
  device: { deviceId, prekeys: [{ suite: SUITE_X25519, prekeyId: 1, kind: Kind.SIGNED, ...pair }] },
  trust: { rootPublicKey: root.publicKey, senderEntry, platformEntry: null },
  nowMs,
  skewMs: 5000,
});
assert.equal(new TextDecoder().decode(content), 'a serialised sealpush.v1.Content');
console.log(`${envelope.length} bytes sealed and opened`);
