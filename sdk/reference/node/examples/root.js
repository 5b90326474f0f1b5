// For the example only: the platform's side, which senders never do themselves.

const u64 = (value) => {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(value));
  return bytes;
};

/** An entry for a sender with one key, good for a day, as signed by `root`. */
export function signEntry(root, { senderId, displayName, publicKey, nowMs }) {
  const name = Buffer.from(displayName.normalize('NFC'));
  const window = [u64(nowMs), u64(nowMs + 24 * 3600 * 1000)];
  const head = ['SPCE', Uint8Array.of(1, 1, 1), senderId, u64(1), ...window];
  const body = [...head, Uint8Array.of(name.length), name, Uint8Array.of(1), publicKey, ...window];
  const whole = Buffer.concat(body.map((part) => Buffer.from(part)));
  return Uint8Array.from(Buffer.concat([whole, root.sign(Buffer.concat([Buffer.from('SPC1-entry'), whole]))]));
}
