"""`sealpush up` and the commands beside it: real processes, real engines, killed for real."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.suite import free_base
from sealpush.ids import SenderId, uuid7, uuid_text
from sealpush.keys import ContentSigningKey, PrekeyKind, RootKey, SenderMode
from sealpush.model import State
from sealpush.publication import Accepted
from sealpush.retry import RetryPolicy
from sealpush.sender import Sender
from sealpush.sqlite_keystore import SqliteKeystore
from sealpush.suites import SUITE_HYBRID, SUITE_X25519
from sealpush.transport import Channels
from sealpush.v1 import common_pb2
from sealpush.v1.content_pb2 import Content
from sealpushd import rootfile
from sealpushd.certify import platform_entry, sender_entry
from sealpushd.platform.db import connect
from sealpushd.platform.outage import WORDINGS_MAX
from sealpushd.signedfile import SignedFile
from sealpushd.up.endpoints import Endpoints
from sealpushd.up.errors import UpError
from sealpushd.up.ports import SERVICES
from sealpushd.up.sdk import content_key, public_endpoints
from sealpushd.up.secrets import load_root

PHONE = "+380501234567"
SWITCHED_OFF_PHONE = "+380501234569"
ENGINES = ("postgres", "valkey")
# For a machine that does something else as well; what is waited for takes a fraction.
PATIENCE_S = 120.0


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sealpushd", *map(str, arguments)]


def run(*arguments: str | Path, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SEALPUSH_")}
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, env=inherited | environment, check=False
    )


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


class Up:
    """One `sealpush up`, as a process."""

    def __init__(self, data_dir: Path, base_port: int) -> None:
        self.data_dir = data_dir
        self.base_port = base_port
        self._output = data_dir.with_name(f"{data_dir.name}.out")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command("up", "--data-dir", data_dir, "--base-port", str(base_port), "--no-show"),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        eventually(lambda: self._is_ready() or self.process.poll() is not None, "up is ready")
        assert self.process.poll() is None, self._output.read_text()

    def _is_ready(self) -> bool:
        with contextlib.suppress(UpError):
            return self.endpoints.pid == self.process.pid
        return False

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def endpoints(self) -> Endpoints:
        return Endpoints.load(self.data_dir)

    def children(self) -> dict[str, int]:
        """Name to pid of every process that `up` started."""
        found = {}
        for pid in map(int, (Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")).read_text().split()):
            with contextlib.suppress(OSError):
                name = name_of(Path(f"/proc/{pid}/cmdline").read_bytes())
                if name:
                    found[name] = pid
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def name_of(cmdline: bytes) -> str:
    arguments = cmdline.decode().split("\0")
    if "serve" in arguments:
        return arguments[arguments.index("serve") + 1]
    if "simulate" in arguments:
        return "simulators"
    for engine in ENGINES:
        if Path(arguments[0]).name.startswith(engine):
            return engine
    return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(data_dir: Path) -> list[str]:
    """Command lines of the processes that have to do with a data directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                environment, cmdline = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
                if str(data_dir).encode() in environment + cmdline and is_alive(int(process.name)):
                    found.append(cmdline.replace(b"\0", b" ").decode())
    return found


def folder() -> Path:
    """Where any user may pass, and short enough for sockets."""
    parent = Path(tempfile.mkdtemp(prefix="up-"))
    parent.chmod(0o755)
    return parent


@pytest.fixture(scope="session")
def up() -> Iterator[Up]:
    parent = folder()
    running = Up(parent / "data", free_base())
    yield running
    assert running.end() == 0
    shutil.rmtree(parent)


@pytest.fixture
def own_data_dir() -> Iterator[Path]:
    parent = folder()
    yield parent / "data"
    shutil.rmtree(parent, ignore_errors=True)


@contextlib.asynccontextmanager
async def bank(up: Up) -> AsyncIterator[Sender]:
    endpoints = up.endpoints
    async with Channels(public_endpoints(endpoints)) as channels:
        yield Sender(channels, endpoints.login, endpoints.password, sender_name="demo-bank")


def inbox(up: Up, phone: str, prefix: str) -> Counter[str]:
    """The bodies in a phone's own store that begin with the prefix, and how often each stands there."""
    found: Counter[str] = Counter()
    with SqliteKeystore(up.data_dir / "phones" / f"{phone}.sqlite") as keystore:
        before = None
        while page := keystore.inbox(before=before):
            before = page[-1].local_id
            bodies = (Content.FromString(each.content).body for each in page)
            found.update(body for body in bodies if body.startswith(prefix))
    return found


