"""Parsing of the hosts file."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dance_jax.config import ServerSpec, SshTarget, UserError
from dance_jax.launch.planning.hosts import parse_hosts, read_hosts

ROOT = pathlib.Path(__file__).parents[2]


def test_every_key_and_default() -> None:
    spec = parse_hosts(
        """
        # servers
        alpha address=localhost devices=2 memory=48MiB bandwidth=500Mbps expert_time=120us  # large
        beta experts=7 address=127.0.0.1 round_trip=2.5ms

        """,
        "hosts.txt",
    )
    assert spec.servers == (
        ServerSpec("alpha", "localhost", 2, (48 << 20,) * 2, None, 500e6, expert_time=120e-6),
        ServerSpec("beta", "127.0.0.1", 1, None, 7, None, round_trip=2.5e-3),
    )
    assert spec.servers[0].slots(1 << 20) == 48
    assert spec.servers[1].slots(1 << 20) == 7


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("3kB", 3000),
        ("48MB", 48_000_000),
        ("20GB", 20_000_000_000),
        ("1TB", 10**12),
        ("2KiB", 2048),
        ("13.5MiB", 14_155_776),
        ("20GiB", 20 << 30),
        ("0.5TiB", 1 << 39),
    ],
)
def test_memory_units(text: str, size: int) -> None:
    assert parse_hosts(f"a address=localhost memory={text}").servers[0].memory == (size,)


@pytest.mark.parametrize(
    ("text", "rate"), [("900bps", 900), ("5kbps", 5e3), ("500Mbps", 5e8), ("2.5Gbps", 2.5e9)]
)
def test_bandwidth_units(text: str, rate: float) -> None:
    spec = parse_hosts(f"a address=localhost experts=1 bandwidth={text}")
    assert spec.servers[0].bandwidth == rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("800ns", 8e-7), ("1.5us", 1.5e-6), ("2ms", 0.002), ("3s", 3.0)]
)
def test_time_units(text: str, seconds: float) -> None:
    spec = parse_hosts(f"a address=localhost experts=1 expert_time={text} bandwidth=auto")
    assert spec.servers[0].expert_time == seconds
    spec = parse_hosts(f"a address=localhost experts=1 round_trip={text}")
    assert spec.servers[0].round_trip == seconds


def test_a_time_alone_weighs_nothing() -> None:
    text = "a address=localhost experts=1\nb address=localhost experts=1 expert_time=3us"
    with pytest.raises(UserError, match="h:2: expert_time= also needs bandwidth= or round_trip="):
        parse_hosts(text, "h")
    for known in ("bandwidth=1Mbps", "bandwidth=auto", "round_trip=1ms"):
        assert parse_hosts(text + f"\nc address=localhost experts=1 {known}").names


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a experts=1 colour=red", ["colour", "address, devices"]),
        ("a experts=1 experts=2", ["experts", "twice"]),
        ("a experts", ["experts", "no value"]),
        ("a experts=", ["experts", "no value"]),
        ("a =1", ["unknown key ''"]),
        ("a memory=48", ["memory=48", "MiB"]),
        ("a memory=48mib", ["memory=48mib", "MiB"]),
        ("a memory=MiB", ["memory=MiB"]),
        ("a memory=-1MiB", ["memory=-1MiB"]),
        ("a memory=1e3MiB", ["memory=1e3MiB"]),
        ("a memory=0MiB", ["memory=0MiB"]),
        ("a experts=-1", ["experts=-1", "whole number"]),
        ("a experts=1.5", ["experts=1.5"]),
        ("a experts=1 bandwidth=500", ["bandwidth=500", "Mbps"]),
        ("a experts=1 bandwidth=500MB", ["bandwidth=500MB"]),
        ("a experts=1 bandwidth=0Mbps", ["bandwidth=0Mbps"]),
        ("a experts=1 expert_time=120", ["expert_time=120", "us"]),
        ("a experts=1 round_trip=20", ["round_trip=20", "ms"]),
        ("a experts=1 round_trip=0ms", ["round_trip=0ms"]),
        ("a experts=1 round_trip=auto", ["round_trip=auto"]),
        ("a experts=1 expert_time=0us", ["expert_time=0us"]),
        ("a experts=1 expert_time=auto", ["expert_time=auto"]),
        ("a experts=1 devices=0", ["devices=0", "at least one"]),
        ("a experts=1 devices=two", ["devices=two"]),
        ("a memory=1GiB experts=1", ["both"]),
        ("a devices=1", ["neither", "memory=", "experts="]),
        ("-a experts=1", ["'-a'", "name"]),
        ("devices=1 experts=1", ["'devices=1'", "name"]),
        ("../a experts=1", ["'../a'"]),
        ("a experts=1 checkpoint=none", ["checkpoint=none", "own", "peer"]),
        ("a experts=1 checkpoint=peer model=/m", ["checkpoint=peer", "model=", "contradict"]),
    ],
)
def test_errors_name_file_line_and_key(line: str, words: list[str]) -> None:
    text = f"# first\nok address=localhost experts=1\n{line} address=localhost"
    with pytest.raises(UserError) as caught:
        parse_hosts(text, "my-hosts")
    assert str(caught.value).startswith("my-hosts:3: ")
    for word in words:
        assert word in str(caught.value)


def test_repeated_name() -> None:
    with pytest.raises(UserError, match="h:3: server a is already on line 1"):
        parse_hosts("a address=localhost experts=1\n\na address=localhost experts=2", "h")


def test_some_server_must_have_the_model() -> None:
    text = "a address=localhost experts=1 checkpoint=peer\nb address=localhost experts=1"
    assert [server.from_peers for server in parse_hosts(text).servers] == [True, False]
    with pytest.raises(UserError, match=r"h: all servers have checkpoint=peer.*at least one"):
        parse_hosts(text + " checkpoint=peer", "h")


def test_a_server_elsewhere() -> None:
    spec = parse_hosts(
        """
        alpha address=10.0.0.1 ssh=me@gate.example.org:2222 python=/v/bin/python model=/m gpus=0,2 \
