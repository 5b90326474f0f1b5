-- Lanes: one a platform of an app. Platform numbers are those of protos/sealpush/v1/common.proto.

-- Data keys of the service, wrapped by the key outside PostgreSQL.
CREATE TABLE vault_keys (
    name    text PRIMARY KEY,
    wrapped bytea NOT NULL
);

-- Credentials of the push services, one row a lane. Settings rows have UUID keys, a version that rises with every change, and are
-- deleted by setting deleted_at: standby installations will copy them by version. Not read yet: the one APNs lane of today comes
-- from the process's settings, as the same `ProviderConfig` that a row will become.
CREATE TABLE providers (
    provider_id uuid PRIMARY KEY,
    app_id      text NOT NULL,
    platform    smallint NOT NULL,
    -- Which client: apns, fcm, hms. Apart from the platform, because one platform may change its push service.
    kind        text NOT NULL,
    -- What is no secret: key and team ids, project, hosts, default topic, wake-ups in flight.
    settings    jsonb NOT NULL DEFAULT '{}',
    -- The credential itself (.p8, service account, client secret), encrypted by the vault in the context "providers.secret".
    secret      bytea NOT NULL,
    version     bigint NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL,
    updated_at  timestamptz NOT NULL,
    deleted_at  timestamptz
);
CREATE UNIQUE INDEX providers_lane ON providers (app_id, platform) WHERE deleted_at IS NULL;

-- What operators decided about lanes; no row: open. Every dispatch process follows it.
CREATE TABLE lane_states (
    app_id     text NOT NULL,
    platform   smallint NOT NULL,
    paused     boolean NOT NULL,
    -- Who paused or resumed it.
    detail     text NOT NULL DEFAULT '',
    -- The last resume: also closes the breaker of a lane that stopped by itself, in every process.
    resumed_at timestamptz,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (app_id, platform)
);