def has_exactly(up: Up, phone: str, prefix: str, bodies: dict[str, int]) -> bool:
    return inbox(up, phone, prefix) == bodies


async def one_time_prekeys_of(up: Up, sender_id: bytes) -> dict[bytes, list[tuple[int, int]]]:
    """Suite and id of those that a sender got, by device."""
    connection = await connect(up.endpoints.postgres_url)
    try:
        rows = await connection.fetch("SELECT device_id, suite, prekey_id FROM keys.handouts WHERE sender_id = $1", sender_id)
    finally:
        await connection.close()
    return {
        each: [(row["suite"], row["prekey_id"]) for row in rows if row["device_id"] == each] for each in {row["device_id"] for row in rows}
    }


def has_destroyed(up: Up, phone: str, handed_out: dict[bytes, list[tuple[int, int]]]) -> bool:
    """Whether the private halves of what was handed out of a phone are gone."""
    with SqliteKeystore(up.data_dir / "phones" / f"{phone}.sqlite") as keystore:
        registration = keystore.registration()
        assert registration is not None
        names = handed_out[registration.device_id]
        assert keystore.prekey_count(PrekeyKind.ONE_TIME) > 0
        return all(keystore.prekey(suite, prekey_id, PrekeyKind.ONE_TIME) is None for suite, prekey_id in names)


def there_is(folder: Path, pattern: str) -> bool:
    return any(folder.glob(pattern))


def last_json(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text.splitlines()[-1])
    return document


def test_the_show_ends_as_it_should_and_again_on_the_same_directory(own_data_dir: Path) -> None:
    base_port = free_base()
    for _ in range(2):
        done = run("up", "--data-dir", own_data_dir, "--base-port", str(base_port), "--then-exit")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        summary = last_json(done.stdout)
        assert {name: summary[name] for name in ("sent", "delivered", "blocked", "not_registered", "cancelled", "unexpected")} == {
            "sent": 5,
            "delivered": 2,
            "blocked": 1,
            "not_registered": 1,
            "cancelled": 1,
            "unexpected": 0,
        }
        assert 0 < summary["ready_seconds"] <= summary["seconds"]
        assert not (own_data_dir / "run" / "endpoints.json").exists()
    # What people read says what passed the push service, and the texts are not in it.
    pushed = [line for line in done.stdout.splitlines() if " went only " in line]
    assert [line.split()[1] for line in pushed] == ["APNs", "FCM", "HMS"] * 2
    assert not any(word in line for line in pushed for word in ("UAH", "4071", PHONE))


def test_an_operator_sees_and_steers_the_lanes(up: Up) -> None:
    where = ("--data-dir", up.data_dir)
    for platform in ("ios", "android", "huawei"):
        tested = run("providers", "test", "demo-bank", platform, *where)
        assert (tested.returncode, tested.stdout.splitlines()[-1]) == (0, "the credential works"), tested.stdout
    assert run("lanes", "pause", "demo-bank", "android", *where).returncode == 0
    sent = run("send", PHONE, "while a lane is paused", "--wait", "30s", "--json", *where)
    assert last_json(sent.stdout)["state"] == "DELIVERED", "the other lanes go on"

    def lanes() -> dict[str, Any]:
        return {lane["platform"]: lane for lane in json.loads(run("lanes", "--json", *where).stdout)}

    paused = lanes()["android"]
    assert (paused["state"], paused["queued"]) == ("paused", 1)
    assert paused["oldest_seconds"] >= 0
    assert run("lanes", "resume", "demo-bank", "android", *where).returncode == 0
    eventually(lambda: lanes()["android"]["queued"] == 0, "the queue is worked off")
    assert {lane["state"] for lane in lanes().values()} == {"open"}
    assert run("doctor", *where).stdout.splitlines()[-1] == "all is well"


