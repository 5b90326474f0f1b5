export { CONTENT_BYTES_MAX, DEVICES_MAX, encode, forDevice, open, openSignedBy, parse, seal } from './envelope.js';
export { contentKeyOf, Mode, Role, verifyEntry } from './entries.js';
export { EntryRefused, EnvelopeRefused, KeyRefused, RevocationsRefused } from './errors.js';
export { choosePrekey, isLowOrder, Kind, prekeyStatement, recipientOf, SUITE_X25519, SUITES, verifyPrekey } from './prekeys.js';
export { acknowledgementStatement, challengeStatement, changeStatement, Outcome, registrationStatement } from './proofs.js';
export { REVOCATIONS_MAX, revokesEntry, revokesKey, verifyRevocations } from './revocations.js';
export { contentKeyId, signingKey, verify } from './signing.js';
