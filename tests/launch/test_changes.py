"""A changed hosts file of a running service, on a service in name only."""

from __future__ import annotations

import pathlib

import pytest

from dance_jax.config import ClusterSpec, ServerSpec, UserError
from dance_jax.launch.agent.network import Network
from dance_jax.launch.cli.hosts import change
from dance_jax.launch.cluster.changes import FILE_NAME, Changes
from dance_jax.launch.cluster.succession import sole_launcher
from dance_jax.launch.planning.hosts_file import DRAINED, HostsFile, changed
from tests.launch.launched import eventually


def servers(*names: str) -> ClusterSpec:
    return ClusterSpec(tuple(ServerSpec(name, "127.0.0.1", experts=4) for name in names))


class Site:
    """A service's seats; everything that it is asked to do works, unless a test says otherwise."""

    def __init__(self, tmp_path: pathlib.Path, *names: str, seats: int = 4) -> None:
        self.spec = servers(*names).with_seats(seats)
        self.present = frozenset(self.spec.seated)
        self.settled = True
        self.refusal = self.failure = ""
        self.survey_fails = False
        self.done: list[str] = []
        self.now = 0.0
        self.log = tmp_path / FILE_NAME
        self.changes = Changes(
            servers(*names), self, self._survey, str(tmp_path), 30.0, lambda: self.now
        )

    def _survey(self, server: ServerSpec) -> tuple[ServerSpec, Network]:
        if self.survey_fails:
            raise UserError("no such machine")
        return server, Network()

    def dismiss(self, rank: int) -> str:
        self.done.append(f"dismiss {self.spec.names[rank]}")
        return self.refusal

    def dismissed(self, rank: int) -> bool:
        return self.settled

    def unseat(self, rank: int) -> None:
        self.done.append(f"unseat {self.spec.names[rank]}")
        self.spec = self.spec.with_server(rank, ServerSpec("", "", experts=0))
        self.present -= {rank}

    def seat(self, rank: int, server: ServerSpec, network: Network) -> None:
        self.done.append(f"seat {server.name} at {rank}")
        self.spec = self.spec.with_server(rank, server)
        if not self.failure:
            self.present |= {rank}

    def fails(self, rank: int) -> str:
        return self.failure

    def notice(self, name: str, text: str) -> None:
        assert text.startswith("hosts")

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def change(self, *names: str) -> str:
        """Wants these servers; returns the last line that says how it ended."""
        self.changes.want(servers(*names))
        return self.end()

    def end(self) -> str:
        def look() -> bool:
            self.changes.tick()
            return self.lines[-1:] != [] and self.lines[-1].startswith(("done", "failed"))

        assert eventually(look, 10), self.lines
        return self.lines[-1]


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Site:
    return Site(tmp_path, "a", "b", "c")


def test_servers_leave_first_and_others_take_their_seats(site: Site) -> None:
    assert site.change("a", "d", "c") == "done: the servers are a, c, d"
    assert site.done == ["dismiss b", "unseat b", "seat d at 1"]
    assert site.change("a", "d", "c", "e") == "done: the servers are a, c, d, e"
    assert site.done[3:] == ["seat e at 3"]


def test_a_server_that_cannot_leave_stays(site: Site) -> None:
    site.refusal = "the others lack 1 MiB"
    undone: list[str] = []
    assert not site.changes.under_way
    site.changes.want(servers("a"), lambda: undone.append("first"))
    site.changes.want(servers("a"))
    assert site.changes.under_way
    assert site.end() == "failed: b cannot leave: the others lack 1 MiB"
    assert site.done == ["dismiss b"] and undone == ["first"]
    site.refusal = ""
    site.changes.tick()  # which begins with the second change
    assert site.end() == "done: the servers are a" and undone == ["first"]


def test_a_server_that_cannot_join_is_taken_out_again(site: Site) -> None:
    site.failure = "no model there"
    assert site.change("a", "b", "c", "d") == "failed: d does not start: no model there"
    assert site.done == ["seat d at 3", "unseat d"]
    site.survey_fails = True
    assert site.change("a", "b", "c", "d") == "failed: no such machine"
    assert site.change("a", "b", "c") == "done: the servers are a, b, c"