@pytest.mark.parametrize("sealed", [False, True], ids=["sealed by the server", "sealed by the sender"])
def test_a_message_sent_from_a_second_terminal_arrives(up: Up, sealed: bool) -> None:
    text = f"from a terminal, sealed={sealed}"
    options = ["--sealed"] if sealed else []
    sent = run("send", PHONE, text, "--wait", "30s", "--json", "--tag", "t1", *options, "--data-dir", up.data_dir)
    assert sent.returncode == 0, sent.stderr
    status = last_json(sent.stdout)
    assert (status["state"], status["tag"], len(status["deliveries"])) == ("DELIVERED", "t1", 4)

    again = run("status", status["message_id"], "--watch", "--data-dir", up.data_dir)
    assert again.returncode == 0
    assert f"{status['message_id']}  DELIVERED" in again.stdout
    explained = run("explain", status["message_id"], "--data-dir", up.data_dir)
    assert "was delivered: the phone opened it and signed that it did." in explained.stdout
    for phone in ("phone-1", "phone-2"):
        eventually(partial(has_exactly, up, phone, text, {text: 1}), f"{phone} has the message")


def files_with(words: str, *folders: Path) -> list[Path]:
    """Files below these folders that hold the words. What vanishes meanwhile holds nothing."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_file() and words.encode() in path.read_bytes():
                found.append(path)
    return found


def test_a_thief_of_the_disks_finds_no_content_and_no_number(up: Up) -> None:
    """The claim of docs/security.md, byte by byte: PostgreSQL's files and its log of writes, Valkey's, and the logs of all processes."""
    texts = {sealed: f"secret {uuid7().hex()}" for sealed in (False, True)}
    tags = {sealed: f"tag {uuid7().hex()}" for sealed in (False, True)}
    for sealed, text in texts.items():
        options = ["--sealed"] if sealed else []
        # Delivered to one person's phones, and waiting for a phone that is switched off.
        delivered = run("send", PHONE, text, "--wait", "30s", "--json", "--tag", tags[sealed], *options, "--data-dir", up.data_dir)
        assert last_json(delivered.stdout)["state"] == "DELIVERED"
        waiting = run("send", SWITCHED_OFF_PHONE, text, "--json", "--tag", tags[sealed], *options, "--data-dir", up.data_dir)
        assert last_json(waiting.stdout)["message_id"], waiting.stdout
        eventually(partial(has_exactly, up, "phone-1", text, {text: 1}), "the phone has it")
    postgres, valkey, log = (up.data_dir / name for name in ("postgres", "valkey", "log"))
    for sealed, text in texts.items():
        # What the sender calls visible is found: so the search would find the rest.
        assert files_with(tags[sealed], postgres)
        assert files_with(text, postgres, valkey, log) == []
    assert files_with(PHONE.removeprefix("+"), postgres, valkey, log) == []


def test_a_message_can_be_cancelled_and_explained(up: Up) -> None:
    sent = run("send", SWITCHED_OFF_PHONE, "never read", "--json", "--data-dir", up.data_dir)
    message_id = last_json(sent.stdout)["message_id"]
    waiting = run("explain", message_id, "--data-dir", up.data_dir)
    assert "The installation has no push token" in waiting.stdout or "switched pushes off" in waiting.stdout
    assert "It is tried until" in waiting.stdout
    cancelled = run("cancel", message_id, "--json", "--data-dir", up.data_dir)
    assert cancelled.returncode == 0
    assert last_json(cancelled.stdout)["state"] == "CANCELLED"
    assert [each["stop_point"] for each in last_json(cancelled.stdout)["deliveries"]] == ["BEFORE_PUSH"]
    assert "The sender cancelled it." in run("explain", message_id, "--data-dir", up.data_dir).stdout


@pytest.mark.parametrize("sealed", [False, True], ids=["sealed by the server", "sealed by the sender"])
def test_a_receipt_verifies_where_nothing_runs(up: Up, sealed: bool, tmp_path: Path) -> None:
    options = ["--sealed"] if sealed else []
    sent = run("send", PHONE, "for the record", "--wait", "30s", "--json", *options, "--data-dir", up.data_dir)
    message_id = last_json(sent.stdout)["message_id"]
    file = tmp_path / "receipt.json"
    shown = run("receipt", message_id, "--out", file, "--data-dir", up.data_dir)
    assert (shown.returncode, shown.stderr) == (0, "")
    root = Endpoints.load(up.data_dir).root_public_key
    offline = run("receipt", "--verify", file, "--root-public-key", root, "--data-dir", tmp_path / "nothing")
    assert (offline.returncode, offline.stdout) == (0, shown.stdout)
    assert "The sender's part is proven" in offline.stdout
    file.write_text(file.read_text().replace('"outcome": 1', '"outcome": 2', 1))
    assert run("receipt", "--verify", file, "--root-public-key", root).returncode == 1


def test_the_same_request_id_sends_once(up: Up) -> None:
    answers = [last_json(run("send", PHONE, "once", "--request-id", "r-1", "--json", "--data-dir", up.data_dir).stdout) for _ in range(2)]
    assert answers[0] == answers[1]


def test_mistakes_are_told_in_one_line(up: Up) -> None:
    nobody = run("send", "+380501234560", "x", "--data-dir", up.data_dir)
    assert nobody.returncode == 1
    assert nobody.stdout.startswith("NOT_REGISTERED  Nobody registered this phone number")
    for arguments, exit_code, words in (
        (["send", "12", "x"], 1, "phone number"),
        (["send", PHONE, "x", "--from", "nobody"], 2, "there are: demo-bank, demo-shop"),
        (["status", "x"], 2, "is no message id"),
        (["explain", "0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"], 1, "no sender here has a message"),
        (["receipt", "0199a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"], 1, "no sender here has a message"),
    ):
        done = run(*arguments, "--data-dir", up.data_dir)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (exit_code, "", 1), done.stderr
        assert words in done.stderr


def test_the_examples_of_the_readme_run(up: Up, tmp_path: Path) -> None:
    """As printed, but for the addresses, the password and the key of this machine."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    program, trying_it, sealed = (block.partition("```")[0] for block in readme.split("```python\n")[1:])
    imports, _, sender = trying_it.replace('Path("data")', f"Path({str(up.data_dir)!r})").rpartition("\nsender = ")
    changed = program.replace('Sender(Endpoints.single("push.example:443"), "login", "password")', sender.strip())
    assert changed != program
    before, at, after = changed.partition("\n\nasync def main()")
    assert ran(before + imports + at + after)[-1] == "DELIVERED"

    key_file = tmp_path / "sender.key"
    key_file.write_text(content_key(Endpoints.load(up.data_dir), "demo-bank").seed.hex() + "\n")
    with_key = sealed.replace('Path("sender.key")', f"Path({str(key_file)!r})")
    assert with_key != sealed
    asked_for = with_key.replace("identity_unchanged_for=timedelta(days=1)", "identity_unchanged_for=timedelta(seconds=1)")
    given = (
        "\nfrom datetime import timedelta\nfrom sealpush import ContentSigningKey\nendpoints = public_endpoints(demo)\n"
        "content = Content(content_class=ContentClass.INFORMATIONAL, title='Payment', body='You paid 120.50.')\n"
    )
    for example, answer in ((with_key, "IdentityChanged"), (asked_for, "Accepted")):
        signed_in = example.replace('"login", "password"', "demo.login, demo.password, sender_name='demo-bank'")
        assert signed_in != example
        body = "".join(f"    {line}\n" for line in signed_in.splitlines())
        wrapped = f"async def main() -> None:\n{body}    print(type(outcome).__name__)\n\nasyncio.run(main())\n"
        # The phones of this machine were registered a moment ago.
        assert ran(before + imports + given + wrapped)[-1] == answer