memory=24GB,12GB bandwidth=auto
        beta  address=beta.lan experts=3 gpus=1 checkpoint=peer
        gamma checkpoint=own experts=3 ssh=root@[fe80::1] gpus=0
        """
    )
    alpha, beta, gamma = spec.servers
    assert alpha.ssh == SshTarget("gate.example.org", "me", 2222)
    assert (alpha.python, alpha.model, alpha.gpus) == ("/v/bin/python", "/m", (0, 2))
    assert alpha.devices == 2 and alpha.memory == (24 * 10**9, 12 * 10**9)
    assert alpha.slots(10**9) == 12, "equal pools: the smallest memory decides"
    assert (alpha.bandwidth, alpha.measure_bandwidth) == (None, True)
    assert beta.ssh == SshTarget("beta.lan") and not beta.measure_bandwidth
    assert [server.from_peers for server in spec.servers] == [False, True, False]
    assert gamma.address == "gamma" and gamma.ssh == SshTarget("fe80::1", "root")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a experts=1 ssh=-oProxyCommand=x", ["ssh=-oProxyCommand=x"]),
        ("a experts=1 ssh=-o@host", ["ssh=-o@host"]),
        ("a experts=1 ssh=me@-host", ["ssh=me@-host"]),
        ("a experts=1 ssh=me@host:0", ["ssh=me@host:0"]),
        ("a experts=1 ssh=me@host:99999", ["ssh=me@host:99999"]),
        ("a experts=1 ssh=me@$(id)", ["ssh=me@$(id)"]),
        ("a experts=1 python=bin/python", ["python=bin/python", "absolute"]),
        ("a experts=1 model=x", ["model=x", "absolute", "org/name"]),
        ("a experts=1 model=models/tiny/x", ["model=models/tiny/x", "absolute"]),
        ("a experts=1 model=org/name@", ["model=org/name@", "org/name@revision"]),
        ("a experts=1 address=-h", ["address=-h"]),
        ("a experts=1 address=0.0.0.0", ["address=0.0.0.0"]),
        ("a experts=1 address=1.2.3", ["address=1.2.3"]),
        ("a experts=1 address=a;b", ["address=a;b"]),
        ("a experts=1 gpus=0,0", ["gpus=0,0", "twice"]),
        ("a experts=1 gpus=x", ["gpus=x"]),
        ("a experts=1 gpus=0 platform=cpu", ["platform=cpu", "gpus=", "remove one"]),
        ("a experts=1 platform=tpu", ["platform=tpu", "cpu or cuda"]),
        ("a experts=1 gpus=0,1 devices=3", ["gpus", "2 values for 3 devices"]),
        ("a memory=1GB,2GB devices=3", ["memory", "2 values for 3 devices"]),
        ("a memory=1GB,", ["memory="]),
        ("a experts=1 checkpoint=beta", ["checkpoint=beta", "own", "peer"]),
    ],
)
def test_errors_of_servers_elsewhere(line: str, words: list[str]) -> None:
    address = "" if "address=" in line else " address=10.0.0.2"
    with pytest.raises(UserError) as caught:
        parse_hosts(f"ok address=10.0.0.1 experts=1\n{line}{address}", "h")
    assert str(caught.value).startswith("h:2: ")
    for word in words:
        assert word in str(caught.value)


def test_a_loopback_address_among_others_is_refused() -> None:
    text = "a experts=1 address=localhost\nb experts=1 address=10.0.0.2"
    with pytest.raises(UserError, match=r"h:1: address=localhost .* b \(line 2"):
        parse_hosts(text, "h")


def test_platforms() -> None:
    each = {"a": "gpus=0", "b": "", "c": "platform=cuda", "d": "platform=cpu"}
    text = "\n".join(f"{name} address=localhost experts=1 {keys}" for name, keys in each.items())
    for default in ("cpu", "cuda"):
        spec = parse_hosts(text, platform=default)
        assert [each.platform for each in spec.servers] == ["cuda", default, "cuda", "cpu"]
        assert spec.platform == "mixed"
    assert parse_hosts(text.splitlines()[0]).platform == "cuda"


def test_address_is_the_name_by_default() -> None:
    assert parse_hosts("alpha experts=1").servers[0].ssh == SshTarget("alpha")
    local = parse_hosts("localhost experts=1").servers[0]
    assert (local.address, local.ssh) == ("localhost", None)


def test_unreadable_and_empty_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_hosts(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_hosts(tmp_path / "binary")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(UserError, match="no server"):
        read_hosts(tmp_path / "empty")


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True),
            st.integers(1, 9),
            st.one_of(st.integers(0, 10**6), st.integers(1, 10**6).map(lambda n: f"{n}MiB")),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda server: server[0],
    )
)
def test_what_is_written_is_read(servers: list[tuple[str, int, int | str, bool]]) -> None:
    lines = []
    for name, devices, size, comment in servers:
        key = "experts" if isinstance(size, int) else "memory"
        words = [name, f"{key}={size}", f"devices={devices}", "address=localhost"]
        lines.append("\t ".join(words) + (" # memory=bad" if comment else ""))
    spec = parse_hosts("\n".join(lines))
    assert spec.names == tuple(server[0] for server in servers)
    assert spec.devices == tuple(server[1] for server in servers)
    for found, (_, devices, size, _) in zip(spec.servers, servers, strict=True):
        if isinstance(size, int):
            assert (found.experts, found.memory) == (size, None)
        else:
            assert (found.experts, found.memory) == (None, (int(size[:-3]) << 20,) * devices)


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_a_place(text: str) -> None:
    try:
        parse_hosts(text, "some/hosts")
    except UserError as error:
        assert str(error).startswith("some/hosts:")


def test_the_example_holds_what_it_says() -> None:
    """Room for about 0.45, 0.35 and 2 x 0.3 of the demo's 320 experts of 48 KiB."""
    spec = read_hosts(ROOT / "examples" / "hosts.txt")
    assert spec.names == ("alpha", "beta", "gamma")
    assert spec.devices == (1, 1, 2)
    assert [server.slots(3 * 128 * 64 * 2) for server in spec.servers] == [144, 112, 96]
    assert [server.bandwidth for server in spec.servers] == [500e6] * 3
