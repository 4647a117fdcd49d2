"""The exchange of one MoE layer, measured between three hosts of a testbed of its own.

    python benchmarks/exchange.py                   # all of it; as root, on Linux
    python benchmarks/exchange.py --quick --check   # few sizes; exit code 1 if a target is missed
    python benchmarks/exchange.py --rates 20Mbps,none --tokens 1,64 --local-shares 0,0.5

Needs matplotlib (extra `bench`) for the plots. Three processes, as launch starts them, on hosts
with 1, 1 and 2 devices run one compiled step that is nothing but MoE layers, over a real pool.
Every expert is on one server, and routes are data: a share of a server's tokens (`local share`)
finds all its experts at home, each of the others visits every other server. So transfers per
token are exactly (servers - 1) x (1 - local share), and a local share of 0.5 halves them.

Bytes are those of the hosts' interfaces, with headers and acknowledgements of TCP/IP and with what
jax.distributed says to itself (the idle bytes are printed); nothing is subtracted. The bound is
transfers x hidden size x bytes of a value, each way.

Time per layer is the median step of the slowest server over its layers. Where it goes is said of
the server that waits least, which is the one that the others wait for: `waiting` for the first
bytes of the last peer (on a slow link they come behind what goes to others), `moving` bytes from
then on, `collectives` between the devices of a server, `experts`, and the rest, `packing`; from a
profiler's trace of a few steps more.

The hosts share this machine's cores by quota, each in proportion to its devices. Time in experts
and packing is therefore that of a slow machine, and one that has used up its share stands still for
up to 10 ms; other load on this machine adds to every time. Bytes and rounds do not depend on it.
"""