def ran(program: str) -> list[str]:
    """The lines that a program prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def put(up: Up, what: str, *arguments: str | Path, stdin: str = "") -> str:
    """What `sealpush accounts` printed."""
    done = run("accounts", what, *arguments, "--data-dir", up.data_dir, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


async def test_an_operator_sets_up_an_organisation_whose_sender_reaches_the_phone(up: Up, tmp_path: Path) -> None:
    sender_key, entry, password = tmp_path / "sender.key", tmp_path / "sender.entry", "twelve or more"
    organisation_id = put(up, "put-organisation", "post", "--name", "Post", "--network", "127.0.0.0/8", "--password-stdin", stdin=password)
    assert put(up, "put-organisation", "post", "--name", "The Post", "--password-stdin") == organisation_id
    public_key = bytes.fromhex(run("accounts", "new-sender-key", sender_key).stdout)
    # The demo's root lies beside it, in the clear; a real one is `sealpush root`'s.
    root, modes = load_root(Path(up.endpoints.demo_folder) / "root.key"), SenderMode.SERVER | SenderMode.END_TO_END
    sender_id = uuid7()

    def certify(name: str) -> None:
        certified = sender_entry(SenderId(sender_id), name, modes, [public_key], days=90)
        entry.write_bytes(SignedFile.of_entry(root, certified).encode())

    certify("Post")
    whole = ("put-sender", organisation_id, "post", "--entry", entry, "--app", up.endpoints.app_id, "--colour", "#0a7c4a", "--default")
    assert put(up, *whole) == uuid_text(sender_id)
    certify("The Post")
    assert json.loads(put(up, *whole, "--json")) == {"sender_id": uuid_text(sender_id)}

    content = Content(body="put by an operator", content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL)
    signing_key = ContentSigningKey.from_seed(bytes.fromhex(sender_key.read_text()))
    async with (
        asyncio.timeout(PATIENCE_S),
        Channels(public_endpoints(up.endpoints)) as channels,
        Sender(channels, "post", password, signing_key=signing_key) as sender,
    ):
        for publish in (sender.publish, sender.publish_sealed):
            outcome = await publish(PHONE, content)
            assert isinstance(outcome, Accepted), outcome
            states = [status.state async for status in sender.watch([outcome.message_id])]
            assert states[-1] is State.DELIVERED
        # More than this sender gets one-time prekeys for: all arrive, the last ones sealed to the signed prekeys.
        outcomes = [await sender.publish_sealed(PHONE, content, request_id=f"sealed-{n}") for n in range(12)]
        messages = [each.message_id for each in outcomes if isinstance(each, Accepted)]
        assert len(messages) == 12
        async for status in sender.watch(messages):
            assert not status.state.terminal or status.state is State.DELIVERED
    handed_out = await one_time_prekeys_of(up, sender_id)
    assert sorted(map(len, handed_out.values())) == [10] * 4
    assert sorted(sorted({suite for suite, _ in names}) for names in handed_out.values()) == [[SUITE_X25519]] * 3 + [[SUITE_HYBRID]]
    for phone in ("phone-1", "phone-2", "phone-4", "phone-5"):
        await asyncio.to_thread(eventually, partial(has_destroyed, up, phone, handed_out), f"{phone} has destroyed what was used")
    refused = run("accounts", *whole, "--app", "no-such-app", "--data-dir", up.data_dir)
    assert refused.returncode == 1
    assert "no such app: no-such-app; put it first" in refused.stderr


def test_two_people_certify_and_revoke_for_an_app_with_a_root_of_its_own(up: Up, tmp_path: Path) -> None:
    root, root_key, passphrases = tmp_path / "root.json", RootKey.generate(), []
    for name in ("Anna", "Borys"):
        (tmp_path / name).write_text(f"the passphrase of {name}")
        passphrases += ["--passphrase-file", f"{name}={tmp_path / name}"]
    # As `root create` does, but for the seconds and the gibibyte that each passphrase costs there.
    people = {name: f"the passphrase of {name}" for name in ("Anna", "Borys")}
    root.write_bytes(rootfile.create(root_key, people, cost=rootfile.Cost(1, 8192)).encode())

    def signed(what: str, out: str, *arguments: str | Path) -> Path:
        done = run("root", what, root, "--out", tmp_path / out, *arguments, *passphrases)
        assert (done.returncode, done.stdout) == (0, f"signed: {tmp_path / out}\n"), done.stderr
        return tmp_path / out

    assert put(up, "put-app", "ua.post", "--name", "Post", "--root-public-key", root_key.public_key.hex()) == "ua.post"
    platform_key = put(up, "platform-key")
    platform = signed("certify-platform", "platform.entry", "--key", platform_key)
    assert put(up, "put-platform", "--entry", platform) == platform_key
    organisation_id = put(up, "put-organisation", "ua-post", "--name", "Post", "--password-stdin", stdin="twelve or more")
    certify = ("--display-name", "Post", "--mode", "server")
    sender = ("put-sender", organisation_id, "post", "--app", "ua.post", "--entry")
    entry = signed("certify-sender", "post.entry", *certify, "--days", "3")
    sender_id = put(up, *sender, entry)
    doctor = run("doctor", "--data-dir", up.data_dir)
    assert doctor.returncode == 1
    [line] = [line for line in doctor.stdout.splitlines() if line.startswith("FAIL")]
    assert "entry of Post" in line
    assert f"certify-sender --sender-id {sender_id}" in line

    revoked = signed("revoke", "list", "--new", "--sender-id", sender_id)
    published = run("accounts", "put-revocations", revoked, "--data-dir", up.data_dir)
    assert (published.stdout, published.returncode) == ("1\n", 0)
    assert f"the entry of the sender Post, {sender_id}" in published.stderr
    again = run("accounts", *sender, entry, "--data-dir", up.data_dir)
    assert again.returncode == 1
    assert "the root revoked this entry; certify a new one" in again.stderr
    assert put(up, *sender, signed("certify-sender", "new.entry", *certify, "--sender-id", sender_id)) == sender_id

    demo = tmp_path / "demo.entry"
    demo_root = load_root(Path(up.endpoints.demo_folder) / "root.key")
    demo.write_bytes(SignedFile.of_entry(demo_root, platform_entry(bytes.fromhex(platform_key), days=1)).encode())
    refused = run("accounts", "put-platform", "--entry", demo, "--data-dir", up.data_dir)
    assert refused.returncode == 2
    assert "the root of the demo" in refused.stderr


def test_doctor_finds_all_well_and_the_database_can_be_looked_after(up: Up) -> None:
    doctor = run("doctor", "--data-dir", up.data_dir)
    assert doctor.returncode == 0, doctor.stdout
    assert doctor.stdout.endswith("all is well\n")
    url = up.endpoints.postgres_url
    assert run("db", "status", SEALPUSH_POSTGRES_ADMIN_URL=url).returncode == 0
    assert "nothing to apply" in run("db", "migrate", SEALPUSH_POSTGRES_ADMIN_URL=url).stdout
    maintained = run("db", "maintain", SEALPUSH_POSTGRES_URL=url)
    assert (maintained.returncode, maintained.stdout) == (0, "partitions: 0 made, 0 dropped\n")


def test_a_second_up_on_the_same_directory_is_refused_and_the_first_goes_on(up: Up) -> None:
    second = run("up", "--data-dir", up.data_dir, "--base-port", str(free_base()), "--then-exit")
    assert second.returncode == 1
    assert f"in use by another Sealpush, process {up.process.pid}." in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert run("send", PHONE, "undisturbed", "--wait", "30s", "--data-dir", up.data_dir).returncode == 0


def test_a_taken_port_is_named(up: Up, own_data_dir: Path) -> None:
    done = run("up", "--data-dir", own_data_dir, "--base-port", str(up.base_port), "--then-exit")
    assert done.returncode == 1
    assert f"port {up.base_port + 1} (accounts, public) is taken" in done.stderr
    assert "--base-port" in done.stderr


@pytest.mark.parametrize("victim", [*SERVICES, "simulators", *ENGINES])
async def test_killed_while_publishing_every_accepted_message_arrives_once(up: Up, victim: str) -> None:
    accepted: list[Accepted] = []
    first_accepted = asyncio.Event()

    async def publish(sender: Sender, body: str) -> None:
        content = Content(title="t", body=body, content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL)
        request_id = body.replace(" ", "-")
        while True:
            outcome = await sender.publish(PHONE, content, request_id=request_id)
            if isinstance(outcome, Accepted):
                accepted.append(outcome)
                first_accepted.set()
                return
            # Refused for now or unanswered: the same request id again.
            await asyncio.sleep(0.05)

    before = up.children()[victim]
    bodies = [f"{victim} {number}" for number in range(40)]

    async def publish_in_turn(sender: Sender, turn: int) -> None:
        for body in bodies[turn:40:4]:
            await publish(sender, body)

    async with asyncio.timeout(PATIENCE_S), bank(up) as sender:
        publishing = asyncio.ensure_future(asyncio.gather(*(publish_in_turn(sender, turn) for turn in range(4))))
        await first_accepted.wait()
        os.kill(before, signal.SIGKILL)
        await publishing
        # And once more, when it is surely gone.
        bodies.append(f"{victim} after")
        await publish(sender, bodies[-1])
        async for status in sender.watch([each.message_id for each in accepted]):
            assert not status.state.terminal or status.state.name == "DELIVERED", status
    expected = dict.fromkeys(bodies, 1)
    for phone in ("phone-1", "phone-2"):
        await asyncio.to_thread(eventually, partial(has_exactly, up, phone, f"{victim} ", expected), f"{phone} has all messages")
    await asyncio.to_thread(eventually, lambda: up.children().get(victim, before) != before, f"{victim} is there again")
    assert "shown twice" not in (up.data_dir / "log" / "up.log").read_text()


async def test_a_service_that_hangs_is_started_again(up: Up) -> None:
    hung = up.children()["fetch"]
    os.kill(hung, signal.SIGSTOP)
    try:
        await asyncio.to_thread(eventually, lambda: up.children().get("fetch", hung) != hung, "fetch is there again")
    finally:
        if up.children().get("fetch") == hung:
            os.kill(hung, signal.SIGCONT)
    sent = await asyncio.to_thread(run, "send", PHONE, "after it hung", "--wait", "30s", "--data-dir", up.data_dir)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert f"fetch was restarted (hung); log: {up.data_dir / 'log' / 'fetch.log'}\n" in up.output


async def test_a_postgres_that_was_told_to_wait_for_its_clients_is_started_again(up: Up) -> None:
    """Our services are clients that never leave."""
    before = up.children()["postgres"]
    os.kill(before, signal.SIGTERM)
    told = f"postgres was restarted (told to shut down by somebody else); log: {up.data_dir / 'log' / 'postgres.log'}\n"
    await asyncio.to_thread(eventually, lambda: told in up.output, "PostgreSQL is started again")
    sent = await asyncio.to_thread(run, "send", PHONE, "after the shutdown", "--wait", "30s", "--data-dir", up.data_dir)
    assert sent.returncode == 0, sent.stdout + sent.stderr


async def test_an_outage_of_the_database_is_a_few_lines_in_each_log(up: Up) -> None:
    """However many calls fail meanwhile: the line that says what is wrong must be found."""
    logs = {service: up.data_dir / "log" / f"{service}.log" for service in SERVICES}
    sizes = {service: path.stat().st_size for service, path in logs.items()}
    postgres, moved = up.data_dir / "postgres", up.data_dir / "moved"
    failed = 0

    def lines(service: str) -> list[dict[str, Any]]:
        with logs[service].open() as stream:
            stream.seek(sizes[service])
            return [json.loads(line) for line in stream.read().splitlines()]

    def is_back(service: str) -> bool:
        return any(line["event"] == "PostgreSQL is back" for line in lines(service))

    async def keep_publishing(sender: Sender, turn: int) -> None:
        nonlocal failed
        content = Content(title="t", body="in an outage", content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL)
        number = 0
        while moved.exists():
            number += 1
            outcome = await sender.publish(SWITCHED_OFF_PHONE, content, request_id=f"outage-{turn}-{number}")
            failed += not isinstance(outcome, Accepted)

    async with asyncio.timeout(PATIENCE_S):
        async with Channels(public_endpoints(up.endpoints)) as channels:
            # One try each, so that every failure is a call of its own.
            once = RetryPolicy(attempts_max=1)
            sender = Sender(channels, up.endpoints.login, up.endpoints.password, sender_name="demo-bank", policy=once)
            await sender.publish(SWITCHED_OFF_PHONE, Content(body="before", content_class=common_pb2.CONTENT_CLASS_INFORMATIONAL))
            # It cannot be started again as long as its directory is away.
            postgres.rename(moved)
            try:
                os.kill(up.children()["postgres"], signal.SIGKILL)
                publishing = asyncio.ensure_future(asyncio.gather(*(keep_publishing(sender, turn) for turn in range(8))))
                await asyncio.to_thread(eventually, lambda: failed >= 100, "calls have failed")
            finally:
                moved.rename(postgres)
            await publishing
        for service in ("fetch", "registration"):
            await asyncio.to_thread(eventually, partial(is_back, service), f"{service} says that it is back")
    for service in SERVICES:
        said = lines(service)
        assert len(said) <= 20, said
        assert not [line for line in said if "exception" in line], said
        assert all(line.get("error", "…").strip() for line in said)
        # Its socket is there and refuses, then it is gone, then the server starts: each is told of once.
        for event, most in (("PostgreSQL is away: no connection", WORDINGS_MAX), ("PostgreSQL is back", 1)):
            assert sum(line["event"] == event for line in said) <= most, said
    sent = await asyncio.to_thread(run, "send", PHONE, "after the outage", "--wait", "30s", "--data-dir", up.data_dir)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def test_killed_itself_it_leaves_no_process_and_the_next_run_keeps_what_was_accepted(own_data_dir: Path) -> None:
    base_port = free_base()
    first = Up(own_data_dir, base_port)
    sent = run("send", SWITCHED_OFF_PHONE, "kept", "--json", "--data-dir", own_data_dir)
    children = first.children()
    assert set(children) == {*SERVICES, "simulators", *ENGINES}
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: not any(map(is_alive, children.values())), "every child has ended")
    assert run("doctor", "--data-dir", own_data_dir).returncode == 1

    second = Up(own_data_dir, base_port)
    status = run("status", last_json(sent.stdout)["message_id"], "--json", "--data-dir", own_data_dir)
    assert last_json(status.stdout)["state"] == "QUEUED"
    assert run("send", PHONE, "as before", "--wait", "30s", "--data-dir", own_data_dir).returncode == 0
    children = second.children()
    assert second.end(signal.SIGINT) == 0
    assert not any(map(is_alive, children.values()))
    assert not processes_of(own_data_dir)
    assert os.listdir(own_data_dir / "run") == []


def test_killed_at_any_moment_of_its_first_run_the_next_one_works(own_data_dir: Path) -> None:
    base_port = str(free_base())
    # In the middle of the secrets, of initdb, of the migrations or a little later, of the services' start, of the demo's registrations.
    for sign in ("secrets/keys/keys.key", "postgres-new-*/pgdata/PG_VERSION", "postgres", "log/fetch.log", "phones/phone-1.sqlite"):
        arguments = command("up", "--data-dir", own_data_dir, "--base-port", base_port, "--quiet")
        with subprocess.Popen(arguments) as process:
            eventually(partial(there_is, own_data_dir, sign), sign)
            process.kill()
        eventually(lambda: not processes_of(own_data_dir), "every process has ended")
    done = run("up", "--data-dir", own_data_dir, "--base-port", base_port, "--then-exit")
    assert done.returncode == 0, done.stdout + done.stderr


def test_stopped_while_it_starts_it_leaves_nothing(own_data_dir: Path) -> None:
    arguments = command("up", "--data-dir", own_data_dir, "--base-port", str(free_base()))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        # Half-way: some of the services were started and cannot answer yet.
        eventually(lambda: (own_data_dir / "log" / "fetch.log").exists(), "the services are being started")
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.read().endswith("\nstopped\n")
        assert process.wait(PATIENCE_S) == 0
    assert not processes_of(own_data_dir)


def test_a_service_refuses_a_database_that_was_not_migrated(up: Up) -> None:
    async def create_database() -> None:
        connection = await connect(up.endpoints.postgres_url)
        try:
            await connection.execute("CREATE DATABASE not_migrated")
        finally:
            await connection.close()

    asyncio.run(create_database())
    url = up.endpoints.postgres_url.replace("/sealpush?", "/not_migrated?")
    keys = up.data_dir / "secrets" / "keys"
    trust = {"SEALPUSH_SERVICE_KEY": str(keys / "accounts.key"), "SEALPUSH_TRUST": str(keys.parent / "trust.json")}
    refused = run("serve", "accounts", SEALPUSH_POSTGRES_URL=url, **trust)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].endswith("run `sealpush db migrate` first")
    assert "Traceback" not in refused.stderr

    unreachable = run("serve", "accounts", SEALPUSH_POSTGRES_URL="postgresql://x:y@/z?host=/nowhere", **trust)
    assert unreachable.returncode == 1
    assert "cannot connect to PostgreSQL" in unreachable.stderr.splitlines()[-1]


def test_a_lost_secret_is_reported_and_not_replaced(own_data_dir: Path) -> None:
    from sealpushd.engines.datadir import DataDir
    from sealpushd.up import secrets

    with DataDir.open(own_data_dir):
        secrets.prepare(own_data_dir / "secrets", ["services", "simulators"])
    (own_data_dir / "secrets" / "vault.key").unlink()
    done = run("up", "--data-dir", own_data_dir, "--base-port", str(free_base()), "--then-exit")
    assert done.returncode == 1
    assert "vault.key is missing. Restore it" in done.stderr
    assert not (own_data_dir / "postgres").exists()
