// The test vectors that every implementation reads. docs/device-protocol.md says how they are written.

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { describe, test } from 'node:test';

import * as sealpush from '../src/index.js';
import { bytes, contentOf, drawnFrom, fields, load } from './read.js';

const hex = (data) => Buffer.from(data).toString('hex');
const plain = (data) => Uint8Array.from(data); // compares by content, also for views

for (const name of ['seal', 'seal_hybrid']) describe(name, () => {
  const file = load(name);
  const devices = fields(file.devices);

  for (const vector of file.cases) {
    test(vector.name, () => {
      const signer = sealpush.signingKey(bytes(file.signers[vector.signer].seed));
      assert.equal(hex(sealpush.contentKeyId(signer.publicKey)), file.signers[vector.signer].key_id);
      const recipients = vector.recipients.map(({ device, kind }) => {
        const { deviceId, prekeys } = devices[device];
        const { suite, prekeyId, publicKey } = prekeys.find((prekey) => prekey.kind === kind);
        return { deviceId, suite, prekeyId, kind, publicKey };
      });
      const content = contentOf(vector.content);
      const random = drawnFrom(bytes(vector.random));
      const sealed = sealpush.seal({ content, header: fields(vector.header), recipients, signer, random });

      const { expect } = vector;
      assert.equal(sealed.length, expect.bytes);
      if (expect.envelope) assert.equal(hex(sealed), expect.envelope);
      else {
        const stanzas = expect.stanzas.join('');
        assert.equal(hex(sealed.subarray(0, 126)), expect.head);
        assert.equal(hex(sealed.subarray(128, 128 + stanzas.length / 2)), stanzas);
        assert.equal(hex(sealed.subarray(-64)), expect.signature);
      }
      assert.equal(createHash('sha256').update(sealed).digest('hex'), expect.sha256);

      const parsed = sealpush.parse(sealed);
      assert.deepEqual(sealpush.encode(parsed), sealed);
      assert.equal(hex(sealpush.digestOf(parsed)), expect.envelope_digest);
      for (const { device } of vector.recipients) {
        const own = devices[device];
        const alone = sealpush.parse(sealpush.forDevice(parsed, own.deviceId));
        assert.equal(hex(sealpush.digestOf(alone)), expect.envelope_digest);
        for (const envelope of [parsed, alone]) {
          const opened = sealpush.openSignedBy(envelope, { device: own, senderPublicKey: signer.publicKey });
          assert.deepEqual(plain(opened), content);
        }
      }
    });
  }

  for (const vector of file.refused) {
    test(`refused: ${vector.name}`, () => {
      const signer = sealpush.signingKey(bytes(file.signers[vector.signer].seed));
      const { header, recipients } = fields(vector);
      const call = () => sealpush.seal({ content: contentOf(vector.content), header, recipients, signer });
      assert.throws(call, (error) => error instanceof RangeError || error instanceof sealpush.KeyRefused);
    });
  }
});

