// Revocation lists: the test vectors, and a device that goes by one.

import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import * as sealpush from '../src/index.js';
import { bytes, contentOf, fields, load } from './read.js';

const plain = (data) => Uint8Array.from(data); // compares by content, also for views

describe('revocation lists', () => {
  const file = load('revocations');
  const root = bytes(file.root_public_key);

  for (const vector of file.verify) {
    test(vector.name, () => {
      const call = () => sealpush.verifyRevocations(root, bytes(vector.blob));
      if (!vector.list) {
        assert.throws(call, sealpush.RevocationsRefused);
        return;
      }
      const list = call();
      const items = list.items.map((item) =>
        item.kind === 1 ? { ...item, senderId: plain(item.senderId) } : { ...item, publicKey: plain(item.publicKey) },
      );
      assert.deepEqual({ ...list, items }, fields(vector.list));
    });
  }

  for (const { name, head, keys, signature, accepted } of file.rising_keys) {
    test(name, () => {
      const items = Buffer.alloc(33 * keys);
      for (let number = 0; number < keys; number++) {
        items[33 * number] = 2;
        items.writeUInt32BE(number, 33 * number + 29);
      }
      const call = () => sealpush.verifyRevocations(root, Uint8Array.from(Buffer.concat([bytes(head), items, bytes(signature)])));
      if (accepted) assert.equal(call().items.length, keys);
      else assert.throws(call, sealpush.RevocationsRefused);
    });
  }

  for (const vector of file.judged) {
    test(`judged: ${vector.name}`, () => {
      const list = sealpush.verifyRevocations(root, bytes(vector.list));
      const entries = [sealpush.verifyEntry(root, bytes(vector.sender_entry), file.now_ms)];
      if (vector.platform_entry) {
        entries.push(sealpush.verifyEntry(root, bytes(vector.platform_entry), file.now_ms, sealpush.Role.PLATFORM));
      }
      const revoked = entries.some((entry) => sealpush.revokesEntry(list, entry)) || sealpush.revokesKey(list, bytes(vector.public_key));
      assert.equal(!revoked, vector.trusted);
    });
  }

  test('what opens without a list is refused by one that revokes its key, and by nothing else in it', () => {
    const open = load('open');
    const devices = fields(open.devices);
    const opened = open.opened.find(({ envelope }) => envelope);
    const context = { ...open.context, ...opened.context };
    const entry = sealpush.verifyEntry(bytes(context.root_public_key), bytes(context.sender_entry), context.now_ms);
    const openWith = (...items) =>
      sealpush.open(bytes(opened.envelope), {
        device: { ...devices[context.device], minSuite: context.min_suite },
        trust: {
          rootPublicKey: bytes(context.root_public_key),
          senderEntry: bytes(context.sender_entry),
          platformEntry: context.platform_entry && bytes(context.platform_entry),
          revocations: { serial: 1n, issuedMs: 0, items },
        },
        nowMs: context.now_ms,
        skewMs: context.skew_ms,
      });
    const older = { kind: 1, senderId: entry.senderId, serial: entry.serial - 1n };
    assert.deepEqual(plain(openWith(older, { kind: 2, publicKey: new Uint8Array(32) })), contentOf(open.content));
    const revoked = entry.keys.map(({ publicKey }) => ({ kind: 2, publicKey }));
    for (const items of [revoked, [{ ...older, serial: entry.serial }]]) {
      assert.throws(() => openWith(...items), (error) => error instanceof sealpush.EnvelopeRefused);
    }
  });
});
