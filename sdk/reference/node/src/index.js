export { decodeEntry, encodeEntry, EntryKind, fingerprint, nextLog, startLog } from './devicelog.js';
export { CONTENT_BYTES_MAX, DEVICES_MAX, encode, forDevice, open, openSignedBy, parse, seal } from './envelope.js';
export { contentKeyOf, Mode, Role, verifyEntry } from './entries.js';
export { DeviceLogBroken, EntryRefused, EnvelopeRefused, KeyRefused, ReceiptRefused } from './errors.js';
export { choosePrekey, Kind, prekeyStatement, recipientOf, verifyPrekey } from './prekeys.js';
export { acknowledgementStatement, challengeStatement, changeStatement, Outcome, registrationStatement, vouchStatement } from './proofs.js';
export { Finding, readReceipt, verifyReceipt } from './receipts.js';
export { contentKeyId, signingKey, verify } from './signing.js';
export { isLowOrder, keyPair, SUITE_HYBRID, SUITE_X25519, SUITES } from './suites.js';