for (const name of ['open', 'open_hybrid']) describe(name, () => {
  const file = load(name);
  const devices = fields(file.devices);

  function envelopeOf({ envelope, base, changes }) {
    if (envelope) return bytes(envelope);
    return changes.reduce((data, { op, offset, mask, length, hex: text }) => {
      switch (op) {
        case 'flip':
          data[offset] ^= mask;
          return data;
        case 'replace':
          data.set(bytes(text), offset);
          return data;
        case 'truncate':
          return data.slice(0, length);
        case 'append':
          return Uint8Array.from([...data, ...bytes(text)]);
        default:
          throw new Error(`an unknown change: ${op}`);
      }
    }, bytes(file.bases[base]));
  }

  function openAsIn(vector, onStage, envelope = envelopeOf(vector)) {
    const context = { ...file.context, ...vector.context };
    return sealpush.open(envelope, {
      device: { ...devices[context.device], minSuite: context.min_suite, raisedAtMs: context.raised_at_ms ?? undefined },
      trust: {
        rootPublicKey: bytes(context.root_public_key),
        senderEntry: context.sender_entry && bytes(context.sender_entry),
        platformEntry: context.platform_entry && bytes(context.platform_entry),
      },
      nowMs: context.now_ms,
      skewMs: context.skew_ms,
      seen: (senderId, contentId) => context.seen.some(([sender, content]) => sender === hex(senderId) && content === hex(contentId)),
      onStage,
    });
  }

  for (const vector of file.opened) {
    test(vector.name, () => {
      const stages = [];
      assert.deepEqual(plain(openAsIn(vector, (stage) => stages.push(stage))), contentOf(file.content));
      assert.deepEqual(stages, file.stages);
    });
  }

  for (const vector of file.refused) {
    test(`refused: ${vector.name}`, () => {
      let reached;
      const call = () => openAsIn(vector, (stage) => (reached = stage));
      assert.throws(call, (error) => error instanceof sealpush.EnvelopeRefused && error.cause === undefined);
      assert.equal(reached, vector.stage);
    });
  }

  test('refused: no entry of the sender is known', () => {
    const [vector] = file.opened;
    assert.throws(() => openAsIn({ ...vector, context: { ...vector.context, sender_entry: null } }, () => {}), sealpush.EnvelopeRefused);
  });

  for (const base of file.truncated) {
    test(`truncated: ${base}`, () => {
      const whole = bytes(file.bases[base]);
      for (let length = 0; length < whole.length; length += 1) {
        let reached;
        assert.throws(() => openAsIn({ base }, (each) => (reached = each), whole.subarray(0, length)), sealpush.EnvelopeRefused);
        assert.equal(reached, 'parse', `cut to ${length} bytes`);
      }
    });
  }

  for (const vector of file.swept) {
    test(`swept: ${vector.name}`, () => {
      const { offset, step, masks, content_offset: contentOffset } = vector;
      const signer = sealpush.signingKey(bytes(file.signer_seed));
      vector.stages
        .flatMap(([stage, count]) => Array(count).fill(stage))
        .forEach((stage, n) => {
          const data = bytes(file.bases[vector.base]);
          data[offset + Math.floor(n / masks.length) * step] ^= masks[n % masks.length];
          if (contentOffset) data.set(signer.sign(signedBytes(data, contentOffset)), data.length - 64);
          let reached;
          assert.throws(() => openAsIn(vector, (each) => (reached = each), data), sealpush.EnvelopeRefused);
          assert.equal(reached, stage, `flip ${n}`);
        });
    });
  }
});

/** What the signature of these bytes of an envelope is over. */
function signedBytes(data, contentOffset) {
  const hash = (...parts) => createHash('sha512').update(Buffer.concat(parts)).digest();
  return Buffer.concat([Buffer.from('SPE1-sig'), hash(data.subarray(0, 126), hash(data.subarray(contentOffset, -64)))]);
}

describe('signatures', () => {
  for (const { name, public_key, message, signature, valid } of load('signatures').cases) {
    test(name, () => assert.equal(sealpush.verify(bytes(public_key), bytes(message), bytes(signature)), valid));
  }
});

describe('prekeys', () => {
  const file = load('prekeys');
  const identity = sealpush.signingKey(bytes(file.identity_seed));

  for (const vector of file.verify) {
    test(vector.name, () => {
      const { prekey, ...rest } = fields(vector);
      if (!vector.accepted) {
        assert.throws(() => sealpush.verifyPrekey(prekey, rest), sealpush.KeyRefused);
        return;
      }
      sealpush.verifyPrekey(prekey, rest);
      const statement = sealpush.prekeyStatement(prekey, rest.deviceId, rest.minSuite);
      assert.equal(hex(statement), vector.signed_bytes);
      assert.deepEqual(identity.sign(statement), prekey.signature);
    });
  }

  for (const vector of file.choose) {
    test(`choosing: ${vector.name}`, () => {
      const { signedPrekey, oneTimePrekey } = fields(vector);
      const device = { deviceId: bytes(file.device_id), identityPublicKey: identity.publicKey, minSuite: vector.min_suite, signedPrekey, oneTimePrekey };
      if (vector.chosen === 'refused') assert.throws(() => sealpush.recipientOf(device, file.now_ms), sealpush.KeyRefused);
      else assert.deepEqual(sealpush.choosePrekey(device, file.now_ms), fields(vector[vector.chosen]));
    });
  }
});

