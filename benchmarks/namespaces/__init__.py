"""Several hosts on slow links in one machine: what `dance_jax.launch` meets between real ones.

    python benchmarks/testbed.py up --hosts 3 --rate 500Mbps    # as root, on Linux
    python benchmarks/testbed.py run                            # the example prompts across it
    python benchmarks/testbed.py run --prompts my.jsonl         # options go to dance_jax.launch
    python benchmarks/testbed.py exec alpha ip address          # a command on one host
    python benchmarks/testbed.py down

A host is a network namespace with its own address, host name, /etc/hosts, /run and sshd. A veth
pair leads from it to a bridge, and both ends of the pair send through a token bucket (tc tbf), so
its link has the rate in each direction. The bridge is in the namespace of one more host, `head`,
where the person who launches sits: not shaped, with the one key that the others accept. Nothing
leads from there to the network of this machine. All hosts see this machine's files, but for /run.

`--round-trip 10ms` adds as much to the round trip between hosts: a process on the head delays every
frame (`delay`). It keeps up with tokens and prompts, but not with traffic that fills a link.

A rate is of packets with their headers. The counters see packets before they are cut to the link's
size, so that up to 4 % of headers are missing there. Other benchmarks use `Testbed`:

    bed = Testbed.load()
    bed.set_rate(100_000_000)                # None: not shaped
    process = bed.exec("alpha", ["hostname"], stdout=subprocess.PIPE)
    received, sent = bed.counters()["alpha"]

or make one that lasts as long as they do (`temporary`).
"""

from .bed import Testbed
from .hosts import HEAD, Host, hosts_like, parse_rate, show_rate
from .leftovers import down, remains

__all__ = ["HEAD", "Host", "Testbed", "down", "hosts_like", "parse_rate", "remains", "show_rate"]
