"""The testbed itself: hosts, links, logins, and commands on the hosts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
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

#: Seconds until every host's sshd must answer.
SSH_TIMEOUT_S = 20
#: What a link that rests takes at once: as much as it carries in so many seconds, but a packet. A
#: larger bucket passes the small messages of a step as if there were no limit; a smaller one does
#: not reach its rate, as a timer is not that exact.
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
ClientAliveInterval 2
ClientAliveCountMax 2
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
#: In the host's namespaces: its own /run ($1), if it has one, its name ($2), and its quota, where a
#: machine of its own would show it: `ip netns exec` hides it (options of mount, $3).
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
    """A testbed that is up.

    Attributes:
        name: of the testbed; another name is another one beside it.
        hosts: by name, without the head.
        rates: bits per second of each host's link; None where it is not shaped.
        cores: how they are shared out: quota, pin or none.
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
        """Makes a testbed; if that fails, nothing of it is left.

        Args:
            name: letters and digits.
            hosts: see `hosts_like`.
            rate: bits per second of every link in each direction; None: not shaped.
            cores: quota (pin where the system has none), pin or none.
            round_trip: seconds that are added to the round trip between two hosts.

        Raises:
            UserError: it is up already, or the machine lacks something.
        """
        check_root()
        install_missing()
        if found := leftovers.remains(name):
            whole = (leftovers.STATE / name / "state.json").exists()
            what = "is up already" if whole else f"is there in part ({found[-1]})"
            raise UserError(f"testbed {name} {what}; `down --name {name}` removes it")
        mode, shared = share_cores(hosts, cores)
        bed = cls(name, shared, {host.name: None for host in hosts}, mode)
        bed.state.mkdir(mode=0o700, parents=True)  # fails if somebody else is making it
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
        """The testbed of this name that is up.

        Raises:
            UserError: there is none.
        """
        check_root()
        try:
            state = json.loads((leftovers.STATE / name / "state.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"testbed {name} is not up: `up --name {name}` makes it") from None
        hosts = [Host(**host) for host in state["hosts"]]
        return cls(name, hosts, state["rates"], state["cores"])

    @property
    def state(self) -> pathlib.Path:
        """The directory of all its files."""
        return leftovers.STATE / self.name

    @property
    def ssh_config(self) -> pathlib.Path:
        """With `ssh -F`, lets the head log in to every host."""
        return self.state / "ssh_config"

    def exec(self, host: str, argv: Sequence[str], **popen: Any) -> subprocess.Popen:
        """Starts a command on a host (or the head), with its name and its share of the cores.

        Args:
            host: its name.
            argv: the command and its arguments.
            popen: arguments of subprocess.Popen; its process becomes the command itself.
        """
        return subprocess.Popen(self.command(host, argv), **popen)

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """What runs a command on a host: see `exec`."""
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
        """Shapes links in both directions, also while they are used.

        Args:
            rate: bits per second; None: as fast as they go.
            hosts: whose links; None: all.
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

    def counters(self) -> dict[str, tuple[int, int]]:
        """Bytes (received, sent) by each host's interface since the start."""
        counts = {}
        for host in self.hosts:
            shown = run("ip", "-n", self._label(host), "-j", "-s", "link", "show", "dev", "eth0")
            counted = json.loads(shown)[0]["stats64"]
            counts[host] = (counted["rx"]["bytes"], counted["tx"]["bytes"])
        return counts

    def processes(self) -> dict[int, str]:
        """Process id and command line of everything that runs in it, sshds included."""
        return leftovers.processes(self.name)

    def write_hosts(self, measure: bool = True) -> pathlib.Path:
        """Writes the hosts file for a launch from the head, and returns its path.

        Args:
            measure: launch is to measure the links; otherwise it is told their present rates.
        """
        lines = ["# Written by benchmarks/testbed."]
        for host in self.hosts.values():
            rate = self.rates[host.name]
            told = None if rate is None else show_rate(rate)
            keys = {
                "address": host.name,
                "ssh": f"root@{host.name}:22",
                "python": sys.executable,
                "bandwidth": "auto" if measure else told,
            }
            lines.append(hosts_line(host, **keys))
        path = self.state / "hosts.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _label(self, host: str) -> str:
        """Name of a host's namespace and cgroup."""
        return leftovers.prefix(self.name) + host

    def _port(self, host: str) -> str:
        """The bridge's end of a host's link, in 15 characters at most."""
        return f"port{list(self.hosts).index(host)}"

    def _run_dir(self, host: str) -> pathlib.Path:
        return self.state / host / "run"

    def _cgroup(self, host: str) -> pathlib.Path:
        root = cpu_controller()
        if root is None:
            raise UserError("the cpu controller, by which cores were shared out, is gone")
        return root / self._label(host)

    def _save(self) -> None:
        hosts = [dataclasses.asdict(host) for host in self.hosts.values()]
        part = self.state / "state.json.part"
        part.write_text(json.dumps({"hosts": hosts, "rates": self.rates, "cores": self.cores}))
        part.replace(self.state / "state.json")

    def _addresses(self) -> dict[str, str]:
        """Of all hosts and the head."""
        return {HEAD: f"{SUBNET}.1"} | {host.name: host.address for host in self.hosts.values()}

    def _make_hosts(self) -> None:
        """Namespaces without links, the files in their /etc, and cgroups."""
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
        # No snooping: its queries would be the only bytes on an idle link.
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

        A process on the head passes frames on; it ends with the testbed.
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
        # Without IPv6, which nobody uses and which talks by itself.
        run(*ip, "link", "set", interface, "addrgenmode", "none")
        if address is not None:
            run(*ip, "address", "add", f"{address}/24", "dev", interface)
        run(*ip, "link", "set", interface, "up")

    def _make_logins(self) -> None:
        """The head's key and configuration; every host's key and sshd."""
        _make_key(self.state / "key")
        public = (self.state / "key.pub").read_text()
        known = []
        for host in self.hosts.values():
            (self._run_dir(host.name) / "sshd").mkdir(parents=True)  # sshd wants it, empty
            files = self._run_dir(host.name) / "testbed"
            files.mkdir()
            _make_key(files / "host_key")
            kind, key, *_ = (files / "host_key.pub").read_text().split()
            known.append(f"{host.name},{host.address} {kind} {key}\n")
            (files / "authorized_keys").write_text(f'from="{SUBNET}.1" {public}')
            (files / "sshd_config").write_text(_SSHD_CONFIG.format(address=host.address))
        (self.state / "known_hosts").write_text("".join(known))
        self.ssh_config.write_text(_SSH_CONFIG.format(state=self.state))
        sshd = [find("sshd") or "sshd", "-f", "/run/testbed/sshd_config"]
        for host in self.hosts:
            self.exec(host, [*sshd, "-E", "/run/testbed/sshd.log"]).wait()
        for host in self.hosts:
            self._wait_for_login(host)

    def _wait_for_login(self, host: str) -> None:
        deadline = time.monotonic() + SSH_TIMEOUT_S
        login = self.command(HEAD, ["ssh", "-F", str(self.ssh_config), host, "--", "true"])
        while (tried := subprocess.run(login, capture_output=True, text=True)).returncode:
            if time.monotonic() > deadline:
                log = self._run_dir(host) / "testbed" / "sshd.log"
                said = log.read_text().strip() if log.exists() else "(no log)"
                raise UserError(f"no login on {host}: {tried.stderr.strip()}; its sshd: {said}")
            time.sleep(0.1)


def _passwd(text: str) -> str:
    """As here, but root's shell reads no start-up files.

    All hosts share root's home. What its ~/.bashrc starts would be started on all of them at once
    (pyenv waits a minute for the lock that a killed one of its own kind has left).
    """
    lines = [line.split(":") for line in text.splitlines()]
    return "".join(
        ":".join([*line[:-1], "/bin/sh"] if line[0] == "root" else line) + "\n" for line in lines
    )


def _make_key(path: pathlib.Path) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", str(path))