describe('sender entries', () => {
  const file = load('entries');
  const root = bytes(file.root_public_key);

  for (const vector of file.verify) {
    test(vector.name, () => {
      const call = () => sealpush.verifyEntry(root, bytes(vector.blob), vector.now_ms, vector.role);
      if (!vector.entry) {
        assert.throws(call, sealpush.EntryRefused);
        return;
      }
      const entry = call();
      const keys = entry.keys.map((key) => ({ ...key, publicKey: plain(key.publicKey) }));
      assert.deepEqual({ ...entry, senderId: plain(entry.senderId), keys }, fields(vector.entry));
    });
  }
});

describe('what a device signs', () => {
  const file = load('proofs');
  const identity = sealpush.signingKey(bytes(file.identity_seed));
  const build = {
    challenge: sealpush.challengeStatement,
    registration: sealpush.registrationStatement,
    acknowledgement: sealpush.acknowledgementStatement,
    change: sealpush.changeStatement,
  };

  for (const vector of file.cases) {
    test(vector.name, () => {
      const statement = build[vector.statement](fields(vector.fields));
      assert.equal(hex(statement), vector.signed_bytes);
      assert.equal(hex(identity.sign(statement)), vector.signature);
    });
  }
  for (const vector of file.refused) {
    test(`refused: ${vector.name}`, () => assert.throws(() => build[vector.statement](fields(vector.fields)), RangeError));
  }
  for (const vector of file.verify) {
    test(`checked: ${vector.name}`, () => {
      const [publicKey, statement, signature] = [vector.public_key, vector.signed_bytes, vector.signature].map(bytes);
      assert.equal(sealpush.verify(publicKey, statement, signature), vector.valid);
    });
  }
});

describe('the device log', () => {
  const file = load('devicelog');

  for (const vector of file.entries) {
    test(vector.name, () => {
      const { byDeviceId, signature, ...said } = fields({ ...vector.fields, by_device_id: vector.fields.by_device_id ?? '' });
      const wanted = byDeviceId.length ? { ...said, byDeviceId, signature } : said;
      assert.equal(hex(sealpush.encodeEntry(wanted)), vector.entry);
      const read = sealpush.decodeEntry(bytes(vector.entry));
      assert.deepEqual(Object.fromEntries(Object.entries(read).map(([name, each]) => [name, each.length ? plain(each) : each])), wanted);
    });
  }
  for (const vector of file.entries_refused) {
    test(`no entry: ${vector.name}`, () => assert.throws(() => sealpush.decodeEntry(bytes(vector.entry)), RangeError));
  }
  for (const vector of file.logs) {
    test(vector.name, () => {
      let log = sealpush.startLog(bytes(vector.subscriber_id));
      const heads = [log.head];
      for (const entry of vector.entries) {
        log = sealpush.nextLog(log, bytes(entry));
        heads.push(log.head);
      }
      assert.deepEqual(heads.map(hex), vector.heads);
      assert.equal(log.seq, vector.entries.length);
      const devices = [...log.devices.values()].map((each) => ({
        device_id: hex(each.deviceId),
        identity_public_key: hex(each.identityPublicKey),
        added_ms: each.addedMs,
        added_head: hex(each.addedHead),
        vouched: each.vouched,
      }));
      assert.deepEqual(devices, vector.devices);
    });
  }
  for (const vector of file.logs_refused) {
    test(`broken: ${vector.name}`, () => {
      const entries = vector.entries.map(bytes);
      const log = entries.slice(0, -1).reduce(sealpush.nextLog, sealpush.startLog(bytes(vector.subscriber_id)));
      assert.throws(() => sealpush.nextLog(log, entries.at(-1)), sealpush.DeviceLogBroken);
    });
  }
  test('a vouch', () => {
    const { vouch } = file;
    const statement = sealpush.vouchStatement(fields(vouch.fields));
    assert.equal(hex(statement), vouch.signed_bytes);
    assert.equal(hex(sealpush.signingKey(bytes(vouch.identity_seed)).sign(statement)), vouch.signature);
  });
  for (const vector of file.fingerprints) {
    test(`fingerprint: ${vector.name}`, () => assert.equal(sealpush.fingerprint(fields(vector.devices)), vector.fingerprint));
  }
  test('no fingerprint of nothing, nor of a device twice', () => {
    const [device] = fields(file.fingerprints[0].devices);
    for (const devices of [[], [device, device]]) assert.throws(() => sealpush.fingerprint(devices), RangeError);
  });
});
