import { test } from 'node:test';

test('the example runs', () => import('../examples/round-trip.js'));
