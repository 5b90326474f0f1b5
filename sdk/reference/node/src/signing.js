// Ed25519, by libsodium: it refuses signatures that are not canonical and public keys of low order, as required.

import sodium from 'libsodium-wrappers';

import { concat, sha256, utf8 } from './bytes.js';

await sodium.ready;

/** A key pair from its 32-byte seed: `{ publicKey, sign(message) }`. The secret stays in the closure. */
export function signingKey(seed) {
  const { publicKey, privateKey } = sodium.crypto_sign_seed_keypair(seed);
  return Object.freeze({ publicKey, sign: (message) => sodium.crypto_sign_detached(message, privateKey) });
}

/** Whether the holder of `publicKey` signed exactly `message`. Malformed input is false. */
export function verify(publicKey, message, signature) {
  if (publicKey.length !== 32 || signature.length !== 64) return false;
  try {
    return sodium.crypto_sign_verify_detached(signature, message, publicKey);
  } catch {
    return false;
  }
}

/** The body of `body | signature64` as the root's blobs travel, if the root signed it as what the tag says; else null. */
export function signedBody(rootPublicKey, tag, blob) {
  const body = blob.subarray(0, -64);
  return verify(rootPublicKey, concat(utf8(tag), body), blob.subarray(-64)) ? body : null;
}

/**
 * Whether these bytes are a public key that somebody can hold: canonical, on the curve, and of the group of prime order.
 * libsodium checks it where it turns such a key into one of X25519. (No point of prime order has a second way to write it.)
 */
export function isUsablePublicKey(publicKey) {
  if (publicKey.length !== 32) return false;
  try {
    sodium.crypto_sign_ed25519_pk_to_curve25519(publicKey);
    return true;
  } catch {
    return false;
  }
}

/** The 8 bytes by which an envelope names the key that signed it. */
export const contentKeyId = (publicKey) => sha256(utf8('SPK-id'), publicKey).subarray(0, 8);

export { sodium };
