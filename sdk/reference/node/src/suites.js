// Suites: how a content key is wrapped for a device. One object a suite, with what its keys and stanzas must be.
//
// Suite 2 is HPKE (RFC 9180, base mode, one message) with a KEM that is not in the RFC but in Internet-Drafts
// (draft-ietf-hpke-pq, draft-irtf-cfrg-concrete-hybrid-kems): MLKEM768-X25519, whose id 0x647a is what counts. The KEM comes
// from a library; HPKE around it is short enough to stand here, for whoever has to write it in another language.

import { createHmac } from 'node:crypto';

import { ml_kem768_x25519 as kem } from '@noble/post-quantum/hybrid.js';

import { concat, exactly, hex, u16, utf8 } from './bytes.js';
import { sodium } from './signing.js';

export const SUITE_X25519 = 1;
export const SUITE_HYBRID = 2;

const X25519_BYTES = 32;
const MLKEM_PUBLIC_BYTES = 1184;
const ENC_BYTES = 1088 + X25519_BYTES;
const TAG_BYTES = 16;
const PAYLOAD_BYTES = 64;

// The points of X25519 of low order (u-coordinates, little-endian). With one of them every shared secret is known.
const LOW_ORDER = new Set([
  '00'.repeat(32),
  '01' + '00'.repeat(31),
  'e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800',
  '5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157',
  'ec' + 'ff'.repeat(30) + '7f',
  'ed' + 'ff'.repeat(30) + '7f',
  'ee' + 'ff'.repeat(30) + '7f',
]);

/** Whether an X25519 public key is useless. The top bit of the last byte is ignored, as X25519 does. */
export function isLowOrder(publicKey) {
  const masked = Uint8Array.from(publicKey);
  masked[31] &= 0x7f;
  return LOW_ORDER.has(hex(masked));
}

const x25519 = {
  publicBytes: X25519_BYTES,
  wrappedBytes: 32 + TAG_BYTES + PAYLOAD_BYTES,

  isUsable: (publicKey) => publicKey.length === X25519_BYTES && !isLowOrder(publicKey),

  keyPair(seed) {
    return { publicKey: sodium.crypto_scalarmult_base(exactly(32, seed, 'seed')), privateKey: seed };
  },

  // libsodium refuses points of low order by throwing.
  wrap(payload, publicKey, random) {
    return random ? sealedBoxFrom(random(32), payload, publicKey) : sodium.crypto_box_seal(payload, publicKey);
  },

  unwrap: (wrapped, { publicKey, privateKey }) => sodium.crypto_box_seal_open(wrapped, publicKey, privateKey),
};

/** What `crypto_box_seal` does, with the ephemeral secret given (libsodium's manual, "Sealed boxes"). */
function sealedBoxFrom(ephemeralSecret, payload, publicKey) {
  const ephemeralPublic = sodium.crypto_scalarmult_base(ephemeralSecret);
  const nonce = sodium.crypto_generichash(24, concat(ephemeralPublic, publicKey), null);
  return concat(ephemeralPublic, sodium.crypto_box_easy(payload, nonce, publicKey, ephemeralSecret));
}

const hybrid = {
  publicBytes: MLKEM_PUBLIC_BYTES + X25519_BYTES,
  wrappedBytes: ENC_BYTES + PAYLOAD_BYTES + TAG_BYTES,

  isUsable(publicKey) {
    if (publicKey.length !== hybrid.publicBytes) return false;
    return isCanonical(publicKey.subarray(0, MLKEM_PUBLIC_BYTES)) && !isLowOrder(publicKey.subarray(MLKEM_PUBLIC_BYTES));
  },

  /** The private key is the seed: SHAKE-256 makes 64 bytes of ML-KEM and 32 of X25519 of it whenever it is used. */
  keyPair(seed) {
    return { publicKey: kem.keygen(exactly(32, seed, 'seed')).publicKey, privateKey: seed };
  },

  /** The KEM throws for a public key that is none. `random` gives 64 bytes: 32 for ML-KEM, the ephemeral secret of X25519. */
  wrap(payload, publicKey, random) {
    const { cipherText, sharedSecret } = kem.encapsulate(publicKey, random?.(64));
    const { key, nonce } = keySchedule(sharedSecret, utf8('SPE1-stanza'));
    return concat(cipherText, sodium.crypto_aead_chacha20poly1305_ietf_encrypt(payload, null, null, nonce, key));
  },

  /** A wrong ciphertext decapsulates to another secret, under which the AEAD refuses. */
  unwrap(wrapped, { privateKey }) {
    const sharedSecret = kem.decapsulate(wrapped.subarray(0, ENC_BYTES), privateKey);
    const { key, nonce } = keySchedule(sharedSecret, utf8('SPE1-stanza'));
    return sodium.crypto_aead_chacha20poly1305_ietf_decrypt(null, wrapped.subarray(ENC_BYTES), null, nonce, key);
  },
};

/** Whether every coefficient of an ML-KEM public key is below the modulus (FIPS 203, 7.2): 12 bits each, little-endian. */
function isCanonical(mlkemPublic) {
  for (let at = 0; at < MLKEM_PUBLIC_BYTES - 32; at += 3) {
    const pair = mlkemPublic[at] | (mlkemPublic[at + 1] << 8) | (mlkemPublic[at + 2] << 16);
    if ((pair & 0xfff) >= 3329 || pair >> 12 >= 3329) return false;
  }
  return true;
}

// RFC 9180, 5.1 and 5.3, base mode: KEM 0x647a, KDF HKDF-SHA256, AEAD ChaCha20-Poly1305. One message, so sequence number 0.

const SUITE_ID = concat(utf8('HPKE'), u16(0x647a), u16(0x0001), u16(0x0003));

const hmac = (key, ...parts) => new Uint8Array(createHmac('sha256', key).update(concat(...parts)).digest());

const labeledExtract = (salt, label, material) => hmac(salt, utf8('HPKE-v1'), SUITE_ID, utf8(label), material);

/** HKDF-Expand of at most one block, which is 32 bytes. */
function labeledExpand(key, label, info, length) {
  return hmac(key, u16(length), utf8('HPKE-v1'), SUITE_ID, utf8(label), info, Uint8Array.of(1)).subarray(0, length);
}

function keySchedule(sharedSecret, info) {
  const none = new Uint8Array(0);
  const modeBase = Uint8Array.of(0);
  const context = concat(modeBase, labeledExtract(none, 'psk_id_hash', none), labeledExtract(none, 'info_hash', info));
  const secret = labeledExtract(sharedSecret, 'secret', none);
  return { key: labeledExpand(secret, 'key', context, 32), nonce: labeledExpand(secret, 'base_nonce', context, 12) };
}

/** The suites that this code can seal to and open, by id. */
const suites = new Map([
  [SUITE_X25519, x25519],
  [SUITE_HYBRID, hybrid],
]);

export const SUITES = Object.freeze([...suites.keys()]);

/** The suite with this id; undefined for one that is not known here. */
export const suiteOf = (id) => suites.get(id);

/** A key pair of a suite from 32 random bytes: `{ publicKey, privateKey }`. */
export const keyPair = (id, seed) => suites.get(id).keyPair(seed);
