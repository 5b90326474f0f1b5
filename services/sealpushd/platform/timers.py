"""The registry of timers: everything that waits, ends or is renewed, the clock that measures it, and what bounds it when a clock is set.

Nothing reads it while services run. A test finds every use of a wall clock in services and the SDK, and fails for one that does not stand
here; another walks the clock ahead and back under each timer; the table in docs/operations.md is compared with it. So who adds a use of a
wall clock says here why it must be one, and what happens when somebody sets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Measure(Enum):
    """Which clock a timer goes by."""

    # Setting the wall clock does not touch it.
    STEADY = "steady"
    # A moment that was stored, signed or sent: a bound says how far ahead it can honestly be.
    MOMENT = "wall, bounded"
    # As a moment, by PostgreSQL's clock, which is the one clock of all processes.
    DATABASE = "PostgreSQL's, bounded"
    # Written down or shown to people; nothing waits for it.
    SHOWN = "wall, shown only"
    # Of a phone, a sender, a simulator, or the machine of the root: no server's.
    ELSEWHERE = "not a server's"


@dataclass(frozen=True, slots=True)
class Timer:
    """`bound` says what a clock that was set leaves behind. `uses` are where a wall clock is read, as `path name`."""

    name: str
    measure: Measure
    bound: str
    uses: tuple[str, ...] = ()


TIMERS: Final = (
    # dispatch
    Timer("lane breaker", Measure.STEADY, "nothing; a lane that is stopped tries again when its clock was set, and after 5 minutes anyway"),
    Timer("slowing down of a lane", Measure.STEADY, "nothing"),
    Timer("rate of a lane", Measure.STEADY, "nothing"),
    Timer("access tokens of FCM and HMS", Measure.STEADY, "nothing; a token that is refused is replaced at once"),
    Timer("failures of a token endpoint", Measure.STEADY, "nothing: 2 seconds to a minute, and not after `lanes resume`"),
    Timer("proved connections", Measure.STEADY, "nothing"),
    Timer("refused credential files", Measure.STEADY, "nothing: asked again after a minute"),
    Timer("lines left out of the log", Measure.STEADY, "nothing"),
    Timer(
        "provider token of APNs",
        Measure.MOMENT,
        "signed anew with the first push after the clock was set by more than 30 seconds",
        ("dispatch/providers/apns.py ProviderTokens._issue",),
    ),
    Timer(
        "assertions for FCM",
        Measure.MOMENT,
        "made anew for each request of an access token",
        ("dispatch/providers/fcm.py FcmProvider.__init__",),
    ),
    Timer(
        "receipts of Huawei",
        Measure.MOMENT,
        "refused while the clock differs by more than 5 minutes; remembered for 10 minutes by the steady clock",
        ("dispatch/listener.py ReceiptsListener._signed_body",),
    ),
    Timer(
        "next try of a wake-up",
        Measure.DATABASE,
        "reported as a delay, of 30 minutes at the most; a stored moment further ahead is due within 30 seconds",
        (
            "dispatch/session.py _Held.report",
            "fetch/sql/claim.sql",
            "fetch/sql/pull_back.sql",
            "fetch/sql/queues.sql",
            "fetch/sql/report.sql",
            "fetch/sql/requeue.sql",
        ),
    ),
    Timer(
        "lifetime of a wake-up in dispatch",
        Measure.STEADY,
        "nothing: the mailbox says what is left of it",
        ("dispatch/session.py _Held.__init__", "dispatch/session.py _Held.expires_at"),
    ),
    Timer(
        "answers of push services",
        Measure.MOMENT,
        "a date counts from the answer's own Date; a pause is 15 minutes at the most; a time of death is compared once",
        (
            "dispatch/providers/apns.py ApnsProvider._exchange",
            "dispatch/providers/apns.py ApnsProvider._send",
            "dispatch/providers/oauth.py AuthorizedSends._ask_for_grant",
            "dispatch/providers/oauth.py AuthorizedSends._exchange",
        ),
    ),
    Timer(
        "requests to push services",
        Measure.MOMENT,
        "a lifetime is what is left by the steady clock, whatever the wall clock says",
        (
            "dispatch/providers/apns.py ApnsProvider.probe",
            "dispatch/providers/fcm.py FcmProvider.probe",
            "dispatch/providers/fcm.py FcmProvider.send",
            "dispatch/providers/hms.py HmsProvider.probe",
            "dispatch/providers/hms.py HmsProvider.send",
        ),
    ),
    Timer(
        "what operators see of lanes and credentials",
        Measure.SHOWN,
        "wrong times in what is shown; resuming a lane counts whatever its time",
        (
            "dispatch/credentials.py Credentials.put",
            "dispatch/credentials.py Credentials.remove",
            "dispatch/lanes.py Lane.observe",
            "dispatch/service.py LanesService.ListLanes",
            "dispatch/service.py LanesService.PauseLane",
            "dispatch/service.py LanesService._resume",
        ),
    ),
    # Tokens
    Timer(
        "mesh token",
        Measure.MOMENT,
        "signed anew with the first call after the clock was set by more than 30 seconds",
        ("platform/tokens.py ServiceKey.mesh_token",),
    ),
    Timer(
        "tokens of senders and devices",
        Measure.MOMENT,
        "refused when made more than 30 seconds ahead, and their holder signs in again; never longer than 2 hours and 15 minutes",
        ("platform/tokens.py ServiceKey.sign", "platform/tokens.py TokenVerifier._verify"),
    ),
    Timer(
        "verified tokens",
        Measure.MOMENT,
        "nothing: one that is remembered is taken between the same two moments as one that is looked at anew",
        ("platform/rpc.py _guard.enter", "platform/tokens.py TokenVerifier.verify_until"),
    ),
    # registration
    Timer(
        "challenges of devices",
        Measure.MOMENT,
        "one answered while the clock was ahead does not count",
        (
            "registration/service.py RegistrationService.GetChallenge",
            "registration/service.py RegistrationService._answered",
            "registration/service.py RegistrationService._take_challenges",
        ),
    ),
    Timer(
        "codes",
        Measure.MOMENT,
        "another code is given after the usual 30 seconds, a minute at the most; one that ends more than a day ahead goes within an hour",
        (
            "registration/service.py RegistrationService._new_registration",
            "registration/service.py RegistrationService.ConfirmRegistration",
        ),
    ),
    Timer(
        "purge of codes",
        Measure.STEADY,
        "nothing: once an hour, and what is over by PostgreSQL's clock and by the process's",
        ("registration/outbox.py Outbox.run", "registration/sql/purge_registrations.sql"),
    ),
    Timer(
        "registration locks and numbers in use",
        Measure.MOMENT,
        "a wrong PIN or a use of the future counts from the moment on that it is looked at",
        ("registration/service.py RegistrationService.SetRegistrationLock",),
    ),
    Timer(
        "dead push tokens",
        Measure.MOMENT,
        "a registration of the future, by more than 5 minutes, does not keep a token that is called dead",
        ("registration/service.py DirectoryService.ReportDeadTokens",),
    ),
    Timer(
        "telling other services",
        Measure.MOMENT,
        "what is due more than a minute ahead is due now",
        (
            "registration/outbox.py Outbox.run_once",
            "registration/service.py RegistrationService.RemoveDevice",
            "registration/service.py RegistrationService.SetPreference",
            "registration/service.py RegistrationService.Unregister",
        ),
    ),
    Timer("apps that registration remembers", Measure.STEADY, "nothing"),
    Timer(
        "times of registrations",
        Measure.SHOWN,
        "wrong times in the database and towards phones, which bound the server's time themselves",
        (
            "registration/service.py RegistrationService.Authenticate",
            "registration/service.py RegistrationService.StartRegistration",
            "registration/service.py RegistrationService.UpdateInstallation",
        ),
    ),
    # Limits
    Timer(
        "rate limits",
        Measure.MOMENT,
        "a window that a clock ahead used up is used up when the present comes to it; never longer than a window",
        (
            "platform/limits.py Limiter._exceeded",
            "platform/limits.py Limiter._now",
            "platform/limits.py Limiter.add",
            "platform/limits.py Limiter.check",
            "platform/limits.py Limiter.take",
            "platform/limits.py PostgresCounter.count",
        ),
    ),
    # accounts
    Timer("profiles and lists that accounts remembers", Measure.STEADY, "nothing"),
    Timer(
        "addresses known from a sign-in",
        Measure.MOMENT,
        "one noted more than 5 minutes ahead is not known, until the next sign-in from there",
        ("accounts/service.py AccountsService._authenticated",),
    ),
    Timer(
        "times of administration",
        Measure.SHOWN,
        "wrong times in the database and the journal; an entry must be in force when it is put",
        (
            "accounts/service.py AdministrationService.PutApp",
            "accounts/service.py AdministrationService.PutOrganisation",
            "accounts/service.py AdministrationService.PutPlatformEntry",
            "accounts/service.py AdministrationService.PutRevocations",
            "accounts/service.py AdministrationService.PutSender",
        ),
    ),
    # keys
    Timer(
        "one-time prekeys handed out",
        Measure.MOMENT,
        "one handed out by a clock ahead counts against its sender for a day, once the present has come so far; the signed prekey serves",
        ("keys/service.py KeysService.GetRecipientKeys", "keys/sql/0002_handouts.sql"),
    ),
    Timer(
        "lifetimes of prekeys",
        Measure.MOMENT,
        "what phones signed decides: a key counts as ended while the clock is ahead, and serves again once it is right",
        (
            "keys/service.py KeysService.GetPrekeyState",
            "keys/service.py KeysService.UploadPrekeys",
            "keys/service.py SealingService.CheckStanzas",
            "keys/service.py SealingService.Seal",
        ),
    ),
    Timer(
        "times of the device log",
        Measure.SHOWN,
        "wrong times in front of people; the log's order is its own",
        (
            "keys/service.py KeysService.VouchDevice",
            "keys/service.py SealingService.PutDevices",
            "keys/service.py SealingService.RemoveDevices",
        ),
    ),
    # publishing and fetch
    Timer("senders that publishing remembers", Measure.STEADY, "nothing"),
    Timer(
        "acceptance of messages",
        Measure.MOMENT,
        "an envelope made more than 5 minutes from the clock is refused, to be sealed again; an entry must be in force",
        ("publishing/acceptance.py Acceptance._parse",),
    ),
    Timer(
        "ids by the clock",
        Measure.MOMENT,
        "an id never goes back by less than a minute, and carries the present after more",
        ("sdk/ids.py uuid7",),
    ),
    Timer(
        "dispatchers that hold wake-ups",
        Measure.DATABASE,
        "one seen in the future is lost, and there again with its next heartbeat, after 5 seconds",
        ("fetch/sql/keep_sessions.sql", "fetch/sql/lost_sessions.sql"),
    ),
    Timer(
        "ends of deliveries",
        Measure.DATABASE,
        "PostgreSQL's clock is the judge: what it ended while it was ahead stays ended",
        (
            "fetch/sql/close.sql",
            "fetch/sql/grace.sql",
            "fetch/sql/late_ack.sql",
            "fetch/sql/lock_asked.sql",
            "fetch/sql/lock_overdue.sql",
            "fetch/sql/lock_quarantined.sql",
            "fetch/sql/read.sql",
            "fetch/sql/store.sql",
            "fetch/sql/take.sql",
            "fetch/sql/waiting_ids.sql",
        ),
    ),
    Timer(
        "partitions and retention",
        Measure.DATABASE,
        "nothing is dropped while PostgreSQL's clock and that of `db maintain` differ by more than an hour",
        ("fetch/sql/0001_first.sql", "fetch/sql/0004_journal.sql", "up/maintenance.py maintain"),
    ),
    Timer(
        "times towards phones, and the age of a queue",
        Measure.SHOWN,
        "a wrong age until the clock is right; phones bound the server's time themselves",
        ("fetch/queues.py Queues.refresh", "fetch/service.py _now"),
    ),
    # The machine
    Timer(
        "the watch over the clock",
        Measure.STEADY,
        "nothing: it sees the clock set within 5 seconds, and PostgreSQL's differ within a minute",
        (
            "platform/clock.py Reading._moved_s",
            "platform/clock.py Reading.of",
            "platform/clock.py SystemClock.epoch_s",
            "platform/clock.py SystemClock.now",
            "platform/clockwatch.py ClockWatch.__init__",
            "platform/clockwatch.py ClockWatch.compare",
            "platform/clockwatch.py ClockWatch.look",
            "platform/server.py Runtime.database.clock_of_database",
        ),
    ),
    Timer(
        "certificates of `sealpush up`",
        Measure.MOMENT,
        "made anew with the next start where they are not in force",
        ("platform/tls.py LocalAuthority.__init__", "platform/tls.py LocalAuthority.issue"),
    ),
    Timer(
        "what commands show",
        Measure.SHOWN,
        "wrong ages and warnings while the clock is wrong; `sealpush doctor` says that it is",
        (
            "cli/accounts.py ending_entries",
            "cli/checks.py check_certificate",
            "cli/checks.py check_clock",
            "cli/checks.py check_entries",
            "cli/checks.py check_partitions",
            "cli/checks.py check_push",
            "cli/checks.py check_service_clock",
            "cli/lanes.py lanes",
            "cli/providers.py _expiry",
            "platform/migrate.py _holder",
            "platform/migrate.py migrate",
        ),
    ),
    Timer(
        "the root's machine",
        Measure.ELSEWHERE,
        "entries begin an hour before its time; what a slow clock signed is refused",
        ("certify.py now_ms",),
    ),
    Timer(
        "phones and senders",
        Measure.ELSEWHERE,
        "they go by the server's time, which they bound ([protocol](device-protocol.md))",
        (
            "sdk/device.py Device._confirm",
            "sdk/device.py Device._confirm.prepare",
            "sdk/device.py Device.diagnose",
            "sdk/device.py Device.mark_read",
            "sdk/devices.py Devices._read_anew",
            "sdk/devices.py Devices.tell_restored",
            "sdk/inbox.py Inbox.messages",
            "sdk/inbox.py Inbox._left",
            "sdk/inbox.py Inbox._mark",
            "sdk/inbox.py Inbox._waiting",
            "sdk/local.py ServerTime.bounded_ms",
            "sdk/local.py ServerTime.jumped",
            "sdk/local.py ServerTime.learn",
            "sdk/local.py ServerTime.local_ms",
            "sdk/local.py ServerTime.now_ms",
            "sdk/receiving.py Receiver._delivered",
            "sdk/receiving.py Receiver._inbox_message",
            "sdk/receiving.py Receiver._is_over",
            "sdk/receiving.py Receiver._refuse",
            "sdk/retry.py SystemClock.now_ms",
            "sdk/sender.py Sender._seal",
            "sdk/sender.py Sender._sign_in",
            "sdk/session.py Session._answer_challenge",
            "sdk/upkeep.py Upkeep.do",
            "sdk/upkeep.py Upkeep.do_if_due",
        ),
    ),
    # They play the vendors, whose clocks are their own.
    Timer("simulated push services", Measure.ELSEWHERE, "nothing of a service", ("simulators/",)),
)
