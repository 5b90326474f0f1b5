// For the test that lets two implementations talk: one JSON array of jobs from standard input, one of answers to
// standard output. `seal` jobs give envelopes, `open` jobs give contents or null for a refusal, `encapsulate` jobs what the
// script that generates the vectors cannot make itself.

import { ml_kem768_x25519 as kem } from '@noble/post-quantum/hybrid.js';

import { EnvelopeRefused, openSignedBy, parse, recipientOf, seal, signingKey } from '../src/index.js';
import { bytes, fields } from './read.js';

const hex = (data) => Buffer.from(data).toString('hex');

const actions = {
  seal({ content, header, signer_seed, devices, now_ms }) {
    const recipients = fields(devices).map((device) => recipientOf(device, now_ms));
    return hex(seal({ content: bytes(content), header: fields(header), recipients, signer: signingKey(bytes(signer_seed)) }));
  },

  encapsulate: ({ public_key, random }) => hex(kem.encapsulate(bytes(public_key), bytes(random)).cipherText),

  open({ envelope, device, sender_public_key }) {
    try {
      return hex(openSignedBy(parse(bytes(envelope)), { device: fields(device), senderPublicKey: bytes(sender_public_key) }));
    } catch (error) {
      if (error instanceof EnvelopeRefused) return null;
      throw error;
    }
  },
};

let input = '';
for await (const chunk of process.stdin.setEncoding('utf8')) input += chunk;
process.stdout.write(JSON.stringify(JSON.parse(input).map(({ action, ...job }) => actions[action](job))));
