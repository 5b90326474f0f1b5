// The vectors of receipts. docs/receipts.md says what the claims mean.

import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { Finding, readReceipt, ReceiptRefused, verifyReceipt, verifyRevocations } from '../src/index.js';
import { bytes, load } from './read.js';

const hex = (data) => Buffer.from(data).toString('hex');
const file = load('receipts');

/** The text of a receipt of the file with values of its fields replaced. */
function changed(base, changes) {
  const document = structuredClone(file.receipts[base]);
  for (const { path, value } of changes) {
    const place = path.slice(0, -1).reduce((inside, step) => inside[step], document);
    place[path.at(-1)] = value;
  }
  return JSON.stringify(document);
}

describe('what receipts prove', () => {
  for (const vector of file.cases) {
    test(vector.name, () => {
      const receipt = readReceipt(changed(vector.receipt, vector.changes));
      const envelope = vector.envelope === null ? null : bytes(vector.envelope);
      const root = bytes(vector.root_public_key);
      const revocations = vector.revocations === null ? null : verifyRevocations(root, bytes(vector.revocations));
      const verdict = verifyReceipt(receipt, root, { envelope, revocations });
      const places = new Map(receipt.deliveries.map(({ deviceId }, index) => [hex(deviceId), ` ${index}`]));
      const found = verdict.claims.map(({ name, deviceId, finding }) => [name + (deviceId ? places.get(hex(deviceId)) : ''), finding]);
      assert.deepEqual(Object.fromEntries(found), vector.claims);
      assert.equal(found.length, Object.keys(vector.claims).length);

      const findings = Object.values(vector.claims);
      assert.equal(verdict.failed, findings.includes(Finding.FAILED));
      assert.equal(verdict.senderProven, !verdict.failed && vector.claims.content_signature === Finding.PROVEN);
      const delivered = receipt.deliveries.filter((_, index) => !verdict.failed && vector.claims[`delivered ${index}`] === Finding.PROVEN);
      assert.deepEqual(
        verdict.deliveredTo,
        delivered.map(({ deviceId }) => deviceId),
      );
    });
  }
});

describe('reading receipts', () => {
  const own = JSON.stringify(file.receipts.own);
  for (const vector of file.readable) test(vector.name, () => assert.deepEqual(readReceipt(vector.text), readReceipt(own)));
  for (const vector of file.refused) {
    test(`refused: ${vector.name}`, () => assert.throws(() => readReceipt(vector.text ?? changed('own', vector.changes)), ReceiptRefused));
  }
});
