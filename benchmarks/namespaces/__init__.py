"""A testbed: several hosts on slow links in one machine, as `dance_jax.launch` finds real hosts.

    python benchmarks/testbed.py up --hosts 3 --rate 500Mbps    # as root, on Linux
    python benchmarks/testbed.py run                            # the example prompts
    python benchmarks/testbed.py run --prompts my.jsonl         # options go to dance_jax.launch
    python benchmarks/testbed.py exec alpha ip address          # a command on one host
    python benchmarks/testbed.py down

A host is a network namespace with its own address, host name, /etc/hosts, /run and sshd. A veth
pair connects the host to a bridge. Both ends of the pair send through a token bucket (tc tbf), so
the link has its rate in each direction. The bridge is in the namespace of one more host, `head`,
from which commands are launched. The head's link is not shaped, and the head has the only ssh key
that the hosts accept. The testbed has no route to this machine's network. All hosts see this
machine's files, except /run.

`--round-trip 10ms` adds as much to the round trip between hosts: a process on the head delays every
frame (`delay`). It keeps up with tokens and prompts, but not with traffic that fills a link.

Rates count packets with their headers. The byte counters count packets before they are split to
the link's MTU, so up to 4 % of the bytes, headers, are missing from the counters. Other benchmarks
use `Testbed`:

    bed = Testbed.load()
    bed.set_rate(100_000_000)                # None: not shaped
    process = bed.exec("alpha", ["hostname"], stdout=subprocess.PIPE)
    received, sent = bed.counters()["alpha"]

or make a testbed for the duration of a run (`temporary`).
"""

from .bed import Testbed
from .hosts import HEAD, Host, hosts_like, parse_rate, show_rate
from .leftovers import down, remains

__all__ = ["HEAD", "Host", "Testbed", "down", "hosts_like", "parse_rate", "remains", "show_rate"]