def test_a_file_that_changes_meanwhile_is_followed_afterwards(site: Site) -> None:
    site.changes.want(servers("a", "c"))
    site.changes.want(servers("a", "b", "c"))
    assert site.end() == "done: the servers are a, c"
    site.changes.tick()
    assert site.end() == "done: the servers are a, c, b"


def test_what_is_saved_with_the_seats_is_right(site: Site) -> None:
    unseat, seen = site.unseat, []

    def saving(rank: int) -> None:
        seen.append([*site.changes.hosts])
        unseat(rank)

    site.unseat = saving
    site.change("a", "c")
    assert seen == [["a", "c"]]


def test_without_a_vacant_seat_none_joins(site: Site) -> None:
    assert site.change("a", "b", "c", "d", "e").startswith("failed: e cannot join: the service has")
    assert "d has joined" in site.lines


def test_a_changed_line_is_refused(site: Site) -> None:
    other = servers("a", "b").servers
    site.changes.want(ClusterSpec((*other, ServerSpec("c", "127.0.0.1", experts=9))))
    assert site.lines[-1].startswith("failed: the line of c has changed")
    assert site.done == []


def test_a_change_waits_until_all_other_servers_run_and_nothing_moves(site: Site) -> None:
    """But a server that is lost may leave."""
    site.present -= {2}
    site.changes.want(servers("a", "c"))
    site.changes.tick()
    assert site.done == []
    site.present |= {2}
    site.settled = False
    site.changes.tick()
    assert site.done == []
    site.settled = True
    site.present -= {1}
    assert site.end() == "done: the servers are a, c"


def test_a_server_that_does_not_finish_in_time_leaves_anyway(site: Site) -> None:
    site.changes.want(servers("a", "c"))
    site.changes.tick()
    site.settled = False
    site.changes.tick()
    assert site.done == ["dismiss b"]
    site.now = 31.0
    site.changes.tick()
    assert site.done == ["dismiss b", "unseat b"]


HOSTS = "# ours\na address=x memory=1GiB\n\nb address=y memory=1GiB # small\n"


def test_the_hosts_file_changes_by_one_line(tmp_path: pathlib.Path) -> None:
    without = "# ours\na address=x memory=1GiB\n\n"
    assert changed(HOSTS, "remove", "b") == without
    drained = changed(HOSTS, "drain", "b")
    assert drained == f"{without}{DRAINED}b address=y memory=1GiB # small\n"
    assert changed(drained, "add", "b") == HOSTS
    assert (
        changed(drained, "add", "b address=z memory=1GiB") == f"{without}b address=z memory=1GiB\n"
    )
    for action, server in (("add", "a"), ("add", "c"), ("remove", "c"), ("drain", "a x=1")):
        with pytest.raises(UserError):
            changed(HOSTS, action, server)
    path = tmp_path / "hosts.txt"
    path.write_text(HOSTS)
    file = HostsFile(path, "cpu")
    with pytest.raises(UserError, match="unknown key"):
        file.change("add", "c address=x rooms=4")
    assert path.read_text() == HOSTS
    path.chmod(0o600)
    before = file.change("drain", "b")
    assert path.read_text() == drained and file.read().names == ("a",)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="no servers"):
        file.change("drain", "a")
    file.restore(before)
    assert path.read_text() == HOSTS
    path.write_bytes(HOSTS.encode() + b"# M\xfcller\n")
    with pytest.raises(UserError, match="cannot be read"):
        file.change("drain", "b")
    path.write_bytes(b"\xef\xbb\xbf" + HOSTS.encode())
    file.change("drain", "a")
    assert file.read().names == ("b",)


def test_changes_are_made_one_after_the_other(tmp_path: pathlib.Path) -> None:
    """A second command would take the end of the first one's change for its own."""
    hosts, log = tmp_path / "hosts.txt", tmp_path / FILE_NAME
    hosts.write_text(HOSTS)
    log.write_text("b finishes its requests, the others load its experts\n")
    with sole_launcher(tmp_path), pytest.raises(UserError, match="is joining or leaving"):
        change("drain", "b", hosts, tmp_path)
    assert hosts.read_text() == HOSTS
    Site(tmp_path, "a", "b")  # a launcher that starts has no change under way
    assert not log.exists()
    assert change("drain", "b", hosts, tmp_path) == 0
