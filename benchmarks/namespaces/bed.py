"""The testbed: its hosts, links and logins, and commands on the hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from dance_jax.config import UserError

from . import leftovers
from .cores import cpu_controller, make_quota, share_cores
from .hosts import HEAD, SUBNET, Host, hosts_line, show_rate
from .machine import check_root, find, install_missing, run

#: Seconds within which every host's sshd must answer.
SSH_TIMEOUT_S = 20
#: Size of a link's token bucket: what the link carries in BURST_S seconds, but at least a packet. A
#: larger bucket would pass the small messages of a step as if the link had no limit; a smaller one
#: would not reach the link's rate, because the kernel's timer is not precise enough.
BURST_S, PACKET_BYTES = 0.25e-3, 1600
_SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey /run/testbed/host_key
AuthorizedKeysFile /run/testbed/authorized_keys
PidFile /run/sshd.pid
UsePAM no
UseDNS no
AllowUsers root
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AcceptEnv PYTHONPATH
MaxSessions 100
MaxStartups 100
"""
_SSH_CONFIG = """\
Host *
    User root
    Port 22
    IdentityFile {state}/key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {state}/known_hosts
    GlobalKnownHostsFile none
    StrictHostKeyChecking yes
    PreferredAuthentications publickey
    BatchMode yes
    SendEnv PYTHONPATH
    ConnectTimeout 10
"""
#: Runs in the host's namespaces. Mounts the host's own /run ($1, empty for the head), sets the host
#: name ($2), and mounts the cgroup with the host's quota where a real machine shows it, because `ip
#: netns exec` hides it ($3: options of mount, empty without a quota).
_ENTER = (
    'set -e; [ -z "$1" ] || mount --bind "$1" /run; '
    '[ -z "$3" ] || mount -t $3 cpu /sys/fs/cgroup; '
    'echo "$2" > /proc/sys/kernel/hostname; shift 3; exec "$@"'
)
_JOIN_CGROUP = 'echo $$ > "$1" || exit 1; shift; exec "$@"'


def burst_bytes(rate: int) -> int:
    """The bytes that an idle link of `rate` bits per second takes at once."""
    return max(PACKET_BYTES, round(rate / 8 * BURST_S))


