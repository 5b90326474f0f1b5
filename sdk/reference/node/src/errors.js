/** The envelope cannot be trusted or read here. Always the same: whoever forges must not learn which check stopped them. */
export class EnvelopeRefused extends Error {
  constructor() {
    super('the envelope was refused');
    this.name = 'EnvelopeRefused';
  }
}

/** A prekey, or the key of a recipient, is not to be sealed to. */
export class KeyRefused extends Error {
  constructor(message) {
    super(message);
    this.name = 'KeyRefused';
  }
}

/** A sender's entry is malformed, not signed by the pinned root, or outside its time. */
export class EntryRefused extends Error {
  constructor(message) {
    super(message);
    this.name = 'EntryRefused';
  }
}

/** This is not a receipt, or not one of the version that is read here. */
export class ReceiptRefused extends Error {
  constructor(message) {
    super(message);
    this.name = 'ReceiptRefused';
  }
}

/** A log of devices says what it cannot say. Tell the person; messages go on. */
export class DeviceLogBroken extends Error {
  constructor(message) {
    super(message);
    this.name = 'DeviceLogBroken';
  }
}

/** A revocation list is malformed or not signed by the pinned root. */
export class RevocationsRefused extends Error {
  constructor(message) {
    super(message);
    this.name = 'RevocationsRefused';
  }
}
