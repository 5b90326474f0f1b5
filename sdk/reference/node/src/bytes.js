// Reading and writing fields of fixed width, big-endian. A reader never goes past its end: it throws instead.

import { createHash, timingSafeEqual } from 'node:crypto';

/** No time here is later: what 48 bits hold. Below 2^53, so times are plain numbers. */
export const TIME_MS_MAX = 2 ** 48 - 1;
export const U64_MAX = 2n ** 64n - 1n;

export class Reader {
  #bytes;
  #position = 0;

  constructor(bytes) {
    this.#bytes = bytes;
  }

  get left() {
    return this.#bytes.length - this.#position;
  }

  get position() {
    return this.#position;
  }

  take(length) {
    if (length > this.left) throw new RangeError('the bytes end too early');
    this.#position += length;
    return this.#bytes.subarray(this.#position - length, this.#position);
  }

  u8() {
    return this.take(1)[0];
  }

  u16() {
    return this.#view(2).getUint16(0);
  }

  u32() {
    return this.#view(4).getUint32(0);
  }

  u64() {
    return this.#view(8).getBigUint64(0);
  }

  /** A time. One that 48 bits do not hold is refused here, before it could lose digits. */
  time() {
    const value = this.u64();
    if (value > BigInt(TIME_MS_MAX)) throw new RangeError('a time that is too late');
    return Number(value);
  }

  #view(length) {
    const bytes = this.take(length);
    return new DataView(bytes.buffer, bytes.byteOffset, length);
  }
}

export const u8 = (value) => number(1, value);
export const u16 = (value) => number(2, value);
export const u32 = (value) => number(4, value);
export const u64 = (value) => number(8, value);

/** The number in `width` bytes, or a RangeError if it is no whole number that fits. */
function number(width, value) {
  const whole = BigInt(value); // throws a RangeError for a fraction
  if (whole < 0n || whole >= 1n << BigInt(8 * width)) throw new RangeError(`a number does not fit ${width} bytes`);
  const bytes = new Uint8Array(width);
  for (let index = 0; index < width; index++) bytes[width - 1 - index] = Number((whole >> BigInt(8 * index)) & 0xffn);
  return bytes;
}

const encoder = new TextEncoder();
export const utf8 = (text) => encoder.encode(text);

export function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let position = 0;
  for (const part of parts) {
    whole.set(part, position);
    position += part.length;
  }
  return whole;
}

/** Throws a RangeError unless it holds. */
export function demand(holds, message) {
  if (!holds) throw new RangeError(message);
}

/** The same bytes, known to be as many as they should be. */
export function exactly(length, bytes, name) {
  if (!(bytes instanceof Uint8Array) || bytes.length !== length) throw new RangeError(`${name} must be ${length} bytes`);
  return bytes;
}

export const same = (one, other) => one.length === other.length && timingSafeEqual(one, other);
export const hex = (bytes) => Buffer.from(bytes).toString('hex');

export const sha256 = (...parts) => hash('sha256', parts);
export const sha512 = (...parts) => hash('sha512', parts);

function hash(name, parts) {
  const running = createHash(name);
  for (const part of parts) running.update(part);
  return new Uint8Array(running.digest());
}