class Testbed:
    """A running testbed.

    Attributes:
        name: of the testbed; testbeds with different names can run side by side.
        hosts: by name, without the head.
        rates: bits per second of each host's link; None if the link is not shaped.
        cores: how the hosts share the machine's cores: quota, pin or none.
    """

    def __init__(
        self, name: str, hosts: Iterable[Host], rates: dict[str, int | None], cores: str
    ) -> None:
        self.name = name
        self.hosts = {host.name: host for host in hosts}
        self.rates = rates
        self.cores = cores

    @classmethod
    def up(
        cls,
        name: str,
        hosts: Sequence[Host],
        rate: int | None = None,
        cores: str = "quota",
        round_trip: float = 0.0,
    ) -> Testbed:
        """Create a testbed; if that fails, remove everything created so far.

        Args:
            name: letters and digits.
            hosts: see `hosts_like`.
            rate: bits per second of every link in each direction; None: not shaped.
            cores: quota (pin where the system has none), pin or none.
            round_trip: seconds that are added to the round trip between two hosts.

        Raises:
            UserError: the testbed is up already, or the machine lacks something.
        """
        check_root()
        install_missing()
        if found := leftovers.remains(name):
            whole = (leftovers.STATE / name / "state.json").exists()
            what = "is up already" if whole else f"is partly there ({found[-1]})"
            raise UserError(f"testbed {name} {what}: remove it with `down --name {name}`")
        mode, shared = share_cores(hosts, cores)
        bed = cls(name, shared, {host.name: None for host in hosts}, mode)
        bed.state.mkdir(
            mode=0o700, parents=True
        )  # fails if another process is creating this testbed
        try:
            bed._make_hosts()
            bed._make_links()
            if round_trip:
                bed._hold_back(round_trip / 4)
            bed._make_logins()
            bed.set_rate(rate)
        except BaseException:
            leftovers.down(name)
            raise
        return bed

    @classmethod
    def load(cls, name: str = "main") -> Testbed:
        """Return the running testbed of this name.

        Raises:
            UserError: no such testbed is up.
        """
        check_root()
        try:
            state = json.loads((leftovers.STATE / name / "state.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"testbed {name} is not up: run `up --name {name}` first") from None
        hosts = [Host(**host) for host in state["hosts"]]
        return cls(name, hosts, state["rates"], state["cores"])

    @property
    def state(self) -> pathlib.Path:
        """The directory of all the testbed's files."""
        return leftovers.STATE / self.name

    @property
    def ssh_config(self) -> pathlib.Path:
        """The ssh configuration (`ssh -F`) with which the head logs in to the hosts."""
        return self.state / "ssh_config"

    def exec(self, host: str, argv: Sequence[str], **popen: Any) -> subprocess.Popen:
        """Start a command on a host or the head, under the host's name and share of the cores.

        Args:
            host: name of the host.
            argv: the command and its arguments.
            popen: arguments of subprocess.Popen, whose process becomes the command itself.
        """
        return subprocess.Popen(self.command(host, argv), **popen)

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """Return the command line, on this machine, that runs a command on a host; see `exec`."""
        own_run = "" if host == HEAD else str(self._run_dir(host))
        enter = [find("ip") or "ip", "netns", "exec", self._label(host), "unshare", "--uts"]
        share = None if host == HEAD else self.hosts[host].share
        limited = share is not None and not isinstance(share, list)
        version_1 = limited and (self._cgroup(host) / "cpu.cfs_quota_us").exists()
        quota = "" if not limited else "cgroup -o cpu" if version_1 else "cgroup2"
        command = [*enter, "sh", "-c", _ENTER, "sh", own_run, host, quota, *argv]
        if isinstance(share, list):
            return ["taskset", "-c", ",".join(map(str, share)), *command]
        if share is not None:
            return ["sh", "-c", _JOIN_CGROUP, "sh", f"{self._cgroup(host)}/cgroup.procs", *command]
        return command

    def set_rate(self, rate: int | None, hosts: Iterable[str] | None = None) -> None:
        """Set the rate of links in both directions, also while the links are in use.

        Args:
            rate: bits per second; not shaped if None.
            hosts: hosts whose links to shape; all if None.
        """
        for host in self.hosts if hosts is None else hosts:
            for end, interface in ((host, "eth0"), (HEAD, self._port(host))):
                queue = ["tc", "-n", self._label(end), "qdisc"]
                if rate is not None:
                    burst = str(burst_bytes(rate))
                    bucket = ["rate", f"{rate}bit", "burst", burst, "latency", "200ms"]
                    run(*queue, "replace", "dev", interface, "root", "tbf", *bucket)
                elif self.rates[host] is not None:
                    run(*queue, "delete", "dev", interface, "root")
            self.rates[host] = rate
        self._save()

    def set_link(self, host: str, up: bool) -> None:
        """Cut a host's link, or make it whole again; nobody is told that connections are gone."""
        state = "up" if up else "down"
        run(*f"ip -n {self._label(HEAD)} link set {self._port(host)} {state}".split())

    def set_loss(self, host: str, share: float) -> None:
        """Have a host's link lose packets at random in both directions; needs the program nft.

        Args:
            host: name of the host.
            share: of the packets that are lost; 0: none.
        """
        for end, interface in ((host, "eth0"), (HEAD, self._port(host))):
            table = f"netdev loss-{interface}"
            nft = ["ip", "netns", "exec", self._label(end), find("nft") or "nft"]
            run(*nft, f"add table {table}; delete table {table}")
            if share:
                chain = f"type filter hook ingress device {interface} priority 0;"
                drop = f"numgen random mod 1000 < {round(1000 * share)} drop"
                run(*nft, f"table {table} {{\nchain in {{\n{chain}\n{drop}\n}}\n}}")

    def crash(self, host: str) -> None:
        """Kill all processes of a host, sshd included."""
        while pids := leftovers.inhabitants(self._label(host)):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def boot(self, host: str) -> None:
        """Start a host's sshd, as after a crash."""
        sshd = [find("sshd") or "sshd", "-f", "/run/testbed/sshd_config"]
        self.exec(host, [*sshd, "-E", "/run/testbed/sshd.log"]).wait()

    def let_launch(self, host: str) -> str:
        """Let a host log in to all hosts; returns the path there of its ssh configuration."""
        files = self._run_dir(host) / "testbed"
        for name in ("key", "known_hosts"):
            shutil.copy(self.state / name, files / name)
        (files / "ssh_config").write_text(_SSH_CONFIG.format(state="/run/testbed"))
        for each in self.hosts:
            allowed = self._run_dir(each) / "testbed" / "authorized_keys"
            sources = f"{SUBNET}.1,{self.hosts[host].address}"
            allowed.write_text(allowed.read_text().replace(f"{SUBNET}.1", sources, 1))
        return "/run/testbed/ssh_config"

    def host_processes(self, host: str) -> list[int]:
        """Return the ids of a host's processes."""
        return leftovers.inhabitants(self._label(host))

    def counters(self) -> dict[str, tuple[int, int]]:
        """Return the bytes (received, sent) by each host's interface since the start."""
        counts = {}
        for host in self.hosts:
            shown = run("ip", "-n", self._label(host), "-j", "-s", "link", "show", "dev", "eth0")
            counted = json.loads(shown)[0]["stats64"]
            counts[host] = (counted["rx"]["bytes"], counted["tx"]["bytes"])
        return counts

    def processes(self) -> dict[int, str]:
        """Return the process ids and command lines of all processes in the testbed, incl. sshds."""
        return leftovers.processes(self.name)

    def write_hosts(self, measure: bool = True) -> pathlib.Path:
        """Write the hosts file for a launch from the head, and return its path.

        Args:
            measure: have dance_jax.launch measure the links; otherwise state their present rates.
        """
        lines = ["# Written by benchmarks/testbed."]
        for host in self.hosts.values():
            rate = self.rates[host.name]
            stated = None if rate is None else show_rate(rate)
            keys = {
                "address": host.name,
                "ssh": f"root@{host.name}:22",
                "python": sys.executable,
                "bandwidth": "auto" if measure else stated,
            }
            lines.append(hosts_line(host, **keys))
        path = self.state / "hosts.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _label(self, host: str) -> str:
        """Return the name of a host's namespace and cgroup."""
        return leftovers.prefix(self.name) + host

    def _port(self, host: str) -> str:
        """Return the interface name of a link's end at the bridge, of at most 15 characters."""
        return f"port{list(self.hosts).index(host)}"

    def _run_dir(self, host: str) -> pathlib.Path:
        return self.state / host / "run"

    def _cgroup(self, host: str) -> pathlib.Path:
        root = cpu_controller()
        if root is None:
            raise UserError(
                "the cgroup cpu controller that limits the hosts' cores is gone: remove the "
                "testbed with `down` and create it again"
            )
        return root / self._label(host)

    def _save(self) -> None:
        hosts = [dataclasses.asdict(host) for host in self.hosts.values()]
        part = self.state / "state.json.part"
        part.write_text(json.dumps({"hosts": hosts, "rates": self.rates, "cores": self.cores}))
        part.replace(self.state / "state.json")

    def _addresses(self) -> dict[str, str]:
        """Return the addresses of the head and all hosts, by name."""
        return {HEAD: f"{SUBNET}.1"} | {host.name: host.address for host in self.hosts.values()}

    def _make_hosts(self) -> None:
        """Create the namespaces without links, the files in their /etc, and the cgroups."""
        lines = [f"{address} {name}" for name, address in self._addresses().items()]
        known = "\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""])
        for name in self._addresses():
            etc = leftovers.OVER_ETC / self._label(name)
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(known)
            (etc / "passwd").write_text(_passwd(pathlib.Path("/etc/passwd").read_text()))
            # Without PAM, sshd refuses an account whose password is locked ("!").
            (etc / "shadow").touch(mode=0o600)
            (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
            run("ip", "netns", "add", self._label(name))
            run("ip", "-n", self._label(name), "link", "set", "lo", "up")
        for host in self.hosts.values():
            if isinstance(host.share, float):
                make_quota(self._cgroup(host.name), host.share)

    def _make_links(self) -> None:
        head = self._label(HEAD)
        # Without snooping, because its queries would be the only traffic on an idle link.
        run(*f"ip -n {head} link add br0 type bridge mcast_snooping 0".split())
        self._switch_on(HEAD, "br0", f"{SUBNET}.1")
        for host in self.hosts.values():
            port, label = self._port(host.name), self._label(host.name)
            run(*f"ip -n {head} link add {port} type veth peer name eth0 netns {label}".split())
            run(*f"ip -n {head} link set {port} master br0".split())
            self._switch_on(HEAD, port)
            self._switch_on(host.name, "eth0", host.address)

    def _hold_back(self, seconds: float) -> None:
        """Delays all frames between each host and the bridge by `seconds` in each direction.

        A process on the head forwards the frames; the process ends with the testbed.
        """
        head, names = self._label(HEAD), [f"gap{n}" for n in range(len(self.hosts))]
        program = pathlib.Path(__file__).with_name("delay.py")
        command = [sys.executable, str(program), str(seconds), *names]
        process = self.exec(HEAD, command, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise UserError(
                "--round-trip: frames cannot be delayed, because this machine has no usable "
                "/dev/net/tun"
            )
        for host, name in zip(self.hosts, names, strict=True):
            near = f"near{name}"
            run(*f"ip -n {head} link add {near} type bridge mcast_snooping 0".split())
            self._switch_on(HEAD, near)
            for interface, bridge in (
                (self._port(host), near),
                (f"{name}a", near),
                (f"{name}b", "br0"),
            ):
                run(*f"ip -n {head} link set {interface} master {bridge}".split())
            self._switch_on(HEAD, f"{name}a")
            self._switch_on(HEAD, f"{name}b")

    def _switch_on(self, host: str, interface: str, address: str | None = None) -> None:
        ip = ["ip", "-n", self._label(host)]
        # Without IPv6, which is not used here but sends packets of its own.
        run(*ip, "link", "set", interface, "addrgenmode", "none")
        if address is not None:
            run(*ip, "address", "add", f"{address}/24", "dev", interface)
        run(*ip, "link", "set", interface, "up")

    def _make_logins(self) -> None:
        """Create the head's key and configuration and every host's key; start the sshds."""
        _make_key(self.state / "key")
        public = (self.state / "key.pub").read_text()
        known = []
        for host in self.hosts.values():
            (self._run_dir(host.name) / "sshd").mkdir(parents=True)  # sshd needs this empty
            files = self._run_dir(host.name) / "testbed"
            files.mkdir()
            _make_key(files / "host_key")
            kind, key, *_ = (files / "host_key.pub").read_text().split()
            known.append(f"{host.name},{host.address} {kind} {key}\n")
            (files / "authorized_keys").write_text(f'from="{SUBNET}.1" {public}')
            (files / "sshd_config").write_text(_SSHD_CONFIG.format(address=host.address))
        (self.state / "known_hosts").write_text("".join(known))
        self.ssh_config.write_text(_SSH_CONFIG.format(state=self.state))
        for host in self.hosts:
            self.boot(host)
        for host in self.hosts:
            self._wait_for_login(host)

    def _wait_for_login(self, host: str) -> None:
        deadline = time.monotonic() + SSH_TIMEOUT_S
        login = self.command(HEAD, ["ssh", "-F", str(self.ssh_config), host, "--", "true"])
        while (tried := subprocess.run(login, capture_output=True, text=True)).returncode:
            if time.monotonic() > deadline:
                log = self._run_dir(host) / "testbed" / "sshd.log"
                entries = log.read_text().strip() if log.exists() else "(no log)"
                raise UserError(
                    f"ssh login on {host} failed for {SSH_TIMEOUT_S} s: {tried.stderr.strip()}; "
                    f"log of its sshd: {entries}"
                )
            time.sleep(0.1)


def _passwd(text: str) -> str:
    """Return this machine's passwd with a shell for root that reads no start-up files.

    All hosts share root's home, so programs in ~/.bashrc would start on all hosts at once. (pyenv,
    for one, waits a minute for a lock that a killed pyenv has left.)
    """
    lines = [line.split(":") for line in text.splitlines()]
    return "".join(
        ":".join([*line[:-1], "/bin/sh"] if line[0] == "root" else line) + "\n" for line in lines
    )


def _make_key(path: pathlib.Path) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", str(path))
