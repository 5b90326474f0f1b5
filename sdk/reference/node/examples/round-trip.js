// A message from a bank to two phones, without a server: what each side does, in order. `npm run example`

import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';

import { forDevice, keyPair, Kind, open, parse, prekeyStatement, recipientOf, seal, signingKey, SUITE_HYBRID, SUITE_X25519 } from 'sealpush-reference';

import { signEntry } from './root.js';

const DAY_MS = 24 * 3600 * 1000;
const nowMs = Date.now();

// Once: the platform's root signs who the bank is. The bank keeps its key, apps pin the root.
const root = signingKey(randomBytes(32));
const bank = { senderId: randomBytes(16), key: signingKey(randomBytes(32)) };
const senderEntry = signEntry(root, { senderId: bank.senderId, displayName: 'Test Bank', publicKey: bank.key.publicKey, nowMs });

// Each phone: an identity, and a prekey signed by it. The private half stays there. The suite of the prekey is the lowest that the
// phone accepts; one that goes up to suite 2 never goes back.
const phones = [SUITE_X25519, SUITE_HYBRID].map((suite) => {
  const identity = signingKey(randomBytes(32));
  const deviceId = randomBytes(16);
  const pair = keyPair(suite, randomBytes(32));
  const prekey = { suite, prekeyId: 1, kind: Kind.SIGNED, publicKey: pair.publicKey, createdMs: nowMs, expiresMs: nowMs + 90 * DAY_MS };
  prekey.signature = identity.sign(prekeyStatement(prekey, deviceId, suite));
  return {
    own: { deviceId, minSuite: suite, prekeys: [{ suite, prekeyId: 1, kind: Kind.SIGNED, ...pair }] },
    // An element of `RecipientKeys.devices`, with the names of its fields in camelCase.
    published: { deviceId, identityPublicKey: identity.publicKey, minSuite: suite, signedPrekey: prekey, oneTimePrekey: null },
  };
});

// The bank.
const envelope = seal({
  content: new TextEncoder().encode('a serialised sealpush.v1.Content'),
  header: {
    contentId: randomBytes(16), // a new one whenever something is sealed
    senderId: bank.senderId,
    recipientRef: randomBytes(32), // `RecipientKeys.recipient_ref`
    createdMs: nowMs,
    expiresMs: nowMs + DAY_MS,
  },
  recipients: phones.map(({ published }) => recipientOf(published, nowMs)),
  signer: bank.key,
});

// The server gives each phone the envelope with its own stanza only; the phone opens it with what it pinned and fetched.
for (const { own } of phones) {
  const content = open(forDevice(parse(envelope), own.deviceId), {
    device: own,
    trust: { rootPublicKey: root.publicKey, senderEntry, platformEntry: null },
    nowMs,
    skewMs: 5000,
  });
  assert.equal(new TextDecoder().decode(content), 'a serialised sealpush.v1.Content');
}
console.log(`${envelope.length} bytes sealed for two phones and opened`);
